//! Tiles of the kernels of gradients, as pure functions.

use super::{ARRIVALS_BYTES, Geometry, Unit, WARPGROUP_SHARED_BYTES, pitch};
use crate::cuda::tensor_map::Boxes;
use nsa_core::NsaConfig;

/// Warps of gradients of keys that fill a device: several blocks a multiprocessor, so that short ones make up for long ones.
const KEY_WARPS: usize = 4096;
/// Steps of a block of gradients of keys, at least, where several share a tile's queries.
const PART_STEPS: usize = 16;

/// Tiles of the kernels of gradients in which a query sees one run of keys (`kernels/band_bwd.cu`).
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

    /// Parts that the rows of queries of each tile of keys are cut into, `rows` of the tile with most: enough blocks for any
    /// device, none of them too short.
    pub(crate) fn parts(&self, tiles: usize, rows: usize) -> usize {
        let longest = rows / (PART_STEPS * self.query_rows);
        KEY_WARPS.div_ceil(self.warps * tiles.max(1)).min(longest).max(1)
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
        // Compressed keys, and tokens, of 16,384 and 65,536 tokens; 64 tokens.
        assert_eq!([16, 64, 256, 1024].map(|keys| tiles.parts(keys, 16 * 16_384)), [64, 16, 4, 1]);
        assert_eq!((tiles.parts(1, 16 * 64), tiles.parts(0, 0)), (2, 1));
    }
}
