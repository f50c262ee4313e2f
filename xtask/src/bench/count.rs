//! `cargo xtask bench count`: what the CUDA kernels move and compute, counted on the simulator instead of timed on a device,
//! and what follows from that for longer sequences and real devices.
//!
//! Each counter of each kernel follows a power law of the length, through the lengths that are counted; a decoding step, which
//! is little work, is counted at the length to estimate itself. A device's time for a kernel is at least that of the resource it uses most: tensor cores, memory, the second cache, shared memory, issue slots.

mod beside;
mod counts;
mod foreign;
mod ours;
mod process;

use super::columns::{self, seconds};
use super::decode::{Decoding, Size};
use super::fit::{self, Point};
use super::heads::Heads;
use super::peer::Peer;
use super::problem::{Inputs, Problem};
use super::work::{Pairs, Pass, flop};
use anyhow::{Result, ensure};
use clap::Args;
use counts::Counts;
use half::bf16;
use nsa_core::NsaConfig;
use nsa_kernels::Backend;
use nsa_tests::sim;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Options of `cargo xtask bench count`.
#[derive(Args, Debug)]
pub struct Options {
    /// Lengths to count at
    #[arg(long, value_delimiter = ',', default_values_t = [2048, 4096, 8192], allow_negative_numbers = true)]
    tokens: Vec<usize>,
    /// Longest length of the passes of our full attention, which follow their law from there
    #[arg(long, default_value_t = 65_536, allow_negative_numbers = true, conflicts_with = "peer")]
    dense_limit: usize,
    /// Length to estimate
    #[arg(long, default_value_t = 65_536, allow_negative_numbers = true)]
    estimate: usize,
    #[command(flatten)]
    heads: Heads,
    #[command(flatten)]
    inputs: Inputs,
    /// What to count
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Pass::ALL)]
    pass: Vec<Pass>,
    /// Devices to count and estimate for
    #[arg(long, value_delimiter = ',', default_value = "a100,h100", conflicts_with = "peer")]
    device: Vec<Device>,
    /// Count a package's Triton kernels beside ours, instead of our whole passes: compressed attention, with blocks as long
    /// as those that are selected and no overlap, and selected attention
    #[arg(long, value_enum, conflicts_with = "estimate")]
    peer: Option<Peer>,
    /// Python that has the peer's packages, instead of installing them below target/peers
    #[arg(long, requires = "peer", value_name = "PROGRAM")]
    peer_python: Option<PathBuf>,
    /// Folder of the table (CSV); without it: out/bench-count
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Bytes of an element: bf16.
const ELEMENT_BYTES: f64 = 2.0;

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    Nsa,
    Dense,
}

impl Who {
    const fn name(self) -> &'static str {
        match self {
            Self::Nsa => "nsa",
            Self::Dense => "dense",
        }
    }
}

/// Whose pass, as lines of the counting process name it.
type Job = (Who, Pass);

fn name((who, pass): Job) -> String {
    format!("{} {}", who.name(), pass.name())
}

fn jobs(passes: &[Pass]) -> Vec<Job> {
    let of = |who: Who| passes.iter().map(move |&pass| (who, pass));
    of(Who::Nsa).chain(of(Who::Dense)).collect()
}

/// Counters by kernel and length.
type Counted = BTreeMap<(usize, String), Vec<(usize, Counts)>>;

/// A device to estimate for. Rates in units a second.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Device {
    name: &'static str,
    /// What the simulator calls it.
    simulated: &'static str,
    /// FLOP of bf16 tensor cores, as products of matrices reach them.
    tensor: f64,
    /// Bytes of memory, of the second cache.
    memory: f64,
    cache: f64,
    /// Multiprocessors times clock.
    cycles: f64,
}

/// From data sheets; caches and what products reach on Hopper from measurements. Kernels of the two differ: they are counted
/// on each.
const DEVICES: [Device; 2] = [
    Device { name: "A100", simulated: "a100", tensor: 312e12, memory: 2.04e12, cache: 5.4e12, cycles: 108.0 * 1.41e9 },
    Device { name: "H100", simulated: "h100", tensor: 798e12, memory: 3.35e12, cache: 8.0e12, cycles: 132.0 * 1.75e9 },
];
/// Instructions of warps that a multiprocessor issues in a cycle.
const ISSUES: f64 = 4.0;

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = DEVICES.into_iter().find(|device| device.simulated == name);
        found.ok_or_else(|| format!("there are {}", DEVICES.map(|device| device.simulated).join(" and ")))
    }
}

impl Device {
    /// The least time of a kernel, and what takes it.
    fn time(&self, counts: &Counts) -> (f64, &'static str) {
        let uses = [
            (counts.tensor_flop / self.tensor, "tensor cores"),
            (counts.unique_bytes / self.memory, "memory"),
            (counts.bytes_asked() / self.cache, "cache"),
            (counts.shared_wavefronts / self.cycles, "shared memory"),
            (counts.instructions / (ISSUES * self.cycles), "issue"),
        ];
        uses.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are resources")
    }
}

/// Runs the command: in a process on the simulator, whose counters are read.
///
/// # Errors
/// If an option does not fit, or the simulator cannot run.
pub fn run(options: &Options) -> Result<()> {
    options.validate()?;
    if let Some(peer) = options.peer {
        return beside::run(options, peer);
    }
    let config = options.heads.config()?;
    if sim::inside() {
        return work(options, &config);
    }
    let out = crate::files::out(options.out.as_deref(), "bench-count")?;
    let mut counted = Vec::new();
    for &device in &options.device {
        counted.push((device, count(options, &device)?));
    }
    let report = Report { options, config: &config, counted };
    report.write(&out)
}

impl Options {
    fn validate(&self) -> Result<()> {
        for (flag, &tokens) in self.tokens.iter().map(|t| ("--tokens", t)).chain([("--estimate", &self.estimate)]) {
            ensure!(tokens > 0, "{flag} {tokens}: must be at least 1");
            ensure!(i32::try_from(tokens).is_ok(), "{flag} {tokens}: must be at most {}", i32::MAX);
        }
        self.inputs.validate()?;
        let limit = self.dense_limit;
        let attends = self.pass.iter().any(|&pass| pass != Pass::Decode);
        if self.peer.is_none() && attends {
            ensure!(self.lengths().len() > 1, "--tokens: must be at least two lengths for a law");
            let dense = self.lengths_of((Who::Dense, Pass::Forward)).len();
            ensure!(
                dense > 1,
                "--dense-limit {limit}: must leave two of --tokens at least, for the law of full attention"
            );
        }
        if let Some(peer) = self.peer {
            ensure!(peer == Peer::Fla, "--peer {}: must be fla, whose kernels compile without a GPU", peer.name());
            ensure!(attends, "--pass decode: must have forward or backward beside it with --peer");
        }
        Ok(())
    }

    /// At which a job is counted.
    fn lengths_of(&self, (who, pass): Job) -> Vec<usize> {
        match (who, pass) {
            (_, Pass::Decode) => self.contexts(),
            (Who::Nsa, _) => self.lengths(),
            (Who::Dense, _) => self.lengths().into_iter().filter(|&tokens| tokens <= self.dense_limit).collect(),
        }
    }

    /// Ascending, each once.
    fn lengths(&self) -> Vec<usize> {
        let mut lengths = self.tokens.clone();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    /// Those at which decoding steps are counted.
    fn contexts(&self) -> Vec<usize> {
        let mut lengths = self.lengths();
        lengths.push(self.estimate);
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }
}

/// The counting process: what there is to count, with a line after each pass.
fn work(options: &Options, config: &NsaConfig) -> Result<()> {
    let backend = Backend::cuda(0)?;
    let done = |job: Job, tokens: usize| process::done(&backend, &name(job), tokens);
    let contexts = if options.pass.contains(&Pass::Decode) { options.contexts() } else { Vec::new() };
    for tokens in contexts {
        let size = Size { batch: 1, context: tokens };
        let mut decoding = Decoding::<bf16>::with_layers(&backend, config, size, 1)?;
        decoding.nsa_step(0)?;
        done((Who::Nsa, Pass::Decode), tokens)?;
        decoding.dense_step(0)?;
        done((Who::Dense, Pass::Decode), tokens)?;
    }
    for tokens in options.lengths() {
        let mut problem = Problem::<bf16>::new(&backend, config, tokens, options.inputs)?;
        type Step = fn(&mut Problem<bf16>) -> Result<()>;
        let steps: [(Job, Step); 4] = [
            ((Who::Nsa, Pass::Forward), Problem::nsa_forward),
            ((Who::Nsa, Pass::Backward), Problem::nsa_backward),
            ((Who::Dense, Pass::Forward), Problem::dense_forward),
            ((Who::Dense, Pass::Backward), Problem::dense_backward),
        ];
        // A backward pass needs the forward pass before it.
        let wanted =
            |pass| options.pass.contains(&pass) || (pass == Pass::Forward && options.pass.contains(&Pass::Backward));
        let counted = |job: Job| wanted(job.1) && options.lengths_of(job).contains(&tokens);
        for (job, step) in steps.into_iter().filter(|(job, _)| counted(*job)) {
            step(&mut problem)?;
            done(job, tokens)?;
            if job == (Who::Nsa, Pass::Forward) {
                problem
                    .blocks_in_common()?
                    .iter()
                    .for_each(|blocks| process::note(&format!("{tokens} tokens: {blocks}")));
            }
        }
    }
    Ok(())
}

/// Runs the counting process as a device and sorts its counters.
fn count(options: &Options, device: &Device) -> Result<Counted> {
    let jobs = jobs(&options.pass);
    let mut counted = Counted::new();
    let done = |of: &str, tokens: usize, kernels: process::Kernels| {
        let Some(job) = jobs.iter().position(|&job| name(job) == of) else { return };
        for (kernel, counts) in kernels {
            counted.entry((job, kernel)).or_default().push((tokens, counts));
        }
    };
    process::run(device.simulated, |_| {}, done)?;
    Ok(counted)
}

struct Report<'a> {
    options: &'a Options,
    config: &'a NsaConfig,
    counted: Vec<(Device, Counted)>,
}

/// Sums over the kernels of a job, by `of` a kernel's counters.
fn sum(counted: &Counted, job: usize, of: impl Fn(&[(usize, Counts)]) -> Counts) -> Counts {
    let mut sum = Counts::default();
    for (_, counts) in counted.iter().filter(|((of_job, _), _)| *of_job == job) {
        sum += of(counts);
    }
    sum
}

impl Report<'_> {
    /// FLOP that a pass needs, and bytes of its tensors, each once.
    fn least(&self, (who, pass): Job, tokens: usize) -> (f64, f64) {
        let pairs = Pairs::of(self.config, pass, tokens);
        let useful = flop(self.config, pass, if who == Who::Nsa { pairs.nsa } else { pairs.dense });
        (useful, bytes(self.config, (who, pass), tokens))
    }

    /// The last length at which a job is counted.
    fn last(&self, job: Job) -> usize {
        *self.options.lengths_of(job).last().expect("two at least")
    }

    /// A kernel's counters at the length to estimate; none if another one has taken its place at the last length counted.
    fn at_estimate(&self, job: Job, counts: &[(usize, Counts)]) -> Counts {
        let there = counts.last().is_some_and(|&(tokens, _)| tokens == self.last(job));
        if there { extrapolate(counts, self.options.estimate) } else { Counts::default() }
    }

    fn write(&self, out: &Path) -> Result<()> {
        let (jobs, longest) = (jobs(&self.options.pass), *self.options.lengths().last().expect("two at least"));
        let dense = self.last((Who::Dense, Pass::Forward));
        let dense = if dense < longest { format!(" ({dense} of full attention)") } else { String::new() };
        println!("bf16, {longest} tokens{dense}; touched: each sector once a launch; asked: by every load and store");
        for (device, counted) in &self.counted {
            let estimate = format!("at {} at least", self.options.estimate);
            let header = [&[device.name, "kernel"][..], &Counts::CELLS, &[&estimate, "by"]].concat();
            let mut kernels = columns::table(&header, 2);
            for ((job, kernel), counts) in counted {
                let shown = self.last(jobs[*job]).min(longest);
                let Some((_, c)) = counts.iter().find(|(tokens, _)| *tokens == shown) else { continue };
                let (time, resource) = device.time(&self.at_estimate(jobs[*job], counts));
                let estimate = [seconds(time), resource.to_owned()];
                kernels.add_row([&[name(jobs[*job]), kernel.clone()][..], &c.cells(), &estimate].concat());
            }
            println!("{kernels}");
        }
        println!("{}", self.efficiency(&jobs));
        println!("{}", self.estimates(&jobs));
        columns::write(out, "count.csv", &self.csv(&jobs)?)
    }

    /// What is computed and moved over what must be.
    fn efficiency(&self, jobs: &[Job]) -> comfy_table::Table {
        let header = ["pass", "device", "tokens", "FLOP over useful", "bytes touched over least", "passes over ideal"];
        let mut table = columns::table(&header, 2);
        for (at, &job) in jobs.iter().enumerate() {
            for (device, counted) in &self.counted {
                for tokens in self.options.lengths_of(job) {
                    let of = |counts: &[(usize, Counts)]| {
                        counts.iter().find(|(t, _)| *t == tokens).map_or_else(Counts::default, |(_, counts)| *counts)
                    };
                    let (sum, (flop, bytes)) = (sum(counted, at, of), self.least(job, tokens));
                    table.add_row([
                        name(job),
                        device.name.to_owned(),
                        tokens.to_string(),
                        format!("{:.2}", sum.tensor_flop / flop),
                        format!("{:.2}", sum.unique_bytes / bytes),
                        format!("{:.2}", sum.shared_wavefronts / sum.shared_ideal.max(1.0)),
                    ]);
                }
            }
        }
        table
    }

    /// The least times of devices at the length to estimate.
    fn estimates(&self, jobs: &[Job]) -> comfy_table::Table {
        let header = ["pass", "device", "tensor GFLOP", "MB touched", "MB asked", "at least", "most by", "dense / nsa"];
        let mut table = columns::table(&header, 2);
        let times = |(device, counted): &(Device, Counted), job: usize| -> BTreeMap<&'static str, f64> {
            let mut by = BTreeMap::new();
            for (_, counts) in counted.iter().filter(|((of, _), _)| *of == job) {
                let (seconds, resource) = device.time(&self.at_estimate(jobs[job], counts));
                *by.entry(resource).or_insert(0.0) += seconds;
            }
            by
        };
        for (at, &job) in jobs.iter().enumerate() {
            for of_device in &self.counted {
                let sum = sum(&of_device.1, at, |counts| self.at_estimate(job, counts));
                let by = times(of_device, at);
                let total: f64 = by.values().sum();
                let most = by.iter().max_by(|a, b| a.1.total_cmp(b.1)).map_or("-", |(resource, _)| resource);
                let dense = jobs.iter().position(|&other| job.0 == Who::Nsa && other == (Who::Dense, job.1));
                let ratio = dense.map(|dense| times(of_device, dense).values().sum::<f64>() / total);
                table.add_row([
                    format!("{} at {}", name(job), self.options.estimate),
                    of_device.0.name.to_owned(),
                    format!("{:.1}", sum.tensor_flop / 1e9),
                    format!("{:.1}", sum.unique_bytes / 1e6),
                    format!("{:.1}", sum.bytes_asked() / 1e6),
                    seconds(total),
                    most.to_owned(),
                    ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.1}")),
                ]);
            }
        }
        table
    }

    fn csv(&self, jobs: &[Job]) -> Result<String> {
        let header = [&["device", "who", "pass", "kernel", "tokens"][..], &Counts::FIELDS].concat();
        let mut rows = Vec::new();
        for (device, counted) in &self.counted {
            for ((job, kernel), counts) in counted {
                let (who, pass) = jobs[*job];
                for (tokens, c) in counts {
                    let names = [device.name, who.name(), pass.name(), kernel, &tokens.to_string()].map(str::to_owned);
                    rows.push([&names[..], &c.fields()].concat());
                }
            }
        }
        columns::csv(&header, rows)
    }
}

/// Counters at another length, by the law through those counted.
fn extrapolate(counts: &[(usize, Counts)], tokens: usize) -> Counts {
    let of = |get: fn(&Counts) -> f64| {
        let points: Vec<Point> =
            counts.iter().map(|(t, c)| (*t as f64, get(c))).filter(|&(_, count)| count > 0.0).collect();
        let Some(&(longest, count)) = points.last() else { return 0.0 };
        // A counter of the last two lengths: shorter ones have more of what does not grow.
        let recent = &points[points.len().saturating_sub(2)..];
        count * (tokens as f64 / longest).powf(fit::exponent(recent).unwrap_or(1.0))
    };
    Counts {
        instructions: of(|c| c.instructions),
        tensor_flop: of(|c| c.tensor_flop),
        global_sectors: of(|c| c.global_sectors),
        unique_bytes: of(|c| c.unique_bytes),
        shared_wavefronts: of(|c| c.shared_wavefronts),
        shared_ideal: of(|c| c.shared_ideal),
    }
}

/// Bytes that a pass must read and write: each tensor once, what one kernel leaves for the next included.
fn bytes(config: &NsaConfig, (who, pass): Job, tokens: usize) -> f64 {
    let (heads, groups, n) = (config.num_heads() as f64, config.num_kv_heads() as f64, tokens as f64);
    let (k, v) = (config.head_dim_qk() as f64, config.head_dim_v() as f64);
    let blocks = nsa_core::index::num_blocks(config, tokens) as f64;
    let rows = groups * (k + v);
    let branches = if who == Who::Nsa { 3.0 } else { 1.0 };
    let all_rows = if who == Who::Nsa { 2.0 * n + blocks } else { n };
    match pass {
        Pass::Decode => {
            let Pairs { nsa, dense } = Pairs::of(config, pass, tokens);
            super::work::row_bytes(config, if who == Who::Nsa { nsa } else { dense }, ELEMENT_BYTES as usize)
        }
        Pass::Forward => {
            let branch = ELEMENT_BYTES * n * heads * (k + v) + 4.0 * n * heads;
            let pooled = if who == Who::Nsa { ELEMENT_BYTES * rows * (n + blocks) } else { 0.0 };
            // The last branch's kernel reads the others' outputs and writes the sum.
            let gate = if who == Who::Nsa { ELEMENT_BYTES * n * heads * (3.0 * v + 3.0) } else { 0.0 };
            let lists = if who == Who::Nsa { 8.0 * n * groups * config.select_count() as f64 } else { 0.0 };
            branches * branch + ELEMENT_BYTES * rows * all_rows + pooled + gate + lists
        }
        Pass::Backward => {
            // Facts read o and do, or the gates and their gradients, and lse; dq kernels read q, do and facts, and write dq or add
            // to it, the same bytes; kernels of keys read q, do and facts again.
            let summed = if who == Who::Nsa { 3.0 * (ELEMENT_BYTES + 4.0) } else { 2.0 * ELEMENT_BYTES * v };
            let facts = n * heads * (summed + 20.0);
            let of_queries = n * heads * (ELEMENT_BYTES * (k + v) + 16.0 + 4.0 * k);
            let of_keys = n * heads * (ELEMENT_BYTES * (k + v) + 16.0);
            let branch = facts + of_queries + of_keys;
            // Keys and values are read by both, and their gradients written.
            let keys = rows * all_rows * (2.0 * ELEMENT_BYTES + 4.0);
            let gate = if who == Who::Nsa { ELEMENT_BYTES * n * heads * 4.0 * v + 12.0 * n * heads } else { 0.0 };
            // φ's gradients: those of blocks are read, those of tokens written.
            let pooled = if who == Who::Nsa { rows * 4.0 * (blocks + n) } else { 0.0 };
            branches * branch + keys + gate + pooled
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::arguments;
    use super::*;

    fn counts(flop: f64, sectors: f64) -> Counts {
        Counts { tensor_flop: flop, global_sectors: sectors, ..Counts::default() }
    }

    #[test]
    fn bad_options_are_named_with_their_values_and_rules() {
        let parse = |arguments: &str| -> Result<Options, String> {
            let options: Options = arguments::parse(arguments)?;
            options.validate().and_then(|()| options.heads.config()).map_err(|error| format!("{error:#}"))?;
            Ok(options)
        };
        let cases = [
            ("--tokens 0,64", ["--tokens 0", "at least 1"]),
            ("--tokens 64,64", ["--tokens", "two lengths"]),
            ("--estimate 4294967296", ["--estimate 4294967296", "at most 2147483647"]),
            ("--dense-limit 2048", ["--dense-limit 2048", "two of --tokens"]),
            ("--kv-heads 3", ["--kv-heads 3", "num_kv_heads"]),
            ("--device a100,v100", ["--device", "a100 and h100"]),
            ("--peer fla --device h100", ["--peer", "--device"]),
            ("--query-correlation -0.1", ["--query-correlation -0.1", "less than 1"]),
            ("--query-correlation 0.5 --peer fla", ["--query-correlation", "--peer"]),
            ("--peer torch", ["--peer torch", "must be fla"]),
            ("--peer fla --pass decode", ["--pass decode", "forward or backward"]),
            ("--peer fla --estimate 100", ["--peer", "--estimate"]),
            ("--peer-python python3", ["--peer", "required"]),
        ];
        arguments::assert_refused(parse, &cases);
        assert_eq!(parse("--peer fla --tokens 128").expect("one length has ratios").lengths(), [128]);
        assert_eq!(parse("--tokens 128,64,128").expect("legal").lengths(), [64, 128]);
        parse("--tokens 128 --pass decode").expect("steps are counted at the length of the estimate itself");
    }

    #[test]
    fn laws_go_on_from_the_last_two_lengths() {
        let counted = [(1024, counts(3.0, 7.0)), (2048, counts(8.0, 8.0)), (4096, counts(32.0, 16.0))];
        let far = extrapolate(&counted, 16_384);
        assert!((far.tensor_flop - 512.0).abs() < 1e-9 && (far.global_sectors - 64.0).abs() < 1e-9, "{far:?}");
        assert_eq!(far.instructions, 0.0);
    }

    #[test]
    fn a_kernel_that_another_one_has_replaced_does_not_go_on() {
        let options: Options =
            arguments::parse("--tokens 1024,2048,4096 --dense-limit 2048 --estimate 8192").expect("legal");
        options.validate().expect("legal");
        let config = options.heads.config().expect("legal");
        let report = Report { options: &options, config: &config, counted: Vec::new() };
        let of = |who, lengths: &[usize]| {
            let counts: Vec<_> = lengths.iter().map(|&tokens| (tokens, counts(tokens as f64, 0.0))).collect();
            report.at_estimate((who, Pass::Forward), &counts).tensor_flop
        };
        assert_eq!(of(Who::Nsa, &[1024, 2048, 4096]), 8192.0);
        assert_eq!((of(Who::Nsa, &[1024, 2048]), of(Who::Nsa, &[4096])), (0.0, 8192.0));
        assert_eq!(of(Who::Dense, &[1024, 2048]), 8192.0);
    }

    #[test]
    fn the_resource_that_is_used_most_takes_the_time() {
        let [a100, _] = &DEVICES;
        assert_eq!(a100.time(&counts(312e9, 1.0)), (1e-3, "tensor cores"));
        let (time, resource) = a100.time(&counts(1.0, 5.4e9 / 32.0));
        assert!((time - 1e-3).abs() < 1e-12 && resource == "cache");
    }
}
