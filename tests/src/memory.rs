//! Memory that the whole operator takes beside its inputs and outputs, on the problem that `cargo xtask check --memory`
//! measures: 16 query heads on one KV head, dims 128, the paper's block sizes and φ, f32.

use crate::generate::{PhiShapes, Side, Weights};
use crate::kernels::{Compress, Sizes, tensor, text};
use nsa_core::{CuSeqlens, NsaConfig, Packing};
use nsa_kernels::op::nsa;
use nsa_kernels::{Backend, Rows, Tensor, TensorMut};

/// What a forward may take at [`TOKENS`] tokens, and a share of it at fewer.
pub const FORWARD_LIMIT_BYTES: u64 = 256 << 20;
/// The length that the limit is for. Scores of 16 heads would be 16 GiB there at T×M, and 256 GiB at T×T.
pub const TOKENS: usize = 65_536;
/// What forward and backward together may take, in sizes of q, k, v and o: the branches' outputs are kept in between.
pub const STEP_LIMIT_SIZES: u64 = 3;

/// Runs the closure and tells the bytes that memory rose by meanwhile.
pub type Meter<'a> = &'a dyn Fn(&mut dyn FnMut() -> Result<(), String>) -> Result<u64, String>;

/// A measurement on a backend, of that many tokens.
pub type Measure = fn(&Backend, usize, Meter<'_>) -> Result<Peak, String>;

/// The measurements by name.
pub const MEASURES: [(&str, Measure); 2] = [("forward", forward_peak), ("forward and backward", step_peak)];

/// What was measured, and what it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peak {
    /// Above inputs and outputs.
    pub bytes: u64,
    /// What this may be.
    pub limit_bytes: u64,
}

/// Forward: from q, k, v and φ's weights to o, the saved branches and the block lists.
///
/// # Errors
/// If an operation refuses, leaves an output unwritten, or the meter fails.
pub fn forward_peak(backend: &Backend, tokens: usize, meter: Meter) -> Result<Peak, String> {
    let problem = Problem::new(tokens)?;
    let (mut o, mut saved) = (problem.unwritten_o(), Saved::unwritten(&problem));
    let bytes = meter(&mut || problem.forward(backend, &mut o, &mut saved).map(drop))?;
    written("o", &o)?;
    Ok(Peak { bytes, limit_bytes: FORWARD_LIMIT_BYTES * tokens as u64 / TOKENS as u64 })
}

/// Forward and backward: from q, k, v, φ's weights and do to o and all gradients; what is saved in between counts.
///
/// # Errors
/// As [`forward_peak`].
pub fn step_peak(backend: &Backend, tokens: usize, meter: Meter) -> Result<Peak, String> {
    let problem = Problem::new(tokens)?;
    let d_o = values(problem.o_len(), 3);
    let (mut o, mut grads) = (problem.unwritten_o(), Gradients::unwritten(&problem));
    let bytes = meter(&mut || {
        let mut saved = Saved::unwritten(&problem);
        let blocks = problem.forward(backend, &mut o, &mut saved)?;
        problem.backward(backend, &blocks, &saved, &d_o, &mut grads)
    })?;
    written("o", &o)?;
    written("dq", &grads.q)?;
    Ok(Peak { bytes, limit_bytes: STEP_LIMIT_SIZES * problem.size_bytes() })
}

/// A meter that asks Linux for the resident memory of this process, and its high-water mark.
///
/// # Errors
/// If the closure fails, or the system does not tell.
pub fn resident(run: &mut dyn FnMut() -> Result<(), String>) -> Result<u64, String> {
    // 5: the high-water mark starts again from what is resident now.
    std::fs::write("/proc/self/clear_refs", "5").map_err(|e| format!("/proc/self/clear_refs: {e}"))?;
    let before = status("VmRSS")?;
    run()?;
    Ok(status("VmHWM")?.saturating_sub(before))
}

/// A number of `/proc/self/status`, in bytes.
fn status(key: &str) -> Result<u64, String> {
    let text = std::fs::read_to_string("/proc/self/status").map_err(|e| format!("/proc/self/status: {e}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).ok_or_else(|| format!("no {key} there"))?;
    let kib = line.trim_start_matches(':').trim().trim_end_matches("kB").trim();
    kib.parse::<u64>().map(|kib| kib * 1024).map_err(|e| format!("{key}: {e}"))
}

/// Values between −1 and 1 that cost next to nothing to make.
fn values(len: usize, salt: u64) -> Vec<f32> {
    let mut state = salt;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Outputs are written once before, so that their pages are there when the measurement starts.
fn unwritten(shape: &[usize]) -> Vec<f32> {
    vec![f32::NAN; shape.iter().product()]
}

fn written(name: &str, values: &[f32]) -> Result<(), String> {
    let hole = values.iter().position(|x| x.is_nan());
    hole.map_or(Ok(()), |at| Err(format!("`{name}`: element {at} was left unwritten, or is NaN")))
}

/// Inputs of the operator.
struct Problem {
    config: NsaConfig,
    packing: Packing,
    cu_blocks: CuSeqlens,
    cu_keys: CuSeqlens,
    sizes: Sizes,
    q: Vec<f32>,
    gates: Vec<f32>,
    /// k_cmp and v_cmp with φ's weights.
    cmp: [Compress<f32>; 2],
    /// k_slc and v_slc.
    slc: [Vec<f32>; 2],
    /// k_win and v_win.
    win: [Vec<f32>; 2],
}

/// What the forward leaves for the backward.
struct Saved {
    o: [Vec<f32>; 3],
    lse: [Vec<f32>; 3],
    block_indices: Vec<i32>,
}

/// Gradients after φ; those of the blocks flow on.
struct Gradients {
    q: Vec<f32>,
    gates: Vec<f32>,
    k: [Vec<f32>; 3],
    v: [Vec<f32>; 3],
}

impl Saved {
    fn unwritten(problem: &Problem) -> Self {
        let Problem { sizes, .. } = problem;
        Self {
            o: [(); 3].map(|()| unwritten(&sizes.o())),
            lse: [(); 3].map(|()| unwritten(&sizes.lse())),
            block_indices: vec![i32::MIN; sizes.indices().iter().product()],
        }
    }
}

impl Gradients {
    fn unwritten(problem: &Problem) -> Self {
        let Problem { sizes, .. } = problem;
        let [k, v] = [Side::Key, Side::Value].map(|side| problem.shapes(side).map(|shape| unwritten(&shape)));
        Self { q: unwritten(&sizes.q()), gates: unwritten(&sizes.gates()), k, v }
    }
}

impl Problem {
    fn new(tokens: usize) -> Result<Self, String> {
        let config = NsaConfig::builder(16, 1, 128, 128).compress_hidden(128).build().map_err(text)?;
        let packing = Packing::new(CuSeqlens::single(tokens).map_err(text)?);
        let sizes = Sizes::new(&config, &packing);
        let keys = |salt| [values(tokens * sizes.g * sizes.dk, salt), values(tokens * sizes.g * sizes.dv, salt + 1)];
        let [k_cmp, v_cmp] = keys(10);
        let compress = |side: Side, x| {
            let shapes = PhiShapes::new(&config, side);
            let weights = |shape: [usize; 3], salt| -> Vec<f32> {
                let size = 2.0 / (shape[1] as f32).sqrt();
                values(shape.iter().product(), salt).into_iter().map(|x| x * size).collect()
            };
            Compress {
                side,
                config: config.clone(),
                packing: packing.clone(),
                x,
                position: None,
                weights: Weights::Mlp {
                    weight1: weights(shapes.weight1, 20),
                    bias1: None,
                    weight2: weights(shapes.weight2, 21),
                    bias2: None,
                },
            }
        };
        Ok(Self {
            cu_blocks: packing.cu_blocks(&config).map_err(text)?,
            cu_keys: packing.cu_keys().map_err(text)?,
            q: values(sizes.q().iter().product(), 1),
            gates: values(sizes.gates().iter().product(), 2),
            cmp: [compress(Side::Key, k_cmp), compress(Side::Value, v_cmp)],
            slc: keys(12),
            win: keys(14),
            sizes,
            packing,
            config,
        })
    }

    fn o_len(&self) -> usize {
        self.sizes.o().iter().product()
    }

    fn unwritten_o(&self) -> Vec<f32> {
        unwritten(&self.sizes.o())
    }

    /// q, k and v of the three branches, o.
    fn size_bytes(&self) -> u64 {
        let keys = [&self.cmp[0].x, &self.cmp[1].x].into_iter().chain(&self.slc).chain(&self.win);
        let elements = self.q.len() + self.o_len() + keys.map(Vec::len).sum::<usize>();
        (elements * size_of::<f32>()) as u64
    }

    /// Shapes of keys or values of the branches.
    fn shapes(&self, side: Side) -> [[usize; 3]; 3] {
        let dim = side.dim(&self.config);
        [self.cu_blocks.total(), self.sizes.n, self.sizes.n].map(|rows| [rows, self.sizes.g, dim])
    }

    /// Keys or values of the branches.
    fn branches<'a>(&'a self, side: Side, blocks: &'a [Vec<f32>; 2]) -> Result<[Tensor<'a, f32, 3>; 3], String> {
        let (at, [cmp, slc, win]) = (side as usize, self.shapes(side));
        Ok([tensor(&blocks[at], cmp)?, tensor(&self.slc[at], slc)?, tensor(&self.win[at], win)?])
    }

    fn rows<'a>(&'a self, [cmp, slc, win]: [Tensor<'a, f32, 3>; 3]) -> [Rows<'a, f32>; 3] {
        [Rows::packed(cmp, &self.cu_blocks), Rows::packed(slc, &self.cu_keys), Rows::packed(win, &self.cu_keys)]
    }

    /// Writes `o` and `saved`; returns k̃ and ṽ.
    fn forward(&self, backend: &Backend, o: &mut [f32], saved: &mut Saved) -> Result<[Vec<f32>; 2], String> {
        let blocks = [self.cmp[0].forward(backend)?, self.cmp[1].forward(backend)?];
        let sizes = &self.sizes;
        let ([o_cmp, o_slc, o_win], [lse_cmp, lse_slc, lse_win]) = (&mut saved.o, &mut saved.lse);
        let args = nsa::Forward {
            config: &self.config,
            packing: &self.packing,
            q: tensor(&self.q, sizes.q())?,
            k: self.rows(self.branches(Side::Key, &blocks)?),
            v: self.rows(self.branches(Side::Value, &blocks)?),
            gates: tensor(&self.gates, sizes.gates())?,
            selection: nsa::Selection::Compute(output(&mut saved.block_indices, sizes.indices())?),
            saved: nsa::Saved {
                o: [output(o_cmp, sizes.o())?, output(o_slc, sizes.o())?, output(o_win, sizes.o())?],
                lse: [output(lse_cmp, sizes.lse())?, output(lse_slc, sizes.lse())?, output(lse_win, sizes.lse())?],
            },
            o: output(o, sizes.o())?,
        };
        nsa::forward(backend, args).map_err(text)?;
        Ok(blocks)
    }

    fn backward(
        &self,
        backend: &Backend,
        blocks: &[Vec<f32>; 2],
        saved: &Saved,
        d_o: &[f32],
        grads: &mut Gradients,
    ) -> Result<(), String> {
        let sizes = &self.sizes;
        let [o_cmp, o_slc, o_win] = &saved.o;
        let [lse_cmp, lse_slc, lse_win] = &saved.lse;
        let args = nsa::Backward {
            config: &self.config,
            packing: &self.packing,
            q: tensor(&self.q, sizes.q())?,
            k: self.branches(Side::Key, blocks)?,
            v: self.branches(Side::Value, blocks)?,
            gates: tensor(&self.gates, sizes.gates())?,
            block_indices: tensor(&saved.block_indices, sizes.indices())?,
            branches: [tensor(o_cmp, sizes.o())?, tensor(o_slc, sizes.o())?, tensor(o_win, sizes.o())?],
            lse: [tensor(lse_cmp, sizes.lse())?, tensor(lse_slc, sizes.lse())?, tensor(lse_win, sizes.lse())?],
            d_o: tensor(d_o, sizes.o())?,
            dq: output(&mut grads.q, sizes.q())?,
            dk: outputs(&mut grads.k, self.shapes(Side::Key))?,
            dv: outputs(&mut grads.v, self.shapes(Side::Value))?,
            d_gates: output(&mut grads.gates, sizes.gates())?,
        };
        nsa::backward(backend, args).map_err(text)?;
        self.cmp[0].backward(backend, &grads.k[0])?;
        self.cmp[1].backward(backend, &grads.v[0])?;
        Ok(())
    }
}

fn output<T: Copy, const N: usize>(data: &mut [T], shape: [usize; N]) -> Result<TensorMut<'_, T, N>, String> {
    TensorMut::host(data, shape).map_err(text)
}

fn outputs(data: &mut [Vec<f32>; 3], shapes: [[usize; 3]; 3]) -> Result<[TensorMut<'_, f32, 3>; 3], String> {
    let [cmp, slc, win] = data;
    Ok([output(cmp, shapes[0])?, output(slc, shapes[1])?, output(win, shapes[2])?])
}
