//! A sequence and its caches.

use crate::cache::AnyCache;
use crate::model::{NewTokens, Wanted};
use crate::sample::Sampler;
use crate::{Error, Model, Result};

/// How a session computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionOptions {
    /// Tokens of a prompt that run through the model at once, at least 1. Larger is faster and takes more memory.
    pub chunk: usize,
    /// Tokens that [`Session::truncate`] can take back without computing anything again. Each costs one more row of keys
    /// and values in the window's ring and in that of the pending block; dense attention needs none.
    pub undo: usize,
}

impl Default for SessionOptions {
    /// Chunks of 512, nothing kept for taking back.
    fn default() -> Self {
        Self { chunk: 512, undo: 0 }
    }
}

impl SessionOptions {
    pub(crate) fn check(&self) -> Result<()> {
        if self.chunk == 0 {
            let (argument, value) = ("chunk", "0".to_owned());
            return Err(Error::Argument { argument, value, rule: "must be at least 1".to_owned() });
        }
        Ok(())
    }
}

/// Memory traffic of decoding: token-rows of keys and values that one layer's attention read, summed over steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    /// Decoding steps.
    pub steps: u64,
    /// Rows read.
    pub rows: u64,
    /// Rows that full attention reads in the same steps.
    pub full_rows: u64,
}

impl std::ops::AddAssign for Reads {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.rows += other.rows;
        self.full_rows += other.full_rows;
    }
}

/// A sequence of tokens with the caches of what was computed of it.
///
/// Tokens are added without delay and computed when logits are asked for, in chunks. A clone is a [`Session::fork`].
///
/// ```no_run
/// use nsa_decode::{Backend, Model};
/// let (backend, _why) = Backend::pick(None)?;
/// let model = Model::open("checkpoint", backend)?;
/// let mut session = model.session();
/// let logits = session.append(&model.encode_prompt("Once upon")?)?;
/// assert_eq!(logits.len(), model.config().vocab_size());
/// let mut other = session.fork();
/// other.append(&model.tokenizer().encode(" a time")?)?;
/// session.truncate(4)?;
/// # Ok::<(), nsa_decode::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Session {
    model: Model,
    options: SessionOptions,
    tokens: Vec<u32>,
    /// Of the first `cache.len()` tokens.
    cache: AnyCache,
    /// Of the last token, if the caches hold it; empty if they are not known.
    logits: Vec<f32>,
    reads: Reads,
}

impl Session {
    pub(crate) fn new(model: Model, mut options: SessionOptions) -> Self {
        // No sequence has more.
        options.undo = options.undo.min(model.config().max_position_embeddings());
        let inner = model.inner();
        let cache = AnyCache::new(inner.precision(), inner.config(), inner.attention(), options.undo);
        Self { model, options, tokens: Vec::new(), cache, logits: Vec::new(), reads: Reads::default() }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens that are still to be computed.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.cache.len()
    }

    /// Bytes of the caches. Pages shared with forks count in each.
    pub fn cache_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Memory traffic of this session's decoding steps so far.
    pub fn reads(&self) -> Reads {
        self.reads
    }

    /// Adds tokens, to be computed when logits are asked for.
    ///
    /// # Errors
    /// If a token is not of the vocabulary or the sequence would exceed the model's longest context; nothing is added then.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        let config = self.model.config();
        let (limit, vocab_size) = (config.max_position_embeddings(), config.vocab_size());
        let total = self.tokens.len() + tokens.len();
        if total > limit {
            return Err(Error::ContextFull { tokens: total, limit });
        }
        if let Some(index) = tokens.iter().position(|&token| token as usize >= vocab_size) {
            let position = self.tokens.len() + index;
            return Err(Error::Token { position, token: tokens[index], vocab_size });
        }
        if !tokens.is_empty() {
            self.tokens.extend_from_slice(tokens);
            self.logits.clear();
        }
        Ok(())
    }

    /// Logits of the last token, `[V]`.
    ///
    /// # Errors
    /// If there is no token, or an operation refuses.
    pub fn logits(&mut self) -> Result<&[f32]> {
        if self.logits.is_empty() {
            advance(&mut [self])?;
        }
        Ok(&self.logits)
    }

    /// Adds tokens and returns the logits of the last: [`Session::push`], then [`Session::logits`].
    ///
    /// # Errors
    /// Those of the two.
    pub fn append(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.push(tokens)?;
        self.logits()
    }

    /// Adds tokens and returns the logits of each of them, `[tokens, V]`.
    ///
    /// # Errors
    /// Those of [`Session::append`].
    pub fn append_all(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let before = self.tokens.len();
        if self.pending() > 0 {
            self.logits()?;
        }
        self.push(tokens)?;
        let vocab = self.model.config().vocab_size();
        let (mut all, mut part) = (Vec::with_capacity(tokens.len() * vocab), Vec::new());
        while self.cache.len() < self.tokens.len() {
            let take = self.pending().min(self.options.chunk);
            pass(&mut [self], &[take], Wanted::All, &mut part)?;
            all.extend_from_slice(&part);
        }
        debug_assert_eq!(all.len(), (self.tokens.len() - before) * vocab);
        if !tokens.is_empty() {
            self.logits.extend_from_slice(&all[all.len() - vocab..]);
        }
        Ok(all)
    }

    /// Draws a token after the last; its logits must be known.
    pub(crate) fn draw(&self, sampler: &mut Sampler) -> Result<u32> {
        Ok(sampler.sample(&self.logits, &self.tokens)?)
    }

    /// A second sequence with the same tokens. Whole pages of the caches are shared; what either writes to is copied first.
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Cuts the sequence back to its first `len` tokens. What follows is the same as in a session that never had more.
    ///
    /// Pages are cut where they are. The rings of sparse attention cannot be: up to [`SessionOptions::undo`] tokens they
    /// are restored from what fell out of them, beyond that the remaining tokens are computed again when logits are asked
    /// for. (Logits of the last remaining token take one more token back.)
    ///
    /// # Errors
    /// If there are fewer tokens.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.tokens.len() {
            return Err(Error::Truncate { len, tokens: self.tokens.len() });
        }
        if len < self.tokens.len() {
            self.tokens.truncate(len);
            self.logits.clear();
            self.rewind(len)?;
        }
        Ok(())
    }

    /// Makes the caches hold at most `len` tokens: cut back if possible, else none.
    fn rewind(&mut self, len: usize) -> Result<()> {
        if self.cache.len() <= len {
            return Ok(());
        }
        let inner = self.model.inner();
        let done = self.cache.rewind(inner.backend(), inner.attention(), len);
        if !matches!(done, Ok(true)) {
            self.drop_cache();
        }
        done.map(|_| ())
    }

    fn drop_cache(&mut self) {
        let inner = self.model.inner();
        self.cache = AnyCache::new(inner.precision(), inner.config(), inner.attention(), self.options.undo);
        self.logits.clear();
    }
}

/// Computes the pending tokens of several sequences together, so that each pass reads the weights once for all of them:
/// afterwards [`Session::logits`] of each costs nothing.
///
/// Sequences of any lengths may be combined. A pass takes at most `chunk` tokens of a sequence and as many in all (but one
/// of each sequence at least may fit).
///
/// # Errors
/// If sessions are of different models, one is empty, or an operation refuses.
pub fn advance(sessions: &mut [&mut Session]) -> Result<()> {
    if let Some(index) = sessions.iter().position(|session| !session.model.same_as(&sessions[0].model)) {
        return Err(Error::ForeignSession { index });
    }
    for session in sessions.iter_mut().filter(|session| session.logits.is_empty()) {
        // The logits of a token that is in the caches are gone: it runs again.
        let last = session.tokens.len().checked_sub(1).ok_or(Error::NoTokens)?;
        session.rewind(last)?;
    }
    let mut logits = Vec::new();
    loop {
        let mut behind: Vec<&mut Session> =
            sessions.iter_mut().map(|session| &mut **session).filter(|session| session.pending() > 0).collect();
        if behind.is_empty() {
            return Ok(());
        }
        let chunk = behind.iter().map(|session| session.options.chunk).max().unwrap_or(1);
        let mut room = chunk.max(behind.len());
        let mut takes = Vec::with_capacity(behind.len());
        behind.retain(|session| {
            let take = session.pending().min(session.options.chunk).min(room);
            room -= take;
            takes.extend((take > 0).then_some(take));
            take > 0
        });
        let ends = behind.iter().zip(&takes).any(|(session, &take)| take == session.pending());
        pass(&mut behind, &takes, if ends { Wanted::Last } else { Wanted::None }, &mut logits)?;
        if ends {
            let vocab = behind[0].model.config().vocab_size();
            for (session, row) in behind.iter_mut().zip(logits.chunks_exact(vocab)) {
                if session.pending() == 0 {
                    session.logits.clear();
                    session.logits.extend_from_slice(row);
                }
            }
        }
    }
}

/// Runs the next `takes[s]` tokens of each session.
fn pass(sessions: &mut [&mut Session], takes: &[usize], wanted: Wanted, logits: &mut Vec<f32>) -> Result<()> {
    let model = sessions[0].model.clone();
    let mut new: Vec<NewTokens<'_>> = sessions
        .iter_mut()
        .zip(takes)
        .map(|(session, &take)| {
            let start = session.cache.len();
            NewTokens { cache: &mut session.cache, tokens: &session.tokens[start..start + take] }
        })
        .collect();
    match model.inner().forward(&mut new, wanted, logits) {
        Ok(rows_read) => {
            if takes.iter().all(|&take| take == 1) {
                for (session, rows) in sessions.iter_mut().zip(rows_read) {
                    session.reads += Reads { steps: 1, rows: rows as u64, full_rows: session.cache.len() as u64 };
                }
            }
            Ok(())
        }
        Err(error) => {
            // Some layers have the new tokens, others not: all are computed again next time.
            sessions.iter_mut().for_each(|session| session.drop_cache());
            Err(error)
        }
    }
}
