//! `nsa-train plan`, `presets`, `config`, `plot`.

use super::ModelArgs;
use anyhow::{Result, ensure};
use nsa_core::model::{ModelConfig, PRESETS, memory_plan, param_counts};
use nsa_train::TrainOptions;
use nsa_train::files::write_atomic;
use nsa_train::metrics::{self, Line};
use nsa_train::plot::{PLOT_FILE, loss_curve};
use std::path::PathBuf;
use std::process::ExitCode;

/// Check a model's configuration and print what it needs in memory.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Sequences of a training step.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    batch: usize,
    /// Tokens of a sequence [default: the model's max_position_embeddings].
    #[arg(long, allow_negative_numbers = true)]
    context: Option<usize>,
}

/// Runs `plan`.
pub fn plan(args: &PlanArgs) -> Result<ExitCode> {
    let config = args.model.load()?;
    let context = args.context.unwrap_or(config.max_position_embeddings());
    let options = TrainOptions { batch: args.batch, context, ..TrainOptions::default() };
    options.check()?;
    options.check_model(&config)?;
    println!("`{}` is valid: {:?} attention", args.model.model, config.attention());
    println!("{}", memory_plan(&config, options.batch * options.context));
    match config.check_runnable() {
        Ok(()) => println!("this build can train it"),
        Err(error) => println!("this build cannot train it: {error}"),
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs `presets`.
pub fn presets() -> Result<ExitCode> {
    println!("{:<12} {:>11} {:>6} {:>6} {:>11} {:>9}", "name", "parameters", "layers", "width", "heads/KV", "context");
    for name in PRESETS {
        let config = ModelConfig::preset(name)?;
        let heads = format!("{}/{}", config.num_attention_heads(), config.num_key_value_heads());
        println!(
            "{name:<12} {:>10.2}M {:>6} {:>6} {heads:>11} {:>9}",
            param_counts(&config).total as f64 / 1e6,
            config.num_hidden_layers(),
            config.hidden_size(),
            config.max_position_embeddings(),
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Write a model's configuration as JSON, every default written out.
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// File to write [default: standard output].
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs `config`.
pub fn config(args: &ConfigArgs) -> Result<ExitCode> {
    let mut json = serde_json::to_string_pretty(&args.model.load()?)?;
    json.push('\n');
    match &args.output {
        None => print!("{json}"),
        Some(path) => write_atomic(path, json.as_bytes())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Draw the loss curve of a metrics file.
#[derive(Debug, clap::Args)]
pub struct PlotArgs {
    /// A run's metrics.jsonl.
    metrics: PathBuf,
    /// SVG file to write [default: loss.svg beside the metrics].
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs `plot`.
pub fn plot(args: &PlotArgs) -> Result<ExitCode> {
    let output = args.output.clone().unwrap_or_else(|| args.metrics.with_file_name(PLOT_FILE));
    let lines = metrics::read(&args.metrics)?;
    let drawable = lines.iter().any(|line| matches!(line, Line::Step(_)));
    ensure!(drawable, "{}: holds no step to draw", args.metrics.display());
    loss_curve(&lines, &output)?;
    println!("{}", output.display());
    Ok(ExitCode::SUCCESS)
}
