//! Micro-kernels: small products of matrices with blocks of the result in registers. Every product of attention,
//! forward and backward, is one of [`product`]'s; a path for an instruction set replaces `product_f32` and the
//! constants of its blocks.
//!
//! Rows of queries are packed into panels of [`LANES`] (transposed: `[dim][LANES]`), so keys and values are used as
//! they lie: scores Sᵀ = K·Qᵀ, then o += (Pᵀ)ᵀ·V, dq += (dSᵀ)ᵀ·K, dk += dSᵀ·Q and dv += Pᵀ·dO all have contiguous rows
//! on the right. Softmax runs down the keys, one lane a query row, without horizontal sums.
//!
//! Roofline: [`BLOCK`]·[`LANES`] products a step read BLOCK + LANES elements, from L1 or L2: bound by arithmetic.
//! An element of the result is always Σ_p in the order of p from zero, then added to the target: its bits do not
//! depend on the blocks around it.

use nsa_core::{DType, Real};
use std::ops::Range;

/// Rows of queries in a panel, columns of a block of the result: two vectors of f32 with 128-bit registers.
pub(crate) const LANES: usize = 8;

/// Rows of a block of the result: with LANES columns it leaves registers for the operands.
const BLOCK: usize = 4;

/// Columns of a block of one row: as many sums in flight as a block of BLOCK rows has.
const WIDE: usize = BLOCK * LANES;

/// Keys of a tile: with 128 dims a tile of K or V is 32 KiB in f32.
pub(crate) const KEYS: usize = 64;

/// The left operand `[M, K]` of a product.
#[derive(Clone, Copy)]
pub(crate) enum Left<'a, A> {
    /// Element (i, p) lies at i · stride + p.
    Rows {
        /// The elements.
        data: &'a [A],
        /// Distance between rows.
        stride: usize,
    },
    /// Element (i, p) lies at p · stride + i.
    Columns {
        /// The elements.
        data: &'a [A],
        /// Distance between columns.
        stride: usize,
    },
}

impl<'a, A: Real> Left<'a, A> {
    /// The same under the name of the concrete type.
    fn cast<B: Real>(self) -> Left<'a, B> {
        match self {
            Self::Rows { data, stride } => Left::Rows { data: bytemuck::cast_slice(data), stride },
            Self::Columns { data, stride } => Left::Columns { data: bytemuck::cast_slice(data), stride },
        }
    }
}

/// One kind of [`Left`], as the inner loop reads it.
trait Columns<A>: Copy {
    /// M elements from row i on of each of these columns, which are followed by another.
    fn columns<const M: usize>(&self, i: usize, columns: Range<usize>) -> impl Iterator<Item = [A; M]>;
    /// M elements from row i on of a column.
    fn column<const M: usize>(&self, i: usize, column: usize) -> [A; M];
}

/// [`Left::Rows`].
#[derive(Clone, Copy)]
struct ByRows<'a, A> {
    data: &'a [A],
    stride: usize,
}

impl<A: Real> Columns<A> for ByRows<'_, A> {
    #[inline(always)]
    fn columns<const M: usize>(&self, i: usize, columns: Range<usize>) -> impl Iterator<Item = [A; M]> {
        let len = columns.len();
        let rows: [&[A]; M] = std::array::from_fn(|x| &self.data[(i + x) * self.stride + columns.start..][..len]);
        (0..len).map(move |p| std::array::from_fn(|x| rows[x][p]))
    }

    #[inline(always)]
    fn column<const M: usize>(&self, i: usize, column: usize) -> [A; M] {
        std::array::from_fn(|x| self.data[(i + x) * self.stride + column])
    }
}

/// [`Left::Columns`].
#[derive(Clone, Copy)]
struct ByColumns<'a, A> {
    data: &'a [A],
    stride: usize,
}

impl<A: Real> Columns<A> for ByColumns<'_, A> {
    #[inline(always)]
    fn columns<const M: usize>(&self, i: usize, columns: Range<usize>) -> impl Iterator<Item = [A; M]> {
        part(self.data, self.stride, columns, i).copied()
    }

    #[inline(always)]
    fn column<const M: usize>(&self, i: usize, column: usize) -> [A; M] {
        *self.data[column * self.stride + i..].first_chunk().expect("M elements a column")
    }
}

/// N elements from place `at` on of each of these rows, which are followed by another: whole rows, so that the bounds
/// are checked once.
#[inline(always)]
fn part<A, const N: usize>(data: &[A], stride: usize, rows: Range<usize>, at: usize) -> impl Iterator<Item = &[A; N]> {
    let rows = data[rows.start * stride..rows.end * stride].chunks_exact(stride.max(1));
    rows.map(move |row| row[at..at + N].first_chunk().expect("N elements"))
}

/// The right operand `[K, N]`: element (p, j) lies at p · stride + j.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a, A> {
    /// The elements.
    pub(crate) data: &'a [A],
    /// Distance between rows.
    pub(crate) stride: usize,
}

impl<'a, A: Real> Right<'a, A> {
    /// The same under the name of the concrete type.
    fn cast<B: Real>(self) -> Right<'a, B> {
        Right { data: bytemuck::cast_slice(self.data), stride: self.stride }
    }
}

/// What happens to the target.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// It is overwritten.
    Write,
    /// The product is added.
    Add,
}

/// The target `[M, N]`: row i starts at `row(i)`.
pub(crate) struct Target<'a, A, F> {
    /// The elements.
    pub(crate) data: &'a mut [A],
    /// Start of a row.
    pub(crate) row: F,
    /// What happens to it.
    pub(crate) store: Store,
}

/// C[i, j] = or += Σ_p A[i, p]·B[p, j] for i < m, j < n and p in `steps(i)`. Elements of A and B outside the steps are
/// not read.
///
/// The loops are compiled once for f32 and once for f64, here, instead of at every call of every operation.
pub(crate) fn product<A: Real, F: Fn(usize) -> usize>(
    size: [usize; 2],
    left: Left<'_, A>,
    right: Right<'_, A>,
    target: Target<'_, A, F>,
    steps: impl Fn(usize) -> Range<usize>,
) {
    let Target { data, row, store } = target;
    if A::DTYPE == DType::F32 {
        let target = Target { data: bytemuck::cast_slice_mut(data), row: &row as RowStart<'_>, store };
        product_f32(size, left.cast(), right.cast(), target, &steps);
    } else {
        let target = Target { data: bytemuck::cast_slice_mut(data), row: &row as RowStart<'_>, store };
        product_f64(size, left.cast(), right.cast(), target, &steps);
    }
}

/// Start of a row of the target.
type RowStart<'a> = &'a dyn Fn(usize) -> usize;

/// Steps of a row.
type Steps<'a> = &'a dyn Fn(usize) -> Range<usize>;

fn product_f32(
    size: [usize; 2],
    left: Left<'_, f32>,
    right: Right<'_, f32>,
    target: Target<'_, f32, RowStart<'_>>,
    steps: Steps<'_>,
) {
    match left {
        Left::Rows { data, stride } => product_of(size, ByRows { data, stride }, right, target, steps),
        Left::Columns { data, stride } => product_of(size, ByColumns { data, stride }, right, target, steps),
    }
}

fn product_f64(
    size: [usize; 2],
    left: Left<'_, f64>,
    right: Right<'_, f64>,
    target: Target<'_, f64, RowStart<'_>>,
    steps: Steps<'_>,
) {
    match left {
        Left::Rows { data, stride } => product_of(size, ByRows { data, stride }, right, target, steps),
        Left::Columns { data, stride } => product_of(size, ByColumns { data, stride }, right, target, steps),
    }
}

/// A product, block by block.
fn product_of<A: Real, L: Columns<A>>(
    [m, n]: [usize; 2],
    left: L,
    right: Right<'_, A>,
    target: Target<'_, A, RowStart<'_>>,
    steps: Steps<'_>,
) {
    let mut i = 0;
    while i + BLOCK <= m {
        let block_steps = std::array::from_fn(|x| steps(i + x));
        let starts = std::array::from_fn(|x| (target.row)(i + x));
        let mut j = 0;
        while j + LANES <= n {
            block::<A, L, BLOCK, LANES>([i, j], left, right, (target.data, target.store), &starts, &block_steps);
            j += LANES;
        }
        for j in j..n {
            block::<A, L, BLOCK, 1>([i, j], left, right, (target.data, target.store), &starts, &block_steps);
        }
        i += BLOCK;
    }
    for i in i..m {
        let (row_steps, starts) = ([steps(i)], [(target.row)(i)]);
        let mut j = 0;
        while j + WIDE <= n {
            block::<A, L, 1, WIDE>([i, j], left, right, (target.data, target.store), &starts, &row_steps);
            j += WIDE;
        }
        while j + LANES <= n {
            block::<A, L, 1, LANES>([i, j], left, right, (target.data, target.store), &starts, &row_steps);
            j += LANES;
        }
        for j in j..n {
            block::<A, L, 1, 1>([i, j], left, right, (target.data, target.store), &starts, &row_steps);
        }
    }
}

/// Block (i.., j..) of a product, whose rows start at `starts` in the target. Steps that not all rows share are taken
/// one row at a time.
#[inline(always)]
fn block<A: Real, L: Columns<A>, const M: usize, const N: usize>(
    [i, j]: [usize; 2],
    left: L,
    right: Right<'_, A>,
    (target, store): (&mut [A], Store),
    starts: &[usize; M],
    steps: &[Range<usize>; M],
) {
    let start = steps.iter().map(|s| s.start).max().unwrap_or(0);
    let end = steps.iter().map(|s| s.end).min().unwrap_or(0);
    let mut sums = [[A::zero(); N]; M];
    if steps.iter().all(|s| (s.start, s.end) == (start, end)) {
        multiply(&mut sums, [i, j], left, right, start..end);
    } else {
        ragged(&mut sums, [i, j], left, right, start..end, steps);
    }
    for (sums, start) in sums.iter().zip(starts) {
        let row = &mut target[start + j..start + j + N];
        for y in 0..N {
            row[y] = if store == Store::Add { row[y] + sums[y] } else { sums[y] };
        }
    }
}

/// Adds up a block whose rows share the steps `common` alone, if any.
#[inline(never)]
fn ragged<A: Real, L: Columns<A>, const M: usize, const N: usize>(
    sums: &mut [[A; N]; M],
    [i, j]: [usize; 2],
    left: L,
    right: Right<'_, A>,
    common: Range<usize>,
    steps: &[Range<usize>; M],
) {
    // Without common steps, those before them are all there are.
    let common = if common.is_empty() { usize::MAX..usize::MAX } else { common };
    // A few steps at most, but where rows share none.
    let one = |x: usize, sums: &mut [A; N], steps: Range<usize>| {
        for p in steps {
            let [factor] = left.column(i + x, p);
            let row: &[A; N] = right.data[p * right.stride + j..].first_chunk().expect("N elements");
            for y in 0..N {
                sums[y] += factor * row[y];
            }
        }
    };
    for (x, (sums, s)) in sums.iter_mut().zip(steps).enumerate() {
        one(x, sums, s.start..common.start.min(s.end));
    }
    multiply(sums, [i, j], left, right, common.clone());
    for (x, (sums, s)) in sums.iter_mut().zip(steps).enumerate() {
        one(x, sums, common.end.min(s.end)..s.end);
    }
}

/// Adds Σ_p A[i.., p]·B[p, j..] over the steps: the inner loop, one rank-1 update a step. A function of its own with
/// sums of its own, so that they stay in registers whatever surrounds it.
#[inline(never)]
fn multiply<A: Real, L: Columns<A>, const M: usize, const N: usize>(
    result: &mut [[A; N]; M],
    [i, j]: [usize; 2],
    left: L,
    right: Right<'_, A>,
    steps: Range<usize>,
) {
    if steps.is_empty() {
        return;
    }
    let mut sums = *result;
    let mut step = |column: [A; M], row: &[A; N]| {
        for x in 0..M {
            for y in 0..N {
                sums[x][y] += column[x] * row[y];
            }
        }
    };
    let last = steps.end - 1;
    let rows = part(right.data, right.stride, steps.start..last, j);
    left.columns(i, steps.start..last).zip(rows).for_each(|(column, row)| step(column, row));
    step(left.column(i, last), right.data[last * right.stride + j..].first_chunk().expect("N elements"));
    *result = sums;
}

/// Packs rows `[rows, dim]` into panels `[⌈rows/LANES⌉][dim][LANES]`, the last filled up with zeros.
#[inline(always)]
pub(crate) fn pack<A: Real>(rows: &[A], dim: usize, panels: &mut [A]) {
    for (rows, panel) in rows.chunks(LANES * dim).zip(panels.chunks_exact_mut(LANES * dim)) {
        let columns = panel.as_chunks_mut::<LANES>().0;
        if rows.len() == LANES * dim {
            let lanes: [&[A]; LANES] = std::array::from_fn(|x| &rows[x * dim..][..dim]);
            for (p, column) in columns.iter_mut().enumerate() {
                *column = std::array::from_fn(|x| lanes[x][p]);
            }
        } else {
            columns.fill([A::zero(); LANES]);
            for (x, row) in rows.chunks_exact(dim).enumerate() {
                for (column, &value) in columns.iter_mut().zip(row) {
                    column[x] = value;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(i: usize) -> f64 {
        ((i * 7919 + 13) % 1009) as f64 / 101.0 - 5.0
    }

    /// Steps of row i that overlap with those of its neighbours in part, or not at all.
    fn steps(k: usize, kind: usize, i: usize) -> Range<usize> {
        match kind {
            0 => 0..k,
            1 => 0..(i + 1).min(k),
            2 => i.min(k)..(i + 3).min(k),
            _ if i.is_multiple_of(3) => 0..0,
            _ => k / 2..k,
        }
    }

    #[test]
    fn products_of_all_shapes_and_steps_equal_plain_loops_bit_for_bit() {
        for (m, n, k) in [(1, 1, 1), (4, 8, 5), (7, 43, 9), (13, 17, 3), (3, 70, 0)] {
            for kind in 0..4 {
                let a: Vec<f64> = (0..m * k).map(number).collect();
                let transposed: Vec<f64> = (0..m * k).map(|x| a[x % m * k + x / m]).collect();
                let b: Vec<f64> = (0..k * n).map(|x| number(x + 77)).collect();
                let right = Right { data: &b, stride: n };
                for left in [Left::Rows { data: &a, stride: k }, Left::Columns { data: &transposed, stride: m }] {
                    for store in [Store::Add, Store::Write] {
                        let mut c: Vec<f64> = (0..m * (n + 1)).map(|x| number(x + 5)).collect();
                        let mut expected = c.clone();
                        for i in 0..m {
                            for j in 0..n {
                                let sum = steps(k, kind, i).fold(0.0, |sum, p| sum + a[i * k + p] * b[p * n + j]);
                                let old = if store == Store::Add { expected[i * (n + 1) + j] } else { 0.0 };
                                expected[i * (n + 1) + j] = old + sum;
                            }
                        }
                        let target = Target { data: &mut c, row: |i| i * (n + 1), store };
                        product([m, n], left, right, target, |i| steps(k, kind, i));
                        assert_eq!(c, expected, "{m} {n} {k}, steps {kind}");
                    }
                }
            }
        }
    }

    #[test]
    fn panels_are_transposed_and_filled_up() {
        let (rows, dim) = (LANES + 3, 5);
        let data: Vec<f32> = (1..=rows * dim).map(|x| x as f32).collect();
        let mut panels = vec![f32::NAN; 2 * LANES * dim];
        pack(&data, dim, &mut panels);
        for r in 0..2 * LANES {
            for p in 0..dim {
                let expected = if r < rows { data[r * dim + p] } else { 0.0 };
                assert_eq!(panels[(r / LANES * dim + p) * LANES + r % LANES], expected);
            }
        }
    }
}
