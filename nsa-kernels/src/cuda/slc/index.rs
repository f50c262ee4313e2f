//! The inverse of the lists of selected blocks: which queries have selected each block of keys.

use crate::Result;
use crate::cuda::ahead::Build;
use crate::cuda::geometry::{Extent, Geometry};
use crate::cuda::launch::Call;
use crate::cuda::params::{Field, In, Out, Params, params};
use crate::cuda::program::{Constants, Program};
use crate::cuda::workspace::{Places, Scratch};
use nsa_core::NsaConfig;

/// The kernels.
pub(super) static PROGRAM: Program =
    Program { file: "slc_index.cu", text: include_str!("../kernels/slc_index.cu"), params: &[SlcIndex::declaration] };

/// The most parts that queries are cut into, and what the queries of a part are a multiple of: a mask has a bit for each of so
/// many.
const PARTS: (usize, usize) = (512, 32);

/// Threads of the blocks that count and scatter, and of those that sum over parts and blocks.
const THREADS: u32 = 256;
const SUM_THREADS: u32 = 1024;

params! {
    /// Arguments of the kernels that make the index; those that read it have them too.
    struct SlcIndex {
        /// `[N, G, n]`.
        block_indices: In<i32>,
        /// With blocks of keys as tiles.
        sequences: In<i32>,
        /// `[parts, G, blocks]`, zeros before.
        counts: Out<i32>,
        /// `[parts, G, blocks]`: which of 32 queries have selected a block.
        masks: Out<u32>,
        /// `[G, blocks]`: queries of each block.
        totals: Out<i32>,
        /// `[G, blocks]`: where they start in `lists`.
        starts: Out<i32>,
        /// `[tokens·G·n]`: queries of blocks.
        lists: Out<i32>,
        /// Of each work its block's place in `[G, blocks]`, and which of the block's works it is; the longest first.
        works: Out<i32>,
        /// `[G·blocks + 1]`: works of the blocks before each.
        work_starts: Out<i32>,
        num_sequences: i32,
        /// The index's queries, rows in `[N]`.
        first_token: i32,
        tokens: i32,
        /// Blocks that they may have selected, of all sequences', a KV head.
        first_block: i32,
        blocks: i32,
        parts: i32,
        /// Queries of a part.
        part_tokens: i32,
        /// Queries of a work.
        work_queries: i32,
        /// Works of a block that no query has selected: one or none.
        least_works: i32,
    }
}

impl Field for SlcIndex {
    fn cpp() -> String {
        "SlcIndexParams".to_owned()
    }
}

/// What is inverted: lists `[N, G, n]`, of sequences whose table has blocks of keys as tiles.
#[derive(Clone, Copy)]
pub(super) struct Lists {
    pub(super) block_indices: In<i32>,
    pub(super) sequences: In<i32>,
    pub(super) num_sequences: i32,
}

/// What the queries of a block are for.
#[derive(Clone, Copy)]
pub(super) struct Works {
    /// Queries of a work.
    pub(super) queries: usize,
    /// Whether blocks without queries are works.
    pub(super) all_blocks: bool,
    /// Whether the index names places in lists beside queries.
    pub(super) places: bool,
}

impl Works {
    /// Works at most, of `entries` entries of `blocks` blocks.
    fn most(self, entries: usize, blocks: usize) -> usize {
        // A block's works are whole but for its last.
        let last = if self.all_blocks { blocks } else { blocks.min(entries) };
        last + entries / self.queries
    }
}

/// How large an index is.
pub(super) struct IndexSizes {
    /// Queries of a part.
    part_tokens: usize,
    parts: usize,
    /// G·blocks.
    blocks: usize,
    /// tokens·G·n.
    entries: usize,
    /// Works at most.
    works: usize,
}

impl IndexSizes {
    /// Of the queries of `extent`.
    pub(super) fn new(config: &NsaConfig, extent: Extent, works: Works) -> Self {
        let heads = config.num_kv_heads();
        let (blocks, entries) = (heads * extent.blocks, extent.tokens * heads * config.select_count());
        let part_tokens = extent.tokens.div_ceil(PARTS.0).max(1).next_multiple_of(PARTS.1);
        let parts = extent.tokens.div_ceil(part_tokens);
        Self { part_tokens, parts, blocks, entries, works: works.most(entries, blocks) }
    }

    /// Numbers of counts, masks, totals, starts, lists, works and where these start.
    fn lens(&self) -> [usize; 7] {
        let Self { parts, blocks, entries, works, .. } = *self;
        [parts * blocks, parts * blocks, blocks, blocks, entries, 2 * works, blocks + 1]
    }

    /// Takes them of a workspace.
    pub(super) fn take(&self, places: &mut Places) -> [usize; 7] {
        self.lens().map(|len| places.take_of::<i32>(len))
    }
}

/// The index of some queries, once its kernels are launched.
pub(super) struct Index {
    pub(super) params: SlcIndex,
    /// Works at most.
    pub(super) works: usize,
    /// Kept until the kernels that read the index are launched.
    _held: (Vec<Scratch<i32>>, Scratch<u32>),
}

impl Index {
    /// Launches what makes the index of `extent`, by a call with the config's constants.
    pub(super) fn build(
        call: &Call<'_>,
        config: &NsaConfig,
        lists: Lists,
        extent: Extent,
        works: Works,
    ) -> Result<Self> {
        let Extent { first_token, tokens, first_block, blocks } = extent;
        let sizes = IndexSizes::new(config, extent, works);
        let IndexSizes { part_tokens, parts, blocks: all, entries, works: most } = sizes;
        let lens = sizes.lens();
        let mut counts = call.zeros::<i32>(lens[0])?;
        let mut masks = call.workspace::<u32>(lens[1])?;
        let (mut totals, mut starts) = (call.workspace::<i32>(lens[2])?, call.workspace::<i32>(lens[3])?);
        let mut held = call.workspace::<i32>(lens[4])?;
        let (mut of_works, mut work_starts) = (call.workspace::<i32>(lens[5])?, call.workspace::<i32>(lens[6])?);
        let params = SlcIndex {
            block_indices: lists.block_indices,
            sequences: lists.sequences,
            counts: counts.written_by(),
            masks: masks.written_by(),
            totals: totals.written_by(),
            starts: starts.written_by(),
            lists: held.written_by(),
            works: of_works.written_by(),
            work_starts: work_starts.written_by(),
            num_sequences: lists.num_sequences,
            first_token: first_token as i32,
            tokens: tokens as i32,
            first_block: first_block as i32,
            blocks: blocks as i32,
            parts: parts as i32,
            part_tokens: part_tokens as i32,
            work_queries: works.queries as i32,
            least_works: i32::from(works.all_blocks),
        };
        let call = call.again(|constants| bake(constants, works.places));
        let launch = |kernel, grid: [usize; 2], threads| {
            let geometry = Geometry { grid: [grid[0] as u64, grid[1] as u64, 1], threads, shared_bytes: 0 };
            call.launch(&PROGRAM, kernel, geometry, params)
        };
        launch("slc_count", [entries.div_ceil(THREADS as usize), 1], THREADS)?;
        launch("slc_sum_parts", [all.div_ceil(32), 1], SUM_THREADS)?;
        launch("slc_sum_blocks", [1, 1], SUM_THREADS)?;
        launch("slc_scatter", [parts, config.num_kv_heads()], THREADS)?;
        let _held = (vec![counts, totals, starts, held, of_works, work_starts], masks);
        Ok(Self { params, works: most, _held })
    }
}

/// With what the index names: places in lists beside queries, or queries alone.
fn bake(constants: Constants, places: bool) -> Constants {
    constants.with("PLACES", usize::from(places))
}

/// What makes an index that names places in lists, or not, with the config's constants.
pub(super) fn build(constants: Constants, places: bool) -> Build {
    let kernels = [
        ("slc_count", THREADS),
        ("slc_sum_parts", SUM_THREADS),
        ("slc_sum_blocks", SUM_THREADS),
        ("slc_scatter", THREADS),
    ];
    Build::new(&PROGRAM, bake(constants, places), &kernels)
}
