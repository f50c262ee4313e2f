//! Tokens of a step with their targets.

use crate::{Error, Result};
use nsa_core::{CuSeqlens, Packing};
use nsa_kernels::layer::cross_entropy::IGNORED;

/// Packed sequences of tokens, each with the token that follows it.
#[derive(Clone, Debug)]
pub struct Batch {
    tokens: Vec<u32>,
    targets: Vec<u32>,
    lengths: Vec<usize>,
    packing: Packing,
}

impl Default for Batch {
    fn default() -> Self {
        let packing = Packing::new(CuSeqlens::from_lengths([]).expect("no sequence fits"));
        Self { tokens: Vec::new(), targets: Vec::new(), lengths: Vec::new(), packing }
    }
}

impl Batch {
    /// Whole texts, each token's target being the next one; the last token of each has none.
    ///
    /// # Errors
    /// If there are more tokens than an i32 offset addresses.
    pub fn next_token(sequences: &[&[u32]]) -> Result<Self> {
        let mut batch = Self::default();
        for sequence in sequences {
            batch.push(sequence, sequence.len());
        }
        batch.finish()?;
        Ok(batch)
    }

    /// Removes every sequence and keeps the memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.targets.clear();
        self.lengths.clear();
    }

    /// Adds a sequence of the first `inputs` elements of `tokens`; an element after them is the last one's target.
    /// Takes effect with [`Batch::finish`].
    pub fn push(&mut self, tokens: &[u32], inputs: usize) {
        self.push_scored(tokens, inputs, 0);
    }

    /// Like [`Batch::push`], but the first `unscored` inputs have no target.
    pub fn push_scored(&mut self, tokens: &[u32], inputs: usize, unscored: usize) {
        self.tokens.extend(&tokens[..inputs]);
        let targets = (0..inputs).map(|i| match tokens.get(i + 1) {
            Some(&target) if i >= unscored => target,
            _ => IGNORED,
        });
        self.targets.extend(targets);
        self.lengths.push(inputs);
    }

    /// Completes the offsets after the last sequence was added.
    ///
    /// # Errors
    /// If there are more tokens than an i32 offset addresses.
    pub fn finish(&mut self) -> Result<()> {
        let offsets = CuSeqlens::from_lengths(self.lengths.iter().copied()).map_err(Error::from)?;
        self.packing = Packing::new(offsets);
        Ok(())
    }

    /// Inputs `[N]`.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Targets `[N]`, `u32::MAX` where there is none.
    pub fn targets(&self) -> &[u32] {
        &self.targets
    }

    /// The sequences.
    pub fn packing(&self) -> &Packing {
        &self.packing
    }

    /// Number of tokens that have a target.
    pub fn num_targets(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORED).count()
    }

    /// Length of the longest sequence.
    pub fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }
}
