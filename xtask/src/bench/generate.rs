//! `cargo xtask bench generate`: decoding speed of a model with random weights, against the speed of memory.
//!
//! A step reads every weight once for the whole batch, φ's where a compression block becomes complete, so that tokens times bytes of
//! the weights over the time is the bandwidth used. The weights are written to a temporary checkpoint and opened as any other.

use super::columns::{self, field};
use super::train::load_model;
use super::turns::{self, Plan, Times};
use crate::dtype::Dtype;
use crate::machine::Machine;
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use half::{bf16, f16};
use nsa_core::model::{AttentionKind, ModelConfig, TokenizerKind, manifest};
use nsa_core::tokenizer::TOKENIZER_FILE;
use nsa_decode::sample::Sampling;
use nsa_decode::{Backend, Batch, GenerateOptions, Model, ModelOptions, Precision};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use safetensors::Dtype as Storage;
use safetensors::tensor::TensorView;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Bytes that are read or copied to measure the memory: more than caches hold; and how often.
const MEMORY_BYTES: usize = 512 << 20;
const PASSES: usize = 5;
/// Magnitude of the random weights.
const WEIGHT: f32 = 0.04;

/// Options of `cargo xtask bench generate`.
#[derive(Args, Debug)]
pub struct Options {
    /// Name of a preset, or a JSON file with the model's configuration
    #[arg(long, value_name = "PRESET|FILE", default_value = "smollm-135m")]
    model: String,
    /// Attention, if not the configuration's
    #[arg(long, value_enum)]
    attention: Option<Attention>,
    /// Type of the weights
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Type of activations and caches
    #[arg(long, default_value_t = Precision::F32)]
    precision: Precision,
    /// Sequences that are decoded together
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16], allow_negative_numbers = true)]
    batch: Vec<usize>,
    /// Tokens of each sequence before the first that is timed
    #[arg(long, default_value_t = 32, allow_negative_numbers = true)]
    context: usize,
    /// Tokens of a turn
    #[arg(long, default_value_t = 32, allow_negative_numbers = true)]
    tokens: usize,
    /// Turns of each batch, of which the median counts
    #[arg(long, default_value_t = 5, allow_negative_numbers = true)]
    samples: usize,
    /// Backend, as NSA_BACKEND names it
    #[arg(long)]
    backend: Option<String>,
    /// Folder of the table (CSV); without it: out/bench
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Names of `--attention`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Attention {
    Nsa,
    Dense,
}

impl Options {
    fn validate(&self) -> Result<()> {
        let counts = [("--context", self.context), ("--tokens", self.tokens), ("--samples", self.samples)];
        for (flag, count) in counts.into_iter().chain(self.batch.iter().map(|&batch| ("--batch", batch))) {
            ensure!(count > 0, "{flag} 0: must be at least 1");
        }
        Ok(())
    }

    /// The configuration, with room for every token.
    fn config(&self) -> Result<ModelConfig> {
        let mut fields = load_model(&self.model)?.to_fields();
        match self.attention {
            None => {}
            Some(Attention::Nsa) => fields.attention = AttentionKind::Nsa,
            Some(Attention::Dense) => fields.attention = AttentionKind::Dense,
        }
        // Whatever is drawn, the text goes on.
        fields.eos_token_id = None;
        let config = ModelConfig::new(fields).with_context(|| format!("--model {}", self.model))?;
        let (longest, tokens) = (config.max_position_embeddings(), self.context + (1 + self.samples) * self.tokens);
        ensure!(
            tokens <= longest,
            "--context {} --tokens {} --samples {}: make {tokens} tokens, of which max_position_embeddings allows {longest}",
            self.context,
            self.tokens,
            self.samples
        );
        Ok(config)
    }
}

/// What a batch reached.
struct Row {
    batch: usize,
    /// Of a step.
    times: Times,
    weight_bytes: u64,
}

impl Row {
    fn tokens_per_s(&self) -> f64 {
        self.batch as f64 / self.times.median_s
    }

    fn gb_per_s(&self) -> f64 {
        self.weight_bytes as f64 / self.times.median_s / 1e9
    }
}

/// Runs the command.
///
/// # Errors
/// If an option does not fit, or the checkpoint cannot be written.
pub fn run(options: &Options) -> Result<()> {
    options.validate()?;
    let config = options.config()?;
    let (backend, why) = Backend::pick(options.backend.as_deref())?;
    let out = crate::files::out(options.out.as_deref(), "bench")?;
    let machine = Machine::here();
    let load = super::load_note(&std::fs::read_to_string("/proc/loadavg").unwrap_or_default(), machine.threads);
    println!("{}{load}\nbackend {}: {why}", machine.line(), backend.name());
    crate::check::quick(&backend, [options.precision.dtype()])?;
    let folder = tempfile::tempdir().context("cannot make a folder for the checkpoint")?;
    let weight_bytes = write_checkpoint(&config, options.dtype, options.precision, folder.path())?;
    let memory_gb_per_s = memory_speed(&backend)?;
    let model = Model::open_with(folder.path(), backend, ModelOptions { precision: options.precision })?;
    // What is mapped outlives its names: an interrupted run leaves nothing behind.
    #[cfg(unix)]
    drop(folder);
    let rows = measure(options, &model, weight_bytes)?;
    report(options, &rows, memory_gb_per_s, &out)
}

/// Writes random weights; returns the bytes that a step reads of them in that precision, on average.
fn write_checkpoint(config: &ModelConfig, dtype: Dtype, precision: Precision, folder: &Path) -> Result<u64> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut value = || rng.random_range(-WEIGHT..WEIGHT);
    // Sequences of a batch are equally long, so that they complete their blocks together.
    let stride = config.nsa_config().map_or(1, |nsa| nsa.compress_stride() as u64);
    let (mut tensors, mut read) = (Vec::new(), 0);
    for spec in manifest(config) {
        let count = spec.numel();
        let (storage, bytes): (_, Vec<u8>) = match dtype {
            Dtype::F32 => (Storage::F32, (0..count).flat_map(|_| value().to_le_bytes()).collect()),
            Dtype::Bf16 => (Storage::BF16, (0..count).flat_map(|_| bf16::from_f32(value()).to_le_bytes()).collect()),
            Dtype::F16 => (Storage::F16, (0..count).flat_map(|_| f16::from_f32(value()).to_le_bytes()).collect()),
        };
        // Of an embedding that is no head, a step reads a row.
        if config.tie_word_embeddings() || !spec.name.contains("embed_tokens") {
            let steps = if spec.is_of_phi() { stride } else { 1 };
            read += bytes.len().min(count * precision.dtype().size_bytes()) as u64 / steps;
        }
        tensors.push((spec.name.clone(), storage, spec.shape.clone(), bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, storage, shape, bytes)| Ok((name.as_str(), TensorView::new(*storage, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))
        .with_context(|| format!("cannot write a checkpoint into {}", folder.display()))?;
    crate::files::write_atomic(&folder.join("config.json"), &serde_json::to_vec(config)?)?;
    if config.tokenizer() == TokenizerKind::File {
        let vocab: serde_json::Map<_, _> = (0..config.vocab_size()).map(|id| (format!("{id} "), id.into())).collect();
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "0 "}
        });
        crate::files::write_atomic(&folder.join(TOKENIZER_FILE), &serde_json::to_vec(&tokenizer)?)?;
    }
    Ok(read)
}

/// What the backend moves from and to its memory, GB/s, the best of a few passes: on the CPU all threads together read, a
/// device copies.
fn memory_speed(backend: &Backend) -> Result<f64> {
    let mut best = 0.0_f64;
    match backend {
        Backend::Cpu(_) => {
            let data = vec![1u64; MEMORY_BYTES / 8];
            for _ in 0..PASSES {
                let start = Instant::now();
                let sum: u64 = data.par_chunks(1 << 17).map(|chunk| chunk.iter().sum::<u64>()).sum();
                assert_eq!(sum, data.len() as u64);
                best = best.max(MEMORY_BYTES as f64 / start.elapsed().as_secs_f64() / 1e9);
            }
        }
        _ => {
            let from = backend.upload(&vec![1.0_f32; MEMORY_BYTES / 4]);
            let mut to = backend.alloc::<f32>(from.len());
            for _ in 0..PASSES {
                backend.synchronize()?;
                let start = Instant::now();
                to.copy_from(0, &from, 0..from.len())?;
                backend.synchronize()?;
                best = best.max(2.0 * MEMORY_BYTES as f64 / start.elapsed().as_secs_f64() / 1e9);
            }
        }
    }
    Ok(best)
}

/// Lets the batches take turns; every turn draws more tokens of the same sequences.
fn measure(options: &Options, model: &Model, weight_bytes: u64) -> Result<Vec<Row>> {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let ids = model.config().vocab_size() as u32;
    let mut batches = Vec::new();
    for &size in &options.batch {
        let mut batch = Batch::new(model);
        for _ in 0..size {
            let mut session = model.session();
            session.push(&(0..options.context).map(|_| rng.random_range(0..ids)).collect::<Vec<u32>>())?;
            let max_tokens = usize::MAX;
            batch.add(session, GenerateOptions { max_tokens, sampling: Sampling::greedy(), stop: Vec::new() })?;
        }
        batch.advance()?;
        batches.push(batch);
    }
    let plans = vec![Plan { samples: options.samples, budget_s: f64::INFINITY, compiles: false }; batches.len()];
    let outcomes = turns::take(&plans, |i, _| {
        let start = Instant::now();
        for _ in 0..options.tokens {
            batches[i].step()?;
        }
        Ok(Ok(start.elapsed().as_secs_f64() / options.tokens as f64))
    })?;
    let row = |(&batch, outcome): (&usize, turns::Outcome<f64>)| {
        let times = Times::of_all(outcome.into_iter().flatten()).expect("a turn that counts");
        Row { batch, times, weight_bytes }
    };
    Ok(options.batch.iter().zip(outcomes).map(row).collect())
}

fn report(options: &Options, rows: &[Row], memory_gb_per_s: f64, out: &Path) -> Result<()> {
    let header =
        [&["sequences"][..], &columns::TIME_CELLS, &["tokens/s", "weights read", "of memory's speed"]].concat();
    let mut table = columns::table(&header, 0);
    for row in rows {
        let rates = [
            format!("{:.1}", row.tokens_per_s()),
            format!("{:.1} GB/s", row.gb_per_s()),
            format!("{:.0} %", 100.0 * row.gb_per_s() / memory_gb_per_s),
        ];
        table.add_row([row.batch.to_string()].into_iter().chain(columns::time_cells(Some(row.times))).chain(rates));
    }
    println!(
        "{} in {}, computing in {}, after {} tokens; memory moves {memory_gb_per_s:.1} GB/s",
        options.model,
        options.dtype.name(),
        options.precision,
        options.context
    );
    println!("{table}");
    let names = ["model", "dtype", "precision", "context", "sequences"];
    let rates = ["tokens_per_s", "gb_per_s", "memory_gb_per_s"];
    let fields = |row: &Row| {
        let (precision, context) = (options.precision.to_string(), options.context.to_string());
        let batch = row.batch.to_string();
        let names = [&options.model, options.dtype.name(), &precision, &context, &batch].map(str::to_owned);
        let rates = [row.tokens_per_s(), row.gb_per_s(), memory_gb_per_s].map(|rate| field(Some(rate)));
        [&names[..], &columns::time_fields(Some(row.times)), &rates].concat()
    };
    let header = [&names[..], &columns::TIME_FIELDS, &rates].concat();
    columns::write(out, "generate.csv", &columns::csv(&header, rows.iter().map(fields))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::arguments;
    use nsa_core::model::ParamSpec;

    fn parse(arguments: &str) -> Result<Options, String> {
        let options: Options = arguments::parse(arguments)?;
        options.validate().and_then(|()| options.config()).map_err(|error| format!("{error:#}"))?;
        Ok(options)
    }

    #[test]
    fn bad_options_are_named_with_their_values_and_rules() {
        let cases = [
            ("--batch 1,0", ["--batch 0", "at least 1"]),
            ("--context 0", ["--context 0", "at least 1"]),
            ("--tokens 0", ["--tokens 0", "at least 1"]),
            ("--samples 0", ["--samples 0", "at least 1"]),
            ("--context 9000", ["--context 9000", "8192"]),
            ("--model giant", ["--model giant", "smollm-135m"]),
        ];
        arguments::assert_refused(parse, &cases);
    }

    #[test]
    fn models_with_random_weights_are_measured() {
        for arguments in ["", "--attention dense --dtype f16", "--dtype f32 --precision bf16"] {
            let options = parse(&format!("--model tiny-1m {arguments} --batch 1,3 --context 5 --tokens 2 --samples 1"))
                .expect("legal");
            let (config, folder) = (options.config().expect("valid"), tempfile::tempdir().expect("a folder"));
            let bytes = write_checkpoint(&config, options.dtype, options.precision, folder.path());
            let bytes = bytes.expect("written");
            let embedding = (config.vocab_size() * config.hidden_size()) as u64;
            let stride = config.nsa_config().map_or(1, |nsa| nsa.compress_stride());
            let of_phi = |name: &str| ["phi_", "pe_"].iter().any(|part| name.contains(&format!(".self_attn.{part}")));
            let of_step = |spec: &ParamSpec| spec.numel() / if of_phi(&spec.name) { stride } else { 1 };
            let count: u64 = manifest(&config).iter().map(|spec| of_step(spec) as u64).sum();
            assert_eq!(bytes, 2 * (count - embedding), "{arguments}");
            let backend = Backend::pick(None).expect("a backend").0;
            let precision = ModelOptions { precision: options.precision };
            let model = Model::open_with(folder.path(), backend, precision).expect("a model");
            let rows = measure(&options, &model, bytes).expect("tokens");
            assert!(rows.iter().all(|row| row.tokens_per_s() > 0.0) && rows.len() == 2);
        }
    }
}
