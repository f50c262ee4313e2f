//! Sliding-window attention (SPEC 2.3).

use crate::{Backend, Result, Rows, Tensor, TensorMut};
use nsa_core::{Element, NsaConfig, Packing};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Heads, dims, window, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// Rows `[G, Dk]`; the last row of each sequence belongs to its last query, and the rows reach back at least
    /// min(w − 1, context) tokens before its first.
    pub k: Rows<'a, T>,
    /// As many rows `[G, Dv]`.
    pub v: Rows<'a, T>,
    /// Written: `[N, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
    /// Written: natural log of the softmax's denominator, `[N, Hq]`.
    pub lse: TensorMut<'a, T::Acc, 2>,
}

/// Arguments of [`backward`]; every sequence starts at position 0.
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Heads, dims, window, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// `[N, G, Dk]`.
    pub k: Tensor<'a, T, 3>,
    /// `[N, G, Dv]`.
    pub v: Tensor<'a, T, 3>,
    /// The forward's output `[N, Hq, Dv]`.
    pub o: Tensor<'a, T, 3>,
    /// The forward's lse `[N, Hq]`.
    pub lse: Tensor<'a, T::Acc, 2>,
    /// Gradient of the gated sum `[N, Hq, Dv]` …
    pub d_o: Tensor<'a, T, 3>,
    /// … times this gate, if any: do^c = g^c · do. `[N, Hq, 3]`, of which the branch takes its column.
    pub gates: Option<Tensor<'a, T, 3>>,
    /// Accumulated: `[N, Hq, Dk]`.
    pub dq: TensorMut<'a, T::Acc, 3>,
    /// Written: `[N, G, Dk]`.
    pub dk: TensorMut<'a, T::Acc, 3>,
    /// Written: `[N, G, Dv]`.
    pub dv: TensorMut<'a, T::Acc, 3>,
}
