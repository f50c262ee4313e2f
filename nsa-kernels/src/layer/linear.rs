//! The linear layer y = x·Wᵀ + b, its weight laid out as PyTorch's `nn.Linear`.

use crate::{Backend, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::Element;

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element, W: Element> {
    /// Input `[N, I]`.
    pub x: Tensor<'a, T, 2>,
    /// Weight `[O, I]`.
    pub weight: Tensor<'a, W, 2>,
    /// Bias `[O]`.
    pub bias: Option<Tensor<'a, W, 1>>,
    /// Written, or added to if `accumulate`: `[N, O]`.
    pub y: TensorMut<'a, T, 2>,
    /// Whether the result is added to `y` (a residual connection).
    pub accumulate: bool,
}

/// One of the layers of [`forward_all`].
#[derive(Debug)]
pub struct Product<'a, T: Element, W: Element> {
    /// Weight `[O, I]`, O another number in each.
    pub weight: Tensor<'a, W, 2>,
    /// Written: `[N, O]`.
    pub y: TensorMut<'a, T, 2>,
}

/// Arguments of [`backward_input`].
#[derive(Debug)]
pub struct BackwardInput<'a, W: Element, G: Element, D: Element> {
    /// Gradient of the output `[N, O]`.
    pub dy: Tensor<'a, G, 2>,
    /// Weight `[O, I]`.
    pub weight: Tensor<'a, W, 2>,
    /// Written, or added to if `accumulate`: gradient of the input `[N, I]`.
    pub dx: TensorMut<'a, D, 2>,
    /// Whether the result is added to `dx`.
    pub accumulate: bool,
}

/// Arguments of [`backward_weight`].
#[derive(Debug)]
pub struct BackwardWeight<'a, T: Element, G: Element> {
    /// Input of the forward pass `[N, I]`.
    pub x: Tensor<'a, T, 2>,
    /// Gradient of the output `[N, O]`.
    pub dy: Tensor<'a, G, 2>,
    /// Added to: gradient of the weight `[O, I]`.
    pub dw: TensorMut<'a, T::Acc, 2>,
    /// Added to: gradient of the bias `[O]`.
    pub db: Option<TensorMut<'a, T::Acc, 1>>,
}

/// Applies a linear layer: y_no = \[y_no +\] b_o + Σ_i x_ni·w_oi.
///
/// **Shapes**: on the fields of [`Forward`]; any of N, I, O may be 0.
///
/// **Numerics**: sums in A, rounded to `T` once. The order of summation depends on the shape alone.
///
/// **Source**: reference twin: a plain loop in `tests/layer/linear.rs`.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<T, W>(backend: &Backend, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    const OP: &str = "linear::forward";
    let ([n, i], [o, _]) = (args.x.shape(), args.weight.shape());
    args.weight.check(OP, "weight", [o, i])?;
    args.y.check(OP, "y", [n, o])?;
    if let Some(bias) = &args.bias {
        bias.check(OP, "bias", [o])?;
    }
    match backend {
        Backend::Cpu(cpu) => cpu::layer::linear::forward(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::linear::forward(cuda, OP, args),
    }
}

/// Applies several linear layers without bias to one input `x` `[N, I]`, as projections to queries, keys and values are: on the CPU at
/// the same time, on a device in one launch for few rows.
///
/// **Shapes**: on the fields of [`Product`].
///
/// **Numerics**: those of [`forward`]. (Few rows are summed on a device as they are where `x` and weights are of two types.)
///
/// **Source**: [`forward`].
///
/// # Errors
/// If a shape does not fit.
pub fn forward_all<T, W>(backend: &Backend, x: Tensor<'_, T, 2>, products: Vec<Product<'_, T, W>>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    const OP: &str = "linear::forward_all";
    let [n, i] = x.shape();
    for product in &products {
        let [o, _] = product.weight.shape();
        product.weight.check(OP, "weight", [o, i])?;
        product.y.check(OP, "y", [n, o])?;
    }
    match backend {
        Backend::Cpu(cpu) => cpu::layer::linear::forward_all(cpu, x, products),
        Backend::Cuda(cuda) => cuda::layer::linear::forward_all(cuda, OP, x, products),
    }
}

/// Passes a gradient through a linear layer: dx_ni = \[dx_ni +\] Σ_o dy_no·w_oi.
///
/// **Shapes**: on the fields of [`BackwardInput`].
///
/// **Numerics**: sums in A, rounded to `D` once. `dy` is rounded to the backend's [operand type](Backend::operand_type) of
/// the weight first.
///
/// **Source**: derivative of [`forward`].
///
/// # Errors
/// If a shape does not fit.
pub fn backward_input<W, G, D>(backend: &Backend, args: BackwardInput<'_, W, G, D>) -> Result<()>
where
    W: Element,
    G: Element<Acc = W::Acc>,
    D: Element<Acc = W::Acc>,
{
    const OP: &str = "linear::backward_input";
    let ([n, o], [_, i]) = (args.dy.shape(), args.weight.shape());
    args.weight.check(OP, "weight", [o, i])?;
    args.dx.check(OP, "dx", [n, i])?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::linear::backward_input(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::linear::backward_input(cuda, OP, args),
    }
}

/// Gathers the gradients of a linear layer's weights: dw_oi += Σ_n dy_no·x_ni, db_o += Σ_n dy_no.
///
/// **Shapes**: on the fields of [`BackwardWeight`].
///
/// **Numerics**: sums in A, in an order that depends on the shape alone; dw of `dy` rounded to the backend's
/// [operand type](Backend::operand_type) of `x`.
///
/// **Source**: derivative of [`forward`].
///
/// # Errors
/// If a shape does not fit.
pub fn backward_weight<T, G>(backend: &Backend, args: BackwardWeight<'_, T, G>) -> Result<()>
where
    T: Element,
    G: Element<Acc = T::Acc>,
{
    const OP: &str = "linear::backward_weight";
    let ([n, i], [_, o]) = (args.x.shape(), args.dy.shape());
    args.dy.check(OP, "dy", [n, o])?;
    args.dw.check(OP, "dw", [o, i])?;
    if let Some(db) = &args.db {
        db.check(OP, "db", [o])?;
    }
    match backend {
        Backend::Cpu(cpu) => cpu::layer::linear::backward_weight(cpu, args),
        Backend::Cuda(cuda) => cuda::layer::linear::backward_weight(cuda, OP, args),
    }
}
