//! `cargo xtask bench`: NSA against full attention, ours and PyTorch's, in one run.
//!
//! Correctness comes first: no time is printed when the operator differs from the reference. The candidates take turns
//! (A B C A B C …), so that a machine whose speed drifts is unfair to none; medians are reported. A peer runs right after them
//! at each length.

mod peer;
mod problem;
mod report;

use crate::machine::Machine;
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use half::{bf16, f16};
use nsa_core::{CompressKind, Element, NsaConfig};
use nsa_kernels::Backend;
use problem::Problem;
use report::Row;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

/// Options of `cargo xtask bench`.
#[derive(Args, Debug)]
pub struct Options {
    /// Run the criterion benchmarks of this name in nsa-kernels/benches instead
    op: Option<String>,
    /// Lengths of the sequence
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 2048, 4096, 8192])]
    tokens: Vec<usize>,
    /// Query heads
    #[arg(long, default_value_t = 16)]
    heads: usize,
    /// KV heads
    #[arg(long, default_value_t = 1)]
    kv_heads: usize,
    /// Head dimension of queries and keys
    #[arg(long, default_value_t = 128)]
    dim_qk: usize,
    /// Head dimension of values
    #[arg(long, default_value_t = 128)]
    dim_v: usize,
    /// Type of the tensors
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Runs of each candidate, of which the median counts
    #[arg(long, default_value_t = 3)]
    samples: usize,
    /// Another implementation to time in the same run
    #[arg(long, value_enum)]
    peer: Option<peer::Peer>,
    /// Backend, as NSA_BACKEND names it
    #[arg(long)]
    backend: Option<String>,
    /// Folder of the table (CSV) and the plot (SVG); without it: out/bench
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Names of `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

impl Options {
    /// A run of half a minute.
    pub fn short(out: PathBuf) -> Self {
        Self {
            op: None,
            tokens: vec![1024, 2048, 4096],
            heads: 16,
            kv_heads: 1,
            dim_qk: 128,
            dim_v: 128,
            dtype: Dtype::F32,
            samples: 3,
            peer: None,
            backend: None,
            out: Some(out),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// If the operator is wrong, an option does not fit, or a peer cannot be run.
pub fn run(options: &Options) -> Result<()> {
    if let Some(op) = &options.op {
        return criterion(op);
    }
    ensure!(options.samples > 0, "--samples 0: at least one run is needed");
    ensure!(options.tokens.iter().all(|&t| t > 0), "--tokens: a length of 0 has no work to time");
    let config = NsaConfig::builder(options.heads, options.kv_heads, options.dim_qk, options.dim_v)
        .compress_kind(CompressKind::Mean)
        .build()?;
    let (backend, why) = Backend::pick(options.backend.as_deref())?;
    crate::check::quick(&backend)?;
    println!("{}\nbackend {}: {why}", Machine::here().line(), backend.name());
    let peer = options.peer.map(peer::Peer::prepare).transpose()?;
    let mut rows = Vec::new();
    for &tokens in &options.tokens {
        let mut timed = match options.dtype {
            Dtype::F32 => time::<f32>(options, &config, &backend, tokens)?,
            Dtype::Bf16 => time::<bf16>(options, &config, &backend, tokens)?,
            Dtype::F16 => time::<f16>(options, &config, &backend, tokens)?,
        };
        if let Some(peer) = &peer {
            let job = peer::Job::new(&config, tokens, options.dtype.name(), options.samples);
            timed.extend(peer.time(&job)?);
        }
        rows.extend(timed);
        println!("{tokens} tokens done");
    }
    let out = match &options.out {
        Some(folder) => folder.clone(),
        None => crate::files::out("bench")?,
    };
    report::write(&config, options.dtype.name(), &rows, &out)
}

/// The criterion benchmarks of one operation, after the quick check.
fn criterion(op: &str) -> Result<()> {
    let known = benchmarks()?;
    ensure!(known.iter().any(|name| name == op), "`{op}` has no benchmark: there are {}", known.join(", "));
    crate::check::quick(&Backend::pick(None)?.0)?;
    println!("{}", Machine::here().line());
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::files::root()).args(["bench", "--package", "nsa-kernels", "--bench", op]);
    let status = command.status()?;
    if !status.success() {
        bail!("cargo bench --bench {op} failed ({status})");
    }
    Ok(())
}

/// Names of the criterion benchmarks that there are.
fn benchmarks() -> Result<Vec<String>> {
    let folder = crate::files::root().join("nsa-kernels/benches");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.path().file_stem()?.to_str().map(str::to_owned);
    let mut names: Vec<String> = entries.filter_map(name).collect();
    names.sort();
    Ok(names)
}

/// Times our candidates in turns.
fn time<T: Element>(options: &Options, config: &NsaConfig, backend: &Backend, tokens: usize) -> Result<Vec<Row>> {
    type Step<T> = fn(&mut Problem<T>) -> Result<()>;
    let steps: [(&'static str, &'static str, Step<T>); 4] = [
        ("nsa", "forward", Problem::nsa_forward),
        ("nsa", "backward", Problem::nsa_backward),
        ("dense", "forward", Problem::dense_forward),
        ("dense", "backward", Problem::dense_backward),
    ];
    let mut problem = Problem::<T>::new(backend, config, tokens)?;
    let mut seconds = steps.map(|_| Vec::new());
    for _ in 0..options.samples {
        for ((.., step), seconds) in steps.iter().zip(&mut seconds) {
            let start = Instant::now();
            step(&mut problem)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let rows = steps.iter().zip(&seconds).map(|(&(who, what, _), s)| Row::new(who, what, tokens, s));
    Ok(rows.collect())
}
