//! Text files to batches: tokenised once into a mapped file ([`Corpus`]), divided into training and validation
//! ([`Split`]), drawn in an order that one number describes ([`Sampler`]).

mod corpus;
mod sampler;
mod split;

pub use corpus::{Corpus, TextOptions, unescape};
pub use sampler::Sampler;
pub use split::{Part, Section, Split, split};

use crate::Result;
use std::sync::Arc;

/// A part of a corpus that is trained or evaluated on.
#[derive(Clone, Debug)]
pub struct Text {
    /// The tokens.
    pub corpus: Arc<Corpus>,
    /// Which of them.
    pub section: Section,
}

impl Text {
    /// All of a corpus.
    pub fn whole(corpus: Arc<Corpus>) -> Self {
        let section = Section::whole(&corpus);
        Self { corpus, section }
    }

    /// Training and validation parts of a corpus; see [`split`].
    ///
    /// # Errors
    /// If one of the two would be empty.
    pub fn split(corpus: Arc<Corpus>, how: Split, fraction: f64, seed: u64) -> Result<(Self, Option<Self>)> {
        let (train, validation) = split(&corpus, how, fraction, seed)?;
        let validation = validation.map(|section| Self { corpus: Arc::clone(&corpus), section });
        Ok((Self { corpus, section: train }, validation))
    }
}
