//! The forward pass: new tokens of several sequences, each after what its caches hold.

use super::Inner;
use super::attention::{self, Caches};
use super::blocks::NewBlocks;
use super::layers::{AttentionWeights, Layer, embed, norm, project, project_all};
use super::net::{Activation, AnyNet, Idle, Net};
use super::workspace::{Workspace, fit};
use crate::Result;
use crate::cache::{AnyCache, Cache};
use nsa_core::{CuSeqlens, DType, Packing};
use nsa_kernels::layer::{linear, swiglu};

/// New tokens of one sequence.
#[derive(Debug)]
pub(crate) struct NewTokens<'a> {
    /// The sequence's caches; as long as the tokens before `tokens`.
    pub(crate) cache: &'a mut AnyCache,
    /// At least one.
    pub(crate) tokens: &'a [u32],
}

/// One sequence of a pass, its caches in the type that is computed in.
pub(super) struct Run<'a, T: Activation> {
    pub(super) cache: &'a mut Cache<T>,
    pub(super) tokens: &'a [u32],
}

/// Which logits a pass returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// None: the tokens only go to the caches.
    None,
    /// Those of the last token of each sequence, `[S, V]`.
    Last,
    /// Those of every token, `[N, V]`.
    All,
}

/// What all layers of a pass share.
pub(super) struct Pass<'a, T: Activation> {
    pub(super) model: &'a Inner,
    pub(super) net: &'a Net<T>,
    pub(super) packing: Packing,
    /// Every sequence has one new token.
    pub(super) is_step: bool,
    /// Compression blocks that the new tokens complete, if any.
    pub(super) new_blocks: Option<NewBlocks>,
    wanted: Wanted,
}

impl<T: Activation> Pass<'_, T> {
    /// N.
    pub(super) fn rows(&self) -> usize {
        self.packing.num_tokens()
    }

    pub(super) fn eps(&self) -> f64 {
        self.model.config.rms_norm_eps()
    }
}

impl Inner {
    /// Runs the new tokens of each sequence and appends them to its caches; writes the logits wanted to `logits`. Returns
    /// the token-rows of keys and values that each sequence's attention read in one layer, when the pass was a decoding
    /// step.
    ///
    /// After an error the caches are in pieces: the caller must drop them.
    pub(crate) fn forward(
        &self,
        sequences: &mut [NewTokens<'_>],
        wanted: Wanted,
        logits: &mut Vec<f32>,
    ) -> Result<Vec<usize>> {
        match &self.net {
            AnyNet::F32(net) => self.forward_in(net, sequences, wanted, logits),
            AnyNet::Bf16(net) => self.forward_in(net, sequences, wanted, logits),
        }
    }

    fn forward_in<T: Activation>(
        &self,
        net: &Net<T>,
        sequences: &mut [NewTokens<'_>],
        wanted: Wanted,
        logits: &mut Vec<f32>,
    ) -> Result<Vec<usize>> {
        let runs = sequences.iter_mut().map(|new| Run { cache: T::cache(new.cache), tokens: new.tokens });
        let mut runs: Vec<Run<'_, T>> = runs.collect();
        let offsets = CuSeqlens::from_lengths(runs.iter().map(|run| run.tokens.len()))?;
        let packing = Packing::with_contexts(offsets, runs.iter().map(|run| run.cache.len).collect())?;
        let is_step = runs.iter().all(|run| run.tokens.len() == 1);
        let is_sparse = self.config.nsa_config().is_some();
        let new_blocks = if is_sparse { Some(NewBlocks::of(&self.attention, &packing)?) } else { None };
        let new_blocks = new_blocks.filter(|new| new.owners() > 0);
        let pass = Pass { model: self, net, packing, is_step, new_blocks, wanted };
        let rows_read = net.with_workspace(&self.backend, |Idle { workspace: ws, recorded }| {
            self.backend.run(|| {
                pass.prepare(ws, &runs)?;
                let rows_read = match recorded {
                    Some(recorded) if is_step && wanted == Wanted::Last => recorded.step(&pass, ws, &mut runs)?,
                    _ => pass.compute(ws, &mut Caches::Here(&mut runs))?,
                };
                pass.read(ws, logits)?;
                Ok(rows_read)
            })
        });
        if rows_read.is_ok() {
            runs.iter_mut().for_each(|run| run.cache.len += run.tokens.len());
        }
        rows_read
    }
}

impl<T: Activation> Pass<'_, T> {
    /// Makes room, and writes what the device is to know of the new tokens.
    fn prepare(&self, ws: &mut Workspace<T>, runs: &[Run<'_, T>]) -> Result<()> {
        let (config, backend, n) = (&self.model.config, &self.model.backend, self.rows());
        let (width, hidden, outputs) = (config.hidden_size(), config.intermediate_size(), self.outputs());
        for buffer in [&mut ws.x, &mut ws.h] {
            fit(backend, buffer, n * width)?;
        }
        for buffer in [&mut ws.mlp_gate, &mut ws.mlp_up, &mut ws.mlp] {
            fit(backend, buffer, n * hidden)?;
        }
        for buffer in [&mut ws.last, &mut ws.last_norm] {
            fit(backend, buffer, outputs * width)?;
        }
        fit(backend, &mut ws.hidden, if T::DTYPE == DType::F32 { 0 } else { outputs * width })?;
        fit(backend, &mut ws.logits, outputs * config.vocab_size())?;
        attention::prepare(self, ws)?;
        fit(backend, &mut ws.tokens, n)?;
        fit(backend, &mut ws.positions, n)?;
        let tokens: Vec<u32> = runs.iter().flat_map(|run| run.tokens).copied().collect();
        ws.tokens.write(&tokens)?;
        let positions: Vec<i32> =
            self.packing.seqs().flat_map(|seq| seq.context..seq.end()).map(|position| position as i32).collect();
        Ok(ws.positions.write(&positions)?)
    }

    /// All that is computed: embedding, layers, head.
    pub(super) fn compute(&self, ws: &mut Workspace<T>, caches: &mut Caches<'_, '_, T>) -> Result<Vec<usize>> {
        let (config, n) = (&self.model.config, self.rows());
        let x = ws.x.tensor_mut([n, config.hidden_size()])?;
        embed(&self.model.backend, ws.tokens.tensor([n])?, &self.net.embed, x)?;
        let mut rows_read = Vec::new();
        for (index, layer) in self.net.layers.iter().enumerate() {
            rows_read = self.layer(ws, layer, caches, index)?;
        }
        self.head(ws)?;
        Ok(rows_read)
    }

    /// x += attention(norm(x)); x += mlp(norm(x)).
    fn layer(
        &self,
        ws: &mut Workspace<T>,
        layer: &Layer<T>,
        caches: &mut Caches<'_, '_, T>,
        index: usize,
    ) -> Result<Vec<usize>> {
        let (config, backend, n) = (&self.model.config, &self.model.backend, self.rows());
        let (width, hidden) = (config.hidden_size(), config.intermediate_size());
        norm(backend, &ws.x, &layer.input_norm, self.eps(), n, &mut ws.h)?;
        let rows_read = match &layer.attention {
            AttentionWeights::Nsa(weights) => attention::nsa(self, ws, layer, weights, caches, index)?,
            AttentionWeights::Dense { k, v, k_norm } => {
                attention::dense(self, ws, layer, (k, v, k_norm.as_ref()), caches, index)?
            }
        };
        let joined = config.num_attention_heads() * config.v_head_dim();
        project(backend, ws.o.tensor([n, joined])?, &layer.o, ws.x.tensor_mut([n, width])?, true)?;
        norm(backend, &ws.x, &layer.post_norm, self.eps(), n, &mut ws.h)?;
        let mlp = [(&layer.gate, &mut ws.mlp_gate), (&layer.up, &mut ws.mlp_up)];
        project_all(backend, ws.h.tensor([n, width])?, mlp)?;
        let args = swiglu::Forward {
            gate: ws.mlp_gate.tensor([n, hidden])?,
            up: ws.mlp_up.tensor([n, hidden])?,
            y: ws.mlp.tensor_mut([n, hidden])?,
        };
        swiglu::forward(backend, args)?;
        project(backend, ws.mlp.tensor([n, hidden])?, &layer.down, ws.x.tensor_mut([n, width])?, true)?;
        Ok(rows_read)
    }

    /// Rows whose logits are wanted.
    fn outputs(&self) -> usize {
        match self.wanted {
            Wanted::None => 0,
            Wanted::Last => self.packing.num_seqs(),
            Wanted::All => self.rows(),
        }
    }

    /// The last norm and the head, of the rows wanted.
    fn head(&self, ws: &mut Workspace<T>) -> Result<()> {
        let (config, backend, rows) = (&self.model.config, &self.model.backend, self.outputs());
        let (width, vocab) = (config.hidden_size(), config.vocab_size());
        if rows == 0 {
            return Ok(());
        }
        let last = if rows == self.rows() {
            &ws.x
        } else {
            for (row, seq) in self.packing.seqs().enumerate() {
                let last = seq.rows.end - 1;
                ws.last.copy_from(row * width, &ws.x, last * width..(last + 1) * width)?;
            }
            &ws.last
        };
        norm(backend, last, &self.net.norm, self.eps(), rows, &mut ws.last_norm)?;
        let hidden = T::widened(backend, &ws.last_norm, &mut ws.hidden, rows * width)?.tensor([rows, width])?;
        project(backend, hidden, &self.net.head, ws.logits.tensor_mut([rows, vocab])?, false)
    }

    /// The logits wanted.
    fn read(&self, ws: &Workspace<T>, logits: &mut Vec<f32>) -> Result<()> {
        logits.resize(self.outputs() * self.model.config.vocab_size(), 0.0);
        Ok(ws.logits.read(logits)?)
    }

    /// y = x·Wᵀ + b of the layer's input, for weights in f32.
    pub(super) fn project_biased(
        &self,
        ws: &mut Workspace<T>,
        weight: &crate::weights::F32Weight,
        bias: &crate::weights::F32Weight,
    ) -> Result<()> {
        let weight = weight.tensor::<2>()?;
        let [outputs, width] = weight.shape();
        let (x, y) = (ws.h.tensor([self.rows(), width])?, ws.gate_logits.tensor_mut([self.rows(), outputs])?);
        let args = linear::Forward { x, weight, bias: Some(bias.tensor()?), y, accumulate: false };
        Ok(linear::forward(&self.model.backend, args)?)
    }
}
