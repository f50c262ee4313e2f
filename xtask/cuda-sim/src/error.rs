//! What can go wrong before a kernel runs.

use thiserror::Error;

/// PTX that cannot be read or is not supported.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("PTX line {line}: {what}\n  {text}")]
pub struct PtxError {
    /// Line of the PTX text, from 1.
    pub line: u32,
    /// What is wrong.
    pub what: String,
    /// The line itself.
    pub text: String,
}

impl PtxError {
    /// Whether the text is of a version of PTX that is not supported.
    pub fn is_version(&self) -> bool {
        self.what.starts_with("PTX version")
    }
}

/// An error at a line; the text of the line is added where the whole source is at hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct At {
    pub line: u32,
    pub what: String,
}

impl At {
    pub fn new(line: u32, what: impl Into<String>) -> Self {
        Self { line, what: what.into() }
    }

    pub fn in_source(self, source: &str) -> PtxError {
        let text = source.lines().nth(self.line.saturating_sub(1) as usize).unwrap_or("").trim().to_owned();
        PtxError { line: self.line, what: self.what, text }
    }
}
