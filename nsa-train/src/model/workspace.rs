//! Memory of a step: allocated once for the largest step, reused by every step.

use super::attention::{AttentionActs, AttentionGrads};
use super::mlp::{MlpActs, MlpGrads};
use super::profile::Profile;
use super::{Batch, Dims, Model};
use crate::{Error, Result};
use nsa_core::{CuSeqlens, Packing, index};
use nsa_kernels::layer::rope::RopeCache;
use nsa_kernels::{Backend, Buffer, Element};

/// The largest step that a [`Workspace`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Tokens of all sequences.
    pub tokens: usize,
    /// Tokens of one sequence.
    pub longest: usize,
}

/// What the current batch is, in the backend's memory.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// `[N]`.
    pub(crate) tokens: Buffer<u32>,
    /// `[N]`.
    pub(crate) targets: Buffer<u32>,
    /// Position of each token in its sequence `[N]`.
    pub(crate) positions: Buffer<i32>,
    /// Position of the first token of each compression block `[M]`.
    pub(crate) block_positions: Buffer<i32>,
    pub(crate) packing: Packing,
    /// Offsets of the compression blocks.
    pub(crate) blocks: CuSeqlens,
    staging: Vec<i32>,
}

impl Inputs {
    fn new(backend: &Backend, tokens: usize, blocks: usize) -> Result<Self> {
        let none = CuSeqlens::from_lengths([])?;
        Ok(Self {
            tokens: backend.upload(&vec![0; tokens]),
            targets: backend.upload(&vec![0; tokens]),
            positions: backend.upload(&vec![0; tokens]),
            block_positions: backend.upload(&vec![0; blocks]),
            packing: Packing::new(none.clone()),
            blocks: none,
            staging: Vec::with_capacity(tokens.max(blocks)),
        })
    }

    /// N.
    pub(crate) fn rows(&self) -> usize {
        self.packing.num_tokens()
    }

    /// M.
    pub(crate) fn block_rows(&self) -> usize {
        self.blocks.total()
    }

    fn load(&mut self, dims: &Dims, batch: &Batch) -> Result<()> {
        self.packing = batch.packing().clone();
        self.tokens.write(batch.tokens())?;
        self.targets.write(batch.targets())?;
        self.staging.clear();
        self.staging.extend(self.packing.seqs().flat_map(|seq| 0..seq.rows.len() as i32));
        self.positions.write(&self.staging)?;
        if dims.sparse {
            self.blocks = self.packing.cu_blocks(&dims.operator)?;
            let stride = dims.operator.compress_stride();
            self.staging.clear();
            let of_sequence = |s| (0..self.blocks.range(s).len()).map(|i| (i * stride) as i32);
            self.staging.extend((0..self.blocks.num_seqs()).flat_map(of_sequence));
            self.block_positions.write(&self.staging)?;
        }
        Ok(())
    }
}

/// What one layer leaves for its backward pass.
#[derive(Debug)]
pub(crate) struct LayerActs<T: Element> {
    pub(crate) attention: AttentionActs<T>,
    pub(crate) mlp: MlpActs<T>,
}

/// Gradients of activations, shared by all layers.
#[derive(Debug)]
pub(crate) struct GradActs<T: Element> {
    /// Gradient of the residual stream `[N, C]`.
    pub(crate) residual: Buffer<T::Acc>,
    /// Gradient of a norm's output `[N, C]`.
    pub(crate) normed: Buffer<T::Acc>,
    pub(crate) attention: AttentionGrads<T>,
    pub(crate) mlp: MlpGrads<T>,
}

/// Activations, and for training their gradients.
///
/// Made once; steps of any size up to its [`Capacity`] run in it without further allocation.
#[derive(Debug)]
pub struct Workspace<T: Element> {
    pub(super) capacity: Capacity,
    pub(super) inputs: Inputs,
    /// Residual stream before each half layer and at the end; two in turns for inference.
    pub(super) residual: Vec<Buffer<T>>,
    /// One a layer; a single one for inference.
    pub(super) layers: Vec<LayerActs<T>>,
    /// Output of the last norm `[N, C]`, and its 1/rms.
    pub(super) hidden: Buffer<T>,
    pub(super) rstd: Buffer<T::Acc>,
    pub(super) grads: Option<GradActs<T>>,
    pub(super) rope: RopeCache<T::Acc>,
    pub(super) profile: Profile,
}

impl<T: Element> Workspace<T> {
    /// Memory for forward and backward passes.
    ///
    /// # Errors
    /// If the capacity exceeds what an i32 offset addresses.
    pub fn for_training(model: &Model<T>, capacity: Capacity) -> Result<Self> {
        let layers = model.config().num_hidden_layers();
        let mut workspace = Self::new(model, capacity, layers, 2 * layers + 1)?;
        let (backend, dims) = (model.backend(), model.dims());
        let sizes = Sizes::new(dims, capacity);
        workspace.grads = Some(GradActs {
            residual: backend.alloc(sizes.tokens * dims.hidden),
            normed: backend.alloc(sizes.tokens * dims.hidden),
            attention: AttentionGrads::new(backend, dims, sizes),
            mlp: MlpGrads::new(backend, dims, sizes.tokens),
        });
        Ok(workspace)
    }

    /// Memory for forward passes only: that of one layer.
    ///
    /// # Errors
    /// If the capacity exceeds what an i32 offset addresses.
    pub fn for_inference(model: &Model<T>, capacity: Capacity) -> Result<Self> {
        Self::new(model, capacity, 1, 2)
    }

    fn new(model: &Model<T>, capacity: Capacity, layers: usize, residuals: usize) -> Result<Self> {
        let (backend, dims) = (model.backend(), model.dims());
        CuSeqlens::single(capacity.tokens)?;
        let sizes = Sizes::new(dims, capacity);
        let table = nsa_core::model::rope_frequencies(model.config());
        Ok(Self {
            capacity,
            inputs: Inputs::new(backend, sizes.tokens, sizes.blocks)?,
            residual: (0..residuals).map(|_| backend.alloc(sizes.tokens * dims.hidden)).collect(),
            layers: (0..layers)
                .map(|_| LayerActs {
                    attention: AttentionActs::new(backend, dims, sizes),
                    mlp: MlpActs::new(backend, dims, sizes.tokens),
                })
                .collect(),
            hidden: backend.alloc(sizes.tokens * dims.hidden),
            rstd: backend.alloc(sizes.tokens),
            grads: None,
            rope: RopeCache::new(backend, &table.inv_freq, table.attention_factor, capacity.longest),
            profile: Profile::default(),
        })
    }

    /// The largest step that fits.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Takes a batch in.
    pub(super) fn load(&mut self, dims: &Dims, batch: &Batch) -> Result<()> {
        for (option, value, limit) in [
            ("tokens of a batch", batch.tokens().len(), self.capacity.tokens),
            ("longest sequence of a batch", batch.longest(), self.capacity.longest),
        ] {
            if value > limit {
                return Err(Error::value(option, value, format!("the workspace holds {limit}")));
            }
        }
        self.inputs.load(dims, batch)
    }

    /// Seconds spent since the last call, by phase.
    pub fn take_profile(&mut self) -> Profile {
        self.profile.take()
    }

    /// The profile, to time work around the model.
    pub(crate) fn profile_mut(&mut self) -> &mut Profile {
        &mut self.profile
    }

    /// Blocks that layer `layer` selected in the last pass, `[N, G, n]`; `None` when attention is dense. In a workspace for
    /// inference only the last layer's remain.
    ///
    /// # Errors
    /// If the backend's memory cannot be read.
    pub fn selected_blocks(&self, model: &Model<T>, layer: usize) -> Result<Option<Vec<i32>>> {
        let acts = &self.layers[layer % self.layers.len()].attention;
        acts.selected_blocks(model.dims(), self.inputs.rows())
    }
}

/// Rows of the largest step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) tokens: usize,
    /// Compression blocks of one sequence of all tokens: no division into more sequences has more.
    pub(crate) blocks: usize,
}

impl Sizes {
    fn new(dims: &Dims, capacity: Capacity) -> Self {
        let blocks = if dims.sparse { index::num_blocks(&dims.operator, capacity.tokens) } else { 0 };
        Self { tokens: capacity.tokens, blocks }
    }
}
