//! Sums of tensors: residual connections, and gradients that meet.

use crate::{Backend, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::Element;

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// `[N, C]`.
    pub a: Tensor<'a, T, 2>,
    /// `[N, C]`.
    pub b: Tensor<'a, T, 2>,
    /// Written: `[N, C]`.
    pub y: TensorMut<'a, T, 2>,
}

/// Arguments of [`accumulate`].
#[derive(Debug)]
pub struct Accumulate<'a, T: Element> {
    /// `[N, C]`.
    pub x: Tensor<'a, T, 2>,
    /// Added to: `[N, C]`.
    pub y: TensorMut<'a, T, 2>,
}

/// Adds two tensors: y = a + b. (The gradient of both is that of y.)
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: in A, rounded to `T` once.
///
/// **Source**: reference twin: a plain loop in `tests/layer/elementwise.rs`.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<T: Element>(backend: &Backend, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "add::forward";
    args.b.check(OP, "b", args.a.shape())?;
    args.y.check(OP, "y", args.a.shape())?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::add::forward(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::add::forward(cuda, OP, args),
    }
}

/// Adds one tensor to another: y += x.
///
/// **Shapes**: on the fields of [`Accumulate`].
///
/// **Numerics**: in A, rounded to `T` once.
///
/// **Source**: reference twin: a plain loop in `tests/layer/elementwise.rs`.
///
/// # Errors
/// If a shape does not fit.
pub fn accumulate<T: Element>(backend: &Backend, args: Accumulate<'_, T>) -> Result<()> {
    args.y.check("add::accumulate", "y", args.x.shape())?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::add::accumulate(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::add::accumulate(cuda, "add::accumulate", args),
    }
}
