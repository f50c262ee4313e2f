//! Attention over selected blocks.

use super::Cuda;
use super::attention::{self, BandForward};
use super::geometry::SelectTiles;
use super::params::{In, Params, params};
use super::program::Program;
use crate::op::slc::Forward;
use crate::{Element, Result};

/// The kernels.
pub(crate) static PROGRAM: Program = Program {
    file: "slc_fwd.cu",
    text: include_str!("kernels/slc_fwd.cu"),
    params: &[BandForward::declaration, SlcForward::declaration],
};

params! {
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
    let tiles = SelectTiles::new(config, size_of::<T>());
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
