//! The weights of a model, taken from the checkpoint and grouped as the forward pass uses them.

use super::net::Activation;
use crate::Result;
use crate::weights::{F32Weight, Numbers, Values, Weight, Weights};
use bytemuck::Pod;
use nsa_core::CompressKind;
use nsa_core::model::{AttentionKind, ModelConfig};
use nsa_kernels::layer::linear::{self, Product};
use nsa_kernels::layer::{embedding, rmsnorm};
use nsa_kernels::op::compress::Phi;
use nsa_kernels::{Backend, Buffer, Element, Mem, Tensor, TensorMut};

/// One layer.
#[derive(Debug)]
pub(crate) struct Layer<T: Pod> {
    pub(crate) input_norm: F32Weight,
    pub(crate) q: Weight,
    pub(crate) q_norm: Option<F32Weight>,
    pub(crate) attention: AttentionWeights<T>,
    pub(crate) o: Weight,
    pub(crate) post_norm: F32Weight,
    pub(crate) gate: Weight,
    pub(crate) up: Weight,
    pub(crate) down: Weight,
}

/// Keys, values and what depends on the kind of attention.
#[derive(Debug)]
pub(crate) enum AttentionWeights<T: Pod> {
    Nsa(Box<NsaWeights<T>>),
    Dense { k: Weight, v: Weight, k_norm: Option<F32Weight> },
}

/// Sparse attention's; arrays are ordered cmp, slc, win.
#[derive(Debug)]
pub(crate) struct NsaWeights<T: Pod> {
    pub(crate) k: [Weight; 3],
    pub(crate) v: [Weight; 3],
    pub(crate) k_norm: Option<[F32Weight; 3]>,
    pub(crate) gate: F32Weight,
    pub(crate) gate_bias: F32Weight,
    pub(crate) compress_k: Compress<T>,
    pub(crate) compress_v: Compress<T>,
}

/// φ of keys or of values, with its position embedding.
#[derive(Debug)]
pub(crate) struct Compress<T: Pod> {
    phi: PhiWeights<T>,
    position: Option<Numbers<T>>,
}

#[derive(Debug)]
enum PhiWeights<T: Pod> {
    Mean,
    Weighted(Numbers<T>),
    Linear(Numbers<T>),
    Mlp { weights: [Numbers<T>; 2], biases: Option<[Numbers<T>; 2]> },
}

impl<T: Activation> Compress<T> {
    fn take(config: &ModelConfig, weights: &mut Weights, prefix: &str, side: &str, kind: CompressKind) -> Result<Self> {
        let mut take = |name: &str| weights.take_numbers(&format!("{prefix}.{name}"));
        let phi = match kind {
            CompressKind::Mean => PhiWeights::Mean,
            CompressKind::Weighted => PhiWeights::Weighted(take(&format!("phi_{side}.weight"))?),
            CompressKind::Linear => PhiWeights::Linear(take(&format!("phi_{side}.weight"))?),
            CompressKind::Mlp => {
                let mut stage = |stage: usize, what: &str| take(&format!("phi_{side}.{stage}.{what}"));
                let weights = [stage(0, "weight")?, stage(2, "weight")?];
                let biases = match config.compress_bias() {
                    true => Some([stage(0, "bias")?, stage(2, "bias")?]),
                    false => None,
                };
                PhiWeights::Mlp { weights, biases }
            }
        };
        let position = config.compress_position().then(|| take(&format!("pe_{side}"))).transpose()?;
        Ok(Self { phi, position })
    }

    /// φ, as its operation takes it.
    pub(crate) fn phi(&self) -> Result<Phi<'_, T>> {
        Ok(match &self.phi {
            PhiWeights::Mean => Phi::Mean,
            PhiWeights::Weighted(weight) => Phi::Weighted { weight: weight.tensor()? },
            PhiWeights::Linear(weight) => Phi::Linear { weight: weight.tensor()? },
            PhiWeights::Mlp { weights: [weight1, weight2], biases } => Phi::Mlp {
                weight1: weight1.tensor()?,
                bias1: biases.as_ref().map(|biases| biases[0].tensor()).transpose()?,
                weight2: weight2.tensor()?,
                bias2: biases.as_ref().map(|biases| biases[1].tensor()).transpose()?,
            },
        })
    }

    /// The position embedding within a block `[l, G, D]`.
    pub(crate) fn position(&self) -> Result<Option<Tensor<'_, T, 3>>> {
        Ok(self.position.as_ref().map(Numbers::tensor).transpose()?)
    }
}

impl<T: Activation> Layer<T> {
    /// Takes layer `index` out of the checkpoint.
    pub(crate) fn take(config: &ModelConfig, weights: &mut Weights, index: usize) -> Result<Self> {
        let prefix = format!("model.layers.{index}");
        let attention = match config.attention() {
            AttentionKind::Nsa => {
                AttentionWeights::Nsa(Box::new(NsaWeights::take(config, weights, &format!("{prefix}.self_attn"))?))
            }
            AttentionKind::Dense => AttentionWeights::Dense {
                k: weights.take(&format!("{prefix}.self_attn.k_proj.weight"))?,
                v: weights.take(&format!("{prefix}.self_attn.v_proj.weight"))?,
                k_norm: match config.qk_norm() {
                    true => Some(weights.take_numbers(&format!("{prefix}.self_attn.k_norm.weight"))?),
                    false => None,
                },
            },
        };
        let q_norm = match config.qk_norm() {
            true => Some(weights.take_numbers(&format!("{prefix}.self_attn.q_norm.weight"))?),
            false => None,
        };
        let mut norm = |name: &str| weights.take_numbers(&format!("{prefix}.{name}.weight"));
        let (input_norm, post_norm) = (norm("input_layernorm")?, norm("post_attention_layernorm")?);
        let mut take = |name: &str| weights.take(&format!("{prefix}.{name}.weight"));
        Ok(Self {
            input_norm,
            q: take("self_attn.q_proj")?,
            q_norm,
            attention,
            o: take("self_attn.o_proj")?,
            post_norm,
            gate: take("mlp.gate_proj")?,
            up: take("mlp.up_proj")?,
            down: take("mlp.down_proj")?,
        })
    }
}

/// What `make` makes of sparse attention's branches cmp, slc, win.
fn branches<B>(mut make: impl FnMut(&str) -> nsa_kernels::Result<B>) -> Result<[B; 3]> {
    Ok([make("cmp")?, make("slc")?, make("win")?])
}

impl<T: Activation> NsaWeights<T> {
    fn take(config: &ModelConfig, weights: &mut Weights, prefix: &str) -> Result<Self> {
        let kind = config.nsa_config().expect("the caller saw that attention is `nsa`").compress_kind();
        let norm = |branch: &str| format!("{prefix}.k_{branch}_norm.weight");
        Ok(Self {
            k: branches(|branch| weights.take(&format!("{prefix}.k_{branch}_proj.weight")))?,
            v: branches(|branch| weights.take(&format!("{prefix}.v_{branch}_proj.weight")))?,
            k_norm: match config.qk_norm() {
                true => Some(branches(|branch| weights.take_numbers(&norm(branch)))?),
                false => None,
            },
            gate: weights.take_numbers(&format!("{prefix}.gate_proj.weight"))?,
            gate_bias: weights.take_numbers(&format!("{prefix}.gate_proj.bias"))?,
            compress_k: Compress::take(config, weights, prefix, "k", kind)?,
            compress_v: Compress::take(config, weights, prefix, "v", kind)?,
        })
    }
}

/// y = x·Wᵀ, or y += x·Wᵀ, whatever type the weight `[O, I]` is stored in.
pub(crate) fn project<T: Activation>(
    backend: &Backend,
    x: Tensor<'_, T, 2>,
    weight: &Weight,
    y: TensorMut<'_, T, 2>,
    accumulate: bool,
) -> Result<()> {
    fn typed<T: Activation, W: Element<Acc = f32>>(
        backend: &Backend,
        x: Tensor<'_, T, 2>,
        (data, shape): (Mem<'_, W>, [usize; 2]),
        y: TensorMut<'_, T, 2>,
        accumulate: bool,
    ) -> Result<()> {
        let weight = Tensor::packed(data, shape)?;
        Ok(linear::forward(backend, linear::Forward { x, weight, bias: None, y, accumulate })?)
    }
    let shape = [weight.shape()[0], weight.shape()[1]];
    match weight.values() {
        Values::F32(data) => typed(backend, x, (data, shape), y, accumulate),
        Values::Bf16(data) => typed(backend, x, (data, shape), y, accumulate),
        Values::F16(data) => typed(backend, x, (data, shape), y, accumulate),
    }
}

/// Products without bias of one input and several weights, whatever types these are stored in.
pub(crate) fn project_all<T: Activation, const N: usize>(
    backend: &Backend,
    x: Tensor<'_, T, 2>,
    products: [(&Weight, &mut Buffer<T>); N],
) -> Result<()> {
    fn product<'a, T: Activation, W: Element<Acc = f32>>(
        data: Mem<'a, W>,
        shape: [usize; 2],
        y: TensorMut<'a, T, 2>,
    ) -> Result<Product<'a, T, W>> {
        Ok(Product { weight: Tensor::packed(data, shape)?, y })
    }
    let (mut in_f32, mut in_bf16, mut in_f16) = (Vec::new(), Vec::new(), Vec::new());
    for (weight, y) in products {
        let shape = [weight.shape()[0], weight.shape()[1]];
        let y = y.tensor_mut([x.shape()[0], shape[0]])?;
        match weight.values() {
            Values::F32(data) => in_f32.push(product(data, shape, y)?),
            Values::Bf16(data) => in_bf16.push(product(data, shape, y)?),
            Values::F16(data) => in_f16.push(product(data, shape, y)?),
        }
    }
    linear::forward_all(backend, x, in_f32)?;
    linear::forward_all(backend, x, in_bf16)?;
    Ok(linear::forward_all(backend, x, in_f16)?)
}

/// Rows of the embedding `[V, C]`, whatever type it is stored in.
pub(crate) fn embed<T: Activation>(
    backend: &Backend,
    tokens: Tensor<'_, u32, 1>,
    weight: &Weight,
    y: TensorMut<'_, T, 2>,
) -> Result<()> {
    fn typed<T: Activation, W: Element<Acc = f32>>(
        backend: &Backend,
        tokens: Tensor<'_, u32, 1>,
        (data, shape): (Mem<'_, W>, [usize; 2]),
        y: TensorMut<'_, T, 2>,
    ) -> Result<()> {
        let weight = Tensor::packed(data, shape)?;
        Ok(embedding::forward(backend, embedding::Forward { tokens, weight, y })?)
    }
    let shape = [weight.shape()[0], weight.shape()[1]];
    match weight.values() {
        Values::F32(data) => typed(backend, tokens, (data, shape), y),
        Values::Bf16(data) => typed(backend, tokens, (data, shape), y),
        Values::F16(data) => typed(backend, tokens, (data, shape), y),
    }
}

/// RMSNorm of `rows` rows of `x` into `y`; the weight's length is that of a row.
pub(crate) fn norm<T: Activation>(
    backend: &Backend,
    x: &Buffer<T>,
    weight: &F32Weight,
    eps: f64,
    rows: usize,
    y: &mut Buffer<T>,
) -> Result<()> {
    let shape = [rows, weight.len()];
    let args =
        rmsnorm::Forward { x: x.tensor(shape)?, weight: weight.tensor()?, eps, y: y.tensor_mut(shape)?, rstd: None };
    Ok(rmsnorm::forward(backend, args)?)
}
