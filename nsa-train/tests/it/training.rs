//! Steps: the same bits again, in other portions, on other threads; loss that falls or ends.

use crate::kit;
use nsa_core::tokenizer::Tokenizer;
use nsa_train::checkpoint;
use nsa_train::eval::{EvalOptions, evaluate};
use nsa_train::metrics::{self, Line};
use nsa_train::model::{Capacity, Workspace};
use nsa_train::network::{Network, Trained};
use nsa_train::run::{Event, run};
use nsa_train::trainer::{Data, Trainer};
use nsa_train::{Precision, TrainOptions};
use std::sync::atomic::{AtomicBool, Ordering};

/// Trains straight through, and in two parts with a checkpoint between.
fn resumed_equals_straight(change: impl Fn(&mut nsa_core::model::ModelFields) + Copy, options: TrainOptions) {
    let (folder, accumulate) = (tempfile::tempdir().unwrap(), options.accumulate);
    let mut straight = kit::trainer(folder.path(), kit::config(change), options);
    let mut losses = kit::steps(&mut straight, 6);

    let mut first = kit::trainer(folder.path(), kit::config(change), options);
    let mut parts = kit::steps(&mut first, 2);
    let saved = first.save(&folder.path().join("run")).unwrap();
    drop(first);
    let loaded = checkpoint::load(&saved).unwrap();
    let mut second = Trainer::resume(&kit::backend(), loaded, kit::data(folder.path(), options.seed)).unwrap();
    assert_eq!((second.state().step, second.state().sequences), (2, 4 * accumulate as u64));
    parts.extend(kit::steps(&mut second, 4));
    assert_eq!(losses, parts);
    assert_eq!(kit::params(&straight), kit::params(&second));
    losses.extend(kit::steps(&mut straight, 1));
    assert_eq!(losses[6], kit::steps(&mut second, 1)[0], "moments too");
}

#[test]
fn resuming_continues_bit_for_bit() {
    let options = |accumulate, precision| TrainOptions { accumulate, precision, ..kit::options() };
    resumed_equals_straight(|_| {}, options(1, Precision::F32));
    resumed_equals_straight(|fields| fields.qk_norm = true, options(2, Precision::F32));
    resumed_equals_straight(kit::dense, options(1, Precision::F32));
    resumed_equals_straight(|fields| fields.qk_norm = true, options(2, Precision::Bf16));
    resumed_equals_straight(kit::dense, options(1, Precision::Bf16));
}

#[test]
fn training_in_bf16_follows_training_in_f32() {
    for change in [|_: &mut nsa_core::model::ModelFields| {}, kit::dense] {
        let folder = tempfile::tempdir().unwrap();
        let train = |precision| {
            let options = TrainOptions { precision, steps: 60, warmup: Some(5), ..kit::options() };
            kit::steps(&mut kit::trainer(folder.path(), kit::config(change), options), 60)
        };
        let (single, half) = (train(Precision::F32), train(Precision::Bf16));
        // The losses that are parted from the first ones by learning, not by rounding.
        let (start, end) = (single[0], single[50..].iter().sum::<f64>() / 10.0);
        let end_half = half[50..].iter().sum::<f64>() / 10.0;
        assert!(end < 0.8 * start, "{start} {end}");
        assert!((half[0] / single[0] - 1.0).abs() < 1.0 / 256.0, "{} {}", half[0], single[0]);
        assert!((end_half - end).abs() < 0.02 * (start - end), "{start} to {end}, in bf16 to {end_half}");
        println!("{start:.4} to {end:.4}, in bf16 to {end_half:.4}");
    }
}

#[test]
fn runs_repeat_bit_for_bit_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let train = |threads: usize, precision: Precision| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            // Wide enough that work is divided among threads.
            let config = kit::config(|fields| (fields.hidden_size, fields.intermediate_size) = (96, 200));
            let options = TrainOptions { batch: 5, context: 64, precision, ..kit::options() };
            let mut trainer = kit::trainer(folder.path(), config, options);
            (kit::steps(&mut trainer, 3), kit::params(&trainer))
        })
    };
    for precision in [Precision::F32, Precision::Bf16] {
        let one = train(1, precision);
        (1..=3).for_each(|threads| assert_eq!(one, train(threads, precision)));
    }
}

#[test]
fn accumulated_batches_equal_one_large_one() {
    let folder = tempfile::tempdir().unwrap();
    let train = |batch, accumulate| {
        let options = TrainOptions { batch, accumulate, ..kit::options() };
        let mut trainer = kit::trainer(folder.path(), kit::config(|_| {}), options);
        let line = trainer.step().unwrap();
        assert_eq!((trainer.state().sequences, line.tokens), (4, 96));
        (line.loss, line.grad_norm)
    };
    let (loss, norm) = train(4, 1);
    for (batch, accumulate) in [(2, 2), (1, 4)] {
        let (other_loss, other_norm) = train(batch, accumulate);
        assert!((loss - other_loss).abs() < 1e-6 * loss, "{loss} {other_loss}");
        assert!((norm - other_norm).abs() < 1e-5 * norm, "{norm} {other_norm}");
    }
}

#[test]
fn clipping_bounds_what_the_optimizer_sees() {
    let folder = tempfile::tempdir().unwrap();
    // With a single step AdamW's update does not depend on the gradient's scale, but its moments do.
    let moment = |clip| {
        let options = TrainOptions { clip, ..kit::options() };
        let mut trainer = kit::trainer(folder.path(), kit::config(|_| {}), options);
        let norm = trainer.step().unwrap().grad_norm;
        let saved = trainer.save(&folder.path().join(format!("run{clip}"))).unwrap();
        let [m, _] = checkpoint::load(&saved).unwrap().moments;
        (norm, 10.0 * m.iter().map(|&m| f64::from(m) * f64::from(m)).sum::<f64>().sqrt())
    };
    let (norm, free) = moment(0.0);
    assert!((free - norm).abs() < 1e-4 * norm);
    let (same, clipped) = moment(norm / 2.0);
    assert_eq!(norm, same, "the norm is that before clipping");
    assert!((clipped - norm / 2.0).abs() < 1e-4 * norm);
}

#[test]
fn a_small_model_learns_a_short_text_by_heart() {
    for (name, change) in [("nsa", (|_| {}) as fn(&mut _)), ("dense", kit::dense)] {
        let folder = tempfile::tempdir().unwrap();
        let options =
            TrainOptions { steps: 150, lr: 1e-2, min_lr: 1e-3, warmup: Some(10), weight_decay: 0.0, ..kit::options() };
        let mut trainer = kit::trainer(folder.path(), kit::config(change), options);
        let losses = kit::steps(&mut trainer, 150);
        let end = losses[140..].iter().sum::<f64>() / 10.0;
        assert!(losses[0] > 5.4 && end < 0.75, "{name}: {} to {end}", losses[0]);
    }
}

#[test]
fn a_run_leaves_metrics_checkpoints_and_a_plot() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let options = TrainOptions { steps: 9, eval_every: 4, save_every: 2, keep: 3, ..kit::options() };
    let mut trainer = kit::trainer(folder.path(), kit::config(|_| {}), options);
    let mut saved = Vec::new();
    let outcome = run(&mut trainer, &out, &AtomicBool::new(false), &mut |event| {
        if let Event::Saved(path) = event {
            saved.push(path.to_owned());
        }
    })
    .unwrap();
    assert!(!outcome.interrupted);
    assert_eq!((outcome.step, outcome.steps_taken, saved.len()), (9, 9, 5));
    assert_eq!(&outcome.checkpoint, saved.last().unwrap());
    let kept: Vec<u64> = checkpoint::list(&out).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(kept, [6, 8, 9]);
    let lines = metrics::read(&out.join("metrics.jsonl")).unwrap();
    let validations: Vec<u64> =
        lines.iter().filter(|line| matches!(line, Line::Validation(_))).map(Line::step).collect();
    assert_eq!(validations, [4, 8, 9]);
    let steps: Vec<_> =
        lines.iter().filter_map(|line| if let Line::Step(step) = line { Some(step) } else { None }).collect();
    assert_eq!(steps.len(), 9);
    assert!(steps.iter().all(|line| 0.0 < line.phases.total() && line.phases.total() <= line.seconds));
    assert_eq!(steps[8].tokens, 9 * 48);
    let svg = std::fs::read_to_string(outcome.plot.unwrap()).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("step") && svg.contains("validation"), "{svg:.200}");
}

#[test]
fn a_stopped_run_goes_on_as_if_nothing_had_happened() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    let options = TrainOptions { eval_every: 2, ..kit::options() };
    let mut straight = kit::trainer(folder.path(), kit::config(|_| {}), options);
    run(&mut straight, &whole, &AtomicBool::new(false), &mut |_| {}).unwrap();

    let stop = AtomicBool::new(false);
    let mut first = kit::trainer(folder.path(), kit::config(|_| {}), options);
    let outcome = run(&mut first, &parts, &stop, &mut |event| {
        if matches!(event, Event::Step(line) if line.step == 3) {
            stop.store(true, Ordering::Relaxed);
        }
    })
    .unwrap();
    assert!(outcome.interrupted && outcome.step == 3);
    // Steps after the checkpoint, as a run that was killed would leave them, and half a line.
    first.step().unwrap();
    let metrics_path = parts.join("metrics.jsonl");
    let mut text = std::fs::read_to_string(&metrics_path).unwrap();
    let last = text.lines().last().unwrap().replace("\"step\":3", "\"step\":4");
    text += &format!("{last}\n{}", &last[..20]);
    std::fs::write(&metrics_path, text).unwrap();

    let loaded = checkpoint::load(&checkpoint::resolve(&parts).unwrap()).unwrap();
    let mut second = Trainer::resume(&kit::backend(), loaded, kit::data(folder.path(), 1)).unwrap();
    run(&mut second, &parts, &AtomicBool::new(false), &mut |_| {}).unwrap();
    assert_eq!(kit::params(&straight), kit::params(&second));
    let losses = |folder: &std::path::Path| -> Vec<(u64, f64)> {
        let lines = metrics::read(&folder.join("metrics.jsonl")).unwrap();
        lines
            .iter()
            .map(|line| match line {
                Line::Step(line) => (line.step, line.loss),
                Line::Validation(line) => (line.step, line.loss),
            })
            .collect()
    };
    assert_eq!(losses(&whole), losses(&parts));
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let good = TrainOptions { steps: 2, ..kit::options() };
    let mut trainer = kit::trainer(folder.path(), kit::config(|_| {}), good);
    let outcome = run(&mut trainer, &out, &AtomicBool::new(false), &mut |_| {}).unwrap();
    let mut loaded = checkpoint::load(&outcome.checkpoint).unwrap();
    loaded.state.options = TrainOptions { steps: 50, lr: 1e30, ..loaded.state.options };
    let mut trainer = Trainer::resume(&kit::backend(), loaded, kit::data(folder.path(), 1)).unwrap();
    let error = run(&mut trainer, &out, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("step 4") || error.contains("step 5"), "{error}");
    assert!(error.contains("step-00000002"), "{error}");
    checkpoint::load(&checkpoint::resolve(&out).unwrap()).unwrap();
}

/// Parameters that one step made useless are not saved in place of good ones, which a loss would show a step later.
#[test]
fn parameters_that_are_not_finite_are_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let good = TrainOptions { steps: 2, keep: 1, ..kit::options() };
    let mut trainer = kit::trainer(folder.path(), kit::config(|_| {}), good);
    let outcome = run(&mut trainer, &out, &AtomicBool::new(false), &mut |_| {}).unwrap();
    let mut loaded = checkpoint::load(&outcome.checkpoint).unwrap();
    loaded.state.options =
        TrainOptions { steps: 3, lr: 1e38, min_lr: 1e38, weight_decay: 1e38, ..loaded.state.options };
    let mut trainer = Trainer::resume(&kit::backend(), loaded, kit::data(folder.path(), 1)).unwrap();
    let error = run(&mut trainer, &out, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("step 3: the parameter is") && error.contains("step-00000002"), "{error}");
    assert_eq!(checkpoint::resolve(&out).unwrap(), outcome.checkpoint);
}

/// A validation that cannot be done costs nothing of what was trained.
#[test]
fn a_validation_that_fails_leaves_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let one = folder.path().join("one.txt");
    std::fs::write(&one, "x").unwrap();
    let mut state = kit::data(folder.path(), 1).state;
    state.validation_files = vec![one];
    let data = Data::open(state, &Tokenizer::bytes(), &folder.path().join("other"), 1).unwrap();
    let options = TrainOptions { steps: 2, ..kit::options() };
    let mut trainer = Trainer::new(&kit::backend(), kit::config(|_| {}), options, data, None).unwrap();
    let error = run(&mut trainer, &out, &AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("no token to predict"), "{error}");
    assert_eq!(checkpoint::load(&checkpoint::resolve(&out).unwrap()).unwrap().state.step, 2);
}

#[test]
fn evaluation_does_not_depend_on_how_windows_are_packed() {
    let folder = tempfile::tempdir().unwrap();
    let data = kit::data(folder.path(), 1);
    let text = data.train.clone();
    let mut trainer = Trainer::new(&kit::backend(), kit::config(|_| {}), kit::options(), data, None).unwrap();
    kit::steps(&mut trainer, 3);
    let Network::F32(Trained { model, .. }) = trainer.network() else { panic!("options ask for f32") };
    let eval = |tokens: usize, stride: usize, max_tokens: u64| {
        let mut workspace = Workspace::for_inference(model, Capacity { tokens, longest: 16 }).unwrap();
        evaluate(model, &mut workspace, &text, EvalOptions { context: 16, stride, max_tokens }).unwrap()
    };
    let (small, large) = (eval(16, 16, 0), eval(300, 16, 0));
    assert_eq!((small.tokens, small.documents), (large.tokens, large.documents));
    assert!((small.loss - large.loss).abs() < 1e-6 * large.loss);
    assert_eq!(small.tokens + small.first_tokens, text.section.num_tokens());
    assert_eq!(small.bytes, text.section.num_bytes());
    let bits = (small.loss * small.tokens as f64) / 2f64.ln() + 8.0 * small.documents as f64;
    assert!((small.bits_per_byte - bits / small.bytes as f64).abs() < 1e-12);
    assert_ne!(eval(300, 5, 0).loss, large.loss, "more context");
    assert_eq!(eval(300, 5, 0).tokens, large.tokens);
    assert_eq!(eval(300, 16, 70).tokens, 70);
    let mut workspace = Workspace::for_inference(model, Capacity { tokens: 64, longest: 16 }).unwrap();
    let options = EvalOptions { context: 17, stride: 17, max_tokens: 0 };
    assert!(evaluate(model, &mut workspace, &text, options).is_err());
}

#[test]
fn options_that_break_a_rule_are_errors() {
    let broken = [
        TrainOptions { batch: 0, ..kit::options() },
        TrainOptions { lr: f64::NAN, ..kit::options() },
        TrainOptions { min_lr: 1.0, ..kit::options() },
        TrainOptions { warmup: Some(7), ..kit::options() },
        TrainOptions { beta2: 1.0, ..kit::options() },
        TrainOptions { clip: -1.0, ..kit::options() },
        TrainOptions { batch: 1 << 20, context: 1 << 20, ..kit::options() },
    ];
    for options in broken {
        assert!(options.check().is_err(), "{options:?}");
    }
    kit::options().check().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = TrainOptions { context: 65, ..kit::options() };
    let result = Trainer::new(&kit::backend(), kit::config(|_| {}), options, kit::data(folder.path(), 1), None);
    assert!(result.unwrap_err().to_string().contains("max_position_embeddings = 64"));
}
