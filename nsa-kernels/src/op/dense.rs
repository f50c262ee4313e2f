//! Full causal attention: the baseline that sparse attention is measured against.

use super::{BranchGrad, Shapes};
use crate::{Backend, Element, Result, Rows, Tensor, TensorMut, cuda};
use nsa_core::{NsaConfig, Packing};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Heads, dims, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// Rows `[G, Dk]`, one a token of each sequence, its context included.
    pub k: Rows<'a, T>,
    /// As many rows `[G, Dv]`.
    pub v: Rows<'a, T>,
    /// Written: `[N, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
    /// Written: natural log of the softmax's denominator, `[N, Hq]`.
    pub lse: TensorMut<'a, T::Acc, 2>,
}

/// Arguments of [`backward`]; every sequence starts at position 0.
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Heads, dims, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// `[N, G, Dk]`.
    pub k: Tensor<'a, T, 3>,
    /// `[N, G, Dv]`.
    pub v: Tensor<'a, T, 3>,
    /// The forward's output `[N, Hq, Dv]`.
    pub o: Tensor<'a, T, 3>,
    /// The forward's lse `[N, Hq]`.
    pub lse: Tensor<'a, T::Acc, 2>,
    /// Gradient of the output `[N, Hq, Dv]`.
    pub d_o: Tensor<'a, T, 3>,
    /// Written: `[N, Hq, Dk]` …
    pub dq: TensorMut<'a, T::Acc, 3>,
    /// … or, if true, added to what it holds.
    pub accumulate: bool,
    /// Written: `[N, G, Dk]`.
    pub dk: TensorMut<'a, T::Acc, 3>,
    /// Written: `[N, G, Dv]`.
    pub dv: TensorMut<'a, T::Acc, 3>,
}

/// Softmax attention of each query over all tokens up to its own:
/// o_t,h = Σ_s p_s v_s,g with p = softmax_s(scale · q_t,h · k_s,g), s ≤ t, g = ⌊h/R⌋.
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: products, softmax and sums in A, p rounded to the backend's operand type before it meets v; lse
/// natural log; o rounded to `T` once. The result of a query does not depend on the number of threads nor on other
/// sequences, nor on how a sequence is cut, but for a cut that leaves a single query: its keys (on the CPU if more than 256)
/// are summed in chunks, which are then joined in their order.
///
/// **Source**: SPEC 1; reference twin `nsa_ref::dense`.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<T: Element>(backend: &Backend, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "dense::forward";
    let shapes = Shapes::new(OP, args.config, args.packing);
    let lens = |s| {
        let end = args.packing.seq(s).end();
        end..=end
    };
    shapes.forward(&args.q, ("k", &args.k), ("v", &args.v), (&args.o, &args.lse), lens)?;
    match backend {
        Backend::Cpu(cpu) => T::dense_forward(cpu, args),
        Backend::Cuda(cuda) => cuda::dense::forward(cuda, args),
    }
}

/// Gradients of [`forward`] (SPEC 3): δ = Σ do·o, p = exp(scale·q·k − lse), ds = p·(do·v − δ);
/// dq = scale·ds·k, dk = scale·Σ ds·q, dv = Σ p·do.
///
/// **Shapes**: on the fields of [`Backward`].
///
/// **Numerics**: in A, p and ds rounded to the backend's operand type; summed in an order that depends on the
/// sequence alone: the same bits on any number of threads.
///
/// **Source**: SPEC 3; reference twin `nsa_ref::dense`.
///
/// # Errors
/// If a shape does not fit or a sequence has a context.
pub fn backward<T: Element>(backend: &Backend, args: Backward<'_, T>) -> Result<()> {
    const OP: &str = "dense::backward";
    let shapes = Shapes::new(OP, args.config, args.packing);
    shapes.backward(&BranchGrad {
        rows: args.packing.num_tokens(),
        q: &args.q,
        k: ("k", &args.k),
        v: ("v", &args.v),
        o: &args.o,
        lse: &args.lse,
        d_o: &args.d_o,
        gates: None,
        d_gates: None,
        dq: &args.dq,
        dk: ("dk", &args.dk),
        dv: ("dv", &args.dv),
    })?;
    match backend {
        Backend::Cpu(cpu) => T::dense_backward(cpu, args),
        Backend::Cuda(cuda) => cuda::dense::backward(cuda, args),
    }
}
