//! A model, opened from a checkpoint's folder.

mod attention;
mod blocks;
mod forward;
mod layers;
mod net;
mod recorded;
mod workspace;

use crate::weights::Weights;
use crate::{Result, Session, SessionOptions};
pub(crate) use forward::{NewTokens, Wanted};
use net::{AnyNet, Net};
use nsa_core::model::{CONFIG_FILE, ModelConfig, manifest};
use nsa_core::tokenizer::Tokenizer;
use nsa_core::{CompressKind, DType, NsaConfig, Precision, read_json};
use nsa_kernels::Backend;
use std::path::Path;
use std::sync::Arc;

/// A model that is ready to run. Clones share everything; sessions keep it alive.
#[derive(Clone, Debug)]
pub struct Model(Arc<Inner>);

/// How a model computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelOptions {
    /// Type of activations and caches. In bf16, matrices that the files have in f32 are rounded to it when the model is opened, as
    /// training in bf16 does every step; logits are f32 in any case.
    pub precision: Precision,
}

/// How the weights of a model are held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightsInfo {
    /// Bytes of the files.
    pub file_bytes: u64,
    /// Number of parameters of each element type that the files have.
    pub dtypes: Vec<(DType, u64)>,
    /// Bytes used in place.
    pub mapped_bytes: u64,
    /// Bytes copied: to the device that computes, in another type, or because the file does not align them.
    pub copied_bytes: u64,
}

/// What the model consists of.
#[derive(Debug)]
pub(crate) struct Inner {
    config: ModelConfig,
    /// The operator's configuration; heads and dimensions alone matter if attention is dense.
    attention: NsaConfig,
    tokenizer: Tokenizer,
    backend: Backend,
    weights_info: WeightsInfo,
    net: AnyNet,
}

impl Model {
    /// Opens the model in `folder`: [`Model::open_with`] the default options, in f32.
    ///
    /// # Errors
    /// Those of that function.
    pub fn open(folder: impl AsRef<Path>, backend: Backend) -> Result<Self> {
        Self::open_with(folder, backend, ModelOptions::default())
    }

    /// Opens the model in `folder`: `config.json`, `model.safetensors` (or several such files and their
    /// `model.safetensors.index.json`) and, if the configuration says so, `tokenizer.json`.
    ///
    /// Matrices are in f32, bf16 or f16 as the files have them (but see [`ModelOptions::precision`]): used where they lie in the
    /// mapped files, or copied to the device that computes. Small tensors, if not in f32, are widened to it; φ is in the type that
    /// the model computes in. The files must not be changed in place while the model is in use.
    ///
    /// # Errors
    /// If a file is missing or not what it should be, the configuration breaks a rule or describes a model that cannot be
    /// run, or the weights are not those of the configuration: the error names the file and the field or tensor.
    pub fn open_with(folder: impl AsRef<Path>, backend: Backend, options: ModelOptions) -> Result<Self> {
        let (folder, precision) = (folder.as_ref(), options.precision);
        let config: ModelConfig = read_json(folder.join(CONFIG_FILE))?;
        config.check_runnable()?;
        let mut weights = Weights::open(folder, &manifest(&config), &backend, precision)?;
        let tokenizer = Tokenizer::for_model(&config, folder)?;
        let mut weights_info = WeightsInfo::of(&weights);
        let net = match precision {
            Precision::F32 => AnyNet::F32(Net::take(&config, &mut weights, &backend)?),
            Precision::Bf16 => AnyNet::Bf16(Net::take(&config, &mut weights, &backend)?),
        };
        [weights_info.mapped_bytes, weights_info.copied_bytes] = weights.taken_bytes();
        let attention = attention_config(&config)?;
        tracing::info!(
            folder = %folder.display(),
            file_bytes = weights_info.file_bytes,
            copied_bytes = weights_info.copied_bytes,
            backend = backend.name(),
            %precision,
            "model opened"
        );
        Ok(Self(Arc::new(Inner { config, attention, tokenizer, backend, weights_info, net })))
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.0.config
    }

    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.0.tokenizer
    }

    /// What runs the operations.
    pub fn backend(&self) -> &Backend {
        &self.0.backend
    }

    /// How the weights are held.
    pub fn weights_info(&self) -> &WeightsInfo {
        &self.0.weights_info
    }

    /// Kinds of decoding steps, by numbers of sequences and of new compression blocks, that the device repeats as recorded work;
    /// none on the CPU.
    pub fn recorded_steps(&self) -> usize {
        match &self.0.net {
            AnyNet::F32(net) => net.recorded_steps(),
            AnyNet::Bf16(net) => net.recorded_steps(),
        }
    }

    /// The type of activations and caches.
    pub fn precision(&self) -> Precision {
        self.0.precision()
    }

    /// An empty sequence with the default options.
    pub fn session(&self) -> Session {
        Session::new(self.clone(), SessionOptions::default())
    }

    /// An empty sequence.
    ///
    /// # Errors
    /// If an option breaks its rule.
    pub fn session_with(&self, options: SessionOptions) -> Result<Session> {
        options.check()?;
        Ok(Session::new(self.clone(), options))
    }

    /// Tokens of a prompt: those of `text`, after the token that starts a text if the model has one and the text does not
    /// begin with it.
    ///
    /// # Errors
    /// If the vocabulary cannot express the text.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = self.0.tokenizer.encode(text)?;
        if let Some(start) = self.config().bos_token_id()
            && tokens.first() != Some(&start)
        {
            tokens.insert(0, start);
        }
        Ok(tokens)
    }

    /// Whether both are the same opened model.
    pub fn same_as(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }
}

impl Inner {
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn attention(&self) -> &NsaConfig {
        &self.attention
    }

    pub(crate) fn backend(&self) -> &Backend {
        &self.backend
    }

    pub(crate) fn precision(&self) -> Precision {
        match &self.net {
            AnyNet::F32(_) => Precision::F32,
            AnyNet::Bf16(_) => Precision::Bf16,
        }
    }
}

/// The operator's configuration, for dense attention one with the same heads, dimensions and scale.
fn attention_config(config: &ModelConfig) -> Result<NsaConfig> {
    if let Some(nsa) = config.nsa_config() {
        return Ok(nsa);
    }
    let (heads, kv_heads) = (config.num_attention_heads(), config.num_key_value_heads());
    let builder = NsaConfig::builder(heads, kv_heads, config.head_dim(), config.v_head_dim());
    Ok(builder.compress_kind(CompressKind::Mean).scale(config.scale()).build()?)
}

impl WeightsInfo {
    /// Of weights of which none was taken yet.
    fn of(weights: &Weights) -> Self {
        let mut info = Self { file_bytes: weights.file_bytes(), ..Self::default() };
        for (_, stored) in weights.iter() {
            let count = stored.shape().iter().product::<usize>() as u64;
            match info.dtypes.iter_mut().find(|(dtype, _)| *dtype == stored.dtype()) {
                Some((_, total)) => *total += count,
                None => info.dtypes.push((stored.dtype(), count)),
            }
        }
        info
    }
}
