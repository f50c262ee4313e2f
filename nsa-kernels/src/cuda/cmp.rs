//! Compressed attention, importance and selection.

use super::attention::{self, BandForward};
use super::geometry::{BandTiles, Geometry, KeptScores};
use super::gradients::{self, Span};
use super::params::{Out, Params, params};
use super::program::Program;
use super::workspace::{Needs, Places};
use super::{Cuda, Device};
use crate::op::Gating;
use crate::op::cmp::{Backward, Forward};
use crate::{Element, Result};
use nsa_core::{NsaConfig, Packing, index};

/// The kernel of the forward.
pub(crate) static FORWARD: Program = Program {
    file: "cmp_fwd.cu",
    text: include_str!("kernels/cmp_fwd.cu"),
    params: &[BandForward::declaration, CmpForward::declaration],
};

params! {
    /// Arguments of `cmp_forward`.
    struct CmpForward {
        /// What every forward has.
        common: BandForward,
        /// `[N, G, n]`, or null.
        block_indices: Out<i32>,
        /// `[slots, slot_floats]`, if scores are not kept in shared memory.
        scores: Out<f32>,
        slot_floats: i64,
        /// Whether scores are kept in shared memory.
        in_shared: i32,
    }
}

pub(crate) fn forward<T: Element>(cuda: &Cuda, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "cmp::forward";
    let Forward { config, packing, q, k_blocks, v_blocks, o, lse, mut block_indices } = args;
    let tiles = BandTiles::compressed(config, size_of::<T>(), cuda.unit()).checked(cuda, OP, config)?;
    let args = attention::Forward { config, packing, q, k: ("k_blocks", k_blocks), v: ("v_blocks", v_blocks), o, lse };
    let prepared = attention::prepare(cuda, OP, args, tiles.queries)?;
    let common = prepared.params_of(config, tiles.unit.key_boxes(tiles.keys))?;
    let call = prepared.call;
    let (kept, geometry) = keep(config, packing, tiles, cuda.device());
    let mut scores = call.workspace::<f32>(floats_in_memory(&kept, geometry))?;
    let params = CmpForward {
        common,
        block_indices: call.optional_output("block_indices", block_indices.as_mut())?,
        scores: scores.written_by(),
        slot_floats: kept.floats as i64,
        in_shared: i32::from(kept.slots == 0),
    };
    let call = call.constants(|constants| kept.bake(constants));
    call.launch(&FORWARD, "cmp_forward", geometry, params)
}

/// How scores are kept, and what is launched.
fn keep(config: &NsaConfig, packing: &Packing, tiles: BandTiles, device: &Device) -> (KeptScores, Geometry) {
    let most = packing.seqs().map(|seq| index::num_blocks(config, seq.end())).max().unwrap_or(0);
    let kept = KeptScores::new(config, tiles, most, (device.multiprocessors, device.shared_bytes));
    let of_queries = packing.seqs().map(|seq| seq.rows.len().div_ceil(tiles.queries)).sum();
    let mut geometry = tiles.geometry(of_queries, config.num_kv_heads());
    geometry.shared_bytes = kept.shared_bytes as u32;
    if kept.slots > 0 {
        geometry.grid[0] = geometry.grid[0].min(kept.slots as u64);
    }
    (kept, geometry)
}

/// Scores that are kept in the workspace.
fn floats_in_memory(kept: &KeptScores, geometry: Geometry) -> usize {
    if kept.slots > 0 { geometry.grid[0] as usize * kept.floats } else { 0 }
}

/// What [`forward`] takes of a workspace.
pub(super) fn forward_places(needs: &Needs<'_>) -> Places {
    let Needs { device, config, packing, .. } = needs;
    let (tiles, mut places) = (BandTiles::compressed(config, needs.size(), needs.unit()), Places::default());
    if tiles.queries > 0 {
        let (kept, geometry) = keep(config, packing, tiles, device);
        places.take_of::<f32>(floats_in_memory(&kept, geometry));
    }
    places
}

pub(crate) fn backward<T: Element>(cuda: &Cuda, args: Backward<'_, T>) -> Result<()> {
    let Backward {
        config,
        packing,
        q,
        k_blocks,
        v_blocks,
        o,
        lse,
        d_o,
        gates,
        d_gates,
        dq,
        accumulate,
        dk_blocks,
        dv_blocks,
    } = args;
    let args = gradients::Backward {
        config,
        packing,
        q,
        k: ("k_blocks", k_blocks),
        v: ("v_blocks", v_blocks),
        o,
        lse,
        d_o,
        gating: Gating { gates, d_gates, column: 0 },
        dq,
        accumulate,
        dk: ("dk_blocks", dk_blocks),
        dv: ("dv_blocks", dv_blocks),
    };
    gradients::backward(cuda, "cmp::backward", Span::Visible, args, &packing.cu_blocks(config)?)
}
