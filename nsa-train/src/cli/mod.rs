//! Arguments and subcommands.

mod eval;
mod inspect;
mod train;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use nsa_core::model::{AttentionKind, ModelConfig, PRESETS, TokenizerKind};
use nsa_core::tokenizer::{TOKENIZER_FILE, Tokenizer};
use nsa_kernels::Backend;
use nsa_kernels::backend::{MOST_THREADS, check_threads_variable};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// Trains transformers with Native Sparse Attention or full attention.
///
/// Messages go to standard error; RUST_LOG sets their detail (`RUST_LOG=nsa_train=trace` times every operation).
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// Threads to compute with [default: RAYON_NUM_THREADS, else one a core].
    #[arg(long, global = true, value_name = "N", allow_negative_numbers = true)]
    threads: Option<usize>,
    /// Backend to compute on: `cpu`, `cpu:avx2` and other instruction sets, `cuda` or `cuda:N` for an NVIDIA GPU, on which
    /// the whole model stays [default: NSA_BACKEND, else the processor's best].
    #[arg(long, global = true, value_name = "NAME")]
    backend: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model on text files.
    Train(Box<train::TrainArgs>),
    /// Measure a checkpoint on text files: loss, perplexity, bits per byte.
    Eval(eval::EvalArgs),
    /// Check a model's configuration and print what it needs in memory.
    Plan(inspect::PlanArgs),
    /// List the models that are known by name.
    Presets,
    /// Write a model's configuration as JSON.
    Config(inspect::ConfigArgs),
    /// Draw the loss curve of a metrics file.
    Plot(inspect::PlotArgs),
}

impl Cli {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let default = if std::io::stderr().is_terminal() { "warn" } else { "info" };
        let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new(default))?;
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_span_events(FmtSpan::CLOSE)
            .with_target(false)
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(std::io::stderr)
            // Said on standard error, too, which panics where nobody reads that.
            .log_internal_errors(false)
            .init();
        check_threads_variable()?;
        if let Some(threads) = self.threads {
            let rule = || format!("--threads {threads}: must be from 1 to {MOST_THREADS}");
            anyhow::ensure!((1..=MOST_THREADS).contains(&threads), rule());
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("starting threads")?;
        }
        let backend = self.backend.as_deref();
        match self.command {
            Command::Train(args) => train::train(*args, backend),
            Command::Eval(args) => eval::eval(&args, backend),
            Command::Plan(args) => inspect::plan(&args),
            Command::Presets => inspect::presets(),
            Command::Config(args) => inspect::config(&args),
            Command::Plot(args) => inspect::plot(&args),
        }
    }
}

/// Attention, as an argument.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Attention {
    /// Native Sparse Attention.
    Nsa,
    /// Full causal attention.
    Dense,
}

impl From<Attention> for AttentionKind {
    fn from(attention: Attention) -> Self {
        match attention {
            Attention::Nsa => Self::Nsa,
            Attention::Dense => Self::Dense,
        }
    }
}

/// Which model.
#[derive(Debug, clap::Args)]
struct ModelArgs {
    /// Name of a preset, or a JSON file with the model's configuration.
    #[arg(long, value_name = "PRESET|FILE")]
    model: String,
    /// Attention, if not the configuration's.
    #[arg(long, value_enum)]
    attention: Option<Attention>,
}

impl ModelArgs {
    fn load(&self) -> Result<ModelConfig> {
        load_model(&self.model, self.attention)
    }
}

fn load_model(model: &str, attention: Option<Attention>) -> Result<ModelConfig> {
    let config = if PRESETS.contains(&model) {
        ModelConfig::preset(model)?
    } else {
        let known = || format!("`{model}` is neither a preset ({}) nor a configuration", PRESETS.join(", "));
        nsa_core::read_json(model).with_context(known)?
    };
    let Some(attention) = attention else { return Ok(config) };
    let mut fields = config.to_fields();
    fields.attention = attention.into();
    Ok(ModelConfig::new(fields)?)
}

/// The tokenizer of a model, from `given` or the file beside its configuration; a file given for a model of bytes makes it
/// one of that tokenizer's vocabulary.
fn load_tokenizer(config: ModelConfig, model: &str, given: Option<&Path>) -> Result<(ModelConfig, Tokenizer)> {
    match (config.tokenizer(), given) {
        (TokenizerKind::Bytes, None) => Ok((config, Tokenizer::bytes())),
        (TokenizerKind::Bytes, Some(path)) => {
            let tokenizer = Tokenizer::open(path)?;
            let mut fields = config.to_fields();
            (fields.tokenizer, fields.vocab_size) = (TokenizerKind::File, tokenizer.vocab_size());
            Ok((ModelConfig::new(fields)?, tokenizer))
        }
        (TokenizerKind::File, given) => {
            let beside = || Path::new(model).with_file_name(TOKENIZER_FILE);
            let path = given.map_or_else(beside, PathBuf::from);
            let tokenizer = Tokenizer::open(&path).context("the model's tokenizer (--tokenizer)")?;
            Ok((config, tokenizer))
        }
    }
}

/// Picks the backend and says why.
fn pick_backend(request: Option<&str>) -> Result<Backend> {
    let (backend, why) = Backend::pick(request)?;
    tracing::info!("backend {}: {why}; {} threads", backend.name(), rayon::current_num_threads());
    Ok(backend)
}
