//! Decoding.

use crate::kit::{self, TEXT};
use nsa_core::CompressKind;
use nsa_core::model::AttentionKind::{self, Dense, Nsa};
use nsa_decode::{Batch, GenerateOptions, Model, Sampling, Session, SessionOptions};
use nsa_kernels::Backend;
use nsa_tests::sim::on_simulator;
use nsa_train::TrainOptions;
use std::path::{Path, PathBuf};

/// A model that knows the text a little: its next tokens are clear, so that rounding does not change them.
fn trained(folder: &Path, attention: AttentionKind, kind: CompressKind, qk_norm: bool) -> PathBuf {
    let options = TrainOptions { steps: 120, lr: 1e-2, min_lr: 1e-3, batch: 8, accumulate: 1, ..kit::options() };
    let mut trainer = kit::trainer(&kit::cpu(), folder, kit::config(attention, kind, qk_norm), options);
    while !trainer.is_done() {
        trainer.step().expect("a step");
    }
    trainer.save(&folder.join("run")).expect("a checkpoint")
}

fn open(checkpoint: &Path, backend: Backend) -> Model {
    Model::open(checkpoint, backend).expect("a model")
}

/// A session with prompt `prompt`, in chunks that end in the middle of blocks.
fn session(model: &Model, prompt: &str) -> Session {
    let mut session = model.session_with(SessionOptions { chunk: 24, undo: 3 }).expect("a session");
    session.push(&model.encode_prompt(prompt).expect("tokens")).expect("room");
    session
}

const PROMPTS: [&str; 3] = [&TEXT, "If", "give me excess of it, that"];

/// The likeliest tokens after each of the prompts, together.
fn greedy(model: &Model) -> Vec<Vec<u32>> {
    let mut batch = Batch::new(model);
    for prompt in PROMPTS {
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let options = GenerateOptions { max_tokens: 12, sampling, ..GenerateOptions::default() };
        batch.add(session(model, prompt), options).expect("a member");
    }
    while !batch.step().expect("a step").is_empty() {}
    batch.sessions().map(|session| session.tokens().to_vec()).collect()
}

fn generates_as_the_cpu(attention: AttentionKind, kind: CompressKind, qk_norm: bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let checkpoint = trained(folder.path(), attention, kind, qk_norm);
    let (cuda, cpu) = (open(&checkpoint, kit::cuda()), open(&checkpoint, kit::cpu()));
    let tokens = greedy(&cuda);
    assert_eq!(tokens, greedy(&cpu));
    // All logits of what came out: the prompt in chunks, the rest in steps.
    let (prompt, rest) = tokens[0].split_at(TEXT.len());
    let logits = |model: &Model| {
        let mut session = model.session_with(SessionOptions { chunk: 24, undo: 0 }).expect("a session");
        let mut all = session.append_all(prompt).expect("logits");
        rest.iter().for_each(|&token| all.extend_from_slice(session.append(&[token]).expect("logits")));
        all
    };
    let worst = kit::difference(&logits(&cuda), &logits(&cpu));
    // What training and decoding on one backend may differ by, too.
    assert!(worst < 2e-5, "{worst}");
}

#[test]
fn sparse_weighted() {
    on_simulator("decoding::sparse_weighted", || generates_as_the_cpu(Nsa, CompressKind::Weighted, true));
}

#[test]
fn sparse_mean() {
    on_simulator("decoding::sparse_mean", || generates_as_the_cpu(Nsa, CompressKind::Mean, false));
}

#[test]
fn dense() {
    on_simulator("decoding::dense", || generates_as_the_cpu(Dense, CompressKind::Mean, false));
}

/// Caches on the device are shared by forks until one writes, and cut back within `undo`.
#[test]
fn sessions_fork_and_go_back() {
    on_simulator("decoding::sessions_fork_and_go_back", || {
        let folder = tempfile::tempdir().expect("a folder");
        let checkpoint = folder.path();
        let trainer =
            kit::trainer(&kit::cpu(), checkpoint, kit::config(Nsa, CompressKind::Mean, false), kit::options());
        let checkpoint = trainer.save(&checkpoint.join("run")).expect("a checkpoint");
        let model = open(&checkpoint, kit::cuda());
        let mut first = session(&model, &TEXT[..50]);
        first.logits().expect("logits");
        let mut fork = first.fork();
        let expected = first.append(&[65]).expect("logits").to_vec();
        for token in [66, 67] {
            fork.append(&[token]).expect("logits");
        }
        fork.truncate(50).expect("a shorter session");
        assert_eq!(fork.append(&[65]).expect("logits"), expected);
        assert_eq!(fork.reads().steps, 3, "nothing was computed again");
    });
}
