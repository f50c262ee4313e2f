//! Copies in another type.

use super::par::{elements, for_rows};
use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::math::narrow;
use crate::cpu::simd::{Loops, compiled_for};
use crate::layer::round::{Round, Widen};
use nsa_core::Element;

/// Elements that are rounded at a time.
const PIECE: usize = 1 << 10;

pub fn round<T: Element>(cpu: &Cpu, args: Round<'_, T>) -> Result<()> {
    let (x, y) = (elements(args.x.to_host()?), args.y.into_host()?.into_data());
    let whole = y.len() / PIECE * PIECE;
    let (pieces, rest) = y.split_at_mut(whole);
    let round = |x: &[T::Acc], y: &mut [T]| compiled_for(cpu.isa(), Narrow { x, y });
    for_rows(pieces, PIECE, |i, y| round(&x[i * PIECE..][..PIECE], y));
    round(&x[whole..], rest);
    Ok(())
}

pub fn widen<T: Element>(cpu: &Cpu, args: Widen<'_, T>) -> Result<()> {
    compiled_for(cpu.isa(), Wide { x: elements(args.x.to_host()?), y: args.y.into_host()?.into_data() });
    Ok(())
}

struct Wide<'a, T: Element> {
    x: &'a [T],
    y: &'a mut [T::Acc],
}

impl<T: Element> Loops for Wide<'_, T> {
    #[inline(always)]
    fn run(self) {
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y = x.to_acc();
        }
    }
}

struct Narrow<'a, T: Element> {
    x: &'a [T::Acc],
    y: &'a mut [T],
}

impl<T: Element> Loops for Narrow<'_, T> {
    #[inline(always)]
    fn run(self) {
        narrow(self.x, self.y);
    }
}
