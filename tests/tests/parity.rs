//! Training's forward pass, decoding's prefill in any chunks and its steps token by token are one model, on a checkpoint
//! that training wrote.

use nsa_core::Precision;
use nsa_core::model::{AttentionKind, ModelConfig, ModelFields};
use nsa_core::tokenizer::Tokenizer;
use nsa_decode::{Model as Decoder, ModelOptions, SessionOptions};
use nsa_kernels::{Backend, Element};
use nsa_tests::compare::difference;
use nsa_train::TrainOptions;
use nsa_train::checkpoint::DataState;
use nsa_train::model::{Batch, Capacity, Workspace};
use nsa_train::network::{Network, Trained};
use nsa_train::trainer::{Data, Trainer};

const TEXT: &str =
    "If music be the food of love, play on; give me excess of it, that, surfeiting, the appetite may sicken. ";

/// A few steps on a short text; the run's folder lives as long as the test.
fn trained(attention: AttentionKind, precision: Precision, run: &std::path::Path) -> (Trainer, std::path::PathBuf) {
    let config = ModelConfig::preset("tiny-1m").unwrap();
    let config = ModelConfig::new(ModelFields { attention, num_hidden_layers: 2, qk_norm: true, ..config.to_fields() });
    let file = run.join("text.txt");
    std::fs::write(&file, TEXT.repeat(40)).unwrap();
    let (backend, _) = Backend::pick(None).unwrap();
    let options = TrainOptions {
        steps: 4,
        batch: 2,
        context: 192,
        precision,
        warmup: Some(0),
        eval_every: 0,
        ..Default::default()
    };
    let state = DataState { files: vec![file], val_fraction: 0.1, ..Default::default() };
    let data = Data::open(state, &Tokenizer::bytes(), &run.join("data"), options.seed).unwrap();
    let mut trainer = Trainer::new(&backend, config.unwrap(), options, data, None).unwrap();
    for _ in 0..4 {
        trainer.step().unwrap();
    }
    let folder = trainer.save(run).unwrap();
    (trainer, folder)
}

/// Logits of all tokens as training computes them.
fn of_training<T: Element<Acc = f32>>(trained: &Trained<T>, tokens: &[u32]) -> Vec<f32> {
    let mut workspace = Workspace::for_inference(&trained.model, Capacity { tokens: 512, longest: 512 }).unwrap();
    let logits = trained.model.logits(&mut workspace, &Batch::next_token(&[tokens]).unwrap()).unwrap();
    logits.into_iter().map(|x| x.to_acc()).collect()
}

fn check(attention: AttentionKind, precision: Precision) {
    let run = tempfile::tempdir().unwrap();
    let (trainer, folder) = trained(attention, precision, run.path());
    // Past the window, with blocks to choose among and a last block that is not whole.
    let tokens: Vec<u32> = TEXT.repeat(5).bytes().take(461).map(u32::from).collect();
    let (expected, limit) = match trainer.network() {
        Network::F32(trained) => (of_training(trained, &tokens), 2e-5),
        // Training rounds its logits, too; rounding of what is summed in another order moves others.
        Network::Bf16(trained) => (of_training(trained, &tokens), 2e-2),
    };
    let options = ModelOptions { precision };
    let decoder = Decoder::open_with(&folder, Backend::pick(None).unwrap().0, options).unwrap();
    let vocab = decoder.config().vocab_size();
    for chunk in [512, 100, 7] {
        let mut session = decoder.session_with(SessionOptions { chunk, ..Default::default() }).unwrap();
        let got = session.append_all(&tokens).unwrap();
        let worst = difference(&got, &expected);
        assert!(worst < limit, "prefill in chunks of {chunk}: {worst}");
    }
    let mut session = decoder.session();
    for (t, &token) in tokens.iter().enumerate() {
        let got = session.append(&[token]).unwrap();
        let worst = difference(got, &expected[t * vocab..(t + 1) * vocab]);
        assert!(worst < limit, "step {t}: {worst}");
    }
}

#[test]
fn sparse_attention() {
    check(AttentionKind::Nsa, Precision::F32);
    check(AttentionKind::Nsa, Precision::Bf16);
}

#[test]
fn full_attention() {
    check(AttentionKind::Dense, Precision::F32);
    check(AttentionKind::Dense, Precision::Bf16);
}
