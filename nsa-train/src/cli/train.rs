//! `nsa-train train`.

use super::{Attention, load_model, load_tokenizer, pick_backend};
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use nsa_core::model::{ModelConfig, TokenizerKind, memory_plan};
use nsa_core::object::Object;
use nsa_core::tokenizer::{TOKENIZER_FILE, Tokenizer};
use nsa_core::units::{Bytes, Count};
use nsa_kernels::Backend;
use nsa_train::checkpoint::{self, DataState};
use nsa_train::data::{Split, TextOptions, unescape};
use nsa_train::progress::{Progress, profile_table, validation_text};
use nsa_train::run::{Outcome, lock, run};
use nsa_train::trainer::{Data, Trainer};
use nsa_train::{Precision, TrainOptions};
use std::fmt::Display;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit code of a run that a signal ended.
const INTERRUPTED: u8 = 130;

/// Train a model on text files.
///
/// SIGINT or SIGTERM finishes the step, saves a checkpoint and exits with code 130; a second one exits at once. A loss that
/// is not finite stops the run with code 1; the last checkpoint stays.
#[derive(Debug, clap::Args)]
pub struct TrainArgs {
    /// Name of a preset, or a JSON file with the model's configuration.
    #[arg(long, value_name = "PRESET|FILE", required_unless_present = "resume", conflicts_with = "resume")]
    model: Option<String>,
    /// Attention, if not the configuration's.
    #[arg(long, value_enum, conflicts_with = "resume")]
    attention: Option<Attention>,
    /// Folder of the run: checkpoints, metrics.jsonl, loss.svg.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Go on from a checkpoint, bit for bit: the newest below --out, or the one given. Options given besides replace the
    /// checkpoint's.
    #[arg(long, value_name = "CHECKPOINT", num_args = 0..=1, default_missing_value = "latest")]
    resume: Option<PathBuf>,
    /// Start from the weights of a checkpoint, or of any model's folder that has them in one safetensors file or several.
    #[arg(long, value_name = "CHECKPOINT", conflicts_with = "resume")]
    init: Option<PathBuf>,
    /// Print the share of each part of the work at the end. (On a GPU: of handing it over; who waits for a result, the head or
    /// the optimizer, waits for all work before.)
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    options: OptionArgs,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Text")]
struct DataArgs {
    /// UTF-8 files to train on, each a document unless --document-separator divides it.
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "resume")]
    data: Vec<PathBuf>,
    /// Files to validate on, instead of a part of the training files.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    val_data: Vec<PathBuf>,
    /// Text between documents of a file; \f, \n, \r, \t, \0 and \\ are understood.
    #[arg(long, value_name = "TEXT", conflicts_with = "resume")]
    document_separator: Option<String>,
    /// How validation text is taken out of the training files [default: auto].
    #[arg(long, value_enum, conflicts_with = "resume")]
    split: Option<SplitArg>,
    /// How much of it [default: 0.1].
    #[arg(long, value_name = "SHARE", conflicts_with = "resume", allow_negative_numbers = true)]
    val_fraction: Option<f64>,
    /// Hugging Face tokenizer.json [default: bytes, or the file beside the model's configuration].
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    tokenizer: Option<PathBuf>,
    /// Folder for tokenised text [default: `data` in the run's folder].
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SplitArg {
    /// By document if there are two or more, else by offset.
    Auto,
    /// Whole documents, chosen by the seed.
    Documents,
    /// The end of the last documents.
    Offset,
}

impl From<SplitArg> for Split {
    fn from(split: SplitArg) -> Self {
        match split {
            SplitArg::Auto => Self::Auto,
            SplitArg::Documents => Self::Documents,
            SplitArg::Offset => Self::Offset,
        }
    }
}

macro_rules! option_args {
    ($($(#[$doc:meta])* $name:ident: $type:ty),* $(,)?) => {
        #[derive(Debug, clap::Args)]
        #[command(next_help_heading = "Options of the run")]
        struct OptionArgs {
            /// JSON file with options of the run; those below replace its values.
            #[arg(long, value_name = "FILE", conflicts_with = "resume")]
            options: Option<PathBuf>,
            $($(#[$doc])* #[arg(long, allow_negative_numbers = true)] $name: Option<$type>),*
        }

        impl OptionArgs {
            /// Replaces what is given; says so if it was another value.
            fn apply(&self, options: &mut TrainOptions, say: bool) {
                $(replace(stringify!($name), &mut options.$name, self.$name, say);)*
            }
        }
    };
}

/// Replaces `field` by what is given; says so if it was another value.
fn replace<T, F>(name: &str, field: &mut F, given: Option<T>, say: bool)
where
    T: Copy + PartialEq + Display,
    F: Copy + From<T> + Into<Option<T>>,
{
    let Some(value) = given else { return };
    let before: Option<T> = (*field).into();
    if let Some(before) = before.filter(|&before| say && before != value) {
        tracing::warn!("option {name}: {value} replaces the checkpoint's {before}");
    }
    *field = value.into();
}

option_args! {
    /// Steps in all [default: 1000].
    steps: u64,
    /// Sequences that pass through the model at once [default: 8].
    batch: usize,
    /// Tokens of a sequence [default: 512].
    context: usize,
    /// Batches whose gradients make one step [default: 1].
    accumulate: usize,
    /// Type of activations and products, f32 or bf16; parameters and optimizer are f32 in any case [default: f32].
    precision: Precision,
    /// Highest learning rate [default: 1e-3].
    lr: f64,
    /// Last learning rate [default: 1e-4].
    min_lr: f64,
    /// Steps over which the learning rate rises [default: a tenth of the steps, 100 at most].
    warmup: u64,
    /// Weight decay of matrices [default: 0.1].
    weight_decay: f64,
    /// Largest norm of the gradient; 0 for any [default: 1].
    clip: f64,
    /// Decay of AdamW's mean [default: 0.9].
    beta1: f64,
    /// Decay of AdamW's mean square [default: 0.95].
    beta2: f64,
    /// Added to the root of the mean square [default: 1e-8].
    eps: f64,
    /// Seed of initial parameters, data order and choice of validation documents [default: 1].
    seed: u64,
    /// Steps between validations; 0 validates at the end only [default: 250].
    eval_every: u64,
    /// Tokens of a validation; 0 takes all validation text [default: 65536].
    eval_tokens: u64,
    /// Steps between checkpoints; 0 saves at the end only [default: 500].
    save_every: u64,
    /// Newest checkpoints that are kept; 0 keeps all [default: 2].
    keep: usize,
}

/// Runs the command.
pub fn train(args: TrainArgs, backend: Option<&str>) -> Result<ExitCode> {
    let backend = pick_backend(backend)?;
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let opening = lock(&args.out)?;
    let mut trainer = match &args.resume {
        Some(from) => resume(&args, from, &backend)?,
        None => start(&args, &backend)?,
    };
    // The run holds the folder from here on.
    drop(opening);
    let (options, step) = (*trainer.options(), trainer.state().step);
    announce(&trainer);
    let stop = stop_on_signal()?;
    let mut progress = Progress::new(&options, step);
    let result = run(&mut trainer, &args.out, &stop, &mut |event| progress.show(event));
    progress.finish();
    let outcome = result?;
    report(&outcome, &options, args.profile);
    Ok(if outcome.interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

fn start(args: &TrainArgs, backend: &Backend) -> Result<Trainer> {
    if let Some((_, found)) = checkpoint::list(&args.out)?.pop() {
        bail!("{} is there already: go on with --resume, or choose another --out", found.display());
    }
    let model = args.model.as_deref().unwrap_or_default();
    let config = load_model(model, args.attention)?;
    let (config, tokenizer) = load_tokenizer(config, model, args.data.tokenizer.as_deref())?;
    let mut options = match &args.options.options {
        Some(path) => nsa_core::read_json(path).map(|Object(options)| options)?,
        None => TrainOptions::default(),
    };
    args.options.apply(&mut options, false);
    options.check()?;
    options.check_model(&config)?;
    if let Some(path) = tokenizer.path() {
        checkpoint::keep_tokenizer(path, &args.out)?;
    }
    let state = DataState { val_fraction: 0.1, ..DataState::default() };
    let data = open_data(args, &config, state, &options)?;
    Ok(Trainer::new(backend, config, options, data, args.init.as_deref())?)
}

fn resume(args: &TrainArgs, from: &Path, backend: &Backend) -> Result<Trainer> {
    let from = if from == Path::new("latest") { &args.out } else { from };
    let folder = checkpoint::resolve(from)?;
    let mut loaded = checkpoint::load(&folder)?;
    if let Some((_, newer)) = checkpoint::list(&args.out)?.pop().filter(|&(step, _)| step > loaded.state.step) {
        bail!("{} is newer than {}: remove it, or choose another --out", newer.display(), folder.display());
    }
    let same_seed = args.options.seed.is_none_or(|seed| seed == loaded.state.options.seed);
    ensure!(same_seed, "--seed differs from the checkpoint's {}: it orders the data", loaded.state.options.seed);
    let apart = args.data.val_data.is_empty() || !loaded.state.data.validation_files.is_empty();
    ensure!(apart, "--val-data: the checkpoint validates on a part of the training files");
    args.options.apply(&mut loaded.state.options, true);
    loaded.check_options()?;
    if loaded.config.tokenizer() == TokenizerKind::File {
        // The checkpoint may be removed during the run.
        checkpoint::keep_tokenizer(&folder.join(TOKENIZER_FILE), &args.out)?;
    }
    let data = open_data(args, &loaded.config, loaded.state.data.clone(), &loaded.state.options)?;
    Ok(Trainer::resume(backend, loaded, data)?)
}

/// The text: what `state` says, as far as arguments do not replace it.
fn open_data(args: &TrainArgs, config: &ModelConfig, mut state: DataState, options: &TrainOptions) -> Result<Data> {
    let given = &args.data;
    if !given.data.is_empty() {
        state.files.clone_from(&given.data);
    }
    if !given.val_data.is_empty() {
        state.validation_files.clone_from(&given.val_data);
    }
    let separator = given.document_separator.as_deref().map(unescape).transpose()?;
    state.text = TextOptions {
        separator: separator.or(state.text.separator),
        bos: config.bos_token_id(),
        eos: config.eos_token_id(),
    };
    state.split = given.split.map_or(state.split, Split::from);
    state.val_fraction = given.val_fraction.unwrap_or(state.val_fraction);
    let tokenizer = Tokenizer::for_model(config, &args.out)?;
    let cache = given.cache.clone().unwrap_or_else(|| args.out.join("data"));
    Ok(Data::open(state, &tokenizer, &cache, options.seed)?)
}

fn announce(trainer: &Trainer) {
    let (options, config) = (trainer.options(), trainer.network().config());
    let plan = memory_plan(config, options.batch * options.context);
    let steps = match trainer.is_done() {
        true => format!("all {} steps are done", options.steps),
        false => format!("steps {} to {}", trainer.state().step + 1, options.steps),
    };
    tracing::info!(
        "{} parameters, {} tokens a step, about {}; {} sequences of {} tokens an epoch; {steps}",
        Count(plan.params.total),
        options.tokens_per_step(),
        Bytes(plan.training_bytes()),
        trainer.sequences_per_epoch(),
        options.context,
    );
    if !trainer.has_validation() {
        tracing::warn!("there is no validation text");
    }
}

fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        // Nobody may be there to read it.
        let _ = writeln!(io::stderr(), "stopping after this step; once more to stop at once");
    })
    .context("setting the signal handler")?;
    Ok(stop)
}

/// Says what came out. The run is saved, whether anybody reads it or not.
fn report(outcome: &Outcome, options: &TrainOptions, profile: bool) {
    if profile {
        let _ = write!(io::stderr(), "{}", profile_table(&outcome.profile, outcome.steps_taken, outcome.seconds));
    }
    let _ = io::stdout().write_all(summary(outcome, options).as_bytes());
}

fn summary(outcome: &Outcome, options: &TrainOptions) -> String {
    let (step, steps, checkpoint) = (outcome.step, options.steps, outcome.checkpoint.display());
    if outcome.interrupted {
        return format!("interrupted at step {step} of {steps}; saved {checkpoint}; go on with --resume\n");
    }
    let validation = outcome.validation.as_ref().map_or(String::new(), |line| validation_text(line) + "\n");
    let tokens = (outcome.steps_taken * options.tokens_per_step()) as f64;
    let speed = tokens / outcome.seconds.max(1e-9);
    let plot = outcome.plot.as_ref().map_or(String::new(), |plot| format!("loss curve: {}\n", plot.display()));
    format!("{validation}{steps} steps done ({speed:.0} tokens/s); saved {checkpoint}\n{plot}")
}
