//! The weights of a model, taken from the checkpoint and grouped as the forward pass uses them.

use crate::Result;
use crate::weights::{F32Weight, Values, Weight, Weights};
use nsa_core::model::{AttentionKind, ModelConfig};
use nsa_core::{CompressKind, Element};
use nsa_kernels::layer::linear::{self, Product};
use nsa_kernels::layer::{embedding, rmsnorm};
use nsa_kernels::op::compress::Phi;
use nsa_kernels::{Backend, Buffer, Mem, Tensor, TensorMut};

/// One layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) input_norm: F32Weight,
    pub(crate) q: Weight,
    pub(crate) q_norm: Option<F32Weight>,
    pub(crate) attention: AttentionWeights,
    pub(crate) o: Weight,
    pub(crate) post_norm: F32Weight,
    pub(crate) gate: Weight,
    pub(crate) up: Weight,
    pub(crate) down: Weight,
}

/// Keys, values and what depends on the kind of attention.
#[derive(Debug)]
pub(crate) enum AttentionWeights {
    Nsa(Box<NsaWeights>),
    Dense { k: Weight, v: Weight, k_norm: Option<F32Weight> },
}

/// Sparse attention's; arrays are ordered cmp, slc, win.
#[derive(Debug)]
pub(crate) struct NsaWeights {
    pub(crate) k: [Weight; 3],
    pub(crate) v: [Weight; 3],
    pub(crate) k_norm: Option<[F32Weight; 3]>,
    pub(crate) gate: F32Weight,
    pub(crate) gate_bias: F32Weight,
    pub(crate) compress_k: Compress,
    pub(crate) compress_v: Compress,
}

/// φ of keys or of values, with its position embedding.
#[derive(Debug)]
pub(crate) struct Compress {
    phi: PhiWeights,
    position: Option<F32Weight>,
}

#[derive(Debug)]
enum PhiWeights {
    Mean,
    Weighted(F32Weight),
    Linear(F32Weight),
    Mlp { weights: [F32Weight; 2], biases: Option<[F32Weight; 2]> },
}

impl Compress {
    fn take(config: &ModelConfig, weights: &mut Weights, prefix: &str, side: &str, kind: CompressKind) -> Result<Self> {
        let mut take = |name: &str| weights.take_f32(&format!("{prefix}.{name}"));
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
    pub(crate) fn phi(&self) -> Result<Phi<'_, f32>> {
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
    pub(crate) fn position(&self) -> Result<Option<Tensor<'_, f32, 3>>> {
        Ok(self.position.as_ref().map(F32Weight::tensor).transpose()?)
    }
}

impl Layer {
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
                    true => Some(weights.take_f32(&format!("{prefix}.self_attn.k_norm.weight"))?),
                    false => None,
                },
            },
        };
        let q_norm = match config.qk_norm() {
            true => Some(weights.take_f32(&format!("{prefix}.self_attn.q_norm.weight"))?),
            false => None,
        };
        let mut norm = |name: &str| weights.take_f32(&format!("{prefix}.{name}.weight"));
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
fn branches<T>(mut make: impl FnMut(&str) -> nsa_kernels::Result<T>) -> Result<[T; 3]> {
    Ok([make("cmp")?, make("slc")?, make("win")?])
}

impl NsaWeights {
    fn take(config: &ModelConfig, weights: &mut Weights, prefix: &str) -> Result<Self> {
        let kind = config.nsa_config().expect("the caller saw that attention is `nsa`").compress_kind();
        let norm = |branch: &str| format!("{prefix}.k_{branch}_norm.weight");
        Ok(Self {
            k: branches(|branch| weights.take(&format!("{prefix}.k_{branch}_proj.weight")))?,
            v: branches(|branch| weights.take(&format!("{prefix}.v_{branch}_proj.weight")))?,
            k_norm: match config.qk_norm() {
                true => Some(branches(|branch| weights.take_f32(&norm(branch)))?),
                false => None,
            },
            gate: weights.take_f32(&format!("{prefix}.gate_proj.weight"))?,
            gate_bias: weights.take_f32(&format!("{prefix}.gate_proj.bias"))?,
            compress_k: Compress::take(config, weights, prefix, "k", kind)?,
            compress_v: Compress::take(config, weights, prefix, "v", kind)?,
        })
    }
}

/// y = x·Wᵀ, or y += x·Wᵀ, whatever type the weight `[O, I]` is stored in.
pub(crate) fn project(
    backend: &Backend,
    x: Tensor<'_, f32, 2>,
    weight: &Weight,
    y: TensorMut<'_, f32, 2>,
    accumulate: bool,
) -> Result<()> {
    fn typed<W: Element<Acc = f32>>(
        backend: &Backend,
        x: Tensor<'_, f32, 2>,
        (data, shape): (Mem<'_, W>, [usize; 2]),
        y: TensorMut<'_, f32, 2>,
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
pub(crate) fn project_all<const N: usize>(
    backend: &Backend,
    x: Tensor<'_, f32, 2>,
    products: [(&Weight, &mut Buffer<f32>); N],
) -> Result<()> {
    fn product<'a, W: Element<Acc = f32>>(
        data: Mem<'a, W>,
        shape: [usize; 2],
        y: TensorMut<'a, f32, 2>,
    ) -> Result<Product<'a, f32, W>> {
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
pub(crate) fn embed(
    backend: &Backend,
    tokens: Tensor<'_, u32, 1>,
    weight: &Weight,
    y: TensorMut<'_, f32, 2>,
) -> Result<()> {
    fn typed<W: Element<Acc = f32>>(
        backend: &Backend,
        tokens: Tensor<'_, u32, 1>,
        (data, shape): (Mem<'_, W>, [usize; 2]),
        y: TensorMut<'_, f32, 2>,
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
pub(crate) fn norm(
    backend: &Backend,
    x: &Buffer<f32>,
    weight: &F32Weight,
    eps: f64,
    rows: usize,
    y: &mut Buffer<f32>,
) -> Result<()> {
    let shape = [rows, weight.len()];
    let args =
        rmsnorm::Forward { x: x.tensor(shape)?, weight: weight.tensor()?, eps, y: y.tensor_mut(shape)?, rstd: None };
    Ok(rmsnorm::forward(backend, args)?)
}
