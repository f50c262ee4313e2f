//! AdamW over flat ranges of parameters.

use crate::{Backend, Error, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::Real;

/// The optimizer's settings for one range of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean, in \[0, 1).
    pub beta1: f64,
    /// Decay of the mean square, in \[0, 1).
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Share of the parameter that is taken off per unit of learning rate, apart from the gradient.
    pub weight_decay: f64,
}

/// Arguments of [`step`].
#[derive(Debug)]
pub struct Step<'a, R: Real> {
    /// Settings.
    pub config: AdamW,
    /// Number of this step, the first being 1.
    pub step: u64,
    /// Factor on the gradient (clipping, averaging).
    pub grad_scale: f64,
    /// Gradient `[P]`.
    pub grads: Tensor<'a, R, 1>,
    /// Updated: parameters `[P]`.
    pub params: TensorMut<'a, R, 1>,
    /// Updated: mean of the gradient `[P]`, zeros before the first step.
    pub m: TensorMut<'a, R, 1>,
    /// Updated: mean square of the gradient `[P]`, zeros before the first step.
    pub v: TensorMut<'a, R, 1>,
}

/// Takes one step: with g = `grad_scale`·grad, m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g²,
/// p ← p − lr·(m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + eps) + weight_decay·p).
///
/// **Shapes**: on the fields of [`Step`].
///
/// **Numerics**: in `R`; powers and factors in f64.
///
/// **Source**: arXiv 1711.05101 with a learning rate that multiplies the decay, as in PyTorch; reference twin: a plain
/// loop in `tests/layer/adamw.rs`.
///
/// # Errors
/// If a shape does not fit, `step` is 0, or a setting is out of its range.
pub fn step<R: Real>(backend: &Backend, args: Step<'_, R>) -> Result<()> {
    const OP: &str = "adamw::step";
    let shape = args.grads.shape();
    args.params.check(OP, "params", shape)?;
    args.m.check(OP, "m", shape)?;
    args.v.check(OP, "v", shape)?;
    if args.step == 0 {
        return Err(Error::Value { op: OP, arg: "step", value: "0".to_owned(), rule: "the first step is 1" });
    }
    let AdamW { lr, beta1, beta2, eps, weight_decay } = args.config;
    for (arg, value) in [("beta1", beta1), ("beta2", beta2)] {
        if !(0.0..1.0).contains(&value) {
            return Err(Error::Value { op: OP, arg, value: value.to_string(), rule: "must be in [0, 1)" });
        }
    }
    for (arg, value) in [("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("grad_scale", args.grad_scale)] {
        if !(value >= 0.0 && value.is_finite()) {
            let value = value.to_string();
            return Err(Error::Value { op: OP, arg, value, rule: "must be finite and not negative" });
        }
    }
    match backend {
        Backend::Cpu(cpu) => cpu::layer::adamw::step(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::adamw::step(cuda, OP, args),
    }
}

/// Sums the squares of a gradient, Σ g²; the norm is the root of the sum over all ranges.
///
/// **Shapes**: `[P]`.
///
/// **Numerics**: in f64, over blocks of a fixed size, then over the blocks in order.
///
/// **Source**: reference twin: a plain loop in `tests/layer/adamw.rs`.
///
/// # Errors
/// If the tensor is not in this backend's memory.
pub fn sum_of_squares<R: Real>(backend: &Backend, grads: Tensor<'_, R, 1>) -> Result<f64> {
    match backend {
        Backend::Cpu(cpu) => cpu::layer::adamw::sum_of_squares(cpu, grads),
        Backend::Cuda(cuda) => cuda::layer::adamw::sum_of_squares(cuda, "adamw::sum_of_squares", grads),
    }
}

/// What all parameters of a step share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors<F> {
    /// Of the mean in the update.
    pub(crate) rate: F,
    /// Of the root of the mean square.
    pub(crate) root: F,
    /// Of the parameter.
    pub(crate) keep: F,
    /// Added to the root.
    pub(crate) eps: F,
    /// Of the gradient.
    pub(crate) scale: F,
    /// Of the moments.
    pub(crate) old: [F; 2],
    /// Of the gradient, and of its square, in the moments.
    pub(crate) new: [F; 2],
}

impl<F: Real> Factors<F> {
    /// Computed in f64.
    pub(crate) fn new<R: Real>(args: &Step<'_, R>) -> Self {
        let AdamW { lr, beta1, beta2, eps, weight_decay } = args.config;
        // β₁ᵗ with t beyond i32 is 0 anyhow.
        let t = i32::try_from(args.step).unwrap_or(i32::MAX);
        Self {
            rate: F::of(lr / (1.0 - beta1.powi(t))),
            root: F::of((1.0 - beta2.powi(t)).sqrt().recip()),
            keep: F::of(1.0 - lr * weight_decay),
            eps: F::of(eps),
            scale: F::of(args.grad_scale),
            old: [F::of(beta1), F::of(beta2)],
            new: [F::of(1.0 - beta1), F::of(1.0 - beta2)],
        }
    }
}
