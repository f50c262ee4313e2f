//! Attention over selected blocks.

use super::Cuda;
use super::ahead::{Build, Launched};
use super::attention::{self, BandForward};
use super::geometry::{Geometry, GradientTiles, SelectTiles, Unit};
use super::gradients::{self, ADD_THREADS, BandBackward, FACTS_THREADS};
use super::params::{In, Out, Params, params};
use super::program::{Constants, Program};
use crate::op::slc::{Backward, Forward};
use crate::{Element, Result};
use nsa_core::{DType, NsaConfig};

/// The kernels.
pub(crate) static PROGRAM: Program = Program {
    file: "slc_fwd.cu",
    text: include_str!("kernels/slc_fwd.cu"),
    params: &[BandForward::declaration, SlcForward::declaration],
};

/// The kernels of the backward.
pub(crate) static BACKWARD: Program = Program {
    file: "slc_bwd.cu",
    text: include_str!("kernels/slc_bwd.cu"),
    params: &[BandBackward::declaration, SlcBackward::declaration],
};

/// Queries of a block of keys that one work of `slc_key_gradients` takes, at least; those of more are summed later.
const WORK_QUERIES: usize = 256;
/// Works beside the first of their blocks, at most about: what they leave takes memory.
const MORE_WORKS: usize = 1024;

/// The most parts that queries are cut into for the inverse index, and what the queries of a part are a multiple of: a mask
/// has a bit for each of so many.
const PARTS: (usize, usize) = (512, 32);

/// Threads of the blocks that make the inverse index, and of those that sum over parts and blocks.
const INDEX_THREADS: u32 = 256;
const SUM_THREADS: u32 = 1024;

params! {
    /// Arguments of the kernels of the backward.
    struct SlcBackward {
        /// What every backward has.
        common: BandBackward,
        /// `[N, G, n]`.
        block_indices: In<i32>,
        /// `[parts, G, blocks]`, zeros before.
        counts: Out<i32>,
        /// `[parts, G, blocks]`: which of 32 queries have selected a block.
        masks: Out<u32>,
        /// `[G, blocks]`: queries of each block.
        totals: Out<i32>,
        /// `[G, blocks]`: where they start in `lists`.
        starts: Out<i32>,
        /// `[N·G·n]`: queries.
        lists: Out<i32>,
        /// Of each work, its place in `[G, blocks]`.
        works: Out<i32>,
        /// `[G·blocks + 1]`: where each block's works start.
        work_starts: Out<i32>,
        /// Gradients of works after the first of their blocks.
        partial: Out<f32>,
        /// Of all sequences, a KV head.
        blocks: i32,
        parts: i32,
        /// Queries of a part.
        part_tokens: i32,
        /// Queries of a work.
        work_queries: i32,
        /// N.
        tokens: i32,
    }

    /// Arguments of `slc_forward`.
    struct SlcForward {
        /// What every forward has.
        common: BandForward,
        /// `[N, G, n]`.
        block_indices: In<i32>,
    }
}

pub(crate) fn forward<T: Element>(cuda: &Cuda, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "slc::forward";
    let Forward { config, packing, q, k, v, block_indices, o, lse } = args;
    let longest = packing.seqs().map(|seq| seq.end()).max().unwrap_or(0);
    let tiles = SelectTiles::new(config, size_of::<T>(), cuda.unit(), longest);
    let args = attention::Forward { config, packing, q, k: ("k", k), v: ("v", v), o, lse };
    let prepared = attention::prepare(cuda, OP, args, tiles.queries)?;
    let call = prepared.call;
    if !prepared.page_rows.is_multiple_of(config.select_block()) {
        let what = format!("pages of {} rows", prepared.page_rows);
        return Err(attention::unsupported(cuda, OP, &what, "use pages of a multiple of select_block"));
    }
    let params = SlcForward { common: prepared.params, block_indices: call.input("block_indices", &block_indices)? };
    let geometry = tiles.geometry(prepared.sequences.tiles, config.num_kv_heads());
    let call = call.constants(|constants| tiles.bake(constants));
    call.launch(&PROGRAM, "slc_forward", geometry, params)
}

pub(crate) fn backward<T: Element>(cuda: &Cuda, args: Backward<'_, T>) -> Result<()> {
    const OP: &str = "slc::backward";
    let Backward { config, packing, q, k, v, block_indices, o, lse, d_o, gates, dq, dk, dv } = args;
    let (tokens, heads, count) = (packing.num_tokens(), config.num_kv_heads(), config.select_count());
    let tiles = BackwardTiles::new(config, size_of::<T>(), cuda.unit());
    let args = gradients::Backward {
        config,
        packing,
        q,
        k: ("k", k),
        v: ("v", v),
        o,
        lse,
        d_o,
        gates: gates.map(|gates| (gates, 1)),
        dq,
        dk: ("dk", dk),
        dv: ("dv", dv),
    };
    let sizes = (tiles.select.queries, config.select_block());
    let prepared = gradients::prepare(cuda, OP, args, packing.cu_seqlens(), sizes)?;
    let call = prepared.call.clone().constants(|constants| tiles.bake(constants));
    let blocks = prepared.keys.tiles;
    let part_tokens = tokens.div_ceil(PARTS.0).max(1).next_multiple_of(PARTS.1);
    let parts = tokens.div_ceil(part_tokens);
    let entries = tokens * heads * count;
    // Works after the first of their blocks are whole but for the last.
    let work_queries = entries.div_ceil(MORE_WORKS).max(WORK_QUERIES);
    let more_works = entries / work_queries;
    let mut counts = call.zeros::<i32>(parts * heads * blocks)?;
    let mut masks = call.workspace::<u32>(parts * heads * blocks)?;
    let mut totals = call.workspace::<i32>(heads * blocks)?;
    // Zeros: a list that names a block twice leaves a place empty.
    let (mut starts, mut lists) = (call.workspace::<i32>(heads * blocks)?, call.zeros::<i32>(entries)?);
    let mut works = call.workspace::<i32>(heads * blocks + more_works)?;
    let mut work_starts = call.workspace::<i32>(heads * blocks + 1)?;
    let mut partial = call.workspace::<f32>(more_works * tiles.partial_floats(config))?;
    let params = SlcBackward {
        common: prepared.params,
        block_indices: call.input("block_indices", &block_indices)?,
        counts: counts.written_by(),
        masks: masks.written_by(),
        totals: totals.written_by(),
        starts: starts.written_by(),
        lists: lists.written_by(),
        works: works.written_by(),
        work_starts: work_starts.written_by(),
        partial: partial.written_by(),
        blocks: blocks as i32,
        parts: parts as i32,
        part_tokens: part_tokens as i32,
        work_queries: work_queries as i32,
        tokens: tokens as i32,
    };
    if blocks == 0 {
        return Ok(());
    }
    let linear = |count: usize| Geometry::linear(count as u64, INDEX_THREADS);
    let sum = |blocks: usize| Geometry { grid: [blocks as u64, 1, 1], threads: SUM_THREADS, shared_bytes: 0 };
    let scatter = Geometry { grid: [parts as u64, heads as u64, 1], threads: INDEX_THREADS, shared_bytes: 0 };
    let launch = |kernel, geometry| call.launch(&BACKWARD, kernel, geometry, params);
    launch("slc_row_facts", prepared.facts_geometry())?;
    launch("slc_query_gradients", tiles.of_queries(prepared.queries.tiles, heads))?;
    launch("slc_count", linear(entries))?;
    launch("slc_sum_parts", sum((heads * blocks).div_ceil(32)))?;
    launch("slc_sum_blocks", sum(1))?;
    launch("slc_scatter", scatter)?;
    launch("slc_key_gradients", tiles.of_keys(heads * blocks + more_works))?;
    if more_works == 0 {
        return Ok(());
    }
    let grid = [(heads * blocks) as u64, tiles.shares as u64, tiles.keys.adders(config)];
    launch("slc_add_works", Geometry { grid, threads: ADD_THREADS, shared_bytes: 0 })
}

/// Tiles of the kernels of the backward.
struct BackwardTiles {
    select: SelectTiles,
    keys: GradientTiles,
    /// CTAs that share the keys of a block.
    shares: usize,
}

impl BackwardTiles {
    fn new(config: &NsaConfig, size: usize, unit: Unit) -> Self {
        let mut keys = GradientTiles::new(config, size, unit);
        let of_queries = |warps| SelectTiles::gradients(config, size, warps);
        let unit = keys.unit;
        while keys.warps > unit.least_warps() && of_queries(keys.warps).shared_bytes > unit.shared_bytes() {
            keys.warps /= 2;
        }
        let select = of_queries(keys.warps);
        Self { shares: config.select_block().div_ceil(keys.rows()), select, keys }
    }

    fn bake(&self, constants: Constants) -> Constants {
        let constants = constants.with("WARPS", self.select.warps).with("ROWS", self.select.rows);
        let constants = constants.with("KEYS", self.select.keys).with("STAGES", self.select.stages);
        let constants = constants.with("QUERIES_HELD", usize::from(self.select.held));
        let constants = constants.with("QUERIES", self.select.queries).with("QUERY_ROWS", self.keys.query_rows);
        constants.with("WARPGROUPS", usize::from(self.keys.unit == Unit::Warpgroup))
    }

    /// Numbers of a work's gradients.
    fn partial_floats(&self, config: &NsaConfig) -> usize {
        self.shares * self.keys.partial_floats(config)
    }

    fn of_queries(&self, tiles: usize, heads: usize) -> Geometry {
        self.select.geometry(tiles, heads)
    }

    fn of_keys(&self, works: usize) -> Geometry {
        let mut geometry = self.keys.of_keys(works, 1, 1);
        geometry.grid = [works as u64, self.shares as u64, geometry.grid[1]];
        geometry
    }
}

/// What the backward runs.
pub(crate) fn builds(config: &NsaConfig, dtype: DType, unit: Unit) -> Vec<Build> {
    let size = dtype.size_bytes();
    let tiles = BackwardTiles::new(config, size, unit);
    let constants = attention::copies_of(Constants::new(dtype).config(config), config, size, [&[0], &[0]], 0);
    let kernels = [
        ("slc_row_facts", FACTS_THREADS, 0),
        ("slc_query_gradients", tiles.of_queries(1, 1).threads, tiles.of_queries(1, 1).shared_bytes),
        ("slc_count", INDEX_THREADS, 0),
        ("slc_sum_parts", SUM_THREADS, 0),
        ("slc_sum_blocks", SUM_THREADS, 0),
        ("slc_scatter", INDEX_THREADS, 0),
        ("slc_key_gradients", tiles.of_keys(1).threads, tiles.of_keys(1).shared_bytes),
        ("slc_add_works", ADD_THREADS, 0),
    ];
    let launched = |(name, threads, shared_bytes)| Launched { name, threads, shared_bytes };
    let kernels = kernels.map(launched).to_vec();
    vec![Build { program: &BACKWARD, constants: tiles.bake(constants), kernels }]
}
