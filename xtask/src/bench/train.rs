//! `cargo xtask bench train`: whole training steps of a model, with sparse and with full attention, in f32 and in bf16,
//! against the same model in PyTorch.
//!
//! A step is what training does: gradients set to zero, forward, backward, the norm of the gradient, AdamW. All contenders
//! of a shape take turns.

use super::columns::{self, field};
use super::peer::{Peer, Ready, Work};
use super::progress::Progress;
use super::turns::{self, Outcome, Plan, Times};
use super::{MEMORY_SHARE, SETTLE, about_the_shape};
use crate::dtype::Dtype;
use crate::machine::Machine;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use comfy_table::Table;
use half::bf16;
use nsa_core::model::{AttentionKind, ModelConfig, PRESETS, rope_frequencies};
use nsa_kernels::{Backend, Buffer, Element};
use nsa_train::TrainOptions;
use nsa_train::model::{Batch, Capacity, Model, Phase, Profile, Workspace};
use nsa_train::optim::{Optimizer, gradient_norm};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

/// Options of `cargo xtask bench train`.
#[derive(Args, Debug)]
pub struct Options {
    /// Name of a preset, or a JSON file with the model's configuration, whose attention is timed both ways
    #[arg(long, value_name = "PRESET|FILE", default_value = "bench-4m")]
    model: String,
    /// Steps, as sequences × tokens of each
    #[arg(long, value_name = "BxT", value_delimiter = ',', default_values_t = [Shape(4, 1024), Shape(1, 16_384)])]
    shape: Vec<Shape>,
    /// What is computed in; parameters are f32
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Dtype::F32, Dtype::Bf16])]
    dtype: Vec<Dtype>,
    /// Steps of each contender, of which the median counts
    #[arg(long, default_value_t = 5, allow_negative_numbers = true)]
    samples: usize,
    /// Begin no further step of a contender that has spent so many seconds at a shape; one step always counts
    #[arg(long, default_value_t = 60.0, allow_negative_numbers = true)]
    budget: f64,
    /// Also time the same model with full attention in PyTorch
    #[arg(long, value_enum)]
    peer: Option<Peer>,
    /// Python that has the peer's packages, instead of installing them below target/peers
    #[arg(long, requires = "peer", value_name = "PROGRAM")]
    peer_python: Option<PathBuf>,
    /// Backend, as NSA_BACKEND names it
    #[arg(long)]
    backend: Option<String>,
    /// Folder of the table (CSV); without it: out/bench
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Sequences and tokens of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape(usize, usize);

impl Shape {
    const fn tokens(self) -> usize {
        self.0 * self.1
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.0, self.1)
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|&number: &usize| number > 0);
        let shape = text.split_once('x').and_then(|(b, t)| Some(Self(number(b)?, number(t)?)));
        let fits = |shape: &Self| shape.0.checked_mul(shape.1).is_some_and(|n| i32::try_from(n).is_ok());
        shape
            .filter(fits)
            .ok_or_else(|| "must be SEQUENCESxTOKENS, as 4x1024, both at least 1, their product an i32".to_owned())
    }
}

impl Options {
    fn validate(&self) -> Result<()> {
        ensure!(self.samples > 0, "--samples 0: must be at least 1");
        let budget = self.budget;
        ensure!(budget.is_finite() && budget > 0.0, "--budget {budget}: must be a positive number of seconds");
        ensure!(!self.dtype.contains(&Dtype::F16), "--dtype f16: training computes in f32 or bf16");
        if let Some(peer) = self.peer {
            ensure!(peer == Peer::Torch, "--peer {}: must be torch, the peer that trains a model", peer.name());
        }
        super::check_each_once("--dtype", &self.dtype, |dtype| dtype.name())?;
        Ok(())
    }

    /// The configuration with one kind of attention.
    fn config(&self, attention: AttentionKind) -> Result<ModelConfig> {
        let model = load_model(&self.model)?;
        let mut fields = model.to_fields();
        fields.attention = attention;
        let config = ModelConfig::new(fields).with_context(|| format!("--model {}", self.model))?;
        let longest = config.max_position_embeddings();
        for shape in &self.shape {
            ensure!(shape.1 <= longest, "--shape {shape}: tokens must be at most max_position_embeddings = {longest}");
        }
        Ok(config)
    }
}

/// A preset or a file.
pub(super) fn load_model(model: &str) -> Result<ModelConfig> {
    if PRESETS.contains(&model) {
        return Ok(ModelConfig::preset(model)?);
    }
    let known = || format!("--model {model}: must be a preset ({}) or a configuration's file", PRESETS.join(", "));
    nsa_core::read_json(model).with_context(known)
}

/// One of ours: a model, its optimizer and a batch of random tokens.
struct Training<T: Element> {
    model: Model<T>,
    workspace: Workspace<T>,
    grads: Buffer<f32>,
    optimizer: Optimizer<f32>,
    batch: Batch,
    options: TrainOptions,
    steps: u64,
}

impl<T: Element<Acc = f32>> Training<T> {
    fn new(backend: &Backend, config: ModelConfig, shape: Shape) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let ids = config.vocab_size() as u32;
        let mut batch = Batch::default();
        for _ in 0..shape.0 {
            let tokens: Vec<u32> = (0..=shape.1).map(|_| rng.random_range(0..ids)).collect();
            batch.push(&tokens, shape.1);
        }
        batch.finish()?;
        let model = Model::<T>::new(backend, config, 1)?;
        let capacity = Capacity { tokens: shape.tokens(), longest: shape.1 };
        let workspace = Workspace::for_training(&model, capacity)?;
        let (grads, optimizer) = (model.new_gradients(), Optimizer::new(&model));
        Ok(Self { model, workspace, grads, optimizer, batch, options: TrainOptions::default(), steps: 0 })
    }
}

/// A contender's step, and where its time went.
trait Step {
    fn step(&mut self) -> Result<(f64, Profile)>;
}

impl<T: Element<Acc = f32>> Step for Training<T> {
    fn step(&mut self) -> Result<(f64, Profile)> {
        // What a device has yet to do is whose it was asked by.
        self.model.backend().synchronize()?;
        let start = Instant::now();
        self.steps += 1;
        let count = self.grads.len();
        self.grads.tensor_mut([count])?.fill(0.0)?;
        let scale = (self.batch.tokens().len() as f64).recip();
        let loss = self.model.loss_and_gradients(&mut self.workspace, &self.batch, scale, &mut self.grads)?;
        let norm = gradient_norm(self.model.backend(), &self.grads)?;
        ensure!(loss.mean().is_finite() && norm.is_finite(), "the loss is {}, its gradient {norm}", loss.mean());
        let clip = (self.options.clip / norm).min(1.0);
        let step = (self.steps, self.options.lr, clip);
        self.optimizer.step(&mut self.model, &self.grads, &self.options, step)?;
        self.model.backend().synchronize()?;
        Ok((start.elapsed().as_secs_f64(), self.workspace.take_profile()))
    }
}

/// What the peer needs to know: [`ModelConfig`] with its defaults filled in, and [`TrainOptions`].
#[derive(Clone, Debug, Serialize)]
struct Job {
    batch: usize,
    tokens: usize,
    dtype: &'static str,
    layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    vocab_size: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    v_head_dim: usize,
    tied: bool,
    qk_norm: bool,
    eps: f64,
    scale: f64,
    initializer_range: f64,
    inv_freq: Vec<f64>,
    rope_factor: f64,
    lr: f64,
    betas: [f64; 2],
    adam_eps: f64,
    weight_decay: f64,
    clip: f64,
}

impl Job {
    fn new(config: &ModelConfig, shape: Shape, dtype: Dtype) -> Self {
        let (options, rope) = (TrainOptions::default(), rope_frequencies(config));
        Self {
            batch: shape.0,
            tokens: shape.1,
            dtype: dtype.name(),
            layers: config.num_hidden_layers(),
            hidden_size: config.hidden_size(),
            intermediate_size: config.intermediate_size(),
            vocab_size: config.vocab_size(),
            heads: config.num_attention_heads(),
            kv_heads: config.num_key_value_heads(),
            head_dim: config.head_dim(),
            v_head_dim: config.v_head_dim(),
            tied: config.tie_word_embeddings(),
            qk_norm: config.qk_norm(),
            eps: config.rms_norm_eps(),
            scale: config.scale(),
            initializer_range: config.initializer_range(),
            inv_freq: rope.inv_freq,
            rope_factor: rope.attention_factor,
            lr: options.lr,
            betas: [options.beta1, options.beta2],
            adam_eps: options.eps,
            weight_decay: options.weight_decay,
            clip: options.clip,
        }
    }
}

/// Who takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Ours(AttentionKind),
    Peer,
}

/// One contender's figures at one shape.
struct Row {
    shape: Shape,
    who: Who,
    name: String,
    dtype: Dtype,
    times: Option<Times>,
    /// Of all steps that count.
    profile: Profile,
    /// How it ran, or why it did not.
    note: String,
}

/// Runs the command.
///
/// # Errors
/// If the operator is wrong, an option does not fit, or the peer cannot be had.
pub fn run(options: &Options) -> Result<()> {
    options.validate()?;
    let configs = [AttentionKind::Nsa, AttentionKind::Dense].map(|kind| options.config(kind));
    let [sparse, dense] = configs;
    let (sparse, dense) = (sparse?, dense?);
    let (backend, why) = Backend::pick(options.backend.as_deref())?;
    let out = crate::files::out(options.out.as_deref(), "bench")?;
    crate::check::quick(&backend, options.dtype.iter().copied())?;
    let machine = Machine::here();
    let load = super::load_note(&std::fs::read_to_string("/proc/loadavg").unwrap_or_default(), machine.threads);
    println!("{}{load}\nbackend {}: {why}", machine.line(), backend.name());
    let memory_bytes = machine.available_bytes.map_or(u64::MAX >> 1, |bytes| (bytes as f64 * MEMORY_SHARE) as u64);
    let prepare = |peer| Ready::prepare(peer, Work::Training, &backend, options.peer_python.as_deref(), memory_bytes);
    let mut peer = options.peer.map(prepare).transpose()?;
    let mut rows = Vec::new();
    for &shape in &options.shape {
        rows.extend(contest(options, &backend, [&sparse, &dense], shape, peer.as_mut())?);
    }
    report(&rows, &backend, &out)
}

/// A contender that is ready, or why it is not.
enum Contender {
    Ours(Box<dyn Step>),
    Peer(Result<String, String>),
}

/// Lets all contenders of a shape take turns.
fn contest(
    options: &Options,
    backend: &Backend,
    [sparse, dense]: [&ModelConfig; 2],
    shape: Shape,
    mut peer: Option<&mut Ready>,
) -> Result<Vec<Row>> {
    let mut progress = Progress::new();
    let mut contenders = Vec::new();
    for &dtype in &options.dtype {
        for (kind, config) in [(AttentionKind::Nsa, sparse), (AttentionKind::Dense, dense)] {
            let mut step: Box<dyn Step> = match dtype {
                Dtype::F32 => Box::new(Training::<f32>::new(backend, config.clone(), shape)?),
                Dtype::Bf16 => Box::new(Training::<bf16>::new(backend, config.clone(), shape)?),
                Dtype::F16 => bail!("--dtype f16: training computes in f32 or bf16"),
            };
            // The first step touches memory for the first time; the peer's first is none of its turns either.
            step.step()?;
            contenders.push((Who::Ours(kind), dtype, Contender::Ours(step)));
        }
        if let Some(peer) = &mut peer {
            progress.show(format!("{shape} {}: {} prepares", dtype.name(), peer.title));
            let way = about_the_shape(peer.train(&Job::new(dense, shape, dtype)))?;
            contenders.push((Who::Peer, dtype, Contender::Peer(way)));
        }
    }
    let plans =
        vec![
            Plan { samples: options.samples, budget_s: options.budget, compiles: matches!(backend, Backend::Cuda(_)) };
            contenders.len()
        ];
    let outcomes = turns::take(&plans, |i, counted| {
        let (_, dtype, contender) = &mut contenders[i];
        progress.show(format!("{shape} {}: step {} of {}", dtype.name(), counted + 1, options.samples));
        match (contender, &mut peer) {
            (Contender::Ours(step), _) => Ok(Ok(step.step()?)),
            (Contender::Peer(Ok(_)), Some(peer)) => {
                let seconds = about_the_shape(peer.training_step(dtype.name()))?;
                std::thread::sleep(SETTLE);
                Ok(seconds.map(|seconds| (seconds, Profile::default())))
            }
            (Contender::Peer(Err(reason)), _) => Ok(Err(reason.clone())),
            (Contender::Peer(Ok(_)), None) => unreachable!("a peer's contender has a peer"),
        }
    })?;
    let title = peer.as_ref().map_or(String::new(), |peer| peer.title.clone());
    if let Some(peer) = peer {
        peer.drop_inputs();
    }
    progress.finish();
    let row = |((who, dtype, contender), outcome)| row(shape, (who, dtype, contender), &title, outcome);
    Ok(contenders.into_iter().zip(outcomes).map(row).collect())
}

fn row(
    shape: Shape,
    (who, dtype, contender): (Who, Dtype, Contender),
    title: &str,
    outcome: Outcome<(f64, Profile)>,
) -> Row {
    let name = match who {
        Who::Ours(AttentionKind::Nsa) => "nsa".to_owned(),
        Who::Ours(AttentionKind::Dense) => "dense".to_owned(),
        Who::Peer => title.to_owned(),
    };
    let way = if let Contender::Peer(Ok(way)) = contender { way } else { String::new() };
    match outcome {
        Ok(steps) => {
            let mut profile = Profile::default();
            steps.iter().for_each(|(_, step)| profile.add(step));
            let times = Times::of_all(steps.iter().map(|(seconds, _)| *seconds));
            Row { shape, who, name, dtype, times, profile, note: way }
        }
        Err(note) => Row { shape, who, name, dtype, times: None, profile: Profile::default(), note },
    }
}

impl Row {
    fn tokens_per_s(&self) -> Option<f64> {
        self.times.map(|times| self.shape.tokens() as f64 / times.median_s)
    }

    /// Times as fast as the contender of the same shape and type.
    fn over(&self, rows: &[Self], who: Who) -> Option<f64> {
        let same = |row: &&Self| row.shape == self.shape && row.dtype == self.dtype && row.who == who;
        let other = rows.iter().find(same).filter(|_| self.who != who)?;
        Some(self.tokens_per_s()? / other.tokens_per_s()?)
    }

    /// Milliseconds of a step that a phase takes.
    fn phase_ms(&self, phase: Phase) -> f64 {
        let steps = self.times.map_or(1, |times| times.samples);
        self.profile.seconds(phase) / steps as f64 * 1e3
    }
}

/// Prints the tables; writes `train.csv` into `out`.
fn report(rows: &[Row], backend: &Backend, out: &Path) -> Result<()> {
    println!("{}", table(rows));
    for row in rows.iter().filter(|row| !row.note.is_empty()) {
        println!("{} {} {}: {}", row.name, row.shape, row.dtype.name(), row.note);
    }
    // A device does its work after it was handed over.
    if backend.computes_in_host_memory() {
        println!("Where the time of our steps goes, ms:\n{}", phases(rows));
    }
    columns::write(out, "train.csv", &csv(rows)?)
}

fn table(rows: &[Row]) -> Table {
    let header = [&["step", "dtype", "who"][..], &columns::TIME_CELLS, &["tokens/s", "× dense", "× peer"]].concat();
    let mut table = columns::table(&header, 3);
    for row in rows {
        let number = |value: Option<f64>, digits| value.map_or(String::new(), |value| format!("{value:.digits$}"));
        let names = [&row.shape.to_string(), row.dtype.name(), &row.name].map(str::to_owned);
        let over = [Who::Ours(AttentionKind::Dense), Who::Peer].map(|who| number(row.over(rows, who), 2));
        let times = columns::time_cells(row.times);
        table.add_row(names.into_iter().chain(times).chain([number(row.tokens_per_s(), 0)]).chain(over));
    }
    table
}

/// A column for each of our contenders.
fn phases(rows: &[Row]) -> Table {
    let ours: Vec<&Row> = rows.iter().filter(|row| row.who != Who::Peer).collect();
    let titles: Vec<String> =
        ours.iter().map(|row| format!("{} {}\n{}", row.name, row.dtype.name(), row.shape)).collect();
    let header: Vec<&str> = std::iter::once("phase").chain(titles.iter().map(String::as_str)).collect();
    let mut table = columns::table(&header, 1);
    for phase in Phase::ALL.into_iter().filter(|&phase| ours.iter().any(|row| row.phase_ms(phase) > 0.0)) {
        let times = ours.iter().map(|row| format!("{:.1}", row.phase_ms(phase)));
        table.add_row(std::iter::once(phase.name().to_owned()).chain(times));
    }
    table
}

fn csv(rows: &[Row]) -> Result<String> {
    let names = ["sequences", "tokens", "dtype", "who"];
    let ratios = ["tokens_per_s", "speedup_over_dense", "speedup_over_peer", "note"];
    let fields = |row: &Row| {
        let shape = [row.shape.0, row.shape.1].map(|size| size.to_string());
        let over = [Who::Ours(AttentionKind::Dense), Who::Peer].map(|who| field(row.over(rows, who)));
        let names = [row.dtype.name().to_owned(), row.name.clone()];
        let times = columns::time_fields(row.times);
        [&shape[..], &names, &times, &[field(row.tokens_per_s())], &over, std::slice::from_ref(&row.note)].concat()
    };
    columns::csv(&[&names[..], &columns::TIME_FIELDS, &ratios].concat(), rows.iter().map(fields))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::arguments;

    fn parse(arguments: &str) -> Result<Options, String> {
        let options: Options = arguments::parse(arguments)?;
        options.validate().and_then(|()| options.config(AttentionKind::Nsa)).map_err(|error| format!("{error:#}"))?;
        Ok(options)
    }

    #[test]
    fn bad_options_are_named_with_their_values_and_rules() {
        let cases = [
            ("--shape 4", ["'4'", "4x1024"]),
            ("--shape 0x9", ["'0x9'", "at least 1"]),
            ("--shape 65536x65536", ["65536x65536", "i32"]),
            ("--shape 1x16385", ["--shape 1x16385", "16384"]),
            ("--samples 0", ["--samples 0", "at least 1"]),
            ("--budget nan", ["--budget NaN", "positive"]),
            ("--dtype f16", ["--dtype f16", "bf16"]),
            ("--peer lucidrains", ["--peer lucidrains", "torch"]),
            ("--peer fla", ["--peer fla", "torch"]),
            ("--dtype bf16,bf16", ["--dtype bf16", "once"]),
            ("--peer-python python3", ["--peer", "required"]),
            ("--model giant", ["--model giant", "bench-4m"]),
        ];
        arguments::assert_refused(parse, &cases);
        let options = parse("--model tiny-1m --shape 2x16,1x64 --dtype bf16 --peer torch").expect("legal");
        assert_eq!((options.shape, options.dtype), (vec![Shape(2, 16), Shape(1, 64)], vec![Dtype::Bf16]));
    }

    #[test]
    fn steps_of_every_kind_are_timed_and_their_phases_told() {
        let options = parse("--model tiny-1m --shape 2x40 --samples 1").expect("legal");
        let configs = [AttentionKind::Nsa, AttentionKind::Dense].map(|kind| options.config(kind).expect("valid"));
        let backend = Backend::pick(None).expect("a backend").0;
        let rows = contest(&options, &backend, configs.each_ref(), Shape(2, 40), None).expect("steps");
        assert_eq!(rows.len(), 4);
        for row in &rows {
            assert!(row.tokens_per_s().is_some_and(|rate| rate > 0.0));
            assert!(row.phase_ms(Phase::Attention) > 0.0 && row.phase_ms(Phase::Head) > 0.0);
            assert_eq!(row.phase_ms(Phase::Compression) > 0.0, row.who == Who::Ours(AttentionKind::Nsa));
        }
    }

    #[test]
    fn ratios_are_of_the_same_shape_and_type() {
        let row = |who, dtype, shape, seconds: Option<f64>| {
            let times = Times::of_all(seconds.into_iter());
            Row { shape, who, name: "x".to_owned(), dtype, times, profile: Profile::default(), note: String::new() }
        };
        let (dense, shape) = (Who::Ours(AttentionKind::Dense), Shape(4, 8));
        let rows = [
            row(Who::Ours(AttentionKind::Nsa), Dtype::Bf16, shape, Some(2.0)),
            row(dense, Dtype::Bf16, shape, Some(3.0)),
            row(Who::Peer, Dtype::Bf16, Shape(4, 16), Some(1.0)),
            row(Who::Peer, Dtype::F32, shape, Some(1.0)),
            row(Who::Peer, Dtype::Bf16, shape, Some(8.0)),
        ];
        assert_eq!((rows[0].over(&rows, dense), rows[0].over(&rows, Who::Peer)), (Some(1.5), Some(4.0)));
        assert_eq!((rows[1].over(&rows, dense), rows[0].tokens_per_s()), (None, Some(16.0)));
        let csv = csv(&rows).expect("text");
        assert!(csv.lines().nth(1).is_some_and(|line| line.starts_with("4,8,bf16,x,1,2.000000e0,")), "{csv}");
        assert!(table(&rows).to_string().contains("4.00"));
    }
}
