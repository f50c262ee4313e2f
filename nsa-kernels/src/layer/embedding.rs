//! The embedding: rows of a table, chosen by token.

use crate::{Backend, Error, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::{Element, Real};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element, W: Element> {
    /// `[N]`, each below V.
    pub tokens: Tensor<'a, u32, 1>,
    /// `[V, C]`.
    pub weight: Tensor<'a, W, 2>,
    /// Written: `[N, C]`.
    pub y: TensorMut<'a, T, 2>,
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a, A: Real> {
    /// `[N]`, each below V.
    pub tokens: Tensor<'a, u32, 1>,
    /// Gradient of the output `[N, C]`.
    pub dy: Tensor<'a, A, 2>,
    /// Added to: gradient of the table `[V, C]`.
    pub dw: TensorMut<'a, A, 2>,
}

/// Looks tokens up: y_n = w_token(n).
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: through A, rounded to `T` once; exact if `T` = `W`.
///
/// **Source**: reference twin: a plain loop in `tests/layer/embedding.rs`.
///
/// # Errors
/// If a shape does not fit or a token is not in the vocabulary. (A CUDA device's tokens are not looked at before: the row of
/// such a token becomes NaN.)
pub fn forward<T, W>(backend: &Backend, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    const OP: &str = "embedding::forward";
    let ([n], [_, c]) = (args.tokens.shape(), args.weight.shape());
    args.y.check(OP, "y", [n, c])?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::embedding::forward(cpu, OP, args),
        Backend::Cuda(cuda) => cuda::layer::embedding::forward(cuda, OP, args),
    }
}

/// Gathers the gradient of the table: dw_v += Σ_{n: token(n) = v} dy_n.
///
/// **Shapes**: on the fields of [`Backward`].
///
/// **Numerics**: in A; rows of one token are added in ascending order.
///
/// **Source**: derivative of [`forward`].
///
/// # Errors
/// If a shape does not fit or a token is not in the vocabulary. (On a CUDA device, such a token is passed over.)
pub fn backward<A: Real>(backend: &Backend, args: Backward<'_, A>) -> Result<()> {
    const OP: &str = "embedding::backward";
    let ([n], [_, c]) = (args.tokens.shape(), args.dw.shape());
    args.dy.check(OP, "dy", [n, c])?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::embedding::backward(cpu, OP, args),
        Backend::Cuda(cuda) => cuda::layer::embedding::backward(cuda, OP, args),
    }
}

/// The error for a token outside the vocabulary.
pub(crate) fn token_error(op: &'static str, arg: &'static str, position: usize, token: u32) -> Error {
    Error::Value {
        op,
        arg,
        value: format!("{token} at position {position}"),
        rule: "must be below the vocabulary size",
    }
}
