//! The command `nsa-train`.

use crate::kit;
use nsa_train::checkpoint;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nsa-train"));
    command.args(args).env_remove("RUST_LOG").env_remove("NSA_BACKEND");
    command
}

fn output(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn success(args: &[&str]) -> String {
    let output = output(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn failure(args: &[&str]) -> String {
    let output = output(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    text(&output.stderr)
}

/// Arguments of a run below `folder`.
fn train_args(folder: &Path) -> Vec<String> {
    let config = folder.join("config.json");
    fs::write(&config, serde_json::to_string(&kit::config(|_| {})).unwrap()).unwrap();
    let texts = folder.join("texts");
    fs::create_dir_all(&texts).unwrap();
    let mut args = vec!["train".to_owned(), "--model".to_owned(), config.display().to_string(), "--data".to_owned()];
    args.extend(kit::write_texts(&texts).iter().map(|file| file.display().to_string()));
    args.extend(["--out".to_owned(), folder.join("run").display().to_string()]);
    args.extend(["--batch", "2", "--context", "24", "--warmup", "2", "--threads", "1"].map(str::to_owned));
    args
}

fn refs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// Starts a long run and waits for its first checkpoint.
fn start(args: &[String]) -> Child {
    let mut child = command(&refs(args)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let seen = log.by_ref().map(Result::unwrap).find(|line| line.contains("saved"));
    assert!(seen.is_some(), "no checkpoint before the end");
    // The pipe must stay open for the rest of the log.
    std::thread::spawn(move || log.for_each(drop));
    child
}

fn signal(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

#[cfg(unix)]
#[test]
fn signals_save_and_exit_and_the_run_goes_on() {
    for name in ["-INT", "-TERM"] {
        let folder = tempfile::tempdir().unwrap();
        let mut args = train_args(folder.path());
        args.extend(["--steps", "1000000", "--save-every", "3", "--eval-every", "0"].map(str::to_owned));
        let child = start(&args);
        let run = folder.path().join("run").display().to_string();
        let second = output(&["train", "--resume", "--out", &run, "--threads", "1", "--steps", "1"]);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        // Looked at when the first one has ended, whatever the second did.
        let refused = text(&second.stderr);
        assert!(second.status.code() == Some(1) && refused.contains("another process trains here"), "{refused}");
        assert_eq!(output.status.code(), Some(130));
        let said = text(&output.stdout);
        assert!(said.contains("interrupted at step") && said.contains("saved"), "{said}");
        let run = folder.path().join("run");
        let newest = checkpoint::resolve(&run).unwrap();
        let state = checkpoint::load(&newest).unwrap().state;
        assert!(said.contains(&format!("interrupted at step {} of 1000000", state.step)), "{said}");

        let run = run.display().to_string();
        let steps = (state.step + 2).to_string();
        let said = success(&["train", "--resume", "--out", &run, "--steps", &steps, "--warmup", "1", "--threads", "1"]);
        assert!(said.contains(&format!("{steps} steps done")), "{said}");
    }
}

#[test]
fn training_evaluating_and_plotting() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = train_args(folder.path());
    let options = folder.path().join("options.json");
    fs::write(&options, r#"{"steps": 5, "lr": 0.5, "eval_tokens": 200}"#).unwrap();
    let options = options.display().to_string();
    args.extend(["--lr", "0.002", "--profile", "--options", &options].map(str::to_owned));
    let output = output(&refs(&args));
    let (said, logged) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{logged}");
    assert!(said.contains("bits/byte") && said.contains("5 steps done"), "{said}");
    assert!(logged.contains("attention_backward") && logged.contains("backend cpu"), "{logged}");
    let run = folder.path().join("run");
    let state = checkpoint::load(&checkpoint::resolve(&run).unwrap()).unwrap().state;
    assert_eq!((state.step, state.options.lr), (5, 0.002), "arguments replace the file's options");

    let run_name = run.display().to_string();
    let again = failure(&refs(&args));
    assert!(again.contains("--resume") && again.contains("step-00000005"), "{again}");
    let file = folder.path().join("texts/0.txt").display().to_string();
    let said = success(&["eval", "--checkpoint", &run_name, "--data", &file, "--context", "100"]);
    assert!(said.contains("bits per byte") && said.contains("1 documents, context 100"), "{said}");
    let json =
        success(&["eval", "--checkpoint", &run_name, "--data", &file, "--context", "20", "--stride", "7", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["bytes"].as_u64(), Some(fs::metadata(&file).unwrap().len()));

    let plot = folder.path().join("other.svg").display().to_string();
    success(&["plot", &run.join("metrics.jsonl").display().to_string(), "--output", &plot]);
    assert!(fs::read_to_string(plot).unwrap().starts_with("<svg"));
}

/// A tokenizer of a few words, `?` for any other.
fn write_tokenizer(folder: &Path) -> String {
    let words = ["?", "the", "sea", "is", "wide", "and", "cold", "a", "ship", "sails", "on", ","];
    let vocab: serde_json::Map<_, _> =
        words.iter().enumerate().map(|(id, word)| ((*word).to_owned(), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "?" },
    });
    let path = folder.join("words.json");
    fs::write(&path, tokenizer.to_string()).unwrap();
    path.display().to_string()
}

#[test]
fn a_tokenizer_travels_with_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = train_args(folder.path());
    let tokenizer = write_tokenizer(folder.path());
    args.extend(["--tokenizer", &tokenizer, "--steps", "3", "--context", "10", "--keep", "1"].map(str::to_owned));
    // The last of two values counts.
    let context = args.iter().position(|arg| arg == "--context").unwrap();
    args.drain(context..context + 2);
    success(&refs(&args));
    fs::remove_file(&tokenizer).unwrap();
    let run = folder.path().join("run");
    let newest = checkpoint::resolve(&run).unwrap();
    assert_eq!(checkpoint::load_config(&newest).unwrap().vocab_size(), 12);
    let run = run.display().to_string();
    success(&["train", "--resume", "--out", &run, "--steps", "5", "--save-every", "1", "--threads", "1"]);
    // A checkpoint goes on in itself, and its tokenizer stays.
    let last = folder.path().join("run/step-00000005");
    let file = last.join("tokenizer.json");
    let tokenizer = fs::read(&file).unwrap();
    success(&[
        "train",
        "--resume",
        &last.display().to_string(),
        "--out",
        &last.display().to_string(),
        "--threads",
        "1",
    ]);
    assert_eq!(fs::read(&file).unwrap(), tokenizer);
    fs::remove_dir_all(last.join("step-00000005")).unwrap();
    // A new run takes one that lies in its folder, but no other.
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    let copy = other.join("tokenizer.json");
    fs::write(&copy, &tokenizer).unwrap();
    let other_args = |tokenizer: &Path| {
        let mut args = train_args(folder.path());
        let out = args.iter().position(|arg| arg == "--out").unwrap() + 1;
        args[out] = other.display().to_string();
        args.extend(["--tokenizer".to_owned(), tokenizer.display().to_string(), "--steps".to_owned(), "2".to_owned()]);
        args
    };
    let written = write_tokenizer(folder.path());
    fs::write(&written, [&tokenizer[..], b"\n"].concat()).unwrap();
    let refused = failure(&refs(&other_args(Path::new(&written))));
    assert!(refused.contains("is another tokenizer than"), "{refused}");
    success(&refs(&other_args(&copy)));
    assert_eq!(fs::read(&copy).unwrap(), tokenizer);
    let file = folder.path().join("texts/1.txt").display().to_string();
    let json = success(&["eval", "--checkpoint", &run, "--data", &file, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    // Bytes are those of the text, tokens are words.
    let (bytes, tokens) = (json["bytes"].as_f64().unwrap(), json["tokens"].as_f64().unwrap());
    assert_eq!(bytes as u64, fs::metadata(&file).unwrap().len());
    assert!(tokens < bytes / 2.0);
    let bits = tokens * json["loss"].as_f64().unwrap() / 2f64.ln() + 12f64.log2();
    assert!((json["bits_per_byte"].as_f64().unwrap() - bits / bytes).abs() < 1e-9);
}

#[test]
fn inspecting_models() {
    let paper = success(&["plan", "--model", "paper-27b"]);
    assert!(
        paper.contains("27.") && paper.contains("cannot train it") && paper.contains("mixture of experts"),
        "{paper}"
    );
    let bench = success(&["plan", "--model", "bench-4m", "--batch", "4", "--context", "1024"]);
    assert!(bench.contains("3.54M") && bench.contains("can train it"), "{bench}");
    assert!(success(&["presets"]).contains("smollm-135m"));
    let config = success(&["config", "--model", "bench-4m", "--attention", "nsa"]);
    let config: nsa_core::model::ModelConfig = serde_json::from_str(&config).unwrap();
    assert!(config.nsa_config().is_some());
}

#[test]
fn mistakes_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = train_args(folder.path());
    let error = failure(&["plan", "--model", "giant"]);
    assert!(error.contains("giant") && error.contains("bench-4m"), "{error}");
    args.extend(["--beta1", "1.5"].map(str::to_owned));
    let error = failure(&refs(&args));
    assert!(error.contains("beta1") && error.contains("1.5"), "{error}");
    let empty = folder.path().join("nothing").display().to_string();
    let error = failure(&["train", "--resume", "--out", &empty]);
    assert!(error.contains("nothing"), "{error}");
    let mut short = train_args(folder.path());
    short.extend(["--steps", "2"].map(str::to_owned));
    success(&refs(&short));
    let run = folder.path().join("run").display().to_string();
    let error = failure(&["train", "--resume", "--out", &run, "--seed", "7"]);
    assert!(error.contains("--seed") && error.contains("checkpoint's 1"), "{error}");
    let error = failure(&["train", "--resume", "--out", &run, "--val-data", &run]);
    assert!(error.contains("--val-data"), "{error}");
    let mut args = train_args(folder.path());
    args.extend(["--backend", "abacus"].map(str::to_owned));
    let error = failure(&refs(&args));
    assert!(error.contains("abacus"), "{error}");
}

/// The message for arguments that the parser refuses.
fn refused(args: &[&str]) -> String {
    let output = output(args);
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    text(&output.stderr)
}

#[test]
fn negative_numbers_are_values() {
    let folder = tempfile::tempdir().unwrap();
    let args = train_args(folder.path());
    let with = |option| [&refs(&args)[..], &[option, "-1"]].concat();
    for (option, expected) in [
        ("--lr", "`lr` = -1: must be positive and finite"),
        ("--min-lr", "`min-lr` = -1: must be finite and not negative"),
        ("--clip", "`clip` = -1: must be finite and not negative"),
        ("--weight-decay", "`weight-decay` = -1: must be finite and not negative"),
        ("--beta2", "`beta2` = -1: must be at least 0 and below 1"),
        ("--eps", "`eps` = -1: must be positive and finite"),
        ("--val-fraction", "`val-fraction` = -1: must be at least 0 and below 1"),
    ] {
        let error = failure(&with(option));
        assert!(error.contains(expected), "{option}: {error}");
    }
    // clap does not take an option twice, so those of `train_args` stay out.
    for option in ["--steps", "--accumulate", "--seed", "--eval-every", "--eval-tokens", "--save-every", "--keep"] {
        let error = refused(&with(option));
        assert!(error.contains(&format!("invalid value '-1' for '{option}")), "{option}: {error}");
    }
    let error = refused(&["train", "--model", "tiny-1m", "--data", "a", "--out", "b", "--warmup", "-1"]);
    assert!(error.contains("invalid value '-1' for '--warmup"), "{error}");
    for option in ["--context", "--stride", "--max-tokens", "--threads"] {
        let error = refused(&["eval", "--checkpoint", "a", "--data", "b", option, "-1"]);
        assert!(error.contains(&format!("invalid value '-1' for '{option}")), "{option}: {error}");
    }
    for option in ["--batch", "--context"] {
        let error = refused(&["plan", "--model", "tiny-1m", option, "-1"]);
        assert!(error.contains(&format!("invalid value '-1' for '{option}")), "{option}: {error}");
    }
}

/// Takes an option and its value out.
fn without(args: &mut Vec<String>, option: &str) {
    let at = args.iter().position(|arg| arg == option).unwrap();
    args.drain(at..at + 2);
}

#[test]
fn a_warm_up_that_is_not_given_fits_the_steps() {
    let warmup = |change: &dyn Fn(&Path, &mut Vec<String>)| {
        let folder = tempfile::tempdir().unwrap();
        let mut args = train_args(folder.path());
        without(&mut args, "--warmup");
        change(folder.path(), &mut args);
        success(&refs(&args));
        let run = folder.path().join("run");
        let state = checkpoint::load(&checkpoint::resolve(&run).unwrap()).unwrap().state;
        (state.options.warmup, folder)
    };
    let add = |args: &mut Vec<String>, more: &[&str]| args.extend(more.iter().map(|&arg| arg.to_owned()));
    let (short, folder) = warmup(&|_, args| add(args, &["--steps", "20"]));
    assert_eq!(short, Some(2));
    let from_file = |json: &'static str| {
        warmup(&|folder, args| {
            let path = folder.join("options.json");
            fs::write(&path, json).unwrap();
            add(args, &["--options", &path.display().to_string()]);
        })
        .0
    };
    assert_eq!((from_file(r#"{"steps": 12}"#), from_file(r#"{"steps": 12, "warmup": 7}"#)), (Some(1), Some(7)));

    // What a checkpoint records stays as it is, whatever the steps become.
    let run = folder.path().join("run").display().to_string();
    success(&["train", "--resume", "--out", &run, "--steps", "60", "--threads", "1"]);
    let state = checkpoint::load(&checkpoint::resolve(Path::new(&run)).unwrap()).unwrap().state;
    assert_eq!((state.step, state.options.warmup), (60, Some(2)));
    let mut args = train_args(folder.path());
    without(&mut args, "--out");
    let other = folder.path().join("other").display().to_string();
    add(&mut args, &["--steps", "1", "--out", &other]);
    let error = failure(&refs(&args));
    assert!(error.contains("`warmup` = 2: must be at most steps = 1"), "{error}");
}

#[test]
fn a_checkpoint_beyond_the_last_step_is_not_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = train_args(folder.path());
    args.extend(["--steps", "4"].map(str::to_owned));
    success(&refs(&args));
    let run = folder.path().join("run");
    let run_name = run.display().to_string();
    let state_file = run.join("step-00000004").join(checkpoint::STATE_FILE);
    let written = || fs::metadata(&state_file).unwrap().modified().unwrap();
    let before = written();
    for steps in ["3", "1"] {
        let error = failure(&["train", "--resume", "--out", &run_name, "--steps", steps]);
        let expected = format!("`steps` = {steps}: must be at least 4, the step of ");
        assert!(error.contains(&expected) && error.contains("step-00000004"), "{error}");
    }
    assert_eq!(written(), before, "nothing is saved again");
    // A run that is complete is no error.
    let done = output(&["train", "--resume", "--out", &run_name]);
    assert!(done.status.success() && text(&done.stderr).contains("all 4 steps are done"), "{}", text(&done.stderr));
}

#[test]
fn text_without_pairs_of_tokens_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = train_args(folder.path());
    fs::write(folder.path().join("letters.txt"), "a\nb\nc\nd\ne\nf\ng\nh\n").unwrap();
    let texts = args.iter().position(|arg| arg == "--data").unwrap() + 1;
    let end = args.iter().position(|arg| arg == "--out").unwrap();
    args.splice(texts..end, [folder.path().join("letters.txt").display().to_string()]);
    without(&mut args, "--context");
    args.extend(["--context", "3", "--document-separator", "\\n", "--steps", "3"].map(str::to_owned));
    let error = failure(&refs(&args));
    assert!(error.contains("leaves no token to predict in step 1"), "{error}");
}

#[test]
fn a_run_goes_on_from_its_newest_checkpoint_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = train_args(folder.path());
    args.extend(["--steps", "4", "--save-every", "2"].map(str::to_owned));
    success(&refs(&args));
    let run = folder.path().join("run");
    let older = run.join("step-00000002").display().to_string();
    let error = failure(&["train", "--resume", &older, "--out", &run.display().to_string(), "--steps", "6"]);
    assert!(error.contains("step-00000004 is newer than") && error.contains("another --out"), "{error}");
    let other = folder.path().join("other").display().to_string();
    success(&["train", "--resume", &older, "--out", &other, "--steps", "5", "--threads", "1"]);
}

#[test]
fn a_plan_refuses_what_training_refuses() {
    for (option, value, expected) in [
        ("--batch", "9999999999999999", "`batch` = 9999999999999999: times context = 1024 must fit an i32"),
        ("--batch", "0", "`batch` = 0: must not be zero"),
        ("--context", "99999999999999", "`batch` = 1: times context = 99999999999999 must fit an i32"),
        ("--context", "1025", "`context` = 1025: must be at most the model's max_position_embeddings = 1024"),
    ] {
        let error = failure(&["plan", "--model", "tiny-1m", option, value]);
        assert!(error.contains(expected), "{error}");
        let folder = tempfile::tempdir().unwrap();
        let mut train = train_args(folder.path());
        let other = if option == "--batch" { ("--context", "1024") } else { ("--batch", "1") };
        for (option, value) in [(option, value), other, ("--model", "tiny-1m")] {
            without(&mut train, option);
            train.extend([option, value].map(str::to_owned));
        }
        let error = failure(&refs(&train));
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn files_that_are_cut_off_or_no_objects_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = train_args(folder.path());
    args.extend(["--steps", "2"].map(str::to_owned));
    success(&refs(&args));
    let run = folder.path().join("run");
    let state_file = run.join("step-00000002").join(checkpoint::STATE_FILE);
    let state = fs::read_to_string(&state_file).unwrap();
    let resume = |content: &str| {
        fs::write(&state_file, content).unwrap();
        failure(&["train", "--resume", "--out", &run.display().to_string()])
    };
    for end in [0, 1, 20, state.len() / 2, state.len() - 2] {
        let error = resume(&state[..end]);
        assert!(error.contains("state.json: ends early, at line ") && !error.contains('`'), "{end}: {error}");
    }
    let error = resume("[1, 2]");
    assert!(error.contains("state.json: invalid type: sequence, expected an object"), "{error}");
    let mut json: serde_json::Value = serde_json::from_str(&state).unwrap();
    for field in ["options", "data"] {
        let whole = std::mem::replace(&mut json[field], serde_json::json!([1]));
        let error = resume(&json.to_string());
        assert!(error.contains(&format!("`{field}`: invalid type: sequence, expected an object")), "{error}");
        json[field] = whole;
    }
    let options = folder.path().join("options.json");
    fs::write(&options, "[50, 2, 24]").unwrap();
    let mut args = train_args(folder.path());
    args.extend(["--options".to_owned(), options.display().to_string()]);
    without(&mut args, "--out");
    args.extend(["--out".to_owned(), folder.path().join("other").display().to_string()]);
    let error = failure(&refs(&args));
    assert!(error.contains("options.json: invalid type: sequence, expected an object"), "{error}");
}

#[test]
fn evaluation_needs_a_context_and_finite_logits_and_a_plot_steps() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = train_args(folder.path());
    args.extend(["--steps", "2"].map(str::to_owned));
    success(&refs(&args));
    let run = folder.path().join("run").display().to_string();
    let file = folder.path().join("texts/0.txt").display().to_string();
    let error = failure(&["eval", "--checkpoint", &run, "--data", &file, "--context", "0"]);
    assert!(error.contains("`context` = 0: must not be zero"), "{error}");
    let weights = folder.path().join("run/step-00000002/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_chunk_mut().unwrap() = f32::NAN.to_le_bytes();
    fs::write(&weights, bytes).unwrap();
    let error = failure(&["eval", "--checkpoint", &run, "--data", &file, "--json"]);
    assert!(error.contains("step-00000002: the loss is NaN: its logits are not finite"), "{error}");
    let empty = folder.path().join("empty.jsonl");
    fs::write(&empty, "").unwrap();
    let error = failure(&["plot", &empty.display().to_string()]);
    assert!(error.contains("empty.jsonl: holds no step to draw") && !error.contains("loss.svg"), "{error}");
}

#[test]
fn a_reason_is_said_once() {
    let folder = tempfile::tempdir().unwrap();
    let [missing, other] = ["missing", "other"].map(|name| folder.path().join(name).display().to_string());
    let args = train_args(folder.path());
    let data = [&refs(&args)[..], &["--val-data", &missing]].concat();
    let options = [&refs(&args)[..], &["--options", &missing]].concat();
    for args in [
        &["plot", &missing][..],
        &["plan", "--model", &missing],
        &["eval", "--checkpoint", &missing, "--data", &missing],
        &["train", "--resume", &missing, "--out", &other],
        &["config", "--model", "tiny-1m", "--output", &format!("{missing}/config.json")],
        &data,
        &options,
    ] {
        let error = failure(args);
        assert_eq!(error.matches("No such file").count(), 1, "{args:?}: {error}");
        assert!(error.contains("missing"), "{error}");
    }
    fs::write(&missing, "").unwrap();
    let mut args = train_args(folder.path());
    without(&mut args, "--out");
    args.extend(["--steps".to_owned(), "1".to_owned(), "--out".to_owned(), format!("{missing}/run")]);
    let error = failure(&refs(&args));
    assert_eq!(error.matches("Not a directory").count(), 1, "{error}");
}

#[test]
fn a_number_of_threads_that_is_none_is_refused() {
    for value in ["abc", "-1", "1.5"] {
        let output = command(&["presets"]).env("RAYON_NUM_THREADS", value).output().unwrap();
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        let expected =
            format!("error: environment variable RAYON_NUM_THREADS = `{value}`: must be a positive whole number");
        assert!(error.contains(&expected), "{error}");
    }
    for value in ["", "0", "1"] {
        assert!(command(&["presets"]).env("RAYON_NUM_THREADS", value).status().unwrap().success(), "{value}");
    }
}
