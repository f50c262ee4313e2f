//! Sizes of a decoding step's launches and workspace (`kernels/decode.cu`), as pure functions.

use super::{Geometry, SHARED_BYTES, pitch};
use nsa_core::{NsaConfig, index};

/// Keys of a team's step.
const KEYS: usize = 16;
/// Steps of a team in shared memory, at most, where blocks share a multiprocessor.
const STAGES: usize = 2;
/// Warps of a team and of a block, at most.
const PARTS: usize = 4;
const WARPS: usize = 8;
/// Rows of a chunk, at least and at most.
const CHUNKS: [usize; 2] = [64, 256];
/// Bytes of shared memory that kernels have besides: statistics of teams, addresses of rows.
const STATIC_BYTES: usize = 6 << 10;
/// The most bytes of shared memory that a block asks for.
const MOST_BYTES: usize = SHARED_BYTES - STATIC_BYTES;

/// How a block works through a chunk of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DecodeTiles {
    /// Warps of a team, with 16 query heads each.
    pub(crate) parts: usize,
    /// Teams of a block.
    pub(crate) teams: usize,
    /// Rows of keys of a block.
    pub(crate) chunk: usize,
    /// Steps of a team in shared memory.
    pub(crate) stages: usize,
    /// Whether queries stay in registers.
    pub(crate) held: bool,
    /// Bytes of queries.
    query_bytes: usize,
    /// Bytes of a team's step.
    stage_bytes: usize,
    /// Bytes of joined outputs.
    joined_bytes: usize,
}

impl DecodeTiles {
    /// Keys of a team's step.
    pub(crate) const KEYS: usize = KEYS;

    /// For a configuration and elements of `size` bytes. As many heads as fit share a block's reads. What it reads and writes
    /// besides its chunk's rows is at most a tenth of them, if scores of so long a chunk fit in shared memory; for that fewer
    /// teams are taken.
    pub(crate) fn new(config: &NsaConfig, size: usize) -> Self {
        let most = config.group_size().div_ceil(16).min(PARTS);
        let of = |parts: usize| {
            let teams = (1..=WARPS / parts).rev();
            let all = teams.flat_map(|teams| (1..=STAGES).rev().map(move |stages| (teams, stages)));
            let mut all = all.map(|(teams, stages)| Self::of(config, size, parts, teams, stages));
            let busy = |tiles: &Self| {
                let rounds = tiles.rounds();
                tiles.fits() && tiles.stages <= rounds && tiles.steps().div_ceil(rounds) == tiles.teams
            };
            let wanted = |tiles: &Self| tiles.chunk == tiles.wanted(config, size) && busy(tiles);
            all.clone().find(wanted).or_else(|| all.find(busy))
        };
        (1..=most).rev().find_map(of).unwrap_or_else(|| Self::of(config, size, 1, 1, 1))
    }

    fn of(config: &NsaConfig, size: usize, parts: usize, teams: usize, stages: usize) -> Self {
        let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let (k, v) = (pitch(dim_k, size), pitch(dim_v, size));
        let rows = 16 * parts;
        let tiles = Self {
            parts,
            teams,
            chunk: CHUNKS[0],
            stages,
            held: size == 2 && k + v <= 256,
            query_bytes: rows * k,
            stage_bytes: KEYS * (k + v),
            joined_bytes: teams * rows * (dim_v.next_multiple_of(16) + 8) * 4,
        };
        let left = MOST_BYTES.saturating_sub(tiles.attend_bytes()) / (rows * 4);
        let room = left.saturating_sub(8) / CHUNKS[0] * CHUNKS[0];
        Self { chunk: tiles.wanted(config, size).min(room).max(CHUNKS[0]), ..tiles }
    }

    /// With as much of a chunk under way at once as `shared_bytes` hold, the most of a block of the device: for blocks that have
    /// a multiprocessor each. Results are the same.
    pub(crate) fn alone(self, shared_bytes: usize) -> Self {
        let deeper = (self.stages..=self.rounds()).rev().map(|stages| Self { stages, ..self });
        let fits = |tiles: &Self| tiles.scan_bytes() + STATIC_BYTES <= shared_bytes;
        deeper.into_iter().find(fits).unwrap_or(self)
    }

    /// Steps of a chunk.
    fn steps(&self) -> usize {
        self.chunk / KEYS
    }

    /// Steps of a team, at most.
    fn rounds(&self) -> usize {
        self.steps().div_ceil(self.teams)
    }

    /// Rows of which queries and outputs are a tenth.
    fn wanted(&self, config: &NsaConfig, size: usize) -> usize {
        let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let beside = (16 * self.parts).min(config.group_size()) * (4 * dim_v + size * dim_k);
        let rows = (10 * beside).div_ceil((dim_k + dim_v) * size);
        rows.next_multiple_of(CHUNKS[0]).min(CHUNKS[1])
    }

    fn fits(&self) -> bool {
        self.scan_bytes() <= MOST_BYTES
    }

    fn score_bytes(&self) -> usize {
        16 * self.parts * (self.chunk + 8) * 4
    }

    /// Bytes of shared memory of a block that keeps scores.
    pub(crate) fn scan_bytes(&self) -> usize {
        self.attend_bytes() + self.score_bytes()
    }

    /// Bytes of shared memory of a block that keeps none: queries, then stages or joined outputs.
    pub(crate) fn attend_bytes(&self) -> usize {
        self.query_bytes + (self.teams * self.stages * self.stage_bytes).max(self.joined_bytes)
    }

    /// Selection blocks that a chunk of compressed blocks touches, at most.
    pub(crate) fn columns(&self, config: &NsaConfig) -> usize {
        let chunks = config.select_block() / config.compress_stride();
        let span = config.compress_block() / config.compress_stride();
        let before = if self.chunk.is_multiple_of(chunks) { 0 } else { chunks - 1 };
        (self.chunk - 1 + before + span - 1) / chunks + 1
    }

    /// A launch over `splits` chunks of each of `sequences` sequences.
    pub(crate) fn geometry(
        &self,
        config: &NsaConfig,
        sequences: usize,
        splits: usize,
        shared_bytes: usize,
    ) -> Geometry {
        let parts = config.group_size().div_ceil(16 * self.parts);
        let blocks = [sequences, splits, parts, config.num_kv_heads()].map(|count| count as u64);
        Geometry {
            grid: [blocks.iter().product(), 1, 1],
            threads: 32 * (self.parts * self.teams) as u32,
            shared_bytes: shared_bytes as u32,
        }
    }
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
    pub(crate) fn new(config: &NsaConfig, tiles: &DecodeTiles, sequences: usize, context: usize) -> Self {
        let split = |rows: usize| rows.div_ceil(tiles.chunk);
        let splits = [
            split(index::num_blocks(config, context)).max(1),
            split(config.window().min(context)),
            split((config.select_count() * config.select_block()).min(context)),
        ];
        let candidates = context.div_ceil(config.select_block());
        let (lists, heads) = (sequences * config.num_kv_heads(), config.group_size());
        let shares = lists * splits.iter().sum::<usize>() * heads;
        let floats = [
            shares * config.head_dim_v(),
            shares * 2,
            lists * splits[0] * heads * tiles.columns(config),
            lists * candidates,
            lists * splits[0] * heads,
        ];
        // Each begins on 16 bytes.
        Self { splits, candidates, floats: floats.map(|count| count.next_multiple_of(4)), counters: lists * 2 }
    }

    /// Blocks of threads of the larger launch.
    pub(crate) fn blocks(&self, config: &NsaConfig, tiles: &DecodeTiles, sequences: usize) -> u64 {
        let [cmp, win, slc] = self.splits;
        tiles.geometry(config, sequences, (cmp + win).max(slc), 0).grid[0]
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

    fn tiles(heads: usize, kv_heads: usize, dim_k: usize, dim_v: usize, size: usize) -> DecodeTiles {
        let config =
            NsaConfig::builder(heads, kv_heads, dim_k, dim_v).compress_kind(CompressKind::Mean).build().unwrap();
        DecodeTiles::new(&config, size)
    }

    #[test]
    fn chunks_are_as_long_as_their_own_reads_ask_for() {
        let shape = |t: DecodeTiles| (t.parts, t.teams, t.chunk, t.stages);
        let shapes = [
            tiles(64, 4, 128, 128, 2),
            tiles(64, 16, 128, 128, 2),
            tiles(64, 4, 192, 128, 2),
            tiles(64, 1, 128, 128, 2),
            tiles(4, 4, 256, 256, 4),
        ];
        assert_eq!(shapes.map(shape), [(1, 8, 256, 1), (1, 4, 64, 1), (1, 6, 256, 1), (4, 1, 128, 2), (1, 2, 64, 1)]);
    }

    #[test]
    fn shared_memory_fits_every_device() {
        for heads in [1, 2, 7, 16, 24, 32, 64, 128, 1000] {
            for (dim_k, dim_v) in [(5, 3), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)] {
                for size in [2, 4] {
                    let tiles = tiles(heads, 1, dim_k, dim_v, size);
                    assert!(tiles.scan_bytes() <= MOST_BYTES, "{heads} {dim_k} {dim_v} {size}: {tiles:?}");
                    assert!(tiles.chunk.is_multiple_of(KEYS), "{tiles:?}");
                }
            }
        }
    }

    #[test]
    fn a_block_alone_has_a_chunk_under_way_where_the_device_allows() {
        let stages = |tiles: DecodeTiles, kilobytes: usize| tiles.alone(kilobytes << 10).stages;
        let common = tiles(64, 4, 128, 128, 2);
        assert_eq!([99, 163, 227].map(|kilobytes| stages(common, kilobytes)), [1, 2, 2]);
        assert_eq!([99, 163, 227].map(|kilobytes| stages(tiles(64, 4, 192, 128, 2), kilobytes)), [1, 2, 3]);
    }

    #[test]
    fn columns_hold_every_block_that_a_chunk_counts_for() {
        for (l, d, p) in [(32, 16, 64), (8, 4, 16), (6, 3, 9), (16, 2, 32), (1, 1, 1), (8, 8, 32), (16, 1, 1024)] {
            let config = NsaConfig::builder(4, 2, 16, 16).compress_kind(CompressKind::Mean);
            let config = config.compress_block(l).compress_stride(d).select_block(p).build().unwrap();
            let tiles = DecodeTiles::new(&config, 2);
            let mut most = 0;
            for split in 0..50 {
                let first = split * tiles.chunk * d / p;
                let last = ((split + 1) * tiles.chunk * d - d + l - 1) / p;
                most = most.max(last - first + 1);
            }
            assert_eq!(most, tiles.columns(&config), "{l} {d} {p}");
        }
    }

    #[test]
    fn a_workspace_grows_with_sequences_and_contexts() {
        let config = NsaConfig::paper();
        let tiles = DecodeTiles::new(&config, 2);
        let sizes = |sequences, context| DecodeSizes::new(&config, &tiles, sequences, context);
        assert_eq!(sizes(1, 8192).splits, [2, 2, 4]);
        assert_eq!(sizes(1, 65536).splits, [16, 2, 4]);
        assert_eq!(sizes(1, 1).splits, [1, 1, 1]);
        assert_eq!(sizes(3, 8192).bytes(), 3 * sizes(1, 8192).bytes());
        assert_eq!(sizes(0, 0).bytes(), 0);
    }
}
