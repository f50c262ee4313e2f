//! After its first step, training allocates no memory worth speaking of.

use nsa_core::model::ModelConfig;
use nsa_core::tokenizer::Tokenizer;
use nsa_kernels::Backend;
use nsa_train::TrainOptions;
use nsa_train::checkpoint::DataState;
use nsa_train::trainer::{Data, Trainer};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use std::alloc::System;

#[global_allocator]
static GLOBAL: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Bytes that a step may allocate: bookkeeping of rows, messages between threads. The smallest activation of the models
/// below has 512·128·4 = 262,144.
const ALLOWED: usize = 100_000;

#[test]
fn steps_after_the_first_reuse_its_memory() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, "All the world's a stage, and all the men and women merely players. ".repeat(300)).unwrap();
    let (backend, _) = Backend::pick(Some("cpu")).unwrap();
    for preset in ["tiny-1m", "bench-4m"] {
        let state = DataState { files: vec![file.clone()], val_fraction: 0.1, ..DataState::default() };
        let data = Data::open(state, &Tokenizer::bytes(), folder.path(), 1).unwrap();
        let options = TrainOptions { batch: 2, context: 256, accumulate: 2, ..TrainOptions::default() };
        let config = ModelConfig::preset(preset).unwrap();
        let mut trainer = Trainer::new(&backend, config, options, data, None).unwrap();
        trainer.step().unwrap();
        let worst = (0..3)
            .map(|_| {
                let region = Region::new(GLOBAL);
                trainer.step().unwrap();
                let change = region.change();
                change.bytes_allocated + change.bytes_reallocated.max(0) as usize
            })
            .max();
        assert!(worst < Some(ALLOWED), "{preset}: a step allocates {worst:?} bytes");
    }
}
