//! `cargo xtask bench`: NSA against full attention, ours and PyTorch's, in one run.
//!
//! Correctness comes first: no time is printed when the operator differs from the reference. The contenders, peers included,
//! take turns (A B C A B C …), so that a machine whose speed drifts is unfair to none; medians are reported. On a device each
//! timed pass of a turn comes after one of the same that is not timed.

#[cfg(test)]
mod arguments;
mod columns;
mod count;
mod criterion;
mod decode;
mod fit;
mod generate;
mod heads;
mod peer;
mod plot;
mod problem;
mod progress;
mod report;
mod train;
mod turns;
mod work;

use crate::dtype::Dtype;
use crate::machine::Machine;
use anyhow::{Result, ensure};
use clap::{Args, Subcommand};
use decode::Decoding;
use half::{bf16, f16};
use heads::Heads;
use nsa_core::NsaConfig;
use nsa_kernels::{Backend, Element};
use peer::{Job, PeerError, Ready, Work};
use problem::{Inputs, Problem};
use progress::Progress;
use report::{Report, Row, Who};
use std::path::PathBuf;
use std::time::Duration;
use turns::{Outcome, Plan, Seconds, Times};
use work::Pass;

/// Options of `cargo xtask bench`.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    model: Option<OfModel>,
    /// Run the criterion benchmarks of this name in nsa-kernels/benches instead, with sizes of their own, on the CPU
    #[arg(exclusive = true)]
    op: Option<String>,
    /// Lengths of the sequence, and of the context of decoding
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 2048, 4096, 8192], allow_negative_numbers = true)]
    tokens: Vec<usize>,
    #[command(flatten)]
    heads: Heads,
    #[command(flatten)]
    inputs: Inputs,
    /// Types of the tensors
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Dtype::F32])]
    dtype: Vec<Dtype>,
    /// What to time; backward needs forward
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Pass::ALL)]
    pass: Vec<Pass>,
    /// Sequences of a decoding step, each with its own context
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    batch: usize,
    /// Turns of each contender, of which the median counts
    #[arg(long, default_value_t = 3, allow_negative_numbers = true)]
    samples: usize,
    /// Begin no further turn of a contender that has spent so many seconds at a length; one turn always counts
    #[arg(long, default_value_t = 60.0, allow_negative_numbers = true)]
    budget: f64,
    /// Longest length of our full attention
    #[arg(long, default_value_t = 65_536, allow_negative_numbers = true)]
    dense_limit: usize,
    /// Other implementations to time in the same run
    #[arg(long, value_enum, value_delimiter = ',')]
    peer: Vec<peer::Peer>,
    /// Longest length of peers [default: 65536]
    #[arg(long, requires = "peer", allow_negative_numbers = true)]
    peer_limit: Option<usize>,
    /// Turns of each peer [default: as --samples]
    #[arg(long, requires = "peer", allow_negative_numbers = true)]
    peer_samples: Option<usize>,
    /// Python that has the peers' packages, instead of installing them below target/peers
    #[arg(long, requires = "peer", value_name = "PROGRAM")]
    peer_python: Option<PathBuf>,
    /// Backend, as NSA_BACKEND names it
    #[arg(long)]
    backend: Option<String>,
    /// Folder of the table (CSV) and the plots (SVG); without it: out/bench
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Measurements of whole models, and counts.
#[derive(Subcommand, Debug)]
enum OfModel {
    /// Training steps of a model, sparse and dense, against PyTorch's
    Train(train::Options),
    /// Tokens a second of a model with random weights, against the speed of memory
    Generate(generate::Options),
    /// What the CUDA kernels move and compute, counted on the simulator
    Count(count::Options),
}

/// Checks a list of options that are timed side by side.
fn check_each_once<T: PartialEq>(flag: &str, list: &[T], name: impl Fn(&T) -> &'static str) -> Result<()> {
    let twice = list.iter().enumerate().find(|(at, item)| list[..*at].contains(item));
    ensure!(twice.is_none(), "{flag} {}: must be named once", twice.map_or("", |(_, item)| name(item)));
    Ok(())
}

/// Longest length of peers without `--peer-limit`: PyTorch's takes minutes there.
const PEER_LIMIT: usize = 65_536;
/// Part of the free memory that a run may plan with.
const MEMORY_SHARE: f64 = 0.9;
/// A peer's threads spin for a while after its turn; ours wait until they sleep.
const SETTLE: Duration = Duration::from_millis(50);

impl Options {
    /// A run of half a minute.
    pub fn short(out: PathBuf) -> Self {
        Self {
            model: None,
            op: None,
            tokens: vec![1024, 2048, 4096],
            heads: Heads::default(),
            inputs: Inputs::default(),
            dtype: vec![Dtype::F32],
            pass: Pass::ALL.to_vec(),
            batch: 1,
            samples: 3,
            budget: 60.0,
            dense_limit: 65_536,
            peer: Vec::new(),
            peer_limit: None,
            peer_samples: None,
            peer_python: None,
            backend: None,
            out: Some(out),
        }
    }

    /// The rules that the argument parser does not know.
    fn validate(&self) -> Result<()> {
        for &tokens in &self.tokens {
            ensure!(tokens > 0, "--tokens {tokens}: must be at least 1");
            ensure!(i32::try_from(tokens).is_ok(), "--tokens {tokens}: must be at most {}", i32::MAX);
        }
        self.inputs.validate()?;
        let selects = !self.inputs.correlate() || self.has(Pass::Forward);
        ensure!(selects, "--query-correlation: must come with --pass forward; decoding steps have one query");
        check_each_once("--dtype", &self.dtype, |dtype| dtype.name())?;
        check_each_once("--peer", &self.peer, |peer| peer.name())?;
        let counts = [("--batch", Some(self.batch)), ("--samples", Some(self.samples))];
        for (flag, count) in counts.into_iter().chain([("--peer-samples", self.peer_samples)]) {
            ensure!(count != Some(0), "{flag} 0: must be at least 1");
        }
        let batch = self.batch;
        ensure!(i32::try_from(batch).is_ok(), "--batch {batch}: must be at most {}", i32::MAX);
        ensure!(batch == 1 || self.has(Pass::Decode), "--batch {batch}: must come with --pass decode, whose it is");
        let budget = self.budget;
        ensure!(budget.is_finite() && budget > 0.0, "--budget {budget}: must be a positive number of seconds");
        let backward_alone = self.has(Pass::Backward) && !self.has(Pass::Forward);
        ensure!(!backward_alone, "--pass backward: must come with forward, which it continues");
        if let Some(out) = &self.out {
            ensure!(!out.is_file(), "--out {}: must be a folder, and is a file", out.display());
        }
        Ok(())
    }

    fn has(&self, pass: Pass) -> bool {
        self.pass.contains(&pass)
    }

    /// Peers run where our backend does, if they can.
    fn check_peers(&self, backend: &Backend) -> Result<()> {
        for peer in &self.peer {
            ensure!(
                peer.runs_on(backend),
                "--peer {}: does not run where --backend {} does",
                peer.name(),
                backend.name()
            );
        }
        Ok(())
    }

    /// Bytes that the largest length needs.
    fn check_memory(&self, backend: &Backend, config: &NsaConfig, available: Option<u64>) -> Result<()> {
        let Some(available) = available else { return Ok(()) };
        let needs = |dtype: Dtype, tokens: usize| {
            let (problem, element) = match dtype {
                Dtype::F32 => (problem::bytes::<f32>(config, tokens), 4),
                Dtype::Bf16 | Dtype::F16 => (problem::bytes::<bf16>(config, tokens), 2),
            };
            let attention = if self.has(Pass::Forward) { problem } else { 0 };
            let size = decode::Size { batch: self.batch, context: tokens };
            let decoding = if self.has(Pass::Decode) { decode::bytes(backend, config, size, element) } else { 0 };
            attention.max(decoding)
        };
        for (&dtype, &tokens) in self.dtype.iter().flat_map(|dtype| self.tokens.iter().map(move |t| (dtype, t))) {
            let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
            let (bytes, room) = (needs(dtype, tokens), (available as f64 * MEMORY_SHARE) as u64);
            let batch = if self.batch == 1 { String::new() } else { format!(" --batch {}", self.batch) };
            ensure!(
                bytes <= room,
                "--tokens {tokens} --dtype {}{batch}: must fit {:.1} GiB of memory, and takes {:.1}",
                dtype.name(),
                gib(room),
                gib(bytes)
            );
        }
        Ok(())
    }
}

/// Runs the command.
///
/// # Errors
/// If the operator is wrong, an option does not fit, or a peer cannot be had.
pub fn run(options: &Options) -> Result<()> {
    match &options.model {
        None => {}
        Some(OfModel::Train(options)) => return train::run(options),
        Some(OfModel::Generate(options)) => return generate::run(options),
        Some(OfModel::Count(options)) => return count::run(options),
    }
    if let Some(op) = &options.op {
        return criterion::run(op);
    }
    options.validate()?;
    let config = options.heads.config()?;
    let machine = Machine::here();
    let (backend, why) = Backend::pick(options.backend.as_deref())?;
    let available = match &backend {
        Backend::Cuda(cuda) => Some(cuda.device().memory_bytes as u64),
        _ => machine.available_bytes,
    };
    options.check_memory(&backend, &config, available)?;
    options.check_peers(&backend)?;
    let out = crate::files::out(options.out.as_deref(), "bench")?;
    crate::check::quick(&backend, options.dtype.iter().copied())?;
    let load = load_note(&std::fs::read_to_string("/proc/loadavg").unwrap_or_default(), machine.threads);
    println!("{}{load}\nbackend {}: {why}", machine.line(), backend.name());
    if let Backend::Cuda(cuda) = &backend {
        println!("{}", crate::info::device_line(cuda.device()));
    }
    let memory_bytes = machine.available_bytes.map_or(u64::MAX >> 1, |bytes| (bytes as f64 * MEMORY_SHARE) as u64);
    let prepare = |&peer| Ready::prepare(peer, Work::Attention, &backend, options.peer_python.as_deref(), memory_bytes);
    let peers = options.peer.iter().map(prepare).collect::<Result<Vec<Ready>, PeerError>>()?;
    let mut run = Run { options, config: &config, backend: &backend, peers, progress: Progress::new() };
    let mut rows = Vec::new();
    let mut lengths = options.tokens.clone();
    lengths.sort_unstable();
    lengths.dedup();
    for tokens in lengths {
        for dtype in &options.dtype {
            rows.extend(match dtype {
                Dtype::F32 => run.length::<f32>(dtype.name(), tokens)?,
                Dtype::Bf16 => run.length::<bf16>(dtype.name(), tokens)?,
                Dtype::F16 => run.length::<f16>(dtype.name(), tokens)?,
            });
            run.progress.line(&format!("{tokens} tokens {} done", dtype.name()));
        }
    }
    run.progress.finish();
    println!(
        "φ is the mean. A step of decoding reads caches in memory, as in a model whose layers exceed the last cache."
    );
    if options.batch > 1 {
        println!("It is of {} sequences at once, each with a context and caches of its own.", options.batch);
    }
    println!("dense: our full attention; limit: its pairs of query and key over NSA's; rate: on the pairs of each.");
    Report { config: &config, batch: options.batch, rows }.write(&out)
}

/// What the system's load before the run says: other work makes times longer, and those of programs whose threads
/// wait for each other more than others.
fn load_note(loadavg: &str, threads: usize) -> String {
    match loadavg.split(' ').next().map(str::parse::<f64>) {
        Some(Ok(load)) if load > threads as f64 / 2.0 => {
            format!(
                ", load {load} before\nwarning: other programs are running, so that these times are too long, not all by the same factor"
            )
        }
        Some(Ok(load)) => format!(", load {load} before"),
        _ => String::new(),
    }
}

/// A contender of a length: one of ours or the peer of this number.
#[derive(Clone, Copy, Debug)]
enum Contender {
    Nsa,
    Dense,
    Peer(usize),
}

/// What stays from length to length.
struct Run<'a> {
    options: &'a Options,
    config: &'a NsaConfig,
    backend: &'a Backend,
    peers: Vec<Ready>,
    progress: Progress,
}

/// A length of one dtype.
#[derive(Clone, Copy)]
struct Length {
    tokens: usize,
    dtype: &'static str,
    element_bytes: usize,
}

impl Run<'_> {
    /// Times everything at one length.
    fn length<T: Element>(&mut self, dtype: &'static str, tokens: usize) -> Result<Vec<Row>> {
        let length = Length { tokens, dtype, element_bytes: size_of::<T>() };
        let mut rows = Vec::new();
        if self.options.has(Pass::Forward) {
            rows.extend(self.attention::<T>(length)?);
        }
        if self.options.has(Pass::Decode) {
            rows.extend(self.decoding::<T>(length)?);
        }
        Ok(rows)
    }

    fn contenders(&self) -> Vec<Contender> {
        [Contender::Nsa, Contender::Dense].into_iter().chain((0..self.peers.len()).map(Contender::Peer)).collect()
    }

    fn plan(&self, contender: Contender) -> Plan {
        let peer_samples = self.options.peer_samples.filter(|_| matches!(contender, Contender::Peer(_)));
        Plan {
            samples: peer_samples.unwrap_or(self.options.samples),
            budget_s: self.options.budget,
            compiles: matches!(self.backend, Backend::Cuda(_)),
        }
    }

    /// Why a contender does not run at this length, if it does not.
    fn beyond(&self, contender: Contender, tokens: usize) -> Option<String> {
        let (flag, limit) = match contender {
            Contender::Nsa => return None,
            Contender::Dense => ("--dense-limit", self.options.dense_limit),
            Contender::Peer(_) => ("--peer-limit", self.options.peer_limit.unwrap_or(PEER_LIMIT)),
        };
        (tokens > limit).then(|| format!("beyond {flag} {limit}"))
    }

    /// Forward and backward passes.
    fn attention<T: Element>(&mut self, length: Length) -> Result<Vec<Row>> {
        let backward = self.options.has(Pass::Backward);
        let job = Job::new(self.config, length.tokens, length.dtype, backward);
        let backend = self.backend;
        let mut problem = Problem::<T>::new(backend, self.config, length.tokens, self.options.inputs)?;
        backend.synchronize()?;
        let turn = |contender: Contender, run: &mut Self| -> Result<Result<Seconds, PeerError>> {
            type Step<T> = fn(&mut Problem<T>) -> Result<()>;
            let steps: [Step<T>; 2] = match contender {
                Contender::Nsa => [Problem::nsa_forward, Problem::nsa_backward],
                Contender::Dense => [Problem::dense_forward, Problem::dense_backward],
                Contender::Peer(at) => return Ok(run.peers[at].turn(&job)),
            };
            let passes = [Pass::Forward, Pass::Backward].into_iter().zip(steps).take(1 + usize::from(backward));
            let mut seconds_of = |step: Step<T>| -> Result<f64> {
                let start = std::time::Instant::now();
                step(&mut problem)?;
                backend.synchronize()?;
                Ok(start.elapsed().as_secs_f64())
            };
            let timed = |(pass, step): (Pass, Step<T>)| {
                // The first launches after another process has used a device pay for the switch: as much as short passes take.
                if matches!(backend, Backend::Cuda(_)) {
                    seconds_of(step)?;
                }
                Ok((pass, seconds_of(step)?))
            };
            Ok(Ok(passes.map(timed).collect::<Result<Seconds>>()?))
        };
        let passes = if backward { &[Pass::Forward, Pass::Backward][..] } else { &[Pass::Forward] };
        let rows = self.contest(length, passes, |peer| peer.attention(&job), turn)?;
        if let Some(blocks) = problem.blocks_in_common()? {
            self.progress.line(&format!("{} tokens {}: {blocks}", length.tokens, length.dtype));
        }
        Ok(rows)
    }

    /// The decoding step.
    fn decoding<T: Element>(&mut self, length: Length) -> Result<Vec<Row>> {
        let size = decode::Size { batch: self.options.batch, context: length.tokens };
        let copies = decode::layers(self.backend, self.config, size, length.element_bytes);
        let job = Job::new(self.config, length.tokens, length.dtype, false).decoding(size.batch, copies);
        let mut decoding = Decoding::<T>::new(self.backend, self.config, size)?;
        let (mut recorded, mut recorded_dense) = (None, None);
        let turn = |contender: Contender, run: &mut Self| -> Result<Result<Seconds, PeerError>> {
            let seconds = match contender {
                Contender::Nsa => decoding.nsa(&mut recorded)?,
                Contender::Dense => decoding.dense(&mut recorded_dense)?,
                Contender::Peer(at) => return Ok(run.peers[at].step().map(|s| vec![(Pass::Decode, s)])),
            };
            Ok(Ok(vec![(Pass::Decode, seconds)]))
        };
        self.contest(length, &[Pass::Decode], |peer| Ok(vec![(Pass::Decode, peer.decode(&job)?)]), turn)
    }

    /// Has peers make their inputs, lets all take turns, and makes the rows.
    fn contest(
        &mut self,
        length: Length,
        passes: &[Pass],
        make: impl Fn(&mut Ready) -> Result<Vec<(Pass, String)>, PeerError>,
        mut turn: impl FnMut(Contender, &mut Self) -> Result<Result<Seconds, PeerError>>,
    ) -> Result<Vec<Row>> {
        let contenders = self.contenders();
        let mut ways: Vec<Result<Vec<(Pass, String)>, String>> = Vec::new();
        for &contender in &contenders {
            let made = match (self.beyond(contender, length.tokens), contender) {
                (Some(reason), _) => Err(reason),
                (None, Contender::Peer(at)) if self.peers[at].peer.has(passes[0]) => {
                    self.progress.show(format!("{length}: {} prepares", self.peers[at].title));
                    about_the_shape(make(&mut self.peers[at]))?
                }
                (None, Contender::Peer(_)) => Err("this pass is not timed".to_owned()),
                (None, _) => Ok(Vec::new()),
            };
            ways.push(made);
        }
        let plans: Vec<Plan> = contenders.iter().map(|&contender| self.plan(contender)).collect();
        let outcomes = turns::take(&plans, |i, counted| {
            if let Err(reason) = &ways[i] {
                return Ok(Err(reason.clone()));
            }
            let name = self.who(contenders[i]).name().to_owned();
            self.progress.show(format!("{length}: {name}, turn {} of {}", counted + 1, plans[i].samples));
            let seconds = about_the_shape(turn(contenders[i], self)?)?;
            if matches!(contenders[i], Contender::Peer(_)) {
                std::thread::sleep(SETTLE);
            }
            Ok(seconds)
        })?;
        self.peers.iter_mut().for_each(Ready::drop_inputs);
        let mut rows = Vec::new();
        for &pass in passes {
            for ((&contender, outcome), ways) in contenders.iter().zip(&outcomes).zip(&ways) {
                let way = ways.iter().flatten().find(|(p, _)| *p == pass).map(|(_, way)| way.clone());
                rows.push(self.row(length, pass, contender, outcome, way.unwrap_or_default()));
            }
        }
        Ok(rows)
    }

    fn row(&self, length: Length, pass: Pass, contender: Contender, outcome: &Outcome<Seconds>, way: String) -> Row {
        let (times, note) = match outcome {
            Err(reason) => (None, reason.clone()),
            Ok(turns) => match Times::of(turns, pass) {
                Some(times) => (Some(times), way),
                None => (None, "this pass is not timed".to_owned()),
            },
        };
        let Length { tokens, dtype, element_bytes } = length;
        Row { tokens, dtype, element_bytes, pass, who: self.who(contender), times, note }
    }

    fn who(&self, contender: Contender) -> Who {
        match contender {
            Contender::Nsa => Who::Nsa,
            Contender::Dense => Who::Dense,
            Contender::Peer(at) => match self.peers[at].peer {
                peer::Peer::Torch => Who::PeerDense(self.peers[at].title.clone()),
                peer::Peer::Fla | peer::Peer::Lucidrains => Who::PeerSparse(self.peers[at].title.clone()),
            },
        }
    }
}

impl std::fmt::Display for Length {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tokens {}", self.tokens, self.dtype)
    }
}

/// Keeps the reason why a peer cannot run a shape; other failures end the run.
fn about_the_shape<T>(result: Result<T, PeerError>) -> Result<Result<T, String>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(error) if error.is_about_the_shape() => Ok(Err(error.to_string())),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &str) -> Result<Options, String> {
        let options: Options = arguments::parse(arguments)?;
        options.validate().and_then(|()| options.heads.config()).map_err(|error| format!("{error:#}"))?;
        Ok(options)
    }

    #[test]
    fn bad_options_are_named_with_their_values_and_rules() {
        let cases = [
            ("--tokens 1024,0", ["--tokens 0", "at least 1"]),
            ("--tokens 4294967296", ["--tokens 4294967296", "at most 2147483647"]),
            ("--samples 0", ["--samples 0", "at least 1"]),
            ("--batch 0", ["--batch 0", "at least 1"]),
            ("--batch 4294967296", ["--batch 4294967296", "at most 2147483647"]),
            ("--batch 3 --pass forward", ["--batch 3", "--pass decode"]),
            ("--peer torch --peer-samples 0", ["--peer-samples 0", "at least 1"]),
            ("--budget -1", ["--budget", "-1"]),
            ("--budget nan", ["--budget NaN", "positive"]),
            ("--pass backward", ["--pass backward", "forward"]),
            ("--peer-limit 9", ["--peer", "required"]),
            ("--peer-python python3", ["--peer", "required"]),
            ("--query-correlation 1", ["--query-correlation 1", "less than 1"]),
            ("--query-correlation 0.5 --pass decode", ["--query-correlation", "--pass forward"]),
            ("--dtype f32,bf16,f32", ["--dtype f32", "once"]),
            ("--peer torch,torch", ["--peer torch", "once"]),
            ("slc --tokens 64", ["[OP]", "cannot be used"]),
            ("--query-correlation nan", ["--query-correlation NaN", "at least 0"]),
            ("--dtype f64", ["f64", "bf16"]),
            ("--peer numpy", ["numpy", "lucidrains"]),
            ("--kv-heads 3", ["--kv-heads 3", "num_kv_heads"]),
            ("--dim-v 0", ["--dim-v 0", "head_dim_v"]),
            ("--out Cargo.toml", ["--out Cargo.toml", "folder"]),
        ];
        arguments::assert_refused(parse, &cases);
    }

    #[test]
    fn a_busy_machine_is_told() {
        assert_eq!(load_note("0.42 1.00 2.00 1/99 7\n", 2), ", load 0.42 before");
        assert!(load_note("1.20 1.00 2.00 1/99 7\n", 2).contains("warning"));
        assert_eq!(load_note("", 2), "");
    }

    #[test]
    fn good_options() {
        let options = parse("--tokens 64,128 --dtype f32,bf16 --pass decode --peer torch,lucidrains --peer-samples 1")
            .expect("legal");
        assert_eq!((options.tokens.len(), options.dtype.len(), options.peer.len()), (2, 2, 2));
        assert!(options.has(Pass::Decode) && !options.has(Pass::Forward));
        assert!(Options::short(PathBuf::from("out")).validate().is_ok());
        assert_eq!(parse("slc").expect("legal").op.as_deref(), Some("slc"));
    }

    #[test]
    fn lengths_that_do_not_fit_memory_are_named() {
        let options = parse("--tokens 1024,1048576").expect("legal");
        let config = options.heads.config().expect("valid");
        let backend = Backend::pick(None).expect("a backend").0;
        let error = options.check_memory(&backend, &config, Some(16 << 30)).expect_err("too long").to_string();
        assert!(error.contains("--tokens 1048576 --dtype f32") && error.contains("14.4 GiB"), "{error}");
        assert!(options.check_memory(&backend, &config, Some(1 << 40)).is_ok());
        assert!(options.check_memory(&backend, &config, None).is_ok());
        let options = parse("--tokens 1024 --pass decode --batch 1000000").expect("legal");
        let error = options.check_memory(&backend, &config, Some(16 << 30)).expect_err("too many").to_string();
        assert!(error.contains("--tokens 1024 --dtype f32 --batch 1000000"), "{error}");
    }
}
