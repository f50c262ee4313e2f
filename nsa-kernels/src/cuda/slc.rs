//! Attention over selected blocks.

mod index;
mod turned;

use super::Cuda;
use super::ahead::{Build, Launched};
use super::attention::{self, BandForward};
use super::geometry::{Extent, Geometry, GradientTiles, SelectTiles, TurnedTiles, Unit};
use super::gradients::{self, ADD_THREADS, BandBackward, FACTS_THREADS};
use super::params::{In, Out, Params, params};
use super::program::{Constants, Program};
use super::workspace::{Needs, Places};
use crate::op::Gating;
use crate::op::slc::{Backward, Forward};
use crate::{Element, Result};
use index::{Index, IndexSizes, Lists, SlcIndex, Works};
use nsa_core::index::num_selected;
use nsa_core::{DType, NsaConfig, Packing};
use turned::Turned;

/// The kernel of the forward, but for small groups.
pub(crate) static FORWARD: Program = Program {
    file: "slc_fwd.cu",
    text: include_str!("kernels/slc_fwd.cu"),
    params: &[BandForward::declaration, SlcForward::declaration],
};

/// The kernels of the backward.
pub(crate) static BACKWARD: Program = Program {
    file: "slc_bwd.cu",
    text: include_str!("kernels/slc_bwd.cu"),
    params: &[BandBackward::declaration, SlcIndex::declaration, SlcBackward::declaration],
};

params! {
    /// Arguments of the kernels of the backward.
    struct SlcBackward {
        /// What every backward has.
        common: BandBackward,
        /// `[N, G, n]`.
        block_indices: In<i32>,
        /// Of all queries.
        index: SlcIndex,
        /// Gradients of works after the first of their blocks.
        partial: Out<f32>,
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
    let walking = SelectTiles::of_warps(config, size_of::<T>());
    let turned = turned((config, packing), TurnedTiles::forward(config, size_of::<T>()), &walking, cuda.share_bytes());
    let longest = packing.seqs().map(|seq| seq.end()).max().unwrap_or(0);
    let tiles = SelectTiles::new(config, size_of::<T>(), cuda.unit(), longest);
    if turned.is_none() {
        attention::check_tiles(cuda, OP, config, (tiles.queries, tiles.shared_bytes))?;
    }
    let args = attention::Forward { config, packing, q, k: ("k", k), v: ("v", v), o, lse };
    let prepared = match turned {
        Some(_) => attention::prepare_with(cuda, OP, args, |keys, _| keys.div_ceil(config.select_block()))?,
        None => attention::prepare(cuda, OP, args, tiles.queries)?,
    };
    if !prepared.page_rows.is_multiple_of(config.select_block()) {
        let what = format!("pages of {} rows", prepared.page_rows);
        return Err(attention::unsupported(cuda, OP, &what, "use pages of a multiple of select_block"));
    }
    let block_indices = prepared.call.input("block_indices", &block_indices)?;
    if let Some(turned) = turned {
        return turned.forward(&prepared, block_indices);
    }
    let boxes = tiles.unit.key_boxes(tiles.keys);
    let params = SlcForward { common: prepared.params_of(config, boxes)?, block_indices };
    let geometry = tiles.geometry(prepared.sequences.tiles, config.num_kv_heads());
    let call = prepared.call.constants(|constants| tiles.bake(constants));
    call.launch(&FORWARD, "slc_forward", geometry, params)
}

/// What [`forward`] takes of a workspace.
pub(super) fn forward_places(needs: &Needs<'_>) -> Places {
    let Needs { config, packing, share_bytes, .. } = *needs;
    let walking = SelectTiles::of_warps(config, needs.size());
    let turned = turned((config, packing), TurnedTiles::forward(config, needs.size()), &walking, share_bytes);
    let mut places = Places::default();
    if let Some(turned) = turned {
        turned.take(&mut places);
    }
    places
}

/// What [`backward`] takes of a workspace.
pub(super) fn backward_places(needs: &Needs<'_>) -> Places {
    let Needs { config, packing, share_bytes, .. } = *needs;
    let tiles = BackwardTiles::new(config, needs.size(), needs.unit());
    let mut places = gradients::places_of_facts(needs);
    let blocks = packing.seqs().map(|seq| seq.end().div_ceil(config.select_block())).sum();
    if blocks == 0 {
        return places;
    }
    let extent = Extent { first_token: 0, tokens: packing.num_tokens(), first_block: 0, blocks };
    let (works, more_works) = tiles.works(config, packing, needs.device.multiprocessors);
    IndexSizes::new(config, extent, works).take(&mut places);
    places.take_of::<f32>(more_works * tiles.partial_floats(config));
    let of_queries = TurnedTiles::gradients(config, needs.size());
    if let Some(turned) = turned((config, packing), of_queries, &tiles.select, share_bytes) {
        turned.take(&mut places);
    }
    places
}

/// How a call is turned round with such tiles, if that is faster than to walk with those.
fn turned<'a>(
    (config, packing): (&'a NsaConfig, &'a Packing),
    tiles: Option<TurnedTiles>,
    walking: &SelectTiles,
    share_bytes: usize,
) -> Option<Turned<'a>> {
    let tiles = tiles?.where_faster(config, packing, walking, share_bytes)?;
    Some(Turned { config, packing, tiles, share_bytes })
}

pub(crate) fn backward<T: Element>(cuda: &Cuda, args: Backward<'_, T>) -> Result<()> {
    const OP: &str = "slc::backward";
    let Backward { config, packing, q, k, v, block_indices, o, lse, d_o, gates, d_gates, dq, accumulate, dk, dv } =
        args;
    let (tokens, heads) = (packing.num_tokens(), config.num_kv_heads());
    let tiles = BackwardTiles::new(config, size_of::<T>(), cuda.unit());
    attention::check_tiles(cuda, OP, config, (tiles.select.queries, tiles.shared_bytes()))?;
    let args = gradients::Backward {
        config,
        packing,
        q,
        k: ("k", k),
        v: ("v", v),
        o,
        lse,
        d_o,
        gating: Gating { gates, d_gates, column: 1 },
        dq,
        accumulate,
        dk: ("dk", dk),
        dv: ("dv", dv),
    };
    let sizes = (tiles.select.queries, config.select_block());
    let boxes = [tiles.keys.boxes(config, false), None];
    let prepared = gradients::prepare(cuda, OP, args, packing.cu_seqlens(), sizes, boxes)?;
    let call = prepared.call.again(|constants| tiles.bake(gradients::bake_boxes(constants, boxes[0])));
    let blocks = prepared.keys.tiles;
    if blocks == 0 {
        return Ok(());
    }
    let (works, more_works) = tiles.works(config, packing, cuda.device().multiprocessors);
    let lists = Lists {
        block_indices: call.input("block_indices", &block_indices)?,
        sequences: prepared.keys.table(),
        num_sequences: packing.num_seqs() as i32,
    };
    let extent = Extent { first_token: 0, tokens, first_block: 0, blocks };
    let index = Index::build(&prepared.call, config, lists, extent, works)?;
    let mut partial = call.workspace::<f32>(more_works * tiles.partial_floats(config))?;
    let params = SlcBackward {
        common: prepared.params,
        block_indices: lists.block_indices,
        index: index.params,
        partial: partial.written_by(),
    };
    let launch = |kernel, geometry| call.launch(&BACKWARD, kernel, geometry, params);
    launch("slc_row_facts", prepared.facts_geometry())?;
    let of_queries = TurnedTiles::gradients(config, size_of::<T>());
    match turned((config, packing), of_queries, &tiles.select, cuda.share_bytes()) {
        Some(turned) => turned.query_gradients(&prepared, lists)?,
        None => launch("slc_query_gradients", tiles.of_queries(prepared.queries.tiles, heads))?,
    }
    launch("slc_key_gradients", tiles.of_keys(index.works))?;
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
        let constants = constants.with("JOINT_PERCENT", self.select.joint_percent);
        let constants = constants.with("QUERIES", self.select.queries).with("QUERY_ROWS", self.keys.query_rows);
        constants.unit(self.keys.unit)
    }

    /// What the queries of blocks of keys are cut into on a device with so many multiprocessors, and works beside the first of their
    /// blocks, at most. As each of those leaves gradients in memory, works are as long as if all ran at once in equal parts; whole ones
    /// begin first, and shorter ones fill what is left.
    fn works(&self, config: &NsaConfig, packing: &Packing, multiprocessors: usize) -> (Works, usize) {
        let entries = config.num_kv_heads() * packing.seqs().map(|seq| num_selected(config, seq.end())).sum::<usize>();
        let at_once = self.keys.blocks_at_once(multiprocessors).div_ceil(self.shares);
        let least = self.keys.least_part_rows().div_ceil(config.group_size());
        let queries = entries.div_ceil(at_once).max(least);
        (Works { queries, all_blocks: true, places: false }, entries / queries)
    }

    /// Numbers of a work's gradients.
    fn partial_floats(&self, config: &NsaConfig) -> usize {
        self.shares * self.keys.partial_floats(config)
    }

    /// Bytes of shared memory of a block of either kernel.
    fn shared_bytes(&self) -> usize {
        self.select.shared_bytes.max(self.keys.shared_bytes())
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

/// What the backward runs, and small groups.
pub(crate) fn builds(config: &NsaConfig, dtype: DType, unit: Unit) -> Vec<Build> {
    let size = dtype.size_bytes();
    let tiles = BackwardTiles::new(config, size, unit);
    let constants = attention::copies_of(Constants::new(dtype).config(config), config, size, [&[0], &[0]], 0);
    let kernels = [
        ("slc_row_facts", FACTS_THREADS, 0),
        ("slc_query_gradients", tiles.of_queries(1, 1).threads, tiles.of_queries(1, 1).shared_bytes),
        ("slc_key_gradients", tiles.of_keys(1).threads, tiles.of_keys(1).shared_bytes),
        ("slc_add_works", ADD_THREADS, 0),
    ];
    let boxed = gradients::bake_boxes(constants.clone(), tiles.keys.boxes(config, false));
    let launched = |(name, threads, shared_bytes)| Launched { name, threads, shared_bytes };
    let kernels = kernels.map(launched).to_vec();
    let backward = Build { program: &BACKWARD, constants: tiles.bake(boxed), kernels };
    let mut builds = vec![backward, index::build(constants.clone(), false)];
    builds.extend(turned::builds(config, size, &constants));
    builds
}

#[cfg(test)]
mod tests {
    use super::super::geometry::SHARED_BYTES;
    use super::*;
    use nsa_core::{CompressKind, CuSeqlens};

    #[test]
    fn the_smallest_devices_have_room_for_gradients_of_wide_rows() {
        for (dim, size) in [(512, 2), (256, 4)] {
            for heads in [1, 2, 5, 16] {
                let builder = NsaConfig::builder(heads, 1, dim, dim).compress_kind(CompressKind::Mean);
                let tiles = BackwardTiles::new(&builder.build().unwrap(), size, Unit::Warp);
                assert!(tiles.shared_bytes() <= SHARED_BYTES, "{heads} heads, {dim} dims: {}", tiles.shared_bytes());
            }
        }
    }

    #[test]
    fn works_are_as_long_as_if_all_ran_at_once() {
        let works = |heads: usize, dim: usize, block: usize, lengths: &[usize]| {
            let builder = NsaConfig::builder(heads, 1, dim, dim).compress_kind(CompressKind::Mean).select_block(block);
            let config = builder.build().unwrap();
            let packing = Packing::new(CuSeqlens::from_lengths(lengths.iter().copied()).unwrap());
            let (works, more) = BackwardTiles::new(&config, 2, Unit::Warp).works(&config, &packing, 108);
            (works.queries, more)
        };
        // Two blocks of threads a multiprocessor, 216 works at once: of 8,192 tokens 15 · 64 · 8 entries are missing.
        assert_eq!(works(16, 128, 64, &[8192]), ((8192 * 16 - 7680usize).div_ceil(216), 215));
        assert_eq!(works(16, 128, 64, &[4096, 4096]), ((8192 * 16 - 2 * 7680usize).div_ceil(216), 215));
        // Not shorter than sixteen steps of 32 rows.
        assert_eq!(works(16, 128, 64, &[500]), (32, 69));
        assert_eq!(works(1, 128, 64, &[500]).0, 512);
        // One block of threads with dk, one with dv; two with the keys of a block.
        assert_eq!(works(16, 256, 64, &[8192]).0, (8192 * 16 - 7680usize).div_ceil(108));
        assert_eq!(works(16, 128, 128, &[8192]).0, (8192 * 16 - 15 * 128 * 8usize).div_ceil(108));
    }
}
