//! Shapes of launches, as pure functions.

pub(crate) mod decode;
pub(crate) mod step;

use nsa_core::NsaConfig;

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Blocks along x, y, z; the long axis is x.
    pub(crate) grid: [u64; 3],
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub(crate) shared_bytes: u32,
}

impl Geometry {
    /// Blocks of `threads` along x, so that there are at least `count` threads.
    pub(crate) fn linear(count: u64, threads: u32) -> Self {
        Self { grid: [count.div_ceil(u64::from(threads)), 1, 1], threads, shared_bytes: 0 }
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

/// Elements that a thread moves at once, the smallest of which have `size` bytes: 16 bytes of these, where rows of `dim`
/// elements and all addresses allow it, else one.
pub(crate) fn vector(dim: usize, size: usize, addresses: &[u64]) -> usize {
    let aligned = addresses.iter().all(|address| address % 16 == 0);
    let wide = if size == 2 { 8 } else { 4 };
    if aligned && dim.is_multiple_of(wide) { wide } else { 1 }
}

/// The most bytes of shared memory that a block takes by choice: what the smallest devices give.
pub(crate) const SHARED_BYTES: usize = 99 << 10;

/// The same where products are made by four warps together: what a block of such a device can have.
const WARPGROUP_SHARED_BYTES: usize = 227 << 10;

/// Who makes a product of matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// A warp alone (`mma.sync`).
    Warp,
    /// Four warps together, which read its right side from shared memory once (`wgmma`).
    Warpgroup,
}

impl Unit {
    /// What a device of a compute capability has: `wgmma` is an instruction of 9.0 alone.
    pub(crate) fn of(capability: (i32, i32)) -> Self {
        if capability == (9, 0) { Self::Warpgroup } else { Self::Warp }
    }

    /// The best for rows of these dimensions with elements of `size` bytes: warpgroups take 64 columns of 16 bits at a time.
    fn fitting(self, config: &NsaConfig, size: usize) -> Self {
        let whole = [config.head_dim_qk(), config.head_dim_v()].iter().all(|dim| dim.is_multiple_of(64));
        if whole && size == 2 { self } else { Self::Warp }
    }

    /// The most bytes of shared memory that a block takes by choice.
    pub(crate) fn shared_bytes(self) -> usize {
        match self {
            Self::Warp => SHARED_BYTES,
            Self::Warpgroup => WARPGROUP_SHARED_BYTES,
        }
    }

    /// Warps of a block, at least.
    pub(crate) fn least_warps(self) -> usize {
        match self {
            Self::Warp => 1,
            Self::Warpgroup => 4,
        }
    }

    /// Bytes that tiles begin at multiples of.
    fn alignment(self) -> usize {
        match self {
            Self::Warp => 128,
            Self::Warpgroup => 1024,
        }
    }
}

/// Bytes that rows of `dim` elements of `size` bytes, at these addresses, are copied in: 16, 8, 4 or else 2.
pub(crate) fn copy_bytes(dim: usize, size: usize, addresses: &[u64]) -> usize {
    let fits = |&bytes: &usize| (dim * size).is_multiple_of(bytes) && addresses.iter().all(|a| a % bytes as u64 == 0);
    [16, 8, 4].into_iter().find(fits).unwrap_or(2)
}

/// Elements of rows of k and v in tiles of shared memory: filled up to 16.
fn padded(config: &NsaConfig) -> [usize; 2] {
    [config.head_dim_qk(), config.head_dim_v()].map(|dim| dim.next_multiple_of(16))
}

/// Bytes of a row in a tile of shared memory.
fn pitch(dim: usize, size: usize) -> usize {
    dim.next_multiple_of(16) * size
}

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
            shared_bytes: (warps * 16 * k.max(v) + 2 * keys * (k + v)) * 2,
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
        self.rows() * self.row_bytes + 2 * self.copied * stage
    }

    fn bytes_of_queries(&self) -> usize {
        (16 * self.query_warps + 2 * self.keys) * self.row_bytes
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
        self.partial_floats(config).div_ceil(2 * super::gradients::ADD_THREADS as usize) as u64
    }

    /// A launch over `parts` of the queries of tiles of keys.
    pub(crate) fn of_keys(&self, tiles: usize, heads: usize, parts: usize) -> Geometry {
        let grid = [tiles as u64 * heads as u64, if self.apart { 2 } else { 1 }, parts as u64];
        Geometry { grid, threads: 32 * self.warps as u32, shared_bytes: self.bytes_of_keys() as u32 }
    }
}

/// Tiles of `rows` rows that share the heads of a query, and queries of a tile. Those of a warp's 16 rows walk over the union of
/// their blocks, which is never more work than each one's own with the other rows empty.
fn select_rows(config: &NsaConfig, rows: usize) -> (usize, usize) {
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
        let shared_bytes = 2 * keys * (k + v) + ROWS * k.max(v) + list_bytes(config, queries);
        let unit = Unit::Warpgroup;
        Self { unit, warps: 4, rows: ROWS, keys, stages: 2, queries, parts, held: false, shared_bytes }
    }

    fn of_warps(config: &NsaConfig, size: usize) -> Self {
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
        let unit = Unit::Warp;
        Self { unit, warps, rows: 16, keys, stages: STAGES, queries, parts, held, shared_bytes: warps * warp }
    }

    /// For gradients of queries, in blocks of `warps` warps.
    pub(crate) fn gradients(config: &NsaConfig, size: usize, warps: usize) -> Self {
        let bytes = pitch(config.head_dim_qk(), size) + pitch(config.head_dim_v(), size);
        let ((parts, queries), keys) = (select_rows(config, 16), 16);
        let warp = (2 * keys + 16) * bytes + list_bytes(config, queries);
        let unit = Unit::Warp;
        Self { unit, warps, rows: 16, keys, stages: 2, queries, parts, held: false, shared_bytes: warps * warp }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_every_element() {
        assert_eq!(Geometry::linear(0, 256).grid, [0, 1, 1]);
        assert!(Geometry::linear(0, 256).is_empty());
        assert_eq!(Geometry::linear(256, 256).grid, [1, 1, 1]);
        assert_eq!(Geometry::linear(257, 256).grid, [2, 1, 1]);
        assert_eq!(Geometry::linear(1 << 40, 256).grid, [1 << 32, 1, 1]);
    }

    #[test]
    fn vectors_are_as_wide_as_rows_and_addresses_allow() {
        assert_eq!(vector(128, 2, &[0, 256]), 8);
        assert_eq!(vector(128, 4, &[16]), 4);
        assert_eq!(vector(12, 2, &[0]), 1);
        assert_eq!(vector(128, 2, &[2]), 1);
        assert_eq!(vector(0, 2, &[0]), 8);
    }

    fn config(heads: usize, dims: (usize, usize)) -> NsaConfig {
        let builder = NsaConfig::builder(heads, 1, dims.0, dims.1);
        builder.compress_kind(nsa_core::CompressKind::Mean).build().unwrap()
    }

    #[test]
    fn rows_are_copied_as_wide_as_they_lie() {
        assert_eq!(copy_bytes(128, 2, &[0, 256]), 16);
        assert_eq!(copy_bytes(12, 2, &[0]), 8);
        assert_eq!(copy_bytes(10, 2, &[0]), 4);
        assert_eq!(copy_bytes(5, 2, &[0]), 2);
        assert_eq!(copy_bytes(128, 2, &[4]), 4);
    }

    #[test]
    fn a_block_holds_all_heads_of_its_queries_within_its_memory() {
        for heads in [1, 4, 7, 16, 64, 128] {
            for dims in [(5, 3), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)] {
                for (size, unit) in [(2, Unit::Warp), (4, Unit::Warp), (2, Unit::Warpgroup), (4, Unit::Warpgroup)] {
                    let config = config(heads, dims);
                    let select = SelectTiles::new(&config, size, unit, 1024);
                    for band in [BandTiles::new(&config, size, unit), BandTiles::compressed(&config, size, unit)] {
                        assert!(band.queries > 0 && band.queries * heads <= band.rows(), "{heads} {dims:?} {band:?}");
                        assert!(band.warps.is_multiple_of(band.unit.least_warps()), "{heads} {dims:?} {band:?}");
                        let limit = band.unit.shared_bytes();
                        assert!(heads > 16 || band.shared_bytes <= limit, "{heads} {dims:?} {band:?}");
                    }
                    for gradients in
                        [GradientTiles::new(&config, size, unit), GradientTiles::banded(&config, size, unit)]
                    {
                        assert!(
                            gradients.queries * heads <= 16 * gradients.query_warps,
                            "{heads} {dims:?} {gradients:?}"
                        );
                        for warps in [gradients.warps, gradients.query_warps] {
                            assert!(warps.is_multiple_of(gradients.unit.least_warps()), "{heads} {gradients:?}");
                        }
                        let limit = gradients.unit.shared_bytes();
                        assert!(heads > 16 || gradients.shared_bytes() <= limit, "{dims:?} {gradients:?}");
                    }
                    assert!(select.queries > 0, "{heads} {dims:?} {select:?}");
                    assert!(
                        select.queries * heads.div_ceil(select.parts) <= select.rows,
                        "{heads} {dims:?} {select:?}"
                    );
                    assert!(select.shared_bytes <= select.unit.shared_bytes(), "{heads} {dims:?} {select:?}");
                }
            }
        }
    }

    #[test]
    fn warpgroups_multiply_where_columns_fill_them() {
        assert_eq!(
            [(8, 0), (8, 9), (9, 0), (10, 0)].map(Unit::of).map(|unit| unit == Unit::Warpgroup),
            [false, false, true, false]
        );
        let unit = |dims, size| BandTiles::new(&config(16, dims), size, Unit::Warpgroup).unit;
        assert_eq!(unit((128, 128), 2), Unit::Warpgroup);
        assert_eq!(unit((192, 128), 2), Unit::Warpgroup);
        assert_eq!([unit((96, 96), 2), unit((64, 32), 2), unit((128, 128), 4)], [Unit::Warp; 3]);
        let config = config(16, (128, 128));
        let (band, compressed) =
            (BandTiles::new(&config, 2, Unit::Warpgroup), BandTiles::compressed(&config, 2, Unit::Warpgroup));
        assert_eq!((band.rows(), compressed.rows(), compressed.queries), (128, 128, 8));
        assert_eq!(BandTiles::compressed(&self::config(7, (128, 128)), 2, Unit::Warpgroup).rows(), 192);
        let gradients = GradientTiles::new(&config, 2, Unit::Warpgroup);
        assert_eq!((gradients.rows(), gradients.keys, gradients.query_rows), (64, 64, 64));
        let shared = GradientTiles::banded(&config, 2, Unit::Warpgroup);
        assert_eq!((shared.rows(), shared.query_warps, shared.copied), (128, 12, 2));
    }

    #[test]
    fn queries_are_cut_into_parts_where_tiles_of_keys_are_few() {
        let tiles = GradientTiles::new(&config(16, (128, 128)), 2, Unit::Warp);
        assert_eq!((tiles.rows(), tiles.query_rows), (64, 32));
        // Compressed keys, and tokens, of 16,384 and 65,536 tokens; 64 tokens.
        assert_eq!([16, 64, 256, 1024].map(|keys| tiles.parts(keys, 16 * 16_384)), [64, 16, 4, 1]);
        assert_eq!((tiles.parts(1, 16 * 64), tiles.parts(0, 0)), (2, 1));
    }

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
