//! The logistic function.

use super::par::for_rows;
use crate::Result;
use crate::cpu::math::exp;
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

pub fn forward<T: Element>(args: Forward<'_, T>) -> Result<()> {
    let x = args.x.to_host()?;
    for_rows(args.y.into_host()?.into_data(), x.shape()[1], |n, y| {
        for (y, x) in y.iter_mut().zip(x.row(n)) {
            *y = T::from_acc(sigmoid(x.to_acc()));
        }
    });
    Ok(())
}

pub fn backward<T: Element>(args: Backward<'_, T>) -> Result<()> {
    let (y, dy) = (args.y.to_host()?, args.dy.to_host()?);
    for_rows(args.dx.into_host()?.into_data(), y.shape()[1], |n, dx| {
        for ((dx, y), &dy) in dx.iter_mut().zip(y.row(n)).zip(dy.row(n)) {
            let y = y.to_acc();
            *dx = dy * y * (T::Acc::one() - y);
        }
    });
    Ok(())
}
