//! The output head and the loss in one: logits exist only for a chunk of rows at a time.

use crate::{Backend, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::Element;

/// The target of a row that has no loss.
pub const IGNORED: u32 = u32::MAX;

/// The loss of all rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Sum over the rows that have a target, in nats.
    pub sum: f64,
    /// Number of those rows.
    pub count: usize,
}

impl Loss {
    /// Loss per target, in nats; NaN without any.
    pub fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element, W: Element> {
    /// Input of the head `[N, C]`.
    pub hidden: Tensor<'a, T, 2>,
    /// The head `[V, C]`.
    pub weight: Tensor<'a, W, 2>,
    /// Token that follows each row `[N]`, below V, or [`IGNORED`].
    pub targets: Tensor<'a, u32, 1>,
    /// Written, if wanted: loss of each row, 0 where ignored `[N]`.
    pub losses: Option<TensorMut<'a, T::Acc, 1>>,
}

/// Arguments of [`forward_backward`].
#[derive(Debug)]
pub struct ForwardBackward<'a, T: Element, W: Element> {
    /// Input of the head `[N, C]`.
    pub hidden: Tensor<'a, T, 2>,
    /// The head `[V, C]`.
    pub weight: Tensor<'a, W, 2>,
    /// Token that follows each row `[N]`, below V, or [`IGNORED`].
    pub targets: Tensor<'a, u32, 1>,
    /// Factor on both gradients: 1/(targets of the whole step) for a mean.
    pub scale: f64,
    /// Written: gradient of the input `[N, C]`.
    pub d_hidden: TensorMut<'a, T::Acc, 2>,
    /// Added to, unless the head is frozen: gradient of the head `[V, C]`.
    pub d_weight: Option<TensorMut<'a, T::Acc, 2>>,
}

/// Measures how well the head predicts the targets: with z = hidden·Wᵀ,
/// loss_n = ln Σ_v e^(z_nv) − z_n,target(n).
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: logits and losses in A, the maximum taken out first; the sum in f64, over rows in order.
///
/// **Source**: reference twin: a plain loop in `tests/layer/cross_entropy.rs`.
///
/// # Errors
/// If a shape does not fit or a target is neither in the vocabulary nor [`IGNORED`].
pub fn forward<T, W>(backend: &Backend, args: Forward<'_, T, W>) -> Result<Loss>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    const OP: &str = "cross_entropy::forward";
    let ([n, c], [v, _]) = (args.hidden.shape(), args.weight.shape());
    args.weight.check(OP, "weight", [v, c])?;
    args.targets.check(OP, "targets", [n])?;
    if let Some(losses) = &args.losses {
        losses.check(OP, "losses", [n])?;
    }
    match backend {
        Backend::Cpu(cpu) => cpu::layer::cross_entropy::forward(cpu, OP, args),
        Backend::Cuda(cuda) => cuda::layer::cross_entropy::forward(cuda, OP, args),
    }
}

/// [`forward`] with its gradients: with p = softmax(z) and dz_nv = `scale`·(p_nv − \[v = target(n)\]), 0 where ignored,
/// d_hidden = dz·W, d_weight += dzᵀ·hidden. The loss itself is not scaled.
///
/// **Shapes**: on the fields of [`ForwardBackward`].
///
/// **Numerics**: in A; chunks of rows, whose size depends on the shape alone, are added to d_weight in order. dz is rounded
/// as [`linear`](super::linear)'s gradients are.
///
/// **Source**: derivative of [`forward`].
///
/// # Errors
/// If a shape does not fit or a target is neither in the vocabulary nor [`IGNORED`].
pub fn forward_backward<T, W>(backend: &Backend, args: ForwardBackward<'_, T, W>) -> Result<Loss>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    const OP: &str = "cross_entropy::forward_backward";
    let ([n, c], [v, _]) = (args.hidden.shape(), args.weight.shape());
    args.weight.check(OP, "weight", [v, c])?;
    args.targets.check(OP, "targets", [n])?;
    args.d_hidden.check(OP, "d_hidden", [n, c])?;
    if let Some(d_weight) = &args.d_weight {
        d_weight.check(OP, "d_weight", [v, c])?;
    }
    match backend {
        Backend::Cpu(cpu) => cpu::layer::cross_entropy::forward_backward(cpu, OP, args),
        Backend::Cuda(cuda) => cuda::layer::cross_entropy::forward_backward(cuda, OP, args),
    }
}
