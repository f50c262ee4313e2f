//! Work split into tiles of consecutive tokens. Tiles start at multiples of their size within each sequence, so where
//! they lie depends on the sequence alone; outputs are token-major, so each tile owns a contiguous part of each.

use nsa_core::Packing;
use std::ops::{Range, RangeInclusive};

/// Consecutive queries of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct QueryTile {
    /// The sequence.
    pub(crate) seq: usize,
    /// Rows of the queries in the packed tensors.
    pub(crate) rows: Range<usize>,
    /// Position of the first query.
    pub(crate) position: usize,
}

/// The tiles of all sequences in order, `size(s)` queries each but for the last of a sequence. Empty sequences have none.
pub(crate) fn query_tiles(packing: &Packing, size: impl Fn(usize) -> usize) -> Vec<QueryTile> {
    let mut tiles = Vec::new();
    for (s, seq) in packing.seqs().enumerate() {
        for start in seq.rows.clone().step_by(size(s)) {
            let rows = start..(start + size(s)).min(seq.rows.end);
            tiles.push(QueryTile { seq: s, position: seq.context + start - seq.rows.start, rows });
        }
    }
    tiles
}

/// Tokens of a tile of a sequence of `len` that a backward pass is cut into: tiles enough for the threads of a large
/// machine, but none smaller than `range` starts nor larger than it ends.
pub(crate) fn tile_len(len: usize, range: RangeInclusive<usize>) -> usize {
    (len / 32).next_power_of_two().clamp(*range.start(), *range.end())
}

/// Splits a tensor with `row_len` elements a token into the parts of consecutive ranges of tokens.
pub(crate) fn split_rows<T>(
    mut data: &mut [T],
    row_len: usize,
    ranges: impl Iterator<Item = Range<usize>>,
) -> Vec<&mut [T]> {
    ranges
        .map(|range| {
            let part;
            (part, data) = std::mem::take(&mut data).split_at_mut(range.len() * row_len);
            part
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::CuSeqlens;

    #[test]
    fn tiles_cover_every_query_once() {
        let offsets = CuSeqlens::from_lengths([5, 0, 2]).unwrap();
        let packing = Packing::with_contexts(offsets, vec![3, 9, 0]).unwrap();
        let tiles = query_tiles(&packing, |_| 2);
        let tile = |seq, rows, position| QueryTile { seq, rows, position };
        assert_eq!(tiles, [tile(0, 0..2, 3), tile(0, 2..4, 5), tile(0, 4..5, 7), tile(2, 5..7, 0)]);
        let mut data: Vec<usize> = (0..21).collect();
        let parts = split_rows(&mut data, 3, tiles.iter().map(|t| t.rows.clone()));
        let starts: Vec<(usize, usize)> = parts.iter().map(|p| (p[0], p.len())).collect();
        assert_eq!(starts, [(0, 6), (6, 6), (12, 3), (15, 6)]);
    }
}
