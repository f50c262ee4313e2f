//! win
use crate::Result;
use crate::cpu::Cpu;
use crate::op::win::{Backward, Forward};
use nsa_core::Element;

pub(crate) fn forward<T: Element>(_cpu: &Cpu, _args: Forward<'_, T>) -> Result<()> {
    unimplemented!("lands within the hour")
}

pub(crate) fn backward<T: Element>(_cpu: &Cpu, _args: Backward<'_, T>) -> Result<()> {
    unimplemented!("lands within the hour")
}
