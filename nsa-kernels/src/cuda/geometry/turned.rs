//! Tiles of the kernel whose blocks of threads own selected blocks of keys, and the runs of queries that it takes, as pure
//! functions.

use super::{Geometry, SHARED_BYTES, SelectTiles, padded, pitch};
use nsa_core::{NsaConfig, Packing};

/// How many times as many blocks as a list has, at least, a warp would copy whose queries walk, if these choose at random. Where lists
/// have more in common the walk takes less time, what is turned as much as ever.
const COPIED_LISTS: f64 = 3.0;
/// Rows of queries, at least, that a block of keys has in a run, if queries choose evenly: its keys are read for them.
const TURNED_ROWS: usize = 16;
/// Rows of queries of a work, about: a block of keys is read for so many.
const WORK_ROWS: usize = 512;

/// Tiles of `slc_turned` (`kernels/slc_turned.cu`) and `slc_turned_gradients` (`kernels/slc_turned_bwd.cu`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TurnedTiles {
    /// Warps of a block.
    pub(crate) warps: usize,
    /// Keys of a step.
    pub(crate) keys: usize,
    /// Whether queries stay in registers.
    pub(crate) held: bool,
    /// Queries of a work.
    pub(crate) queries: usize,
    /// Columns of a share.
    pub(crate) columns: usize,
    /// Numbers of a share beside them.
    pub(crate) statistics: usize,
    /// Bytes of shared memory of a block.
    pub(crate) shared_bytes: usize,
}

impl TurnedTiles {
    /// For a configuration and elements of `size` bytes, if shared memory holds a block of keys.
    pub(crate) fn forward(config: &NsaConfig, size: usize) -> Option<Self> {
        let (k, v) = (pitch(config.head_dim_qk(), size), pitch(config.head_dim_v(), size));
        let [_, columns] = padded(config);
        Some(Self { held: size == 2 && k + v < 1024, columns, statistics: 2, ..Self::with_rows(config, size, k)? })
    }

    /// The same for gradients of queries.
    pub(crate) fn gradients(config: &NsaConfig, size: usize) -> Option<Self> {
        let (k, v) = (pitch(config.head_dim_qk(), size), pitch(config.head_dim_v(), size));
        let [columns, _] = padded(config);
        Some(Self { columns, ..Self::with_rows(config, size, k + v)? })
    }

    /// With so many bytes of each row of queries.
    fn with_rows(config: &NsaConfig, size: usize, row_bytes: usize) -> Option<Self> {
        let block = config.select_block();
        let keys = match block {
            _ if block.is_multiple_of(64) => 64,
            32.. => 32,
            _ => 16,
        };
        let of_key = pitch(config.head_dim_qk(), size) + pitch(config.head_dim_v(), size);
        let bytes = |warps| block.next_multiple_of(keys) * of_key + warps * 16 * row_bytes;
        let warps = [4, 2].into_iter().find(|&warps| bytes(warps) <= SHARED_BYTES)?;
        let queries = (WORK_ROWS / config.group_size()).max(1);
        Some(Self { warps, keys, held: false, queries, columns: 0, statistics: 0, shared_bytes: bytes(warps) })
    }

    /// These where this is faster than to walk over blocks, for runs of `share_bytes`.
    pub(crate) fn where_faster(
        self,
        config: &NsaConfig,
        packing: &Packing,
        walking: &SelectTiles,
        share_bytes: usize,
    ) -> Option<Self> {
        let longest = packing.seqs().max_by_key(|seq| seq.end())?;
        let (selected, blocks) = (config.select_count(), longest.end() / config.select_block());
        let long = walking.copied(blocks, selected) >= COPIED_LISTS * selected as f64;
        let queries = longest.rows.len().min(self.run_tokens(config, share_bytes));
        let met = queries * config.group_size() * selected >= TURNED_ROWS * blocks;
        (long && met).then_some(self)
    }

    /// Queries whose shares take at most so many bytes, at least one; whole masks of the index, where there are more.
    pub(crate) fn run_tokens(&self, config: &NsaConfig, share_bytes: usize) -> usize {
        let of_token = config.num_heads() * config.select_count() * 4 * (self.columns + self.statistics);
        match share_bytes / of_token {
            few @ 0..32 => few.max(1),
            many => many / 32 * 32,
        }
    }

    /// Lanes of a row in `slc_merge`.
    pub(crate) fn merge_lanes(&self) -> usize {
        (self.columns / 4).next_power_of_two().clamp(8, 32)
    }

    /// A launch over `works` works.
    pub(crate) fn geometry(&self, works: usize) -> Geometry {
        let (threads, shared_bytes) = (32 * self.warps as u32, self.shared_bytes as u32);
        Geometry { grid: [works as u64, 1, 1], threads, shared_bytes }
    }
}

/// Queries one after another, and the blocks of keys that they may have selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Rows in `[N]`.
    pub(crate) first_token: usize,
    pub(crate) tokens: usize,
    /// Among the blocks of all sequences.
    pub(crate) first_block: usize,
    pub(crate) blocks: usize,
}

/// The queries of a call in runs of at most `run_tokens`.
pub(crate) fn extents(packing: &Packing, block: usize, run_tokens: usize) -> Vec<Extent> {
    let mut before = 0;
    // Of each sequence with queries: its last row's end, its first block, and from a row of it to the position there.
    let sequences: Vec<_> = packing
        .seqs()
        .filter_map(|seq| {
            let first = before;
            before += seq.end().div_ceil(block);
            (!seq.rows.is_empty()).then_some((seq.rows.clone(), seq.context, first))
        })
        .collect();
    let of = |token: usize| &sequences[sequences.partition_point(|(rows, ..)| rows.end <= token)];
    let run = |first_token: usize| {
        let tokens = run_tokens.min(packing.num_tokens() - first_token);
        let last = first_token + tokens - 1;
        let (_, _, first_block) = of(first_token);
        let (rows, context, first_of_last) = of(last);
        let blocks = first_of_last + (context + last - rows.start) / block + 1 - first_block;
        Extent { first_token, tokens, first_block: *first_block, blocks }
    };
    (0..packing.num_tokens()).step_by(run_tokens).map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;
    use nsa_core::CuSeqlens;

    fn packing(sequences: &[(usize, usize)]) -> Packing {
        let lengths = CuSeqlens::from_lengths(sequences.iter().map(|&(queries, _)| queries)).unwrap();
        Packing::with_contexts(lengths, sequences.iter().map(|&(_, context)| context).collect()).unwrap()
    }

    #[test]
    fn runs_cover_all_queries_with_the_blocks_up_to_their_own() {
        let of = |sequences: &[(usize, usize)], run| -> Vec<_> {
            let fields = |extent: Extent| (extent.first_token, extent.tokens, extent.first_block, extent.blocks);
            extents(&packing(sequences), 16, run).into_iter().map(fields).collect()
        };
        assert_eq!(of(&[(100, 0)], 64), [(0, 64, 0, 4), (64, 36, 0, 7)]);
        assert_eq!(of(&[(100, 0)], 1000), [(0, 100, 0, 7)]);
        // A sequence without queries has blocks of keys too.
        assert_eq!(of(&[(20, 0), (0, 40), (3, 30), (0, 0)], 8), [(0, 8, 0, 1), (8, 8, 0, 1), (16, 7, 0, 8)]);
        assert_eq!(of(&[(20, 0), (0, 40), (3, 30)], 20), [(0, 20, 0, 2), (20, 3, 5, 3)]);
        assert_eq!(of(&[], 8), []);
    }

    #[test]
    fn shares_of_a_run_take_what_they_may() {
        let config = config(16, (128, 128));
        let tiles = TurnedTiles::forward(&config, 2).unwrap();
        let of_token = 16 * 16 * 4 * 130;
        assert_eq!(tiles.run_tokens(&config, 260 << 20), 2048);
        assert_eq!(TurnedTiles::gradients(&config, 2).unwrap().run_tokens(&config, 260 << 20), 2080);
        assert_eq!([0, 1, 31, 32, 63, 64].map(|n| tiles.run_tokens(&config, n * of_token)), [1, 1, 31, 32, 32, 64]);
    }

    #[test]
    fn small_groups_in_long_sequences_are_turned() {
        let turned = |heads, sequences: &[(usize, usize)]| {
            let config = config(heads, (128, 128));
            let ways = [TurnedTiles::forward(&config, 2), TurnedTiles::gradients(&config, 2)];
            let walking = SelectTiles::of_warps(&config, 2);
            let [forward, gradients] = ways
                .map(|tiles| tiles.unwrap().where_faster(&config, &packing(sequences), &walking, 260 << 20).is_some());
            assert_eq!(forward, gradients);
            forward
        };
        assert_eq!([1, 2, 4, 5, 16].map(|heads| turned(heads, &[(32_768, 0)])), [true, true, true, false, false]);
        assert_eq!([3072, 3328, 4096].map(|tokens| turned(1, &[(tokens, 0)])), [false, true, true]);
        // Warps that walk jointly copy less: 32 queries of two heads, 16 of four.
        assert_eq!([13_312, 13_440].map(|tokens| turned(2, &[(tokens, 0)])), [false, true]);
        assert_eq!([19_968, 20_096].map(|tokens| turned(4, &[(tokens, 0)])), [false, true]);
        // Too few queries for the blocks of their context, and enough.
        assert_eq!([127, 128].map(|queries| turned(4, &[(queries, 32_640), (7, 0)])), [false, true]);
        assert!(!turned(4, &[]));
    }

    #[test]
    fn a_block_of_keys_that_does_not_fit_is_not_turned() {
        let of = |tiles: Option<TurnedTiles>| tiles.map(|tiles| (tiles.warps, tiles.keys, tiles.held, tiles.queries));
        let forward = |dims, size| of(TurnedTiles::forward(&config(4, dims), size));
        let gradients = |dims, size| of(TurnedTiles::gradients(&config(4, dims), size));
        assert_eq!(forward((128, 128), 2), Some((4, 64, true, 128)));
        assert_eq!(forward((192, 128), 2), Some((4, 64, true, 128)));
        assert_eq!(forward((256, 256), 2), Some((4, 64, false, 128)));
        assert_eq!((forward((128, 128), 4), forward((256, 256), 4)), (Some((4, 64, false, 128)), None));
        assert_eq!(gradients((192, 128), 2), Some((4, 64, false, 128)));
        assert_eq!(gradients((256, 256), 2), Some((2, 64, false, 128)));
        assert_eq!((gradients((128, 128), 4), gradients((192, 128), 4)), (Some((2, 64, false, 128)), None));
    }
}
