//! Sums of tensors.

use super::par::for_rows;
use crate::Result;
use crate::layer::add::{Accumulate, Forward};
use nsa_core::Element;

pub fn forward<T: Element>(args: Forward<'_, T>) -> Result<()> {
    let (a, b) = (args.a.to_host()?, args.b.to_host()?);
    for_rows(args.y.into_host()?.into_data(), a.shape()[1], |n, y| {
        for ((y, a), b) in y.iter_mut().zip(a.row(n)).zip(b.row(n)) {
            *y = T::from_acc(a.to_acc() + b.to_acc());
        }
    });
    Ok(())
}

pub fn accumulate<T: Element>(args: Accumulate<'_, T>) -> Result<()> {
    let x = args.x.to_host()?;
    for_rows(args.y.into_host()?.into_data(), x.shape()[1], |n, y| {
        for (y, x) in y.iter_mut().zip(x.row(n)) {
            *y = T::from_acc(y.to_acc() + x.to_acc());
        }
    });
    Ok(())
}
