//! `cargo xtask check --memory`: what the operator takes beside inputs and outputs at 65,536 tokens.

use crate::machine::Machine;
use anyhow::{Result, anyhow, bail};
use nsa_kernels::Backend;
use nsa_tests::memory::{MEASURES, TOKENS, resident};
use std::time::Instant;

/// Measures forward, then forward and backward, each on a backend whose scratch memory does not exist yet.
///
/// # Errors
/// If either takes more than it may, or the system does not tell.
pub fn run(backend: impl Fn() -> Result<Backend>, why: &str) -> Result<()> {
    println!("{} ({why}); {}", backend()?.name(), Machine::here().line());
    println!("{TOKENS} tokens, 16 query heads on 1 KV head, dims 128, the paper's blocks and φ, f32");
    let mut red = Vec::new();
    for (name, measure) in MEASURES {
        let start = Instant::now();
        let peak = measure(&backend()?, TOKENS, &resident).map_err(|message| anyhow!(message))?;
        let line = format!("{name}: {} MiB beside inputs and outputs, of {}", mib(peak.bytes), mib(peak.limit_bytes));
        println!("{line} allowed ({:.0} s with making the inputs)", start.elapsed().as_secs_f64());
        if peak.bytes > peak.limit_bytes {
            red.push(line);
        }
    }
    if !red.is_empty() {
        bail!("{}", red.join("\n"));
    }
    println!("all green");
    Ok(())
}

fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}
