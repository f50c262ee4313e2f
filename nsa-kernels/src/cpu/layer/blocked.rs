//! Products of large bf16 matrices on the micro-kernel, as pairs.
//!
//! The right operand is laid out once a call, in strips of 64 columns and blocks of [`DEPTH`] pairs along the sum:
//! 32 KiB, which stay in the first-level cache while a task's rows pass by. The left operand is taken where it lies if its
//! rows run along the sum, else in panels of one vector; f32 gradients are rounded to bf16 on the way. Tasks own rows of
//! the result and share nothing; an element is summed block by block, in an order that depends on the shape alone.
//!
//! Roofline: laying out a weight `[O, I]` moves O·I elements for 2·N·O·I FLOP; a strip of a block comes from the
//! second-level cache once for the 192 rows of a task, 384 FLOP a byte. Bound by arithmetic: on one core with
//! AVX-512 BF16 (peak 530 GFLOP/s), 4096 rows, 256 to 1024 channels: 365 to 475 GFLOP/s (the library's f32: 220 to 260 of
//! 265). In f32 the same code is slower than the library (180 to 230), so it is for pairs alone. Packed weights are not
//! kept: training uses each layout once a step, and laying it out takes about 3 % of the product.

use crate::cpu::Cpu;
use crate::cpu::isa::Isa;
use crate::cpu::product::{Left, Product, Right, Steps, Store, Target, product};
use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::simd::PAD;
use crate::cpu::unit::{Pair, Results, Unit};
use bytemuck::Zeroable;
use nsa_core::{DType, Element, Real, View};
use rayon::prelude::*;
use std::ops::Range;

/// Columns of a strip: the widest block of the micro-kernel.
const STRIP: usize = 64;
/// Elements of a unit.
const STEP: usize = 2;
/// Units of a block along the sum, at most.
const DEPTH: usize = 128;
/// Rows of the result of a task, at most: whole blocks of the micro-kernel. (With 96 a weight of 1024 × 1024, which the
/// second-level cache does not hold, is read too often: 425 instead of 474 GFLOP/s.)
const TASK_ROWS: usize = 192;
/// Rows whose outer products are added up at a time: what bounds the memory of both operands.
const OUTER_ROWS: usize = 2048;

/// A right operand `[K, N]` in strips: `[blocks][strips][depth][STRIP]`.
pub(super) struct Strips<'p, A: Real> {
    data: Scratch<'p, Pair<A>>,
    columns: usize,
    /// Pairs along the sum: in all, and of a block.
    units: usize,
    depth: usize,
}

/// Blocks of a sum of `units`, and units of each, evenly.
fn blocks(units: usize) -> (usize, usize) {
    let blocks = units.div_ceil(DEPTH).max(1);
    (blocks, units.div_ceil(blocks))
}

impl<'p, A: Real> Strips<'p, A> {
    /// Calls `put(columns, units, strip)` for each block of each strip.
    fn pack(
        pool: &'p Pool,
        [columns, sum]: [usize; 2],
        put: impl Fn(Range<usize>, Range<usize>, &mut [Pair<A>]) + Sync,
    ) -> Self {
        let units = sum.div_ceil(STEP);
        let ((blocks, depth), strips) = (blocks(units), columns.div_ceil(STRIP));
        let mut data = pool.take(blocks * strips * depth * STRIP);
        data.par_chunks_mut((depth * STRIP).max(1)).enumerate().for_each(|(i, strip)| {
            let (column, unit) = (i % strips * STRIP, i / strips * depth);
            put(column..(column + STRIP).min(columns), unit..(unit + depth).min(units), strip);
        });
        Self { data, columns, units, depth }
    }

    /// The transpose of a matrix `[N, K]`.
    pub(super) fn of_rows<E: Element<Acc = A>>(pool: &'p Pool, matrix: &View<'_, E, 2>) -> Self {
        // Units of a row that are put at a time: a cache line.
        const PIECE: usize = 16;
        let sum = matrix.shape()[1];
        Self::pack(pool, matrix.shape(), |columns, units, strip| {
            for (piece, strip) in units.clone().step_by(PIECE).zip(strip.chunks_mut(PIECE * STRIP)) {
                let elements = piece * STEP..((piece + PIECE).min(units.end) * STEP).min(sum);
                for (j, column) in columns.clone().enumerate() {
                    let (row, mut buffer) = (&matrix.row(column)[elements.clone()], [Pair::zeroed(); PIECE]);
                    Pair::put_row(row, &mut buffer);
                    for (place, &unit) in strip[j..].iter_mut().step_by(STRIP).zip(&buffer) {
                        *place = unit;
                    }
                }
            }
        })
    }

    /// A matrix `[K, N]`.
    pub(super) fn of_columns<E: Element<Acc = A>>(pool: &'p Pool, matrix: &View<'_, E, 2>) -> Self {
        let [sum, columns] = matrix.shape();
        Self::pack(pool, [columns, sum], |columns, units, strip| {
            let zeros = [E::default(); STRIP];
            let row = |k: usize| if k < sum { &matrix.row(k)[columns.clone()] } else { &zeros[..columns.len()] };
            for (unit, strip) in units.zip(strip.chunks_exact_mut(STRIP)) {
                let rows: [&[E]; STEP] = std::array::from_fn(|x| row(unit * STEP + x));
                Pair::put_rows(&rows[..STEP], strip);
            }
        })
    }

    /// target \[+\]= left · this, the left operand's blocks `block_len` units apart.
    fn multiply(
        &self,
        isa: Isa,
        left: Left<'_, Pair<A>>,
        block_len: usize,
        (target, starts): (&mut [A], &[usize]),
        store: Store,
    ) {
        let strips = self.columns.div_ceil(STRIP);
        for block in 0..blocks(self.units).0 {
            let count = self.depth.min(self.units - block * self.depth);
            for (strip, column) in (0..self.columns).step_by(STRIP).enumerate() {
                let right = &self.data[(block * strips + strip) * self.depth * STRIP..][..self.depth * STRIP];
                product(
                    isa,
                    Product {
                        left: Left { data: &left.data[block * block_len..], ..left },
                        right: Right { data: right, stride: STRIP },
                        target: Target {
                            data: &mut target[column..],
                            rows: starts,
                            store: if block == 0 { store } else { Store::Add },
                        },
                        columns: STRIP.min(self.columns - column),
                        steps: Steps::First(count * STEP),
                    },
                );
            }
        }
    }
}

/// Rows of a matrix as results to be rounded.
fn results<'a, E: Element>(matrix: &View<'a, E, 2>, rows: Range<usize>) -> Results<'a, E::Acc> {
    let (stride, [_, columns]) = (matrix.layout().strides()[0], matrix.shape());
    let data = crate::cpu::math::as_acc(matrix.data()).expect("what is rounded is in the accumulator's type");
    Results { data: &data[(rows.start * stride).min(data.len())..], stride, shape: [rows.len(), columns] }
}

/// Rows of a left operand `[M, K]` in units along the sum, and the distance between them: where they are, or in `buffer`.
fn left_rows<'a, E: Element>(
    matrix: &View<'a, E, 2>,
    rows: Range<usize>,
    buffer: &'a mut [Pair<E::Acc>],
) -> (&'a [Pair<E::Acc>], usize) {
    let (stride, [_, sum]) = (matrix.layout().strides()[0], matrix.shape());
    if E::DTYPE != DType::Bf16 {
        Pair::round_rows(results(matrix, rows), buffer);
        return (buffer, sum.div_ceil(STEP));
    }
    if stride.is_multiple_of(STEP) && sum.is_multiple_of(STEP) && !rows.is_empty() {
        let part = &matrix.data()[rows.start * stride..(rows.end - 1) * stride + sum];
        if let Some(units) = Pair::borrow(part) {
            return (units, stride / STEP);
        }
    }
    let width = sum.div_ceil(STEP);
    rows.zip(buffer.chunks_exact_mut(width.max(1))).for_each(|(i, units)| Pair::put_row(matrix.row(i), units));
    (buffer, width)
}

/// Rows of a result that make a task. No bit depends on their number.
fn task_rows(rows: usize) -> usize {
    rows.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(12).min(TASK_ROWS)
}

/// Calls `put(rows, multiply)` for the rows of each task; `multiply(sums, store)` adds their product to `sums`.
fn task<E: Element>(
    cpu: &Cpu,
    left: &View<'_, E, 2>,
    right: &Strips<'_, E::Acc>,
    rows: Range<usize>,
    (sums, store): (&mut [E::Acc], Store),
) {
    let pool = cpu.pool();
    let mut buffer = pool.take(rows.len() * right.units);
    let (data, stride) = left_rows(left, rows.clone(), &mut buffer);
    let (starts, targets) = (pool.multiples(rows.len(), stride), pool.multiples(rows.len(), right.columns));
    let left = Left { data, rows: &starts, step: 1 };
    right.multiply(cpu.isa(), left, right.depth, (sums, &targets), store);
}

/// target \[+\]= left · right, left `[M, K]` and target `[M, N]`.
pub(super) fn multiply<E: Element>(
    cpu: &Cpu,
    left: &View<'_, E, 2>,
    right: &Strips<'_, E::Acc>,
    target: &mut [E::Acc],
    store: Store,
) {
    if target.is_empty() {
        return;
    }
    let (count, columns) = (task_rows(left.shape()[0]), right.columns);
    target.par_chunks_mut(count * columns).enumerate().for_each(|(i, target)| {
        let rows = i * count..i * count + target.len() / columns;
        task(cpu, left, right, rows, (target, store));
    });
}

/// Calls `round(row of target, row of left · right)` for each row: [`multiply`] where results are not stored as A.
pub(super) fn multiply_rounded<E: Element>(
    cpu: &Cpu,
    left: &View<'_, E, 2>,
    right: &Strips<'_, E::Acc>,
    target: &mut [E],
    round: impl Fn(&mut [E], &[E::Acc]) + Sync,
) {
    if target.is_empty() {
        return;
    }
    let (count, columns) = (task_rows(left.shape()[0]), right.columns);
    target.par_chunks_mut(count * columns).enumerate().for_each(|(i, target)| {
        let rows = i * count..i * count + target.len() / columns;
        let mut sums = cpu.pool().take(target.len());
        task(cpu, left, right, rows, (&mut sums, Store::Write));
        target.chunks_exact_mut(columns).zip(sums.chunks_exact(columns)).for_each(|(y, sums)| round(y, sums));
    });
}

/// Results `[K, M]` as a left operand whose sum runs over rows: `[blocks][panels][depth][PAD]`, panels to whole strips.
fn panels<'p, A: Real>(cpu: &'p Cpu, source: &View<'_, A, 2>) -> Scratch<'p, Pair<A>> {
    let [sum, columns] = source.shape();
    let units = sum.div_ceil(STEP);
    let ((blocks, depth), strips) = (blocks(units), columns.div_ceil(STRIP));
    let mut data = cpu.pool().take(blocks * strips * depth * STRIP);
    data.par_chunks_mut((depth * STRIP).max(1)).enumerate().for_each(|(i, panels)| {
        let (column, row) = (i % strips * STRIP, i / strips * depth * STEP);
        let rows = results(source, row..(row + depth * STEP).min(sum));
        let shape = [rows.shape[0], STRIP.min(columns - column)];
        Pair::round_panels(Results { data: &rows.data[column..], shape, ..rows }, depth, panels);
    });
    data
}

/// dw += dyᵀ·x, with dy `[N, O]`, x `[N, I]`, dw `[O, I]`.
pub(super) fn add_outer<T: Element>(cpu: &Cpu, dy: &View<'_, T::Acc, 2>, x: &View<'_, T, 2>, dw: &mut [T::Acc]) {
    let ([n, outputs], [_, inputs]) = (dy.shape(), x.shape());
    if dw.is_empty() {
        return;
    }
    let (pool, count) = (cpu.pool(), task_rows(outputs));
    for start in (0..n).step_by(OUTER_ROWS) {
        let part = OUTER_ROWS.min(n - start);
        let strips = Strips::of_columns(pool, &super::par::row_range(x, start, part));
        let panels = panels(cpu, &super::par::row_range(dy, start, part));
        let panel_len = strips.depth * PAD;
        let block_len = outputs.div_ceil(STRIP) * STRIP * strips.depth;
        dw.par_chunks_mut(count * inputs).enumerate().for_each(|(i, dw)| {
            let rows = dw.len() / inputs;
            let (mut starts, targets) = (pool.take(rows), pool.multiples(rows, inputs));
            let first = i * count;
            starts.iter_mut().enumerate().for_each(|(i, start)| {
                *start = (first + i) / PAD * panel_len + (first + i) % PAD;
            });
            let left = Left { data: &panels, rows: &starts, step: PAD };
            strips.multiply(cpu.isa(), left, block_len, (dw, &targets), Store::Add);
        });
    }
}
