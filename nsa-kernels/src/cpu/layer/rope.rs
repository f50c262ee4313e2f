//! Rotary position embedding.

use super::par::{elements, for_rows};
use crate::layer::rope::{Direction, RopeCache, Rotate, RotateInPlace, position_error};
use crate::{Result, Tensor};
use nsa_core::{Element, Real};

pub fn rotate<T: Element>(op: &'static str, args: Rotate<'_, T>, direction: Direction) -> Result<()> {
    let (x, positions) = (args.x.to_host()?, check_positions(op, args.cache, &args.positions)?);
    let [_, heads, dim] = x.shape();
    let (cos, sin) = (args.cache.cos()?.to_host()?, args.cache.sin()?.to_host()?);
    for_rows(args.y.into_host()?.into_data(), heads * dim, |n, y| {
        let (cos, sin) = (cos.row(positions[n] as usize), sin.row(positions[n] as usize));
        for (h, y) in y.chunks_exact_mut(dim).enumerate() {
            let (x_low, x_high) = x.row(n, h).split_at(dim / 2);
            let (y_low, y_high) = y.split_at_mut(dim / 2);
            for i in 0..dim / 2 {
                (y_low[i], y_high[i]) = turn(x_low[i], x_high[i], cos[i], sin[i], direction);
            }
        }
    });
    Ok(())
}

pub fn rotate_in_place<T: Element>(op: &'static str, args: RotateInPlace<'_, T>, direction: Direction) -> Result<()> {
    let positions = check_positions(op, args.cache, &args.positions)?;
    let [_, heads, dim] = args.x.shape();
    let (cos, sin) = (args.cache.cos()?.to_host()?, args.cache.sin()?.to_host()?);
    for_rows(args.x.into_host()?.into_data(), heads * dim, |n, x| {
        let (cos, sin) = (cos.row(positions[n] as usize), sin.row(positions[n] as usize));
        for x in x.chunks_exact_mut(dim) {
            let (low, high) = x.split_at_mut(dim / 2);
            for i in 0..dim / 2 {
                (low[i], high[i]) = turn(low[i], high[i], cos[i], sin[i], direction);
            }
        }
    });
    Ok(())
}

#[inline(always)]
fn turn<T: Element>(low: T, high: T, cos: T::Acc, sin: T::Acc, direction: Direction) -> (T, T) {
    let (low, high) = (low.to_acc(), high.to_acc());
    let (low, high) = match direction {
        Direction::Forward => (low * cos - high * sin, high * cos + low * sin),
        Direction::Backward => (low * cos + high * sin, high * cos - low * sin),
    };
    (T::from_acc(low), T::from_acc(high))
}

fn check_positions<'a, A: Real>(
    op: &'static str,
    cache: &RopeCache<A>,
    positions: &Tensor<'a, i32, 1>,
) -> Result<&'a [i32]> {
    let positions = elements(positions.to_host()?);
    let outside = |&position: &i32| usize::try_from(position).map_or(true, |p| p >= cache.positions());
    match positions.iter().position(outside) {
        None => Ok(positions),
        Some(row) => Err(position_error(op, row, positions[row])),
    }
}
