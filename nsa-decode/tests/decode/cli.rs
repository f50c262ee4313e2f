//! The binary, from outside.

use crate::kit::{Checkpoint, small};
use nsa_core::CompressKind;
use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};

fn command(checkpoint: &Checkpoint, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nsa-decode"));
    command.arg(arguments[0]).arg("--model").arg(checkpoint.path()).args(&arguments[1..]);
    command.env_remove("NSA_BACKEND").env_remove("RUST_LOG");
    command
}

fn run(checkpoint: &Checkpoint, arguments: &[&str]) -> Output {
    command(checkpoint, arguments).stdin(Stdio::null()).output().unwrap()
}

fn texts(output: &Output) -> (String, String) {
    (String::from_utf8(output.stdout.clone()).unwrap(), String::from_utf8(output.stderr.clone()).unwrap())
}

#[test]
fn one_prompt_streams_and_reports() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mlp), 80);
    let arguments = ["generate", "--prompt", "Hello", "--max-tokens", "40", "--seed", "3", "--threads", "1"];
    let output = run(&checkpoint, &arguments);
    let (text, report) = texts(&output);
    assert!(output.status.success(), "{report}");
    assert!(!text.trim().is_empty());
    for line in
        ["prefill  5 tokens in", "decode   40 tokens in", "cache    ", "rows     ", "ended    prompt 1: as many"]
    {
        assert!(report.contains(line), "{line}: {report}");
    }
    // Again, quietly, from standard input and in small chunks.
    let arguments = ["generate", "--max-tokens", "40", "--seed", "3", "--chunk", "2", "--quiet", "--backend", "cpu"];
    let mut child = command(&checkpoint, &arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"Hello").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(texts(&output), (text, String::new()));
}

#[test]
fn bf16_is_asked_for() {
    let checkpoint = Checkpoint::new(small(CompressKind::Weighted), 84);
    let arguments = ["generate", "--prompt", "Hello", "--max-tokens", "20", "--precision"];
    let of = |precision: &str| texts(&run(&checkpoint, &[&arguments[..], &[precision]].concat())).1;
    let cache = |report: &str| -> u64 {
        let line = report.lines().find(|line| line.starts_with("cache")).expect(report);
        line.split(['(', ' ']).find_map(|word| word.parse().ok().filter(|&bytes| bytes > 999)).expect(line)
    };
    let (wide, narrow, other) = (of("f32"), of("bf16"), of("f8"));
    assert!(wide.contains("backend  cpu:") && wide.contains(", f32"), "{wide}");
    assert!(narrow.contains(", bf16") && cache(&wide) == 2 * cache(&narrow), "{narrow}");
    assert!(other.contains("`f8` is no precision: must be f32 or bf16"), "{other}");
    let (info, _) = texts(&run(&checkpoint, &["info", "--precision", "bf16"]));
    assert!(info.lines().any(|line| line.starts_with("cache a token") && line.ends_with("(bf16)")), "{info}");
}

#[test]
fn several_prompts_are_printed_whole() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mean), 81);
    let file = checkpoint.path().join("prompt.txt");
    std::fs::write(&file, "from a file").unwrap();
    let path = file.to_str().unwrap();
    let arguments = ["generate", "--prompt", "a", "--prompt", "bc", "--prompt-file", path, "--max-tokens", "8"];
    let (text, report) = texts(&run(&checkpoint, &arguments));
    let headings: Vec<&str> = text.lines().filter(|line| line.starts_with("--- prompt ")).collect();
    assert_eq!(headings, ["--- prompt 1 ---", "--- prompt 2 ---", "--- prompt 3 ---"]);
    assert!(report.contains("prefill  14 tokens") && report.contains("decode   24 tokens"), "{report}");
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mean), 82);
    let arguments = ["generate", "--prompt", "a", "--max-tokens", "400", "--quiet"];
    let mut child = command(&checkpoint, &arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 1]).unwrap();
    drop(out);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[test]
fn failures_say_what_and_are_not_zero() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mean), 83);
    for (arguments, expected) in [
        (vec!["generate", "--prompt", ""], "error: prompt 1: the sequence is empty"),
        (vec!["generate", "--prompt", "a", "--top-p", "2"], "error: prompt 1: sampling parameter `top_p` = 2: must be"),
        (vec!["generate", "--prompt", "a", "--backend", "tpu"], "error: backend `tpu` is not available"),
        (vec!["generate", "--prompt-file", "no/such/file"], "error: no/such/file: No such file"),
        (vec!["generate", "--prompt", "a", "--chunk", "0"], "error: `chunk` = 0: must be at least 1"),
    ] {
        let output = run(&checkpoint, &arguments);
        let (text, report) = texts(&output);
        assert_eq!((output.status.code(), text.as_str()), (Some(1), ""));
        assert!(report.starts_with(expected), "{report}");
    }
    std::fs::write(checkpoint.path().join("model.safetensors"), b"none").unwrap();
    let (_, report) = texts(&run(&checkpoint, &["info"]));
    assert!(report.contains("model.safetensors: no complete safetensors file"), "{report}");
    std::fs::remove_file(checkpoint.path().join("config.json")).unwrap();
    let (_, report) = texts(&run(&checkpoint, &["info"]));
    assert!(report.contains("config.json: cannot be read"), "{report}");
    assert_eq!(report.matches("No such file").count(), 1, "{report}");
}

#[test]
fn info_says_what_is_in_a_model() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mlp), 84);
    let output = run(&checkpoint, &["info", "--context", "100", "--context", "512"]);
    let (text, report) = texts(&output);
    assert!(output.status.success(), "{report}");
    let parameters: usize = checkpoint.tensors.values().map(|tensor| tensor.data.len()).sum();
    for line in [
        "\"compress_kind\": \"mlp\"".to_owned(),
        format!("parameters     {parameters}"),
        format!("  in f32       {parameters}"),
        "context 100".to_owned(),
        // M(512) + n·l' + w = 127 + 64 + 12.
        "  rows a step  203 of K and V a layer, full attention 512".to_owned(),
    ] {
        assert!(text.contains(&line), "{line}: {text}");
    }
}

#[test]
fn a_prompt_may_fill_the_context() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mean), 85);
    let prompt = "a".repeat(512);
    let (text, report) = texts(&run(&checkpoint, &["generate", "--prompt", &prompt, "--max-tokens", "1"]));
    assert!(!text.trim_end_matches('\n').is_empty() && report.contains("decode   1 tokens"), "{report}");
    let output = run(&checkpoint, &["generate", "--prompt", &format!("{prompt}a"), "--max-tokens", "1"]);
    let (_, report) = texts(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(report.contains("prompt 1: 513 tokens: max_position_embeddings = 512"), "{report}");
}

#[test]
fn negative_numbers_are_values() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mean), 86);
    // Rules of the sampler, then numbers that the argument cannot have.
    for (option, expected, code) in [
        ("--temperature", "sampling parameter `temperature` = -1: must be", 1),
        ("--top-p", "sampling parameter `top_p` = -1: must be", 1),
        ("--min-p", "sampling parameter `min_p` = -1: must be", 1),
        ("--repetition-penalty", "sampling parameter `repetition_penalty` = -1: must be", 1),
        ("--max-tokens", "invalid value '-1' for '--max-tokens", 2),
        ("--seed", "invalid value '-1' for '--seed", 2),
        ("--top-k", "invalid value '-1' for '--top-k", 2),
        ("--chunk", "invalid value '-1' for '--chunk", 2),
        ("--threads", "invalid value '-1' for '--threads", 2),
    ] {
        let output = run(&checkpoint, &["generate", "--prompt", "a", option, "-1"]);
        let (_, report) = texts(&output);
        assert_eq!(output.status.code(), Some(code), "{report}");
        assert!(report.contains(expected), "{option}: {report}");
    }
}

#[test]
fn a_number_of_threads_that_is_none_is_refused() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mean), 87);
    let output = command(&checkpoint, &["info"]).env("RAYON_NUM_THREADS", "abc").output().unwrap();
    let (_, report) = texts(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        report.starts_with("error: environment variable RAYON_NUM_THREADS = `abc`: must be a positive"),
        "{report}"
    );
}
