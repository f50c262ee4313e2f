//! RMSNorm, of whole rows or, with N·H rows of D channels, of heads.

use crate::{Backend, Error, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::Element;

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element, W: Element> {
    /// Input `[N, C]`.
    pub x: Tensor<'a, T, 2>,
    /// Weight `[C]`.
    pub weight: Tensor<'a, W, 1>,
    /// Added to the mean square; not negative.
    pub eps: f64,
    /// Written: `[N, C]`.
    pub y: TensorMut<'a, T, 2>,
    /// Written, if wanted for the backward pass: 1/√(mean square + eps) of each row `[N]`.
    pub rstd: Option<TensorMut<'a, T::Acc, 1>>,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a, T: Element, W: Element> {
    /// Input of the forward pass `[N, C]`.
    pub x: Tensor<'a, T, 2>,
    /// Weight `[C]`.
    pub weight: Tensor<'a, W, 1>,
    /// As the forward pass wrote it `[N]`.
    pub rstd: Tensor<'a, T::Acc, 1>,
    /// Gradient of the output `[N, C]`.
    pub dy: Tensor<'a, T::Acc, 2>,
    /// Written, or added to if `accumulate`: gradient of the input `[N, C]`.
    pub dx: TensorMut<'a, T::Acc, 2>,
    /// Whether the result is added to `dx` (the other way around a residual block).
    pub accumulate: bool,
    /// Added to: gradient of the weight `[C]`.
    pub dw: TensorMut<'a, T::Acc, 1>,
}

/// Scales each row to a root mean square of 1, then each channel by its weight:
/// y_nc = x_nc·r_n·w_c with r_n = 1/√(Σ_c x_nc²/C + eps).
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: in A, rounded to `T` once.
///
/// **Source**: arXiv 1910.07467; reference twin: a plain loop in `tests/layer/rmsnorm.rs`.
///
/// # Errors
/// If a shape does not fit, rows have no channel, or `eps` is negative or no number.
pub fn forward<T, W>(backend: &Backend, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    const OP: &str = "rmsnorm::forward";
    let [n, c] = args.x.shape();
    check_channels(OP, c)?;
    args.weight.check(OP, "weight", [c])?;
    args.y.check(OP, "y", [n, c])?;
    if let Some(rstd) = &args.rstd {
        rstd.check(OP, "rstd", [n])?;
    }
    if !(args.eps >= 0.0 && args.eps.is_finite()) {
        let (arg, value) = ("eps", args.eps.to_string());
        return Err(Error::Value { op: OP, arg, value, rule: "must be finite and not negative" });
    }
    match backend {
        Backend::Cpu(cpu) => cpu::layer::rmsnorm::forward(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::rmsnorm::forward(cuda, OP, args),
    }
}

/// Passes a gradient through the norm: with x̂ = x·r and g_nc = dy_nc·w_c,
/// dx_nc = \[dx_nc +\] r_n·(g_nc − x̂_nc·Σ_c g_nc·x̂_nc/C), dw_c += Σ_n dy_nc·x̂_nc.
///
/// **Shapes**: on the fields of [`Backward`].
///
/// **Numerics**: in A; dw sums over rows in blocks whose size depends on N alone.
///
/// **Source**: derivative of [`forward`].
///
/// # Errors
/// If a shape does not fit or rows have no channel.
pub fn backward<T, W>(backend: &Backend, args: Backward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    const OP: &str = "rmsnorm::backward";
    let [n, c] = args.x.shape();
    check_channels(OP, c)?;
    args.weight.check(OP, "weight", [c])?;
    args.rstd.check(OP, "rstd", [n])?;
    args.dy.check(OP, "dy", [n, c])?;
    args.dx.check(OP, "dx", [n, c])?;
    args.dw.check(OP, "dw", [c])?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::rmsnorm::backward(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::rmsnorm::backward(cuda, OP, args),
    }
}

fn check_channels(op: &'static str, channels: usize) -> Result<()> {
    if channels > 0 {
        return Ok(());
    }
    Err(Error::Value { op, arg: "x", value: "rows of 0 channels".to_owned(), rule: "a mean needs at least one" })
}
