//! The second half of a layer: x + down(silu(gate(h))·up(h)) with h = RMSNorm(x).

use super::Dims;
use super::pass::Pass;
use super::profile::Phase;
use super::slots::MlpSlots;
use crate::Result;
use nsa_core::Element;
use nsa_kernels::layer::swiglu;
use nsa_kernels::{Backend, Buffer};

/// What the forward pass leaves for the backward pass.
#[derive(Debug)]
pub(crate) struct MlpActs<T: Element> {
    /// RMSNorm(x) `[N, C]`, and 1/rms `[N]`.
    normed: Buffer<T>,
    rstd: Buffer<T::Acc>,
    /// `[N, F]`.
    gate: Buffer<T>,
    up: Buffer<T>,
    /// silu(gate)·up `[N, F]`.
    hidden: Buffer<T>,
}

impl<T: Element> MlpActs<T> {
    pub(crate) fn new(backend: &Backend, dims: &Dims, tokens: usize) -> Self {
        let wide = || backend.alloc(tokens * dims.intermediate);
        Self {
            normed: backend.alloc(tokens * dims.hidden),
            rstd: backend.alloc(tokens),
            gate: wide(),
            up: wide(),
            hidden: wide(),
        }
    }
}

/// Gradients of the activations. Those of gate and up are operands of products and nothing else: they are kept rounded.
#[derive(Debug)]
pub(crate) struct MlpGrads<T: Element> {
    /// `[N, F]`.
    gate: Buffer<T>,
    up: Buffer<T>,
    hidden: Buffer<T::Acc>,
}

impl<T: Element> MlpGrads<T> {
    pub(crate) fn new(backend: &Backend, dims: &Dims, tokens: usize) -> Self {
        let count = tokens * dims.intermediate;
        Self { gate: backend.alloc(count), up: backend.alloc(count), hidden: backend.alloc(count) }
    }
}

/// `y` = x + MLP(RMSNorm(x)).
pub(crate) fn forward<T: Element>(
    pass: &mut Pass<'_, T>,
    slots: &MlpSlots,
    acts: &mut MlpActs<T>,
    x: &Buffer<T>,
    y: &mut Buffer<T>,
) -> Result<()> {
    let (rows, dims) = (pass.inputs.rows(), pass.dims);
    pass.norm(&slots.norm, [rows, dims.hidden], x, &mut acts.normed, &mut acts.rstd)?;
    pass.linear(Phase::Mlp, &slots.gate, &acts.normed, &mut acts.gate)?;
    pass.linear(Phase::Mlp, &slots.up, &acts.normed, &mut acts.up)?;
    let shape = [rows, dims.intermediate];
    let args = swiglu::Forward {
        gate: acts.gate.tensor(shape)?,
        up: acts.up.tensor(shape)?,
        y: acts.hidden.tensor_mut(shape)?,
    };
    pass.run(Phase::Mlp, |backend| swiglu::forward(backend, args))?;
    pass.linear(Phase::Mlp, &slots.down, &acts.hidden, y)?;
    pass.add_residual(x, y)
}

/// Turns the gradient of the output, `residual`, into that of the input; `normed` is free for use.
pub(crate) fn backward<T: Element>(
    pass: &mut Pass<'_, T>,
    slots: &MlpSlots,
    (acts, x): (&MlpActs<T>, &Buffer<T>),
    d: &mut MlpGrads<T>,
    (residual, normed): (&mut Buffer<T::Acc>, &mut Buffer<T::Acc>),
    grads: &mut Buffer<T::Acc>,
) -> Result<()> {
    let (rows, dims) = (pass.inputs.rows(), pass.dims);
    let shape = [rows, dims.intermediate];
    pass.linear_backward(Phase::Mlp, (&slots.down, None), (&acts.hidden, residual), (&mut d.hidden, false), grads)?;
    let args = swiglu::Backward {
        gate: acts.gate.tensor(shape)?,
        up: acts.up.tensor(shape)?,
        dy: d.hidden.tensor(shape)?,
        d_gate: d.gate.tensor_mut(shape)?,
        d_up: d.up.tensor_mut(shape)?,
    };
    pass.run(Phase::Mlp, |backend| swiglu::backward(backend, args))?;
    pass.linear_backward(Phase::Mlp, (&slots.gate, None), (&acts.normed, &d.gate), (normed, false), grads)?;
    pass.linear_backward(Phase::Mlp, (&slots.up, None), (&acts.normed, &d.up), (normed, true), grads)?;
    let shape = [rows, dims.hidden];
    pass.norm_backward(&slots.norm, shape, (x, &acts.rstd), normed, (residual, true), grads)
}
