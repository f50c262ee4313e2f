//! φ: compression blocks of keys or values (SPEC 2.1).

use crate::{Backend, Result, Tensor, TensorMut};
use nsa_core::{Element, NsaConfig, Packing};

/// The weights of φ, one set a KV head, for keys (D = Dk) or values (D = Dv). `T` is the type they are stored in.
#[derive(Clone, Copy, Debug)]
pub enum Phi<'a, T> {
    /// Average.
    Mean,
    /// Σ_p a_p · token p.
    Weighted {
        /// `[l, G]`.
        weight: Tensor<'a, T, 2>,
    },
    /// The flattened block (token-major) times a matrix.
    Linear {
        /// `[G, l·D, D]`.
        weight: Tensor<'a, T, 3>,
    },
    /// Linear, GELU (erf form), linear.
    Mlp {
        /// `[G, l·D, H]`.
        weight1: Tensor<'a, T, 3>,
        /// `[G, H]`.
        bias1: Option<Tensor<'a, T, 2>>,
        /// `[G, H, D]`.
        weight2: Tensor<'a, T, 3>,
        /// `[G, D]`.
        bias2: Option<Tensor<'a, T, 2>>,
    },
}

/// Gradients of the weights of φ, in the same shapes, accumulated (`+=`) in `A`.
#[derive(Debug)]
pub enum PhiGrad<'a, A> {
    /// Nothing to learn.
    Mean,
    /// See [`Phi::Weighted`].
    Weighted {
        /// `[l, G]`.
        weight: TensorMut<'a, A, 2>,
    },
    /// See [`Phi::Linear`].
    Linear {
        /// `[G, l·D, D]`.
        weight: TensorMut<'a, A, 3>,
    },
    /// See [`Phi::Mlp`].
    Mlp {
        /// `[G, l·D, H]`.
        weight1: TensorMut<'a, A, 3>,
        /// `[G, H]`.
        bias1: Option<TensorMut<'a, A, 2>>,
        /// `[G, H, D]`.
        weight2: TensorMut<'a, A, 3>,
        /// `[G, D]`.
        bias2: Option<TensorMut<'a, A, 2>>,
    },
}

/// Arguments of [`forward`]. Sequences are those of `packing`, which must start at position 0; block i of each
/// becomes row i of its part of `blocks`. (A decoding step passes the ring's l tokens as a sequence of its own.)
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Block sizes.
    pub config: &'a NsaConfig,
    /// Sequences of `x`.
    pub packing: &'a Packing,
    /// Keys or values `[N, G, D]`.
    pub x: Tensor<'a, T, 3>,
    /// Intra-block position embedding e `[l, G, D]`.
    pub position: Option<Tensor<'a, T, 3>>,
    /// φ.
    pub phi: Phi<'a, T>,
    /// Written: `[M, G, D]`, packed by `Packing::cu_blocks`.
    pub blocks: TensorMut<'a, T, 3>,
}

/// Arguments of [`backward`]; intermediate activations are recomputed.
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Block sizes.
    pub config: &'a NsaConfig,
    /// Sequences of `x`.
    pub packing: &'a Packing,
    /// Keys or values `[N, G, D]`.
    pub x: Tensor<'a, T, 3>,
    /// Intra-block position embedding e `[l, G, D]`.
    pub position: Option<Tensor<'a, T, 3>>,
    /// φ.
    pub phi: Phi<'a, T>,
    /// Gradient of the blocks `[M, G, D]`.
    pub d_blocks: Tensor<'a, T::Acc, 3>,
    /// Written: gradient of `x` `[N, G, D]`.
    pub dx: TensorMut<'a, T::Acc, 3>,
    /// Accumulated: gradient of e `[l, G, D]`.
    pub d_position: Option<TensorMut<'a, T::Acc, 3>>,
    /// Accumulated: gradients of φ's weights.
    pub d_phi: PhiGrad<'a, T::Acc>,
}
