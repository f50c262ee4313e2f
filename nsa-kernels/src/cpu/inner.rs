//! The inner loops of products: what is summed in registers.

use super::ahead::{Ahead, Still};
use super::product::{Left, Right, Store, Target};
use super::simd::{Multiply, Simd};
use super::unit::Unit;
use nsa_core::Real;
use std::marker::PhantomData;
use std::ops::Range;

/// The operands of a block: units of its rows from `left[x]` on, vectors from `right` on. `Product::check` has
/// found all units that its steps touch in the slices.
pub(super) struct Place<'a, U, const MR: usize> {
    left: [*const U; MR],
    step: usize,
    right: *const U,
    stride: usize,
    operands: PhantomData<&'a [U]>,
}

impl<'a, U, const MR: usize> Place<'a, U, MR> {
    /// Rows that start where `rows` says, and the columns from `column` on.
    #[inline(always)]
    pub(super) fn new(left: &Left<'a, U>, rows: &[usize; MR], right: &Right<'a, U>, column: usize) -> Self {
        Self {
            // Without steps there may be nothing to start at.
            left: rows.map(|row| left.data.as_ptr().wrapping_add(row)),
            step: left.step,
            right: right.data.as_ptr().wrapping_add(column),
            stride: right.stride,
            operands: PhantomData,
        }
    }
}

/// Brings the sums of a block to rows of the target that start where `rows` says, NR whole vectors from `column` on.
#[inline(always)]
pub(super) fn put<A: Real, S: Simd<A>, const MR: usize, const NR: usize>(
    s: S,
    target: &mut Target<'_, A>,
    rows: &[usize; MR],
    column: usize,
    sums: &[[S::V; NR]; MR],
) {
    let target_rows = rows.map(|row| target.data.as_mut_ptr().wrapping_add(row + column));
    // SAFETY: `Product::check` found every row of the target in the slice, and its caller as many columns left.
    unsafe {
        if target.store == Store::Add {
            for x in 0..MR {
                for y in 0..NR {
                    let place = target_rows[x].add(y * S::WIDTH);
                    s.store(place, s.add(s.load(place), sums[x][y]));
                }
            }
        } else {
            for x in 0..MR {
                for y in 0..NR {
                    s.store(target_rows[x].add(y * S::WIDTH), sums[x][y]);
                }
            }
        }
    }
}

impl<U: Unit, const MR: usize> Place<'_, U, MR> {
    /// Adds the whole units of a range of steps: the inner loop. Sums of its own stay in registers.
    #[inline(always)]
    fn multiply<M: Multiply<U, U::Acc>, const NR: usize>(
        &self,
        m: M,
        result: &mut [[<M::Simd as Simd<U::Acc>>::V; NR]; MR],
        units: Range<usize>,
        ahead: &mut impl Ahead,
    ) {
        let mut sums = *result;
        let (left, right) = (self.left, self.right);
        for p in units {
            ahead.step();
            // SAFETY: `Product::check` found unit p of every row, and of every strip of columns the right operand's row p
            // with whole vectors, in the slices.
            unsafe {
                let row = right.add(p * self.stride);
                let b: [M::Units; NR] = std::array::from_fn(|y| m.load_units(row.add(y * M::Simd::WIDTH)));
                for x in 0..MR {
                    let a = m.splat_unit(left[x].add(p * self.step));
                    for y in 0..NR {
                        sums[x][y] = m.multiply_add(a, b[y], sums[x][y]);
                    }
                }
            }
        }
        *result = sums;
    }

    /// The same for rows that are `spacing` apart, of which registers hold every fourth: so many rows have more addresses
    /// than a processor has registers.
    #[inline(always)]
    pub(super) fn multiply_even<M: Multiply<U, U::Acc>>(
        &self,
        m: M,
        result: &mut [[<M::Simd as Simd<U::Acc>>::V; 1]; MR],
        units: Range<usize>,
        spacing: usize,
        ahead: &mut impl Ahead,
    ) {
        let mut sums = *result;
        let mut left: [*const U; 4] = std::array::from_fn(|x| self.left[(4 * x).min(MR - 1)]);
        let mut right = self.right;
        for _ in units {
            ahead.step();
            // SAFETY: `Product::check` found the units of every row, which lie where `Product::spacing` found them, and
            // those of the right operand with whole vectors, in the slices.
            unsafe {
                let b = m.load_units(right);
                for x in 0..MR {
                    let a = m.splat_unit(left[x / 4].add(x % 4 * spacing));
                    sums[x][0] = m.multiply_add(a, b, sums[x][0]);
                }
            }
            // Behind the last unit nothing is read.
            left = left.map(|row| row.wrapping_add(self.step));
            right = right.wrapping_add(self.stride);
        }
        *result = sums;
    }

    /// Adds some elements of unit p.
    #[inline(always)]
    pub(super) fn multiply_part<M: Multiply<U, U::Acc>, const NR: usize>(
        &self,
        m: M,
        sums: &mut [[<M::Simd as Simd<U::Acc>>::V; NR]; MR],
        p: usize,
        elements: Range<usize>,
    ) {
        for x in 0..MR {
            for y in 0..NR {
                // SAFETY: as in `multiply`.
                let (a, b) = unsafe {
                    let a = m.splat_unit(self.left[x].add(p * self.step));
                    (a, m.load_units(self.right.add(p * self.stride + y * M::Simd::WIDTH)))
                };
                sums[x][y] = m.multiply_add(a, m.keep_elements(b, elements.clone()), sums[x][y]);
            }
        }
    }

    /// Adds a range of steps, which may start or end within a unit.
    #[inline(always)]
    pub(super) fn multiply_range<M: Multiply<U, U::Acc>, const NR: usize>(
        &self,
        m: M,
        sums: &mut [[<M::Simd as Simd<U::Acc>>::V; NR]; MR],
        steps: Range<usize>,
        ahead: &mut impl Ahead,
    ) {
        let whole = steps.start.div_ceil(U::STEP)..steps.end / U::STEP;
        if U::STEP == 1 || (whole.start * U::STEP, whole.end * U::STEP) == (steps.start, steps.end) {
            return self.multiply(m, sums, whole, ahead);
        }
        let (first, last) = (steps.start / U::STEP, steps.end / U::STEP);
        let (start, end) = (steps.start % U::STEP, steps.end % U::STEP);
        if first == last {
            return self.multiply_part(m, sums, first, start..end);
        }
        if start > 0 {
            self.multiply_part(m, sums, first, start..U::STEP);
        }
        self.multiply(m, sums, whole, ahead);
        if end > 0 {
            self.multiply_part(m, sums, last, 0..end);
        }
    }

    /// Adds ranges that differ from row to row: what all share together, the rest one row at a time. Each row's units
    /// come in their order, and as many at once as if it were alone.
    #[inline(always)]
    pub(super) fn multiply_ragged<M: Multiply<U, U::Acc>, const NR: usize>(
        &self,
        m: M,
        sums: &mut [[<M::Simd as Simd<U::Acc>>::V; NR]; MR],
        steps: &[Range<usize>; MR],
    ) {
        let start = steps.iter().map(|s| s.start).max().unwrap_or(0);
        let end = steps.iter().map(|s| s.end).min().unwrap_or(0);
        if steps.iter().all(|s| (s.start, s.end) == (start, end)) {
            return self.multiply_range(m, sums, start..end, &mut Still);
        }
        let (start, end) = (start.next_multiple_of(U::STEP), end / U::STEP * U::STEP);
        // Without common steps, those before them are all there are.
        let common = if start < end { start..end } else { usize::MAX..usize::MAX };
        for x in 0..MR {
            self.row(x).multiply_range(
                m,
                sums[x..].first_chunk_mut().expect("a row"),
                head(&steps[x], &common),
                &mut Still,
            );
        }
        if start < end {
            self.multiply(m, sums, common.start / U::STEP..common.end / U::STEP, &mut Still);
            for x in 0..MR {
                let rest = common.end.min(steps[x].end)..steps[x].end;
                self.row(x).multiply_range(m, sums[x..].first_chunk_mut().expect("a row"), rest, &mut Still);
            }
        }
    }

    /// One row of the block.
    #[inline(always)]
    fn row(&self, x: usize) -> Place<'_, U, 1> {
        Place { left: [self.left[x]], step: self.step, right: self.right, stride: self.stride, operands: PhantomData }
    }
}

/// The steps before the common ones.
#[inline(always)]
fn head(steps: &Range<usize>, common: &Range<usize>) -> Range<usize> {
    steps.start..common.start.clamp(steps.start, steps.end)
}
