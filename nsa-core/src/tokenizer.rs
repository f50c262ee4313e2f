//! Text to tokens and back: bytes, or a Hugging Face `tokenizer.json`; whole or token by token.

use crate::FileError;
use crate::model::{ModelConfig, TokenizerKind};
use std::path::{Path, PathBuf};

/// Name of the tokenizer's file in a checkpoint's folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Tokens without a whole character after which a [`DecodeStream`] takes replacement characters as final. A character
/// has at most 4 bytes and a token at least one, so text that is merely incomplete never gets here.
const MAX_HELD_TOKENS: usize = 32;

/// Text or tokens that a tokenizer cannot translate.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The tokenizer's file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The tokenizer has more ids than the model.
    #[error("{}: {tokenizer} ids, but the model's config field `vocab_size` is {model}", path.display())]
    Vocabulary {
        /// The tokenizer's file.
        path: PathBuf,
        /// Ids of the tokenizer.
        tokenizer: usize,
        /// Ids of the model.
        model: usize,
    },
    /// No token has this id.
    #[error("{name}: no token has id {id}; there are {vocab_size} ids")]
    UnknownId {
        /// The tokenizer.
        name: String,
        /// The id.
        id: u32,
        /// Ids of the tokenizer.
        vocab_size: usize,
    },
    /// The tokenizer refuses the text or the tokens.
    #[error("{}: {message}", path.display())]
    Refused {
        /// The tokenizer's file.
        path: PathBuf,
        /// Why, in the words of the tokenizers library.
        message: String,
    },
}

/// Text to tokens and back.
///
/// ```
/// use nsa_core::tokenizer::Tokenizer;
/// let tokenizer = Tokenizer::bytes();
/// let ids = tokenizer.encode("né")?;
/// assert_eq!(ids, [110, 195, 169]);
/// assert_eq!(tokenizer.decode(&ids)?, "né");
/// // Token by token: a character comes out once it is whole.
/// let mut stream = tokenizer.stream();
/// let parts = ids.iter().map(|&id| stream.push(id)).collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(parts, ["n", "", "é"]);
/// assert_eq!(stream.finish()?, "");
/// # Ok::<(), nsa_core::tokenizer::TokenizerError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tokenizer(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Bytes,
    File { path: PathBuf, vocab_size: usize, tokenizer: Box<tokenizers::Tokenizer> },
}

impl Tokenizer {
    /// Bytes: id = byte, 256 ids.
    pub fn bytes() -> Self {
        Self(Kind::Bytes)
    }

    /// A Hugging Face `tokenizer.json`. Truncation and padding that the file may ask for do not apply.
    ///
    /// # Errors
    /// If the file cannot be read, is no tokenizer or has added tokens with gaps before them.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| FileError::Read { path: path.to_owned(), source })?;
        let content = |error: tokenizers::Error| FileError::Content {
            path: path.to_owned(),
            message: format!("not a tokenizer: {error}"),
        };
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(&bytes).map_err(content)?;
        tokenizer.with_truncation(None).map_err(content)?;
        tokenizer.with_padding(None);
        check_added_tokens(&tokenizer, &bytes).map_err(content)?;
        // Ids may have gaps.
        let vocab_size = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self(Kind::File { path: path.to_owned(), vocab_size, tokenizer: Box::new(tokenizer) }))
    }

    /// The tokenizer of a model whose files lie in `folder`.
    ///
    /// # Errors
    /// If the model's `tokenizer.json` cannot be used or has more ids than the model.
    pub fn for_model(config: &ModelConfig, folder: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        if config.tokenizer() == TokenizerKind::Bytes {
            return Ok(Self::bytes());
        }
        let path = folder.as_ref().join(TOKENIZER_FILE);
        let tokenizer = Self::open(&path)?;
        if tokenizer.vocab_size() > config.vocab_size() {
            let (tokenizer, model) = (tokenizer.vocab_size(), config.vocab_size());
            return Err(TokenizerError::Vocabulary { path, tokenizer, model });
        }
        Ok(tokenizer)
    }

    /// What the tokens are, as the model's configuration says it.
    pub fn kind(&self) -> TokenizerKind {
        match self.0 {
            Kind::Bytes => TokenizerKind::Bytes,
            Kind::File { .. } => TokenizerKind::File,
        }
    }

    /// The file that the tokenizer was read from.
    pub fn path(&self) -> Option<&Path> {
        match &self.0 {
            Kind::Bytes => None,
            Kind::File { path, .. } => Some(path),
        }
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        match &self.0 {
            Kind::Bytes => 256,
            Kind::File { vocab_size, .. } => *vocab_size,
        }
    }

    /// Tokens of `text`. Nothing is added before or after; special tokens written out in the text become their ids.
    ///
    /// # Errors
    /// If the vocabulary cannot express the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        match &self.0 {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::File { path, tokenizer, .. } => {
                let encoding = tokenizer.encode_fast(text, false).map_err(|error| refused(path, &error))?;
                Ok(encoding.get_ids().to_vec())
            }
        }
    }

    /// Text of `ids`, special tokens included. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// If an id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        match &self.0 {
            Kind::Bytes => {
                let bytes = ids.iter().map(|&id| self.byte(id)).collect::<Result<Vec<u8>, _>>()?;
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::File { path, tokenizer, .. } => {
                // The library would leave unknown ids out without a word.
                if let Some(&id) = ids.iter().find(|&&id| tokenizer.id_to_token(id).is_none()) {
                    return Err(self.unknown(id));
                }
                tokenizer.decode(ids, false).map_err(|error| refused(path, &error))
            }
        }
    }

    /// A decoder that takes one token after another.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, bytes: Vec::new(), ids: Vec::new(), emitted: 0 }
    }

    fn byte(&self, id: u32) -> Result<u8, TokenizerError> {
        u8::try_from(id).map_err(|_| self.unknown(id))
    }

    fn unknown(&self, id: u32) -> TokenizerError {
        let name = self.path().map_or_else(|| "bytes".to_owned(), |path| path.display().to_string());
        TokenizerError::UnknownId { name, id, vocab_size: self.vocab_size() }
    }
}

/// The library numbers added tokens anew where the file leaves a gap before them; a model would see wrong ids.
fn check_added_tokens(tokenizer: &tokenizers::Tokenizer, file: &[u8]) -> Result<(), tokenizers::Error> {
    #[derive(serde::Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(serde::Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    let file: File = serde_json::from_slice(file)?;
    for Added { id, content } in file.added_tokens {
        if tokenizer.token_to_id(&content) != Some(id) {
            return Err(format!("added token `{content}` has id {id}, which does not follow the ids before it").into());
        }
    }
    Ok(())
}

fn refused(path: &Path, error: &tokenizers::Error) -> TokenizerError {
    TokenizerError::Refused { path: path.to_owned(), message: error.to_string() }
}

/// Text of tokens as they come: never a part of a character.
///
/// What [`DecodeStream::push`] and [`DecodeStream::finish`] return adds up to what [`Tokenizer::decode`] makes of all
/// tokens. (Two exceptions, both about ill-formed UTF-8 only and both in the number of U+FFFD: a `tokenizer.json` with
/// byte fallback replaces a whole run of bytes for one ill-formed sequence in it, of which a stream has already shown
/// the well-formed start; and after 32 tokens without a whole character a stream waits no longer.)
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Of a byte tokenizer: the start of a character.
    bytes: Vec<u8>,
    /// Of a file's tokenizer: the last tokens shown, as context (how a token reads may depend on the one before), then
    /// those held back.
    ids: Vec<u32>,
    /// How many of `ids` were shown.
    emitted: usize,
}

impl DecodeStream<'_> {
    /// Takes a token; returns the text that it completes, empty while a character is incomplete.
    ///
    /// # Errors
    /// If the id is not in the vocabulary; the stream is as before, then.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        if let Kind::Bytes = self.tokenizer.0 {
            self.bytes.push(self.tokenizer.byte(id)?);
            return Ok(self.whole_characters());
        }
        self.ids.push(id);
        let text = match self.held_text() {
            Ok(text) => text,
            Err(error) => {
                self.ids.pop();
                return Err(error);
            }
        };
        let may_change = text.ends_with(char::REPLACEMENT_CHARACTER);
        if text.is_empty() || (may_change && self.ids.len() - self.emitted < MAX_HELD_TOKENS) {
            return Ok(String::new());
        }
        self.ids.drain(..self.emitted);
        self.emitted = self.ids.len();
        Ok(text)
    }

    /// Returns what was held back, incomplete characters as U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer refuses tokens that it took before.
    pub fn finish(self) -> Result<String, TokenizerError> {
        match self.tokenizer.0 {
            Kind::Bytes => Ok(String::from_utf8_lossy(&self.bytes).into_owned()),
            Kind::File { .. } => self.held_text(),
        }
    }

    /// Text of the tokens held back, as it reads after those before them.
    fn held_text(&self) -> Result<String, TokenizerError> {
        let context = self.tokenizer.decode(&self.ids[..self.emitted])?;
        let mut text = self.tokenizer.decode(&self.ids)?;
        if text.starts_with(&context) {
            text.drain(..context.len());
            return Ok(text);
        }
        // The new tokens change how the context reads, but that is out already.
        self.tokenizer.decode(&self.ids[self.emitted..])
    }

    /// Takes whole characters out of `bytes`, ill-formed sequences as U+FFFD, and leaves the start of one.
    fn whole_characters(&mut self) -> String {
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            // Only what more bytes could complete waits: the last of these, and not if it is ill-formed already.
            let last = done + chunk.invalid().len() == self.bytes.len();
            let unfinished = last && std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
            if !chunk.invalid().is_empty() && !unfinished {
                text.push(char::REPLACEMENT_CHARACTER);
                done += chunk.invalid().len();
            }
        }
        self.bytes.drain(..done);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_keeps_only_its_context() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(TOKENIZER_FILE);
        let file = r#"{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}"#;
        std::fs::write(&path, file).expect("writes");
        let tokenizer = Tokenizer::open(&path).expect("a tokenizer");
        let mut stream = tokenizer.stream();
        for id in [0, 1, 1, 0, 1] {
            stream.push(id).expect("a known id");
            assert_eq!((stream.ids.as_slice(), stream.emitted), (&[id][..], 1));
        }
    }
}
