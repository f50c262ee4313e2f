//! The whole operator from tokens to gradients as values: what goes in, what comes out. `cargo xtask attend` reads these
//! from files; the tests generate them.

use crate::generate::{self, Guarded, Side, Weights, mirror, widen};
use crate::kernels::{Compress, CompressGrads, Place, Sizes, text};
use crate::{Case, Kind};
use nsa_core::{CuSeqlens, NsaConfig, Packing};
use nsa_kernels::op::nsa;
use nsa_kernels::{Backend, Rows};

/// Keys or values of the compressed branch.
#[derive(Clone, Debug, PartialEq)]
pub enum Compressed<T> {
    /// φ over blocks of tokens.
    Tokens {
        /// `[N, G, D]`.
        x: Vec<T>,
        /// e: `[l, G, D]`.
        position: Option<Vec<T>>,
        /// φ's weights.
        phi: Weights<T>,
    },
    /// Compressed by the caller: `[M, G, D]`.
    Blocks(Vec<T>),
}

/// Keys or values of the three branches; also their gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct Branches<T> {
    /// Compressed.
    pub cmp: Compressed<T>,
    /// Selected: `[N, G, D]`.
    pub slc: Vec<T>,
    /// Window: `[N, G, D]`.
    pub win: Vec<T>,
}

/// Everything that goes in.
#[derive(Clone, Debug)]
pub struct Inputs<T> {
    /// Everything.
    pub config: NsaConfig,
    /// Sequences, each from position 0.
    pub packing: Packing,
    /// `[N, Hq, Dk]`.
    pub q: Vec<T>,
    /// Keys.
    pub k: Branches<T>,
    /// Values.
    pub v: Branches<T>,
    /// `[N, Hq, 3]`, order cmp, slc, win.
    pub gates: Vec<T>,
    /// `[N, G, n]`, if selection is to be skipped.
    pub block_indices: Option<Vec<i32>>,
    /// `[N, Hq, Dv]`, if gradients are wanted.
    pub d_o: Option<Vec<T>>,
}

/// Gradients of everything differentiable that went in.
#[derive(Clone, Debug)]
pub struct Grads<A> {
    /// `[N, Hq, Dk]`.
    pub q: Vec<A>,
    /// Of the keys.
    pub k: Branches<A>,
    /// Of the values.
    pub v: Branches<A>,
    /// `[N, Hq, 3]`.
    pub gates: Vec<A>,
}

/// Everything that comes out.
#[derive(Clone, Debug)]
pub struct Outputs<T, A> {
    /// `[N, Hq, Dv]`.
    pub o: Vec<T>,
    /// The branches' outputs, each `[N, Hq, Dv]`; order cmp, slc, win.
    pub branches: [Vec<T>; 3],
    /// Their lse, each `[N, Hq]`.
    pub lse: [Vec<A>; 3],
    /// `[N, G, n]`.
    pub block_indices: Vec<i32>,
    /// k̃ and ṽ, `[M, G, D]`.
    pub blocks: [Vec<T>; 2],
    /// If `d_o` was given.
    pub grads: Option<Grads<A>>,
}

impl<T> Branches<T> {
    /// The same with every tensor changed.
    pub fn map<U>(&self, f: impl Fn(&[T]) -> Vec<U>) -> Branches<U> {
        let cmp = match &self.cmp {
            Compressed::Blocks(blocks) => Compressed::Blocks(f(blocks)),
            Compressed::Tokens { x, position, phi } => {
                Compressed::Tokens { x: f(x), position: position.as_deref().map(&f), phi: phi.map(&f) }
            }
        };
        Branches { cmp, slc: f(&self.slc), win: f(&self.win) }
    }
}

impl<T: Copy> Branches<T> {
    /// With features and hidden units in reverse.
    pub fn mirror(&self, config: &NsaConfig, side: Side) -> Self {
        let (dim, hidden) = (side.dim(config), config.compress_hidden().unwrap_or(1));
        let cmp = match &self.cmp {
            Compressed::Blocks(blocks) => Compressed::Blocks(mirror(blocks, dim)),
            Compressed::Tokens { x, position, phi } => Compressed::Tokens {
                x: mirror(x, dim),
                position: position.as_deref().map(|e| mirror(e, dim)),
                phi: phi.mirror(dim, hidden),
            },
        };
        Branches { cmp, slc: mirror(&self.slc, dim), win: mirror(&self.win, dim) }
    }
}

impl Outputs<f64, f64> {
    /// With features and hidden units in reverse.
    pub fn mirror(&self, config: &NsaConfig) -> Self {
        let (dk, dv) = (config.head_dim_qk(), config.head_dim_v());
        Self {
            o: mirror(&self.o, dv),
            branches: self.branches.each_ref().map(|o| mirror(o, dv)),
            blocks: [mirror(&self.blocks[0], dk), mirror(&self.blocks[1], dv)],
            grads: self.grads.as_ref().map(|grads| Grads {
                q: mirror(&grads.q, dk),
                k: grads.k.mirror(config, Side::Key),
                v: grads.v.mirror(config, Side::Value),
                gates: grads.gates.clone(),
            }),
            ..self.clone()
        }
    }
}

impl<T: Kind> Outputs<T, T::Acc> {
    /// Every value in f64.
    pub fn widen(&self) -> Outputs<f64, f64> {
        Outputs {
            o: widen(&self.o),
            branches: self.branches.each_ref().map(|o| widen(o)),
            lse: self.lse.each_ref().map(|lse| widen(lse)),
            block_indices: self.block_indices.clone(),
            blocks: self.blocks.each_ref().map(|blocks| widen(blocks)),
            grads: self.grads.as_ref().map(|grads| Grads {
                q: widen(&grads.q),
                k: grads.k.map(widen),
                v: grads.v.map(widen),
                gates: widen(&grads.gates),
            }),
        }
    }
}

impl<T: Kind> Inputs<T> {
    /// With features and hidden units in reverse: the same mathematics, summed in another order.
    pub fn mirror(&self) -> Self {
        Self {
            q: mirror(&self.q, self.config.head_dim_qk()),
            k: self.k.mirror(&self.config, Side::Key),
            v: self.v.mirror(&self.config, Side::Value),
            d_o: self.d_o.as_deref().map(|d_o| mirror(d_o, self.config.head_dim_v())),
            ..self.clone()
        }
    }

    /// The inputs of φ; or the blocks, if the caller compressed.
    pub fn compress(&self, side: Side) -> Result<Compress<T>, &[T]> {
        let branches = match side {
            Side::Key => &self.k,
            Side::Value => &self.v,
        };
        match &branches.cmp {
            Compressed::Blocks(blocks) => Err(blocks),
            Compressed::Tokens { x, position, phi } => Ok(Compress {
                side,
                config: self.config.clone(),
                packing: self.packing.clone(),
                x: x.clone(),
                position: position.clone(),
                weights: phi.clone(),
            }),
        }
    }

    /// The inputs of a case, gradients wanted.
    pub fn generate(case: &Case) -> Self {
        let (n, config) = (case.tokens(), &case.config);
        let query = [n, config.num_heads(), config.head_dim_qk()];
        let output = [n, config.num_heads(), config.head_dim_v()];
        Self {
            packing: case.packing(),
            q: generate::tensor(case, "q", &query, case.sharpness),
            k: Branches::generate(case, Side::Key),
            v: Branches::generate(case, Side::Value),
            gates: generate::gates(case),
            block_indices: None,
            d_o: Some(generate::tensor(case, "do", &output, 1.0)),
            config: config.clone(),
        }
    }
}

impl<T: Kind> Branches<T> {
    fn generate(case: &Case, side: Side) -> Self {
        let tokens = |branch: &str| branch_tokens(case, side, branch);
        let cmp = Compressed::Tokens {
            x: tokens("cmp"),
            position: Some(generate::position(case, side)),
            phi: generate::weights(case, side),
        };
        Self { cmp, slc: tokens("slc"), win: tokens("win") }
    }
}

/// Keys or values `[N, G, D]` of the branch of that name.
pub fn branch_tokens<T: Kind>(case: &Case, side: Side, branch: &str) -> Vec<T> {
    let shape = [case.tokens(), case.config.num_kv_heads(), side.dim(&case.config)];
    generate::tensor(case, &format!("{}_{branch}", side.letter()), &shape, 1.0)
}

/// k̃ and ṽ: φ over the tokens, or what the caller gave.
///
/// # Errors
/// If a kernel refuses, or writes beside an output.
pub fn blocks<T: Kind>(backend: &Backend, inputs: &Inputs<T>) -> Result<[Vec<T>; 2], String> {
    let side = |side| match inputs.compress(side) {
        Ok(compress) => compress.forward(backend),
        Err(blocks) => Ok(blocks.to_vec()),
    };
    Ok([side(Side::Key)?, side(Side::Value)?])
}

/// Carries the gradient of the blocks on through φ.
fn through_phi<T: Kind>(
    backend: &Backend,
    inputs: &Inputs<T>,
    side: Side,
    d_blocks: Vec<T::Acc>,
) -> Result<Compressed<T::Acc>, String> {
    Ok(match inputs.compress(side) {
        Err(_) => Compressed::Blocks(d_blocks),
        Ok(compress) => {
            let CompressGrads { x, position, weights } = compress.backward(backend, &d_blocks)?;
            Compressed::Tokens { x, position, phi: weights }
        }
    })
}

/// Runs φ, the three branches, selection and gate on a backend, and the gradients if `d_o` is there.
///
/// # Errors
/// If a kernel refuses, or writes beside an output.
pub fn run<T: Kind>(backend: &Backend, inputs: &Inputs<T>) -> Result<Outputs<T, T::Acc>, String> {
    let mut outputs = forward(backend, inputs, blocks(backend, inputs)?)?;
    if let Some(d_o) = &inputs.d_o {
        outputs.grads = Some(backward(backend, inputs, &outputs, d_o)?);
    }
    Ok(outputs)
}

fn rows<'a, T: Kind>(
    place: &'a Place<'_>,
    data: &'a [T],
    [g, dim]: [usize; 2],
    offsets: &'a CuSeqlens,
) -> Result<Rows<'a, T>, String> {
    Ok(Rows::packed(place.input(data, [offsets.total(), g, dim])?, offsets))
}

fn forward<T: Kind>(backend: &Backend, inputs: &Inputs<T>, blocks: [Vec<T>; 2]) -> Result<Outputs<T, T::Acc>, String> {
    let (config, packing) = (&inputs.config, &inputs.packing);
    let (sizes, place) = (Sizes::new(config, packing), Place::new(backend));
    let (cu_blocks, cu_keys) = (packing.cu_blocks(config).map_err(text)?, packing.cu_keys().map_err(text)?);
    let mut o = Guarded::unwritten(sizes.o().iter().product());
    let mut branches = [(); 3].map(|()| Guarded::unwritten(sizes.o().iter().product()));
    let mut lse = [(); 3].map(|()| Guarded::unwritten(sizes.n * sizes.hq));
    let mut indices = Guarded::unwritten(sizes.indices().iter().product());
    let ([o_cmp, o_slc, o_win], [lse_cmp, lse_slc, lse_win]) = (&mut branches, &mut lse);
    let args = nsa::Forward {
        config,
        packing,
        q: place.input(&inputs.q, sizes.q())?,
        k: [
            rows(&place, &blocks[0], [sizes.g, sizes.dk], &cu_blocks)?,
            rows(&place, &inputs.k.slc, [sizes.g, sizes.dk], &cu_keys)?,
            rows(&place, &inputs.k.win, [sizes.g, sizes.dk], &cu_keys)?,
        ],
        v: [
            rows(&place, &blocks[1], [sizes.g, sizes.dv], &cu_blocks)?,
            rows(&place, &inputs.v.slc, [sizes.g, sizes.dv], &cu_keys)?,
            rows(&place, &inputs.v.win, [sizes.g, sizes.dv], &cu_keys)?,
        ],
        gates: place.input(&inputs.gates, sizes.gates())?,
        selection: match &inputs.block_indices {
            Some(given) => nsa::Selection::Given(place.input(given, sizes.indices())?),
            None => nsa::Selection::Compute(place.output(&mut indices, sizes.indices())?),
        },
        saved: nsa::Saved {
            o: [place.output(o_cmp, sizes.o())?, place.output(o_slc, sizes.o())?, place.output(o_win, sizes.o())?],
            lse: [
                place.output(lse_cmp, sizes.lse())?,
                place.output(lse_slc, sizes.lse())?,
                place.output(lse_win, sizes.lse())?,
            ],
        },
        o: place.output(&mut o, sizes.o())?,
    };
    nsa::forward(backend, args).map_err(text)?;
    let [o_cmp, o_slc, o_win] = branches;
    let [lse_cmp, lse_slc, lse_win] = lse;
    let indices = indices.finish("block_indices")?;
    Ok(Outputs {
        o: o.finish("o")?,
        branches: [o_cmp.finish("o_cmp")?, o_slc.finish("o_slc")?, o_win.finish("o_win")?],
        lse: [lse_cmp.finish("lse_cmp")?, lse_slc.finish("lse_slc")?, lse_win.finish("lse_win")?],
        block_indices: inputs.block_indices.clone().unwrap_or(indices),
        blocks,
        grads: None,
    })
}

fn backward<T: Kind>(
    backend: &Backend,
    inputs: &Inputs<T>,
    outputs: &Outputs<T, T::Acc>,
    d_o: &[T],
) -> Result<Grads<T::Acc>, String> {
    let (config, packing) = (&inputs.config, &inputs.packing);
    let (sizes, place) = (Sizes::new(config, packing), Place::new(backend));
    let blocks = packing.cu_blocks(config).map_err(text)?.total();
    let shapes = |dim| [[blocks, sizes.g, dim], [sizes.n, sizes.g, dim], [sizes.n, sizes.g, dim]];
    let (k_shapes, v_shapes) = (shapes(sizes.dk), shapes(sizes.dv));
    let unwritten = |shape: [usize; 3]| Guarded::<T::Acc>::unwritten(shape.iter().product());
    let (mut dq, mut d_gates) = (unwritten(sizes.q()), unwritten(sizes.gates()));
    let (mut dk, mut dv) = (k_shapes.map(unwritten), v_shapes.map(unwritten));
    let ([dk_cmp, dk_slc, dk_win], [dv_cmp, dv_slc, dv_win]) = (&mut dk, &mut dv);
    let [o_cmp, o_slc, o_win] = &outputs.branches;
    let [lse_cmp, lse_slc, lse_win] = &outputs.lse;
    let args = nsa::Backward {
        config,
        packing,
        q: place.input(&inputs.q, sizes.q())?,
        k: [
            place.input(&outputs.blocks[0], k_shapes[0])?,
            place.input(&inputs.k.slc, k_shapes[1])?,
            place.input(&inputs.k.win, k_shapes[2])?,
        ],
        v: [
            place.input(&outputs.blocks[1], v_shapes[0])?,
            place.input(&inputs.v.slc, v_shapes[1])?,
            place.input(&inputs.v.win, v_shapes[2])?,
        ],
        gates: place.input(&inputs.gates, sizes.gates())?,
        block_indices: place.input(&outputs.block_indices, sizes.indices())?,
        branches: [place.input(o_cmp, sizes.o())?, place.input(o_slc, sizes.o())?, place.input(o_win, sizes.o())?],
        lse: [
            place.input(lse_cmp, sizes.lse())?,
            place.input(lse_slc, sizes.lse())?,
            place.input(lse_win, sizes.lse())?,
        ],
        d_o: place.input(d_o, sizes.o())?,
        dq: place.output(&mut dq, sizes.q())?,
        dk: [
            place.output(dk_cmp, k_shapes[0])?,
            place.output(dk_slc, k_shapes[1])?,
            place.output(dk_win, k_shapes[2])?,
        ],
        dv: [
            place.output(dv_cmp, v_shapes[0])?,
            place.output(dv_slc, v_shapes[1])?,
            place.output(dv_win, v_shapes[2])?,
        ],
        d_gates: place.output(&mut d_gates, sizes.gates())?,
    };
    nsa::backward(backend, args).map_err(text)?;
    let branches = |side: Side, [cmp, slc, win]: [Guarded<T::Acc>; 3]| {
        let name = |branch: &str| format!("d{}_{branch}", side.letter());
        let cmp = through_phi(backend, inputs, side, cmp.finish(&name("cmp_blocks"))?)?;
        Ok::<_, String>(Branches { cmp, slc: slc.finish(&name("slc"))?, win: win.finish(&name("win"))? })
    };
    Ok(Grads {
        k: branches(Side::Key, dk)?,
        v: branches(Side::Value, dv)?,
        q: dq.finish("dq")?,
        gates: d_gates.finish("dgates")?,
    })
}
