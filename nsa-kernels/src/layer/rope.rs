//! Rotary position embedding in Llama's half rotation: pair (i, i + D/2) turns by position·frequency_i.

use crate::{Backend, Buffer, Error, Result, Tensor, TensorMut, cpu, cuda};
use nsa_core::{Element, Real};

/// Cosines and sines of all angles that a model needs, already multiplied by the attention factor.
#[derive(Debug)]
pub struct RopeCache<A> {
    cos: Buffer<A>,
    sin: Buffer<A>,
    positions: usize,
    pairs: usize,
}

impl<A: Real> RopeCache<A> {
    /// The table for positions `0..positions` and frequencies `inv_freq` `[D/2]`:
    /// cos_pi = `attention_factor`·cos(p·`inv_freq`_i), sin likewise; computed in f64.
    pub fn new(backend: &Backend, inv_freq: &[f64], attention_factor: f64, positions: usize) -> Self {
        let table = |function: fn(f64) -> f64| -> Vec<A> {
            let row = |p| inv_freq.iter().map(move |f| A::of(attention_factor * function(p as f64 * f)));
            (0..positions).flat_map(row).collect()
        };
        let (cos, sin) = (backend.upload(&table(f64::cos)), backend.upload(&table(f64::sin)));
        Self { cos, sin, positions, pairs: inv_freq.len() }
    }

    /// Positions `0..positions` that the table holds.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Head dim that it turns.
    pub fn head_dim(&self) -> usize {
        2 * self.pairs
    }

    /// `[positions, D/2]`.
    pub(crate) fn cos(&self) -> Result<Tensor<'_, A, 2>> {
        self.cos.tensor([self.positions, self.pairs])
    }

    /// `[positions, D/2]`.
    pub(crate) fn sin(&self) -> Result<Tensor<'_, A, 2>> {
        self.sin.tensor([self.positions, self.pairs])
    }
}

/// Arguments of [`forward`] and, with gradients of type `T` = A, of [`backward`].
#[derive(Debug)]
pub struct Rotate<'a, T: Element> {
    /// Angles.
    pub cache: &'a RopeCache<T::Acc>,
    /// Position of each row `[N]`. (A compressed key's is i·d, its first token's.)
    pub positions: Tensor<'a, i32, 1>,
    /// Input, or gradient of the output: `[N, H, D]`.
    pub x: Tensor<'a, T, 3>,
    /// Written: output, or gradient of the input: `[N, H, D]`.
    pub y: TensorMut<'a, T, 3>,
}

/// Arguments of [`forward_in_place`] and, with gradients of type `T` = A, of [`backward_in_place`].
#[derive(Debug)]
pub struct RotateInPlace<'a, T: Element> {
    /// Angles.
    pub cache: &'a RopeCache<T::Acc>,
    /// Position of each row `[N]`. (A compressed key's is i·d, its first token's.)
    pub positions: Tensor<'a, i32, 1>,
    /// Read and written: each `[N, H, D]`, with any number of heads, as queries and keys of the same tokens are.
    pub x: Vec<TensorMut<'a, T, 3>>,
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

/// Rotates the heads of each row by its position:
/// y_i = x_i·cos − x_{i+D/2}·sin, y_{i+D/2} = x_{i+D/2}·cos + x_i·sin.
///
/// **Shapes**: on the fields of [`Rotate`]; D is the cache's.
///
/// **Numerics**: in A, rounded to `T` once.
///
/// **Source**: arXiv 2104.09864, pairs as in Llama; reference twin: a plain loop in `tests/layer/rope.rs`.
///
/// # Errors
/// If a shape does not fit or a position is not in the cache. (A CUDA device's positions are not looked at before: the row
/// of such a position becomes NaN.)
pub fn forward<T: Element>(backend: &Backend, args: Rotate<'_, T>) -> Result<()> {
    rotate("rope::forward", backend, args, Direction::Forward)
}

/// Passes a gradient through the rotation, which is turning it back (and the attention factor once more):
/// dx_i = dy_i·cos + dy_{i+D/2}·sin, dx_{i+D/2} = dy_{i+D/2}·cos − dy_i·sin.
///
/// **Shapes**: on the fields of [`Rotate`]; D is the cache's.
///
/// **Numerics**: in A, rounded to `T` once.
///
/// **Source**: derivative of [`forward`].
///
/// # Errors
/// If a shape does not fit or a position is not in the cache. (A CUDA device's positions are not looked at before: the row
/// of such a position becomes NaN.)
pub fn backward<T: Element>(backend: &Backend, args: Rotate<'_, T>) -> Result<()> {
    rotate("rope::backward", backend, args, Direction::Backward)
}

/// [`forward`] in place.
///
/// **Shapes**: on the fields of [`RotateInPlace`]; D is the cache's.
///
/// **Numerics**, **Source**: those of [`forward`].
///
/// # Errors
/// If a shape does not fit or a position is not in the cache. (A CUDA device's positions are not looked at before: the row
/// of such a position becomes NaN.)
pub fn forward_in_place<T: Element>(backend: &Backend, args: RotateInPlace<'_, T>) -> Result<()> {
    rotate_in_place("rope::forward_in_place", backend, args, Direction::Forward)
}

/// [`backward`] in place.
///
/// **Shapes**: on the fields of [`RotateInPlace`]; D is the cache's.
///
/// **Numerics**, **Source**: those of [`backward`].
///
/// # Errors
/// If a shape does not fit or a position is not in the cache. (A CUDA device's positions are not looked at before: the row
/// of such a position becomes NaN.)
pub fn backward_in_place<T: Element>(backend: &Backend, args: RotateInPlace<'_, T>) -> Result<()> {
    rotate_in_place("rope::backward_in_place", backend, args, Direction::Backward)
}

fn rotate<T: Element>(op: &'static str, backend: &Backend, args: Rotate<'_, T>, direction: Direction) -> Result<()> {
    let [n, h, _] = args.x.shape();
    args.x.check(op, "x", [n, h, args.cache.head_dim()])?;
    args.y.check(op, "y", args.x.shape())?;
    args.positions.check(op, "positions", [n])?;
    match backend {
        Backend::Cpu(cpu) => cpu::layer::rope::rotate(cpu, op, args, direction),
        Backend::Cuda(cuda) => cuda::layer::rope::rotate(cuda, op, args, direction),
    }
}

fn rotate_in_place<T: Element>(
    op: &'static str,
    backend: &Backend,
    args: RotateInPlace<'_, T>,
    direction: Direction,
) -> Result<()> {
    let [n] = args.positions.shape();
    for x in &args.x {
        let [_, h, _] = x.shape();
        x.check(op, "x", [n, h, args.cache.head_dim()])?;
    }
    match backend {
        Backend::Cpu(cpu) => cpu::layer::rope::rotate_in_place(cpu, op, args, direction),
        Backend::Cuda(cuda) => cuda::layer::rope::rotate_in_place(cuda, op, args, direction),
    }
}

/// The error for a position that no table row belongs to.
pub(crate) fn position_error(op: &'static str, row: usize, position: i32) -> Error {
    let value = format!("{position} in row {row}");
    Error::Value { op, arg: "positions", value, rule: "must be in 0..positions of the cache" }
}
