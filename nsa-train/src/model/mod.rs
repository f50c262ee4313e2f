//! The transformer: parameters in one flat buffer, activations in a reused workspace, forward and backward written out.
//!
//! Per layer, on the residual stream x `[N, C]`: x += o_proj(attention(RMSNorm(x))), x += MLP(RMSNorm(x)); then a last
//! norm and the head, fused with the loss. Positions restart in every sequence.
//!
//! Generic over the type of activations, T. Parameters are trained in A = `T::Acc`, as are their gradients, those of
//! activations, and what norms and softmax keep. With T = bf16 matrices are multiplied as rounded copies of the
//! parameters, made when these change; with T = A the gradient checks in f64 run the very code that trains in f32.

mod attention;
mod batch;
mod dense;
mod heads;
mod init;
mod mlp;
mod pass;
mod profile;
mod slots;
mod sparse;
mod workspace;

pub use batch::Batch;
pub(crate) use init::initial;
pub use profile::{Phase, Profile};
pub use workspace::{Capacity, Workspace};

use crate::{Error, Result};
use nsa_core::model::{ModelConfig, ParamSpec};
use nsa_core::{CompressKind, NsaConfig};
use nsa_kernels::layer::cross_entropy::{self, Loss};
use nsa_kernels::layer::{embedding, linear, round};
use nsa_kernels::{Backend, Buffer, Element};
use pass::Pass;
use slots::{Slots, Weights};

/// Sizes that every pass needs.
#[derive(Clone, Debug)]
pub(crate) struct Dims {
    /// C.
    pub(crate) hidden: usize,
    /// F.
    pub(crate) intermediate: usize,
    /// V.
    pub(crate) vocab: usize,
    /// Hq.
    pub(crate) heads: usize,
    /// G.
    pub(crate) groups: usize,
    /// Dk.
    pub(crate) head_dim: usize,
    /// Dv.
    pub(crate) v_head_dim: usize,
    pub(crate) eps: f64,
    pub(crate) qk_norm: bool,
    /// Whether attention is NSA.
    pub(crate) sparse: bool,
    /// Heads, dims and scale; block sizes too if attention is NSA.
    pub(crate) operator: NsaConfig,
}

impl Dims {
    fn new(config: &ModelConfig) -> Result<Self> {
        let (heads, groups) = (config.num_attention_heads(), config.num_key_value_heads());
        let (head_dim, v_head_dim) = (config.head_dim(), config.v_head_dim());
        let operator = match config.nsa_config() {
            Some(nsa) => nsa,
            // Full attention reads heads, dims and scale; blocks and φ stay at their defaults.
            None => NsaConfig::builder(heads, groups, head_dim, v_head_dim)
                .compress_kind(CompressKind::Mean)
                .scale(config.scale())
                .build()?,
        };
        Ok(Self {
            hidden: config.hidden_size(),
            intermediate: config.intermediate_size(),
            vocab: config.vocab_size(),
            heads,
            groups,
            head_dim,
            v_head_dim,
            eps: config.rms_norm_eps(),
            qk_norm: config.qk_norm(),
            sparse: config.nsa_config().is_some(),
            operator,
        })
    }

    pub(crate) fn q_shape(&self, rows: usize) -> [usize; 3] {
        [rows, self.heads, self.head_dim]
    }

    pub(crate) fn k_shape(&self, rows: usize) -> [usize; 3] {
        [rows, self.groups, self.head_dim]
    }

    pub(crate) fn v_shape(&self, rows: usize) -> [usize; 3] {
        [rows, self.groups, self.v_head_dim]
    }

    pub(crate) fn o_shape(&self, rows: usize) -> [usize; 3] {
        [rows, self.heads, self.v_head_dim]
    }
}

/// A model with its parameters.
#[derive(Debug)]
pub struct Model<T: Element> {
    backend: Backend,
    config: ModelConfig,
    dims: Dims,
    slots: Slots,
    params: Buffer<T::Acc>,
    /// The parameters in T, if that is another type.
    rounded: Option<Buffer<T>>,
}

impl<T: Element> Model<T> {
    /// A model with initial parameters, as the manifest describes them, drawn by `seed`.
    ///
    /// # Errors
    /// If the model cannot be run.
    pub fn new(backend: &Backend, config: ModelConfig, seed: u64) -> Result<Self> {
        config.check_runnable()?;
        let params: Vec<T::Acc> = initial(&nsa_core::model::manifest(&config), seed);
        Self::with_params(backend, config, &params)
    }

    /// A model with given parameters, in the order of the manifest.
    ///
    /// # Errors
    /// If the model cannot be run or has another number of parameters.
    pub fn with_params(backend: &Backend, config: ModelConfig, params: &[T::Acc]) -> Result<Self> {
        config.check_runnable()?;
        backend.check_type::<T>()?;
        let dims = Dims::new(&config)?;
        let slots = Slots::new(&config);
        if params.len() != slots.total {
            let rule = format!("the configuration has {}", slots.total);
            return Err(Error::value("number of parameters", params.len(), rule));
        }
        let params = backend.upload(params);
        let rounded = (T::DTYPE != <T::Acc as nsa_core::Element>::DTYPE).then(|| backend.alloc(params.len()));
        let mut model = Self { backend: backend.clone(), config, dims, slots, params, rounded };
        model.round()?;
        Ok(model)
    }

    /// Makes the rounded copy of the parameters anew.
    fn round(&mut self) -> Result<()> {
        let Some(rounded) = &mut self.rounded else { return Ok(()) };
        let count = self.params.len();
        let args = round::Round { x: self.params.tensor([count])?, y: rounded.tensor_mut([count])? };
        Ok(round::round(&self.backend, args)?)
    }

    fn weights(&self) -> Weights<'_, T> {
        Weights { master: &self.params, rounded: self.rounded.as_ref() }
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What runs the operations.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The tensors, in the order of every flat buffer.
    pub fn manifest(&self) -> &[ParamSpec] {
        &self.slots.specs
    }

    /// All parameters, flat.
    pub fn params(&self) -> &Buffer<T::Acc> {
        &self.params
    }

    /// Changes the parameters, flat.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn change_params(&mut self, change: impl FnOnce(&mut Buffer<T::Acc>) -> Result<()>) -> Result<()> {
        change(&mut self.params)?;
        self.round()
    }

    /// Zeros for the gradients of all parameters.
    pub fn new_gradients(&self) -> Buffer<T::Acc> {
        self.backend.alloc(self.slots.total)
    }

    pub(crate) fn dims(&self) -> &Dims {
        &self.dims
    }

    /// The loss of a batch, without gradients.
    ///
    /// # Errors
    /// If the batch does not fit the workspace or a token is not in the vocabulary.
    pub fn loss(&self, workspace: &mut Workspace<T>, batch: &Batch) -> Result<Loss> {
        self.backend.run(|| self.forward_loss(workspace, batch))
    }

    fn forward_loss(&self, workspace: &mut Workspace<T>, batch: &Batch) -> Result<Loss> {
        self.forward(workspace, batch)?;
        let (rows, dims) = (workspace.inputs.rows(), &self.dims);
        let args = cross_entropy::Forward {
            hidden: workspace.hidden.tensor([rows, dims.hidden])?,
            weight: self.weights().tensor(&self.slots.head)?,
            targets: workspace.inputs.targets.tensor([rows])?,
            losses: None,
        };
        Ok(workspace.profile.time(Phase::Head, || cross_entropy::forward(&self.backend, args))?)
    }

    /// Logits of every token of a batch, `[N, V]`: for comparisons, since training never stores them.
    ///
    /// # Errors
    /// If the batch does not fit the workspace or a token is not in the vocabulary.
    pub fn logits(&self, workspace: &mut Workspace<T>, batch: &Batch) -> Result<Vec<T>> {
        self.forward(workspace, batch)?;
        let (rows, dims) = (workspace.inputs.rows(), &self.dims);
        let shape = [rows, dims.vocab];
        let mut logits = self.backend.alloc(rows * dims.vocab);
        let args = linear::Forward {
            x: workspace.hidden.tensor([rows, dims.hidden])?,
            weight: self.weights().tensor(&self.slots.head)?,
            bias: None,
            y: logits.tensor_mut(shape)?,
            accumulate: false,
        };
        linear::forward(&self.backend, args)?;
        let mut host = vec![T::default(); rows * dims.vocab];
        logits.read(&mut host)?;
        Ok(host)
    }

    /// The loss of a batch; adds the gradients of `scale`·(sum of the losses) to `grads`.
    ///
    /// # Errors
    /// If the workspace is not for training, the batch does not fit it or a token is not in the vocabulary.
    pub fn loss_and_gradients(
        &self,
        workspace: &mut Workspace<T>,
        batch: &Batch,
        scale: f64,
        grads: &mut Buffer<T::Acc>,
    ) -> Result<Loss> {
        if workspace.grads.is_none() {
            return Err(Error::value("workspace", "for inference", "gradients need one for training"));
        }
        self.backend.run(|| {
            self.forward(workspace, batch)?;
            self.backward(workspace, scale, grads)
        })
    }

    /// Runs all layers and the last norm: `workspace.hidden`.
    fn forward(&self, workspace: &mut Workspace<T>, batch: &Batch) -> Result<()> {
        let _span = tracing::debug_span!("forward", tokens = batch.tokens().len()).entered();
        workspace.load(&self.dims, batch)?;
        let Workspace { inputs, residual, layers, hidden, rstd, rope, profile, .. } = workspace;
        let shape = [inputs.rows(), self.dims.hidden];
        let args = embedding::Forward {
            tokens: inputs.tokens.tensor([shape[0]])?,
            weight: self.weights().tensor(&self.slots.embedding)?,
            y: residual[0].tensor_mut(shape)?,
        };
        profile.time(Phase::Embedding, || embedding::forward(&self.backend, args))?;
        let mut pass =
            Pass { backend: &self.backend, dims: &self.dims, weights: self.weights(), inputs, rope, profile };
        let (turns, memories) = (residual.len(), layers.len());
        for (layer, slots) in self.slots.layers.iter().enumerate() {
            let acts = &mut layers[layer % memories];
            let (x, y) = neighbours(residual, 2 * layer % turns);
            attention::forward(&mut pass, &slots.attention, &mut acts.attention, x, y)?;
            let (x, y) = neighbours(residual, (2 * layer + 1) % turns);
            mlp::forward(&mut pass, &slots.mlp, &mut acts.mlp, x, y)?;
        }
        let last = &residual[2 * self.slots.layers.len() % turns];
        pass.norm(&self.slots.norm, shape, last, hidden, rstd)
    }

    /// The loss of what [`Model::forward`] left, and the gradients of everything.
    fn backward(&self, workspace: &mut Workspace<T>, scale: f64, grads: &mut Buffer<T::Acc>) -> Result<Loss> {
        let _span = tracing::debug_span!("backward").entered();
        let Workspace { inputs, residual, layers, hidden, rstd, rope, profile, grads: acts_grads, .. } = workspace;
        let d = acts_grads.as_mut().expect("checked by the caller");
        let shape = [inputs.rows(), self.dims.hidden];
        let args = cross_entropy::ForwardBackward {
            hidden: hidden.tensor(shape)?,
            weight: self.weights().tensor(&self.slots.head)?,
            targets: inputs.targets.tensor([shape[0]])?,
            scale,
            d_hidden: d.normed.tensor_mut(shape)?,
            d_weight: Some(self.slots.head.tensor_mut(grads)?),
        };
        let loss = profile.time(Phase::Head, || cross_entropy::forward_backward(&self.backend, args))?;
        let mut pass =
            Pass { backend: &self.backend, dims: &self.dims, weights: self.weights(), inputs, rope, profile };
        let last = &residual[2 * layers.len()];
        pass.norm_backward(&self.slots.norm, shape, (last, rstd), &d.normed, (&mut d.residual, false), grads)?;
        for (layer, (slots, acts)) in self.slots.layers.iter().zip(&*layers).enumerate().rev() {
            let x = &residual[2 * layer + 1];
            let stream = (&mut d.residual, &mut d.normed);
            mlp::backward(&mut pass, &slots.mlp, (&acts.mlp, x), &mut d.mlp, stream, grads)?;
            let x = &residual[2 * layer];
            let stream = (&mut d.residual, &mut d.normed);
            attention::backward(&mut pass, &slots.attention, (&acts.attention, x), &mut d.attention, stream, grads)?;
        }
        let args = embedding::Backward {
            tokens: inputs.tokens.tensor([shape[0]])?,
            dy: d.residual.tensor(shape)?,
            dw: self.slots.embedding.tensor_mut(grads)?,
        };
        profile.time(Phase::Embedding, || embedding::backward(&self.backend, args))?;
        Ok(loss)
    }
}

/// Buffer `i` to read and the next one, in turns, to write.
fn neighbours<T>(buffers: &mut [Buffer<T>], i: usize) -> (&Buffer<T>, &mut Buffer<T>) {
    if i + 1 < buffers.len() {
        let (left, right) = buffers.split_at_mut(i + 1);
        (&left[i], &mut right[0])
    } else {
        let (first, rest) = buffers.split_at_mut(1);
        (&rest[i - 1], &mut first[0])
    }
}
