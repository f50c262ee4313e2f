//! The inverse of the lists of selected blocks: which queries have selected each block of keys.

use crate::Result;
use crate::cuda::ahead::Build;
use crate::cuda::attention::unsupported;
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

    /// Checks that places in lists are i32, as kernels have them.
    ///
    /// # Errors
    /// If there are more.
    fn check(&self, call: &Call<'_>) -> Result<()> {
        if i32::try_from(self.entries).is_ok() {
            return Ok(());
        }
        let what = format!("{} selected blocks in a call", self.entries);
        Err(unsupported(call.cuda(), call.op(), &what, "call it with fewer tokens"))
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
        sizes.check(call)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Backend;
    use crate::cuda::Cuda;
    use crate::cuda::attention::{Sequences, copies_of, packed_sequences};
    use nsa_core::{CompressKind, CuSeqlens, Packing};
    use nsa_tests::sim::on_an_a100;

    const BLOCK: usize = 16;
    const COUNT: usize = 4;
    const HEADS: usize = 2;

    /// Lists `[N, HEADS, COUNT]`: the first block, and others of which early ones are had often; empty where a query is a
    /// multiple of 7.
    fn lists(packing: &Packing) -> Vec<i32> {
        let list = |t: usize, head: usize| {
            let candidates = t / BLOCK + 1;
            let others = (1..COUNT).map(|i| (t * (5 + head) + 31 * i) % candidates * ((t + i) % 5) / 5);
            let mut list: Vec<i32> = others.chain([0]).map(|block| block as i32).collect();
            list.sort();
            list.dedup();
            list.truncate(if t.is_multiple_of(7) { 0 } else { COUNT });
            list.resize(COUNT, -1);
            list
        };
        let of_token = |t: usize| (0..HEADS).flat_map(move |head| list(t, head));
        packing.seqs().flat_map(|seq| seq.context..seq.end()).flat_map(of_token).collect()
    }

    /// The index of all queries is each block's queries in order, and cut into its works, of which CTAs begin the longest first.
    fn check(cuda: &Cuda, lengths: &[usize], works: Works) {
        let builder = NsaConfig::builder(HEADS, HEADS, 32, 32).compress_kind(CompressKind::Mean).compress_block(8);
        let builder = builder.compress_stride(4).select_block(BLOCK).select_count(COUNT).window(32);
        let config = builder.build().expect("valid");
        let packing = Packing::new(CuSeqlens::from_lengths(lengths.iter().copied()).expect("short"));
        let constants = |constants: Constants| copies_of(constants.config(&config), &config, 4, [&[0], &[0]], 0);
        let call = Call::new::<f32>(cuda, "slc::index").expect("a type").constants(constants);
        let lies = packed_sequences(packing.cu_seqlens());
        let sequences = Sequences::new(&call, &packing, &lies, |keys, _| keys.div_ceil(BLOCK)).expect("a table");
        let (tokens, blocks) = (packing.num_tokens(), sequences.tiles);
        let block_indices = lists(&packing);
        let uploaded = call.upload(&block_indices).expect("lists");
        let of = Lists {
            block_indices: uploaded.read_by(),
            sequences: sequences.table(),
            num_sequences: packing.num_seqs() as i32,
        };
        let extent = Extent { first_token: 0, tokens, first_block: 0, blocks };
        let index = Index::build(&call, &config, of, extent, works).expect("runs");
        let read = |held: &Scratch<i32>, len: usize| {
            let mut numbers = vec![0; len];
            held.read("slc::index", &mut numbers).expect("there");
            numbers.into_iter().map(|number| number as usize).collect::<Vec<_>>()
        };
        let [_, totals, starts, held, of_works, work_starts] = &index._held.0[..] else { panic!("as built") };

        let mut selected = vec![Vec::new(); HEADS * blocks];
        let mut first_block = 0;
        for seq in packing.seqs() {
            for token in seq.rows.clone() {
                for (at, &block) in block_indices[token * HEADS * COUNT..][..HEADS * COUNT].iter().enumerate() {
                    if block >= 0 {
                        let entry = if works.places { token * COUNT + at % COUNT } else { token };
                        selected[at / COUNT * blocks + first_block + block as usize].push(entry);
                    }
                }
            }
            first_block += seq.end().div_ceil(BLOCK);
        }
        let all: Vec<_> = selected.iter().flatten().copied().collect();
        let lens: Vec<_> = selected.iter().map(Vec::len).collect();
        let before = |counts: &[usize]| -> Vec<usize> { (0..counts.len()).map(|i| counts[..i].iter().sum()).collect() };
        assert_eq!(read(totals, lens.len()), lens);
        assert_eq!(read(starts, lens.len()), before(&lens));
        assert_eq!(read(held, all.len()), all);
        let cut = |&len: &usize| len.div_ceil(works.queries).max(usize::from(works.all_blocks));
        let mut counts: Vec<_> = lens.iter().map(cut).collect();
        counts.push(0);
        let begun = before(&counts);
        assert_eq!(read(work_starts, begun.len()), begun);

        let count = *begun.last().expect("a block");
        assert!(count <= index.works, "{count} works, at most {}", index.works);
        let order: Vec<_> = read(of_works, 2 * count).chunks_exact(2).map(|work| (work[0], work[1])).collect();
        let mut sorted = order.clone();
        sorted.sort();
        let expected = (0..lens.len()).flat_map(|block| (0..counts[block]).map(move |work| (block, work)));
        assert_eq!(sorted, expected.collect::<Vec<_>>());
        let queries = |&(block, work): &(usize, usize)| (lens[block] - work * works.queries).min(works.queries);
        let whole = order.iter().take_while(|work| queries(work) == works.queries).count();
        assert!(order[..whole].is_sorted(), "whole works block by block");
        let last = order[whole..].iter().map(queries).collect::<Vec<_>>();
        assert!(last.iter().all(|&queries| queries < works.queries), "whole works first");
        // As lengths are told apart.
        let longest_first = last.windows(2).all(|pair| pair[1] <= pair[0] + works.queries.div_ceil(31));
        assert!(longest_first, "{last:?}");
        if works.queries == 24 {
            assert!(whole > 8 && last.len() > 8 && last.iter().any(|&queries| queries > 12), "{whole}, {last:?}");
        }
    }

    #[test]
    fn the_longest_works_begin_first() {
        on_an_a100("cuda::slc::index::tests::the_longest_works_begin_first", || {
            let Backend::Cuda(cuda) = Backend::cuda(0).expect("the simulator") else { panic!("a CUDA device") };
            for queries in [24, 100, 4096] {
                for all_blocks in [false, true] {
                    let works = Works { queries, all_blocks, places: !all_blocks };
                    check(&cuda, &[290, 0, 15, 600], works);
                }
            }
            let config = NsaConfig::builder(16, 16, 16, 16).compress_kind(CompressKind::Mean).build().expect("valid");
            let extent = |tokens| Extent { first_token: 0, tokens, first_block: 0, blocks: 1 };
            let sizes = |tokens| {
                IndexSizes::new(&config, extent(tokens), Works { queries: 1, all_blocks: true, places: false })
            };
            let call = Call::new::<f32>(&cuda, "slc::index").expect("a type");
            let error = sizes(1 << 23).check(&call).expect_err("2^31 places").to_string();
            assert!(error.contains("slc::index") && error.contains("2147483648 selected blocks in a call"), "{error}");
            sizes((1 << 23) - 1).check(&call).expect("as many as an i32 counts");
            // More blocks than one block of threads has threads.
            check(&cuda, &[5000, 5000], Works { queries: 300, all_blocks: true, places: false });
        });
    }
}
