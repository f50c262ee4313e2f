//! Sliding-window attention.

use super::Cuda;
use super::attention;
use super::dense::win_forward;
use super::gradients;
use crate::op::win::{Backward, Forward};
use crate::{Element, Result};

pub(crate) fn forward<T: Element>(cuda: &Cuda, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k, v, o, lse } = args;
    let args = attention::Forward { config, packing, q, k: ("k", k), v: ("v", v), o, lse };
    win_forward(cuda, "win::forward", args)
}

pub(crate) fn backward<T: Element>(cuda: &Cuda, args: Backward<'_, T>) -> Result<()> {
    let Backward { config, packing, q, k, v, o, lse, d_o, gates, dq, dk, dv } = args;
    let args = gradients::Backward {
        config,
        packing,
        q,
        k: ("k", k),
        v: ("v", v),
        o,
        lse,
        d_o,
        gates: gates.map(|gates| (gates, 2)),
        dq,
        dk: ("dk", dk),
        dv: ("dv", dv),
    };
    let names = ["win_query_gradients", "win_key_gradients"];
    gradients::backward(cuda, "win::backward", names, args, packing.cu_seqlens())
}
