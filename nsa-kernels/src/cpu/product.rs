//! The micro-kernel: products of small matrices, with a block of the result in registers. Every product of attention,
//! forward, backward and decoding, is one of these.
//!
//! Left operands are read element by element and spread over a vector, right operands and results vector by vector. A
//! unit of both holds one element, or two neighbours of the sum (bf16), which one instruction multiplies and adds.
//!
//! Roofline: a block of MR rows and NR vectors reads MR + NR operands for MR · NR multiply-adds: (6 + 4)/24 loads each, and
//! the processors that this is made for can do one or two. Bound by arithmetic from L1 or L2.
//! An element of the result is Σ_p in the order of p from zero, then added to the target: its bits do not depend on the
//! blocks around it.

use super::isa::Isa;
use super::simd::{Compute, Multiply, Simd, padded};
use super::unit::Unit;
use nsa_core::Real;
use num_traits::Zero;
use std::ops::Range;

/// The left operand `[M, K]`, in units along K: unit (i, p) lies at `rows[i] + p · step`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a, U> {
    /// The units.
    pub(crate) data: &'a [U],
    /// Where each row starts.
    pub(crate) rows: &'a [usize],
    /// Distance between the units of a row.
    pub(crate) step: usize,
}

/// The right operand `[K, N]`, in units along K: unit (p, j) lies at `p · stride + j`. Units up to the next multiple of
/// [`PAD`](super::simd::PAD) behind each row's last can be read; nothing follows from what they are.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a, U> {
    /// The units.
    pub(crate) data: &'a [U],
    /// Distance between rows.
    pub(crate) stride: usize,
}

/// What happens to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    /// It is overwritten.
    Write,
    /// The product is added.
    Add,
}

/// The target `[M, N]`.
pub(crate) struct Target<'a, A> {
    /// The elements.
    pub(crate) data: &'a mut [A],
    /// Where each row starts.
    pub(crate) rows: &'a [usize],
    /// What happens to it.
    pub(crate) store: Store,
}

/// The elements of K that rows are summed over. Others are not read, neither on the left nor on the right.
#[derive(Clone, Copy)]
pub(crate) enum Steps<'a> {
    /// The first ones, of all rows.
    First(usize),
    /// From one to another, for each row.
    Each(&'a [[usize; 2]]),
}

impl Steps<'_> {
    /// The same steps in the form that leaves no questions to the blocks, if all rows share it: most do.
    #[inline(always)]
    fn simplified(self) -> Self {
        match self {
            Self::Each(&[[0, end], ref rest @ ..]) if rest.iter().all(|&steps| steps == [0, end]) => Self::First(end),
            other => other,
        }
    }
}

/// C[i, j] = or += Σ_p A[i, p]·B[p, j] for all rows i of the target, j < `columns` and the elements p of `steps`.
pub(crate) struct Product<'a, U: Unit> {
    /// A.
    pub(crate) left: Left<'a, U>,
    /// B.
    pub(crate) right: Right<'a, U>,
    /// C.
    pub(crate) target: Target<'a, U::Acc>,
    /// N.
    pub(crate) columns: usize,
    /// Of K.
    pub(crate) steps: Steps<'a>,
}

impl<U: Unit> Product<'_, U> {
    /// Steps of row i.
    #[inline(always)]
    fn steps_of(&self, i: usize) -> Range<usize> {
        match self.steps {
            Steps::First(count) => 0..count,
            Steps::Each(steps) => steps[i][0]..steps[i][1].max(steps[i][0]),
        }
    }

    /// Panics unless every place that the product touches lies in its slice.
    #[inline(always)]
    fn check(&self) {
        let (mut units, mut last) = (0, 0);
        match self.steps {
            Steps::First(count) => {
                units = count.div_ceil(U::STEP);
                let farthest = self.left.rows[..self.target.rows.len()].iter().max();
                last = farthest.map_or(0, |start| if units > 0 { start + (units - 1) * self.left.step + 1 } else { 0 });
            }
            Steps::Each(steps) => {
                for (row, steps) in self.left.rows[..self.target.rows.len()].iter().zip(steps) {
                    let row_units = steps[1].max(steps[0]).div_ceil(U::STEP);
                    units = units.max(row_units);
                    if row_units > 0 {
                        last = last.max(row + (row_units - 1) * self.left.step + 1);
                    }
                }
            }
        }
        assert!(last <= self.left.data.len(), "the left operand reaches beyond its slice");
        let right = if units > 0 { (units - 1) * self.right.stride + padded(self.columns) } else { 0 };
        assert!(right <= self.right.data.len(), "the right operand reaches beyond its slice");
        let target = self.target.rows.iter().max().map_or(0, |start| start + self.columns);
        assert!(target <= self.target.data.len(), "the target reaches beyond its slice");
    }

    /// Computes it with blocks of MR rows and NR vectors.
    #[inline(always)]
    pub(crate) fn blocks<M: Multiply<U, U::Acc>, const MR: usize, const NR: usize>(mut self, m: M) {
        self.steps = self.steps.simplified();
        self.check();
        let mut j = 0;
        while j + NR * M::Simd::WIDTH <= self.columns {
            self.strip::<M, MR, NR>(m, j);
            j += NR * M::Simd::WIDTH;
        }
        if NR > 2 && j + 2 * M::Simd::WIDTH <= self.columns {
            self.strip::<M, MR, 2>(m, j);
            j += 2 * M::Simd::WIDTH;
        }
        while j < self.columns {
            self.strip::<M, MR, 1>(m, j);
            j += M::Simd::WIDTH;
        }
    }

    /// The columns from j on that fill NR vectors, or what there is of one.
    #[inline(always)]
    fn strip<M: Multiply<U, U::Acc>, const MR: usize, const NR: usize>(&mut self, m: M, j: usize) {
        let rows = self.target.rows.len();
        let mut i = 0;
        while i + MR <= rows {
            self.block::<M, MR, NR>(m, [i, j]);
            i += MR;
        }
        match rows - i {
            5 if MR > 5 => self.block::<M, 5, NR>(m, [i, j]),
            4 if MR > 4 => self.block::<M, 4, NR>(m, [i, j]),
            3 if MR > 3 => self.block::<M, 3, NR>(m, [i, j]),
            2 if MR > 2 => self.block::<M, 2, NR>(m, [i, j]),
            1 => self.block::<M, 1, NR>(m, [i, j]),
            _ => {}
        }
    }

    /// The block of MR rows from i and NR vectors from j.
    #[inline(always)]
    fn block<M: Multiply<U, U::Acc>, const MR: usize, const NR: usize>(&mut self, m: M, [i, j]: [usize; 2]) {
        let s = m.simd();
        let place = Place {
            // Without steps there may be nothing to start at.
            left: std::array::from_fn(|x| self.left.data.get(self.left.rows[i + x]..).unwrap_or(&[])),
            step: self.left.step,
            right: self.right.data.get(j..).unwrap_or(&[]),
            stride: self.right.stride,
        };
        let mut sums = [[s.splat(U::Acc::zero()); NR]; MR];
        match self.steps {
            Steps::First(count) => place.multiply_range(m, &mut sums, 0..count),
            Steps::Each(_) => {
                let steps: [Range<usize>; MR] = std::array::from_fn(|x| self.steps_of(i + x));
                place.multiply_ragged(m, &mut sums, &steps);
            }
        }
        let width = M::Simd::WIDTH.min(self.columns - j);
        for x in 0..MR {
            let row = &mut self.target.data[self.target.rows[i + x] + j..];
            for y in 0..NR {
                let part = &mut row[y * M::Simd::WIDTH..];
                if width == M::Simd::WIDTH {
                    let sum =
                        if self.target.store == Store::Add { s.add(s.read(part), sums[x][y]) } else { sums[x][y] };
                    s.write(part, sum);
                } else {
                    put_part(s, &mut part[..width], sums[x][y], self.target.store);
                }
            }
        }
    }
}

/// Stores the first lanes of a vector.
#[inline(always)]
fn put_part<A: Real, S: Simd<A>>(s: S, target: &mut [A], sum: S::V, store: Store) {
    let mut lanes = [A::zero(); super::simd::PAD];
    s.write(&mut lanes, sum);
    for (x, &sum) in target.iter_mut().zip(&lanes) {
        *x = if store == Store::Add { *x + sum } else { sum };
    }
}

/// The operands of a block: units of its rows from `left[x]` on, vectors from `right` on. [`Product::check`] has
/// found all units that its steps touch in the slices.
struct Place<'a, U, const MR: usize> {
    left: [&'a [U]; MR],
    step: usize,
    right: &'a [U],
    stride: usize,
}

impl<U: Unit, const MR: usize> Place<'_, U, MR> {
    /// Adds the whole units of a range of steps: the inner loop. Sums of its own stay in registers.
    #[inline(always)]
    fn multiply<M: Multiply<U, U::Acc>, const NR: usize>(
        &self,
        m: M,
        result: &mut [[<M::Simd as Simd<U::Acc>>::V; NR]; MR],
        units: Range<usize>,
    ) {
        let mut sums = *result;
        let left: [*const U; MR] = self.left.map(<[U]>::as_ptr);
        let right = self.right.as_ptr();
        for p in units {
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

    /// Adds some elements of unit p.
    #[inline(always)]
    fn multiply_part<M: Multiply<U, U::Acc>, const NR: usize>(
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
    fn multiply_range<M: Multiply<U, U::Acc>, const NR: usize>(
        &self,
        m: M,
        sums: &mut [[<M::Simd as Simd<U::Acc>>::V; NR]; MR],
        steps: Range<usize>,
    ) {
        let whole = steps.start.div_ceil(U::STEP)..steps.end / U::STEP;
        if U::STEP == 1 || (whole.start * U::STEP, whole.end * U::STEP) == (steps.start, steps.end) {
            return self.multiply(m, sums, whole);
        }
        let (first, last) = (steps.start / U::STEP, steps.end / U::STEP);
        let (start, end) = (steps.start % U::STEP, steps.end % U::STEP);
        if first == last {
            return self.multiply_part(m, sums, first, start..end);
        }
        if start > 0 {
            self.multiply_part(m, sums, first, start..U::STEP);
        }
        self.multiply(m, sums, whole);
        if end > 0 {
            self.multiply_part(m, sums, last, 0..end);
        }
    }

    /// Adds ranges that differ from row to row: what all share together, the rest one row at a time. Each row's units
    /// come in their order, and as many at once as if it were alone.
    #[inline(always)]
    fn multiply_ragged<M: Multiply<U, U::Acc>, const NR: usize>(
        &self,
        m: M,
        sums: &mut [[<M::Simd as Simd<U::Acc>>::V; NR]; MR],
        steps: &[Range<usize>; MR],
    ) {
        let start = steps.iter().map(|s| s.start).max().unwrap_or(0);
        let end = steps.iter().map(|s| s.end).min().unwrap_or(0);
        if steps.iter().all(|s| (s.start, s.end) == (start, end)) {
            return self.multiply_range(m, sums, start..end);
        }
        let (start, end) = (start.next_multiple_of(U::STEP), end / U::STEP * U::STEP);
        // Without common steps, those before them are all there are.
        let common = if start < end { start..end } else { usize::MAX..usize::MAX };
        for x in 0..MR {
            self.row(x).multiply_range(m, sums[x..].first_chunk_mut().expect("a row"), head(&steps[x], &common));
        }
        if start < end {
            self.multiply(m, sums, common.start / U::STEP..common.end / U::STEP);
            for x in 0..MR {
                let rest = common.end.min(steps[x].end)..steps[x].end;
                self.row(x).multiply_range(m, sums[x..].first_chunk_mut().expect("a row"), rest);
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

impl<'a, A: Real> Compute<A> for Product<'a, A> {
    type As<B: Real> = Product<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        // Known when compiled.
        match S::BLOCK {
            [6, 4] => self.blocks::<S, 6, 4>(s),
            [6, 2] => self.blocks::<S, 6, 2>(s),
            _ => self.blocks::<S, 4, 1>(s),
        }
    }

    fn cast<B: Real>(self) -> Product<'a, B> {
        let Self { left, right, target, columns, steps } = self;
        Product {
            left: Left { data: bytemuck::cast_slice(left.data), rows: left.rows, step: left.step },
            right: Right { data: bytemuck::cast_slice(right.data), stride: right.stride },
            target: Target { data: bytemuck::cast_slice_mut(target.data), rows: target.rows, store: target.store },
            columns,
            steps,
        }
    }
}

/// Computes a product with the instructions of `isa`.
pub(crate) fn product<U: Unit>(isa: Isa, product: Product<'_, U>) {
    U::product(isa, product);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::unit::Pair;
    use half::bf16;

    /// Small integers: products and sums are exact in bf16 and in f32.
    fn number(i: usize) -> f64 {
        ((i * 7919 + 13) % 31) as f64 - 15.0
    }

    /// Steps of row i that overlap with those of its neighbours in part, or not at all.
    fn steps(k: usize, kind: usize, i: usize) -> [usize; 2] {
        match kind {
            0 => [0, k],
            1 => [0, (i + 1).min(k)],
            2 => [i.min(k), (i + 3).min(k)],
            3 => [(i % 3).min(k), k - (i % 2).min(k)],
            _ if i.is_multiple_of(3) => [0, 0],
            _ => [k / 2, k],
        }
    }

    /// Rows of numbers as the left operand, rows apart; and as the right operand, rows of whole vectors.
    fn operands<U: Unit<Acc = f32>>(
        [m, n, k]: [usize; 3],
        columns_first: bool,
        a: &[bf16],
        b: &[bf16],
    ) -> (Vec<U>, Vec<usize>, usize, Vec<U>) {
        let (units, width) = (k.div_ceil(U::STEP), padded(n));
        let mut left = vec![U::zeroed(); m * (units + 1)];
        let (mut rows, mut step) = (Vec::new(), 1);
        for i in 0..m {
            rows.push(i * (units + 1));
            U::put_row(&a[i * k..(i + 1) * k], &mut left[rows[i]..]);
        }
        if columns_first {
            let by_rows = left.clone();
            for (i, p) in (0..m).flat_map(|i| (0..units).map(move |p| (i, p))) {
                left[p * m + i] = by_rows[i * (units + 1) + p];
            }
            (rows, step) = ((0..m).collect(), m);
        }
        let mut right = vec![U::zeroed(); units * width];
        for p in 0..units {
            let mut parts: Vec<&[bf16]> = b.chunks(n).skip(p * U::STEP).take(U::STEP).collect();
            parts.resize(U::STEP, parts[0]);
            U::put_rows(&parts, &mut right[p * width..]);
        }
        (left, rows, step, right)
    }

    fn products_equal_plain_loops<U: Unit<Acc = f32>>(isa: Isa, [m, n, k]: [usize; 3], kind: usize) {
        let a: Vec<bf16> = (0..m * k).map(|x| bf16::from_f64(number(x))).collect();
        let b: Vec<bf16> = (0..k * n).map(|x| bf16::from_f64(number(x + 77))).collect();
        let ranges: Vec<[usize; 2]> = (0..m).map(|i| steps(k, kind, i)).collect();
        for (store, columns_first) in [(Store::Add, false), (Store::Write, true)] {
            let (left, rows, step, right) = operands::<U>([m, n, k], columns_first, &a, &b);
            let old: Vec<f32> = (0..m * (n + 1)).map(|x| number(x + 5) as f32).collect();
            // Rows in another order, with a gap that nothing may touch.
            let places: Vec<usize> = (0..m).map(|i| (m - 1 - i) * (n + 1)).collect();
            let mut c = old.clone();
            product(
                isa,
                Product {
                    left: Left { data: &left, rows: &rows, step },
                    right: Right { data: &right, stride: padded(n) },
                    target: Target { data: &mut c, rows: &places, store },
                    columns: n,
                    steps: if kind == 0 { Steps::First(k) } else { Steps::Each(&ranges) },
                },
            );
            for i in 0..m {
                for j in 0..=n {
                    let at = places[i] + j;
                    let terms =
                        (ranges[i][0]..ranges[i][1]).map(|p| a[i * k + p].to_f32() * b[p * n + j.min(n - 1)].to_f32());
                    let before = if store == Store::Add { old[at] } else { 0.0 };
                    let expected = if j < n { before + terms.sum::<f32>() } else { old[at] };
                    assert_eq!(c[at], expected, "{isa} {m}x{n}x{k} kind {kind} {store:?} at {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn products_of_all_shapes_and_steps_equal_plain_loops_on_every_isa() {
        for isa in Isa::available() {
            for shape in [[1, 1, 1], [4, 8, 5], [7, 43, 9], [13, 17, 3], [3, 70, 0], [6, 64, 12], [17, 96, 20]] {
                for kind in 0..5 {
                    products_equal_plain_loops::<f32>(isa, shape, kind);
                    if isa == Isa::Avx512Bf16 {
                        products_equal_plain_loops::<Pair<f32>>(isa, shape, kind);
                    }
                }
            }
        }
    }

    /// The bits of a row do not depend on the rows beside it, nor on how its steps compare with theirs.
    fn rows_are_independent<U: Unit<Acc = f32>>(isa: Isa) {
        let [m, n, k] = [9, 43, 13];
        let values = |from: usize, len: usize| -> Vec<bf16> {
            (from..from + len).map(|x| bf16::from_f64((x as f64 * 0.7).sin())).collect()
        };
        let (a, b) = (values(0, m * k), values(500, k * n));
        let (left, rows, step, right) = operands::<U>([m, n, k], false, &a, &b);
        for kind in 0..5 {
            let ranges: Vec<[usize; 2]> = (0..m).map(|i| steps(k, kind, i)).collect();
            let run = |part: Range<usize>| {
                let places: Vec<usize> = (0..part.len()).map(|i| i * n).collect();
                let mut c = vec![0.0; part.len() * n];
                product(
                    isa,
                    Product {
                        left: Left { data: &left, rows: &rows[part.clone()], step },
                        right: Right { data: &right, stride: padded(n) },
                        target: Target { data: &mut c, rows: &places, store: Store::Add },
                        columns: n,
                        steps: Steps::Each(&ranges[part]),
                    },
                );
                c
            };
            let together = run(0..m);
            let alone: Vec<f32> = (0..m).flat_map(|i| run(i..i + 1)).collect();
            assert_eq!(together, alone, "{isa} kind {kind}");
        }
    }

    #[test]
    fn rows_are_independent_on_every_isa() {
        for isa in Isa::available() {
            rows_are_independent::<f32>(isa);
            if isa == Isa::Avx512Bf16 {
                rows_are_independent::<Pair<f32>>(isa);
            }
        }
    }

    #[test]
    #[should_panic(expected = "right operand reaches beyond")]
    fn a_right_operand_without_whole_vectors_is_refused() {
        let (left, right, mut c) = ([0.0f32; 4], [0.0f32; 4 * 17], [0.0f32; 17]);
        let right = Right { data: &right, stride: 17 };
        let target = Target { data: &mut c, rows: &[0], store: Store::Write };
        let left = Left { data: &left, rows: &[0], step: 1 };
        product(Isa::Portable, Product { left, right, target, columns: 17, steps: Steps::First(4) });
    }
}
