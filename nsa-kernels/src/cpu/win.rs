//! Sliding-window attention on the CPU: the band of the last w positions.

use crate::Result;
use crate::cpu::{Cpu, band};
use crate::op::win::{Backward, Forward};
use nsa_core::{Element, index};

/// See `op::win::forward`.
pub(crate) fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k, v, o, lse } = args;
    let visible = |t| index::window_tokens(config, t);
    band::forward(cpu, band::Forward { config, packing, q, k, v, o, lse, visible })
}

pub(crate) fn backward<T: Element>(_cpu: &Cpu, _args: Backward<'_, T>) -> Result<()> {
    unimplemented!("lands within the hour")
}
