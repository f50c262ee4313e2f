//! `cargo xtask demo`: the main job on a fresh machine. Fetches text, trains a small NSA language model on it, measures it
//! beside gzip and xz, generates from it with its cache, and times NSA against full attention.

mod baseline;
mod text;

use crate::machine::Machine;
use crate::{bench, files};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Options of `cargo xtask demo`.
#[derive(Args, Debug)]
pub struct Options {
    /// UTF-8 files to train on, instead of fetching Shakespeare's works
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Training steps, instead of those of configs/demo-run.json
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    steps: Option<u64>,
    /// What the model continues
    #[arg(long, value_name = "TEXT", default_value = "ROMEO.\n")]
    prompt: String,
}

/// Of one text in so many, all is held out; of a single text, this part of its end.
const HELD_OUT_SHARE: usize = 14;

/// Runs the command.
///
/// # Errors
/// If text cannot be had, a command fails, or the model does not beat gzip.
pub fn run(options: &Options) -> Result<()> {
    let start = Instant::now();
    println!("{}", Machine::here().line());
    let out = files::out(None, "demo")?;
    let texts = match options.text.as_slice() {
        [] => text::shakespeare(&out)?,
        // The commands below run in the repository, wherever this one was started.
        given => given.iter().map(std::path::absolute).collect::<std::io::Result<_>>()?,
    };
    let (training, held_out) = split(&texts, &out)?;
    let run = out.join("run");
    train(options, &training, &held_out, &run)?;
    generate(&options.prompt, &run)?;
    println!("\n=== NSA against full attention on this machine");
    bench::run(&bench::Options::short(out.join("bench")))?;
    report(&run, &held_out, start)
}

/// Training files and one file with the held-out text, which `gzip` and `xz` get too.
fn split(texts: &[PathBuf], out: &Path) -> Result<(Vec<PathBuf>, PathBuf)> {
    let held_out = out.join("held-out.txt");
    let read = |path: &PathBuf| {
        String::from_utf8(files::read(path)?).with_context(|| format!("{} is not UTF-8", path.display()))
    };
    if let [single] = texts {
        let text = read(single)?;
        let mut cut = text.len() - text.len() / HELD_OUT_SHARE;
        while !text.is_char_boundary(cut) {
            cut -= 1;
        }
        ensure!(cut < text.len(), "{} has {} bytes: too little to hold some out", single.display(), text.len());
        let training = out.join("training.txt");
        files::write_atomic(&training, &text.as_bytes()[..cut])?;
        files::write_atomic(&held_out, &text.as_bytes()[cut..])?;
        return Ok((vec![training], held_out));
    }
    // Spread over the list; of a short list the last.
    let first = (HELD_OUT_SHARE / 2).min(texts.len() - 1);
    let is_held_out = |i: usize| i % HELD_OUT_SHARE == first;
    let mut training = Vec::new();
    let mut text = String::new();
    for (i, path) in texts.iter().enumerate() {
        if is_held_out(i) {
            text.push_str(&read(path)?);
        } else {
            training.push(path.clone());
        }
    }
    files::write_atomic(&held_out, text.as_bytes())?;
    Ok((training, held_out))
}

/// Runs a binary of the workspace.
fn cargo_run(package: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["run", "--quiet", "--release", "--locked", "--package", package, "--"]);
    command.current_dir(files::root());
    command
}

fn status(mut command: Command, what: &str) -> Result<()> {
    let status = command.status().with_context(|| format!("{what}: cannot start cargo"))?;
    if !status.success() {
        bail!("{what} failed ({status})");
    }
    Ok(())
}

fn train(options: &Options, training: &[PathBuf], held_out: &Path, run: &Path) -> Result<()> {
    println!("\n=== training on {} texts", training.len());
    if run.exists() {
        std::fs::remove_dir_all(run).with_context(|| format!("cannot remove the earlier {}", run.display()))?;
    }
    let mut command = cargo_run("nsa-train");
    let configs = files::root().join("configs");
    command.arg("train").arg("--model").arg(configs.join("demo.json"));
    command.arg("--options").arg(configs.join("demo-run.json"));
    command.arg("--out").arg(run).arg("--data").args(training).arg("--val-data").arg(held_out);
    if let Some(steps) = options.steps {
        command.args(["--steps", &steps.to_string()]);
        // A short run has a short warm-up.
        command.args(["--warmup", &(steps / 10).to_string()]);
    }
    status(command, "training")
}

fn generate(prompt: &str, run: &Path) -> Result<()> {
    println!("\n=== generating from the last checkpoint, with its cache");
    let mut command = cargo_run("nsa-decode");
    let sampling = ["--max-tokens", "600", "--temperature", "0.8", "--top-p", "0.95", "--seed", "1"];
    command.arg("generate").arg("--model").arg(newest(run)?).args(["--prompt", prompt]).args(sampling);
    status(command, "generation")
}

/// The last checkpoint of a run: folders are named by step, with leading zeros.
fn newest(run: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(run).with_context(|| format!("cannot read {}", run.display()))?;
    let names = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_step = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-"));
    names.filter(is_step).max().with_context(|| format!("{} holds no checkpoint", run.display()))
}

#[derive(Deserialize)]
struct Evaluation {
    bits_per_byte: f64,
    bytes: u64,
}

/// Bits per byte of the model on all held-out text, beside those of the compressors.
fn report(run: &Path, held_out: &Path, start: Instant) -> Result<()> {
    println!("\n=== held-out text");
    let mut command = cargo_run("nsa-train");
    command.arg("eval").arg("--checkpoint").arg(run).arg("--data").arg(held_out).arg("--json");
    let output = command.stderr(Stdio::inherit()).output().context("evaluation: cannot start cargo")?;
    ensure!(output.status.success(), "evaluation failed ({})", output.status);
    let evaluation: Evaluation = serde_json::from_slice(&output.stdout).context("figures of the evaluation")?;
    let text = files::read(held_out)?;
    let (gzip, xz) = (baseline::gzip(&text)?, baseline::xz(&text)?);
    println!("{} bytes of held-out text, bits per byte:", evaluation.bytes);
    println!("  model    {:.3}", evaluation.bits_per_byte);
    println!("  gzip -9  {gzip:.3}");
    println!("  xz -9    {xz:.3}");
    let plot = run.join("loss.svg");
    println!("loss curve {}", plot.display());
    println!("checkpoint {}", run.display());
    println!("the whole took {:.0} s after the build of this command", start.elapsed().as_secs_f64());
    ensure!(evaluation.bits_per_byte < gzip, "the model does not beat gzip: train it for longer (--steps)");
    println!("the model beats gzip by {:.0} %", 100.0 * (1.0 - evaluation.bits_per_byte / gzip));
    Ok(())
}
