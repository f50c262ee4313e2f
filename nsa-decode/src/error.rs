//! What can go wrong: each error names the thing, what was found and the rule it breaks.

use nsa_core::{ConfigError, FileError};
use std::path::PathBuf;

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model could not be opened or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the model folder cannot be read, or does not hold what it should.
    #[error(transparent)]
    File(#[from] FileError),
    /// The configuration describes a model that cannot be run.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights do not fit the configuration, or are none.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Text could not be turned to tokens or back.
    #[error(transparent)]
    Tokenizer(#[from] nsa_core::tokenizer::TokenizerError),
    /// A sampling parameter breaks a rule, or the logits have no distribution.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// A stop string is empty.
    #[error("stop string {index} is empty: it would stop before the first token")]
    EmptyStop {
        /// Its place in the list.
        index: usize,
    },
    /// A token is not of the vocabulary.
    #[error("token {token} at position {position}: it must be below vocab_size = {vocab_size}")]
    Token {
        /// Its position in the sequence.
        position: usize,
        /// The token.
        token: u32,
        /// Ids of the vocabulary.
        vocab_size: usize,
    },
    /// There is no token to predict from.
    #[error("the sequence is empty: logits need at least one token (the model has no bos_token_id to start from)")]
    NoTokens,
    /// A sequence would exceed the longest context.
    #[error("{tokens} tokens: max_position_embeddings = {limit} is the longest context")]
    ContextFull {
        /// Tokens asked for.
        tokens: usize,
        /// The model's longest context.
        limit: usize,
    },
    /// A sequence cannot be cut to more tokens than it has.
    #[error("truncate to {len}: the sequence has {tokens} tokens")]
    Truncate {
        /// Length asked for.
        len: usize,
        /// Tokens there.
        tokens: usize,
    },
    /// An argument breaks a rule.
    #[error("`{argument}` = {value}: {rule}")]
    Argument {
        /// The argument.
        argument: &'static str,
        /// Its value.
        value: String,
        /// The rule that it breaks.
        rule: String,
    },
    /// Sessions of different models cannot run together.
    #[error("session {index} is of another model: sessions that run together share one")]
    ForeignSession {
        /// Its place in the batch.
        index: usize,
    },
    /// An operation refused.
    #[error(transparent)]
    Kernel(#[from] nsa_kernels::Error),
    /// Sequences exceed what offsets can address.
    #[error(transparent)]
    Layout(#[from] nsa_core::LayoutError),
}

/// Why weights were refused.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file is not in the safetensors format, or cut off.
    #[error("{}: no complete safetensors file: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What the format's reader says.
        reason: String,
    },
    /// A file of the checkpoint cannot be read or mapped, or the index of several does not hold what it should.
    #[error(transparent)]
    File(#[from] FileError),
    /// A tensor that the configuration asks for is not there.
    #[error("{}: tensor `{name}` is missing, expected shape {expected:?}", path.display())]
    Missing {
        /// File or folder.
        path: PathBuf,
        /// Tensor.
        name: String,
        /// Shape that the configuration asks for.
        expected: Vec<usize>,
    },
    /// A tensor that the configuration does not know: the file belongs to another model.
    #[error("{}: tensor `{name}` is unknown to the configuration ({count} such): the file belongs to another model", path.display())]
    Unknown {
        /// File.
        path: PathBuf,
        /// The first such tensor in alphabetical order.
        name: String,
        /// Number of such tensors.
        count: usize,
    },
    /// A tensor is in two files.
    #[error("{}: tensor `{name}` is also in another file of the checkpoint", path.display())]
    Duplicate {
        /// The second file.
        path: PathBuf,
        /// Tensor.
        name: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("{}: tensor `{name}` has shape {got:?}, expected {expected:?}", path.display())]
    Shape {
        /// File.
        path: PathBuf,
        /// Tensor.
        name: String,
        /// Shape that the configuration asks for.
        expected: Vec<usize>,
        /// Shape found.
        got: Vec<usize>,
    },
    /// A tensor has an element type that weights cannot have.
    #[error("{}: tensor `{name}` has dtype {got}, expected F32, BF16 or F16", path.display())]
    Dtype {
        /// File.
        path: PathBuf,
        /// Tensor.
        name: String,
        /// Element type found.
        got: String,
    },
}

/// Why no token could be drawn.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A parameter breaks a rule.
    #[error("sampling parameter `{field}` = {value}: {rule}")]
    Parameter {
        /// Name of the parameter.
        field: &'static str,
        /// Its value.
        value: String,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// A logit is NaN or +∞.
    #[error("logit of token {token} is {value}: no distribution to draw from")]
    Logit {
        /// The token.
        token: usize,
        /// NaN or infinity.
        value: f32,
    },
    /// There is no logit, or all are −∞.
    #[error("none of {count} logits is finite: no distribution to draw from")]
    NoCandidate {
        /// Number of logits.
        count: usize,
    },
}
