//! The micro-kernel: products of small matrices, with a block of the result in registers. Every product of attention,
//! forward, backward and decoding, is one of these.
//!
//! Left operands are read element by element and spread over a vector, right operands and results vector by vector. A
//! unit of both holds one element, or two neighbours of the sum (bf16), which one instruction multiplies and adds.
//!
//! Roofline: a block of MR rows and NR vectors reads MR + NR operands for MR · NR multiply-adds: (6 + 4)/24 loads each, and
//! the processors that this is made for can do one or two. Bound by arithmetic from L1 or L2.
//! Results of one vector, as scores of keys against the heads of one query are, have blocks of TALL rows instead: six chains
//! of additions would wait for themselves (29 against 24 GB/s of keys in f32 from L1 on a Zen 5 core).
//! An element of the result is Σ_p in the order of p from zero, then added to the target: its bits do not depend on the
//! blocks around it.

use super::ahead::{Ahead, Lines, Still};
use super::inner::{self, Place};
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

impl<'a, U: Unit> Product<'a, U> {
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

    /// Computes it with blocks of MR rows and NR vectors, or TALL rows where there is one vector and rows of the left
    /// operand are evenly spaced.
    #[inline(always)]
    pub(crate) fn blocks<M: Multiply<U, U::Acc>, const MR: usize, const NR: usize, const TALL: usize>(
        mut self,
        m: M,
        mut ahead: impl Ahead,
    ) {
        self.steps = self.steps.simplified();
        self.check();
        let (rows, width) = (self.target.rows.len(), M::Simd::WIDTH);
        if let (Steps::First(steps), Some(spacing)) = (self.steps, self.spacing())
            && (1..=width).contains(&self.columns)
        {
            ahead.pace(rows.div_ceil(TALL) * steps.div_ceil(U::STEP));
            return self.tall_strip::<M, TALL>(m, steps, spacing, &mut ahead);
        }
        if let Steps::First(steps) = self.steps {
            ahead.pace(rows.div_ceil(MR) * self.columns.div_ceil(NR * width) * steps.div_ceil(U::STEP));
        }
        let mut j = 0;
        while j + NR * width <= self.columns {
            self.strip::<M, MR, NR>(m, j, &mut ahead);
            j += NR * width;
        }
        if NR > 2 && j + 2 * width <= self.columns {
            self.strip::<M, MR, 2>(m, j, &mut ahead);
            j += 2 * width;
        }
        while j < self.columns {
            self.strip::<M, MR, 1>(m, j, &mut ahead);
            j += width;
        }
    }

    /// Distance between the rows of the left operand, if it is everywhere the same.
    #[inline(always)]
    fn spacing(&self) -> Option<usize> {
        let rows = &self.left.rows[..self.target.rows.len()];
        let spacing = rows.get(1)?.checked_sub(rows[0])?;
        rows.windows(2).all(|pair| pair[0] + spacing == pair[1]).then_some(spacing)
    }

    /// The only vector of columns, from rows that are `spacing` apart.
    #[inline(always)]
    fn tall_strip<M: Multiply<U, U::Acc>, const TALL: usize>(
        &mut self,
        m: M,
        steps: usize,
        spacing: usize,
        ahead: &mut impl Ahead,
    ) {
        let rows = self.target.rows.len();
        let mut i = 0;
        while i + TALL <= rows {
            self.tall_block::<M, TALL>(m, i, steps, spacing, ahead);
            i += TALL;
        }
        if TALL > 8 && i + 8 <= rows {
            self.tall_block::<M, 8>(m, i, steps, spacing, ahead);
            i += 8;
        }
        if TALL > 4 && i + 4 <= rows {
            self.tall_block::<M, 4>(m, i, steps, spacing, ahead);
            i += 4;
        }
        while i < rows {
            self.tall_block::<M, 1>(m, i, steps, spacing, ahead);
            i += 1;
        }
    }

    /// The block of MR rows from i.
    #[inline(always)]
    fn tall_block<M: Multiply<U, U::Acc>, const MR: usize>(
        &mut self,
        m: M,
        i: usize,
        steps: usize,
        spacing: usize,
        ahead: &mut impl Ahead,
    ) {
        let place = self.place::<MR>([i, 0]);
        let mut sums = [[m.simd().splat(U::Acc::zero())]; MR];
        place.multiply_even(m, &mut sums, 0..steps / U::STEP, spacing, ahead);
        if !steps.is_multiple_of(U::STEP) {
            place.multiply_part(m, &mut sums, steps / U::STEP, 0..steps % U::STEP);
        }
        self.put::<M, MR, 1>(m, [i, 0], &sums);
    }

    /// The columns from j on that fill NR vectors, or what there is of one.
    #[inline(always)]
    fn strip<M: Multiply<U, U::Acc>, const MR: usize, const NR: usize>(
        &mut self,
        m: M,
        j: usize,
        ahead: &mut impl Ahead,
    ) {
        let rows = self.target.rows.len();
        let mut i = 0;
        while i + MR <= rows {
            self.block::<M, MR, NR>(m, [i, j], ahead);
            i += MR;
        }
        match rows - i {
            5 if MR > 5 => self.block::<M, 5, NR>(m, [i, j], ahead),
            4 if MR > 4 => self.block::<M, 4, NR>(m, [i, j], ahead),
            3 if MR > 3 => self.block::<M, 3, NR>(m, [i, j], ahead),
            2 if MR > 2 => self.block::<M, 2, NR>(m, [i, j], ahead),
            1 => self.block::<M, 1, NR>(m, [i, j], ahead),
            _ => {}
        }
    }

    /// The block of MR rows from i and NR vectors from j.
    #[inline(always)]
    fn block<M: Multiply<U, U::Acc>, const MR: usize, const NR: usize>(
        &mut self,
        m: M,
        [i, j]: [usize; 2],
        ahead: &mut impl Ahead,
    ) {
        let place = self.place::<MR>([i, j]);
        let mut sums = [[m.simd().splat(U::Acc::zero()); NR]; MR];
        match self.steps {
            Steps::First(count) => place.multiply_range(m, &mut sums, 0..count, ahead),
            Steps::Each(_) => {
                let steps: [Range<usize>; MR] = std::array::from_fn(|x| self.steps_of(i + x));
                place.multiply_ragged(m, &mut sums, &steps);
            }
        }
        self.put::<M, MR, NR>(m, [i, j], &sums);
    }

    /// The operands of the block of MR rows from i and the columns from j on.
    #[inline(always)]
    fn place<const MR: usize>(&self, [i, j]: [usize; 2]) -> Place<'a, U, MR> {
        Place::new(&self.left, self.left.rows[i..].first_chunk().expect("rows"), &self.right, j)
    }

    /// Brings the sums of a block to the target.
    #[inline(always)]
    fn put<M: Multiply<U, U::Acc>, const MR: usize, const NR: usize>(
        &mut self,
        m: M,
        [i, j]: [usize; 2],
        sums: &[[<M::Simd as Simd<U::Acc>>::V; NR]; MR],
    ) {
        let rows: &[usize; MR] = self.target.rows[i..].first_chunk().expect("rows");
        if j + NR * M::Simd::WIDTH <= self.columns {
            return inner::put(m.simd(), &mut self.target, rows, j, sums);
        }
        // What there is of one vector.
        for (&row, sums) in rows.iter().zip(sums) {
            let part = &mut self.target.data[row + j..row + self.columns];
            put_part(m.simd(), part, sums[0], self.target.store);
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

/// A product, and what is brought nearer meanwhile.
pub(crate) struct Task<'a, U: Unit, L> {
    /// The product.
    pub(crate) product: Product<'a, U>,
    /// The memory.
    pub(crate) ahead: L,
}

impl<'a, A: Real, L: Ahead> Compute<A> for Task<'a, A, L> {
    type As<B: Real> = Task<'a, B, L>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        // Known when compiled.
        match S::BLOCK {
            [6, 4] => self.product.blocks::<S, 6, 4, 16>(s, self.ahead),
            [6, 2] => self.product.blocks::<S, 6, 2, 8>(s, self.ahead),
            _ => self.product.blocks::<S, 4, 1, 4>(s, self.ahead),
        }
    }

    fn cast<B: Real>(self) -> Task<'a, B, L> {
        let Product { left, right, target, columns, steps } = self.product;
        let product = Product {
            left: Left { data: bytemuck::cast_slice(left.data), rows: left.rows, step: left.step },
            right: Right { data: bytemuck::cast_slice(right.data), stride: right.stride },
            target: Target { data: bytemuck::cast_slice_mut(target.data), rows: target.rows, store: target.store },
            columns,
            steps,
        };
        Task { product, ahead: self.ahead }
    }
}

/// Computes a product with the instructions of `isa`.
pub(crate) fn product<U: Unit>(isa: Isa, product: Product<'_, U>) {
    U::product(isa, Task { product, ahead: Still });
}

/// The same while `ahead`, what is read next, comes nearer.
pub(crate) fn product_ahead<U: Unit>(isa: Isa, product: Product<'_, U>, ahead: Lines<'_>) {
    if ahead.is_empty() {
        U::product(isa, Task { product, ahead: Still });
    } else {
        U::product(isa, Task { product, ahead });
    }
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
            for shape in [
                [1, 1, 1],
                [4, 8, 5],
                [7, 43, 9],
                [13, 17, 3],
                [3, 70, 0],
                [6, 64, 12],
                [17, 96, 20],
                [39, 16, 9],
                [29, 5, 12],
            ] {
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
    fn without_columns_nothing_is_read() {
        let (left, mut c) = ([0.0f32; 8], [7.0f32; 2]);
        for isa in Isa::available() {
            let right = Right { data: &[], stride: 0 };
            let target = Target { data: &mut c, rows: &[0, 1], store: Store::Write };
            let left = Left { data: &left, rows: &[0, 4], step: 1 };
            product(isa, Product { left, right, target, columns: 0, steps: Steps::First(4) });
            assert_eq!(c, [7.0; 2], "{isa}");
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
