//! The logistic function, of the branch gates.

use crate::{Backend, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::Element;

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// `[N, F]`.
    pub x: Tensor<'a, T, 2>,
    /// Written: `[N, F]`.
    pub y: TensorMut<'a, T, 2>,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Output of the forward pass `[N, F]`.
    pub y: Tensor<'a, T, 2>,
    /// Gradient of the output `[N, F]`.
    pub dy: Tensor<'a, T::Acc, 2>,
    /// Written: gradient of the input `[N, F]`.
    pub dx: TensorMut<'a, T::Acc, 2>,
}

/// Squashes to (0, 1): y = σ(x) = 1/(1 + e^(−x)).
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: in A, rounded to `T` once; never overflows.
///
/// **Source**: SPEC 2 (gates); reference twin: a plain loop in `tests/layer/elementwise.rs`.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<T: Element>(backend: &Backend, args: Forward<'_, T>) -> Result<()> {
    args.y.check("sigmoid::forward", "y", args.x.shape())?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::sigmoid::forward(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::sigmoid::forward(cuda, "sigmoid::forward", args),
    }
}

/// Passes a gradient through the logistic function: dx = dy·y·(1 − y).
///
/// **Shapes**: on the fields of [`Backward`].
///
/// **Numerics**: in A.
///
/// **Source**: derivative of [`forward`].
///
/// # Errors
/// If a shape does not fit.
pub fn backward<T: Element>(backend: &Backend, args: Backward<'_, T>) -> Result<()> {
    const OP: &str = "sigmoid::backward";
    args.dy.check(OP, "dy", args.y.shape())?;
    args.dx.check(OP, "dx", args.y.shape())?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::sigmoid::backward(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::sigmoid::backward(cuda, OP, args),
    }
}
