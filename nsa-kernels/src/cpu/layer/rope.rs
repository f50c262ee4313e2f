//! Rotary position embedding.

use super::par::{elements, for_rows};
use crate::cpu::Cpu;
use crate::cpu::simd::{Loops, compiled_for};
use crate::layer::rope::{Direction, RopeCache, Rotate, RotateInPlace, position_error};
use crate::{Result, Tensor};
use nsa_core::{Element, Real};

pub fn rotate<T: Element>(cpu: &Cpu, op: &'static str, args: Rotate<'_, T>, direction: Direction) -> Result<()> {
    let (x, positions) = (args.x.to_host()?, check_positions(op, args.cache, &args.positions)?);
    let [_, heads, dim] = x.shape();
    let (cos, sin) = (args.cache.cos()?.to_host()?, args.cache.sin()?.to_host()?);
    for_rows(args.y.into_host()?.into_data(), heads * dim, |n, y| {
        for (h, y) in y.chunks_exact_mut(dim).enumerate() {
            y.copy_from_slice(x.row(n, h));
        }
        let (cos, sin) = (cos.row(positions[n] as usize), sin.row(positions[n] as usize));
        compiled_for(cpu.isa(), Turn { x: y, cos, sin, direction });
    });
    Ok(())
}

pub fn rotate_in_place<T: Element>(
    cpu: &Cpu,
    op: &'static str,
    args: RotateInPlace<'_, T>,
    direction: Direction,
) -> Result<()> {
    let positions = check_positions(op, args.cache, &args.positions)?;
    let (cos, sin) = (args.cache.cos()?.to_host()?, args.cache.sin()?.to_host()?);
    for x in args.x {
        let [_, heads, dim] = x.shape();
        for_rows(x.into_host()?.into_data(), heads * dim, |n, x| {
            let (cos, sin) = (cos.row(positions[n] as usize), sin.row(positions[n] as usize));
            compiled_for(cpu.isa(), Turn { x, cos, sin, direction });
        });
    }
    Ok(())
}

/// The heads of a token `[H, D]`.
struct Turn<'a, T: Element> {
    x: &'a mut [T],
    cos: &'a [T::Acc],
    sin: &'a [T::Acc],
    direction: Direction,
}

impl<T: Element> Loops for Turn<'_, T> {
    #[inline(always)]
    fn run(self) {
        let half = self.cos.len();
        let backward = self.direction == Direction::Backward;
        for x in self.x.chunks_exact_mut(2 * half) {
            let (low, high) = x.split_at_mut(half);
            for (((low, high), &cos), &sin) in low.iter_mut().zip(high).zip(self.cos).zip(self.sin) {
                let (x, y, sin) = (low.to_acc(), high.to_acc(), if backward { -sin } else { sin });
                *low = T::from_acc(x * cos - y * sin);
                *high = T::from_acc(y * cos + x * sin);
            }
        }
    }
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
