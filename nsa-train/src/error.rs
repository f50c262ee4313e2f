//! What can go wrong while training.

use nsa_core::tokenizer::TokenizerError;
use nsa_core::{ConfigError, FileError, LayoutError};
use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Why training, evaluation or a file operation stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation refused its arguments or could not run.
    #[error(transparent)]
    Kernel(#[from] nsa_kernels::Error),
    /// The model's configuration breaks a rule.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Sequence boundaries break a rule.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A file cannot be read or does not hold what it should.
    #[error(transparent)]
    File(#[from] FileError),
    /// Text cannot be tokenised.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A file or folder cannot be written.
    #[error("{}: cannot be written", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An option or argument breaks a rule.
    #[error("`{name}` = {value}: {rule}")]
    Value {
        /// Name of the option or argument.
        name: &'static str,
        /// Its value, printed.
        value: String,
        /// The rule that it breaks.
        rule: String,
    },
    /// A tensor of a file is missing, unknown or not of the model's shape.
    #[error("{}: tensor `{tensor}`: {message}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        message: String,
    },
    /// A checkpoint does not belong to what it is resumed with.
    #[error("{}: {message}", path.display())]
    Mismatch {
        /// The checkpoint.
        path: PathBuf,
        /// What does not fit.
        message: String,
    },
    /// The loss, the gradient or a parameter is no longer a finite number.
    #[error("step {step}: the {quantity} is {value}; {}", last_good(checkpoint.as_deref()))]
    Diverged {
        /// The step, which was not applied; of a parameter, the one that it comes from.
        step: u64,
        /// `loss`, `gradient norm` or `parameter`.
        quantity: &'static str,
        /// Its value.
        value: f64,
        /// The last checkpoint before it.
        checkpoint: Option<PathBuf>,
    },
    /// The plot cannot be drawn.
    #[error("{}: cannot be drawn: {message}", path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
}

fn last_good(checkpoint: Option<&Path>) -> String {
    match checkpoint {
        Some(path) => format!("the last good checkpoint is {}", path.display()),
        None => "there is no checkpoint before it".to_owned(),
    }
}

impl Error {
    /// An error about the option or argument `name`, whose `value` breaks `rule`.
    pub(crate) fn value(name: &'static str, value: impl ToString, rule: impl Into<String>) -> Self {
        Self::Value { name, value: value.to_string(), rule: rule.into() }
    }

    /// An error about what the file `path` holds.
    pub(crate) fn content(path: &Path, message: impl ToString) -> Self {
        FileError::Content { path: path.to_owned(), message: message.to_string() }.into()
    }

    /// An error about a tensor of the file or folder `path`.
    pub(crate) fn tensor(path: &Path, tensor: String, message: impl Into<String>) -> Self {
        Self::Tensor { path: path.to_owned(), tensor, message: message.into() }
    }

    /// The error for a file that cannot be read, for `map_err`.
    pub(crate) fn read(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        |source| FileError::Read { path: path.to_owned(), source }.into()
    }

    /// The error for a file that cannot be written, for `map_err`.
    pub(crate) fn write(path: &Path) -> impl Fn(io::Error) -> Self + '_ {
        |source| Self::Write { path: path.to_owned(), source }
    }
}
