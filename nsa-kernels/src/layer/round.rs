//! Copies in another type: rounded ones of parameters, widened ones of activations.

use crate::{Backend, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::Element;

/// Arguments of [`round`].
#[derive(Debug)]
pub struct Round<'a, T: Element> {
    /// `[P]`.
    pub x: Tensor<'a, T::Acc, 1>,
    /// Written: `[P]`.
    pub y: TensorMut<'a, T, 1>,
}

/// Rounds each element to `T`.
///
/// **Shapes**: on the fields of [`Round`].
///
/// **Numerics**: to nearest, ties to even.
///
/// **Source**: reference twin: a plain loop in `tests/layer/elementwise.rs`.
///
/// # Errors
/// If a shape does not fit.
pub fn round<T: Element>(backend: &Backend, args: Round<'_, T>) -> Result<()> {
    args.y.check("round", "y", args.x.shape())?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::round::round(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::round::round(cuda, "round", args),
    }
}

/// Arguments of [`widen`].
#[derive(Debug)]
pub struct Widen<'a, T: Element> {
    /// `[P]`.
    pub x: Tensor<'a, T, 1>,
    /// Written: `[P]`.
    pub y: TensorMut<'a, T::Acc, 1>,
}

/// Each element in the type that sums are in.
///
/// **Shapes**: on the fields of [`Widen`].
///
/// **Numerics**: exact.
///
/// **Source**: reference twin: a plain loop in `tests/layer/elementwise.rs`.
///
/// # Errors
/// If a shape does not fit.
pub fn widen<T: Element>(backend: &Backend, args: Widen<'_, T>) -> Result<()> {
    args.y.check("widen", "y", args.x.shape())?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::round::widen(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::round::widen(cuda, "widen", args),
    }
}
