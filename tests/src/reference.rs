//! The same inputs through `nsa-ref`: exactly, or rounded where a kernel rounds.

use crate::Kind;
use crate::generate::{PhiShapes, Side, Weights, mirror};
use crate::kernels::{Attention, AttentionGrads, AttentionOutput, Compress, CompressGrads, Pattern, Sizes, text};
use crate::operator::{Branches, Compressed, Grads, Inputs, Outputs};
use nsa_core::DType;
use nsa_kernels::Backend;
use nsa_ref::branch::{self, Upstream};
use nsa_ref::{Arithmetic, BlockIndices, Exact, Rounded, Tensor, cmp, compress, dense, nsa, slc, win};

/// Which arithmetic.
#[derive(Clone, Copy, Debug)]
pub enum Mode {
    /// f64: the truth.
    Exact,
    /// Rounded where a kernel rounds.
    Rounded(Rounded),
    /// The same, but for P and dS, of which a multiple is rounded.
    Multiples(Rounded),
}

/// Rounds 3/2 of a probability or dS. Kernels round multiples of these, by a gate or by what the greatest score so far was: that
/// is another draw of the same noise, which decides where a row has few terms.
struct Multiples<'a>(&'a Rounded);

impl Arithmetic for Multiples<'_> {
    fn acc(&self, x: f64) -> f64 {
        self.0.acc(x)
    }
    fn prob(&self, x: f64) -> f64 {
        self.0.prob(1.5 * x) / 1.5
    }
    fn store(&self, x: f64) -> f64 {
        self.0.store(x)
    }
}

/// The arithmetic of a backend's kernels on tensors of this type. There is nothing finer than f64 to judge an f64 kernel
/// by: it gets f32's, and the comparison counts in ulps.
pub fn rounded(backend: &Backend, storage: DType) -> Rounded {
    let storage = if storage == DType::F64 { DType::F32 } else { storage };
    Rounded { storage, prob: backend.operand_type(storage) }
}

/// Calls a function that is generic over the arithmetic.
macro_rules! with_mode {
    ($mode:expr, $a:ident => $body:expr) => {
        match $mode {
            Mode::Exact => {
                let $a = &Exact;
                $body
            }
            Mode::Rounded(ref rounded) => {
                let $a = rounded;
                $body
            }
            Mode::Multiples(ref rounded) => {
                let $a = &Multiples(rounded);
                $body
            }
        }
    };
}

/// What the reference of an attention operation yields.
#[derive(Clone, Debug)]
pub struct AttentionTruth {
    /// Output and block lists.
    pub output: AttentionOutput<f64, f64>,
    /// S of every candidate, one list a query and group, from [`Pattern::Cmp`].
    pub scores: Vec<Vec<f64>>,
    /// Gradients.
    pub grads: AttentionGrads<f64>,
}

impl AttentionTruth {
    /// With features in reverse.
    fn mirror(self, dk: usize, dv: usize) -> Self {
        let AttentionOutput { o, lse, block_indices } = self.output;
        let AttentionGrads { q, k, v } = self.grads;
        Self {
            output: AttentionOutput { o: mirror(&o, dv), lse, block_indices },
            scores: self.scores,
            grads: AttentionGrads { q: mirror(&q, dk), k: mirror(&k, dk), v: mirror(&v, dv) },
        }
    }
}

/// The rounded versions of an attention operation: in order, and with features in reverse and multiples rounded.
///
/// # Errors
/// If a shape does not fit.
pub fn attention_rounded<T: Kind>(inputs: &Attention<T>, rounded: Rounded) -> Result<[AttentionTruth; 2], String> {
    let (dk, dv) = (inputs.config.head_dim_qk(), inputs.config.head_dim_v());
    let mirrored = attention(&inputs.mirror(), Mode::Multiples(rounded))?.mirror(dk, dv);
    Ok([attention(inputs, Mode::Rounded(rounded))?, mirrored])
}

/// Runs an attention operation, forward and backward.
///
/// # Errors
/// If a shape does not fit.
pub fn attention<T: Kind>(inputs: &Attention<T>, mode: Mode) -> Result<AttentionTruth, String> {
    with_mode!(mode, a => attention_with(a, inputs)).map_err(text)
}

fn attention_with<T: Kind, A: Arithmetic>(a: &A, inputs: &Attention<T>) -> nsa_ref::Result<AttentionTruth> {
    let (config, packing) = (&inputs.config, &inputs.packing);
    let sizes = Sizes::new(config, packing);
    let rows = inputs.k.len() / (sizes.g * sizes.dk).max(1);
    let q = Tensor::from_elements(&sizes.q(), &inputs.q);
    let k = Tensor::from_elements(&[rows, sizes.g, sizes.dk], &inputs.k);
    let v = Tensor::from_elements(&[rows, sizes.g, sizes.dv], &inputs.v);
    let d_o = upstream(a, inputs, &sizes);
    let tensors = branch::Inputs { q: &q, k: &k, v: &v };
    let indices = BlockIndices { shape: sizes.indices(), data: inputs.block_indices.clone() };
    let (mut block_indices, mut scores) = (Vec::new(), Vec::new());
    let output = match inputs.pattern {
        Pattern::Cmp => {
            let selected = cmp::forward(a, config, packing, &tensors)?;
            (block_indices, scores) = (selected.block_indices.data, selected.scores);
            selected.output
        }
        Pattern::Slc => slc::forward(a, config, packing, &tensors, &indices)?,
        Pattern::Win => win::forward(a, config, packing, &tensors)?,
        Pattern::Dense => dense::forward(a, config, packing, &tensors)?,
    };
    let up = Upstream { output: &output, d_o: &d_o };
    let grads = match inputs.pattern {
        Pattern::Cmp => cmp::backward(a, config, packing, &tensors, &up)?,
        Pattern::Slc => slc::backward(a, config, packing, &tensors, &indices, &up)?,
        Pattern::Win => win::backward(a, config, packing, &tensors, &up)?,
        Pattern::Dense => dense::backward(a, config, packing, &tensors, &up)?,
    };
    Ok(AttentionTruth {
        output: AttentionOutput { o: output.o.data, lse: output.lse.data, block_indices },
        scores,
        grads: AttentionGrads { q: grads.dq.data, k: grads.dk.data, v: grads.dv.data },
    })
}

/// Block lists `[N, G, n]` and scores of the compressed branch alone.
///
/// # Errors
/// If a shape does not fit.
pub fn selection<T: Kind>(inputs: &Attention<T>, mode: Mode) -> Result<(Vec<i32>, Vec<Vec<f64>>), String> {
    let sizes = Sizes::new(&inputs.config, &inputs.packing);
    let rows = inputs.rows()?.total();
    let q = Tensor::from_elements(&sizes.q(), &inputs.q);
    let k = Tensor::from_elements(&[rows, sizes.g, sizes.dk], &inputs.k);
    let v = Tensor::from_elements(&[rows, sizes.g, sizes.dv], &inputs.v);
    let tensors = branch::Inputs { q: &q, k: &k, v: &v };
    let selected = with_mode!(mode, a => cmp::forward(a, &inputs.config, &inputs.packing, &tensors)).map_err(text)?;
    Ok((selected.block_indices.data, selected.scores))
}

/// do of the branch: the gated sum's times its gate, in the accumulator.
fn upstream<T: Kind, A: Arithmetic>(a: &A, inputs: &Attention<T>, sizes: &Sizes) -> Tensor {
    let mut d_o = Tensor::from_elements(&sizes.o(), &inputs.d_o);
    if let (Some(gates), Some(column)) = (&inputs.gates, inputs.pattern.gate()) {
        for (row, d_row) in d_o.data.chunks_mut(sizes.dv).enumerate() {
            let gate = gates[row * 3 + column].to_f64();
            d_row.iter_mut().for_each(|x| *x = a.acc(gate * *x));
        }
    }
    d_o
}

fn phi<T: Kind>(weights: &Weights<T>, shapes: &PhiShapes) -> compress::Phi {
    match weights {
        Weights::Mean => compress::Phi::Mean,
        Weights::Weighted(weight) => {
            compress::Phi::Weighted { weight: Tensor::from_elements(&shapes.weighted, weight) }
        }
        Weights::Linear(weight) => compress::Phi::Linear { weight: Tensor::from_elements(&shapes.linear, weight) },
        Weights::Mlp { weight1, bias1, weight2, bias2 } => compress::Phi::Mlp {
            weight1: Tensor::from_elements(&shapes.weight1, weight1),
            bias1: bias1.as_ref().map(|bias| Tensor::from_elements(&shapes.bias1, bias)),
            weight2: Tensor::from_elements(&shapes.weight2, weight2),
            bias2: bias2.as_ref().map(|bias| Tensor::from_elements(&shapes.bias2, bias)),
        },
    }
}

fn phi_data(phi: compress::Phi) -> Weights<f64> {
    match phi {
        compress::Phi::Mean => Weights::Mean,
        compress::Phi::Weighted { weight } => Weights::Weighted(weight.data),
        compress::Phi::Linear { weight } => Weights::Linear(weight.data),
        compress::Phi::Mlp { weight1, bias1, weight2, bias2 } => Weights::Mlp {
            weight1: weight1.data,
            bias1: bias1.map(|bias| bias.data),
            weight2: weight2.data,
            bias2: bias2.map(|bias| bias.data),
        },
    }
}

impl From<compress::Gradients> for CompressGrads<f64> {
    fn from(grads: compress::Gradients) -> Self {
        Self { x: grads.dx.data, position: grads.d_position.map(|e| e.data), weights: phi_data(grads.d_phi) }
    }
}

impl From<CompressGrads<f64>> for Compressed<f64> {
    fn from(CompressGrads { x, position, weights }: CompressGrads<f64>) -> Self {
        Self::Tokens { x, position, phi: weights }
    }
}

/// φ's inputs as the reference takes them.
fn side<T: Kind>(inputs: &Compress<T>) -> nsa::Side {
    let shapes = PhiShapes::new(&inputs.config, inputs.side);
    let [_, g, dim] = shapes.position;
    nsa::Side {
        x: Tensor::from_elements(&[inputs.packing.num_tokens(), g, dim], &inputs.x),
        position: inputs.position.as_ref().map(|e| Tensor::from_elements(&shapes.position, e)),
        phi: phi(&inputs.weights, &shapes),
    }
}

/// Runs φ forward, and backward from the gradient of the blocks.
///
/// # Errors
/// If a shape does not fit.
pub fn compressed<T: Kind>(
    inputs: &Compress<T>,
    d_blocks: &[f64],
    mode: Mode,
) -> Result<(Vec<f64>, CompressGrads<f64>), String> {
    let nsa::Side { x, position, phi } = side(inputs);
    let (config, packing) = (&inputs.config, &inputs.packing);
    let run = || -> nsa_ref::Result<_> {
        with_mode!(mode, a => {
            let blocks = compress::forward(a, config, packing, &x, position.as_ref(), &phi)?;
            let d_blocks = Tensor::new(&blocks.shape, d_blocks.to_vec());
            let grads = compress::backward(a, config, packing, &x, position.as_ref(), &phi, &d_blocks)?;
            Ok((blocks.data, grads.into()))
        })
    };
    run().map_err(text)
}

/// Blocks of φ and the gradients that came back through them.
pub type Through = (Vec<f64>, CompressGrads<f64>);

/// The rounded versions of φ: in order, and with features and hidden units in reverse.
///
/// # Errors
/// If a shape does not fit.
pub fn compressed_rounded<T: Kind>(
    inputs: &Compress<T>,
    d_blocks: &[f64],
    rounded: Rounded,
) -> Result<[Through; 2], String> {
    let mode = Mode::Rounded(rounded);
    let dim = inputs.side.dim(&inputs.config);
    let (blocks, grads) = compressed(&inputs.mirror(), &mirror(d_blocks, dim), mode)?;
    let mirrored = (mirror(&blocks, dim), grads.mirror(&inputs.config, inputs.side));
    Ok([compressed(inputs, d_blocks, mode)?, mirrored])
}

/// The rounded versions of the whole operator: in order, and with features and hidden units in reverse and multiples rounded.
///
/// # Errors
/// If a shape does not fit.
pub fn run_rounded<T: Kind>(inputs: &Inputs<T>, rounded: Rounded) -> Result<[Outputs<f64, f64>; 2], String> {
    let mirrored = run(&inputs.mirror(), Mode::Multiples(rounded))?.mirror(&inputs.config);
    Ok([run(inputs, Mode::Rounded(rounded))?, mirrored])
}

/// Runs the whole operator, and the gradients if `d_o` is there.
///
/// # Errors
/// If a shape does not fit.
pub fn run<T: Kind>(inputs: &Inputs<T>, mode: Mode) -> Result<Outputs<f64, f64>, String> {
    with_mode!(mode, a => run_with(a, inputs)).map_err(text)
}

fn run_with<T: Kind, A: Arithmetic>(a: &A, inputs: &Inputs<T>) -> nsa_ref::Result<Outputs<f64, f64>> {
    let (config, packing) = (&inputs.config, &inputs.packing);
    let sizes = Sizes::new(config, packing);
    let rows = packing.cu_keys()?.total();
    let tokens = |dim, data: &[T]| Tensor::from_elements(&[rows, sizes.g, dim], data);
    let tensors = nsa::Inputs {
        q: Tensor::from_elements(&sizes.q(), &inputs.q),
        gates: Tensor::from_elements(&sizes.gates(), &inputs.gates),
        cmp: compressed_inputs(a, inputs, &sizes)?,
        k_slc: tokens(sizes.dk, &inputs.k.slc),
        v_slc: tokens(sizes.dv, &inputs.v.slc),
        k_win: tokens(sizes.dk, &inputs.k.win),
        v_win: tokens(sizes.dv, &inputs.v.win),
        block_indices: inputs
            .block_indices
            .as_ref()
            .map(|data| BlockIndices { shape: sizes.indices(), data: data.clone() }),
    };
    let outputs = nsa::forward(a, config, packing, &tensors)?;
    let grads = match &inputs.d_o {
        None => None,
        Some(d_o) => {
            let d_o = Tensor::from_elements(&sizes.o(), d_o);
            let grads = nsa::backward(a, config, packing, &tensors, &outputs, &d_o)?;
            Some(gradients(a, inputs, grads)?)
        }
    };
    let [o_cmp, o_slc, o_win] = outputs.branches;
    Ok(Outputs {
        o: outputs.o.data,
        branches: [o_cmp.o.data, o_slc.o.data, o_win.o.data],
        lse: [o_cmp.lse.data, o_slc.lse.data, o_win.lse.data],
        block_indices: outputs.block_indices.data,
        blocks: [outputs.k_blocks.data, outputs.v_blocks.data],
        grads,
    })
}

/// The compressed branch's inputs. The reference takes tokens for keys and values or blocks for both; if a caller
/// compressed one side alone, the other is compressed here.
fn compressed_inputs<T: Kind, A: Arithmetic>(
    a: &A,
    inputs: &Inputs<T>,
    sizes: &Sizes,
) -> nsa_ref::Result<nsa::Compressed> {
    let (config, packing) = (&inputs.config, &inputs.packing);
    let (k, v) = match (inputs.compress(Side::Key), inputs.compress(Side::Value)) {
        (Ok(k), Ok(v)) => return Ok(nsa::Compressed::Tokens { kv: Box::new([side(&k), side(&v)]) }),
        sides => sides,
    };
    let rows = packing.cu_blocks(config)?.total();
    let blocks = |source: Result<Compress<T>, &[T]>, dim| match source {
        Err(blocks) => Ok(Tensor::from_elements(&[rows, sizes.g, dim], blocks)),
        Ok(tokens) => {
            let nsa::Side { x, position, phi } = side(&tokens);
            compress::forward(a, config, packing, &x, position.as_ref(), &phi)
        }
    };
    Ok(nsa::Compressed::Blocks { k: blocks(k, sizes.dk)?, v: blocks(v, sizes.dv)? })
}

fn gradients<T: Kind, A: Arithmetic>(a: &A, inputs: &Inputs<T>, grads: nsa::Gradients) -> nsa_ref::Result<Grads<f64>> {
    let through = |which: Side, d_blocks: Tensor| match inputs.compress(which) {
        Err(_) => Ok::<_, nsa_ref::Error>(Compressed::Blocks(d_blocks.data)),
        Ok(tokens) => {
            let nsa::Side { x, position, phi } = side(&tokens);
            let (config, packing) = (&inputs.config, &inputs.packing);
            let grads = compress::backward(a, config, packing, &x, position.as_ref(), &phi, &d_blocks)?;
            Ok(CompressGrads::from(grads).into())
        }
    };
    let (k_cmp, v_cmp) = match grads.d_cmp {
        Some(both) => {
            let [k, v] = *both;
            (CompressGrads::from(k).into(), CompressGrads::from(v).into())
        }
        None => (through(Side::Key, grads.dk_blocks)?, through(Side::Value, grads.dv_blocks)?),
    };
    Ok(Grads {
        q: grads.dq.data,
        k: Branches { cmp: k_cmp, slc: grads.dk_slc.data, win: grads.dk_win.data },
        v: Branches { cmp: v_cmp, slc: grads.dv_slc.data, win: grads.dv_win.data },
        gates: grads.d_gates.data,
    })
}
