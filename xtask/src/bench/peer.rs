//! Other implementations, timed in the same run on the same shapes.

use super::report::Row;
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use nsa_core::NsaConfig;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Names of `--peer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// PyTorch's scaled_dot_product_attention, on the CPU
    Torch,
}

/// A peer that is ready to run: an interpreter and a script.
#[derive(Debug)]
pub struct Ready {
    python: PathBuf,
    script: PathBuf,
}

/// What a peer is asked to time.
#[derive(Debug, Serialize)]
pub struct Job {
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    dim_qk: usize,
    dim_v: usize,
    dtype: &'static str,
    threads: usize,
    samples: usize,
}

impl Job {
    /// The shapes of a configuration, with the threads that we use ourselves.
    pub fn new(config: &NsaConfig, tokens: usize, dtype: &'static str, samples: usize) -> Self {
        Self {
            tokens,
            heads: config.num_heads(),
            kv_heads: config.num_kv_heads(),
            dim_qk: config.head_dim_qk(),
            dim_v: config.head_dim_v(),
            dtype,
            threads: rayon::current_num_threads(),
            samples,
        }
    }
}

#[derive(Deserialize)]
struct Times {
    version: String,
    forward: Vec<f64>,
    backward: Vec<f64>,
}

impl Peer {
    /// Installs the peer into `out/venv`, unless it is there.
    ///
    /// # Errors
    /// If python3 or the package cannot be had.
    pub fn prepare(self) -> Result<Ready> {
        let venv = crate::files::root().join("out/venv");
        let python = venv.join("bin/python");
        let has_torch = || python.exists() && output(Command::new(&python).args(["-c", "import torch"])).is_ok();
        if !has_torch() {
            println!("installing PyTorch into {} (once)", venv.display());
            output(Command::new("python3").args(["-m", "venv"]).arg(&venv))
                .context("python3 with its module venv is needed for --peer torch")?;
            output(Command::new(&python).args(["-m", "pip", "install", "--quiet", "torch", "numpy"]))?;
        }
        Ok(Ready { python, script: crate::files::root().join("xtask/peers/torch_sdpa.py") })
    }
}

impl Ready {
    /// Times the peer on one job.
    ///
    /// # Errors
    /// If the peer fails or prints something else than its figures.
    pub fn time(&self, job: &Job) -> Result<Vec<Row>> {
        let printed = output(Command::new(&self.python).arg(&self.script).arg(serde_json::to_string(job)?))?;
        let times: Times = serde_json::from_slice(&printed.stdout).context("figures of the peer")?;
        ensure!(times.forward.len() == job.samples && times.backward.len() == job.samples, "figures of the peer");
        let who = format!("PyTorch {}", times.version.split('+').next().unwrap_or_default());
        Ok(vec![
            Row::new(&who, "forward", job.tokens, &times.forward),
            Row::new(&who, "backward", job.tokens, &times.backward),
        ])
    }
}

fn output(command: &mut Command) -> Result<Output> {
    let name = Path::new(command.get_program()).display().to_string();
    let output = command.output().with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        bail!("{name} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output)
}
