//! Sizes of a decoding step's launches and workspace (`kernels/decode.cu`), as pure functions.

use super::step::StepTiles;
use nsa_core::{NsaConfig, index};

/// Selection blocks that a chunk of compressed blocks touches, at most.
pub(crate) fn columns(config: &NsaConfig, tiles: &StepTiles) -> usize {
    let chunks = config.select_block() / config.compress_stride();
    let span = config.compress_block() / config.compress_stride();
    let before = if tiles.chunk.is_multiple_of(chunks) { 0 } else { chunks - 1 };
    (tiles.chunk - 1 + before + span - 1) / chunks + 1
}

/// Elements of a workspace, for so many sequences of so long contexts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DecodeSizes {
    /// Chunks of compressed blocks, the window, and selected blocks.
    pub(crate) splits: [usize; 3],
    /// Selection blocks.
    pub(crate) candidates: usize,
    /// f32 of outputs, of m and l, of scores of chunks, of importance, of weights of chunks, in this order.
    pub(crate) floats: [usize; 5],
    /// Counters.
    pub(crate) counters: usize,
}

impl DecodeSizes {
    /// For contexts of up to `context` tokens.
    pub(crate) fn new(config: &NsaConfig, tiles: &StepTiles, sequences: usize, context: usize) -> Self {
        let splits = [
            tiles.splits(index::num_blocks(config, context)).max(1),
            tiles.splits(config.window().min(context)),
            tiles.splits((config.select_count() * config.select_block()).min(context)),
        ];
        let candidates = context.div_ceil(config.select_block());
        let (lists, heads) = (sequences * config.num_kv_heads(), config.group_size());
        let shares = lists * splits.iter().sum::<usize>() * heads;
        let floats = [
            shares * config.head_dim_v(),
            shares * 2,
            lists * splits[0] * heads * columns(config, tiles),
            lists * candidates,
            lists * splits[0] * heads,
        ];
        // Each begins on 16 bytes.
        Self { splits, candidates, floats: floats.map(|count| count.next_multiple_of(4)), counters: lists * 2 }
    }

    /// Blocks of threads of the larger launch.
    pub(crate) fn blocks(&self, config: &NsaConfig, tiles: &StepTiles, sequences: usize) -> u64 {
        let [cmp, win, slc] = self.splits;
        tiles.geometry(config, sequences * (cmp + win).max(slc), 0).grid[0]
    }

    /// Bytes of all of it.
    pub(crate) fn bytes(&self) -> usize {
        4 * (self.floats.iter().sum::<usize>() + self.counters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::CompressKind;

    #[test]
    fn columns_hold_every_block_that_a_chunk_counts_for() {
        for (l, d, p) in [(32, 16, 64), (8, 4, 16), (6, 3, 9), (16, 2, 32), (1, 1, 1), (8, 8, 32), (16, 1, 1024)] {
            let config = NsaConfig::builder(4, 2, 16, 16).compress_kind(CompressKind::Mean);
            let config = config.compress_block(l).compress_stride(d).select_block(p).build().unwrap();
            let tiles = StepTiles::new(&config, 2, true);
            let mut most = 0;
            for split in 0..50 {
                let first = split * tiles.chunk * d / p;
                let last = ((split + 1) * tiles.chunk * d - d + l - 1) / p;
                most = most.max(last - first + 1);
            }
            assert_eq!(most, columns(&config, &tiles), "{l} {d} {p}");
        }
    }

    #[test]
    fn a_workspace_grows_with_sequences_and_contexts() {
        let config = NsaConfig::paper();
        let tiles = StepTiles::new(&config, 2, true);
        let sizes = |sequences, context| DecodeSizes::new(&config, &tiles, sequences, context);
        assert_eq!(sizes(1, 8192).splits, [2, 2, 4]);
        assert_eq!(sizes(1, 65536).splits, [16, 2, 4]);
        assert_eq!(sizes(1, 1).splits, [1, 1, 1]);
        assert_eq!(sizes(3, 8192).bytes(), 3 * sizes(1, 8192).bytes());
        assert_eq!(sizes(0, 0).bytes(), 0);
    }
}
