//! What can go wrong when an operation is called.

use nsa_core::{ConfigError, LayoutError, ShapeError};

/// What every [`Error::Unsupported`] says.
pub const NO_KERNEL: &str = "has no kernel for";

/// Result of an operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation refused its arguments or could not run.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// The configuration breaks a rule.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The packed layout breaks a rule.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// An argument has the wrong shape or dtype.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A value of an argument is out of its range.
    #[error("{op}: `{arg}` = {value}: {rule}")]
    Value {
        /// Operation.
        op: &'static str,
        /// Argument.
        arg: &'static str,
        /// What was found.
        value: String,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// An environment variable breaks a rule.
    #[error("environment variable {variable} = `{value}`: {rule}")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// Its value.
        value: String,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// The backend that was asked for is not there.
    #[error("backend `{requested}` is not available: {missing}; {advice}")]
    Backend {
        /// What was asked for.
        requested: String,
        /// What is missing.
        missing: String,
        /// What to do about it.
        advice: String,
    },
    /// An argument is not in the memory that the backend computes on.
    #[error("{op}: `{arg}` is in the memory of {got}, expected that of {expected}")]
    Memory {
        /// Operation.
        op: &'static str,
        /// Argument.
        arg: String,
        /// The backend's memory.
        expected: String,
        /// The argument's.
        got: String,
    },
    /// The backend has no kernel for this.
    #[error("{op}: the backend `{backend}` {NO_KERNEL} {what}; {advice}")]
    Unsupported {
        /// Operation.
        op: &'static str,
        /// The backend's name.
        backend: String,
        /// What it has none for.
        what: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// A device, its driver or its compiler refused or failed.
    #[error("{op}: {message}")]
    Device {
        /// What was done.
        op: String,
        /// What it said.
        message: String,
    },
}
