//! Sliding-window attention on the CPU: the band of the last w positions.

use crate::cpu::grad::Queries;
use crate::cpu::{Cpu, band};
use crate::op::Gating;
use crate::op::win::{Backward, Forward};
use crate::{Element, Result};
use nsa_core::index;

/// The branch's column of the gates.
const GATE: usize = 2;

/// See `op::win::forward`.
pub(crate) fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k, v, o, lse } = args;
    let visible = |t| index::window_tokens(config, t);
    band::forward(cpu, band::Forward { config, packing, q, k, v, o, lse, visible, lone_in_chunks: false })
}

/// See `op::win::backward`.
pub(crate) fn backward<T: Element>(cpu: &Cpu, args: Backward<'_, T>) -> Result<()> {
    let Backward { config, packing, q, k, v, o, lse, d_o, gates, d_gates, dq, accumulate, dk, dv } = args;
    let queries = Queries::new(cpu, (q, o, lse, d_o), Gating { gates, d_gates, column: GATE })?;
    let (offsets, visible) = (packing.cu_seqlens(), |t| index::window_tokens(config, t));
    band::backward(
        cpu,
        band::Backward { config, packing, queries, k, v, offsets, stride: 1, visible, dq, accumulate, dk, dv },
    )
}
