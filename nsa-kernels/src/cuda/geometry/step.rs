//! How steps of single queries work through their keys (`kernels/step.cuh`), as pure functions.

use super::{Geometry, SHARED_BYTES, pitch};
use nsa_core::NsaConfig;

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
pub(crate) struct StepTiles {
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
    /// Whether some of the blocks keep the scores of their chunk.
    scored: bool,
    /// Bytes of queries.
    query_bytes: usize,
    /// Bytes of a team's step.
    stage_bytes: usize,
    /// Bytes of joined outputs.
    joined_bytes: usize,
}

impl StepTiles {
    /// Keys of a team's step.
    pub(crate) const KEYS: usize = KEYS;

    /// For a configuration and elements of `size` bytes. As many heads as fit share a block's reads. What it reads and writes
    /// besides its chunk's rows is at most a tenth of them, if scores of so long a chunk, where they are kept, fit in shared
    /// memory; for that fewer teams are taken.
    pub(crate) fn new(config: &NsaConfig, size: usize, scored: bool) -> Self {
        let most = config.group_size().div_ceil(16).min(PARTS);
        let of = |parts: usize| {
            let teams = (1..=WARPS / parts).rev();
            let all = teams.flat_map(|teams| (1..=STAGES).rev().map(move |stages| (teams, stages)));
            let mut all = all.map(|(teams, stages)| Self::of(config, size, scored, [parts, teams, stages]));
            let busy = |tiles: &Self| {
                let rounds = tiles.rounds();
                tiles.fits(SHARED_BYTES) && tiles.stages <= rounds && tiles.steps().div_ceil(rounds) == tiles.teams
            };
            let wanted = |tiles: &Self| tiles.chunk == tiles.wanted(config, size) && busy(tiles);
            all.clone().find(wanted).or_else(|| all.find(busy))
        };
        (1..=most).rev().find_map(of).unwrap_or_else(|| Self::of(config, size, scored, [1, 1, 1]))
    }

    fn of(config: &NsaConfig, size: usize, scored: bool, [parts, teams, stages]: [usize; 3]) -> Self {
        let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let (k, v) = (pitch(dim_k, size), pitch(dim_v, size));
        let rows = 16 * parts;
        let tiles = Self {
            parts,
            teams,
            chunk: CHUNKS[0],
            stages,
            held: size == 2 && k + v <= 256,
            scored,
            query_bytes: rows * k,
            stage_bytes: KEYS * (k + v),
            joined_bytes: teams * rows * (dim_v.next_multiple_of(16) + 8) * 4,
        };
        let left = MOST_BYTES.saturating_sub(tiles.attend_bytes()) / (rows * 4);
        let room = if scored { left.saturating_sub(8) / CHUNKS[0] * CHUNKS[0] } else { CHUNKS[1] };
        Self { chunk: tiles.wanted(config, size).min(room).max(CHUNKS[0]), ..tiles }
    }

    /// With as much of a chunk under way at once as `shared_bytes` hold, the most of a block of the device: for blocks that have
    /// a multiprocessor each. Results are the same.
    pub(crate) fn alone(self, shared_bytes: usize) -> Self {
        let deeper = (self.stages..=self.rounds()).rev().map(|stages| Self { stages, ..self });
        deeper.into_iter().find(|tiles| tiles.fits(shared_bytes)).unwrap_or(self)
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

    /// Whether blocks fit in so many bytes of shared memory.
    pub(crate) fn fits(&self, shared_bytes: usize) -> bool {
        self.scan_bytes() + STATIC_BYTES <= shared_bytes
    }

    /// Bytes of dynamic shared memory of a block that keeps scores, if any does.
    pub(crate) fn scan_bytes(&self) -> usize {
        self.attend_bytes() + if self.scored { 16 * self.parts * (self.chunk + 8) * 4 } else { 0 }
    }

    /// Bytes of dynamic shared memory of a block that keeps none: queries, then stages or joined outputs.
    pub(crate) fn attend_bytes(&self) -> usize {
        self.query_bytes + (self.teams * self.stages * self.stage_bytes).max(self.joined_bytes)
    }

    /// Chunks of so many rows.
    pub(crate) fn splits(&self, rows: usize) -> usize {
        rows.div_ceil(self.chunk)
    }

    /// Blocks that share the query heads of a KV head.
    pub(crate) fn group_parts(&self, config: &NsaConfig) -> usize {
        config.group_size().div_ceil(16 * self.parts)
    }

    /// A launch over so many chunks.
    pub(crate) fn geometry(&self, config: &NsaConfig, chunks: usize, shared_bytes: usize) -> Geometry {
        let blocks = [chunks, self.group_parts(config), config.num_kv_heads()].map(|count| count as u64);
        Geometry {
            grid: [blocks.iter().product(), 1, 1],
            threads: 32 * (self.parts * self.teams) as u32,
            shared_bytes: shared_bytes as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::CompressKind;

    fn tiles(heads: usize, kv_heads: usize, [dim_k, dim_v]: [usize; 2], size: usize, scored: bool) -> StepTiles {
        let config =
            NsaConfig::builder(heads, kv_heads, dim_k, dim_v).compress_kind(CompressKind::Mean).build().unwrap();
        StepTiles::new(&config, size, scored)
    }

    #[test]
    fn chunks_are_as_long_as_their_own_reads_ask_for() {
        let shape = |t: StepTiles| (t.parts, t.teams, t.chunk, t.stages);
        let shapes = |scored| {
            [
                tiles(64, 4, [128, 128], 2, scored),
                tiles(64, 16, [128, 128], 2, scored),
                tiles(64, 4, [192, 128], 2, scored),
                tiles(64, 1, [128, 128], 2, scored),
                tiles(4, 4, [256, 256], 4, scored),
            ]
            .map(shape)
        };
        assert_eq!(shapes(true), [(1, 8, 256, 1), (1, 4, 64, 1), (1, 6, 256, 1), (4, 1, 128, 2), (1, 2, 64, 1)]);
        assert_eq!(shapes(false), [(1, 8, 256, 1), (1, 4, 64, 1), (1, 8, 256, 1), (4, 2, 256, 2), (1, 2, 64, 1)]);
    }

    #[test]
    fn shared_memory_fits_every_device() {
        for heads in [1, 2, 7, 16, 24, 32, 64, 128, 1000] {
            for dims in [[5, 3], [64, 64], [96, 96], [128, 128], [192, 128], [256, 256], [512, 512]] {
                for (size, scored) in [(2, true), (4, true), (2, false), (4, false)] {
                    if (dims[0], size) == (512, 4) {
                        continue;
                    }
                    let tiles = tiles(heads, 1, dims, size, scored);
                    assert!(tiles.fits(SHARED_BYTES), "{heads} {dims:?} {size}: {tiles:?}");
                    assert!(tiles.chunk.is_multiple_of(KEYS), "{tiles:?}");
                }
            }
        }
    }

    #[test]
    fn a_block_alone_has_a_chunk_under_way_where_the_device_allows() {
        let stages = |tiles: StepTiles, kilobytes: usize| tiles.alone(kilobytes << 10).stages;
        let common = tiles(64, 4, [128, 128], 2, true);
        assert_eq!([99, 163, 227].map(|kilobytes| stages(common, kilobytes)), [1, 2, 2]);
        assert_eq!([99, 163, 227].map(|kilobytes| stages(tiles(64, 4, [192, 128], 2, true), kilobytes)), [1, 2, 3]);
    }
}
