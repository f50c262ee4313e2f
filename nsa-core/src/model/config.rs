//! The model's configuration: `config.json`, field names in the Hugging Face manner.

use crate::config::{check_i32, check_scale, paper};
use crate::object::{self, Object};
use crate::{CompressKind, ConfigError, NsaConfig};
use serde::{Deserialize, Serialize};

/// Attention of every layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionKind {
    /// Native Sparse Attention.
    #[default]
    Nsa,
    /// Full causal attention: the baseline.
    Dense,
}

/// What the tokens are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TokenizerKind {
    /// Bytes: 256 ids, no special tokens.
    #[default]
    #[serde(rename = "bytes")]
    Bytes,
    /// A Hugging Face `tokenizer.json` beside the configuration.
    #[serde(rename = "tokenizer.json")]
    File,
}

/// Ways to stretch the rotary frequencies over a longer context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeKind {
    /// YaRN (arXiv 2309.00071): interpolation by parts and an attention factor.
    #[default]
    Yarn,
}

/// Context extension of the rotary embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeScaling {
    /// The method.
    #[serde(rename = "type")]
    pub kind: RopeKind,
    /// How many times longer the context is than the original, at least 1.
    pub factor: f64,
    /// Context length of the original training.
    pub original_max_position_embeddings: usize,
    /// Frequencies that turn more often than this within the original context stay as they are.
    #[serde(default = "defaults::beta_fast")]
    pub beta_fast: f64,
    /// Frequencies that turn less often than this within the original context are interpolated in full.
    #[serde(default = "defaults::beta_slow")]
    pub beta_slow: f64,
    /// Factor on the rotated queries and keys; 0.1·ln(factor) + 1 if absent or null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
}

/// The `nsa` section: block sizes and φ. Heads and head dimensions are the model's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NsaFields {
    /// l: tokens in one compression block.
    #[serde(default = "paper::compress_block")]
    pub compress_block: usize,
    /// d: tokens between the starts of compression blocks.
    #[serde(default = "paper::compress_stride")]
    pub compress_stride: usize,
    /// l': tokens in one selection block.
    #[serde(default = "paper::select_block")]
    pub select_block: usize,
    /// n: blocks selected per query and group.
    #[serde(default = "paper::select_count")]
    pub select_count: usize,
    /// n0: forced first blocks.
    #[serde(default = "paper::select_initial")]
    pub select_initial: usize,
    /// nl: forced last blocks.
    #[serde(default = "paper::select_local")]
    pub select_local: usize,
    /// w: tokens of the sliding window.
    #[serde(default = "paper::window")]
    pub window: usize,
    /// φ.
    #[serde(default)]
    pub compress_kind: CompressKind,
    /// Hidden width of the `mlp` φ, which needs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress_hidden: Option<usize>,
    /// Whether the `mlp` φ has biases; the other kinds have none.
    #[serde(default = "defaults::yes")]
    pub compress_bias: bool,
    /// Whether φ adds a learnable position embedding within the block (`pe_k`, `pe_v`).
    #[serde(default = "defaults::yes")]
    pub compress_position: bool,
}

impl Default for NsaFields {
    /// The paper's block sizes with φ = `mlp`, whose hidden width is still to be set.
    fn default() -> Self {
        Self {
            compress_block: paper::compress_block(),
            compress_stride: paper::compress_stride(),
            select_block: paper::select_block(),
            select_count: paper::select_count(),
            select_initial: paper::select_initial(),
            select_local: paper::select_local(),
            window: paper::window(),
            compress_kind: CompressKind::Mlp,
            compress_hidden: None,
            compress_bias: true,
            compress_position: true,
        }
    }
}

/// Fields of a [`ModelConfig`] before they are checked: what `config.json` holds. Unknown fields are errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFields {
    /// V: ids of the vocabulary.
    pub vocab_size: usize,
    /// C: width of the residual stream.
    pub hidden_size: usize,
    /// F: width of the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Hq: query heads.
    pub num_attention_heads: usize,
    /// G: KV heads.
    pub num_key_value_heads: usize,
    /// Dk: head dimension of queries and keys; C/Hq if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Dv: head dimension of values; Dk if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v_head_dim: Option<usize>,
    /// Longest context.
    pub max_position_embeddings: usize,
    /// ε of every RMSNorm.
    #[serde(default = "defaults::rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    #[serde(default = "defaults::rope_theta")]
    pub rope_theta: f64,
    /// Context extension, if any.
    #[serde(default, deserialize_with = "object::optional", skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the head shares the embedding's matrix.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Whether queries and keys pass an RMSNorm per head before they are rotated.
    #[serde(default)]
    pub qk_norm: bool,
    /// Attention of every layer.
    #[serde(default)]
    pub attention: AttentionKind,
    /// Block sizes and φ; required when `attention` is `nsa`, checked but unused when it is `dense`.
    #[serde(default, deserialize_with = "object::optional", skip_serializing_if = "Option::is_none")]
    pub nsa: Option<NsaFields>,
    /// Softmax scale; 1/√Dk if absent or null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Standard deviation of the initial matrices.
    #[serde(default = "defaults::initializer_range")]
    pub initializer_range: f64,
    /// What the tokens are.
    #[serde(default)]
    pub tokenizer: TokenizerKind,
    /// Id that ends a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos_token_id: Option<u32>,
    /// Id that starts a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_token_id: Option<u32>,
    /// Experts of which each token visits some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_routed_experts: Option<usize>,
    /// Experts that every token visits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_shared_experts: Option<usize>,
    /// Routed experts that each token visits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_experts_per_tok: Option<usize>,
    /// Width of one expert.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_intermediate_size: Option<usize>,
    /// Leading layers whose MLP is dense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_k_dense_replace: Option<usize>,
}

/// Defaults of the optional fields.
mod defaults {
    pub fn yes() -> bool {
        true
    }
    pub fn rms_norm_eps() -> f64 {
        1e-5
    }
    pub fn rope_theta() -> f64 {
        1e4
    }
    pub fn initializer_range() -> f64 {
        0.02
    }
    pub fn beta_fast() -> f64 {
        32.0
    }
    pub fn beta_slow() -> f64 {
        1.0
    }
}

/// A mixture of experts in the manner of DeepSeekMoE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moe {
    /// Experts of which each token visits some.
    pub routed: usize,
    /// Experts that every token visits.
    pub shared: usize,
    /// Routed experts that each token visits.
    pub per_token: usize,
    /// Width of one expert.
    pub intermediate: usize,
    /// Leading layers whose MLP is dense.
    pub first_dense: usize,
}

/// A valid model configuration: checked once, read-only from then on.
///
/// Made by [`ModelConfig::new`], [`ModelConfig::preset`] or from JSON. Rules, besides those of [`NsaConfig`]:
/// sizes non-zero and within i32, as are Hq·Dk and Hq·Dv; Dk even (rotation works on pairs); G | Hq; C a multiple of Hq
/// when Dk is absent; factors positive and finite, `rope_theta` above 1; a `bytes` vocabulary has 256 ids; special ids
/// lie within the vocabulary; the five fields of a mixture of experts are given together.
///
/// ```
/// use nsa_core::model::{AttentionKind, ModelConfig, ModelFields};
/// let sparse = ModelConfig::preset("small-10m")?;
/// // Its twin with full attention.
/// let dense = ModelConfig::new(ModelFields { attention: AttentionKind::Dense, ..sparse.to_fields() })?;
/// assert!(sparse.nsa_config().is_some() && dense.nsa_config().is_none());
/// # Ok::<(), nsa_core::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Object<ModelFields>", into = "ModelFields")]
pub struct ModelConfig {
    fields: ModelFields,
    nsa: Option<NsaConfig>,
    moe: Option<Moe>,
}

impl TryFrom<Object<ModelFields>> for ModelConfig {
    type Error = ConfigError;

    fn try_from(Object(fields): Object<ModelFields>) -> Result<Self, ConfigError> {
        Self::new(fields)
    }
}

impl From<ModelConfig> for ModelFields {
    fn from(config: ModelConfig) -> Self {
        config.fields
    }
}

macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident: $type:ty),* $(,)?) => {
        impl ModelConfig {
            $($(#[$doc])* pub fn $name(&self) -> $type { self.fields.$name })*
        }
    };
}

getters! {
    /// V: ids of the vocabulary.
    vocab_size: usize,
    /// C: width of the residual stream.
    hidden_size: usize,
    /// F: width of the dense MLP.
    intermediate_size: usize,
    /// Number of layers.
    num_hidden_layers: usize,
    /// Hq: query heads.
    num_attention_heads: usize,
    /// G: KV heads.
    num_key_value_heads: usize,
    /// Longest context.
    max_position_embeddings: usize,
    /// ε of every RMSNorm.
    rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    rope_theta: f64,
    /// Whether the head shares the embedding's matrix.
    tie_word_embeddings: bool,
    /// Whether queries and keys pass an RMSNorm per head before they are rotated.
    qk_norm: bool,
    /// Attention of every layer.
    attention: AttentionKind,
    /// Standard deviation of the initial matrices.
    initializer_range: f64,
    /// What the tokens are.
    tokenizer: TokenizerKind,
    /// Id that ends a text.
    eos_token_id: Option<u32>,
    /// Id that starts a text.
    bos_token_id: Option<u32>,
}

impl ModelConfig {
    /// Checks every rule.
    ///
    /// # Errors
    /// The first rule broken, with the field and its value.
    pub fn new(fields: ModelFields) -> Result<Self, ConfigError> {
        check_sizes(&fields)?;
        check_heads(&fields)?;
        check_factors(&fields)?;
        check_rope_scaling(&fields)?;
        check_vocabulary(&fields)?;
        let moe = check_moe(&fields)?;
        let nsa = check_nsa(&fields)?;
        Ok(Self { fields, nsa, moe })
    }

    /// The fields, to change some and check anew.
    pub fn to_fields(&self) -> ModelFields {
        self.fields.clone()
    }

    /// Dk: head dimension of queries and keys.
    pub fn head_dim(&self) -> usize {
        self.fields.head_dim()
    }

    /// Dv: head dimension of values.
    pub fn v_head_dim(&self) -> usize {
        self.fields.v_head_dim()
    }

    /// Softmax scale: as set, else 1/√Dk.
    pub fn scale(&self) -> f64 {
        self.fields.scale.unwrap_or_else(|| (self.head_dim() as f64).sqrt().recip())
    }

    /// Context extension of the rotary embedding, if any.
    pub fn rope_scaling(&self) -> Option<&RopeScaling> {
        self.fields.rope_scaling.as_ref()
    }

    /// The operator's configuration; `None` when attention is dense.
    pub fn nsa_config(&self) -> Option<NsaConfig> {
        self.nsa.clone()
    }

    /// Whether φ has biases: `compress_bias` of an `mlp`.
    pub fn compress_bias(&self) -> bool {
        let mlp = self.nsa.as_ref().is_some_and(|nsa| nsa.compress_kind() == CompressKind::Mlp);
        mlp && self.fields.nsa.as_ref().is_some_and(|nsa| nsa.compress_bias)
    }

    /// Whether φ adds a position embedding within the block.
    pub fn compress_position(&self) -> bool {
        self.nsa.is_some() && self.fields.nsa.as_ref().is_some_and(|nsa| nsa.compress_position)
    }

    /// The mixture of experts, if the model has one.
    pub fn moe(&self) -> Option<Moe> {
        self.moe
    }

    /// Whether the MLP of layer `layer` is a mixture of experts.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        self.moe.is_some_and(|moe| layer >= moe.first_dense)
    }

    /// Checks that training and decoding can run this model, beyond counting and planning it.
    ///
    /// # Errors
    /// If the model is a mixture of experts.
    pub fn check_runnable(&self) -> Result<(), ConfigError> {
        match self.moe {
            None => Ok(()),
            Some(moe) => Err(ConfigError::new("n_routed_experts", moe.routed, "mixture of experts cannot be run yet")),
        }
    }
}

impl ModelFields {
    fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    fn v_head_dim(&self) -> usize {
        self.v_head_dim.unwrap_or_else(|| self.head_dim())
    }
}

fn check_size(field: &'static str, value: usize) -> Result<(), ConfigError> {
    if value == 0 {
        return Err(ConfigError::new(field, value, "must not be zero"));
    }
    check_i32(field, value)
}

fn check_positive(field: &'static str, value: f64) -> Result<(), ConfigError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(ConfigError::new(field, value, "must be positive and finite"))
}

fn check_sizes(fields: &ModelFields) -> Result<(), ConfigError> {
    check_size("vocab_size", fields.vocab_size)?;
    check_size("hidden_size", fields.hidden_size)?;
    check_size("intermediate_size", fields.intermediate_size)?;
    check_size("num_hidden_layers", fields.num_hidden_layers)?;
    check_size("num_attention_heads", fields.num_attention_heads)?;
    check_size("num_key_value_heads", fields.num_key_value_heads)?;
    check_size("max_position_embeddings", fields.max_position_embeddings)?;
    fields.head_dim.map_or(Ok(()), |dim| check_size("head_dim", dim))?;
    fields.v_head_dim.map_or(Ok(()), |dim| check_size("v_head_dim", dim))
}

fn check_heads(fields: &ModelFields) -> Result<(), ConfigError> {
    let (heads, groups) = (fields.num_attention_heads, fields.num_key_value_heads);
    if !heads.is_multiple_of(groups) {
        let rule = format!("must be a multiple of num_key_value_heads = {groups}");
        return Err(ConfigError::new("num_attention_heads", heads, rule));
    }
    if fields.head_dim.is_none() && !fields.hidden_size.is_multiple_of(heads) {
        let rule = format!("must be a multiple of num_attention_heads = {heads} when head_dim is absent");
        return Err(ConfigError::new("hidden_size", fields.hidden_size, rule));
    }
    let dim = fields.head_dim();
    if dim % 2 == 1 {
        return Err(ConfigError::new("head_dim", dim, "must be even: rotation works on pairs"));
    }
    for (field, dim) in [("head_dim", dim), ("v_head_dim", fields.v_head_dim())] {
        if i32::try_from(heads as u64 * dim as u64).is_err() {
            let rule = format!("times num_attention_heads = {heads} must fit an i32");
            return Err(ConfigError::new(field, dim, rule));
        }
    }
    Ok(())
}

fn check_factors(fields: &ModelFields) -> Result<(), ConfigError> {
    check_positive("rms_norm_eps", fields.rms_norm_eps)?;
    check_positive("initializer_range", fields.initializer_range)?;
    fields.scale.map_or(Ok(()), check_scale)?;
    if !(fields.rope_theta.is_finite() && fields.rope_theta > 1.0) {
        return Err(ConfigError::new("rope_theta", fields.rope_theta, "must be finite and above 1"));
    }
    Ok(())
}

fn check_rope_scaling(fields: &ModelFields) -> Result<(), ConfigError> {
    let Some(scaling) = &fields.rope_scaling else { return Ok(()) };
    if !(scaling.factor.is_finite() && scaling.factor >= 1.0) {
        return Err(ConfigError::new("rope_scaling.factor", scaling.factor, "must be finite and at least 1"));
    }
    check_size("rope_scaling.original_max_position_embeddings", scaling.original_max_position_embeddings)?;
    check_positive("rope_scaling.beta_fast", scaling.beta_fast)?;
    check_positive("rope_scaling.beta_slow", scaling.beta_slow)?;
    if scaling.beta_fast < scaling.beta_slow {
        let rule = format!("must be at least beta_slow = {}", scaling.beta_slow);
        return Err(ConfigError::new("rope_scaling.beta_fast", scaling.beta_fast, rule));
    }
    scaling.attention_factor.map_or(Ok(()), |factor| check_positive("rope_scaling.attention_factor", factor))
}

fn check_vocabulary(fields: &ModelFields) -> Result<(), ConfigError> {
    if fields.tokenizer == TokenizerKind::Bytes && fields.vocab_size != 256 {
        return Err(ConfigError::new("vocab_size", fields.vocab_size, "must be 256 when tokenizer is `bytes`"));
    }
    for (field, id) in [("eos_token_id", fields.eos_token_id), ("bos_token_id", fields.bos_token_id)] {
        if let Some(id) = id
            && id as usize >= fields.vocab_size
        {
            let rule = format!("must be below vocab_size = {}", fields.vocab_size);
            return Err(ConfigError::new(field, id, rule));
        }
    }
    Ok(())
}

fn check_moe(fields: &ModelFields) -> Result<Option<Moe>, ConfigError> {
    let given = [
        ("n_routed_experts", fields.n_routed_experts),
        ("n_shared_experts", fields.n_shared_experts),
        ("num_experts_per_tok", fields.num_experts_per_tok),
        ("moe_intermediate_size", fields.moe_intermediate_size),
        ("first_k_dense_replace", fields.first_k_dense_replace),
    ];
    if given.iter().all(|(_, value)| value.is_none()) {
        return Ok(None);
    }
    let mut values = [0; 5];
    for (value, (field, given)) in values.iter_mut().zip(given) {
        let missing = || ConfigError::new(field, "null", "the fields of a mixture of experts are given all or none");
        *value = given.ok_or_else(missing)?;
        check_i32(field, *value)?;
    }
    let [routed, shared, per_token, intermediate, first_dense] = values;
    check_size("n_routed_experts", routed)?;
    check_size("num_experts_per_tok", per_token)?;
    check_size("moe_intermediate_size", intermediate)?;
    if per_token > routed {
        let rule = format!("must be at most n_routed_experts = {routed}");
        return Err(ConfigError::new("num_experts_per_tok", per_token, rule));
    }
    if first_dense > fields.num_hidden_layers {
        let rule = format!("must be at most num_hidden_layers = {}", fields.num_hidden_layers);
        return Err(ConfigError::new("first_k_dense_replace", first_dense, rule));
    }
    Ok(Some(Moe { routed, shared, per_token, intermediate, first_dense }))
}

/// The operator's configuration of an `nsa` model; the section is checked even when attention is dense.
fn check_nsa(fields: &ModelFields) -> Result<Option<NsaConfig>, ConfigError> {
    let Some(nsa) = &fields.nsa else {
        return match fields.attention {
            AttentionKind::Dense => Ok(None),
            AttentionKind::Nsa => Err(ConfigError::new("nsa", "null", "attention `nsa` needs it")),
        };
    };
    let groups = fields.num_key_value_heads;
    let mut builder = NsaConfig::builder(fields.num_attention_heads, groups, fields.head_dim(), fields.v_head_dim())
        .compress_block(nsa.compress_block)
        .compress_stride(nsa.compress_stride)
        .select_block(nsa.select_block)
        .select_count(nsa.select_count)
        .select_initial(nsa.select_initial)
        .select_local(nsa.select_local)
        .window(nsa.window)
        .compress_kind(nsa.compress_kind);
    if let Some(hidden) = nsa.compress_hidden {
        builder = builder.compress_hidden(hidden);
        if i32::try_from(hidden as u128 * groups as u128).is_err() {
            let rule = format!("times num_key_value_heads = {groups} must fit an i32");
            return Err(ConfigError::new("compress_hidden", hidden, rule));
        }
    }
    if let Some(scale) = fields.scale {
        builder = builder.scale(scale);
    }
    for dim in [fields.head_dim(), fields.v_head_dim()] {
        if i32::try_from(nsa.compress_block as u128 * dim as u128).is_err() {
            let rule = format!("times the head dimension {dim} must fit an i32");
            return Err(ConfigError::new("compress_block", nsa.compress_block, rule));
        }
    }
    let config = builder.build()?;
    Ok((fields.attention == AttentionKind::Nsa).then_some(config))
}
