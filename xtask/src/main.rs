//! The one door: what people and CI run in this repository.
#![forbid(unsafe_code)]

mod attend;
mod bench;
mod check;
mod demo;
mod dtype;
mod engine;
mod files;
mod info;
mod kernels;
mod machine;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};
use nsa_kernels::backend::check_threads_variable;
use std::process::ExitCode;

/// What a shell says of a program that SIGPIPE ends: not success, since a check may not have come to its end.
const CLOSED_PIPE: i32 = 141;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Native Sparse Attention: the one door", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The main job: train a small model on real text, generate from it, compare
    Demo(demo::Options),
    /// Format, lints, tests, documentation: what CI calls
    Test(test::Options),
    /// Every operation on every case against the reference, with the table of worst errors
    Check(check::Options),
    /// The CUDA kernels compiled ahead, and what they take against their budgets
    Kernels(kernels::Options),
    /// NSA against full attention, ours and a peer's, in one run
    Bench(Box<bench::Options>),
    /// Run the operator on files: safetensors in, safetensors out
    Attend(attend::Options),
    /// What this machine has, which backend would run and why
    Info,
}

fn main() -> ExitCode {
    end_quietly_on_a_closed_pipe();
    match run(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whoever read the output has seen enough (`cargo xtask info | head -1`): no panic is printed. Pipes to children stay errors.
fn end_quietly_on_a_closed_pipe() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<String>().map_or("", String::as_str);
        // What `println!` panics with.
        if text.starts_with("failed printing to stdout") && text.contains("Broken pipe") {
            std::process::exit(CLOSED_PIPE);
        }
        before(info);
    }));
}

fn run(command: &Command) -> Result<()> {
    check_threads_variable()?;
    match command {
        Command::Demo(options) => demo::run(options),
        Command::Test(options) => test::run(options),
        Command::Check(options) => check::run(options),
        Command::Kernels(options) => kernels::run(options),
        Command::Bench(options) => bench::run(options),
        Command::Attend(options) => attend::run(options),
        Command::Info => info::run(),
    }
}
