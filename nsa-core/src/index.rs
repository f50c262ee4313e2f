//! Index arithmetic of the three branches, as small pure functions. Letters and rules are the specification's:
//! l = `compress_block`, d = `compress_stride`, l' = `select_block`, n = `select_count`, w = `window`.
//!
//! ```
//! use nsa_core::{NsaConfig, index};
//! let config = NsaConfig::paper();
//! assert_eq!(index::num_blocks(&config, 8192), 511);
//! assert_eq!(index::visible_blocks(&config, 30), 0); // block 0 ends with token 31
//! assert_eq!(index::num_candidates(&config, 64), 2);
//! // The scores of selection block 1 take compression blocks 3..8 with weights 1 2 2 2 1.
//! assert_eq!(index::importance_blocks(&config, 1, 511), 3..8);
//! assert_eq!((3..8).map(|i| index::importance_weight(&config, i, 1)).collect::<Vec<_>>(), [1, 2, 2, 2, 1]);
//! ```

use crate::NsaConfig;
use std::ops::Range;

/// Number of compression blocks of a sequence of `seq_len` tokens: M(T) = 0 if T < l, else ⌊(T − l)/d⌋ + 1.
pub fn num_blocks(config: &NsaConfig, seq_len: usize) -> usize {
    match seq_len.checked_sub(config.compress_block()) {
        None => 0,
        Some(rest) => rest / config.compress_stride() + 1,
    }
}

/// Compression blocks that the query at position `t` sees: those with i·d + l − 1 ≤ t, that is 0..M(t + 1).
pub fn visible_blocks(config: &NsaConfig, t: usize) -> usize {
    num_blocks(config, t + 1)
}

/// Tokens of compression block `i`: i·d .. i·d + l.
pub fn block_tokens(config: &NsaConfig, i: usize) -> Range<usize> {
    let start = i * config.compress_stride();
    start..start + config.compress_block()
}

/// Whether token `t` completes a compression block: t + 1 ≥ l and (t + 1 − l) mod d = 0.
pub fn completes_block(config: &NsaConfig, t: usize) -> bool {
    (t + 1).checked_sub(config.compress_block()).is_some_and(|rest| rest % config.compress_stride() == 0)
}

/// Number of selection candidates of the query at `t`: blocks 0..=⌊t/l'⌋.
pub fn num_candidates(config: &NsaConfig, t: usize) -> usize {
    t / config.select_block() + 1
}

/// Blocks that the queries at positions 0..`seq_len` select, altogether: Σ min(n, ⌊t/l'⌋ + 1).
pub fn num_selected(config: &NsaConfig, seq_len: usize) -> usize {
    let (block, count) = (config.select_block(), config.select_count());
    // Those that select all of their candidates, the last of which is partial for some.
    let few = seq_len.min(count * block);
    let (blocks, rest) = (few / block, few % block);
    block * blocks * (blocks + 1) / 2 + rest * (blocks + 1) + (seq_len - few) * count
}

/// Number of selection blocks of a sequence of `seq_len` tokens, the last possibly partial: ⌈T/l'⌉.
pub fn num_select_blocks(config: &NsaConfig, seq_len: usize) -> usize {
    seq_len.div_ceil(config.select_block())
}

/// Whether candidate `j` of `candidates` is forced: among the first n0 or the last nl.
pub fn is_forced(config: &NsaConfig, j: usize, candidates: usize) -> bool {
    j < config.select_initial() || j + config.select_local() >= candidates
}

/// Tokens of selection block `j` that the query at `t` attends to: j·l' .. min((j + 1)·l', t + 1).
pub fn select_tokens(config: &NsaConfig, j: usize, t: usize) -> Range<usize> {
    let start = j * config.select_block();
    start..(start + config.select_block()).min(t + 1)
}

/// Weight of compression block `i` in the score of selection block `j`: the number of stride-long chunks of block `j`
/// that compression block `i` covers (1 2 2 2 1 over i = 4j−1 … 4j+3 for l, d, l' = 32, 16, 64).
pub fn importance_weight(config: &NsaConfig, i: usize, j: usize) -> usize {
    let chunks = config.select_block() / config.compress_stride();
    let span = config.compress_block() / config.compress_stride();
    // Chunks of block i: i..i + span; chunks of block j: j·chunks..(j + 1)·chunks.
    let (first, last) = (i.max(j * chunks), (i + span).min((j + 1) * chunks));
    last.saturating_sub(first)
}

/// Compression blocks with a non-zero [`importance_weight`] in selection block `j`, out of `blocks`.
pub fn importance_blocks(config: &NsaConfig, j: usize, blocks: usize) -> Range<usize> {
    let chunks = config.select_block() / config.compress_stride();
    let span = config.compress_block() / config.compress_stride();
    let end = ((j + 1) * chunks).min(blocks);
    (j * chunks).saturating_sub(span - 1).min(end)..end
}

/// Positions that the query at `t` attends to in the window branch: t − w < s ≤ t.
pub fn window_tokens(config: &NsaConfig, t: usize) -> Range<usize> {
    (t + 1).saturating_sub(config.window())..t + 1
}

/// Row of position `s` in a ring of `rows` rows.
pub fn ring_row(rows: usize, s: usize) -> usize {
    s % rows
}

/// Token-rows of K and V that one decoding step reads at most with a context of `context` tokens:
/// M(s) + min(n·l', s) + min(w, s).
///
/// The paper's Table 4 counts s/d for M(s), which is l/d − 1 more: 2048 instead of 2047 at 8k.
pub fn decode_rows(config: &NsaConfig, context: usize) -> usize {
    num_blocks(config, context)
        + (config.select_count() * config.select_block()).min(context)
        + config.window().min(context)
}
