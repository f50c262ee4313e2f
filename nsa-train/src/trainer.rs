//! Training: steps, validation, checkpoints.

use crate::checkpoint::{self, DataState, Loaded, Parts, State};
use crate::data::{Corpus, Sampler, Text};
use crate::eval::{EvalOptions, Evaluation};
use crate::metrics::StepLine;
use crate::model::{Batch, Capacity, Phase, initial};
use crate::network::Network;
use crate::optim::{Optimizer, gradient_norm};
use crate::schedule::learning_rate;
use crate::{Error, Result, TrainOptions};
use nsa_core::model::{ModelConfig, manifest};
use nsa_core::tokenizer::Tokenizer;
use nsa_kernels::layer::cross_entropy::Loss;
use nsa_kernels::{Backend, Buffer};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// The text of a run.
#[derive(Clone, Debug)]
pub struct Data {
    /// To train on.
    pub train: Text,
    /// To validate on, if any.
    pub validation: Option<Text>,
    /// Where it comes from.
    pub state: DataState,
    /// The model's `tokenizer.json`, if any.
    pub tokenizer: Option<PathBuf>,
}

impl Data {
    /// Tokenises (or finds in the folder `cache`) and splits the text that `state` describes; its hash is filled in. The
    /// seed chooses the validation documents.
    ///
    /// # Errors
    /// If files cannot be read or tokenised, or one of the two parts would be empty.
    pub fn open(mut state: DataState, tokenizer: &Tokenizer, cache: &Path, seed: u64) -> Result<Self> {
        if state.files.is_empty() {
            return Err(Error::value("data", "none", "there must be a file to train on"));
        }
        for files in [&mut state.files, &mut state.validation_files] {
            for file in files {
                *file = crate::files::absolute(file)?;
            }
        }
        let corpus = Arc::new(Corpus::open(&state.files, tokenizer, &state.text, cache)?);
        state.hash = corpus.hash().to_owned();
        let (train, validation) = if state.validation_files.is_empty() {
            Text::split(corpus, state.split, state.val_fraction, seed)?
        } else {
            let validation = Corpus::open(&state.validation_files, tokenizer, &state.text, cache)?;
            (Text::whole(corpus), Some(Text::whole(Arc::new(validation))))
        };
        Ok(Self { train, validation, state, tokenizer: tokenizer.path().map(Path::to_owned) })
    }
}

/// A model in training.
#[derive(Debug)]
pub struct Trainer {
    network: Network,
    grads: Buffer<f32>,
    optimizer: Optimizer<f32>,
    batch: Batch,
    sampler: Sampler,
    validation: Option<Text>,
    tokenizer: Option<PathBuf>,
    state: State,
}

impl Trainer {
    /// A model with initial parameters (those of the folder `weights`, if given) before its first step.
    ///
    /// # Errors
    /// If options, model and text do not fit together, or the weights cannot be read.
    pub fn new(
        backend: &Backend,
        config: ModelConfig,
        options: TrainOptions,
        data: Data,
        weights: Option<&Path>,
    ) -> Result<Self> {
        config.check_runnable()?;
        let params = match weights {
            None => initial(&manifest(&config), options.seed),
            Some(folder) => checkpoint::load_params(&checkpoint::resolve(folder)?, &config)?,
        };
        let state = State::start(options, data.state.clone());
        Self::assemble(backend, config, &params, data, state)
    }

    /// Goes on from a checkpoint, with the options in its state.
    ///
    /// # Errors
    /// If the text is not the checkpoint's, the checkpoint has taken more steps than the options ask for, or options, model
    /// and text do not fit together.
    pub fn resume(backend: &Backend, loaded: Loaded, data: Data) -> Result<Self> {
        loaded.check_options()?;
        let Loaded { folder, config, params, moments, mut state } = loaded;
        if state.data.hash != data.state.hash {
            let message = format!(
                "trained on text of hash {}, but the text given has {}: the position in the data means nothing there",
                state.data.hash, data.state.hash
            );
            return Err(Error::Mismatch { path: folder, message });
        }
        state.data = data.state.clone();
        let mut trainer = Self::assemble(backend, config, &params, data, state)?;
        for (buffer, values) in trainer.optimizer.moments_mut().into_iter().zip(moments) {
            buffer.write(&values)?;
        }
        Ok(trainer)
    }

    fn assemble(backend: &Backend, config: ModelConfig, params: &[f32], data: Data, mut state: State) -> Result<Self> {
        state.options.check()?;
        state.options.check_model(&config)?;
        // What the default is must not change when the run goes on with other steps.
        state.options.warmup = Some(state.options.warmup());
        let options = &state.options;
        for corpus in [Some(&data.train), data.validation.as_ref()].into_iter().flatten().map(|text| &text.corpus) {
            if corpus.vocab_size() > config.vocab_size() {
                let rule = format!("must be at most the model's vocab_size = {}", config.vocab_size());
                return Err(Error::value("tokenizer", format!("{} ids", corpus.vocab_size()), rule));
            }
        }
        let capacity = Capacity { tokens: options.batch * options.context, longest: options.context };
        let network = Network::new(backend, config, params, options.precision, capacity)?;
        Ok(Self {
            grads: network.new_gradients(),
            optimizer: network.new_optimizer(),
            batch: Batch::default(),
            sampler: Sampler::new(data.train, options.context, options.seed)?,
            validation: data.validation,
            tokenizer: data.tokenizer,
            network,
            state,
        })
    }

    /// The model.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Where training stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Options of the run.
    pub fn options(&self) -> &TrainOptions {
        &self.state.options
    }

    /// Whether all steps are done.
    pub fn is_done(&self) -> bool {
        self.state.step >= self.state.options.steps
    }

    /// Whether there is text to validate on.
    pub fn has_validation(&self) -> bool {
        self.validation.is_some()
    }

    /// Sequences of one epoch.
    pub fn sequences_per_epoch(&self) -> u64 {
        self.sampler.sequences_per_epoch()
    }

    /// Takes one step. If the loss or the gradient is not finite, parameters stay as they are.
    ///
    /// # Errors
    /// If the loss or the norm of the gradient is not finite ([`Error::Diverged`], without a checkpoint), or an operation
    /// fails.
    pub fn step(&mut self) -> Result<StepLine> {
        let backend = self.network.backend().clone();
        backend.run(|| self.timed_step())
    }

    fn timed_step(&mut self) -> Result<StepLine> {
        let start = Instant::now();
        let step = self.state.step + 1;
        let _span = tracing::debug_span!("step", step).entered();
        let options = self.state.options;
        let loss = self.accumulate(&options)?;
        if loss.count == 0 {
            let rule = format!("leaves no token to predict in step {step}: its documents are of one token each");
            return Err(Error::value("context", options.context, rule));
        }
        let mean = loss.mean();
        let diverged = |quantity, value| Error::Diverged { step, quantity, value, checkpoint: None };
        if !mean.is_finite() {
            return Err(diverged("loss", mean));
        }
        // Gradients were scaled by the number of tokens; those without a target do not count.
        let correction = options.tokens_per_step() as f64 / loss.count as f64;
        let backend = self.network.backend().clone();
        let grads = &self.grads;
        let profile = self.network.profile_mut();
        let norm = correction * profile.time(Phase::Optimizer, || gradient_norm(&backend, grads))?;
        if !norm.is_finite() {
            return Err(diverged("gradient norm", norm));
        }
        let clip = if options.clip > 0.0 && norm > options.clip { options.clip / norm } else { 1.0 };
        let lr = learning_rate(&options, step);
        let applied = Instant::now();
        self.network.optimize(&mut self.optimizer, grads, &options, (step, lr, correction * clip))?;
        self.network.profile_mut().record(Phase::Optimizer, applied.elapsed());

        self.state.step = step;
        self.state.sequences += (options.batch * options.accumulate) as u64;
        self.state.tokens += options.tokens_per_step();
        self.state.train_loss = Some(mean);
        let seconds = start.elapsed().as_secs_f64();
        Ok(StepLine {
            step,
            loss: mean,
            lr,
            grad_norm: norm,
            tokens: self.state.tokens,
            tokens_per_s: options.tokens_per_step() as f64 / seconds,
            seconds,
            precision: options.precision,
            phases: self.network.profile_mut().take(),
        })
    }

    /// Loss and gradients of the batches of one step.
    fn accumulate(&mut self, options: &TrainOptions) -> Result<Loss> {
        let grads = &mut self.grads;
        let zero = |grads: &mut Buffer<f32>| -> Result<()> {
            let len = grads.len();
            grads.tensor_mut([len])?.fill(0.0)?;
            Ok(())
        };
        self.network.profile_mut().time(Phase::Optimizer, || zero(grads))?;
        let scale = (options.tokens_per_step() as f64).recip();
        let mut total = Loss::default();
        for part in 0..options.accumulate {
            let position = self.state.sequences + (part * options.batch) as u64;
            let (sampler, batch) = (&mut self.sampler, &mut self.batch);
            self.network.profile_mut().time(Phase::Data, || sampler.fill(position, options.batch, batch))?;
            let loss = self.network.loss_and_gradients(&self.batch, scale, &mut self.grads)?;
            total.sum += loss.sum;
            total.count += loss.count;
        }
        Ok(total)
    }

    /// Evaluates the model on the validation text; `None` if there is none.
    ///
    /// # Errors
    /// If an operation fails.
    pub fn validate(&mut self) -> Result<Option<Evaluation>> {
        let Some(text) = &self.validation else { return Ok(None) };
        let _span = tracing::debug_span!("validate", step = self.state.step).entered();
        let TrainOptions { context, eval_tokens, .. } = self.state.options;
        let options = EvalOptions { context, stride: context, max_tokens: eval_tokens };
        let evaluation = self.network.evaluate(text, options)?;
        // The time of a validation is its own, not the next step's.
        self.network.profile_mut().take();
        self.state.validation_loss = Some(evaluation.loss);
        Ok(Some(evaluation))
    }

    /// Writes a checkpoint below `run` and removes old ones. Returns its folder.
    ///
    /// # Errors
    /// If a parameter is not finite ([`Error::Diverged`]; nothing is written or removed then) or a file cannot be written.
    pub fn save(&self, run: &Path) -> Result<PathBuf> {
        let _span = tracing::debug_span!("save", step = self.state.step).entered();
        let host = |buffer: &Buffer<f32>| -> Result<Vec<f32>> {
            let mut values = vec![0.0; buffer.len()];
            buffer.read(&mut values)?;
            Ok(values)
        };
        let params = host(self.network.params())?;
        if let Some(&value) = params.iter().find(|value| !value.is_finite()) {
            let (step, value) = (self.state.step, value.into());
            return Err(Error::Diverged { step, quantity: "parameter", value, checkpoint: None });
        }
        let [m, v] = self.optimizer.moments();
        let (m, v) = (host(m)?, host(v)?);
        let parts = Parts {
            config: self.network.config(),
            tokenizer: self.tokenizer.as_deref(),
            params: &params,
            moments: [&m, &v],
            state: &self.state,
        };
        checkpoint::save(run, parts, self.state.options.keep)
    }
}
