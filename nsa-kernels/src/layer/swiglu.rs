//! The gated activation of the MLP: silu(gate)·up.

use crate::{Backend, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::Element;

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// `[N, F]`.
    pub gate: Tensor<'a, T, 2>,
    /// `[N, F]`.
    pub up: Tensor<'a, T, 2>,
    /// Written: `[N, F]`.
    pub y: TensorMut<'a, T, 2>,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a, T: Element, G: Element> {
    /// `[N, F]`.
    pub gate: Tensor<'a, T, 2>,
    /// `[N, F]`.
    pub up: Tensor<'a, T, 2>,
    /// Gradient of the output `[N, F]`.
    pub dy: Tensor<'a, T::Acc, 2>,
    /// Written: `[N, F]`.
    pub d_gate: TensorMut<'a, G, 2>,
    /// Written: `[N, F]`.
    pub d_up: TensorMut<'a, G, 2>,
}

/// Gates one half of an MLP's hidden layer by the other: y = gate·σ(gate)·up.
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: in A, rounded to `T` once.
///
/// **Source**: arXiv 2002.05202; reference twin: a plain loop in `tests/layer/elementwise.rs`.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<T: Element>(backend: &Backend, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "swiglu::forward";
    args.up.check(OP, "up", args.gate.shape())?;
    args.y.check(OP, "y", args.gate.shape())?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::swiglu::forward(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::swiglu::forward(cuda, OP, args),
    }
}

/// Passes a gradient through the gated activation: with s = σ(gate),
/// d_gate = dy·up·s·(1 + gate·(1 − s)), d_up = dy·gate·s.
///
/// **Shapes**: on the fields of [`Backward`].
///
/// **Numerics**: in A, rounded to `G` once; σ is recomputed.
///
/// **Source**: derivative of [`forward`].
///
/// # Errors
/// If a shape does not fit.
pub fn backward<T, G>(backend: &Backend, args: Backward<'_, T, G>) -> Result<()>
where
    T: Element,
    G: Element<Acc = T::Acc>,
{
    const OP: &str = "swiglu::backward";
    let shape = args.gate.shape();
    args.up.check(OP, "up", shape)?;
    args.dy.check(OP, "dy", shape)?;
    args.d_gate.check(OP, "d_gate", shape)?;
    args.d_up.check(OP, "d_up", shape)?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::swiglu::backward(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::swiglu::backward(cuda, OP, args),
    }
}
