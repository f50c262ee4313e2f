//! Attention over the selected blocks (SPEC 2.2).

use super::{BranchGrad, Shapes};
use crate::{Backend, Element, Result, Rows, Tensor, TensorMut, cuda};
use nsa_core::{NsaConfig, Packing};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Heads, dims, block sizes, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// Rows `[G, Dk]`, one a token of each sequence, its context included.
    pub k: Rows<'a, T>,
    /// As many rows `[G, Dv]`.
    pub v: Rows<'a, T>,
    /// Selected blocks `[N, G, n]`, ascending, padded with −1.
    pub block_indices: Tensor<'a, i32, 3>,
    /// Written: `[N, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
    /// Written: natural log of the softmax's denominator, `[N, Hq]`.
    pub lse: TensorMut<'a, T::Acc, 2>,
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
    /// `[N, G, Dk]`.
    pub k: Tensor<'a, T, 3>,
    /// `[N, G, Dv]`.
    pub v: Tensor<'a, T, 3>,
    /// Selected blocks `[N, G, n]`, ascending, padded with −1.
    pub block_indices: Tensor<'a, i32, 3>,
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
    /// Written: `[N, G, Dk]`.
    pub dk: TensorMut<'a, T::Acc, 3>,
    /// Written: `[N, G, Dv]`.
    pub dv: TensorMut<'a, T::Acc, 3>,
}

/// Softmax attention of each query over the tokens of its selected blocks up to its own:
/// o_t,h = Σ_s p_s v_s,g with p = softmax_s(scale · q_t,h · k_s,g), s ≤ t, ⌊s/l'⌋ ∈ `block_indices[t, g]`, g = ⌊h/R⌋.
/// A query without a block gets o = 0 and lse = −∞.
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: products, softmax and sums in A, p rounded to the backend's operand type before it meets v; lse natural log; o rounded to `T` once. The result of a query does
/// not depend on the number of threads nor on what else is in the call.
///
/// **Source**: SPEC 2.2; reference twin `nsa_ref::slc`.
///
/// # Errors
/// If a shape does not fit, or a block list is not strictly ascending candidates (0..=⌊t/l'⌋) followed by −1. Lists in a
/// device's memory are not read for that: a list ends at what is no candidate.
pub fn forward<T: Element>(backend: &Backend, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "slc::forward";
    let shapes = Shapes::new(OP, args.config, args.packing);
    let lens = |s| {
        let end = args.packing.seq(s).end();
        end..=end
    };
    shapes.forward(&args.q, ("k", &args.k), ("v", &args.v), (&args.o, &args.lse), lens)?;
    args.block_indices.check(OP, "block_indices", shapes.selection())?;
    match backend {
        Backend::Cpu(cpu) => T::slc_forward(cpu, args),
        Backend::Cuda(cuda) => cuda::slc::forward(cuda, args),
    }
}

/// Gradients of [`forward`] (SPEC 3): do^c = g^c·do, δ = Σ do^c·o, p = exp(scale·q·k − lse), ds = p·(do^c·v − δ);
/// dq = scale·ds·k, dk = scale·Σ ds·q, dv = Σ p·do^c. Selection passes no gradient.
///
/// **Shapes**: on the fields of [`Backward`].
///
/// **Numerics**: in A, p and ds rounded to the backend's operand type; summed in an order that depends on the
/// sequence alone: the same bits on any number of threads.
///
/// **Source**: SPEC 3; reference twin `nsa_ref::slc`.
///
/// # Errors
/// If a shape does not fit, a sequence has a context, or a block list is not strictly ascending candidates followed
/// by −1.
pub fn backward<T: Element>(backend: &Backend, args: Backward<'_, T>) -> Result<()> {
    const OP: &str = "slc::backward";
    let shapes = Shapes::new(OP, args.config, args.packing);
    shapes.backward(&BranchGrad {
        rows: args.packing.num_tokens(),
        q: &args.q,
        k: ("k", &args.k),
        v: ("v", &args.v),
        o: &args.o,
        lse: &args.lse,
        d_o: &args.d_o,
        gates: args.gates.as_ref(),
        d_gates: args.d_gates.as_ref(),
        dq: &args.dq,
        dk: ("dk", &args.dk),
        dv: ("dv", &args.dv),
    })?;
    args.block_indices.check(OP, "block_indices", shapes.selection())?;
    match backend {
        Backend::Cpu(cpu) => T::slc_backward(cpu, args),
        Backend::Cuda(cuda) => cuda::slc::backward(cuda, args),
    }
}
