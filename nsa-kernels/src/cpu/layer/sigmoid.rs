//! The logistic function.

use super::par::for_rows;
use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::math::exp;
use crate::cpu::simd::{Loops, compiled_for};
use crate::layer::sigmoid::{Backward, Forward};
use nsa_core::{Element, Real};
use num_traits::One;

/// 1/(1 + e^(−x)), with the exponential of −|x| in either half: it never overflows, and far negative x keep their digits.
#[inline(always)]
pub fn sigmoid<A: Real>(x: A) -> A {
    let e = exp(-x.abs());
    let top = if x < A::zero() { e } else { A::one() };
    top / (A::one() + e)
}

pub fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let x = args.x.to_host()?;
    for_rows(args.y.into_host()?.into_data(), x.shape()[1], |n, y| {
        compiled_for(cpu.isa(), ForwardRow { x: x.row(n), y });
    });
    Ok(())
}

struct ForwardRow<'a, T> {
    x: &'a [T],
    y: &'a mut [T],
}

impl<T: Element> Loops for ForwardRow<'_, T> {
    #[inline(always)]
    fn run(self) {
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y = T::from_acc(sigmoid(x.to_acc()));
        }
    }
}

pub fn backward<T: Element>(cpu: &Cpu, args: Backward<'_, T>) -> Result<()> {
    let (y, dy) = (args.y.to_host()?, args.dy.to_host()?);
    for_rows(args.dx.into_host()?.into_data(), y.shape()[1], |n, dx| {
        compiled_for(cpu.isa(), BackwardRow { y: y.row(n), dy: dy.row(n), dx });
    });
    Ok(())
}

struct BackwardRow<'a, T: Element> {
    y: &'a [T],
    dy: &'a [T::Acc],
    dx: &'a mut [T::Acc],
}

impl<T: Element> Loops for BackwardRow<'_, T> {
    #[inline(always)]
    fn run(self) {
        for ((dx, y), &dy) in self.dx.iter_mut().zip(self.y).zip(self.dy) {
            let y = y.to_acc();
            *dx = dy * y * (T::Acc::one() - y);
        }
    }
}
