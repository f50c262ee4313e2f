//! A model with the memory of its steps, in the precision that a run asks for.

use crate::data::Text;
use crate::eval::{EvalOptions, Evaluation, evaluate};
use crate::model::{Batch, Capacity, Model, Profile, Workspace};
use crate::optim::Optimizer;
use crate::{Precision, Result, TrainOptions};
use half::bf16;
use nsa_core::model::ModelConfig;
use nsa_kernels::layer::cross_entropy::Loss;
use nsa_kernels::{Backend, Buffer, Element};

/// A model in training. Its parameters are f32, whatever it computes in.
#[derive(Debug)]
pub enum Network {
    /// In f32.
    F32(Trained<f32>),
    /// In bf16.
    Bf16(Trained<bf16>),
}

/// A model and its workspace.
#[derive(Debug)]
pub struct Trained<T: Element> {
    /// The model.
    pub model: Model<T>,
    workspace: Workspace<T>,
}

impl<T: Element<Acc = f32>> Trained<T> {
    fn new(backend: &Backend, config: ModelConfig, params: &[f32], capacity: Capacity) -> Result<Self> {
        let model = Model::with_params(backend, config, params)?;
        let workspace = Workspace::for_training(&model, capacity)?;
        Ok(Self { model, workspace })
    }
}

macro_rules! either {
    ($network:expr, $trained:ident => $value:expr) => {
        match $network {
            Network::F32($trained) => $value,
            Network::Bf16($trained) => $value,
        }
    };
}

impl Network {
    pub(crate) fn new(
        backend: &Backend,
        config: ModelConfig,
        params: &[f32],
        precision: Precision,
        capacity: Capacity,
    ) -> Result<Self> {
        Ok(match precision {
            Precision::F32 => Self::F32(Trained::new(backend, config, params, capacity)?),
            Precision::Bf16 => Self::Bf16(Trained::new(backend, config, params, capacity)?),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        either!(self, trained => trained.model.config())
    }

    /// All parameters, flat.
    pub fn params(&self) -> &Buffer<f32> {
        either!(self, trained => trained.model.params())
    }

    pub(crate) fn backend(&self) -> &Backend {
        either!(self, trained => trained.model.backend())
    }

    pub(crate) fn new_gradients(&self) -> Buffer<f32> {
        either!(self, trained => trained.model.new_gradients())
    }

    pub(crate) fn new_optimizer(&self) -> Optimizer<f32> {
        either!(self, trained => Optimizer::new(&trained.model))
    }

    pub(crate) fn profile_mut(&mut self) -> &mut Profile {
        either!(self, trained => trained.workspace.profile_mut())
    }

    pub(crate) fn loss_and_gradients(&mut self, batch: &Batch, scale: f64, grads: &mut Buffer<f32>) -> Result<Loss> {
        either!(self, trained => trained.model.loss_and_gradients(&mut trained.workspace, batch, scale, grads))
    }

    /// Applies a step; its time belongs to the optimizer.
    pub(crate) fn optimize(
        &mut self,
        optimizer: &mut Optimizer<f32>,
        grads: &Buffer<f32>,
        options: &TrainOptions,
        step: (u64, f64, f64),
    ) -> Result<()> {
        either!(self, trained => optimizer.step(&mut trained.model, grads, options, step))
    }

    pub(crate) fn evaluate(&mut self, text: &Text, options: EvalOptions) -> Result<Evaluation> {
        either!(self, trained => evaluate(&trained.model, &mut trained.workspace, text, options))
    }
}
