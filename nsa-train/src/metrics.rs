//! The metrics file: JSON Lines, one a step and one a validation.

use crate::files::write_atomic;
use crate::model::Profile;
use crate::{Error, Precision, Result};
use serde::{Deserialize, Deserializer, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Name of the file in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    /// Number of the step, counted from 1.
    pub step: u64,
    /// Mean loss a token, in nats.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens seen so far.
    pub tokens: u64,
    /// Tokens a second in this step.
    pub tokens_per_s: f64,
    /// Duration of this step.
    pub seconds: f64,
    /// Type of the computation.
    #[serde(default)]
    pub precision: Precision,
    /// Seconds spent in each part of it.
    pub phases: Profile,
}

/// One validation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidationLine {
    /// Steps done before it.
    pub step: u64,
    /// Mean loss a token, in nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// The same as bits a byte of text.
    #[serde(deserialize_with = "number")]
    pub bits_per_byte: f64,
    /// The same as perplexity a token.
    #[serde(deserialize_with = "number")]
    pub perplexity: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Duration.
    pub seconds: f64,
}

/// A number; JSON has none that are not finite, and `null` in their place.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// A line of the file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Line {
    /// A step.
    Step(StepLine),
    /// A validation.
    Validation(ValidationLine),
}

impl Line {
    /// Steps done when it was written.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(line) => line.step,
            Self::Validation(line) => line.step,
        }
    }
}

/// Reads a metrics file. A last line without an end, as an interrupted writer leaves it, is left out.
///
/// # Errors
/// If the file cannot be read or a line is no metrics line.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let mut reader = BufReader::new(File::open(path).map_err(Error::read(path))?);
    let (mut lines, mut text) = (Vec::new(), String::new());
    loop {
        text.clear();
        reader.read_line(&mut text).map_err(Error::read(path))?;
        if !text.ends_with('\n') {
            return Ok(lines);
        }
        let line = serde_json::from_str(&text);
        lines.push(line.map_err(|error| Error::content(path, format!("line {}: {error}", lines.len() + 1)))?);
    }
}

/// Appends lines to a metrics file.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    line: Vec<u8>,
}

impl Writer {
    /// Opens the file for a run that has done `step` steps: lines of later steps, from a run that was cut off, go away.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let kept = match read(path) {
            Ok(lines) => lines.into_iter().filter(|line| line.step() <= step && step > 0).collect(),
            Err(Error::File(nsa_core::FileError::Read { source, .. })) if source.kind() == ErrorKind::NotFound => {
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        let mut text = Vec::new();
        for line in &kept {
            write_line(&mut text, line);
        }
        write_atomic(path, &text)?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::write(path))?;
        Ok(Self { path: path.to_owned(), file, line: Vec::with_capacity(1024) })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&mut self, line: &Line) -> Result<()> {
        self.line.clear();
        write_line(&mut self.line, line);
        self.file.write_all(&self.line).map_err(Error::write(&self.path))
    }
}

fn write_line(out: &mut Vec<u8>, line: &Line) {
    serde_json::to_writer(&mut *out, line).expect("a line is plain JSON");
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_are_not_finite_are_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(METRICS_FILE);
        let numbers = [f64::INFINITY, f64::NAN, 1.0];
        let lines = numbers.map(|perplexity| ValidationLine {
            step: 3,
            loss: 800.0,
            bits_per_byte: 1.5,
            perplexity,
            tokens: 9,
            seconds: 0.5,
        });
        let mut writer = Writer::open(&path, 0).unwrap();
        lines.iter().for_each(|&line| writer.write(&Line::Validation(line)).unwrap());
        let found = read(&path).unwrap();
        let finite = found.iter().map(|line| matches!(line, Line::Validation(line) if line.perplexity.is_finite()));
        assert_eq!(finite.collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(found[2], Line::Validation(lines[2]));
    }
}
