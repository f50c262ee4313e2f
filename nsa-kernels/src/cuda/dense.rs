//! Full causal attention.

use super::attention::{self, BandForward, Prepared};
use super::geometry::BandTiles;
use super::geometry::step::StepTiles;
use super::gradients::{self, Span};
use super::params::{Out, Params, params};
use super::program::Program;
use super::workspace::{Needs, Places};
use super::{Cuda, Device};
use crate::op::Gating;
use crate::op::dense::{Backward, Forward};
use crate::{Element, Result};
use nsa_core::NsaConfig;

/// The kernel of all sequences but those of one query.
pub(crate) static FORWARD: Program =
    Program { file: "dense_fwd.cu", text: include_str!("kernels/dense_fwd.cu"), params: &[BandForward::declaration] };

/// The kernel of sequences of one query.
pub(crate) static STEP: Program = Program {
    file: "dense_step.cu",
    text: include_str!("kernels/dense_step.cu"),
    params: &[BandForward::declaration, DenseStep::declaration],
};

params! {
    /// Arguments of `dense_step`.
    struct DenseStep {
        /// What every forward has; tiles are chunks of the keys of sequences of one query.
        common: BandForward,
        /// `[G, chunks, R, Dv]`.
        shares: Out<f32>,
        /// `[G, chunks, R, 2]`: m and l.
        statistics: Out<f32>,
        /// `[G, chunks, parts of the group]`: shares that have come to be joined; zeros before.
        arrived: Out<u32>,
    }
}

/// A sequence's only query, be it a decoding step or not, has its keys cut into chunks for blocks of threads of their own.
/// What other sequences have does not matter.
pub(crate) fn forward<T: Element>(cuda: &Cuda, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "dense::forward";
    let Forward { config, packing, q, k, v, o, lse } = args;
    let step = StepTiles::new(config, size_of::<T>(), false);
    let lone = |queries: usize| is_step(&step, queries, cuda.device());
    let chunks_of = |keys: usize, queries: usize| if lone(queries) { step.splits(keys) } else { 0 };
    let args = attention::Forward { config, packing, q, k: ("k", k), v: ("v", v), o, lse };
    if packing.seqs().all(|seq| seq.rows.is_empty() || lone(seq.rows.len())) {
        return launch_step::<T>(cuda, config, step, attention::prepare_with(cuda, OP, args, chunks_of)?);
    }
    let tiles = BandTiles::new(config, size_of::<T>(), cuda.unit()).checked(cuda, OP, config)?;
    let tiles_of = |_, queries: usize| if lone(queries) { 0 } else { queries.div_ceil(tiles.queries) };
    let prepared = attention::prepare_with(cuda, OP, args, tiles_of)?;
    prepared.launch_band(&FORWARD, "dense_forward", config, &tiles)?;
    if packing.seqs().any(|seq| lone(seq.rows.len())) {
        launch_step::<T>(cuda, config, step, prepared.tiled_again(packing, chunks_of)?)?;
    }
    Ok(())
}

/// Whether a sequence of so many queries is cut into chunks of its keys.
fn is_step(tiles: &StepTiles, queries: usize, device: &Device) -> bool {
    queries == 1 && tiles.fits(device.shared_bytes)
}

/// Numbers of shares, their statistics, and those that count what has come, of so many chunks.
fn step_lens(config: &NsaConfig, tiles: &StepTiles, chunks: usize) -> [usize; 3] {
    let heads = chunks * config.num_heads();
    [heads * config.head_dim_v(), heads * 2, chunks * config.num_kv_heads() * tiles.group_parts(config)]
}

/// What [`forward`] takes of a workspace.
pub(super) fn forward_places(needs: &Needs<'_>) -> Places {
    let Needs { device, config, packing, .. } = needs;
    let (tiles, mut places) = (StepTiles::new(config, needs.size(), false), Places::default());
    let lone = |queries: usize| is_step(&tiles, queries, device);
    let all = packing.seqs().all(|seq| seq.rows.is_empty() || lone(seq.rows.len()));
    if all || packing.seqs().any(|seq| lone(seq.rows.len())) {
        let chunks = packing.seqs().filter(|seq| lone(seq.rows.len())).map(|seq| tiles.splits(seq.end())).sum();
        for len in step_lens(config, &tiles, chunks) {
            places.take_of::<f32>(len);
        }
    }
    places
}

/// Launches `dense_step` over the chunks that are prepared.
fn launch_step<T: Element>(cuda: &Cuda, config: &NsaConfig, tiles: StepTiles, prepared: Prepared<'_>) -> Result<()> {
    let (chunks, size, device) = (prepared.sequences.tiles, size_of::<T>(), cuda.device());
    let blocks = tiles.geometry(config, chunks, 0).grid[0];
    let tiles = if blocks <= device.multiprocessors as u64 { tiles.alone(device.shared_bytes) } else { tiles };
    let (call, common) = (&prepared.call, prepared.params);
    let [of_shares, of_statistics, of_arrived] = step_lens(config, &tiles, chunks);
    let (mut shares, mut statistics) = (call.workspace::<f32>(of_shares)?, call.workspace::<f32>(of_statistics)?);
    let mut arrived = call.zeros::<u32>(of_arrived)?;
    let params = DenseStep {
        common,
        shares: shares.written_by(),
        statistics: statistics.written_by(),
        arrived: arrived.written_by(),
    };
    let call = call.again(|constants| tiles.bake(constants, config, size, [common.q.0, common.o.0]));
    call.launch(&STEP, "dense_step", tiles.geometry(config, chunks, tiles.attend_bytes()), params)
}

pub(crate) fn backward<T: Element>(cuda: &Cuda, args: Backward<'_, T>) -> Result<()> {
    let Backward { config, packing, q, k, v, o, lse, d_o, dq, accumulate, dk, dv } = args;
    let args = gradients::Backward {
        config,
        packing,
        q,
        k: ("k", k),
        v: ("v", v),
        o,
        lse,
        d_o,
        gating: Gating::NONE,
        dq,
        accumulate,
        dk: ("dk", dk),
        dv: ("dv", dv),
    };
    gradients::backward(cuda, "dense::backward", Span::Dense, args, packing.cu_seqlens())
}
