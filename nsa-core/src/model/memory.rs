//! What a model needs in memory, before anything is allocated.

use super::config::ModelConfig;
use super::params::{ParamCounts, param_counts};
use crate::units::{Bytes, Count};
use crate::{DType, index};
use std::fmt;

/// Bytes that training a model and decoding with it take, by purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Parameters, counted.
    pub params: ParamCounts,
    /// Tokens of one training step.
    pub tokens: usize,
    /// Master weights, f32.
    pub weights_bytes: u64,
    /// Gradients, f32.
    pub gradients_bytes: u64,
    /// AdamW's two moments, f32.
    pub optimizer_bytes: u64,
    /// What the forward pass keeps for the backward pass, f32; see [`memory_plan`].
    pub activations_bytes: u64,
    /// Context that the cache figures are for: `max_position_embeddings`.
    pub context: usize,
    /// Growth of the cache of one sequence with each token, all layers, f32.
    pub kv_cache_bytes_per_token: u64,
    /// Cache of one sequence at `context`, all layers, f32.
    pub kv_cache_bytes: u64,
    /// The same in bf16.
    pub kv_cache_bf16_bytes: u64,
}

impl MemoryPlan {
    /// Weights, gradients, optimizer state and activations.
    pub fn training_bytes(&self) -> u64 {
        let parts = [self.weights_bytes, self.gradients_bytes, self.optimizer_bytes, self.activations_bytes];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// Plans the memory of training with `tokens` tokens a step and of decoding at the longest context.
///
/// Weights, gradients and the two moments of AdamW take 4 bytes a parameter each. Activations are what backward needs
/// and does not recompute, in f32 elements. A layer keeps a token's
///
/// - inputs and normalised inputs of both halves: 4·C;
/// - q: Hq·Dk; keys and values: B·G·(Dk + Dv), with B = 3 branches (1 when dense); the joined output: Hq·Dv;
/// - NSA besides: outputs of the branches 3·Hq·Dv, lse and gates 6·Hq, block indices G·n; φ: compressed keys and values
///   G·(Dk + Dv) and for `mlp` twice the hidden width on both sides 4·G·H (before and after GELU), both a block, of
///   which there is one every d tokens; dense instead: lse Hq;
/// - MLP: gate, up and their product 3·F; with experts 3·F_e for each expert visited, plus E router scores.
///
/// The model adds the final norm's input and output 2·C and the token's loss. The logits of a whole batch are never
/// stored. The plan prints as a table.
///
/// ```
/// use nsa_core::model::{ModelConfig, memory_plan};
/// let plan = memory_plan(&ModelConfig::preset("paper-27b")?, 8192);
/// assert_eq!(plan.weights_bytes, 4 * plan.params.total);
/// println!("{plan}");
/// # Ok::<(), nsa_core::ConfigError>(())
/// ```
pub fn memory_plan(config: &ModelConfig, tokens: usize) -> MemoryPlan {
    let params = param_counts(config);
    let weights_bytes = params.total.saturating_mul(4);
    let layers: u128 = (0..config.num_hidden_layers()).map(|layer| layer_elements(config, layer, tokens)).sum();
    let outer = (2 * config.hidden_size() as u128 + 1) * tokens as u128;
    let context = config.max_position_embeddings();
    let layer_count = config.num_hidden_layers() as u64;
    let per_token = match config.nsa_config() {
        // One compressed row every d tokens, beside the selection branch's row.
        Some(nsa) => row_elements(config) + row_elements(config).div_ceil(nsa.compress_stride() as u64),
        None => row_elements(config),
    };
    MemoryPlan {
        params,
        tokens,
        weights_bytes,
        gradients_bytes: weights_bytes,
        optimizer_bytes: weights_bytes.saturating_mul(2),
        activations_bytes: saturate((layers + outer) * 4),
        context,
        kv_cache_bytes_per_token: per_token.saturating_mul(4 * layer_count),
        kv_cache_bytes: kv_cache_bytes(config, context, DType::F32),
        kv_cache_bf16_bytes: kv_cache_bytes(config, context, DType::Bf16),
    }
}

/// Bytes of the cache of one sequence of `context` tokens, all layers: for NSA the selection branch's rows, one
/// compressed row for each complete block, a ring of l raw rows for the next block and a ring of w rows for the window;
/// for dense attention one row a token. A row is G·(Dk + Dv) elements.
pub fn kv_cache_bytes(config: &ModelConfig, context: usize, dtype: DType) -> u64 {
    let rows = match config.nsa_config() {
        Some(nsa) => context + index::num_blocks(&nsa, context) + nsa.compress_block() + nsa.window(),
        None => context,
    };
    let per_row = row_elements(config) as u128 * config.num_hidden_layers() as u128 * dtype.size_bytes() as u128;
    saturate(rows as u128 * per_row)
}

/// Elements of one row of keys and values: G·(Dk + Dv).
fn row_elements(config: &ModelConfig) -> u64 {
    config.num_key_value_heads() as u64 * (config.head_dim() + config.v_head_dim()) as u64
}

/// Elements that layer `layer` keeps for backward.
fn layer_elements(config: &ModelConfig, layer: usize, tokens: usize) -> u128 {
    let heads = config.num_attention_heads() as u128;
    let (q, o) = (heads * config.head_dim() as u128, heads * config.v_head_dim() as u128);
    let row = u128::from(row_elements(config));
    let mut per_token = 4 * config.hidden_size() as u128 + q + o;
    let mut per_block = 0;
    let mut blocks = 0;
    match config.nsa_config() {
        Some(nsa) => {
            let groups = nsa.num_kv_heads() as u128;
            per_token += 3 * row + 3 * o + 6 * heads + groups * nsa.select_count() as u128;
            per_block = row + 4 * groups * nsa.compress_hidden().unwrap_or(0) as u128;
            blocks = index::num_blocks(&nsa, tokens) as u128;
        }
        None => per_token += row + heads,
    }
    per_token += match config.moe().filter(|_| config.is_moe_layer(layer)) {
        Some(moe) => 3 * ((moe.per_token + moe.shared) * moe.intermediate) as u128 + moe.routed as u128,
        None => 3 * config.intermediate_size() as u128,
    };
    per_token * tokens as u128 + per_block * blocks
}

fn saturate(bytes: u128) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = &self.params;
        writeln!(f, "{:<44} {:>12}", "parameters", Count(counts.total))?;
        for (name, count) in [
            ("  active for one token", counts.active),
            ("  embedding and head", counts.embedding),
            ("  attention", counts.attention),
            ("  MLPs and experts", counts.mlp),
            ("  MLPs and experts, active", counts.active_mlp),
        ] {
            writeln!(f, "{name:<44} {:>12}", Count(count))?;
        }
        let tokens = self.tokens;
        writeln!(f, "{:<44} {:>12}", format!("training, {tokens} tokens a step"), Bytes(self.training_bytes()))?;
        for (name, bytes) in [
            ("  weights (f32)", self.weights_bytes),
            ("  gradients (f32)", self.gradients_bytes),
            ("  AdamW moments (f32)", self.optimizer_bytes),
            ("  activations (f32)", self.activations_bytes),
        ] {
            writeln!(f, "{name:<44} {:>12}", Bytes(bytes))?;
        }
        let context = self.context;
        writeln!(f, "{:<44} {:>12}", format!("cache of a sequence of {context} (f32)"), Bytes(self.kv_cache_bytes))?;
        writeln!(f, "{:<44} {:>12}", "  in bf16", Bytes(self.kv_cache_bf16_bytes))?;
        write!(f, "{:<44} {:>12}", "  growth with each token (f32)", Bytes(self.kv_cache_bytes_per_token))
    }
}
