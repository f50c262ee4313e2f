//! Compressed attention with importance and selection fused (SPEC 2.1, 2.2).

use super::{BranchGrad, Shapes};
use crate::{Backend, Element, Result, Rows, Tensor, TensorMut, cuda};
use nsa_core::{NsaConfig, Packing, index};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Heads, dims, block sizes, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// k̃, M(T) rows `[G, Dk]` a sequence (`Packing::cu_blocks`).
    pub k_blocks: Rows<'a, T>,
    /// ṽ, as many rows `[G, Dv]`.
    pub v_blocks: Rows<'a, T>,
    /// Written: `[N, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
    /// Written: natural log of the softmax's denominator, `[N, Hq]`; −∞ without a visible block.
    pub lse: TensorMut<'a, T::Acc, 2>,
    /// Written, if wanted: selected blocks `[N, G, n]`, ascending, padded with −1.
    pub block_indices: Option<TensorMut<'a, i32, 3>>,
}

/// Arguments of [`backward`]; every sequence starts at position 0.
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Heads, dims, block sizes, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// `[M, G, Dk]`.
    pub k_blocks: Tensor<'a, T, 3>,
    /// `[M, G, Dv]`.
    pub v_blocks: Tensor<'a, T, 3>,
    /// The forward's output `[N, Hq, Dv]`.
    pub o: Tensor<'a, T, 3>,
    /// The forward's lse `[N, Hq]`.
    pub lse: Tensor<'a, T::Acc, 2>,
    /// Gradient of the gated sum `[N, Hq, Dv]` …
    pub d_o: Tensor<'a, T, 3>,
    /// … times this gate, if any: do^c = g^c · do. `[N, Hq, 3]`, of which the branch takes its column.
    pub gates: Option<Tensor<'a, T, 3>>,
    /// Their gradients, if [`gate::backward`](super::gate::backward) has written them: they are Σ do·o^c, and `o` is not
    /// read. `[N, Hq, 3]`.
    pub d_gates: Option<Tensor<'a, T::Acc, 3>>,
    /// Written: `[N, Hq, Dk]` …
    pub dq: TensorMut<'a, T::Acc, 3>,
    /// … or, if true, added to what it holds.
    pub accumulate: bool,
    /// Written: `[M, G, Dk]`.
    pub dk_blocks: TensorMut<'a, T::Acc, 3>,
    /// Written: `[M, G, Dv]`.
    pub dv_blocks: TensorMut<'a, T::Acc, 3>,
}

/// Softmax attention of each query over the compression blocks that it sees, and the blocks that it selects:
/// o_t,h = Σ_i p_t,h,i ṽ_i,g with p = softmax_i(scale · q_t,h · k̃_i,g), i·d + l − 1 ≤ t, g = ⌊h/R⌋;
/// importance P_t,g,i = Σ_h∈g p_t,h,i, mapped to selection blocks (SPEC 2.2), of which the policy takes n.
/// A query that sees no block gets o = 0 and lse = −∞.
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: products, softmax and sums in A, p rounded to the backend's operand type before it meets v; scores are computed once; lse natural log; o rounded to `T` once. The
/// result of a query does not depend on the number of threads nor on what else is in the call. Scratch holds the
/// scores of a few queries a thread.
///
/// **Source**: SPEC 2.1, 2.2; reference twin `nsa_ref::cmp`.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<T: Element>(backend: &Backend, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "cmp::forward";
    let shapes = Shapes::new(OP, args.config, args.packing);
    let lens = |s| {
        let blocks = index::num_blocks(args.config, args.packing.seq(s).end());
        blocks..=blocks
    };
    shapes.forward(&args.q, ("k_blocks", &args.k_blocks), ("v_blocks", &args.v_blocks), (&args.o, &args.lse), lens)?;
    if let Some(indices) = &args.block_indices {
        indices.check(OP, "block_indices", shapes.selection())?;
    }
    match backend {
        Backend::Cpu(cpu) => T::cmp_forward(cpu, args),
        Backend::Cuda(cuda) => cuda::cmp::forward(cuda, args),
    }
}

/// Gradients of [`forward`] (SPEC 3): do^c = g^c·do, δ = Σ do^c·o, p = exp(scale·q·k̃ − lse), ds = p·(do^c·ṽ − δ);
/// dq = scale·ds·k̃, dk̃ = scale·Σ ds·q, dṽ = Σ p·do^c. Importance and selection pass no gradient.
///
/// **Shapes**: on the fields of [`Backward`].
///
/// **Numerics**: in A, p and ds rounded to the backend's operand type; summed in an order that depends on the
/// sequence alone: the same bits on any number of threads.
///
/// **Source**: SPEC 3; reference twin `nsa_ref::cmp`.
///
/// # Errors
/// If a shape does not fit or a sequence has a context.
pub fn backward<T: Element>(backend: &Backend, args: Backward<'_, T>) -> Result<()> {
    const OP: &str = "cmp::backward";
    let shapes = Shapes::new(OP, args.config, args.packing);
    shapes.backward(&BranchGrad {
        rows: args.packing.cu_blocks(args.config)?.total(),
        q: &args.q,
        k: ("k_blocks", &args.k_blocks),
        v: ("v_blocks", &args.v_blocks),
        o: &args.o,
        lse: &args.lse,
        d_o: &args.d_o,
        gates: args.gates.as_ref(),
        d_gates: args.d_gates.as_ref(),
        dq: &args.dq,
        dk: ("dk_blocks", &args.dk_blocks),
        dv: ("dv_blocks", &args.dv_blocks),
    })?;
    match backend {
        Backend::Cpu(cpu) => T::cmp_backward(cpu, args),
        Backend::Cuda(cuda) => cuda::cmp::backward(cuda, args),
    }
}
