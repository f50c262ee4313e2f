//! Small models, a text, and training on a backend.

use nsa_core::CompressKind;
use nsa_core::model::{AttentionKind, ModelConfig, ModelFields, NsaFields};
use nsa_core::tokenizer::Tokenizer;
use nsa_kernels::Backend;
use nsa_train::TrainOptions;
use nsa_train::checkpoint::DataState;
use nsa_train::trainer::{Data, Trainer};
use std::path::Path;

pub const TEXT: &str =
    "If music be the food of love, play on; give me excess of it, that, surfeiting, the appetite may sicken. ";

/// Bytes, 2 layers, 32 channels, 4 heads on 1 KV head of 16; l/d/l' = 8/4/16, n = 3, w = 16.
pub fn config(attention: AttentionKind, kind: CompressKind, qk_norm: bool) -> ModelConfig {
    let nsa = NsaFields {
        compress_block: 8,
        compress_stride: 4,
        select_block: 16,
        select_count: 3,
        select_initial: 1,
        select_local: 1,
        window: 16,
        compress_kind: kind,
        compress_hidden: (kind == CompressKind::Mlp).then_some(12),
        compress_bias: kind == CompressKind::Mlp,
        compress_position: true,
    };
    let fields = ModelFields {
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 1,
        head_dim: Some(16),
        max_position_embeddings: 1200,
        attention,
        nsa: Some(nsa),
        qk_norm,
        ..ModelConfig::preset("tiny-1m").expect("a preset").to_fields()
    };
    ModelConfig::new(fields).expect("a legal configuration")
}

pub fn cuda() -> Backend {
    Backend::cuda(0).expect("the simulator")
}

pub fn cpu() -> Backend {
    Backend::pick(Some("cpu")).expect("the CPU is always there").0
}

/// Two sequences of 64 tokens, twice a step.
pub fn options() -> TrainOptions {
    TrainOptions {
        steps: 4,
        batch: 2,
        context: 64,
        accumulate: 2,
        lr: 3e-3,
        min_lr: 3e-4,
        warmup: Some(1),
        eval_every: 0,
        eval_tokens: 100,
        ..TrainOptions::default()
    }
}

pub fn data(folder: &Path, seed: u64) -> Data {
    let file = folder.join("text.txt");
    std::fs::write(&file, TEXT.repeat(20)).expect("a temporary file");
    let state = DataState { files: vec![file], val_fraction: 0.1, ..DataState::default() };
    Data::open(state, &Tokenizer::bytes(), &folder.join("data"), seed).expect("text")
}

pub fn trainer(backend: &Backend, folder: &Path, config: ModelConfig, options: TrainOptions) -> Trainer {
    Trainer::new(backend, config, options, data(folder, options.seed), None).expect("a trainer")
}
