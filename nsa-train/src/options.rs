//! What a run is asked to do.

use crate::{Error, Result};
use nsa_core::Precision;
use nsa_core::model::ModelConfig;
use serde::{Deserialize, Serialize};

/// Everything that shapes a run besides model and text. JSON: absent fields take their defaults, unknown fields are errors.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainOptions {
    /// Steps in all.
    pub steps: u64,
    /// B: sequences that pass through the model at once.
    pub batch: usize,
    /// T: tokens of a sequence.
    pub context: usize,
    /// Batches whose gradients make one step.
    pub accumulate: usize,
    /// Type of the computation.
    pub precision: Precision,
    /// Highest learning rate.
    pub lr: f64,
    /// Last learning rate.
    pub min_lr: f64,
    /// Steps over which the learning rate rises; if absent, a tenth of the steps, 100 at most. Checkpoints record the number.
    pub warmup: Option<u64>,
    /// Weight decay of matrices.
    pub weight_decay: f64,
    /// Gradients of a larger norm are scaled down to it; 0 never does.
    pub clip: f64,
    /// Decay of AdamW's mean.
    pub beta1: f64,
    /// Decay of AdamW's mean square.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Seed of initial parameters, data order and choice of validation documents.
    pub seed: u64,
    /// Steps between validations; 0 validates at the end only.
    pub eval_every: u64,
    /// Tokens of a validation; 0 takes all validation text.
    pub eval_tokens: u64,
    /// Steps between checkpoints; 0 saves at the end only.
    pub save_every: u64,
    /// Checkpoints that are kept, the newest; 0 keeps all.
    pub keep: usize,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch: 8,
            context: 512,
            accumulate: 1,
            precision: Precision::F32,
            lr: 1e-3,
            min_lr: 1e-4,
            warmup: None,
            weight_decay: 0.1,
            clip: 1.0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            seed: 1,
            eval_every: 250,
            eval_tokens: 65_536,
            save_every: 500,
            keep: 2,
        }
    }
}

impl TrainOptions {
    /// Checks every rule that concerns the options alone.
    ///
    /// # Errors
    /// The first rule broken, with the option and its value.
    pub fn check(&self) -> Result<()> {
        for (option, value) in [("batch", self.batch), ("context", self.context), ("accumulate", self.accumulate)] {
            if value == 0 {
                return Err(Error::value(option, value, "must not be zero"));
            }
        }
        if self.batch.checked_mul(self.context).is_none_or(|tokens| i32::try_from(tokens).is_err()) {
            return Err(Error::value("batch", self.batch, format!("times context = {} must fit an i32", self.context)));
        }
        // The optimizer computes in f32.
        let most = f64::from(f32::MAX);
        let finite = |option, value: f64, least: f64, rule| match (least..=most).contains(&value) {
            true => Ok(()),
            false => Err(Error::value(option, value, rule)),
        };
        let not_negative = "must be finite and not negative";
        let positive = "must be positive and finite, as an f32 too";
        finite("lr", self.lr, f64::MIN_POSITIVE, positive)?;
        finite("min-lr", self.min_lr, 0.0, not_negative)?;
        finite("weight-decay", self.weight_decay, 0.0, not_negative)?;
        finite("clip", self.clip, 0.0, not_negative)?;
        finite("eps", self.eps, f32::MIN_POSITIVE.into(), positive)?;
        for (option, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::value(option, value, "must be at least 0 and below 1"));
            }
        }
        if self.min_lr > self.lr {
            return Err(Error::value("min-lr", self.min_lr, format!("must be at most lr = {}", self.lr)));
        }
        if self.warmup() > self.steps {
            return Err(Error::value("warmup", self.warmup(), format!("must be at most steps = {}", self.steps)));
        }
        Ok(())
    }

    /// Checks every rule that concerns the options and a model.
    ///
    /// # Errors
    /// The first rule broken, with the option and its value.
    pub fn check_model(&self, config: &ModelConfig) -> Result<()> {
        let longest = config.max_position_embeddings();
        if self.context > longest {
            let rule = format!("must be at most the model's max_position_embeddings = {longest}");
            return Err(Error::value("context", self.context, rule));
        }
        Ok(())
    }

    /// Steps over which the learning rate rises.
    pub fn warmup(&self) -> u64 {
        self.warmup.unwrap_or_else(|| 100.min(self.steps / 10))
    }

    /// Tokens of one step.
    pub fn tokens_per_step(&self) -> u64 {
        self.batch as u64 * self.context as u64 * self.accumulate as u64
    }
}
