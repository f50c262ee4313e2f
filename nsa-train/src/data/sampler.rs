//! The order in which training text is seen.

use super::Text;
use crate::model::Batch;
use crate::random::{Purpose, generator};
use crate::{Error, Result};
use rand::RngExt;
use rand::seq::SliceRandom;

/// Draws sequences of a fixed number of tokens, without end, in an order that depends on the seed and on the number of
/// sequences drawn before: that number alone is the position in the data.
///
/// In every epoch the documents are put in a new order behind one another, the ring that they form is cut into sequences
/// from a new place on, and the sequences are drawn in random order. A sequence that crosses from one document to the next
/// becomes two in the batch's offsets, so that nothing attends across; the last token of a document has no target.
#[derive(Debug)]
pub struct Sampler {
    text: Text,
    context: usize,
    seed: u64,
    epoch: Option<u64>,
    /// Parts in this epoch's order.
    order: Vec<u32>,
    /// Place in the ring of each of them, then the ring's length.
    starts: Vec<u64>,
    /// Sequences in this epoch's order.
    rows: Vec<u32>,
    /// Place in the ring of sequence 0.
    phase: u64,
    scratch: Vec<u32>,
}

impl Sampler {
    /// A sampler of sequences of `context` tokens.
    ///
    /// # Errors
    /// If the text is shorter than one sequence, or has 2³² sequences or more.
    pub fn new(text: Text, context: usize, seed: u64) -> Result<Self> {
        let tokens = text.section.num_tokens();
        if context == 0 || tokens < context as u64 {
            let rule = format!("must be from 1 to the length of the training text, {tokens} tokens");
            return Err(Error::value("context", context, rule));
        }
        if u32::try_from(tokens / context as u64).is_err() || u32::try_from(text.section.parts().len()).is_err() {
            return Err(Error::value("context", context, format!("cuts {tokens} tokens into too many sequences")));
        }
        let parts = text.section.parts().len();
        let rows = Vec::with_capacity((tokens / context as u64) as usize);
        Ok(Self {
            text,
            context,
            seed,
            epoch: None,
            order: Vec::with_capacity(parts),
            starts: Vec::with_capacity(parts + 1),
            rows,
            phase: 0,
            scratch: Vec::with_capacity(context + 1),
        })
    }

    /// Sequences of one epoch.
    pub fn sequences_per_epoch(&self) -> u64 {
        self.text.section.num_tokens() / self.context as u64
    }

    /// Fills `batch` with `count` sequences, the first of which is the `position`-th drawn.
    ///
    /// # Errors
    /// If the batch exceeds 2³¹ tokens.
    pub fn fill(&mut self, position: u64, count: usize, batch: &mut Batch) -> Result<()> {
        batch.clear();
        for sequence in position..position + count as u64 {
            self.enter_epoch(sequence / self.sequences_per_epoch());
            let row = self.rows[(sequence % self.sequences_per_epoch()) as usize];
            self.push_row(u64::from(row), batch);
        }
        batch.finish()
    }

    fn enter_epoch(&mut self, epoch: u64) {
        if self.epoch == Some(epoch) {
            return;
        }
        let mut rng = generator(self.seed, Purpose::Order, epoch);
        let parts = self.text.section.parts();
        self.order.clear();
        self.order.extend(0..parts.len() as u32);
        self.order.shuffle(&mut rng);
        self.starts.clear();
        self.starts.push(0);
        let mut end = 0;
        for &part in &self.order {
            end += parts[part as usize].len();
            self.starts.push(end);
        }
        self.rows.clear();
        self.rows.extend(0..(end / self.context as u64) as u32);
        self.rows.shuffle(&mut rng);
        self.phase = rng.random_range(0..end);
        self.epoch = Some(epoch);
    }

    fn push_row(&mut self, row: u64, batch: &mut Batch) {
        let ring = self.starts[self.starts.len() - 1];
        let mut place = (self.phase + row * self.context as u64) % ring;
        let mut left = self.context as u64;
        while left > 0 {
            let at = self.starts.partition_point(|&start| start <= place) - 1;
            let part = &self.text.section.parts()[self.order[at] as usize];
            let start = part.tokens.start + (place - self.starts[at]);
            let end = part.tokens.end.min(start + left);
            // One more token than inputs, if the document goes on: the last target.
            self.scratch.clear();
            self.text.corpus.copy_tokens(start..part.tokens.end.min(end + 1), &mut self.scratch);
            batch.push(&self.scratch, (end - start) as usize);
            left -= end - start;
            place = (place + end - start) % ring;
        }
    }
}
