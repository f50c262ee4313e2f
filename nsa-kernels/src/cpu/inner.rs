//! The inner loops of products: what is summed in registers.

use super::ahead::{Ahead, Still};
use super::simd::{Multiply, Simd};
use super::unit::Unit;
use std::ops::Range;

/// The operands of a block: units of its rows from `left[x]` on, vectors from `right` on. `Product::check` has
/// found all units that its steps touch in the slices.
pub(super) struct Place<'a, U, const MR: usize> {
    pub(super) left: [&'a [U]; MR],
    pub(super) step: usize,
    pub(super) right: &'a [U],
    pub(super) stride: usize,
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
        let left: [*const U; MR] = self.left.map(<[U]>::as_ptr);
        let right = self.right.as_ptr();
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
        let mut left: [*const U; 4] = std::array::from_fn(|x| self.left[(4 * x).min(MR - 1)].as_ptr());
        let mut right = self.right.as_ptr();
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
                    let a = m.splat_unit(self.left[x].as_ptr().add(p * self.step));
                    (a, m.load_units(self.right.as_ptr().add(p * self.stride + y * M::Simd::WIDTH)))
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
        Place { left: [self.left[x]], step: self.step, right: self.right, stride: self.stride }
    }
}

/// The steps before the common ones.
#[inline(always)]
fn head(steps: &Range<usize>, common: &Range<usize>) -> Range<usize> {
    steps.start..common.start.clamp(steps.start, steps.end)
}
