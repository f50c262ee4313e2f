//! Training and validation parts of a corpus.

use super::Corpus;
use crate::random::{Purpose, generator};
use crate::{Error, Result};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How validation text is taken out of a corpus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// By document if there are two or more, else by offset.
    #[default]
    Auto,
    /// Whole documents, chosen by the seed.
    Documents,
    /// The end of the last documents.
    Offset,
}

/// A run of tokens of one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Tokens of the corpus.
    pub tokens: Range<u64>,
    /// Bytes of their text; of a document that is cut, the share of its tokens.
    pub bytes: u64,
}

impl Part {
    /// Number of tokens.
    pub fn len(&self) -> u64 {
        self.tokens.end - self.tokens.start
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Documents, or parts of them, in the order of the corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    parts: Vec<Part>,
}

impl Section {
    /// Every document.
    pub fn whole(corpus: &Corpus) -> Self {
        Self { parts: (0..corpus.num_documents()).map(|document| whole_document(corpus, document)).collect() }
    }

    /// Documents, or parts of them.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Number of tokens.
    pub fn num_tokens(&self) -> u64 {
        self.parts.iter().map(Part::len).sum()
    }

    /// Bytes of text.
    pub fn num_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

fn whole_document(corpus: &Corpus, document: usize) -> Part {
    Part { tokens: corpus.document(document), bytes: corpus.document_bytes(document) }
}

/// Divides a corpus into training and validation: at least `fraction` of the tokens go to validation when whole
/// documents are taken (as far as one document remains to train on), the nearest number when the end is taken. There is
/// no validation if `fraction` is 0.
///
/// # Errors
/// If `fraction` is not in 0..1 or one of the two would be empty.
pub fn split(corpus: &Corpus, how: Split, fraction: f64, seed: u64) -> Result<(Section, Option<Section>)> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(Error::value("val-fraction", fraction, "must be at least 0 and below 1"));
    }
    if fraction == 0.0 {
        return Ok((Section::whole(corpus), None));
    }
    let (train, validation) = match how {
        Split::Auto if corpus.num_documents() < 2 => split_offset(corpus, fraction),
        Split::Auto | Split::Documents => split_documents(corpus, fraction, seed),
        Split::Offset => split_offset(corpus, fraction),
    };
    for (name, section) in [("training", &train), ("validation", &validation)] {
        if section.num_tokens() == 0 {
            let rule = format!("leaves no {name} text of {} documents", corpus.num_documents());
            return Err(Error::value("val-fraction", fraction, rule));
        }
    }
    Ok((train, Some(validation)))
}

fn split_documents(corpus: &Corpus, fraction: f64, seed: u64) -> (Section, Section) {
    let mut order: Vec<usize> = (0..corpus.num_documents()).collect();
    order.shuffle(&mut generator(seed, Purpose::Split, 0));
    let wanted = fraction * corpus.num_tokens() as f64;
    let (mut chosen, mut tokens) = (vec![false; order.len()], 0u64);
    for &document in order.iter().take(order.len().saturating_sub(1)) {
        if tokens as f64 >= wanted {
            break;
        }
        chosen[document] = true;
        let range = corpus.document(document);
        tokens += range.end - range.start;
    }
    let take = |which: bool| {
        let documents = (0..corpus.num_documents()).filter(|&document| chosen[document] == which);
        Section { parts: documents.map(|document| whole_document(corpus, document)).collect() }
    };
    (take(false), take(true))
}

fn split_offset(corpus: &Corpus, fraction: f64) -> (Section, Section) {
    let total = corpus.num_tokens();
    let cut = total - ((total as f64 * fraction).round() as u64).min(total);
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for document in 0..corpus.num_documents() {
        let whole = whole_document(corpus, document);
        let middle = cut.clamp(whole.tokens.start, whole.tokens.end);
        let share = (middle - whole.tokens.start) as f64 / whole.len().max(1) as f64;
        let bytes = (whole.bytes as f64 * share).round() as u64;
        let before = Part { tokens: whole.tokens.start..middle, bytes };
        let after = Part { tokens: middle..whole.tokens.end, bytes: whole.bytes - bytes };
        train.extend(Some(before).filter(|part| !part.is_empty()));
        validation.extend(Some(after).filter(|part| !part.is_empty()));
    }
    (Section { parts: train }, Section { parts: validation })
}
