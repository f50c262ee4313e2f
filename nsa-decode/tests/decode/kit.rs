//! Checkpoints with random weights.

use half::{bf16, f16};
use nsa_core::model::{AttentionKind, Init, ModelConfig, ModelFields, NsaFields, ParamKind, manifest};
use nsa_core::{CompressKind, DType};
use nsa_decode::{Backend, Model, ModelOptions, Precision};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

/// A tensor as it is stored, its numbers widened.
#[derive(Clone, Debug)]
pub struct Stored {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
    pub dtype: DType,
}

/// A checkpoint's folder and what is in it.
#[derive(Debug)]
pub struct Checkpoint {
    pub folder: TempDir,
    pub config: ModelConfig,
    pub tensors: BTreeMap<String, Stored>,
}

/// A small sparse model: 2 layers, 4 heads on 2 KV heads, dims 8 and 6, l/d/l' = 8/4/16, n = 4, w = 12, bytes.
pub fn small(kind: CompressKind) -> ModelFields {
    let nsa = NsaFields {
        compress_block: 8,
        compress_stride: 4,
        select_block: 16,
        select_count: 4,
        select_initial: 1,
        select_local: 2,
        window: 12,
        compress_kind: kind,
        compress_hidden: (kind == CompressKind::Mlp).then_some(10),
        compress_bias: true,
        compress_position: true,
    };
    ModelFields {
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: Some(8),
        v_head_dim: Some(6),
        max_position_embeddings: 512,
        attention: AttentionKind::Nsa,
        nsa: Some(nsa),
        ..ModelConfig::preset("bench-4m").unwrap().to_fields()
    }
}

/// The same with full attention.
pub fn small_dense() -> ModelFields {
    ModelFields { attention: AttentionKind::Dense, nsa: None, ..small(CompressKind::Mean) }
}

impl Checkpoint {
    /// Random weights in f32.
    pub fn new(fields: ModelFields, seed: u64) -> Self {
        Self::with_dtype(fields, seed, |_| DType::F32)
    }

    /// Random weights, the element type by name.
    pub fn with_dtype(fields: ModelFields, seed: u64, dtype: impl Fn(&str) -> DType) -> Self {
        let config = ModelConfig::new(fields).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut tensors = BTreeMap::new();
        for spec in manifest(&config) {
            // Wide enough that scores, gates and logits differ clearly from token to token.
            let fan_in = spec.shape[spec.shape.len() - if spec.name.contains("phi_") { 2 } else { 1 }];
            let (mean, std) = match (spec.kind, spec.init) {
                (ParamKind::Embedding, _) => (0.0, 1.0),
                (ParamKind::Matrix, _) => (0.0, 1.5 / (fan_in as f64).sqrt()),
                (ParamKind::Vector, Init::Normal { .. }) => (0.0, 0.5),
                (ParamKind::Vector, Init::Constant(c)) => (c, if c == 0.0 { 0.5 } else { 0.4 * c }),
            };
            let dtype = dtype(&spec.name);
            let mut draw = || round(dtype, mean + std * 3f64.sqrt() * (2.0 * rng.random::<f64>() - 1.0));
            let data = (0..spec.numel()).map(|_| draw()).collect();
            tensors.insert(spec.name, Stored { shape: spec.shape, data, dtype });
        }
        let checkpoint = Self { folder: TempDir::new().unwrap(), config, tensors };
        checkpoint.write();
        checkpoint
    }

    /// Writes configuration and weights.
    pub fn write(&self) {
        let json = serde_json::to_vec_pretty(&self.config).unwrap();
        std::fs::write(self.path().join("config.json"), json).unwrap();
        write_tensors(&self.path().join("model.safetensors"), &self.tensors);
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn open(&self) -> Model {
        self.try_open().unwrap()
    }

    pub fn open_in(&self, precision: Precision) -> Model {
        Model::open_with(self.path(), Backend::pick(Some("cpu")).unwrap().0, ModelOptions { precision }).unwrap()
    }

    pub fn try_open(&self) -> nsa_decode::Result<Model> {
        Model::open(self.path(), Backend::pick(Some("cpu")).unwrap().0)
    }
}

fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::Bf16 => bf16::from_f64(x).to_f64(),
        DType::F16 => f16::from_f64(x).to_f64(),
        DType::F32 => f64::from(x as f32),
        DType::F64 => x,
    }
}

/// Bytes of a tensor in the file.
pub fn bytes_of(tensor: &Stored) -> (Dtype, Vec<u8>) {
    let data = tensor.data.iter();
    match tensor.dtype {
        DType::Bf16 => (Dtype::BF16, data.flat_map(|&x| bf16::from_f64(x).to_le_bytes()).collect()),
        DType::F16 => (Dtype::F16, data.flat_map(|&x| f16::from_f64(x).to_le_bytes()).collect()),
        DType::F32 => (Dtype::F32, data.flat_map(|&x| (x as f32).to_le_bytes()).collect()),
        DType::F64 => (Dtype::F64, data.flat_map(|&x| x.to_le_bytes()).collect()),
    }
}

pub fn write_tensors<'a>(path: &Path, tensors: impl IntoIterator<Item = (&'a String, &'a Stored)>) {
    let parts: Vec<_> =
        tensors.into_iter().map(|(name, tensor)| (name, tensor.shape.clone(), bytes_of(tensor))).collect();
    let views = parts
        .iter()
        .map(|(name, shape, (dtype, bytes))| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Tokens from a seed.
pub fn tokens(seed: u64, len: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| u32::from(rng.random::<u8>())).collect()
}

/// Largest difference, relative to the largest number expected.
pub fn relative_error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0f64, |max, x| max.max(x.abs()));
    let worst = got.iter().zip(expected).fold(0f64, |max, (g, e)| {
        let difference = (f64::from(*g) - e).abs();
        if difference.is_nan() { f64::INFINITY } else { max.max(difference) }
    });
    worst / largest
}

pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}
