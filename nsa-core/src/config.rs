//! The configuration of the operator: names and rules of the specification.

use crate::object::Object;
use crate::{ConfigError, FileError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Reads a configuration from a JSON file.
///
/// # Errors
/// If the file cannot be read, is no JSON of this configuration or breaks one of its rules; names the field at fault.
pub fn read_json<C: DeserializeOwned>(path: impl AsRef<Path>) -> Result<C, FileError> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|source| FileError::Read { path: path.to_owned(), source })?;
    let content = |message| FileError::Content { path: path.to_owned(), message };
    let mut json = serde_json::Deserializer::from_slice(&bytes);
    let config = serde_path_to_error::deserialize(&mut json).map_err(|error| content(json_message(&error)))?;
    json.end().map_err(|error| content(error.to_string()))?;
    Ok(config)
}

/// What is wrong with a JSON text, and in which field if it is one's fault.
fn json_message(error: &serde_path_to_error::Error<serde_json::Error>) -> String {
    let inner = error.inner();
    if inner.is_eof() {
        return format!("ends early, at line {} column {}", inner.line(), inner.column());
    }
    // A path ends in an unknown part, `?`, where an object itself is at fault, such as for a comma too many.
    let path = error.path().to_string();
    match path.strip_suffix('?').unwrap_or(&path).trim_end_matches('.') {
        "" => inner.to_string(),
        field => format!("`{field}`: {inner}"),
    }
}

/// φ: how a compression block becomes one key and one value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CompressKind {
    /// Average over the block.
    Mean,
    /// Σ_p a_p · token p with learnable a, no softmax.
    Weighted,
    /// The flattened block times a matrix.
    Linear,
    /// Linear, GELU (erf form), linear: the paper's.
    #[default]
    Mlp,
}

/// A valid configuration of Native Sparse Attention.
///
/// Every value satisfies: d | l, d | l', l ≤ l', G | Hq, n ≥ n0 + nl, nl ≥ 1, sizes non-zero and within i32.
/// Made by [`NsaConfig::builder`] or from a JSON object (unknown fields are errors), checked once, read-only from then on.
///
/// ```
/// use nsa_core::{CompressKind, NsaConfig};
/// let config = NsaConfig::builder(16, 1, 128, 128).compress_kind(CompressKind::Mean).window(256).build()?;
/// assert_eq!((config.group_size(), config.select_block()), (16, 64));
/// let error = config.to_builder().compress_stride(12).build().unwrap_err();
/// assert_eq!(error.to_string(), "config field `compress_block` = 32: must be a multiple of compress_stride = 12");
/// # Ok::<(), nsa_core::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Object<NsaConfigBuilder>", into = "NsaConfigBuilder")]
pub struct NsaConfig(NsaConfigBuilder);

/// Fields of an [`NsaConfig`] before they are checked. Defaults are the paper's block sizes; heads and head
/// dimensions have none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NsaConfigBuilder {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim_qk: usize,
    head_dim_v: usize,
    #[serde(default = "paper::compress_block")]
    compress_block: usize,
    #[serde(default = "paper::compress_stride")]
    compress_stride: usize,
    #[serde(default = "paper::select_block")]
    select_block: usize,
    #[serde(default = "paper::select_count")]
    select_count: usize,
    #[serde(default = "paper::select_initial")]
    select_initial: usize,
    #[serde(default = "paper::select_local")]
    select_local: usize,
    #[serde(default = "paper::window")]
    window: usize,
    #[serde(default)]
    compress_kind: CompressKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    compress_hidden: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scale: Option<f64>,
}

/// Block sizes of the paper (section 4.1).
pub(crate) mod paper {
    macro_rules! sizes {
        ($($name:ident = $value:literal),*) => { $(pub fn $name() -> usize { $value })* };
    }
    sizes!(
        compress_block = 32,
        compress_stride = 16,
        select_block = 64,
        select_count = 16,
        select_initial = 1,
        select_local = 2,
        window = 512
    );
}

macro_rules! sizes {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        impl NsaConfigBuilder {
            $($(#[$doc])* pub fn $name(mut self, $name: usize) -> Self { self.$name = $name; self })*
        }
        impl NsaConfig {
            $($(#[$doc])* pub fn $name(&self) -> usize { self.0.$name })*
        }
        impl NsaConfigBuilder {
            fn sizes(&self) -> impl Iterator<Item = (&'static str, usize)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

sizes! {
    /// Hq: query heads.
    num_heads,
    /// G: KV heads, that is GQA groups.
    num_kv_heads,
    /// Dk: head dimension of queries and keys.
    head_dim_qk,
    /// Dv: head dimension of values.
    head_dim_v,
    /// l: tokens in one compression block.
    compress_block,
    /// d: tokens between the starts of compression blocks.
    compress_stride,
    /// l': tokens in one selection block.
    select_block,
    /// n: blocks selected per query and group, the forced ones included.
    select_count,
    /// n0: forced first blocks.
    select_initial,
    /// nl: forced last blocks, the query's own included.
    select_local,
    /// w: tokens of the sliding window, the query's own included.
    window,
}

impl NsaConfigBuilder {
    /// φ.
    pub fn compress_kind(mut self, kind: CompressKind) -> Self {
        self.compress_kind = kind;
        self
    }

    /// Hidden width of the `mlp` φ.
    pub fn compress_hidden(mut self, hidden: usize) -> Self {
        self.compress_hidden = Some(hidden);
        self
    }

    /// Softmax scale; 1/√Dk if never set.
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Checks every rule.
    ///
    /// # Errors
    /// The first rule broken, with the field and its value.
    pub fn build(self) -> Result<NsaConfig, ConfigError> {
        for (field, value) in self.sizes() {
            // n0 alone may be zero.
            if value == 0 && field != "select_initial" {
                return Err(ConfigError::new(field, value, "must not be zero"));
            }
            check_i32(field, value)?;
        }
        self.check_divisibility()?;
        let forced = self.select_initial + self.select_local;
        if self.select_count < forced {
            let rule = format!("must be at least select_initial + select_local = {forced}");
            return Err(ConfigError::new("select_count", self.select_count, rule));
        }
        match self.compress_hidden {
            Some(0) => return Err(ConfigError::new("compress_hidden", 0, "must not be zero")),
            Some(hidden) => check_i32("compress_hidden", hidden)?,
            None if self.compress_kind == CompressKind::Mlp => {
                return Err(ConfigError::new("compress_hidden", "null", "compress_kind `mlp` needs it"));
            }
            None => {}
        }
        self.scale.map_or(Ok(()), check_scale)?;
        Ok(NsaConfig(self))
    }

    fn check_divisibility(&self) -> Result<(), ConfigError> {
        let divides = |field, value: usize, name: &str, divisor: usize| match value % divisor {
            0 => Ok(()),
            _ => Err(ConfigError::new(field, value, format!("must be a multiple of {name} = {divisor}"))),
        };
        divides("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)?;
        divides("compress_block", self.compress_block, "compress_stride", self.compress_stride)?;
        divides("select_block", self.select_block, "compress_stride", self.compress_stride)?;
        if self.compress_block > self.select_block {
            let rule = format!("must be at most select_block = {}", self.select_block);
            return Err(ConfigError::new("compress_block", self.compress_block, rule));
        }
        Ok(())
    }
}

pub(crate) fn check_i32(field: &'static str, value: usize) -> Result<(), ConfigError> {
    if i32::try_from(value).is_err() {
        return Err(ConfigError::new(field, value, "must fit an i32"));
    }
    Ok(())
}

pub(crate) fn check_scale(scale: f64) -> Result<(), ConfigError> {
    // Kernels multiply it by log2 e in f32.
    match (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX / 2.0)).contains(&scale) {
        true => Ok(()),
        false => Err(ConfigError::new("scale", scale, "must be positive and finite, as an f32 too")),
    }
}

impl NsaConfig {
    /// A builder with the paper's block sizes (32/16/64, n = 16 of which 1 first and 2 last, w = 512).
    pub fn builder(num_heads: usize, num_kv_heads: usize, head_dim_qk: usize, head_dim_v: usize) -> NsaConfigBuilder {
        NsaConfigBuilder {
            num_heads,
            num_kv_heads,
            head_dim_qk,
            head_dim_v,
            compress_block: paper::compress_block(),
            compress_stride: paper::compress_stride(),
            select_block: paper::select_block(),
            select_count: paper::select_count(),
            select_initial: paper::select_initial(),
            select_local: paper::select_local(),
            window: paper::window(),
            compress_kind: CompressKind::Mlp,
            compress_hidden: None,
            scale: None,
        }
    }

    /// The paper's: 64 query heads on 4 KV heads, dims 192/128, l/d/l' = 32/16/64, n = 16, w = 512, MLP compression
    /// (its hidden width is not published; here Dk).
    pub fn paper() -> Self {
        Self::builder(64, 4, 192, 128).compress_hidden(192).build().expect("the paper's configuration is valid")
    }

    /// A small one for tests and laptops: 4 heads on 2 KV heads, dims 16, l/d/l' = 8/4/16, n = 4, w = 32, mean.
    pub fn small() -> Self {
        Self::builder(4, 2, 16, 16)
            .compress_block(8)
            .compress_stride(4)
            .select_block(16)
            .select_count(4)
            .window(32)
            .compress_kind(CompressKind::Mean)
            .build()
            .expect("the small configuration is valid")
    }

    /// A builder that starts from this configuration.
    pub fn to_builder(&self) -> NsaConfigBuilder {
        self.0.clone()
    }

    /// R = Hq/G: query heads that share one KV head.
    pub fn group_size(&self) -> usize {
        self.num_heads() / self.num_kv_heads()
    }

    /// φ.
    pub fn compress_kind(&self) -> CompressKind {
        self.0.compress_kind
    }

    /// Hidden width of the `mlp` φ; present whenever φ is `mlp`.
    pub fn compress_hidden(&self) -> Option<usize> {
        self.0.compress_hidden
    }

    /// Softmax scale: as set, else 1/√Dk.
    pub fn scale(&self) -> f64 {
        self.0.scale.unwrap_or_else(|| (self.head_dim_qk() as f64).sqrt().recip())
    }
}

impl TryFrom<Object<NsaConfigBuilder>> for NsaConfig {
    type Error = ConfigError;

    fn try_from(Object(builder): Object<NsaConfigBuilder>) -> Result<Self, ConfigError> {
        builder.build()
    }
}

impl From<NsaConfig> for NsaConfigBuilder {
    fn from(config: NsaConfig) -> Self {
        config.0
    }
}
