//! Compressed attention with importance and selection fused (SPEC 2.1, 2.2).

use crate::{Backend, Result, Rows, Tensor, TensorMut};
use nsa_core::{Element, NsaConfig, Packing};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Heads, dims, block sizes, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// k̃, M(T) rows `[G, Dk]` a sequence (`Packing::cu_blocks`).
    pub k_blocks: Rows<'a, T>,
    /// ṽ, as many rows `[G, Dv]`.
    pub v_blocks: Rows<'a, T>,
    /// Written: `[N, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
    /// Written: natural log of the softmax's denominator, `[N, Hq]`; −∞ without a visible block.
    pub lse: TensorMut<'a, T::Acc, 2>,
    /// Written, if wanted: selected blocks `[N, G, n]`, ascending, padded with −1.
    pub block_indices: Option<TensorMut<'a, i32, 3>>,
}

/// Arguments of [`backward`]; every sequence starts at position 0.
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Heads, dims, block sizes, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// `[M, G, Dk]`.
    pub k_blocks: Tensor<'a, T, 3>,
    /// `[M, G, Dv]`.
    pub v_blocks: Tensor<'a, T, 3>,
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
    /// Written: `[M, G, Dk]`.
    pub dk_blocks: TensorMut<'a, T::Acc, 3>,
    /// Written: `[M, G, Dv]`.
    pub dv_blocks: TensorMut<'a, T::Acc, 3>,
}
