//! The counting process: this program again on the simulator, which writes a line of counters a launch on standard error.

use super::counts::Counts;
use crate::bench::progress::Progress;
use anyhow::{Context, Result, anyhow, ensure};
use nsa_kernels::Backend;
use nsa_tests::sim;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Begins a line of the counting process that names what the kernels before it were.
const DONE: &str = "counted ";
/// Begins a line of the counting process that is for the user.
const NOTE: &str = "note: ";
/// Sums over the launches of each kernel.
pub type Kernels = BTreeMap<String, Counts>;

#[derive(Deserialize)]
struct Launch {
    kernel: String,
    #[serde(flatten)]
    counts: Counts,
}

/// In the counting process: ends what `name` names.
pub fn done(backend: &Backend, name: &str, tokens: usize) -> Result<()> {
    backend.synchronize()?;
    eprintln!("{DONE}{name} {tokens}");
    Ok(())
}

/// In the counting process: tells the user something.
pub fn note(text: &str) {
    eprintln!("{NOTE}{text}");
}

/// Runs the counting process with the arguments of this one, as a device (`a100`); `done` takes the kernels of each name and
/// length.
pub fn run(device: &str, prepare: impl FnOnce(&mut Command), mut done: impl FnMut(&str, usize, Kernels)) -> Result<()> {
    let mut command = sim::this_program().map_err(|message| anyhow!(message))?;
    command.args(std::env::args_os().skip(1)).stderr(Stdio::piped());
    command.env("CUDA_SIM_COUNT", "json").env("CUDA_SIM_CHECK", "0").env("CUDA_SIM_DEVICE", device);
    prepare(&mut command);
    let mut child = command.spawn().context("cannot start the simulator")?;
    let lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
    let (mut kernels, mut said) = (Kernels::new(), Vec::new());
    let progress = Progress::new();
    for line in lines {
        let line = line?;
        if let Ok(Launch { kernel, counts }) = serde_json::from_str(&line) {
            *kernels.entry(kernel).or_default() += counts;
        } else if let Some(name) = line.strip_prefix(DONE) {
            progress.line(&line);
            let (name, tokens) = name.rsplit_once(' ').context("a length")?;
            done(name, tokens.parse()?, std::mem::take(&mut kernels));
        } else if let Some(note) = line.strip_prefix(NOTE) {
            progress.line(note);
        } else {
            said.push(line);
        }
    }
    progress.finish();
    ensure!(child.wait()?.success(), "counting on the simulator failed:\n{}", said.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_is_read_from_the_simulators_line() {
        let line = "{\"kernel\": \"win_forward\", \"instructions\": 9, \"lanes\": 1, \"tensor_flop\": 8, \"global_sectors\": 7, \
                    \"unique_bytes\": 6, \"shared_wavefronts\": 5, \"shared_ideal\": 4}";
        let launch: Launch = serde_json::from_str(line).expect("a launch");
        assert_eq!((launch.kernel.as_str(), launch.counts.tensor_flop), ("win_forward", 8.0));
    }
}
