//! The way of small groups, turned round: blocks of keys gather the queries that have selected them.

use super::index::{self, Index, IndexSizes, Lists, SlcIndex, Works};
use crate::Result;
use crate::cuda::ahead::{Build, Launched};
use crate::cuda::attention::{self, BandForward};
use crate::cuda::geometry::{Geometry, TurnedTiles, Unit, extents};
use crate::cuda::gradients::{self, BandBackward};
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Params, params};
use crate::cuda::program::{Constants, Program};
use crate::cuda::workspace::Places;
use nsa_core::{NsaConfig, Packing};

/// The kernels.
static PROGRAM: Program = Program {
    file: "slc_turned.cu",
    text: include_str!("../kernels/slc_turned.cu"),
    params: &[BandForward::declaration, SlcIndex::declaration, SlcTurned::declaration],
};

/// The kernels of the backward.
static BACKWARD: Program = Program {
    file: "slc_turned_bwd.cu",
    text: include_str!("../kernels/slc_turned_bwd.cu"),
    params: &[BandBackward::declaration, SlcIndex::declaration, SlcTurnedBackward::declaration],
};

/// Threads of a block of `slc_merge` and of `slc_add_shares`.
const MERGE_THREADS: u32 = 256;

params! {
    /// Arguments of `slc_turned` and `slc_merge`.
    struct SlcTurned {
        /// What every forward has; tiles are blocks of keys.
        common: BandForward,
        /// Of the run's queries.
        index: SlcIndex,
        /// `[tokens, Hq, n, Dv in whole sixteens]`: o of each query head and place in its list.
        shares: Out<f32>,
        /// `[tokens, Hq, n, 2]`: m and l.
        statistics: Out<f32>,
    }

    /// Arguments of `slc_turned_gradients` and `slc_add_shares`.
    struct SlcTurnedBackward {
        /// What every backward has.
        common: BandBackward,
        /// Of the run's queries.
        index: SlcIndex,
        /// `[tokens, Hq, n, Dk in whole sixteens]`: dq of each query head and place in its list.
        shares: Out<f32>,
    }
}

/// A call that is turned round.
#[derive(Clone, Copy)]
pub(super) struct Turned<'a> {
    pub(super) config: &'a NsaConfig,
    pub(super) packing: &'a Packing,
    pub(super) tiles: TurnedTiles,
    pub(super) share_bytes: usize,
}

impl Turned<'_> {
    /// Launches the forward.
    pub(super) fn forward(self, prepared: &attention::Prepared<'_>, block_indices: In<i32>) -> Result<()> {
        let Self { config, tiles, .. } = self;
        let call = prepared.call.again(|constants| tiles.bake(constants).with("LANES", tiles.merge_lanes()));
        let [of_statistics, of_shares] = self.lens();
        let mut statistics = call.workspace::<f32>(of_statistics)?;
        let mut shares = call.workspace::<f32>(of_shares)?;
        let common = prepared.params;
        let lists = Lists { block_indices, sequences: common.sequences, num_sequences: common.num_sequences };
        self.each_run(&prepared.call, lists, |index| {
            let (shares, statistics) = (shares.written_by(), statistics.written_by());
            let params = SlcTurned { common, index: index.params, shares, statistics };
            call.launch(&PROGRAM, "slc_turned", tiles.geometry(index.works), params)?;
            let threads = index.params.tokens as usize * config.num_heads() * tiles.merge_lanes();
            call.launch(&PROGRAM, "slc_merge", Geometry::linear(threads as u64, MERGE_THREADS), params)
        })
    }

    /// Launches what adds the gradients of queries.
    pub(super) fn query_gradients(self, prepared: &gradients::Prepared<'_>, lists: Lists) -> Result<()> {
        let Self { config, tiles, .. } = self;
        let call = prepared.call.again(|constants| bake_gradients(tiles, constants));
        let [_, of_shares] = self.lens();
        let mut shares = call.workspace::<f32>(of_shares)?;
        self.each_run(&prepared.call, lists, |index| {
            let params =
                SlcTurnedBackward { common: prepared.params, index: index.params, shares: shares.written_by() };
            call.launch(&BACKWARD, "slc_turned_gradients", tiles.geometry(index.works), params)?;
            let threads = 32 * index.params.tokens as usize * config.num_heads();
            call.launch(&BACKWARD, "slc_add_shares", Geometry::linear(threads as u64, MERGE_THREADS), params)
        })
    }

    /// Queries of a run.
    fn run_tokens(self) -> usize {
        self.tiles.run_tokens(self.config, self.share_bytes).min(self.packing.num_tokens())
    }

    /// Numbers of the shares' statistics, if they have some, and of the shares of a run.
    fn lens(self) -> [usize; 2] {
        let shares = self.run_tokens() * self.config.num_heads() * self.config.select_count();
        [self.tiles.statistics, self.tiles.columns].map(|of_share| shares * of_share)
    }

    /// Takes of a workspace what it needs.
    pub(super) fn take(self, places: &mut Places) {
        let Self { config, packing, tiles, .. } = self;
        for len in self.lens().into_iter().skip(usize::from(tiles.statistics == 0)) {
            places.take_of::<f32>(len);
        }
        for extent in extents(packing, config.select_block(), self.run_tokens()) {
            for place in IndexSizes::new(config, extent, works(tiles)).take(places) {
                places.give_back(place);
            }
        }
    }

    /// Makes the index of each run, by a call with the config's constants, and launches what reads it.
    fn each_run(self, call: &Call<'_>, lists: Lists, mut launch: impl FnMut(&Index) -> Result<()>) -> Result<()> {
        let Self { config, packing, tiles, .. } = self;
        for extent in extents(packing, config.select_block(), self.run_tokens()) {
            launch(&Index::build(call, config, lists, extent, works(tiles))?)?;
        }
        Ok(())
    }
}

/// What the index of a run is for.
fn works(tiles: TurnedTiles) -> Works {
    Works { queries: tiles.queries, all_blocks: false, places: true }
}

/// With the sizes of tiles of gradients; shared headers have more than these kernels read.
fn bake_gradients(tiles: TurnedTiles, constants: Constants) -> Constants {
    gradients::bake_boxes(tiles.bake(constants), None).with("QUERY_ROWS", 16).unit(Unit::Warp)
}

impl TurnedTiles {
    /// With the sizes of tiles.
    fn bake(self, constants: Constants) -> Constants {
        let constants = constants.with("WARPS", self.warps).with("KEYS", self.keys);
        constants.with("QUERIES_HELD", usize::from(self.held))
    }
}

/// What is run, with the config's constants.
pub(super) fn builds(config: &NsaConfig, size: usize, constants: &Constants) -> Vec<Build> {
    let launched = |(tiles, name, second): (TurnedTiles, _, _)| {
        let Geometry { threads, shared_bytes, .. } = tiles.geometry(1);
        let second = Launched { name: second, threads: MERGE_THREADS, shared_bytes: 0 };
        vec![Launched { name, threads, shared_bytes }, second]
    };
    let constants = || constants.clone();
    let mut builds = Vec::new();
    if let Some(tiles) = TurnedTiles::forward(config, size) {
        builds.push(index::build(constants(), true));
        let constants = tiles.bake(constants()).with("LANES", tiles.merge_lanes());
        builds.push(Build { program: &PROGRAM, constants, kernels: launched((tiles, "slc_turned", "slc_merge")) });
    }
    if let Some(tiles) = TurnedTiles::gradients(config, size) {
        let kernels = launched((tiles, "slc_turned_gradients", "slc_add_shares"));
        builds.push(Build { program: &BACKWARD, constants: bake_gradients(tiles, constants()), kernels });
    }
    builds
}
