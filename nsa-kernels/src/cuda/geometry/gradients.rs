//! Tiles of the kernels of gradients, as pure functions.

use super::{ARRIVALS_BYTES, Geometry, Unit, WARPGROUP_SHARED_BYTES, pitch};
use crate::cuda::tensor_map::Boxes;
use nsa_core::NsaConfig;
use std::iter;

/// Warps of gradients of keys that a multiprocessor runs at once: their registers are as many as a thread can have.
const KEY_WARPS: usize = 8;
/// Rounds of blocks of gradients of keys, at most, if tiles are cut into parts: in more of them no block can idle for long.
const ROUNDS: usize = 6;
/// Steps of a part, at least.
const PART_STEPS: usize = 16;
/// Steps that a block takes as long as for its own keys, and for its part of their gradients to be written and added.
const STEPS_BESIDE: usize = 6;

/// How the rows of queries that see tiles of keys are cut into parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parts {
    /// Rows of a part.
    pub(crate) rows: usize,
    /// Parts of the tile with most rows.
    pub(crate) most: usize,
}

/// Tiles of the kernels of gradients in which a query sees one run of keys (`kernels/band_bwd.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GradientTiles {
    /// Who makes the products.
    pub(crate) unit: Unit,
    /// Warps of a block of gradients of keys, each with 16 of them.
    pub(crate) warps: usize,
    /// Warps of a block of gradients of queries, each with 16 rows.
    pub(crate) query_warps: usize,
    /// Keys of a tile that queries meet.
    pub(crate) keys: usize,
    /// Rows of queries of a tile that keys meet.
    pub(crate) query_rows: usize,
    /// Tiles of rows of queries that are copied at once.
    pub(crate) copied: usize,
    /// Queries of a block; 0 if it cannot hold all heads of a group.
    pub(crate) queries: usize,
    /// Bytes of a row of k and of one of v together.
    row_bytes: usize,
    /// Whether dk and dv are two blocks' work.
    apart: bool,
}

impl GradientTiles {
    /// For a configuration and elements of `size` bytes, on a device with such a unit; blocks are as small as products allow.
    pub(crate) fn new(config: &NsaConfig, size: usize, unit: Unit) -> Self {
        let unit = unit.fitting(config, size);
        let row_bytes = pitch(config.head_dim_qk(), size) + pitch(config.head_dim_v(), size);
        // What dk and dv leave of the registers decides how many rows they meet at once.
        let rows_below = |bytes| if size == 4 || row_bytes >= bytes { 16 } else { 32 };
        let (keys, query_rows) = match unit {
            Unit::Warp => (rows_below(1024), rows_below(640)),
            Unit::Warpgroup => (if row_bytes > 768 { 32 } else { 64 }, if row_bytes > 512 { 32 } else { 64 }),
        };
        let apart = row_bytes / size > 320;
        let mut tiles =
            Self { unit, warps: 4, query_warps: 4, keys, query_rows, copied: 1, queries: 0, row_bytes, apart };
        let holds = |warps: usize| warps * 16 >= config.group_size();
        let least = unit.least_warps();
        while tiles.warps > least && tiles.shared_bytes() > unit.shared_bytes() && holds(tiles.warps / 2) {
            tiles.warps /= 2;
        }
        while tiles.warps < 8 && !holds(tiles.warps) {
            tiles.warps *= 2;
        }
        tiles.with_query_warps(tiles.warps, config)
    }

    /// Of a query that sees one run of keys. Warpgroups share blocks then: each row of queries and each key that the second cache
    /// gives meets two or three of them, which else is what they wait for.
    pub(crate) fn banded(config: &NsaConfig, size: usize, unit: Unit) -> Self {
        let tiles = Self::new(config, size, unit);
        if tiles.unit == Unit::Warp {
            return tiles;
        }
        let fits = |tiles: &Self| tiles.shared_bytes() <= WARPGROUP_SHARED_BYTES;
        let of_keys = [2, 1].map(|copied| Self { warps: 8, copied, ..tiles });
        let tiles = of_keys.into_iter().find(fits).unwrap_or(tiles);
        // As registers allow.
        let most = if config.head_dim_qk().max(config.head_dim_v()) <= 128 { 12 } else { 8 };
        let of_queries = [most, 8].map(|warps| tiles.with_query_warps(warps, config));
        of_queries.into_iter().find(fits).unwrap_or(tiles)
    }

    fn with_query_warps(self, query_warps: usize, config: &NsaConfig) -> Self {
        Self { query_warps, queries: 16 * query_warps / config.group_size(), ..self }
    }

    /// Keys of a block.
    pub(crate) fn rows(&self) -> usize {
        16 * self.warps
    }

    /// Bytes of shared memory of a block of either kernel.
    pub(crate) fn shared_bytes(&self) -> usize {
        self.bytes_of_keys().max(self.bytes_of_queries())
    }

    fn bytes_of_keys(&self) -> usize {
        let stage = (self.query_rows * (self.row_bytes + 16)).next_multiple_of(self.unit.alignment());
        self.rows() * self.row_bytes + 2 * self.copied * stage + self.arrivals_bytes()
    }

    /// Rows of queries that one bulk copy takes to a tile which keys meet: of consecutive tokens all of the tile's, else one token's.
    /// None where a thread copies each chunk.
    pub(crate) fn boxes(&self, config: &NsaConfig, consecutive: bool) -> Option<Boxes> {
        let (group, rows) = (config.group_size(), self.query_rows);
        let heads = group.min(rows);
        let boxes = Boxes { tokens: if consecutive { rows / heads } else { 1 }, heads };
        // A tile is whole boxes, and a box begins where chunks are swapped as in a tile's first row.
        let whole = rows.is_multiple_of(heads) && group.is_multiple_of(heads);
        let swapped = (boxes.tokens * heads).is_multiple_of(8);
        (self.unit == Unit::Warpgroup && whole && swapped).then_some(boxes)
    }

    fn bytes_of_queries(&self) -> usize {
        (16 * self.query_warps + 2 * self.keys) * self.row_bytes + self.arrivals_bytes()
    }

    fn arrivals_bytes(&self) -> usize {
        if self.unit == Unit::Warpgroup { ARRIVALS_BYTES } else { 0 }
    }

    /// A launch over tiles of queries.
    pub(crate) fn of_queries(&self, tiles: usize, heads: usize) -> Geometry {
        let (grid, threads) = ([tiles as u64 * heads as u64, 1, 1], 32 * self.query_warps as u32);
        Geometry { grid, threads, shared_bytes: self.bytes_of_queries() as u32 }
    }

    /// Blocks of gradients of keys that a device with so many multiprocessors runs at once.
    pub(crate) fn blocks_at_once(&self, multiprocessors: usize) -> usize {
        (multiprocessors * KEY_WARPS / (self.warps * if self.apart { 2 } else { 1 })).max(1)
    }

    /// Rows of a part, at least, if what sees a tile of keys is cut into parts.
    pub(crate) fn least_part_rows(&self) -> usize {
        PART_STEPS * self.query_rows
    }

    /// Parts of the tiles of keys of each KV head, each seen by so many of `rows` rows of queries, for a device with so many
    /// multiprocessors. Parts are equally long and fill it in few rounds: of what takes at most a tenth longer than the fastest, that
    /// with fewest parts, as each leaves gradients in memory.
    pub(crate) fn parts(&self, rows: &[usize], heads: usize, multiprocessors: usize) -> Parts {
        let longest = rows.iter().copied().max().unwrap_or(0);
        let at_once = self.blocks_at_once(multiprocessors);
        let rounds = |part: usize| {
            let blocks = rows.iter().map(|rows| rows.div_ceil(part).max(1)).sum::<usize>();
            (heads * blocks).div_ceil(at_once)
        };
        // Of the longest tile: each time a sixteenth more.
        let counts = iter::successors(Some(1usize), |count| Some(count + count.div_ceil(16)));
        let counts = counts.take_while(|&count| count == 1 || longest >= count * self.least_part_rows());
        let cuts = counts.map(|count| {
            let part = longest.div_ceil(count).next_multiple_of(self.query_rows).max(self.query_rows);
            (part, rounds(part))
        });
        let cuts = cuts.take_while(|&(part, rounds)| part >= longest || rounds <= ROUNDS).collect::<Vec<_>>();
        let cost = |&(part, rounds): &(usize, usize)| rounds * (part + STEPS_BESIDE * self.query_rows);
        let least = cuts.iter().map(cost).min().unwrap_or(0);
        let chosen = cuts.iter().find(|cut| 10 * cost(cut) <= 11 * least);
        let rows = chosen.map_or(self.query_rows, |&(part, _)| part);
        Parts { rows, most: longest.div_ceil(rows).max(1) }
    }

    /// Numbers of a tile's gradients of keys and values.
    pub(crate) fn partial_floats(&self, config: &NsaConfig) -> usize {
        self.rows() * (config.head_dim_qk() + config.head_dim_v())
    }

    /// Blocks of threads that add a tile's gradients: a thread has few numbers, whose shares it waits for.
    pub(crate) fn adders(&self, config: &NsaConfig) -> u64 {
        self.partial_floats(config).div_ceil(2 * crate::cuda::gradients::ADD_THREADS as usize) as u64
    }

    /// A launch over `parts` of the queries of tiles of keys.
    pub(crate) fn of_keys(&self, tiles: usize, heads: usize, parts: usize) -> Geometry {
        let grid = [tiles as u64 * heads as u64, if self.apart { 2 } else { 1 }, parts as u64];
        Geometry { grid, threads: 32 * self.warps as u32, shared_bytes: self.bytes_of_keys() as u32 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;

    #[test]
    fn boxes_are_whole_tokens() {
        let boxes = |heads, consecutive| {
            let config = config(heads, (128, 128));
            let tiles = GradientTiles::new(&config, 2, Unit::Warpgroup);
            tiles.boxes(&config, consecutive).map(|boxes| (boxes.tokens, boxes.heads))
        };
        assert_eq!([1, 4, 16, 64, 128].map(|heads| boxes(heads, true)), [64, 16, 4, 1, 1].map(|n| Some((n, 64 / n))));
        // One token's boxes begin where chunks are swapped alike, or threads copy.
        assert_eq!([1, 4, 8, 16].map(|heads| boxes(heads, false)), [None, None, Some((1, 8)), Some((1, 16))]);
        assert_eq!([7, 12, 24].map(|heads| boxes(heads, true)), [None; 3]);
        let config = config(16, (128, 128));
        assert_eq!(GradientTiles::new(&config, 2, Unit::Warp).boxes(&config, true), None);
    }

    #[test]
    fn queries_are_cut_into_parts_where_tiles_of_keys_are_few() {
        let tiles = GradientTiles::new(&config(16, (128, 128)), 2, Unit::Warp);
        assert_eq!((tiles.rows(), tiles.query_rows), (64, 32));
        let parts = |rows: &[usize]| {
            let parts = tiles.parts(rows, 1, 108);
            let blocks = rows.iter().map(|rows| rows.div_ceil(parts.rows)).sum::<usize>();
            (parts.most, blocks, parts.rows)
        };
        // A window's tiles of 2,048, 8,192, 28,000 and 65,536 tokens: 216 blocks at once.
        let window = |tiles: usize| parts(&vec![(512 + 63) * 16; tiles]);
        assert_eq!([32, 128, 438, 1024].map(window), [(6, 192, 1536), (3, 384, 3072), (2, 876, 4608), (1, 1024, 9216)]);
        // Compressed keys of 8,192 and 65,536 tokens, the first of them seen by most.
        let compressed = |tiles: usize| (0..tiles).map(|tile| (tiles - tile) * 64 * 16 * 16).collect::<Vec<_>>();
        assert_eq!([8, 64].map(|tiles| parts(&compressed(tiles))), [(45, 204, 2944), (12, 420, 87_392)]);
        // Shorter parts are not worth it; no rows are one part.
        assert_eq!((parts(&[16 * 64]), parts(&[0, 0]), parts(&[])), ((2, 2, 512), (1, 0, 32), (1, 0, 32)));
    }
}
