//! Copies that are made together, as rows go to many caches in a decoding step.

use crate::{Backend, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::Element;

/// One of the copies of [`all`].
#[derive(Debug)]
pub struct Piece<'a, T: Element> {
    /// `[P]`, another number in each copy.
    pub source: Tensor<'a, T, 1>,
    /// Written: `[P]`.
    pub target: TensorMut<'a, T, 1>,
}

/// Copies each source to its target. On a device, up to 32 copies are one launch.
///
/// **Shapes**: on the fields of [`Piece`].
///
/// **Numerics**: the same bits.
///
/// **Source**: reference twin: a plain loop in `tests/layer/elementwise.rs`.
///
/// # Errors
/// If a target is not as long as its source, or not in the backend's memory.
pub fn all<T: Element>(backend: &Backend, copies: Vec<Piece<'_, T>>) -> Result<()> {
    const OP: &str = "copy::all";
    for copy in &copies {
        copy.target.check(OP, "target", copy.source.shape())?;
    }
    match backend {
        Backend::Cpu(_) => cpu::layer::copy::all(copies),
        Backend::Cuda(cuda) => cuda::layer::copy::all(cuda, OP, copies),
    }
}
