//! Packed sequences: token-major tensors hold several sequences behind one another, `cu_seqlens` says where each
//! starts.

use crate::{LayoutError, NsaConfig, index};
use std::ops::Range;

/// Offsets of packed sequences, `[S + 1]` i32: start at 0, never decrease, end at the number of rows.
/// Empty sequences are legal.
///
/// ```
/// use nsa_core::CuSeqlens;
/// let offsets = CuSeqlens::from_lengths([3, 0, 2])?;
/// assert_eq!(offsets.as_slice(), [0, 3, 3, 5]);
/// assert_eq!((offsets.num_seqs(), offsets.total(), offsets.range(2)), (3, 5, 3..5));
/// let error = CuSeqlens::new(vec![0, 4, 2]).unwrap_err();
/// assert_eq!(error.to_string(), "cu_seqlens[2] = 2 is below its predecessor 4: offsets must not decrease");
/// # Ok::<(), nsa_core::LayoutError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CuSeqlens(Vec<i32>);

impl CuSeqlens {
    /// Checks offsets as they come from outside.
    ///
    /// # Errors
    /// If they are empty, do not start at 0 or decrease.
    pub fn new(offsets: Vec<i32>) -> Result<Self, LayoutError> {
        let first = *offsets.first().ok_or(LayoutError::Empty)?;
        if first != 0 {
            return Err(LayoutError::Start(i64::from(first)));
        }
        for (index, pair) in offsets.windows(2).enumerate() {
            if pair[1] < pair[0] {
                return Err(LayoutError::Decreasing {
                    index: index + 1,
                    value: i64::from(pair[1]),
                    before: i64::from(pair[0]),
                });
            }
        }
        Ok(Self(offsets))
    }

    /// Offsets of sequences of these lengths.
    ///
    /// # Errors
    /// If the sum exceeds the range of i32.
    pub fn from_lengths(lengths: impl IntoIterator<Item = usize>) -> Result<Self, LayoutError> {
        let mut end = 0u128;
        let mut offsets = vec![0];
        for length in lengths {
            end += length as u128;
            offsets.push(i32::try_from(end).map_err(|_| LayoutError::TooLong(end))?);
        }
        Ok(Self(offsets))
    }

    /// One sequence of `len` tokens.
    ///
    /// # Errors
    /// If `len` exceeds the range of i32.
    pub fn single(len: usize) -> Result<Self, LayoutError> {
        Self::from_lengths([len])
    }

    /// Checks that the offsets end at `rows`.
    ///
    /// # Errors
    /// If they do not.
    pub fn check_end(&self, rows: usize) -> Result<(), LayoutError> {
        if self.total() == rows {
            return Ok(());
        }
        Err(LayoutError::End { end: self.total(), rows })
    }

    /// Number of sequences, S.
    pub fn num_seqs(&self) -> usize {
        self.0.len() - 1
    }

    /// Number of rows, N.
    pub fn total(&self) -> usize {
        self.0[self.0.len() - 1] as usize
    }

    /// Rows of sequence `s`.
    pub fn range(&self, s: usize) -> Range<usize> {
        self.0[s] as usize..self.0[s + 1] as usize
    }

    /// The offsets, `[S + 1]`.
    pub fn as_slice(&self) -> &[i32] {
        &self.0
    }
}

/// The queries of one call: packed sequences, each continuing a context of tokens that came before.
/// Training and whole forwards have contexts of 0.
///
/// ```
/// use nsa_core::{CuSeqlens, NsaConfig, Packing};
/// // One decoding step of two sequences that have 40 and 7 tokens already.
/// let step = Packing::with_contexts(CuSeqlens::from_lengths([1, 1])?, vec![40, 7])?;
/// assert_eq!(step.cu_keys()?.as_slice(), [0, 41, 49]);
/// // Blocks of 8 tokens, one every 4: ⌊(41 − 8)/4⌋ + 1 = 9 and ⌊(8 − 8)/4⌋ + 1 = 1.
/// assert_eq!(step.cu_blocks(&NsaConfig::small())?.as_slice(), [0, 9, 10]);
/// # Ok::<(), nsa_core::LayoutError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    cu_seqlens: CuSeqlens,
    contexts: Vec<usize>,
}

/// One sequence of a [`Packing`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seq {
    /// Rows of its queries in the packed tensors.
    pub rows: Range<usize>,
    /// Position of its first query: the tokens before it.
    pub context: usize,
}

impl Seq {
    /// Tokens up to and including the last query.
    pub fn end(&self) -> usize {
        self.context + self.rows.len()
    }
}

impl Packing {
    /// Sequences that start at position 0.
    pub fn new(cu_seqlens: CuSeqlens) -> Self {
        let contexts = vec![0; cu_seqlens.num_seqs()];
        Self { cu_seqlens, contexts }
    }

    /// Sequences whose first query has position `contexts[s]`: chunks of a prefill, steps of a decoding.
    ///
    /// # Errors
    /// If there is not one context a sequence, or a sequence would exceed the range of i32.
    pub fn with_contexts(cu_seqlens: CuSeqlens, contexts: Vec<usize>) -> Result<Self, LayoutError> {
        if contexts.len() != cu_seqlens.num_seqs() {
            return Err(LayoutError::Contexts { expected: cu_seqlens.num_seqs(), got: contexts.len() });
        }
        for (s, &context) in contexts.iter().enumerate() {
            let end = context as u128 + cu_seqlens.range(s).len() as u128;
            if end > i32::MAX as u128 {
                return Err(LayoutError::TooLong(end));
            }
        }
        Ok(Self { cu_seqlens, contexts })
    }

    /// Offsets of the queries.
    pub fn cu_seqlens(&self) -> &CuSeqlens {
        &self.cu_seqlens
    }

    /// Number of sequences.
    pub fn num_seqs(&self) -> usize {
        self.cu_seqlens.num_seqs()
    }

    /// Number of queries, N.
    pub fn num_tokens(&self) -> usize {
        self.cu_seqlens.total()
    }

    /// Sequence `s`.
    pub fn seq(&self, s: usize) -> Seq {
        Seq { rows: self.cu_seqlens.range(s), context: self.contexts[s] }
    }

    /// All sequences in order.
    pub fn seqs(&self) -> impl Iterator<Item = Seq> + '_ {
        (0..self.num_seqs()).map(|s| self.seq(s))
    }

    /// Whether every sequence starts at position 0, as gradients need.
    pub fn starts_at_zero(&self) -> bool {
        self.contexts.iter().all(|&c| c == 0)
    }

    /// Offsets of the keys when every token of each sequence has one row, context included.
    ///
    /// # Errors
    /// If the total exceeds the range of i32.
    pub fn cu_keys(&self) -> Result<CuSeqlens, LayoutError> {
        CuSeqlens::from_lengths(self.seqs().map(|seq| seq.end()))
    }

    /// Offsets of the compression blocks, packed per sequence: M(T) rows each, context included.
    ///
    /// # Errors
    /// If the total exceeds the range of i32.
    pub fn cu_blocks(&self, config: &NsaConfig) -> Result<CuSeqlens, LayoutError> {
        CuSeqlens::from_lengths(self.seqs().map(|seq| index::num_blocks(config, seq.end())))
    }
}
