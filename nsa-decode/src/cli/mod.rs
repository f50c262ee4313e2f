//! The command line.

mod generate;
mod info;

use anyhow::Context;
use clap::{Parser, Subcommand};
use nsa_decode::{Backend, Model, ModelOptions, Precision};
use nsa_kernels::backend::{MOST_THREADS, check_threads_variable};
use std::path::PathBuf;
use tracing_subscriber::EnvFilter;

/// Generates text with Native Sparse Attention models.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue prompts: text to stdout as it comes, figures to stderr.
    Generate(generate::GenerateArgs),
    /// Print a model's configuration, parameters and cache sizes.
    Info(info::InfoArgs),
}

/// Which model, and what runs it.
#[derive(Debug, clap::Args)]
struct ModelArgs {
    /// Folder with config.json and model.safetensors, as nsa-train writes it.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Backend to compute on: `cpu`, `cpu:avx2` and other instruction sets, `cuda` or `cuda:N` for an NVIDIA GPU, to which
    /// weights are copied [default: the variable NSA_BACKEND, else the processor's best].
    #[arg(long)]
    backend: Option<String>,
    /// Type of activations and caches: f32 or bf16, which also rounds matrices in f32.
    #[arg(long, default_value_t = Precision::F32)]
    precision: Precision,
    /// Threads to compute with [default: RAYON_NUM_THREADS, else one a core].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=MOST_THREADS as i64), allow_negative_numbers = true)]
    threads: Option<u16>,
}

impl ModelArgs {
    fn open(&self) -> anyhow::Result<Model> {
        if let Some(threads) = self.threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(usize::from(threads));
            pool.build_global().context("cannot start the threads")?;
        }
        let (backend, why) = Backend::pick(self.backend.as_deref())?;
        tracing::info!(backend = backend.name(), %why, "backend chosen");
        Ok(Model::open_with(&self.model, backend, ModelOptions { precision: self.precision })?)
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    check_threads_variable()?;
    match args.command {
        Command::Generate(args) => generate::run(&args),
        Command::Info(args) => info::run(&args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        Args::command().debug_assert();
    }
}
