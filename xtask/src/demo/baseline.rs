//! What general compressors make of a text, in bits per byte.

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use lzma_rust2::{XzOptions, XzWriter};
use std::io::Write;

/// As `gzip -9` compresses it.
///
/// # Errors
/// None that the compressor should meet in memory.
pub fn gzip(text: &[u8]) -> Result<f64> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(text)?;
    Ok(bits_per_byte(encoder.finish()?.len(), text))
}

/// As `xz -9` compresses it.
///
/// # Errors
/// None that the compressor should meet in memory.
pub fn xz(text: &[u8]) -> Result<f64> {
    let mut encoder = XzWriter::new(Vec::new(), XzOptions::with_preset(9)).context("xz")?;
    encoder.write_all(text)?;
    Ok(bits_per_byte(encoder.finish()?.len(), text))
}

fn bits_per_byte(compressed: usize, text: &[u8]) -> f64 {
    8.0 * compressed as f64 / text.len() as f64
}
