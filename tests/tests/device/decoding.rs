//! Decoding.

use crate::kit::{self, TEXT};
use half::bf16;
use nsa_core::CompressKind;
use nsa_core::model::AttentionKind::{self, Dense, Nsa};
use nsa_decode::{Batch, GenerateOptions, Model, ModelOptions, Precision, Sampling, Session, SessionOptions};
use nsa_kernels::Backend;
use nsa_tests::compare::difference;
use nsa_tests::sim::{leave_free, on_a_small_a100, on_an_a100, on_simulator};
use nsa_train::TrainOptions;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
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

/// A model with its first weights, as often as it is called.
fn untrained(attention: AttentionKind, kind: CompressKind, qk_norm: bool) -> impl Fn(Backend) -> Model {
    let folder = tempfile::tempdir().expect("a folder");
    let trainer = kit::trainer(&kit::cpu(), folder.path(), kit::config(attention, kind, qk_norm), kit::options());
    let checkpoint = trainer.save(&folder.path().join("run")).expect("a checkpoint");
    move |backend| {
        // The folder stays as long as it may be opened.
        let _kept = &folder;
        open(&checkpoint, backend)
    }
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

const PROMPTS: [&str; 3] = [TEXT, "If", "give me excess of it, that"];

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

/// Rounds the weights of a checkpoint.
fn to_bf16(checkpoint: &Path) {
    let path = checkpoint.join("model.safetensors");
    let file = std::fs::read(&path).expect("weights");
    let rounded: Vec<(String, Vec<usize>, Vec<u8>)> = SafeTensors::deserialize(&file)
        .expect("weights")
        .iter()
        .map(|(name, tensor)| {
            let values = tensor.data().chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]]));
            let bytes = values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect();
            (name.to_owned(), tensor.shape().to_vec(), bytes)
        })
        .collect();
    let view = |shape: &Vec<usize>, bytes| TensorView::new(Dtype::BF16, shape.clone(), bytes).expect("a tensor");
    let tensors = rounded.iter().map(|(name, shape, bytes)| (name, view(shape, bytes)));
    safetensors::serialize_to_file(tensors, None, &path).expect("a temporary file");
}

fn generates_as_the_cpu(attention: AttentionKind, kind: CompressKind, qk_norm: bool, change: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("a folder");
    let checkpoint = trained(folder.path(), attention, kind, qk_norm);
    change(&checkpoint);
    // What training and decoding on one backend may differ by, too.
    same_text([kit::cuda(), kit::cpu()].map(|backend| open(&checkpoint, backend)), 2e-5);
}

/// Both models generate the same text, and their logits differ by less than `limit`.
fn same_text([cuda, cpu]: [Model; 2], limit: f32) {
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
    let worst = difference(&logits(&cuda), &logits(&cpu));
    assert!(worst < limit, "{worst}");
}

#[test]
fn sparse_weighted() {
    on_simulator("decoding::sparse_weighted", || generates_as_the_cpu(Nsa, CompressKind::Weighted, true, |_| {}));
}

#[test]
fn sparse_mlp() {
    on_simulator("decoding::sparse_mlp", || generates_as_the_cpu(Nsa, CompressKind::Mlp, false, |_| {}));
}

#[test]
fn sparse_in_bf16() {
    on_simulator("decoding::sparse_in_bf16", || generates_as_the_cpu(Nsa, CompressKind::Mean, false, to_bf16));
}

/// Activations and caches in bf16, of a checkpoint in f32: as the CPU's, and recorded steps as called ones.
#[test]
fn computing_in_bf16() {
    on_simulator("decoding::computing_in_bf16", || {
        for attention in [Nsa, Dense] {
            let folder = tempfile::tempdir().expect("a folder");
            let checkpoint = trained(folder.path(), attention, CompressKind::Weighted, true);
            let options = ModelOptions { precision: Precision::Bf16 };
            let open = |backend| Model::open_with(&checkpoint, backend, options).expect("a model");
            let (cuda, cpu) = (open(kit::cuda()), open(kit::cpu()));
            let tokens: Vec<u32> = TEXT.bytes().take(9).map(u32::from).collect();
            let session = session(&cuda, TEXT);
            assert_eq!(recorded(session.clone(), &tokens), called(session, &tokens));
            assert_eq!(cuda.recorded_steps(), kinds(attention));
            same_text([cuda, cpu], 2e-2);
        }
    });
}

#[test]
fn dense() {
    on_simulator("decoding::dense", || generates_as_the_cpu(Dense, CompressKind::Mean, false, |_| {}));
}

/// Kinds of steps of one sequence: of sparse attention those that complete a block are others.
fn kinds(attention: AttentionKind) -> usize {
    if attention == Nsa { 2 } else { 1 }
}

/// Caches on the device are shared by forks until one writes, and cut back within `undo`.
#[test]
fn sessions_fork_and_go_back() {
    on_simulator("decoding::sessions_fork_and_go_back", || {
        let model = untrained(Nsa, CompressKind::Mean, false)(kit::cuda());
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

/// Steps that are given to the device as one piece have the same bits as those whose operations are called one by one, across
/// blocks and pages, alone and together, in other sequences' turns, and from several threads.
#[test]
fn recorded_steps_are_the_steps() {
    on_an_a100("decoding::recorded_steps_are_the_steps", || [Nsa, Dense].into_iter().for_each(assert_recorded));
}

fn assert_recorded(attention: AttentionKind) {
    let model = untrained(attention, CompressKind::Weighted, true)(kit::cuda());
    let text = TEXT.repeat(3);
    // Up to the end of a page of tokens and beyond; and other lengths.
    let starts = [250, 5, 63, 30].map(|length| session(&model, &text[..length]));
    let tokens: Vec<u32> = text.bytes().take(13).map(u32::from).collect();
    // Room for more rows than any step has, so that no record ends for want of it.
    model.session().append_all(&tokens).expect("logits");
    let one_by_one = starts.clone().map(|session| called(session, &tokens));
    assert_eq!(model.recorded_steps(), 0);
    let steps = |session| recorded(session, &tokens);
    assert_eq!(starts.clone().map(steps), one_by_one);
    assert_eq!(model.recorded_steps(), kinds(attention));
    // A fork takes nothing of what the other goes on with: pages and rings are copied before they are written to.
    let mut first = starts[1].clone();
    let (before, after) = tokens.split_at(4);
    recorded_on(&mut first, before);
    let (mut fork, one_way) = (first.fork(), called(first.fork(), after));
    assert_eq!(recorded_on(&mut first, after), one_way);
    assert_eq!(recorded_on(&mut fork, after), one_way);
    let together = |count: usize| {
        let mut sessions = starts[..count].to_vec();
        let step = |&token: &u32| {
            sessions.iter_mut().for_each(|session| session.push(&[token]).expect("room"));
            nsa_decode::advance(&mut sessions.iter_mut().collect::<Vec<_>>()).expect("a step");
            sessions.iter_mut().map(|session| session.logits().expect("logits").to_vec()).collect()
        };
        tokens.iter().map(step).collect::<Vec<Vec<Vec<f32>>>>()
    };
    // The first of each kind is called, all later ones are recorded.
    for count in [3, 4] {
        let first = together(count);
        for (at, all) in first.iter().enumerate() {
            for (logits, expected) in all.iter().zip(&one_by_one) {
                let expected: Vec<f32> = expected[at].iter().copied().map(f32::from_bits).collect();
                assert!(difference(logits, &expected) < 2e-5, "as alone, but for the products' order of sums");
            }
        }
        let all_bits = |steps: Vec<Vec<Vec<f32>>>| -> Vec<_> { steps.concat().iter().map(|x| bits(x)).collect() };
        assert_eq!(all_bits(together(count)), all_bits(first));
    }
    assert_eq!(starts.clone().map(steps), one_by_one);
    std::thread::scope(|scope| {
        let threads = starts.map(|session| scope.spawn(|| steps(session)));
        assert_eq!(threads.map(|thread| thread.join().expect("no panic")), one_by_one);
    });
}

/// What is recorded is void when a context or a chunk of tokens outgrows the memory that it uses.
#[test]
fn records_end_with_their_memory() {
    on_an_a100("decoding::records_end_with_their_memory", || [Nsa, Dense].into_iter().for_each(assert_forgotten));
}

fn assert_forgotten(attention: AttentionKind) {
    let open = untrained(attention, CompressKind::Mean, false);
    let model = open(kit::cuda());
    let text = TEXT.repeat(12);
    let tokens: Vec<u32> = text.bytes().take(9).map(u32::from).collect();
    let (short, long) = (session(&model, &text[..30]), session(&model, &text[..1019]));
    let expected = [short.clone(), long.clone()].map(|session| called(session, &tokens));
    // The memory of other models' passes is not known to this one.
    let model = open(kit::cuda());
    let (short, long) = (session(&model, &text[..30]), session(&model, &text[..1019]));
    assert_eq!(recorded(short.clone(), &tokens), expected[0]);
    // Beyond 1,024 tokens steps have other memory.
    assert_eq!(recorded(long, &tokens), expected[1]);
    assert_eq!(recorded(short.clone(), &tokens), expected[0]);
    assert_eq!(model.recorded_steps(), kinds(attention));
    let mut chunk = model.session_with(SessionOptions { chunk: 50, undo: 0 }).expect("a session");
    chunk.append(&tokens.repeat(6)).expect("logits");
    assert_eq!(recorded(short, &tokens), expected[0]);
    assert_eq!(model.recorded_steps(), kinds(attention));
}

/// A step for which the device has no memory is an error that says so. Afterwards everything goes on: what was recorded uses nothing
/// that was given back.
#[test]
fn steps_go_on_after_a_want_of_memory() {
    on_a_small_a100("decoding::steps_go_on_after_a_want_of_memory", 64 << 20, || {
        [Nsa, Dense].into_iter().for_each(assert_goes_on);
    });
}

fn assert_goes_on(attention: AttentionKind) {
    let (open, backend) = (untrained(attention, CompressKind::Mean, false), kit::cuda());
    let tokens: Vec<u32> = TEXT.bytes().take(7).map(u32::from).collect();
    // The first step of two sequences, with so much memory left, of a model that has recorded those of one; then what follows.
    let together = |left: Option<usize>| {
        let model = open(backend.clone());
        let mut sessions = [30, 41].map(|length| session(&model, &TEXT[..length]));
        let expected = sessions.clone().map(|session| recorded(session, &tokens));
        for session in &mut sessions {
            session.logits().expect("logits of the prompt");
            session.push(&tokens[..1]).expect("room");
        }
        let taken = left.map(|bytes| leave_free(&backend, bytes));
        let done = nsa_decode::advance(&mut sessions.iter_mut().collect::<Vec<_>>());
        drop(taken);
        let elsewhere = backend.upload(&vec![7.0f32; 1 << 16]);
        for (session, expected) in sessions.iter_mut().zip(&expected) {
            let mut logits = vec![bits(session.logits().expect("logits"))];
            logits.extend(recorded_on(session, &tokens[1..]));
            let numbers = |all: &[Vec<u32>]| all.concat().into_iter().map(f32::from_bits).collect::<Vec<_>>();
            let worst = difference(&numbers(&logits), &numbers(expected));
            assert!(worst < 2e-5, "{attention:?}, {left:?} bytes left: {worst}");
        }
        let mut host = vec![0.0; elsewhere.len()];
        elsewhere.read(&mut host).expect("there");
        assert!(host.iter().all(|x| *x == 7.0), "{attention:?}, {left:?} bytes left");
        done
    };
    // All kernels are there from now on.
    together(None).expect("memory");
    // A little more each time.
    let failures = (0..).step_by(1024).map_while(|left| together(Some(left)).err());
    let failures: Vec<_> = failures.map(|error| error.to_string()).collect();
    assert!(failures.len() > 3, "{failures:?}");
    assert!(failures.iter().all(|error| error.contains("CUDA_ERROR_OUT_OF_MEMORY")), "{failures:?}");
}

/// Logits of tokens that are appended to a session, one at a time, in steps whose operations are called.
fn called(mut session: Session, tokens: &[u32]) -> Vec<Vec<u32>> {
    session.logits().expect("logits");
    tokens.iter().map(|&token| bits(&session.append_all(&[token]).expect("logits"))).collect()
}

/// The same in steps that are recorded.
fn recorded(mut session: Session, tokens: &[u32]) -> Vec<Vec<u32>> {
    session.logits().expect("logits");
    recorded_on(&mut session, tokens)
}

fn recorded_on(session: &mut Session, tokens: &[u32]) -> Vec<Vec<u32>> {
    tokens.iter().map(|&token| bits(session.append(&[token]).expect("logits"))).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}
