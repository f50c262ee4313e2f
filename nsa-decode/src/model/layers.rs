//! The weights of a model, taken from the checkpoint and grouped as the forward pass uses them.

use crate::Result;
use crate::weights::{F32Weight, Values, Weight, Weights};
use nsa_core::model::{AttentionKind, ModelConfig};
use nsa_core::{CompressKind, Element};
use nsa_kernels::layer::{embedding, linear, rmsnorm};
use nsa_kernels::op::compress::Phi;
use nsa_kernels::{Backend, Buffer, Tensor, TensorMut};

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
    fn take(config: &ModelConfig, weights: &mut Weights, prefix: &str, side: &str, kind: CompressKind) -> Self {
        let mut take = |name: &str| weights.take(&format!("{prefix}.{name}")).to_f32();
        let phi = match kind {
            CompressKind::Mean => PhiWeights::Mean,
            CompressKind::Weighted => PhiWeights::Weighted(take(&format!("phi_{side}.weight"))),
            CompressKind::Linear => PhiWeights::Linear(take(&format!("phi_{side}.weight"))),
            CompressKind::Mlp => {
                let mut stages = |what: &str| [0, 2].map(|stage| take(&format!("phi_{side}.{stage}.{what}")));
                let weights = stages("weight");
                PhiWeights::Mlp { weights, biases: config.compress_bias().then(|| stages("bias")) }
            }
        };
        Self { phi, position: config.compress_position().then(|| take(&format!("pe_{side}"))) }
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
    pub(crate) fn take(config: &ModelConfig, weights: &mut Weights, index: usize) -> Self {
        let prefix = format!("model.layers.{index}");
        let attention = format!("{prefix}.self_attn");
        let mut take = |name: &str| weights.take(&format!("{prefix}.{name}.weight"));
        let (input_norm, post_norm) = (take("input_layernorm").to_f32(), take("post_attention_layernorm").to_f32());
        let (q, o) = (take("self_attn.q_proj"), take("self_attn.o_proj"));
        let q_norm = config.qk_norm().then(|| take("self_attn.q_norm").to_f32());
        let (gate, up, down) = (take("mlp.gate_proj"), take("mlp.up_proj"), take("mlp.down_proj"));
        let attention = match config.attention() {
            AttentionKind::Nsa => AttentionWeights::Nsa(Box::new(NsaWeights::take(config, weights, &attention))),
            AttentionKind::Dense => AttentionWeights::Dense {
                k: weights.take(&format!("{attention}.k_proj.weight")),
                v: weights.take(&format!("{attention}.v_proj.weight")),
                k_norm: config.qk_norm().then(|| weights.take(&format!("{attention}.k_norm.weight")).to_f32()),
            },
        };
        Self { input_norm, q, q_norm, attention, o, post_norm, gate, up, down }
    }
}

impl NsaWeights {
    fn take(config: &ModelConfig, weights: &mut Weights, prefix: &str) -> Self {
        const BRANCHES: [&str; 3] = ["cmp", "slc", "win"];
        let kind = config.nsa_config().expect("the caller saw that attention is `nsa`").compress_kind();
        let compress_k = Compress::take(config, weights, prefix, "k", kind);
        let compress_v = Compress::take(config, weights, prefix, "v", kind);
        let mut take = |name: String| weights.take(&format!("{prefix}.{name}"));
        let k = BRANCHES.map(|branch| take(format!("k_{branch}_proj.weight")));
        let v = BRANCHES.map(|branch| take(format!("v_{branch}_proj.weight")));
        let norms = config.qk_norm().then(|| BRANCHES.map(|branch| take(format!("k_{branch}_norm.weight")).to_f32()));
        let gate = take("gate_proj.weight".to_owned()).to_f32();
        let gate_bias = take("gate_proj.bias".to_owned()).to_f32();
        Self { k, v, k_norm: norms, gate, gate_bias, compress_k, compress_v }
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
        (data, shape): (&[W], [usize; 2]),
        y: TensorMut<'_, f32, 2>,
        accumulate: bool,
    ) -> Result<()> {
        let weight = Tensor::host(data, shape)?;
        Ok(linear::forward(backend, linear::Forward { x, weight, bias: None, y, accumulate })?)
    }
    let shape = [weight.shape()[0], weight.shape()[1]];
    match weight.values() {
        Values::F32(data) => typed(backend, x, (data, shape), y, accumulate),
        Values::Bf16(data) => typed(backend, x, (data, shape), y, accumulate),
        Values::F16(data) => typed(backend, x, (data, shape), y, accumulate),
    }
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
        (data, shape): (&[W], [usize; 2]),
        y: TensorMut<'_, f32, 2>,
    ) -> Result<()> {
        let weight = Tensor::host(data, shape)?;
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
    let shape = [rows, weight.values().len()];
    let args =
        rmsnorm::Forward { x: x.tensor(shape)?, weight: weight.tensor()?, eps, y: y.tensor_mut(shape)?, rstd: None };
    Ok(rmsnorm::forward(backend, args)?)
}
