//! The selection policy: forced blocks, order, ties, padding.

use crate::{NsaConfig, Real, index};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Value of the places of a block list that no block fills.
pub const NO_BLOCK: i32 = -1;

/// Whether score `a` of block `i` goes before score `b` of block `j`: the higher score first, ties to the lower block.
#[inline(always)]
pub fn goes_before<R: Real>(a: R, i: usize, b: R, j: usize) -> bool {
    a > b || (a == b && i < j)
}

/// Memory of [`select_blocks`], kept by the caller so that nothing is allocated a query once it has grown to n.
#[derive(Clone, Debug)]
pub struct SelectScratch<R: Real> {
    /// The best blocks so far, the worst of them on top.
    kept: BinaryHeap<Scored<R>>,
}

impl<R: Real> Default for SelectScratch<R> {
    fn default() -> Self {
        Self { kept: BinaryHeap::new() }
    }
}

/// A block with its score; the greatest is the one that goes last.
#[derive(Clone, Copy, Debug)]
struct Scored<R> {
    score: R,
    block: usize,
}

impl<R: Real> Ord for Scored<R> {
    fn cmp(&self, other: &Self) -> Ordering {
        match () {
            () if goes_before(other.score, other.block, self.score, self.block) => Ordering::Greater,
            () if goes_before(self.score, self.block, other.score, other.block) => Ordering::Less,
            () => Ordering::Equal,
        }
    }
}

impl<R: Real> PartialOrd for Scored<R> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<R: Real> PartialEq for Scored<R> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<R: Real> Eq for Scored<R> {}

/// Selects blocks for the query at position `t` from the scores of its candidates (`scores[j]`, one a candidate, never
/// NaN). Writes them ascending to `out` `[n]`, padded with [`NO_BLOCK`].
///
/// The first n0 and the last nl candidates are forced; the rest of the n places go to the highest scores, ties to the
/// lower block. O(candidates · log n).
///
/// ```
/// use nsa_core::{NsaConfig, select};
/// // Blocks of 16 tokens, n = 4 of which 1 first and 2 last are forced: one place is free.
/// let config = NsaConfig::small();
/// let (mut scratch, mut out) = (select::SelectScratch::default(), [0; 4]);
/// select::select_blocks(&config, 16 * 5, &[0.0_f32, 0.1, 0.7, 0.7, 0.0, 0.0], &mut scratch, &mut out);
/// assert_eq!(out, [0, 2, 4, 5]);
/// select::select_blocks(&config, 20, &[0.5, 0.5], &mut scratch, &mut out);
/// assert_eq!(out, [0, 1, select::NO_BLOCK, select::NO_BLOCK]);
/// ```
pub fn select_blocks<R: Real>(
    config: &NsaConfig,
    t: usize,
    scores: &[R],
    scratch: &mut SelectScratch<R>,
    out: &mut [i32],
) {
    let candidates = index::num_candidates(config, t);
    debug_assert_eq!(scores.len(), candidates);
    debug_assert_eq!(out.len(), config.select_count());
    if candidates <= config.select_count() {
        let (taken, rest) = out.split_at_mut(candidates);
        number(taken, 0);
        rest.fill(NO_BLOCK);
        return;
    }
    // More candidates than places and n ≥ n0 + nl: the forced ranges do not meet.
    let initial = config.select_initial();
    let local = candidates - config.select_local();
    let (first, rest) = out.split_at_mut(initial);
    let (free, last) = rest.split_at_mut(rest.len() - config.select_local());
    number(first, 0);
    number(last, local);
    let kept = &mut scratch.kept;
    let places = initial + free.len();
    kept.extend((initial..places).map(|block| Scored { score: scores[block], block }));
    // A later block goes before an earlier one only with a higher score: few do once the best of some are kept.
    const CHUNK: usize = 16;
    for (chunk, first) in scores[places..local].chunks(CHUNK).zip((places..).step_by(CHUNK)) {
        let Some(worst) = kept.peek().map(|worst| worst.score) else { break };
        if !chunk.iter().fold(false, |any, &score| any | (score > worst)) {
            continue;
        }
        for (&score, block) in chunk.iter().zip(first..) {
            if let Some(mut worst) = kept.peek_mut()
                && score > worst.score
            {
                *worst = Scored { score, block };
            }
        }
    }
    for (place, scored) in free.iter_mut().zip(kept.drain()) {
        *place = scored.block as i32;
    }
    free.sort_unstable();
}

/// Writes `first`, `first` + 1, … .
fn number(out: &mut [i32], first: usize) {
    for (place, block) in out.iter_mut().zip(first..) {
        *place = block as i32;
    }
}
