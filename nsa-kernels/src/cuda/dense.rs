//! Full causal attention.

pub(crate) mod step;

use super::Cuda;
use super::attention::{self, BandForward};
use super::geometry::BandTiles;
use super::geometry::step::StepTiles;
use super::gradients::{self, Span};
use super::params::Params;
use super::program::Program;
use super::workspace::{Needs, Places};
use crate::op::Gating;
use crate::op::dense::{Backward, Forward};
use crate::{Element, Result};

/// The kernel of all sequences but those of one query.
pub(crate) static FORWARD: Program =
    Program { file: "dense_fwd.cu", text: include_str!("kernels/dense_fwd.cu"), params: &[BandForward::declaration] };

/// A sequence's only query, be it a decoding step or not, has its keys cut into chunks for blocks of threads of their own.
/// What other sequences have does not matter.
pub(crate) fn forward<T: Element>(cuda: &Cuda, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "dense::forward";
    let Forward { config, packing, q, k, v, o, lse } = args;
    let tiles_of_step = StepTiles::new(config, size_of::<T>(), false);
    let lone = |queries: usize| step::is_step(&tiles_of_step, queries, cuda.device());
    let chunks_of = |keys: usize, queries: usize| if lone(queries) { tiles_of_step.splits(keys) } else { 0 };
    let args = attention::Forward { config, packing, q, k: ("k", k), v: ("v", v), o, lse };
    if packing.seqs().all(|seq| seq.rows.is_empty() || lone(seq.rows.len())) {
        return step::launch::<T>(cuda, config, tiles_of_step, attention::prepare_with(cuda, OP, args, chunks_of)?);
    }
    let tiles = BandTiles::new(config, size_of::<T>(), cuda.unit()).checked(cuda, OP, config)?;
    let tiles_of = |_, queries: usize| if lone(queries) { 0 } else { queries.div_ceil(tiles.queries) };
    let prepared = attention::prepare_with(cuda, OP, args, tiles_of)?;
    prepared.launch_band(&FORWARD, "dense_forward", config, &tiles)?;
    if packing.seqs().any(|seq| lone(seq.rows.len())) {
        step::launch::<T>(cuda, config, tiles_of_step, prepared.tiled_again(packing, chunks_of)?)?;
    }
    Ok(())
}

/// What [`forward`] takes of a workspace.
pub(super) fn forward_places(needs: &Needs<'_>) -> Places {
    let Needs { device, config, packing, .. } = needs;
    let (tiles, mut places) = (StepTiles::new(config, needs.size(), false), Places::default());
    let lone = |queries: usize| step::is_step(&tiles, queries, device);
    let all = packing.seqs().all(|seq| seq.rows.is_empty() || lone(seq.rows.len()));
    if all || packing.seqs().any(|seq| lone(seq.rows.len())) {
        let chunks = packing.seqs().filter(|seq| lone(seq.rows.len())).map(|seq| tiles.splits(seq.end())).sum();
        for len in step::lens(config, &tiles, chunks) {
            places.take_of::<f32>(len);
        }
    }
    places
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
