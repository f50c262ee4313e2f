//! φ as an operation of candle.

use super::custom::{Custom, Operation};
use super::pack::{Part, for_dtype, pack, sizes, unpack, unpack_mut, wrap};
use super::place::Scalar;
use crate::op::compress as op;
use crate::{Backend, Mem, TensorMut};
use candle_core::{Result, Tensor};
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};
use std::marker::PhantomData;

const OP: &str = "candle::compress";

/// The weights of φ, one set a KV head, for keys (D = Dk) or values (D = Dv).
#[derive(Clone, Debug)]
pub enum Phi {
    /// Average.
    Mean,
    /// Σ_p a_p · token p.
    Weighted {
        /// `[l, G]`.
        weight: Tensor,
    },
    /// The flattened block (token-major) times a matrix.
    Linear {
        /// `[G, l·D, D]`.
        weight: Tensor,
    },
    /// Linear, GELU (erf form), linear.
    Mlp {
        /// `[G, l·D, H]`.
        weight1: Tensor,
        /// `[G, H]`.
        bias1: Option<Tensor>,
        /// `[G, H, D]`.
        weight2: Tensor,
        /// `[G, D]`.
        bias2: Option<Tensor>,
    },
}

impl Phi {
    fn kind(&self) -> CompressKind {
        match self {
            Self::Mean => CompressKind::Mean,
            Self::Weighted { .. } => CompressKind::Weighted,
            Self::Linear { .. } => CompressKind::Linear,
            Self::Mlp { .. } => CompressKind::Mlp,
        }
    }

    /// Its tensors, in the order in which they are packed.
    fn parts(&self, config: &NsaConfig, dim: usize) -> Vec<Part<'_>> {
        let (l, heads) = (config.compress_block(), config.num_kv_heads());
        let hidden = config.compress_hidden().unwrap_or_default();
        match self {
            Self::Mean => vec![],
            Self::Weighted { weight } => vec![("phi.weight", weight, vec![l, heads])],
            Self::Linear { weight } => vec![("phi.weight", weight, vec![heads, l * dim, dim])],
            Self::Mlp { weight1, bias1, weight2, bias2 } => {
                let bias1 = bias1.as_ref().map(|bias| ("phi.bias1", bias, vec![heads, hidden]));
                let bias2 = bias2.as_ref().map(|bias| ("phi.bias2", bias, vec![heads, dim]));
                let weight1 = ("phi.weight1", weight1, vec![heads, l * dim, hidden]);
                let weight2 = ("phi.weight2", weight2, vec![heads, hidden, dim]);
                [Some(weight1), bias1, Some(weight2), bias2].into_iter().flatten().collect()
            }
        }
    }
}

/// Compresses keys or values: block i of each sequence is φ(x\[i·d .. i·d + l\] + e), `[M, G, D]` packed per sequence.
///
/// **Shapes**: x `[N, G, D]` with the sequences of `cu_seqlens`; position embedding e `[l, G, D]`; weights on [`Phi`].
///
/// **Numerics**: those of [`op::compress::forward`](crate::op::compress::forward). Gradients reach x, e and the
/// weights.
///
/// **Source**: SPEC 2.1.
///
/// # Errors
/// If a shape, dtype or device does not fit, φ is not of the configuration's kind, or the device has no kernels for them.
pub fn compress(
    config: &NsaConfig,
    cu_seqlens: &CuSeqlens,
    x: &Tensor,
    position: Option<&Tensor>,
    phi: &Phi,
) -> Result<Tensor> {
    if phi.kind() != config.compress_kind() {
        return Err(wrap(crate::Error::Value {
            op: OP,
            arg: "phi",
            value: format!("{:?}", phi.kind()),
            rule: "must be of the configuration's compress_kind",
        }));
    }
    let dim = x.dims3()?.2;
    let heads = config.num_kv_heads();
    let mut parts: Vec<Part<'_>> = vec![("x", x, vec![cu_seqlens.total(), heads, dim])];
    if let Some(position) = position {
        parts.push(("position", position, vec![config.compress_block(), heads, dim]));
    }
    parts.extend(phi.parts(config, dim));
    for_dtype!(OP, x, apply(config, cu_seqlens, dim, phi, &parts))
}

fn apply<T: Scalar>(
    config: &NsaConfig,
    cu_seqlens: &CuSeqlens,
    dim: usize,
    phi: &Phi,
    parts: &[Part<'_>],
) -> Result<Tensor> {
    let biases = match phi {
        Phi::Mlp { bias1, bias2, .. } => [bias1.is_some(), bias2.is_some()],
        _ => [false, false],
    };
    let packing = Packing::new(cu_seqlens.clone());
    let op = Compress::<T> {
        config: config.clone(),
        blocks: packing.cu_blocks(config).map_err(wrap)?.total(),
        packing,
        dim,
        position: parts.iter().any(|(name, ..)| *name == "position"),
        biases,
        shapes: parts.iter().map(|(.., shape)| shape.clone()).collect(),
        element: PhantomData,
    };
    pack(OP, parts)?.apply_op1(Custom(op))
}

struct Compress<T> {
    config: NsaConfig,
    packing: Packing,
    /// Blocks of all sequences.
    blocks: usize,
    dim: usize,
    /// Whether there is a position embedding.
    position: bool,
    /// Whether there are the biases of an mlp.
    biases: [bool; 2],
    /// Shapes of the packed tensors.
    shapes: Vec<Vec<usize>>,
    element: PhantomData<T>,
}

impl<T: Scalar> Compress<T> {
    fn token_shape(&self) -> [usize; 3] {
        [self.packing.num_tokens(), self.config.num_kv_heads(), self.dim]
    }

    fn position_shape(&self) -> [usize; 3] {
        [self.config.compress_block(), self.config.num_kv_heads(), self.dim]
    }

    /// Shapes of φ's tensors: linear's or the first layer's weight, second weight, biases.
    fn phi_shapes(&self) -> ([usize; 3], [usize; 3], [usize; 2], [usize; 2]) {
        let (heads, rows) = (self.config.num_kv_heads(), self.config.compress_block() * self.dim);
        let hidden = self.config.compress_hidden().unwrap_or_default();
        let columns = if self.config.compress_kind() == CompressKind::Mlp { hidden } else { self.dim };
        ([heads, rows, columns], [heads, hidden, self.dim], [heads, hidden], [heads, self.dim])
    }

    /// x, e and φ out of the packed elements.
    fn inputs<'a>(&self, data: Mem<'a, T>) -> crate::Result<Inputs<'a, T>> {
        let mut parts = unpack(data, sizes(&self.shapes));
        let mut next = || parts.next().expect("packed in this order");
        let (weight_shape, weight2_shape, bias1_shape, bias2_shape) = self.phi_shapes();
        let x = crate::Tensor::packed(next(), self.token_shape())?;
        let position = self.position.then(|| crate::Tensor::packed(next(), self.position_shape())).transpose()?;
        let phi = match self.config.compress_kind() {
            CompressKind::Mean => op::Phi::Mean,
            CompressKind::Weighted => {
                let shape = [self.config.compress_block(), self.config.num_kv_heads()];
                op::Phi::Weighted { weight: crate::Tensor::packed(next(), shape)? }
            }
            CompressKind::Linear => op::Phi::Linear { weight: crate::Tensor::packed(next(), weight_shape)? },
            CompressKind::Mlp => op::Phi::Mlp {
                weight1: crate::Tensor::packed(next(), weight_shape)?,
                bias1: self.biases[0].then(|| crate::Tensor::packed(next(), bias1_shape)).transpose()?,
                weight2: crate::Tensor::packed(next(), weight2_shape)?,
                bias2: self.biases[1].then(|| crate::Tensor::packed(next(), bias2_shape)).transpose()?,
            },
        };
        Ok(Inputs { x, position, phi })
    }

    /// Where their gradients go, in packed elements.
    fn gradients<'a>(&self, data: TensorMut<'a, T::Acc, 1>) -> crate::Result<Gradients<'a, T>> {
        let mut parts = unpack_mut(data, sizes(&self.shapes));
        let mut next = || parts.next().expect("packed in this order");
        let (weight_shape, weight2_shape, bias1_shape, bias2_shape) = self.phi_shapes();
        let dx = next().reshape(self.token_shape())?;
        let d_position = self.position.then(|| next().reshape(self.position_shape())).transpose()?;
        let d_phi = match self.config.compress_kind() {
            CompressKind::Mean => op::PhiGrad::Mean,
            CompressKind::Weighted => {
                let shape = [self.config.compress_block(), self.config.num_kv_heads()];
                op::PhiGrad::Weighted { weight: next().reshape(shape)? }
            }
            CompressKind::Linear => op::PhiGrad::Linear { weight: next().reshape(weight_shape)? },
            CompressKind::Mlp => op::PhiGrad::Mlp {
                weight1: next().reshape(weight_shape)?,
                bias1: self.biases[0].then(|| next().reshape(bias1_shape)).transpose()?,
                weight2: next().reshape(weight2_shape)?,
                bias2: self.biases[1].then(|| next().reshape(bias2_shape)).transpose()?,
            },
        };
        Ok(Gradients { dx, d_position, d_phi })
    }
}

struct Inputs<'a, T> {
    x: crate::Tensor<'a, T, 3>,
    position: Option<crate::Tensor<'a, T, 3>>,
    phi: op::Phi<'a, T>,
}

struct Gradients<'a, T: Scalar> {
    dx: TensorMut<'a, T::Acc, 3>,
    d_position: Option<TensorMut<'a, T::Acc, 3>>,
    d_phi: op::PhiGrad<'a, T::Acc>,
}

impl<T: Scalar> Operation for Compress<T> {
    const NAME: &'static str = OP;

    type Element = T;
    type Gradient = T::Acc;

    fn output_shape(&self) -> [usize; 3] {
        [self.blocks, self.config.num_kv_heads(), self.dim]
    }

    fn forward(&self, backend: &Backend, packed: Mem<'_, T>, blocks: TensorMut<'_, T, 3>) -> crate::Result<()> {
        let Inputs { x, position, phi } = self.inputs(packed)?;
        let args = op::Forward { config: &self.config, packing: &self.packing, x, position, phi, blocks };
        op::forward(backend, args)
    }

    fn backward(
        &self,
        backend: &Backend,
        packed: Mem<'_, T>,
        d_blocks: Mem<'_, T::Acc>,
        gradients: TensorMut<'_, T::Acc, 1>,
    ) -> crate::Result<()> {
        let Inputs { x, position, phi } = self.inputs(packed)?;
        let Gradients { dx, d_position, d_phi } = self.gradients(gradients)?;
        let args = op::Backward {
            config: &self.config,
            packing: &self.packing,
            x,
            position,
            phi,
            d_blocks: crate::Tensor::packed(d_blocks, self.output_shape())?,
            dx,
            d_position,
            d_phi,
        };
        op::backward(backend, args)
    }
}
