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

use super::linear::Finish;
use crate::cpu::Cpu;
use crate::cpu::isa::Isa;
use crate::cpu::product::{Left, Product, Right, Steps, Store, Target, product};
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{Loops, PAD, compiled_for};
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
        cpu: &'p Cpu,
        [columns, sum]: [usize; 2],
        put: impl Fn(Range<usize>, Range<usize>, &mut [Pair<A>]) + Sync,
    ) -> Self {
        let units = sum.div_ceil(STEP);
        let ((blocks, depth), strips) = (blocks(units), columns.div_ceil(STRIP));
        let mut data = cpu.pool().take(blocks * strips * depth * STRIP);
        data.par_chunks_mut((depth * STRIP).max(1)).enumerate().for_each(|(i, strip)| {
            let (column, unit) = (i % strips * STRIP, i / strips * depth);
            put(column..(column + STRIP).min(columns), unit..(unit + depth).min(units), strip);
        });
        Self { data, columns, units, depth }
    }

    /// The transpose of a matrix `[N, K]`.
    pub(super) fn of_rows<E: Element<Acc = A>>(cpu: &'p Cpu, matrix: &View<'_, E, 2>) -> Self {
        // Units of a row that are put at a time: a cache line.
        const PIECE: usize = 16;
        let sum = matrix.shape()[1];
        Self::pack(cpu, matrix.shape(), |columns, units, strip| {
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
    pub(super) fn of_columns<E: Element<Acc = A>>(cpu: &'p Cpu, matrix: &View<'_, E, 2>) -> Self {
        let [sum, columns] = matrix.shape();
        Self::pack(cpu, [columns, sum], |columns, units, target| {
            compiled_for(cpu.isa(), Interleave { matrix: *matrix, columns, units, target });
        })
    }

    /// Elements of a strip's block, and blocks.
    fn sizes(&self) -> (usize, usize) {
        (self.depth * STRIP, blocks(self.units).0)
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
        for column in (0..self.columns).step_by(STRIP) {
            self.multiply_strip(isa, left, block_len, column, (&mut target[column..], starts), store);
        }
    }

    /// The same for the strip from a column on, which is the target's first.
    fn multiply_strip(
        &self,
        isa: Isa,
        left: Left<'_, Pair<A>>,
        block_len: usize,
        column: usize,
        (target, starts): (&mut [A], &[usize]),
        store: Store,
    ) {
        let (strips, (strip_len, blocks)) = (self.columns.div_ceil(STRIP), self.sizes());
        for block in 0..blocks {
            let count = self.depth.min(self.units - block * self.depth);
            let right = &self.data[(block * strips + column / STRIP) * strip_len..][..strip_len];
            product(
                isa,
                Product {
                    left: Left { data: &left.data[block * block_len..], ..left },
                    right: Right { data: right, stride: STRIP },
                    target: Target {
                        data: &mut *target,
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

/// Columns of a matrix in pairs of neighbouring rows: `[units, STRIP or fewer columns]`, rows of units as far apart as there
/// are columns, to whole vectors.
struct Interleave<'a, E, A: Real> {
    matrix: View<'a, E, 2>,
    columns: Range<usize>,
    units: Range<usize>,
    target: &'a mut [Pair<A>],
}

impl<E: Element> Loops for Interleave<'_, E, E::Acc> {
    #[inline(always)]
    fn run(self) {
        let (sum, zeros) = (self.matrix.shape()[0], [E::default(); STRIP]);
        let columns = self.columns.clone();
        let row = |k: usize| if k < sum { &self.matrix.row(k)[columns.clone()] } else { &zeros[..columns.len()] };
        for (unit, target) in self.units.zip(self.target.chunks_exact_mut(STRIP)) {
            Pair::put_rows(&[row(unit * STEP), row(unit * STEP + 1)], target);
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
    rows.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(6).min(TASK_ROWS)
}

/// Rows of a left operand, ready to be multiplied.
struct TaskRows<'p, A: Real> {
    buffer: Scratch<'p, Pair<A>>,
    rows: Range<usize>,
}

impl<'p, A: Real> TaskRows<'p, A> {
    fn new(cpu: &'p Cpu, rows: Range<usize>, units: usize) -> Self {
        Self { buffer: cpu.pool().take(rows.len() * units), rows }
    }

    /// Calls `multiply` with the rows of `matrix`.
    fn with<E: Element<Acc = A>>(
        &mut self,
        cpu: &Cpu,
        matrix: &View<'_, E, 2>,
        multiply: impl FnOnce(Left<'_, Pair<A>>),
    ) {
        let (data, stride) = left_rows(matrix, self.rows.clone(), &mut self.buffer);
        let starts = cpu.pool().multiples(self.rows.len(), stride);
        multiply(Left { data, rows: &starts, step: 1 });
    }
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
        let starts = cpu.pool().multiples(rows.len(), columns);
        TaskRows::new(cpu, rows, right.units).with(cpu, left, |left| {
            right.multiply(cpu.isa(), left, right.depth, (target, &starts), store);
        });
    });
}

/// target = or += left · right + bias, rounded: [`multiply`] where results are not stored as A.
pub(super) fn multiply_rounded<E, D>(
    cpu: &Cpu,
    left: &View<'_, E, 2>,
    right: &Strips<'_, E::Acc>,
    target: &mut [D],
    (bias, accumulate): (Option<&[E::Acc]>, bool),
) where
    E: Element,
    D: Element<Acc = E::Acc>,
{
    if target.is_empty() {
        return;
    }
    let (count, row_len) = (task_rows(left.shape()[0]), right.columns);
    target.par_chunks_mut(count * row_len).enumerate().for_each(|(i, target)| {
        let rows = i * count..i * count + target.len() / row_len;
        // A strip of results at a time, while they are near.
        let (mut sums, starts) = (cpu.pool().take(rows.len() * STRIP), cpu.pool().multiples(rows.len(), STRIP));
        TaskRows::new(cpu, rows, right.units).with(cpu, left, |left| {
            for column in (0..row_len).step_by(STRIP) {
                right.multiply_strip(cpu.isa(), left, right.depth, column, (&mut sums, &starts), Store::Write);
                let columns = column..(column + STRIP).min(row_len);
                let target = &mut *target;
                compiled_for(
                    cpu.isa(),
                    Finish { target, row_len, columns, sums: &sums, stride: STRIP, bias, accumulate },
                );
            }
        });
    });
}

/// Columns of a matrix `[K, M]` as a left operand whose sum runs over rows: `[blocks][panels][depth][PAD]`, panels to whole
/// strips.
fn panels<'p, G: Element>(cpu: &'p Cpu, source: &View<'_, G, 2>) -> Scratch<'p, Pair<G::Acc>> {
    let [sum, columns] = source.shape();
    let units = sum.div_ceil(STEP);
    let ((blocks, depth), strips) = (blocks(units), columns.div_ceil(STRIP));
    let mut data = cpu.pool().take(blocks * strips * depth * STRIP);
    data.par_chunks_mut((depth * STRIP).max(1)).enumerate().for_each(|(i, panels)| {
        let (column, row) = (i % strips * STRIP, i / strips * depth * STEP);
        let (rows, width) = (row..(row + depth * STEP).min(sum), STRIP.min(columns - column));
        if G::DTYPE == DType::Bf16 {
            let columns = column..column + width;
            compiled_for(cpu.isa(), Panels { matrix: *source, columns, rows, depth, panels });
        } else {
            let rows = results(source, rows);
            let shape = [rows.shape[0], width];
            Pair::round_panels(Results { data: &rows.data[column..], shape, ..rows }, depth, panels);
        }
    });
    data
}

/// Columns of a matrix in pairs of neighbouring rows, [`PAD`] columns after another: `[panels, depth, PAD]`.
struct Panels<'a, G, A: Real> {
    matrix: View<'a, G, 2>,
    columns: Range<usize>,
    rows: Range<usize>,
    depth: usize,
    panels: &'a mut [Pair<A>],
}

impl<G: Element> Loops for Panels<'_, G, G::Acc> {
    #[inline(always)]
    fn run(self) {
        let (columns, zeros) = (self.columns.clone(), [G::default(); STRIP]);
        for (unit, k) in self.rows.clone().step_by(STEP).enumerate() {
            let low = &self.matrix.row(k)[columns.clone()];
            let high =
                if k + 1 < self.rows.end { &self.matrix.row(k + 1)[columns.clone()] } else { &zeros[..low.len()] };
            let ((low, low_rest), (high, high_rest)) = (low.as_chunks::<PAD>(), high.as_chunks::<PAD>());
            let mut place = unit * PAD;
            for (low, high) in low.iter().zip(high) {
                Pair::put_rows(&[&low[..], &high[..]], &mut self.panels[place..place + PAD]);
                place += self.depth * PAD;
            }
            if !low_rest.is_empty() {
                Pair::put_rows(&[low_rest, high_rest], &mut self.panels[place..place + PAD]);
            }
        }
    }
}

/// dw += dyᵀ·x, with dy `[N, O]`, x `[N, I]`, dw `[O, I]`.
pub(super) fn add_outer<T, G>(cpu: &Cpu, dy: &View<'_, G, 2>, x: &View<'_, T, 2>, dw: &mut [T::Acc])
where
    T: Element,
    G: Element<Acc = T::Acc>,
{
    let ([n, outputs], [_, inputs]) = (dy.shape(), x.shape());
    if dw.is_empty() {
        return;
    }
    let (pool, count) = (cpu.pool(), task_rows(outputs));
    for start in (0..n).step_by(OUTER_ROWS) {
        let part = OUTER_ROWS.min(n - start);
        let strips = Strips::of_columns(cpu, &super::par::row_range(x, start, part));
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
