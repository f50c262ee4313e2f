//! The whole operator: φ, three branches, selection and gate, forward and backward (SPEC 2, 3).

use crate::branch::{self, Output, Upstream};
use crate::compress::{self, Phi};
use crate::select::BlockIndices;
use crate::{Arithmetic, Result, Tensor, cmp, gate, slc, win};
use nsa_core::{NsaConfig, Packing};

/// Where the compressed keys and values come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Compressed {
    /// From tokens, through φ.
    Tokens {
        /// Keys and values.
        kv: Box<[Side; 2]>,
    },
    /// Given: k̃ `[M, G, Dk]` and ṽ `[M, G, Dv]`, packed per sequence.
    Blocks {
        /// k̃.
        k: Tensor,
        /// ṽ.
        v: Tensor,
    },
}

/// Keys or values of the compressed branch with their φ.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// `[tokens, G, D]`.
    pub x: Tensor,
    /// e `[l, G, D]`.
    pub position: Option<Tensor>,
    /// φ.
    pub phi: Phi,
}

/// Inputs of the operator. Keys and values have one row per token, contexts included.
#[derive(Clone, Debug, PartialEq)]
pub struct Inputs {
    /// `[N, Hq, Dk]`.
    pub q: Tensor,
    /// After the sigmoid, `[N, Hq, 3]`; order cmp, slc, win.
    pub gates: Tensor,
    /// Compressed branch.
    pub cmp: Compressed,
    /// Keys of the selected branch `[tokens, G, Dk]`.
    pub k_slc: Tensor,
    /// Values of the selected branch `[tokens, G, Dv]`.
    pub v_slc: Tensor,
    /// Keys of the window branch `[tokens, G, Dk]`.
    pub k_win: Tensor,
    /// Values of the window branch `[tokens, G, Dv]`.
    pub v_win: Tensor,
    /// Blocks to attend to, instead of selecting.
    pub block_indices: Option<BlockIndices>,
}

/// Outputs of the operator, and what its backward needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Outputs {
    /// `[N, Hq, Dv]`.
    pub o: Tensor,
    /// Per branch; order cmp, slc, win.
    pub branches: [Output; 3],
    /// k̃ `[M, G, Dk]`.
    pub k_blocks: Tensor,
    /// ṽ `[M, G, Dv]`.
    pub v_blocks: Tensor,
    /// The blocks attended to.
    pub block_indices: BlockIndices,
    /// S of every candidate, one list a query and group (row-major `[N, G]`).
    pub scores: Vec<Vec<f64>>,
}

/// Gradients of every differentiable input, in the accumulator: rounded by whoever stores them.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// `[N, Hq, Dk]`.
    pub dq: Tensor,
    /// `[N, Hq, 3]`.
    pub d_gates: Tensor,
    /// `[M, G, Dk]`.
    pub dk_blocks: Tensor,
    /// `[M, G, Dv]`.
    pub dv_blocks: Tensor,
    /// Through φ, keys and values, if the blocks came from tokens.
    pub d_cmp: Option<Box<[compress::Gradients; 2]>>,
    /// `[tokens, G, Dk]`.
    pub dk_slc: Tensor,
    /// `[tokens, G, Dv]`.
    pub dv_slc: Tensor,
    /// `[tokens, G, Dk]`.
    pub dk_win: Tensor,
    /// `[tokens, G, Dv]`.
    pub dv_win: Tensor,
}

/// o_t,h = Σ_c g^c_t,h·o^c_t,h.
///
/// **Shapes**: on the fields of [`Inputs`] and [`Outputs`].
///
/// **Source**: paper equations 5 to 12; SPEC 2.
///
/// # Errors
/// If a shape does not fit, φ is not of the configuration's kind, or a given block list is not strictly ascending
/// candidates followed by −1.
pub fn forward<A: Arithmetic>(a: &A, config: &NsaConfig, packing: &Packing, inputs: &Inputs) -> Result<Outputs> {
    check(config, packing, inputs)?;
    let (k_blocks, v_blocks) = match &inputs.cmp {
        Compressed::Blocks { k, v } => (k.clone(), v.clone()),
        Compressed::Tokens { kv } => {
            let tokens = Packing::new(packing.cu_keys()?);
            let blocks =
                |side: &Side| compress::forward(a, config, &tokens, &side.x, side.position.as_ref(), &side.phi);
            (blocks(&kv[0])?, blocks(&kv[1])?)
        }
    };
    let q = &inputs.q;
    let selected = cmp::forward(a, config, packing, &branch::Inputs { q, k: &k_blocks, v: &v_blocks })?;
    let block_indices = inputs.block_indices.clone().unwrap_or(selected.block_indices);
    let slc_inputs = branch::Inputs { q, k: &inputs.k_slc, v: &inputs.v_slc };
    let slc = slc::forward(a, config, packing, &slc_inputs, &block_indices)?;
    let win = win::forward(a, config, packing, &branch::Inputs { q, k: &inputs.k_win, v: &inputs.v_win })?;
    let branches = [selected.output, slc, win];
    let o = gate::forward(a, &inputs.gates, branches.each_ref().map(|b| &b.o))?;
    Ok(Outputs { o, branches, k_blocks, v_blocks, block_indices, scores: selected.scores })
}

/// Checks every input, by the name that files give it.
fn check(config: &NsaConfig, packing: &Packing, inputs: &Inputs) -> Result<()> {
    const OP: &str = "nsa";
    let (n, heads, groups) = (packing.num_tokens(), config.num_heads(), config.num_kv_heads());
    let (tokens, blocks) = (packing.cu_keys()?.total(), packing.cu_blocks(config)?.total());
    let (dim_qk, dim_v) = (config.head_dim_qk(), config.head_dim_v());
    inputs.q.check(OP, "q", &[n, heads, dim_qk])?;
    inputs.gates.check(OP, "gates", &[n, heads, 3])?;
    match &inputs.cmp {
        Compressed::Blocks { k, v } => {
            k.check(OP, "k_cmp_blocks", &[blocks, groups, dim_qk])?;
            v.check(OP, "v_cmp_blocks", &[blocks, groups, dim_v])?;
        }
        Compressed::Tokens { kv } => {
            let names = [("k_cmp", "pe_k", "phi_k"), ("v_cmp", "pe_v", "phi_v")];
            for ((side, (x, position, phi)), dim) in kv.iter().zip(names).zip([dim_qk, dim_v]) {
                side.x.check(OP, x, &[tokens, groups, dim])?;
                if let Some(e) = &side.position {
                    e.check(OP, position, &[config.compress_block(), groups, dim])?;
                }
                side.phi.check(OP, phi, config, dim)?;
            }
        }
    }
    inputs.k_slc.check(OP, "k_slc", &[tokens, groups, dim_qk])?;
    inputs.v_slc.check(OP, "v_slc", &[tokens, groups, dim_v])?;
    inputs.k_win.check(OP, "k_win", &[tokens, groups, dim_qk])?;
    inputs.v_win.check(OP, "v_win", &[tokens, groups, dim_v])?;
    inputs.block_indices.as_ref().map_or(Ok(()), |indices| indices.check(OP, config, packing))
}

/// Gradients of [`forward`] given that of o `[N, Hq, Dv]`. Those of keys and values cover contexts too: they are what
/// these queries pass back.
///
/// dg^c = Σ_dv do·o^c; do^c = g^c·do; each branch's attention; k̃ and ṽ on through φ and e; dq sums the branches.
///
/// **Source**: SPEC 3.
///
/// # Errors
/// As [`forward`].
pub fn backward<A: Arithmetic>(
    a: &A,
    config: &NsaConfig,
    packing: &Packing,
    inputs: &Inputs,
    outputs: &Outputs,
    d_o: &Tensor,
) -> Result<Gradients> {
    check(config, packing, inputs)?;
    let (d_gates, d_branches) = gate::backward(a, &inputs.gates, outputs.branches.each_ref().map(|b| &b.o), d_o)?;
    let q = &inputs.q;
    let upstream = |c: usize| Upstream { output: &outputs.branches[c], d_o: &d_branches[c] };
    let cmp_inputs = branch::Inputs { q, k: &outputs.k_blocks, v: &outputs.v_blocks };
    let cmp = cmp::backward(a, config, packing, &cmp_inputs, &upstream(0))?;
    let slc_inputs = branch::Inputs { q, k: &inputs.k_slc, v: &inputs.v_slc };
    let slc = slc::backward(a, config, packing, &slc_inputs, &outputs.block_indices, &upstream(1))?;
    let win_inputs = branch::Inputs { q, k: &inputs.k_win, v: &inputs.v_win };
    let win = win::backward(a, config, packing, &win_inputs, &upstream(2))?;
    let mut dq = cmp.dq;
    a.add_scaled(&mut dq.data, 1.0, &slc.dq.data);
    a.add_scaled(&mut dq.data, 1.0, &win.dq.data);
    let d_cmp = match &inputs.cmp {
        Compressed::Blocks { .. } => None,
        Compressed::Tokens { kv } => {
            let tokens = Packing::new(packing.cu_keys()?);
            let through = |side: &Side, d_blocks: &Tensor| {
                compress::backward(a, config, &tokens, &side.x, side.position.as_ref(), &side.phi, d_blocks)
            };
            Some(Box::new([through(&kv[0], &cmp.dk)?, through(&kv[1], &cmp.dv)?]))
        }
    };
    Ok(Gradients {
        dq,
        d_gates,
        dk_blocks: cmp.dk,
        dv_blocks: cmp.dv,
        d_cmp,
        dk_slc: slc.dk,
        dv_slc: slc.dv,
        dk_win: win.dk,
        dv_win: win.dv,
    })
}
