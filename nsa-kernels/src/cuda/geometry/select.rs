//! Tiles of the kernels that walk over selected blocks, as pure functions.

use super::{ARRIVALS_BYTES, Geometry, SHARED_BYTES, Unit, pitch};
use nsa_core::NsaConfig;

/// Tiles of `rows` rows that share the heads of a query, and queries of a tile. Those of a warp's 16 rows walk over the union of
/// their blocks, which is never more work than each one's own with the other rows empty.
pub(super) fn select_rows(config: &NsaConfig, rows: usize) -> (usize, usize) {
    let parts = config.group_size().div_ceil(rows);
    (parts, rows / config.group_size().div_ceil(parts))
}

/// Heads of a group, at least, for which warpgroups walk over the union of selected blocks: of more than eight queries it grows faster
/// than what their rows gain, as long as their blocks have little in common.
const UNION_HEADS: usize = 8;
/// How many times as many blocks as a query selects a sequence may have for it: neighbours then have blocks in common even if they
/// choose at random. Measured on an H100 so, the forward of NSA, 16 blocks of 64 tokens, with unions and without: 166 and 195 us at
/// 2,048 tokens, 767 and 772 at 8,192, 11.2 and 10.0 ms at 65,536.
const UNION_BLOCKS: usize = 8;

/// Queries whose lists a warp's lanes hold, at most: those of the tiles of a block that walks jointly.
const JOINT_QUERIES: usize = 32;
/// What a block copies when its tiles walk jointly, at most, of a hundred that they would copy each alone: less gain is not worth that
/// they wait for each other.
const JOINT_PERCENT: usize = 75;

fn joint_percent(warps: usize, queries: usize) -> usize {
    if warps > 1 && warps * queries <= JOINT_QUERIES { JOINT_PERCENT } else { 0 }
}

/// Bytes of the lists of a warp's queries: tiles begin behind them.
fn list_bytes(config: &NsaConfig, queries: usize) -> usize {
    (queries * config.select_count() * 4).next_multiple_of(Unit::Warp.alignment())
}

/// Tiles of `slc_forward` (`kernels/slc_fwd.cu`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SelectTiles {
    /// Who makes the products, and walks over blocks.
    pub(crate) unit: Unit,
    /// Warps of a block.
    pub(crate) warps: usize,
    /// Rows of a tile: of a warp, or of four.
    pub(crate) rows: usize,
    /// Keys of a step.
    pub(crate) keys: usize,
    /// Steps in shared memory.
    pub(crate) stages: usize,
    /// Queries of a tile.
    pub(crate) queries: usize,
    /// Tiles that share a query's heads.
    pub(crate) parts: usize,
    /// The tiles of a block walk over the union of all their lists where they copy at most so many of a hundred blocks then; 0 if they
    /// never do.
    pub(crate) joint_percent: usize,
    /// Whether queries stay in registers.
    pub(crate) held: bool,
    /// Bytes of shared memory of a block.
    pub(crate) shared_bytes: usize,
}

impl SelectTiles {
    /// For a configuration and elements of `size` bytes, on a device with such a unit, and sequences of at most `longest` tokens.
    /// Queries of a warpgroup's rows read each block that several of them have selected once: what the second cache gives is what
    /// selected attention waits for.
    pub(crate) fn new(config: &NsaConfig, size: usize, unit: Unit, longest: usize) -> Self {
        let blocks_fit = config.select_block().is_multiple_of(32) && config.group_size() >= UNION_HEADS;
        let in_common = longest <= UNION_BLOCKS * config.select_count() * config.select_block();
        match unit.fitting(config, size) {
            Unit::Warpgroup if blocks_fit && in_common => Self::of_warpgroups(config),
            _ => Self::of_warps(config, size),
        }
    }

    fn of_warpgroups(config: &NsaConfig) -> Self {
        const ROWS: usize = 64;
        let (k, v) = (pitch(config.head_dim_qk(), 2), pitch(config.head_dim_v(), 2));
        let (parts, queries) = select_rows(config, ROWS);
        let wide = config.select_block().is_multiple_of(64) && k.max(v) <= 256;
        let keys = if wide { 64 } else { 32 };
        let shared_bytes = 2 * keys * (k + v) + ROWS * k.max(v) + list_bytes(config, queries) + ARRIVALS_BYTES;
        let unit = Unit::Warpgroup;
        Self {
            unit,
            warps: 4,
            rows: ROWS,
            keys,
            stages: 2,
            queries,
            parts,
            joint_percent: 0,
            held: false,
            shared_bytes,
        }
    }

    /// Of warps that work alone.
    pub(crate) fn of_warps(config: &NsaConfig, size: usize) -> Self {
        const STAGES: usize = 2;
        let (k, v) = (pitch(config.head_dim_qk(), size), pitch(config.head_dim_v(), size));
        let (parts, queries) = select_rows(config, 16);
        let keys = if config.select_block() >= 32 && k + v <= 256 { 32 } else { 16 };
        let stages = STAGES * keys * (k + v);
        let rows = 16 * k.max(v);
        let held = size == 2 && k + v < 1024 && rows <= stages;
        let warp = stages + if held { 0 } else { rows } + list_bytes(config, queries);
        let mut warps = 4;
        while warps > 1 && warps * warp > SHARED_BYTES {
            warps /= 2;
        }
        let (unit, joint_percent) = (Unit::Warp, joint_percent(warps, queries));
        let shared_bytes = warps * warp;
        Self { unit, warps, rows: 16, keys, stages: STAGES, queries, parts, joint_percent, held, shared_bytes }
    }

    /// For gradients of queries, in blocks of `warps` warps.
    pub(crate) fn gradients(config: &NsaConfig, size: usize, warps: usize) -> Self {
        const STAGES: usize = 2;
        let bytes = pitch(config.head_dim_qk(), size) + pitch(config.head_dim_v(), size);
        let ((parts, queries), keys) = (select_rows(config, 16), 16);
        // Rows of q and do come through the stages then, and stay in registers.
        let held = size == 2 && bytes <= 512;
        let warp = (STAGES * keys + if held { 0 } else { 16 }) * bytes + list_bytes(config, queries);
        let (unit, joint_percent) = (Unit::Warp, joint_percent(warps, queries));
        let shared_bytes = warps * warp;
        Self { unit, warps, rows: 16, keys, stages: STAGES, queries, parts, joint_percent, held, shared_bytes }
    }

    /// Blocks that a tile copies, or its share of those that it copies jointly with others, where queries select `selected` of `blocks`
    /// blocks at random.
    pub(super) fn copied(&self, blocks: usize, selected: usize) -> f64 {
        let tiles = 16 * self.warps / self.rows;
        let alone = union(blocks, selected, self.queries);
        let joint = union(blocks, selected, tiles * self.queries) / tiles as f64;
        if joint * 100.0 <= alone * self.joint_percent as f64 { joint } else { alone }
    }

    /// A launch over `tiles` tiles of queries with `heads` KV heads each.
    pub(crate) fn geometry(&self, tiles: usize, heads: usize) -> Geometry {
        Geometry {
            grid: [(tiles * self.parts).div_ceil(16 * self.warps / self.rows) as u64, heads as u64, 1],
            threads: 32 * self.warps as u32,
            shared_bytes: self.shared_bytes as u32,
        }
    }
}

/// How many of `blocks` blocks the lists of `queries` queries name together, each `selected` of them at random.
fn union(blocks: usize, selected: usize, queries: usize) -> f64 {
    let missed = blocks.saturating_sub(selected) as f64 / blocks.max(1) as f64;
    blocks as f64 * (1.0 - missed.powf(queries as f64))
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;

    #[test]
    fn queries_of_small_groups_share_a_warp() {
        let rows = |heads| select_rows(&config(heads, (64, 64)), 16);
        assert_eq!([1, 4, 5, 16, 17, 64].map(rows), [(1, 16), (1, 4), (1, 3), (1, 1), (2, 1), (4, 1)]);
        let rows = |heads| select_rows(&config(heads, (64, 64)), 64);
        assert_eq!([8, 16, 17, 64, 70].map(rows), [(1, 8), (1, 4), (1, 3), (1, 1), (2, 1)]);
        let unit = |heads, longest| SelectTiles::new(&config(heads, (64, 64)), 2, Unit::Warpgroup, longest).unit;
        assert_eq!([4, 7, 8, 16].map(|heads| unit(heads, 8192) == Unit::Warpgroup), [false, false, true, true]);
        assert_eq!(unit(16, 8193), Unit::Warp);
    }

    #[test]
    fn tiles_of_a_block_copy_together_what_random_lists_have_in_common() {
        let tiles = |heads| SelectTiles::of_warps(&config(heads, (128, 128)), 2);
        assert_eq!([1, 2, 4, 16].map(|heads| tiles(heads).joint_percent), [0, 75, 75, 75]);
        // All of 32 blocks; of 1,024 too little.
        assert!((tiles(16).copied(32, 16) - 7.5).abs() < 1e-9);
        assert_eq!(tiles(16).copied(1024, 16), 16.0);
        // Sixteen queries a warp, whose lists its lanes have no room for.
        assert!((tiles(1).copied(32, 16) - 32.0).abs() < 1e-3);
        assert_eq!(tiles(4).copied(0, 16), 0.0);
    }
}
