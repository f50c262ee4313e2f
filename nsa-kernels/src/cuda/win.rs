//! Sliding-window attention, and with it the gated sum of the branches.

use super::Cuda;
use super::attention::{self, BandForward};
use super::geometry::{BandTiles, vector};
use super::gradients::{self, Span};
use super::params::{In, Out, Params, Stored, params};
use super::program::Program;
use crate::op::Gating;
use crate::op::win::{Backward, Forward};
use crate::{Element, Result, Tensor, TensorMut};

/// The kernel of the branch alone.
pub(crate) static FORWARD: Program =
    Program { file: "win_fwd.cu", text: include_str!("kernels/win_fwd.cu"), params: &[BandForward::declaration] };

/// The kernel of the branch, the last one, and the sum.
pub(crate) static GATED: Program = Program {
    file: "win_gate_fwd.cu",
    text: include_str!("kernels/win_gate_fwd.cu"),
    params: &[BandForward::declaration, WinGateForward::declaration],
};

const OP: &str = "win::forward";

params! {
    /// Arguments of `win_gate_forward`.
    struct WinGateForward {
        /// What every forward has.
        common: BandForward,
        /// `[N, Hq, 3]`.
        gates: In<Stored>,
        /// `[N, Hq, Dv]`.
        cmp: In<Stored>,
        /// `[N, Hq, Dv]`.
        slc: In<Stored>,
        /// `[N, Hq, Dv]`.
        sum: Out<Stored>,
    }
}

pub(crate) fn forward<T: Element>(cuda: &Cuda, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k, v, o, lse } = args;
    let args = attention::Forward { config, packing, q, k: ("k", k), v: ("v", v), o, lse };
    let tiles = BandTiles::new(config, size_of::<T>(), cuda.unit()).checked(cuda, OP, config)?;
    attention::prepare(cuda, OP, args, tiles.queries)?.launch_band(&FORWARD, "win_forward", config, &tiles)
}

/// [`forward`], and with it the gated sum of the other branches' outputs `[cmp, slc]` and its own, which a kernel of its own would
/// have to read once more.
pub(crate) fn forward_gated<T: Element>(
    cuda: &Cuda,
    args: Forward<'_, T>,
    gates: Tensor<'_, T, 3>,
    [cmp, slc]: [Tensor<'_, T, 3>; 2],
    mut sum: TensorMut<'_, T, 3>,
) -> Result<()> {
    let Forward { config, packing, q, k, v, o, lse } = args;
    let args = attention::Forward { config, packing, q, k: ("k", k), v: ("v", v), o, lse };
    let tiles = BandTiles::new(config, size_of::<T>(), cuda.unit()).checked(cuda, OP, config)?;
    let prepared = attention::prepare(cuda, OP, args, tiles.queries)?;
    let call = &prepared.call;
    let params = WinGateForward {
        common: prepared.params_of(config, tiles.unit.key_boxes(tiles.keys))?,
        gates: call.input("gates", &gates)?,
        cmp: call.input("branches[0]", &cmp)?,
        slc: call.input("branches[1]", &slc)?,
        sum: call.output("o", &mut sum)?,
    };
    let width = vector(config.head_dim_v(), size_of::<T>(), &[params.cmp.0, params.slc.0, params.sum.0]);
    let geometry = tiles.geometry(prepared.sequences.tiles, config.num_kv_heads());
    let call = call.again(|constants| tiles.bake(constants).with("VECTOR", width));
    call.launch(&GATED, "win_gate_forward", geometry, params)
}

pub(crate) fn backward<T: Element>(cuda: &Cuda, args: Backward<'_, T>) -> Result<()> {
    let Backward { config, packing, q, k, v, o, lse, d_o, gates, d_gates, dq, accumulate, dk, dv } = args;
    let args = gradients::Backward {
        config,
        packing,
        q,
        k: ("k", k),
        v: ("v", v),
        o,
        lse,
        d_o,
        gating: Gating { gates, d_gates, column: 2 },
        dq,
        accumulate,
        dk: ("dk", dk),
        dv: ("dv", dv),
    };
    gradients::backward(cuda, "win::backward", Span::Window, args, packing.cu_seqlens())
}
