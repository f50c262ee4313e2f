//! Sums of tensors.

use super::par::for_rows;
use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::simd::{Loops, compiled_for};
use crate::layer::add::{Accumulate, Forward};
use nsa_core::Element;

pub fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let (a, b) = (args.a.to_host()?, args.b.to_host()?);
    for_rows(args.y.into_host()?.into_data(), a.shape()[1], |n, y| {
        y.copy_from_slice(a.row(n));
        compiled_for(cpu.isa(), Add { x: b.row(n), y });
    });
    Ok(())
}

pub fn accumulate<T: Element>(cpu: &Cpu, args: Accumulate<'_, T>) -> Result<()> {
    let x = args.x.to_host()?;
    for_rows(args.y.into_host()?.into_data(), x.shape()[1], |n, y| compiled_for(cpu.isa(), Add { x: x.row(n), y }));
    Ok(())
}

/// y += x.
pub(super) struct Add<'a, T> {
    pub(super) x: &'a [T],
    pub(super) y: &'a mut [T],
}

impl<T: Element> Loops for Add<'_, T> {
    #[inline(always)]
    fn run(self) {
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y = T::from_acc(y.to_acc() + x.to_acc());
        }
    }
}
