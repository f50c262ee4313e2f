//! The weights of a model and the memory of its passes, in the type that it computes in.

use super::layers::Layer;
use super::recorded::Recorded;
use super::workspace::Workspace;
use crate::Result;
use crate::cache::{AnyCache, Cache};
use crate::weights::{F32Weight, Weight, Weights};
use half::bf16;
use nsa_core::model::{ModelConfig, rope_frequencies};
use nsa_kernels::layer::rope::RopeCache;
use nsa_kernels::layer::round::{self, Widen};
use nsa_kernels::{Backend, Buffer, Element};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The weights, and what passes leave for the next ones, in the type that the model computes in.
#[derive(Debug)]
pub(super) enum AnyNet {
    F32(Net<f32>),
    Bf16(Net<bf16>),
}

/// The same in one type.
#[derive(Debug)]
pub(super) struct Net<T: Activation> {
    pub(super) embed: Weight,
    pub(super) layers: Vec<Layer<T>>,
    pub(super) norm: F32Weight,
    pub(super) head: Weight,
    pub(super) rope: RopeCache<f32>,
    idle: Mutex<Vec<Idle<T>>>,
}

/// A type that a model computes in.
pub(crate) trait Activation: Element<Acc = f32> {
    /// A sequence's caches, which are of that type.
    fn cache(cache: &mut AnyCache) -> &mut Cache<Self>;

    /// The first `len` elements of `x` in the type of sums: `x` itself, or written to `wide`.
    ///
    /// # Errors
    /// If a device refuses.
    fn widened<'a>(
        backend: &Backend,
        x: &'a Buffer<Self>,
        wide: &'a mut Buffer<f32>,
        len: usize,
    ) -> Result<&'a Buffer<f32>>;
}

impl Activation for f32 {
    fn cache(cache: &mut AnyCache) -> &mut Cache<Self> {
        match cache {
            AnyCache::F32(cache) => cache,
            AnyCache::Bf16(_) => unreachable!("caches are made for the model's precision"),
        }
    }

    fn widened<'a>(_: &Backend, x: &'a Buffer<f32>, _: &'a mut Buffer<f32>, _: usize) -> Result<&'a Buffer<f32>> {
        Ok(x)
    }
}

impl Activation for bf16 {
    fn cache(cache: &mut AnyCache) -> &mut Cache<Self> {
        match cache {
            AnyCache::Bf16(cache) => cache,
            AnyCache::F32(_) => unreachable!("caches are made for the model's precision"),
        }
    }

    fn widened<'a>(
        backend: &Backend,
        x: &'a Buffer<bf16>,
        wide: &'a mut Buffer<f32>,
        len: usize,
    ) -> Result<&'a Buffer<f32>> {
        round::widen(backend, Widen { x: x.tensor([len])?, y: wide.tensor_mut([len])? })?;
        Ok(wide)
    }
}

/// What passes leave for the next ones.
#[derive(Debug)]
pub(super) struct Idle<T: Activation> {
    pub(super) workspace: Workspace<T>,
    /// Decoding steps, where the backend repeats recorded work.
    pub(super) recorded: Option<Recorded<T>>,
}

impl<T: Activation> Net<T> {
    /// Takes the weights out of the checkpoint.
    pub(super) fn take(config: &ModelConfig, weights: &mut Weights, backend: &Backend) -> Result<Self> {
        let embed = weights.take("model.embed_tokens.weight")?;
        let head = match config.tie_word_embeddings() {
            true => embed.clone(),
            false => weights.take("lm_head.weight")?,
        };
        let norm = weights.take_numbers("model.norm.weight")?;
        let layers = (0..config.num_hidden_layers()).map(|i| Layer::take(config, weights, i));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let (table, positions) = (rope_frequencies(config), config.max_position_embeddings());
        let rope = RopeCache::new(backend, &table.inv_freq, table.attention_factor, positions);
        Ok(Self { embed, layers, norm, head, rope, idle: Mutex::default() })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle<T>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Model::recorded_steps`](super::Model::recorded_steps).
    pub(super) fn recorded_steps(&self) -> usize {
        self.idle().iter().filter_map(|idle| idle.recorded.as_ref()).map(Recorded::len).sum()
    }

    /// Runs `work` with a workspace that no other pass uses.
    pub(super) fn with_workspace<R>(&self, backend: &Backend, work: impl FnOnce(&mut Idle<T>) -> R) -> R {
        let idle = self.idle().pop();
        let mut idle = idle.unwrap_or_else(|| Idle {
            workspace: Workspace::new(backend, self.layers.len()),
            recorded: Recorded::new(backend),
        });
        let result = work(&mut idle);
        self.idle().push(idle);
        result
    }
}
