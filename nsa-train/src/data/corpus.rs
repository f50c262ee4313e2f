//! Text files, tokenised once into a mapped file that remembers where documents end.

use crate::files::{hash_file, hex, write_folder_atomic};
use crate::mapped::map;
use crate::{Error, Result};
use memmap2::Mmap;
use nsa_core::FileError;
use nsa_core::tokenizer::Tokenizer;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Version of the cache's format, part of its hash.
const FORMAT: u32 = 1;
const TOKENS_FILE: &str = "tokens.bin";
const INDEX_FILE: &str = "index.json";
/// Text that is tokenised at once, in bytes, so that memory does not grow with the files.
const CHUNK_BYTES: usize = 64 << 20;

/// How files become documents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TextOptions {
    /// Text between two documents of a file, left out; a file is one document without it.
    pub separator: Option<String>,
    /// Token put before every document.
    pub bos: Option<u32>,
    /// Token put after every document.
    pub eos: Option<u32>,
}

/// What `index.json` holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    format: u32,
    hash: String,
    vocab_size: usize,
    token_bytes: usize,
    /// Token after the last of each document.
    document_ends: Vec<u64>,
    /// Bytes of text of each document.
    document_bytes: Vec<u64>,
}

/// Tokens of text files, mapped into memory.
#[derive(Debug)]
pub struct Corpus {
    map: Mmap,
    path: PathBuf,
    index: Index,
}

impl Corpus {
    /// The tokens of `files`, from the folder `cache` if the same text was tokenised in the same way before, else made
    /// there. Documents keep the order of the files; empty ones are left out.
    ///
    /// # Errors
    /// If a file cannot be read, is no UTF-8 or cannot be tokenised, if there is no text, or if the cache is damaged.
    pub fn open(files: &[PathBuf], tokenizer: &Tokenizer, options: &TextOptions, cache: &Path) -> Result<Self> {
        if options.separator.as_deref() == Some("") {
            return Err(Error::value("document-separator", "\"\"", "must not be empty"));
        }
        let hash = content_hash(files, tokenizer, options)?;
        let folder = cache.join(&hash);
        if !folder.exists() {
            std::fs::create_dir_all(cache).map_err(Error::write(cache))?;
            write_folder_atomic(&folder, |unfinished| tokenize(files, tokenizer, options, &hash, unfinished))?;
        }
        Self::open_folder(&folder, &hash)
    }

    fn open_folder(folder: &Path, hash: &str) -> Result<Self> {
        let index_path = folder.join(INDEX_FILE);
        let index: Index = nsa_core::read_json(&index_path)?;
        let damaged =
            |path: &Path, what: String| Error::content(path, format!("{what}; delete its folder to start anew"));
        if index.hash != hash || index.format != FORMAT {
            return Err(damaged(&index_path, format!("it belongs to text of hash {}, not {hash}", index.hash)));
        }
        let ascending = index.document_ends.is_sorted();
        let tokens = index.document_ends.last().copied().unwrap_or(0);
        if !ascending || tokens == 0 || index.document_ends.len() != index.document_bytes.len() {
            return Err(damaged(&index_path, "its documents do not add up".to_owned()));
        }
        if ![1, 2, 4].contains(&index.token_bytes) {
            return Err(damaged(&index_path, format!("tokens of {} bytes", index.token_bytes)));
        }
        let path = folder.join(TOKENS_FILE);
        let map = map(&path)?;
        let expected = tokens.saturating_mul(index.token_bytes as u64);
        if map.len() as u64 != expected {
            return Err(damaged(&path, format!("{} bytes, expected {expected}", map.len())));
        }
        Ok(Self { map, path, index })
    }

    /// What identifies text, tokenizer and separator, in hexadecimal.
    pub fn hash(&self) -> &str {
        &self.index.hash
    }

    /// The mapped file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of tokens.
    pub fn num_tokens(&self) -> u64 {
        self.index.document_ends.last().copied().unwrap_or(0)
    }

    /// Number of documents.
    pub fn num_documents(&self) -> usize {
        self.index.document_ends.len()
    }

    /// Tokens of document `document`.
    pub fn document(&self, document: usize) -> Range<u64> {
        let start = document.checked_sub(1).map_or(0, |before| self.index.document_ends[before]);
        start..self.index.document_ends[document]
    }

    /// Bytes of text of document `document`.
    pub fn document_bytes(&self, document: usize) -> u64 {
        self.index.document_bytes[document]
    }

    /// Ids of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.index.vocab_size
    }

    /// Appends the tokens of `range` to `out`.
    ///
    /// # Panics
    /// If the range reaches beyond the corpus.
    pub fn copy_tokens(&self, range: Range<u64>, out: &mut Vec<u32>) {
        let width = self.index.token_bytes;
        let bytes = &self.map[range.start as usize * width..range.end as usize * width];
        match width {
            1 => out.extend(bytes.iter().map(|&byte| u32::from(byte))),
            2 => out.extend(bytes.as_chunks().0.iter().map(|&token| u32::from(u16::from_le_bytes(token)))),
            _ => out.extend(bytes.as_chunks().0.iter().map(|&token| u32::from_le_bytes(token))),
        }
    }
}

/// Hash of everything that the tokens depend on.
fn content_hash(files: &[PathBuf], tokenizer: &Tokenizer, options: &TextOptions) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut part = |text: &str| {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    };
    part(&FORMAT.to_string());
    part(&tokenizer.path().map_or(Ok("bytes".to_owned()), hash_file)?);
    part(&serde_json::to_string(options).expect("options are plain JSON"));
    for file in files {
        part(&hash_file(file)?);
    }
    Ok(hex(hasher))
}

/// Writes tokens and index of `files` to `folder`.
fn tokenize(files: &[PathBuf], tokenizer: &Tokenizer, options: &TextOptions, hash: &str, folder: &Path) -> Result<()> {
    let vocab_size = tokenizer.vocab_size();
    let token_bytes = match vocab_size {
        0..=0x100 => 1,
        0x101..=0x1_0000 => 2,
        _ => 4,
    };
    let mut index = Index {
        format: FORMAT,
        hash: hash.to_owned(),
        vocab_size,
        token_bytes,
        document_ends: Vec::new(),
        document_bytes: Vec::new(),
    };
    let path = folder.join(TOKENS_FILE);
    let mut out = BufWriter::new(File::create(&path).map_err(Error::write(&path))?);
    for file in files {
        let text = read_utf8(file)?;
        let documents = split_documents(&text, options.separator.as_deref());
        for group in groups(&documents) {
            let encoded: Vec<Vec<u32>> =
                group.par_iter().map(|text| tokenizer.encode(text)).collect::<std::result::Result<_, _>>()?;
            for (text, tokens) in group.iter().zip(encoded) {
                write_document(&mut out, &mut index, options, text, &tokens).map_err(Error::write(&path))?;
            }
        }
    }
    out.flush().map_err(Error::write(&path))?;
    if index.document_ends.is_empty() {
        let names: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
        return Err(Error::value("data", names.join(", "), "there must be some text"));
    }
    let path = folder.join(INDEX_FILE);
    let json = serde_json::to_vec(&index).expect("an index is plain JSON");
    std::fs::write(&path, json).map_err(Error::write(&path))
}

fn read_utf8(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|source| FileError::Read { path: path.to_owned(), source })?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::content(path, format!("not UTF-8: ill-formed at byte {at}"))
    })
}

/// The documents of a file.
fn split_documents<'a>(text: &'a str, separator: Option<&str>) -> Vec<&'a str> {
    let parts: Vec<&str> = match separator {
        Some(separator) => text.split(separator).collect(),
        None => vec![text],
    };
    parts.into_iter().filter(|part| !part.is_empty()).collect()
}

/// Runs of documents of about [`CHUNK_BYTES`].
fn groups<'a, 'b>(documents: &'b [&'a str]) -> Vec<&'b [&'a str]> {
    let mut groups = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, document) in documents.iter().enumerate() {
        bytes += document.len();
        if bytes >= CHUNK_BYTES || i + 1 == documents.len() {
            groups.push(&documents[start..=i]);
            (start, bytes) = (i + 1, 0);
        }
    }
    groups
}

fn write_document(
    out: &mut impl Write,
    index: &mut Index,
    options: &TextOptions,
    text: &str,
    tokens: &[u32],
) -> std::io::Result<()> {
    let mut count = index.document_ends.last().copied().unwrap_or(0);
    let all = options.bos.iter().chain(tokens).chain(&options.eos);
    for token in all {
        // Ids are below the vocabulary's size, by which the width was chosen.
        out.write_all(&token.to_le_bytes()[..index.token_bytes])?;
        count += 1;
    }
    index.document_ends.push(count);
    index.document_bytes.push(text.len() as u64);
    Ok(())
}

/// Text with the escapes `\f`, `\n`, `\r`, `\t`, `\0` and `\\` replaced, as a separator is written on a command line.
///
/// # Errors
/// If another character follows a backslash.
///
/// ```
/// assert_eq!(nsa_train::data::unescape(r"\f\n--")?, "\x0c\n--");
/// # Ok::<(), nsa_train::Error>(())
/// ```
pub fn unescape(text: &str) -> Result<String> {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        out.push(match chars.next() {
            Some('f') => '\x0c',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('0') => '\0',
            Some('\\') => '\\',
            _ => {
                let rule = r"only \f, \n, \r, \t, \0 and \\ are known";
                return Err(Error::value("document-separator", text, rule));
            }
        });
    }
    Ok(out)
}
