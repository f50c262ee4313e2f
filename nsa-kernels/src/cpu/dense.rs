//! Full causal attention on the CPU: the band that reaches back to position 0. A sequence's only query, as in decoding,
//! attends in chunks of its keys (see `chunks`).

use crate::cpu::grad::Queries;
use crate::cpu::{Cpu, band};
use crate::op::Gating;
use crate::op::dense::{Backward, Forward};
use crate::{Element, Result};

/// See `op::dense::forward`.
pub(crate) fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k, v, o, lse } = args;
    let (visible, lone_in_chunks) = (|t| 0..t + 1, true);
    band::forward(cpu, band::Forward { config, packing, q, k, v, o, lse, visible, lone_in_chunks })
}

/// See `op::dense::backward`.
pub(crate) fn backward<T: Element>(cpu: &Cpu, args: Backward<'_, T>) -> Result<()> {
    let Backward { config, packing, q, k, v, o, lse, d_o, dq, accumulate, dk, dv } = args;
    let queries = Queries::new(cpu, (q, o, lse, d_o), Gating::NONE)?;
    let (offsets, visible) = (packing.cu_seqlens(), |t| 0..t + 1);
    band::backward(
        cpu,
        band::Backward { config, packing, queries, k, v, offsets, stride: 1, visible, dq, accumulate, dk, dv },
    )
}
