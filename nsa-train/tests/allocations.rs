//! After its first steps, training takes no memory that it did not have.

use nsa_core::model::{AttentionKind, ModelConfig};
use nsa_core::tokenizer::Tokenizer;
use nsa_kernels::Backend;
use nsa_train::TrainOptions;
use nsa_train::checkpoint::DataState;
use nsa_train::trainer::{Data, Trainer};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Bytes that may be taken at any time during a step, and are given back: the GEMM library packs parts of the weights.
/// Any activation of the models below is larger: keys have 16·512·32 elements of 4 bytes, half of this many again.
const ALLOWED: usize = 700_000;

#[test]
fn steps_reuse_the_memory_of_the_first_ones() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "All the world's a stage, and all the men and women merely players. ".repeat(700)).unwrap();
    let (backend, _) = Backend::pick(Some("cpu")).unwrap();
    for attention in [AttentionKind::Nsa, AttentionKind::Dense] {
        let mut fields = ModelConfig::preset("tiny-1m").unwrap().to_fields();
        (fields.hidden_size, fields.intermediate_size, fields.num_hidden_layers) = (32, 48, 2);
        (fields.num_attention_heads, fields.num_key_value_heads, fields.head_dim) = (2, 1, Some(32));
        (fields.attention, fields.qk_norm) = (attention, true);
        let state = DataState { files: vec![file.clone()], val_fraction: 0.1, ..DataState::default() };
        let data = Data::open(state, &Tokenizer::bytes(), folder.path(), 1).unwrap();
        let options = TrainOptions { batch: 16, context: 512, accumulate: 1, ..TrainOptions::default() };
        let mut trainer = Trainer::new(&backend, ModelConfig::new(fields).unwrap(), options, data, None).unwrap();
        // Which thread takes which part of the work, and so how much scratch exists at once, varies a little.
        for _ in 0..6 {
            trainer.step().unwrap();
        }
        let before = MEMORY.current_usage();
        MEMORY.reset_peak_usage();
        for _ in 0..2 {
            trainer.step().unwrap();
        }
        let (peak, after) = (MEMORY.peak_usage() - before, MEMORY.current_usage().abs_diff(before));
        assert!(peak < ALLOWED, "{attention:?}: {peak} bytes taken during steps");
        assert!(after < 10_000, "{attention:?}: {after} bytes more or less after two steps");
    }
}
