//! Tiles of the kernels in which a query sees one run of keys, as pure functions.

use super::{ARRIVALS_BYTES, Geometry, SHARED_BYTES, Unit, WARPGROUP_SHARED_BYTES, padded};
use nsa_core::NsaConfig;

/// Tiles of the kernels in which a query sees one run of keys (`kernels/band.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BandTiles {
    /// Who makes the products.
    pub(crate) unit: Unit,
    /// Warps of a block.
    pub(crate) warps: usize,
    /// Parts of 16 rows of a warp.
    pub(crate) tiles: usize,
    /// Keys of a tile.
    pub(crate) keys: usize,
    /// Tiles of keys that are copied at once.
    pub(crate) copied: usize,
    /// Whether queries stay in registers.
    pub(crate) held: bool,
    /// Queries of a block; 0 if it cannot hold all heads of a group.
    pub(crate) queries: usize,
    /// Bytes of shared memory of a block.
    pub(crate) shared_bytes: usize,
}

impl BandTiles {
    /// Of `dense` and `win`, for a configuration and elements of `size` bytes, on a device with such a unit. Where registers allow
    /// it, a warp alone has 32 rows: each key that it reads from shared memory then serves two products.
    pub(crate) fn new(config: &NsaConfig, size: usize, unit: Unit) -> Self {
        match unit.fitting(config, size) {
            Unit::Warp => Self::of_warps(config, size),
            // Two blocks of a multiprocessor, as far as registers go.
            Unit::Warpgroup => Self::of_warpgroups(config, &[8, 4], 64),
        }
    }

    /// Of `cmp`, which needs more registers.
    pub(crate) fn compressed(config: &NsaConfig, size: usize, unit: Unit) -> Self {
        match unit.fitting(config, size) {
            Unit::Warp => Self::of_warps(config, size),
            Unit::Warpgroup => {
                // Scores of more than 128 dims are two sums at first, for which 12 warps have no registers. Two blocks of eight
                // share a multiprocessor where scores are computed twice.
                let eight = config.head_dim_qk() > 128 || scores_twice(config, 64);
                let warps: &[usize] = if eight { &[8, 4] } else { &[12, 8, 4] };
                Self::of_warpgroups(config, warps, if folds(config, 64) { 64 } else { 32 })
            }
        }
    }

    fn of_warps(config: &NsaConfig, size: usize) -> Self {
        let [k, v] = padded(config);
        let tiles = if size == 4 || v > 128 { 1 } else { 2 };
        // Above 128 dims scores are two sums at first.
        let keys = if size == 4 || k > 128 { 16 } else { 32 };
        let with_warps = |warps| Self {
            unit: Unit::Warp,
            warps,
            tiles,
            keys,
            copied: 1,
            held: size == 2 && tiles == 1 && k <= 128,
            queries: warps * tiles * 16 / config.group_size(),
            shared_bytes: (warps * tiles * 16 * k.max(v) + 2 * keys * (k + v)) * size,
        };
        let holds = |tiles: &Self| tiles.queries > 0;
        let fits = |tiles: &Self| holds(tiles) && tiles.shared_bytes <= SHARED_BYTES;
        let found = [4, 2, 1].map(with_warps).into_iter().find(fits);
        found.or_else(|| [1, 2, 4].map(with_warps).into_iter().find(holds)).unwrap_or_else(|| with_warps(8))
    }

    /// With the first number of warps that fits.
    fn of_warpgroups(config: &NsaConfig, warps: &[usize], keys: usize) -> Self {
        let [k, v] = padded(config);
        let keys = if k.max(v) > 128 { 32 } else { keys };
        let with_warps = |&warps: &usize| Self {
            unit: Unit::Warpgroup,
            warps,
            tiles: 1,
            keys,
            copied: 1,
            held: false,
            queries: warps * 16 / config.group_size(),
            shared_bytes: (warps * 16 * k.max(v) + 2 * keys * (k + v)) * 2 + ARRIVALS_BYTES,
        };
        let fits = |tiles: &Self| tiles.shared_bytes <= WARPGROUP_SHARED_BYTES;
        let found = warps.iter().map(with_warps).find(fits);
        found.filter(|tiles| tiles.queries > 0).unwrap_or_else(|| Self::of_warps(config, 2))
    }

    /// With two tiles of keys copied at once, where warpgroups have the shared memory for them.
    fn with_two_copied(self, config: &NsaConfig) -> Self {
        let more = 2 * self.keys * padded(config).iter().sum::<usize>() * 2;
        // Rows have more beside the tiles.
        let bytes = self.shared_bytes + more;
        let fits = self.unit == Unit::Warpgroup && bytes + self.rows() * 8 + 16 <= WARPGROUP_SHARED_BYTES;
        if fits { Self { copied: 2, shared_bytes: bytes, ..self } } else { self }
    }

    /// Rows of a block.
    pub(crate) fn rows(&self) -> usize {
        self.warps * self.tiles * 16
    }

    /// A launch over `tiles` tiles of queries with `heads` KV heads each.
    pub(crate) fn geometry(&self, tiles: usize, heads: usize) -> Geometry {
        Geometry {
            grid: [tiles as u64 * heads as u64, 1, 1],
            threads: 32 * self.warps as u32,
            shared_bytes: self.shared_bytes as u32,
        }
    }
}

/// Strides of a selection block and of a compression block.
fn chunks_and_span(config: &NsaConfig) -> (usize, usize) {
    (config.select_block() / config.compress_stride(), config.compress_block() / config.compress_stride())
}

/// Whether scores of `keys` compressed keys are summed to selection blocks before they are kept.
fn folds(config: &NsaConfig, keys: usize) -> bool {
    let (chunks, span) = chunks_and_span(config);
    matches!(chunks, 2 | 4 | 8) && span <= 2 && (keys / 8).is_multiple_of(chunks / 2)
}

/// Whether `cmp_forward` of warpgroups computes scores twice: sums over heads stay within a warp's rows.
fn scores_twice(config: &NsaConfig, keys: usize) -> bool {
    let heads = config.group_size();
    folds(config, keys) && (16usize.is_multiple_of(heads) || heads.is_multiple_of(16))
}

/// How `cmp_forward` keeps scores for the importance (`kernels/cmp_fwd.cu`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeptScores {
    /// The tiles, of which two are copied at once where shared memory is left for that.
    pub(crate) tiles: BandTiles,
    /// Whether scores are computed a second time, once the denominators of the softmax are known, and summed over heads before they
    /// are kept; else those of each row are kept until then.
    pub(crate) twice: bool,
    /// Numbers that a block keeps.
    pub(crate) floats: usize,
    /// Blocks that run at once, each with a slot in the workspace; 0 if scores are kept in shared memory.
    pub(crate) slots: usize,
    /// Bytes of shared memory of a block, those of its tiles included.
    pub(crate) shared_bytes: usize,
}

impl KeptScores {
    /// For sequences of at most `blocks` compression blocks, on a device with so many multiprocessors and bytes of shared
    /// memory a block. Shared memory it is where as many blocks still fit on a multiprocessor as their registers allow.
    pub(crate) fn new(config: &NsaConfig, tiles: BandTiles, blocks: usize, device: (usize, usize)) -> Self {
        let (chunks, span) = chunks_and_span(config);
        let (folded, heads) = (folds(config, tiles.keys), config.group_size());
        let (columns, extra) = if folded { (tiles.keys / chunks, span - 1) } else { (tiles.keys, 0) };
        let twice = tiles.unit == Unit::Warpgroup && scores_twice(config, tiles.keys);
        let of_tile = if twice { tiles.queries * heads.div_ceil(16) * columns } else { tiles.rows() * (columns + 1) };
        let floats = (blocks + extra).div_ceil(tiles.keys) * of_tile;
        // m and 1 / l of each row, and the tile in turn.
        let own = |tiles: &BandTiles| tiles.shared_bytes + tiles.rows() * 8 + 16;
        let (multiprocessors, shared) = device;
        let narrow = config.head_dim_qk().max(config.head_dim_v()) <= 128;
        let at_once = if tiles.unit == Unit::Warp || (twice && narrow) { 2 } else { 1 };
        let kept = |tiles: BandTiles, floats_in_shared, slots| Self {
            tiles,
            twice,
            floats,
            slots,
            shared_bytes: own(&tiles) + 4 * floats_in_shared,
        };
        let more = if at_once == 1 { tiles.with_two_copied(config) } else { tiles };
        let fits = |tiles: &BandTiles| own(tiles) + 4 * floats <= (shared / at_once).max(own(tiles));
        match [more, tiles].into_iter().find(fits) {
            Some(tiles) => kept(tiles, floats, 0),
            None => kept(more, 0, at_once * multiprocessors),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;

    #[test]
    fn scores_are_kept_in_shared_memory_while_two_blocks_fit() {
        let config = config(16, (128, 128));
        let tiles = BandTiles::new(&config, 2, Unit::Warp);
        let kept = |blocks, shared| KeptScores::new(&config, tiles, blocks, (108, shared));
        let warpgroups = BandTiles::compressed(&config, 2, Unit::Warpgroup);
        let kept_by_them = |blocks| KeptScores::new(&config, warpgroups, blocks, (132, 227 << 10));
        // Sums of eight queries: 16 blocks of each of 64 tiles of keys.
        assert_eq!((kept_by_them(4095).floats, kept_by_them(4095).slots), (8_192, 264));
        assert_eq!((kept_by_them(1023).floats, kept_by_them(1023).slots), (2_048, 0));
        assert!([62, 1023, 4095].iter().all(|&blocks| kept_by_them(blocks).shared_bytes <= 227 << 9));
        // Heads that are not within a warp's rows are kept a row, by blocks of twelve warps that have a multiprocessor each.
        let seven = self::config(7, (128, 128));
        let warpgroups = BandTiles::compressed(&seven, 2, Unit::Warpgroup);
        let kept_by_them = |blocks| KeptScores::new(&seven, warpgroups, blocks, (132, 227 << 10));
        assert_eq!((kept_by_them(62).slots, kept_by_them(62).tiles.copied), (0, 2));
        assert_eq!((kept_by_them(4095).slots, kept_by_them(4095).tiles.copied), (132, 2));
        assert!([62, 4095].iter().all(|&blocks| kept_by_them(blocks).shared_bytes <= 227 << 10));
        // 32 compressed keys are 8 selection blocks; one more key is looked at.
        assert_eq!(kept(31, 163 << 10).floats, 128 * 9);
        assert_eq!(kept(32, 163 << 10).floats, 2 * 128 * 9);
        assert_eq!((kept(62, 163 << 10).slots, kept(4095, 163 << 10).slots), (0, 216));
        assert_eq!(kept(4095, 163 << 10).floats, 128 * 128 * 9);
        assert!(kept(62, 163 << 10).shared_bytes <= 163 << 9);
    }
}
