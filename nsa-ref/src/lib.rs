//! The readable truth: Native Sparse Attention (arXiv 2502.11089) as plain loops in f64, forward, backward and step by
//! step with caches. No threads, no cleverness.
//!
//! Every function takes an [`Arithmetic`]: [`Exact`] is the truth, [`Rounded`] the same loops rounded where a kernel
//! rounds, which is the error model of the tests.
#![forbid(unsafe_code)]

pub mod arith;
pub mod attention;
pub mod branch;
pub mod cmp;
pub mod compress;
pub mod decode;
pub mod dense;
pub mod gate;
pub mod nsa;
pub mod select;
pub mod slc;
pub mod tensor;
pub mod win;

pub use arith::{Arithmetic, Exact, Rounded};
pub use select::BlockIndices;
pub use tensor::{Tensor, quantize};

use nsa_core::{LayoutError, ShapeError};

/// Why the reference refused its arguments.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A tensor has the wrong shape.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The packed layout breaks a rule.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// An argument has a value out of its range.
    #[error("{op}: `{arg}` = {value}: {rule}")]
    Value {
        /// Operation.
        op: &'static str,
        /// Argument.
        arg: String,
        /// What was found.
        value: String,
        /// The rule that it breaks.
        rule: &'static str,
    },
}

/// Result of the reference.
pub type Result<T> = std::result::Result<T, Error>;
