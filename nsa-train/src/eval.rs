//! What a model is worth on text.

use crate::data::Text;
use crate::model::{Batch, Model, Workspace};
use crate::{Error, Result};
use nsa_kernels::Element;
use serde::Serialize;
use std::f64::consts::LN_2;

/// How text is cut for evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalOptions {
    /// Tokens that a prediction may look back on, at most.
    pub context: usize,
    /// Tokens from one window to the next, at most `context`: with a smaller stride predictions see more context, and the
    /// work grows. Every token is predicted once in any case.
    pub stride: usize,
    /// Tokens to predict at most, from the start of the text on; 0 takes all.
    pub max_tokens: u64,
}

/// Losses on text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean loss of a predicted token, in nats.
    pub loss: f64,
    /// e^loss.
    pub perplexity: f64,
    /// Bits for one byte of text.
    pub bits_per_byte: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// First tokens of documents, which nothing precedes: each costs log2(vocabulary) bits in `bits_per_byte`.
    pub first_tokens: u64,
    /// Bytes of the text of all these tokens.
    pub bytes: u64,
    /// Documents, some perhaps in part.
    pub documents: usize,
}

/// Evaluates a model on text; documents are kept apart, and every token but the first of each is predicted once.
///
/// Bits per byte is a code length: the losses in bits, log2(vocabulary) for every first token, divided by the bytes of the
/// text (of a document that `max_tokens` cuts, the share of its tokens).
///
/// # Errors
/// If the options do not fit, the text has no token to predict, or a token is not in the vocabulary.
pub fn evaluate<T: Element>(
    model: &Model<T>,
    workspace: &mut Workspace<T>,
    text: &Text,
    options: EvalOptions,
) -> Result<Evaluation> {
    check(workspace, options)?;
    let mut totals = Totals::default();
    let mut batch = Batch::default();
    let mut scratch = Vec::new();
    let mut left = if options.max_tokens == 0 { u64::MAX } else { options.max_tokens };
    for part in text.section.parts().iter().filter(|part| !part.is_empty()) {
        if left == 0 {
            break;
        }
        let predicted = (part.len() - 1).min(left);
        left -= predicted;
        totals.documents += 1;
        totals.bytes += part.bytes as f64 * (predicted + 1) as f64 / part.len() as f64;
        for window in windows(predicted, options) {
            if batch.tokens().len() as u64 + window.inputs > workspace.capacity().tokens as u64 {
                totals.add(model, workspace, &mut batch)?;
            }
            let start = part.tokens.start + window.start;
            scratch.clear();
            text.corpus.copy_tokens(start..start + window.inputs + 1, &mut scratch);
            batch.push_scored(&scratch, window.inputs as usize, window.unscored as usize);
        }
    }
    totals.add(model, workspace, &mut batch)?;
    totals.finish(model.config().vocab_size())
}

fn check<T: Element>(workspace: &Workspace<T>, options: EvalOptions) -> Result<()> {
    let capacity = workspace.capacity();
    let longest = capacity.longest.min(capacity.tokens);
    if options.context == 0 {
        return Err(Error::value("context", options.context, "must not be zero"));
    }
    if options.context > longest {
        let rule = format!("must be at most the workspace's longest sequence, {longest}");
        return Err(Error::value("context", options.context, rule));
    }
    if options.stride == 0 || options.stride > options.context {
        let rule = format!("must be from 1 to context = {}", options.context);
        return Err(Error::value("stride", options.stride, rule));
    }
    Ok(())
}

/// Inputs `start..start + inputs` of a document, of which the first `unscored` repeat an earlier window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    start: u64,
    inputs: u64,
    unscored: u64,
}

/// Windows that predict tokens 1..=`predicted` of a document, each once.
fn windows(predicted: u64, options: EvalOptions) -> impl Iterator<Item = Window> {
    let (context, stride) = (options.context as u64, options.stride as u64);
    let mut scored = 0;
    let mut start = 0;
    std::iter::from_fn(move || {
        if scored == predicted {
            return None;
        }
        let end = predicted.min(start + context);
        let window = Window { start, inputs: end - start, unscored: scored - start };
        scored = end;
        start += stride;
        Some(window)
    })
}

#[derive(Debug, Default)]
struct Totals {
    nats: f64,
    tokens: u64,
    bytes: f64,
    documents: usize,
}

impl Totals {
    fn add<T: Element>(&mut self, model: &Model<T>, workspace: &mut Workspace<T>, batch: &mut Batch) -> Result<()> {
        batch.finish()?;
        if !batch.tokens().is_empty() {
            let loss = model.loss(workspace, batch)?;
            self.nats += loss.sum;
            self.tokens += loss.count as u64;
        }
        batch.clear();
        Ok(())
    }

    fn finish(self, vocab_size: usize) -> Result<Evaluation> {
        if self.tokens == 0 {
            return Err(Error::value("data", "text", "has no token to predict: every document has one token at most"));
        }
        let loss = self.nats / self.tokens as f64;
        let bits = self.nats / LN_2 + self.documents as f64 * (vocab_size as f64).log2();
        Ok(Evaluation {
            loss,
            perplexity: loss.exp(),
            bits_per_byte: bits / self.bytes,
            tokens: self.tokens,
            first_tokens: self.documents as u64,
            bytes: self.bytes.round() as u64,
            documents: self.documents,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_predict_every_token_once_with_as_much_context_as_the_stride_leaves() {
        for (predicted, context, stride) in
            [(0, 4, 4), (1, 4, 4), (4, 4, 4), (5, 4, 4), (23, 7, 3), (23, 7, 1), (9, 50, 2)]
        {
            let mut times = vec![0; predicted as usize + 1];
            for window in windows(predicted, EvalOptions { context, stride, max_tokens: 0 }) {
                assert!(window.inputs <= context as u64 && window.unscored < window.inputs);
                assert!(
                    window.start == 0
                        || window.inputs - (window.inputs - window.unscored) >= context as u64 - stride as u64
                );
                for input in window.unscored..window.inputs {
                    times[(window.start + input + 1) as usize] += 1;
                }
            }
            assert!(times[1..].iter().all(|&n| n == 1), "{predicted} {context} {stride}: {times:?}");
        }
    }
}
