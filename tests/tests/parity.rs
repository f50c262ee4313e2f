//! Training's forward pass, decoding's prefill in any chunks and its steps token by token are one model, on a checkpoint
//! that training wrote.

use nsa_core::model::{AttentionKind, ModelConfig, ModelFields};
use nsa_core::tokenizer::Tokenizer;
use nsa_decode::{Model as Decoder, SessionOptions};
use nsa_kernels::Backend;
use nsa_train::TrainOptions;
use nsa_train::checkpoint::DataState;
use nsa_train::model::{Batch, Capacity, Workspace};
use nsa_train::network::{Network, Trained};
use nsa_train::trainer::{Data, Trainer};

const TEXT: &str =
    "If music be the food of love, play on; give me excess of it, that, surfeiting, the appetite may sicken. ";

/// A few steps on a short text; the run's folder lives as long as the test.
fn trained(attention: AttentionKind, run: &std::path::Path) -> (Trainer, std::path::PathBuf) {
    let config = ModelConfig::preset("tiny-1m").unwrap();
    let config = ModelConfig::new(ModelFields { attention, num_hidden_layers: 2, qk_norm: true, ..config.to_fields() });
    let file = run.join("text.txt");
    std::fs::write(&file, TEXT.repeat(40)).unwrap();
    let (backend, _) = Backend::pick(None).unwrap();
    let options =
        TrainOptions { steps: 4, batch: 2, context: 192, warmup: Some(0), eval_every: 0, ..Default::default() };
    let state = DataState { files: vec![file], val_fraction: 0.1, ..Default::default() };
    let data = Data::open(state, &Tokenizer::bytes(), &run.join("data"), options.seed).unwrap();
    let mut trainer = Trainer::new(&backend, config.unwrap(), options, data, None).unwrap();
    for _ in 0..4 {
        trainer.step().unwrap();
    }
    let folder = trainer.save(run).unwrap();
    (trainer, folder)
}

/// Largest difference, relative to the largest logit.
fn difference(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    got.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max) / largest
}

fn check(attention: AttentionKind) {
    let run = tempfile::tempdir().unwrap();
    let (trainer, folder) = trained(attention, run.path());
    // Past the window, with blocks to choose among and a last block that is not whole.
    let tokens: Vec<u32> = TEXT.repeat(5).bytes().take(461).map(u32::from).collect();
    let Network::F32(Trained { model, .. }) = trainer.network() else { panic!("options ask for f32") };
    let mut workspace = Workspace::for_inference(model, Capacity { tokens: 512, longest: 512 }).unwrap();
    let expected = model.logits(&mut workspace, &Batch::next_token(&[&tokens]).unwrap()).unwrap();

    let decoder = Decoder::open(&folder, Backend::pick(None).unwrap().0).unwrap();
    let vocab = decoder.config().vocab_size();
    for chunk in [512, 100, 7] {
        let mut session = decoder.session_with(SessionOptions { chunk, ..Default::default() }).unwrap();
        let got = session.append_all(&tokens).unwrap();
        let worst = difference(&got, &expected);
        assert!(worst < 2e-5, "prefill in chunks of {chunk}: {worst}");
    }
    let mut session = decoder.session();
    for (t, &token) in tokens.iter().enumerate() {
        let got = session.append(&[token]).unwrap();
        let worst = difference(got, &expected[t * vocab..(t + 1) * vocab]);
        assert!(worst < 2e-5, "step {t}: {worst}");
    }
}

#[test]
fn sparse_attention() {
    check(AttentionKind::Nsa);
}

#[test]
fn full_attention() {
    check(AttentionKind::Dense);
}
