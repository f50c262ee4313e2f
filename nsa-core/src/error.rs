//! Typed errors: each names the thing, what was found and the rule it breaks.

use crate::DType;
use std::io;
use std::path::PathBuf;

/// A configuration field that breaks a rule.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("config field `{field}` = {value}: {rule}")]
pub struct ConfigError {
    /// Name of the field, as in JSON.
    pub field: &'static str,
    /// Its value, printed.
    pub value: String,
    /// The rule that it breaks.
    pub rule: String,
}

impl ConfigError {
    /// An error about `field`, whose `value` breaks `rule`.
    pub fn new(field: &'static str, value: impl ToString, rule: impl Into<String>) -> Self {
        Self { field, value: value.to_string(), rule: rule.into() }
    }
}

/// Sequence boundaries that describe no packed batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// `cu_seqlens` holds no element.
    #[error("cu_seqlens is empty: it needs at least the leading 0")]
    Empty,
    /// `cu_seqlens` does not start at 0.
    #[error("cu_seqlens[0] = {0}: it must be 0")]
    Start(i64),
    /// `cu_seqlens` decreases.
    #[error("cu_seqlens[{index}] = {value} is below its predecessor {before}: offsets must not decrease")]
    Decreasing {
        /// Position of the offset.
        index: usize,
        /// The offset.
        value: i64,
        /// The offset before it.
        before: i64,
    },
    /// More tokens than an i32 offset can address.
    #[error("{0} packed tokens: offsets are i32, so at most 2147483647 fit")]
    TooLong(u128),
    /// `cu_seqlens` does not end at the number of rows.
    #[error("cu_seqlens ends at {end}, but the tensors have {rows} rows")]
    End {
        /// Last offset.
        end: usize,
        /// Rows of the tensors.
        rows: usize,
    },
    /// One context length is needed per sequence.
    #[error("{got} context lengths for {expected} sequences")]
    Contexts {
        /// Number of sequences.
        expected: usize,
        /// Number of context lengths.
        got: usize,
    },
}

/// An argument whose shape or element type does not fit the operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// Another shape was expected.
    #[error("{op}: `{arg}` has shape {got:?}, expected {expected:?}")]
    Shape {
        /// Operation.
        op: &'static str,
        /// Argument.
        arg: String,
        /// Shape that the other arguments ask for.
        expected: Vec<usize>,
        /// Shape found.
        got: Vec<usize>,
    },
    /// Another element type was expected.
    #[error("{op}: `{arg}` has dtype {got}, expected {expected}")]
    DType {
        /// Operation.
        op: &'static str,
        /// Argument.
        arg: String,
        /// Element types allowed.
        expected: String,
        /// Element type found.
        got: DType,
    },
    /// A view reaches beyond its memory, or its strides are not legal.
    #[error("view of shape {shape:?} with strides {strides:?} does not fit {len} elements: {rule}")]
    View {
        /// Shape asked for.
        shape: Vec<usize>,
        /// Strides asked for, in elements.
        strides: Vec<usize>,
        /// Elements there.
        len: usize,
        /// What is broken.
        rule: &'static str,
    },
}

impl ShapeError {
    /// Checks that `got` equals `expected`, for argument `arg` of `op`.
    pub fn check(op: &'static str, arg: &str, expected: &[usize], got: &[usize]) -> Result<(), Self> {
        if expected == got {
            return Ok(());
        }
        Err(Self::Shape { op, arg: arg.to_owned(), expected: expected.to_vec(), got: got.to_vec() })
    }
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not hold what it should.
    #[error("{}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}
