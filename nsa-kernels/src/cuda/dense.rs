//! Full causal attention.

use super::Cuda;
use super::attention::{self, BandForward};
use super::geometry::BandTiles;
use super::gradients;
use super::params::Params;
use super::program::Program;
use crate::op::dense::{Backward, Forward};
use crate::{Element, Result};

/// The kernels of `dense` and `win`.
pub(crate) static PROGRAM: Program =
    Program { file: "band_fwd.cu", text: include_str!("kernels/band_fwd.cu"), params: &[BandForward::declaration] };

pub(crate) fn forward<T: Element>(cuda: &Cuda, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k, v, o, lse } = args;
    let args = attention::Forward { config, packing, q, k: ("k", k), v: ("v", v), o, lse };
    band_forward(cuda, "dense::forward", "dense_forward", args)
}

/// Launches a kernel of the program.
pub(super) fn band_forward<T: Element>(
    cuda: &Cuda,
    op: &'static str,
    kernel: &'static str,
    args: attention::Forward<'_, T>,
) -> Result<()> {
    let config = args.config;
    let tiles = BandTiles::new(config, size_of::<T>(), cuda.unit()).checked(cuda, op, config)?;
    let prepared = attention::prepare(cuda, op, args, tiles.queries)?;
    let geometry = tiles.geometry(prepared.sequences.tiles, config.num_kv_heads());
    let call = prepared.call.constants(|constants| tiles.bake(constants));
    call.launch(&PROGRAM, kernel, geometry, prepared.params)
}

pub(crate) fn backward<T: Element>(cuda: &Cuda, args: Backward<'_, T>) -> Result<()> {
    let Backward { config, packing, q, k, v, o, lse, d_o, dq, dk, dv } = args;
    let args = gradients::Backward {
        config,
        packing,
        q,
        k: ("k", k),
        v: ("v", v),
        o,
        lse,
        d_o,
        gates: None,
        dq,
        dk: ("dk", dk),
        dv: ("dv", dv),
    };
    let names = ["dense_query_gradients", "dense_key_gradients"];
    gradients::backward(cuda, "dense::backward", names, args, packing.cu_seqlens())
}
