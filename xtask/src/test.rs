//! `cargo xtask test`: format, lints, tests, documentation; the first failure ends it. What CI calls.

use crate::files;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Options of `cargo xtask test`.
#[derive(Args, Debug)]
pub struct Options {
    /// Every operation on GPU 0 against the reference too
    #[arg(long)]
    gpu: bool,
}

/// One command of the run. All build with `--release`: dependencies are compiled once.
struct Step {
    name: &'static str,
    cargo: Vec<&'static str>,
    env: Option<(&'static str, &'static str)>,
}

fn step(name: &'static str, cargo: &[&'static str]) -> Step {
    Step { name, cargo: cargo.to_vec(), env: None }
}

/// Runs the command.
///
/// # Errors
/// Names the first step that failed.
pub fn run(options: &Options) -> Result<()> {
    let nextest = has_nextest();
    if !nextest {
        println!("cargo-nextest is not installed: `cargo test` runs the tests");
    }
    let start = Instant::now();
    let mut steps = steps(nextest);
    if options.gpu {
        let check = ["run", "--release", "--locked", "--package", "xtask", "--", "check", "--backend", "cuda"];
        steps.push(step("operations on the GPU", &[&check[..], &["--device", "0"]].concat()));
    }
    for (at, step) in steps.iter().enumerate() {
        println!("\n=== {}/{}: {} (cargo {})", at + 1, steps.len(), step.name, step.cargo.join(" "));
        run_step(step)?;
    }
    println!("\n{} steps passed in {:.0} s", steps.len(), start.elapsed().as_secs_f64());
    Ok(())
}

fn steps(nextest: bool) -> Vec<Step> {
    let runner: &[&str] = if nextest { &["nextest", "run"] } else { &["test"] };
    let tests = |rest: &[&'static str]| [runner, &["--release", "--locked"], rest].concat();
    let clippy = |rest: &[&'static str]| {
        [&["clippy", "--release", "--locked", "--all-targets"], rest, &["--", "-D", "warnings"]].concat()
    };
    let docs = ["doc", "--release", "--locked", "--workspace", "--no-deps"];
    vec![
        step("format", &["fmt", "--all", "--check"]),
        step("lints", &clippy(&["--workspace"])),
        step("tests", &tests(&["--workspace", "--lib", "--bins", "--tests", "--examples"])),
        step("documentation's examples", &["test", "--release", "--locked", "--workspace", "--doc"]),
        Step { env: Some(("RUSTDOCFLAGS", "-D warnings")), ..step("documentation", &docs) },
        step("lints of the candle feature", &clippy(&["--package", "nsa-kernels", "--features", "candle"])),
        step(
            "tests of the candle feature",
            &tests(&["--package", "nsa-kernels", "--features", "candle", "--test", "candle"]),
        ),
    ]
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(files::root());
    command
}

fn has_nextest() -> bool {
    let mut command = cargo();
    command.args(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn run_step(step: &Step) -> Result<()> {
    let mut command = cargo();
    command.args(&step.cargo);
    if let Some((name, value)) = step.env {
        command.env(name, value);
    }
    let status = command.status().with_context(|| format!("cannot start cargo for {}", step.name))?;
    if !status.success() {
        bail!("{} failed ({status}): cargo {}", step.name, step.cargo.join(" "));
    }
    Ok(())
}
