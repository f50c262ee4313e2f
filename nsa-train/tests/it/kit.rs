//! Small models and texts.

use nsa_core::CompressKind;
use nsa_core::model::{AttentionKind, ModelConfig, ModelFields, NsaFields};
use nsa_core::tokenizer::Tokenizer;
use nsa_kernels::Backend;
use nsa_train::TrainOptions;
use nsa_train::checkpoint::DataState;
use nsa_train::data::Split;
use nsa_train::trainer::{Data, Trainer};
use std::fs;
use std::path::{Path, PathBuf};

/// A model of a few thousand parameters on bytes; `change` adapts it.
pub fn config(change: impl FnOnce(&mut ModelFields)) -> ModelConfig {
    let mut fields = ModelConfig::preset("tiny-1m").unwrap().to_fields();
    fields.hidden_size = 24;
    fields.intermediate_size = 20;
    fields.num_hidden_layers = 2;
    fields.max_position_embeddings = 64;
    fields.head_dim = Some(6);
    fields.nsa = Some(NsaFields {
        compress_block: 4,
        compress_stride: 2,
        select_block: 4,
        select_count: 3,
        select_initial: 1,
        select_local: 1,
        window: 5,
        compress_kind: CompressKind::Mlp,
        compress_hidden: Some(5),
        compress_bias: true,
        compress_position: true,
    });
    change(&mut fields);
    ModelConfig::new(fields).unwrap()
}

pub fn dense(fields: &mut ModelFields) {
    fields.attention = AttentionKind::Dense;
}

pub fn backend() -> Backend {
    Backend::pick(Some("cpu")).unwrap().0
}

/// Options of a short run.
pub fn options() -> TrainOptions {
    TrainOptions {
        steps: 6,
        batch: 2,
        context: 24,
        lr: 3e-3,
        min_lr: 3e-4,
        warmup: Some(2),
        eval_every: 0,
        eval_tokens: 100,
        save_every: 0,
        ..TrainOptions::default()
    }
}

/// Files with words that repeat, of different lengths.
pub fn write_texts(folder: &Path) -> Vec<PathBuf> {
    let words = ["the ", "sea ", "is ", "wide, ", "and ", "cold\n", "a ", "ship ", "sails ", "on "];
    (0..5)
        .map(|file: usize| {
            let text: String = (0..40 + 17 * file).map(|i| words[(i * (file + 3) + i * i / 7) % words.len()]).collect();
            let path = folder.join(format!("{file}.txt"));
            fs::write(&path, text).unwrap();
            path
        })
        .collect()
}

pub fn data(folder: &Path, seed: u64) -> Data {
    let texts = folder.join("texts");
    fs::create_dir_all(&texts).unwrap();
    let state =
        DataState { files: write_texts(&texts), split: Split::Documents, val_fraction: 0.2, ..DataState::default() };
    Data::open(state, &Tokenizer::bytes(), &folder.join("cache"), seed).unwrap()
}

pub fn trainer(folder: &Path, config: ModelConfig, options: TrainOptions) -> Trainer {
    let data = data(folder, options.seed);
    Trainer::new(&backend(), config, options, data, None).unwrap()
}

/// All parameters and moments as bits.
pub fn params(trainer: &Trainer) -> Vec<u32> {
    let buffer = trainer.network().params();
    let mut values = vec![0.0f32; buffer.len()];
    buffer.read(&mut values).unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Takes `steps` steps; returns the losses.
pub fn steps(trainer: &mut Trainer, steps: usize) -> Vec<f64> {
    (0..steps).map(|_| trainer.step().unwrap().loss).collect()
}
