//! Models by name.

use super::config::{AttentionKind, ModelConfig, ModelFields, NsaFields, TokenizerKind};
use crate::ConfigError;

/// Names that [`ModelConfig::preset`] knows, by size.
pub const PRESETS: &[&str] =
    &["tiny-1m", "bench-4m", "small-10m", "medium-45m", "smollm-135m", "large-350m", "paper-27b"];

impl ModelConfig {
    /// A configuration by name:
    ///
    /// - `tiny-1m`, `small-10m`: byte-level, for laptops and demonstrations;
    /// - `medium-45m`, `large-350m`: 32,768 ids of a `tokenizer.json`, context 8192;
    /// - `bench-4m`: byte-level with dense attention, 4 layers of width 256, for measuring steps of 1,024 to 16,384
    ///   tokens; `attention: nsa` has the paper's block sizes;
    /// - `smollm-135m`: the shape of SmolLM2-135M, dense as published; `attention: nsa` makes it sparse;
    /// - `paper-27b`: the shape of arXiv 2502.11089. The paper publishes layers, widths, heads and expert counts, but
    ///   neither vocabulary nor expert widths: here 102,400 ids and 1472 per expert, chosen so that the total is 27.0B.
    ///   One token then passes 2.7B parameters in its experts and MLPs and 5.4B in all: attention of the published
    ///   shape alone has 2.1B, so that no expert width gives both published sums (27B, 3B) at once.
    ///
    /// # Errors
    /// If no preset has this name.
    ///
    /// ```
    /// use nsa_core::model::ModelConfig;
    /// assert_eq!(ModelConfig::preset("paper-27b")?.num_attention_heads(), 64);
    /// # Ok::<(), nsa_core::ConfigError>(())
    /// ```
    pub fn preset(name: &str) -> Result<Self, ConfigError> {
        let fields = match name {
            "tiny-1m" => tiny(),
            "bench-4m" => bench(),
            "small-10m" => small(),
            "medium-45m" => medium(),
            "smollm-135m" => smollm(),
            "large-350m" => large(),
            "paper-27b" => paper(),
            _ => return Err(ConfigError::new("preset", name, format!("must be one of {}", PRESETS.join(", ")))),
        };
        Self::new(fields)
    }
}

/// A byte-level model with the defaults of every optional field.
fn bytes(
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    groups: usize,
    context: usize,
) -> ModelFields {
    ModelFields {
        vocab_size: 256,
        hidden_size: hidden,
        intermediate_size: intermediate,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: groups,
        head_dim: None,
        v_head_dim: None,
        max_position_embeddings: context,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        tie_word_embeddings: false,
        qk_norm: false,
        attention: AttentionKind::Nsa,
        nsa: None,
        scale: None,
        initializer_range: 0.02,
        tokenizer: TokenizerKind::Bytes,
        eos_token_id: None,
        bos_token_id: None,
        n_routed_experts: None,
        n_shared_experts: None,
        num_experts_per_tok: None,
        moe_intermediate_size: None,
        first_k_dense_replace: None,
    }
}

fn mlp(hidden: usize) -> NsaFields {
    NsaFields { compress_hidden: Some(hidden), ..NsaFields::default() }
}

/// Blocks half the paper's and a window of 128, for contexts of a thousand tokens.
fn half_blocks(hidden: usize) -> NsaFields {
    NsaFields { compress_block: 16, compress_stride: 8, select_block: 32, select_count: 8, window: 128, ..mlp(hidden) }
}

fn tiny() -> ModelFields {
    ModelFields { nsa: Some(half_blocks(32)), ..bytes(128, 352, 4, 4, 2, 1024) }
}

fn bench() -> ModelFields {
    ModelFields { attention: AttentionKind::Dense, nsa: Some(mlp(64)), ..bytes(256, 768, 4, 4, 4, 16_384) }
}

fn small() -> ModelFields {
    ModelFields { nsa: Some(half_blocks(64)), qk_norm: true, ..bytes(320, 864, 8, 5, 1, 2048) }
}

fn medium() -> ModelFields {
    ModelFields {
        vocab_size: 32_768,
        tokenizer: TokenizerKind::File,
        tie_word_embeddings: true,
        qk_norm: true,
        nsa: Some(mlp(64)),
        ..bytes(512, 1376, 8, 8, 2, 8192)
    }
}

fn smollm() -> ModelFields {
    ModelFields {
        vocab_size: 49_152,
        tokenizer: TokenizerKind::File,
        tie_word_embeddings: true,
        attention: AttentionKind::Dense,
        nsa: Some(mlp(64)),
        rope_theta: 1e5,
        ..bytes(576, 1536, 30, 9, 3, 8192)
    }
}

fn large() -> ModelFields {
    ModelFields {
        vocab_size: 32_768,
        tokenizer: TokenizerKind::File,
        tie_word_embeddings: true,
        qk_norm: true,
        nsa: Some(mlp(64)),
        ..bytes(1024, 2816, 24, 16, 4, 8192)
    }
}

fn paper() -> ModelFields {
    ModelFields {
        vocab_size: 102_400,
        tokenizer: TokenizerKind::File,
        head_dim: Some(192),
        v_head_dim: Some(128),
        nsa: Some(mlp(192)),
        n_routed_experts: Some(72),
        n_shared_experts: Some(2),
        num_experts_per_tok: Some(6),
        moe_intermediate_size: Some(1472),
        first_k_dense_replace: Some(1),
        // The dense layer is as wide as the 8 experts that a token visits elsewhere.
        ..bytes(2560, 8 * 1472, 30, 64, 4, 8192)
    }
}
