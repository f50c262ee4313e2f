//! The forward turned round: blocks of keys gather the queries that have selected them.

use super::index::{self, Index, Lists, SlcIndex, Works};
use crate::Result;
use crate::cuda::ahead::{Build, Launched};
use crate::cuda::attention::{BandForward, Prepared};
use crate::cuda::geometry::{Geometry, TurnedTiles, extents};
use crate::cuda::params::{In, Out, Params, params};
use crate::cuda::program::{Constants, Program};
use nsa_core::{NsaConfig, Packing};

/// The kernels.
static PROGRAM: Program = Program {
    file: "slc_turned.cu",
    text: include_str!("../kernels/slc_turned.cu"),
    params: &[BandForward::declaration, SlcIndex::declaration, SlcTurned::declaration],
};

/// Threads of a block of `slc_merge`.
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
}

/// What the index of a run is for.
fn works(tiles: &TurnedTiles) -> Works {
    Works { queries: tiles.queries, all_blocks: false, places: true }
}

/// Launches the forward in runs of as many queries as have shares of `share_bytes`.
pub(super) fn forward(
    prepared: &Prepared<'_>,
    (config, packing): (&NsaConfig, &Packing),
    block_indices: In<i32>,
    tiles: TurnedTiles,
    share_bytes: usize,
) -> Result<()> {
    let run_tokens = TurnedTiles::run_tokens(config, share_bytes).min(packing.num_tokens());
    let call = prepared.call.again(|constants| tiles.bake(constants, config));
    let shares_of_run = run_tokens * config.num_heads() * config.select_count();
    let mut shares = call.workspace::<f32>(shares_of_run * TurnedTiles::share_floats(config))?;
    let mut statistics = call.workspace::<f32>(shares_of_run * 2)?;
    let common = prepared.params;
    let lists = Lists { block_indices, sequences: common.sequences, num_sequences: common.num_sequences };
    for extent in extents(packing, config.select_block(), run_tokens) {
        let index = Index::build(&prepared.call, config, lists, extent, works(&tiles))?;
        let (shares, statistics) = (shares.written_by(), statistics.written_by());
        let params = SlcTurned { common, index: index.params, shares, statistics };
        call.launch(&PROGRAM, "slc_turned", tiles.geometry(index.works), params)?;
        let threads = extent.tokens * config.num_heads() * TurnedTiles::merge_lanes(config);
        call.launch(&PROGRAM, "slc_merge", Geometry::linear(threads as u64, MERGE_THREADS), params)?;
    }
    Ok(())
}

impl TurnedTiles {
    /// With the sizes of tiles.
    fn bake(&self, constants: Constants, config: &NsaConfig) -> Constants {
        let constants = constants.with("WARPS", self.warps).with("KEYS", self.keys);
        constants.with("QUERIES_HELD", usize::from(self.held)).with("LANES", Self::merge_lanes(config))
    }
}

/// What the forward runs, with the config's constants.
pub(super) fn builds(config: &NsaConfig, size: usize, constants: &Constants) -> Vec<Build> {
    let Some(tiles) = TurnedTiles::new(config, size) else { return Vec::new() };
    let Geometry { threads, shared_bytes, .. } = tiles.geometry(1);
    let kernels = vec![
        Launched { name: "slc_turned", threads, shared_bytes },
        Launched { name: "slc_merge", threads: MERGE_THREADS, shared_bytes: 0 },
    ];
    let turned = Build { program: &PROGRAM, constants: tiles.bake(constants.clone(), config), kernels };
    vec![index::build(constants, works(&tiles)), turned]
}
