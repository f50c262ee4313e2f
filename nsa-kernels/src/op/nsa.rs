//! The whole operator after φ: three branches, selection and gate (SPEC 2, 3).

use crate::{Backend, Result, Rows, Tensor, TensorMut};
use nsa_core::{Element, NsaConfig, Packing};

/// Where the selected blocks come from.
#[derive(Debug)]
pub enum Selection<'a> {
    /// Selected here and written: `[N, G, n]`, ascending, padded with −1.
    Compute(TensorMut<'a, i32, 3>),
    /// Given: `[N, G, n]`, ascending, padded with −1.
    Given(Tensor<'a, i32, 3>),
}

/// What each branch leaves for the backward pass.
#[derive(Debug)]
pub struct Saved<'a, T: Element> {
    /// Written: the branches' outputs, each `[N, Hq, Dv]`; order cmp, slc, win.
    pub o: [TensorMut<'a, T, 3>; 3],
    /// Written: their lse, each `[N, Hq]`.
    pub lse: [TensorMut<'a, T::Acc, 2>; 3],
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Everything.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// Keys of the branches cmp (that is k̃), slc, win; rows as the branches' own operations take them.
    pub k: [Rows<'a, T>; 3],
    /// Values of the branches cmp (that is ṽ), slc, win.
    pub v: [Rows<'a, T>; 3],
    /// After the sigmoid, `[N, Hq, 3]`.
    pub gates: Tensor<'a, T, 3>,
    /// Selected blocks.
    pub selection: Selection<'a>,
    /// Written: per-branch outputs and lse.
    pub saved: Saved<'a, T>,
    /// Written: `[N, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
}

/// Arguments of [`backward`]; every sequence starts at position 0.
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Everything.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// k̃ `[M, G, Dk]`, k^slc, k^win `[N, G, Dk]`.
    pub k: [Tensor<'a, T, 3>; 3],
    /// ṽ `[M, G, Dv]`, v^slc, v^win `[N, G, Dv]`.
    pub v: [Tensor<'a, T, 3>; 3],
    /// After the sigmoid, `[N, Hq, 3]`.
    pub gates: Tensor<'a, T, 3>,
    /// The forward's `[N, G, n]`.
    pub block_indices: Tensor<'a, i32, 3>,
    /// The forward's per-branch outputs, each `[N, Hq, Dv]`.
    pub branches: [Tensor<'a, T, 3>; 3],
    /// The forward's per-branch lse, each `[N, Hq]`.
    pub lse: [Tensor<'a, T::Acc, 2>; 3],
    /// `[N, Hq, Dv]`.
    pub d_o: Tensor<'a, T, 3>,
    /// Written: `[N, Hq, Dk]`, the sum over the branches.
    pub dq: TensorMut<'a, T::Acc, 3>,
    /// Written: gradients of `k`.
    pub dk: [TensorMut<'a, T::Acc, 3>; 3],
    /// Written: gradients of `v`.
    pub dv: [TensorMut<'a, T::Acc, 3>; 3],
    /// Written: `[N, Hq, 3]`.
    pub d_gates: TensorMut<'a, T::Acc, 3>,
}
