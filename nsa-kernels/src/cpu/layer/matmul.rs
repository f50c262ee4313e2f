//! The three products of a linear layer on views of any element type, with sums in A.
//!
//! Matrices of bf16 are multiplied in pairs where the processor can ([`blocked`]). Otherwise, what is not stored as A is
//! widened in panels to scratch, so that extra memory does not grow with the matrices.
//!
//! Measured on 2 cores with AVX-512 (peak 234 GFLOP/s), 4096 rows, 256 to 768 channels, f32: 180 to 190 GFLOP/s in all
//! three directions. The library packs a row-major weight before the first product, on one thread; with few rows this
//! takes longer than the products (a 64 MiB weight: 26 ms for 2 rows, 46 ms for 128). Blocks of the weight against a
//! column-major output need no packing: 2 ms (memory speed) and 25 ms.

use super::blocked::{self, Strips};
use super::par::{LANES, for_rows, lane_total, row_range};
use crate::cpu::Cpu;
use crate::cpu::gemm::{Mat, MatMut, Store, Threads, gemm};
use crate::cpu::math::{as_acc, widen};
use crate::cpu::scratch::Pool;
use crate::cpu::simd::{Compute, Loops, PAD, Simd, compiled_for, prefetch_line, vectorize};
use half::bf16;
use nsa_core::{DType, Element, Real, View};
use num_traits::{One, Zero};
use rayon::prelude::*;

/// Elements of a panel of widened weights: as A in f32 512 KiB, half of a second-level cache.
const PANEL_ELEMENTS: usize = 1 << 17;
/// Up to this many rows the weight is taken in blocks against a column-major output.
pub const FEW_ROWS: usize = 256;
/// Up to this many rows sums run along rows of the weight: the library's, where the weight is stored as A, or [`Dots`].
const VERY_FEW_ROWS: usize = 4;
/// Rows of a block of the weight with at most [`VERY_FEW_ROWS`] or in bf16, and with more.
const BLOCK_ROWS: [usize; 2] = [32, 512];
/// Partial sums of [`Dots`]: four vectors of the widest instruction set, as many chains as keep it busy.
const DOT_LANES: usize = 64;
/// Elements of the weight that a task reads at least: fewer are done before another thread has woken up.
const TASK_ELEMENTS: usize = 1 << 15;

/// Calls `f` with each panel of rows of `matrix` as (first row, rows, elements as A, row stride).
fn for_panels<T: Element>(pool: &Pool, matrix: &View<'_, T, 2>, mut f: impl FnMut(usize, usize, &[T::Acc], usize)) {
    let [rows, cols] = matrix.shape();
    if let Some(data) = as_acc(matrix.data()) {
        return f(0, rows, data, matrix.layout().strides()[0]);
    }
    let panel_rows = (PANEL_ELEMENTS / cols.max(1)).clamp(1, rows.max(1));
    let mut panel = pool.take(panel_rows * cols);
    for start in (0..rows).step_by(panel_rows) {
        let rows = panel_rows.min(rows - start);
        for_rows(&mut panel[..rows * cols], cols, |i, row| widen(matrix.row(start + i), row));
        f(start, rows, &panel[..rows * cols], cols);
    }
}

/// y \[+\]= x·Wᵀ, with x `[N, I]`, W `[O, I]`, y `[N, O]`.
pub fn times_transposed<T, W>(cpu: &Cpu, x: &View<'_, T, 2>, weight: &View<'_, W, 2>, y: &mut [T::Acc], store: Store)
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (pool, [n, inputs], [outputs, _]) = (cpu.pool(), x.shape(), weight.shape());
    if n <= FEW_ROWS {
        return match as_acc(x.data()) {
            Some(data) => few_rows(cpu, n, Mat::rows(data, x.layout().strides()[0]), weight, y, store),
            None => {
                let mut wide = pool.take(n * inputs);
                for_rows(&mut wide, inputs, |i, row| widen(x.row(i), row));
                few_rows(cpu, n, Mat::rows(&wide, inputs), weight, y, store);
            }
        };
    }
    if cpu.multiplies_pairs(T::DTYPE) && cpu.multiplies_pairs(W::DTYPE) {
        return blocked::multiply(cpu, x, &Strips::of_rows(cpu, weight), y, store.into());
    }
    for_panels(pool, x, |x_start, n, x, x_stride| {
        for_panels(pool, weight, |w_start, o, w, w_stride| {
            let y = MatMut::rows(&mut y[x_start * outputs..][..n * outputs], outputs).columns_from(w_start);
            let (x, w) = (Mat::rows(x, x_stride), Mat::rows(w, w_stride).transposed());
            gemm([n, o, inputs], y, store, T::Acc::one(), x, w, Threads::Pool);
        });
    });
}

/// [`times_transposed`] with at most [`FEW_ROWS`] rows: every element of the weight is read once.
fn few_rows<W: Element>(
    cpu: &Cpu,
    n: usize,
    x: Mat<'_, W::Acc>,
    weight: &View<'_, W, 2>,
    y: &mut [W::Acc],
    store: Store,
) {
    if n <= 1 {
        return column_major(cpu, n, x, weight, y, store);
    }
    let outputs = weight.shape()[0];
    let mut columns = cpu.pool().take(n * outputs);
    column_major(cpu, n, x, weight, &mut columns, Store::Write);
    add_transposed(&columns, [n, outputs], y, store);
}

/// yᵀ \[+\]= W·xᵀ, with yᵀ `[O, N]`: tasks over rows of the weight own parts of it.
fn column_major<W: Element>(
    cpu: &Cpu,
    n: usize,
    x: Mat<'_, W::Acc>,
    weight: &View<'_, W, 2>,
    columns: &mut [W::Acc],
    store: Store,
) {
    if columns.is_empty() {
        return;
    }
    let inputs = weight.shape()[1];
    let block = BLOCK_ROWS[usize::from(n > VERY_FEW_ROWS && W::DTYPE != DType::Bf16)];
    let task_rows = TASK_ELEMENTS.div_ceil(inputs.max(1)).next_multiple_of(block);
    let task = |(index, columns): (usize, &mut [W::Acc])| {
        for (i, columns) in columns.chunks_mut(block * n).enumerate() {
            let weight = row_range(weight, index * task_rows + i * block, columns.len() / n);
            weight_block(cpu, n, x, &weight, columns, store);
        }
    };
    if columns.len() <= task_rows * n {
        task((0, columns));
    } else {
        columns.par_chunks_mut(task_rows * n).enumerate().for_each(task);
    }
}

/// [`column_major`] for one block of the weight, on the calling thread.
fn weight_block<W: Element>(
    cpu: &Cpu,
    n: usize,
    x: Mat<'_, W::Acc>,
    weight: &View<'_, W, 2>,
    columns: &mut [W::Acc],
    store: Store,
) {
    let [rows, inputs] = weight.shape();
    let mut product = |w: Mat<'_, W::Acc>, start: usize, len: usize, store| {
        let columns = MatMut::rows(columns, n).transposed();
        gemm([n, rows, len], columns, store, W::Acc::one(), x.columns_from(start), w.transposed(), Threads::One);
    };
    if let Some(data) = as_acc(weight.data()) {
        return product(Mat::rows(data, weight.layout().strides()[0]), 0, inputs, store);
    }
    if W::DTYPE == DType::Bf16 {
        let weight = Mat::rows(bytemuck::cast_slice(weight.data()), weight.layout().strides()[0]);
        return vectorize(cpu.isa(), Bf16Dots { weight, inputs, x, n, sums: columns, store });
    }
    // Without inputs there is no panel either.
    if n <= VERY_FEW_ROWS || inputs == 0 {
        return compiled_for(cpu.isa(), Dots { weight: *weight, x, n, sums: columns, store });
    }
    let width = (PANEL_ELEMENTS / rows).min(inputs.max(1));
    let mut panel = cpu.pool().take(rows * width);
    for start in (0..inputs).step_by(width) {
        let len = width.min(inputs - start);
        for (row, panel) in panel.chunks_exact_mut(len).take(rows).enumerate() {
            widen(&weight.row(row)[start..start + len], panel);
        }
        product(Mat::rows(&panel, len), start, len, if start == 0 { store } else { Store::Add });
    }
}

/// sums_on \[+\]= Σ_i w_oi·x_ni for a block of rows of the weight and at most [`VERY_FEW_ROWS`] rows of x.
struct Dots<'a, W: Element> {
    weight: View<'a, W, 2>,
    x: Mat<'a, W::Acc>,
    n: usize,
    sums: &'a mut [W::Acc],
    store: Store,
}

impl<W: Element> Loops for Dots<'_, W> {
    #[inline(always)]
    fn run(self) {
        for (o, sums) in self.sums.chunks_exact_mut(self.n).enumerate() {
            let w = self.weight.row(o);
            for (n, sum) in sums.iter_mut().enumerate() {
                let total = dot(w, &self.x.data[n * self.x.row_stride..][..w.len()]);
                *sum = if self.store == Store::Add { *sum + total } else { total };
            }
        }
    }
}

/// sums_on \[+\]= Σ_i w_oi·x_ni for a block of rows of a weight in bf16. The first rows of x read the weight from memory, row
/// by row, and ask for it some lines ahead; the next ones find it in the second-level cache and take several of its rows
/// at once, each vector of which is widened once for some rows of x. (Several rows at once from memory are slower: 20
/// against 31 GB/s where one stream of reads reaches 35.)
struct Bf16Dots<'a, A> {
    weight: Mat<'a, bf16>,
    inputs: usize,
    x: Mat<'a, A>,
    n: usize,
    sums: &'a mut [A],
    store: Store,
}

/// Bytes of a weight that are asked for ahead.
const AHEAD_BYTES: usize = 4096;

impl<A: Real> Bf16Dots<'_, A> {
    /// All rows, NR rows of x at a time, with OR rows of the weight where it is near.
    #[inline(always)]
    fn blocks<S: Simd<A>, const OR: usize, const NR: usize>(&mut self, s: S) {
        if self.n == 1 {
            // One chain of additions would wait for itself.
            return self.rows::<S, 1, 1, 2>(s, 0);
        }
        if self.n < NR {
            return self.last_rows::<S, 1, NR>(s, 0);
        }
        self.rows::<S, 1, NR, 1>(s, 0);
        let mut n = NR;
        while n + NR <= self.n {
            self.rows::<S, OR, NR, 1>(s, n);
            n += NR;
        }
        self.last_rows::<S, OR, NR>(s, n);
    }

    /// The rows of x from n on, fewer than NR.
    #[inline(always)]
    fn last_rows<S: Simd<A>, const OR: usize, const NR: usize>(&mut self, s: S, n: usize) {
        match self.n - n {
            3 if NR > 3 => self.rows::<S, OR, 3, 1>(s, n),
            2 if NR > 2 => self.rows::<S, OR, 2, 1>(s, n),
            1 => self.rows::<S, OR, 1, 1>(s, n),
            _ => {}
        }
    }

    /// NR rows of x from n on against all rows of the weight.
    #[inline(always)]
    fn rows<S: Simd<A>, const OR: usize, const NR: usize, const PARTS: usize>(&mut self, s: S, n: usize) {
        let outputs = self.sums.len() / self.n;
        let mut o = 0;
        while o + OR <= outputs {
            self.block::<S, OR, NR, PARTS>(s, o, n);
            o += OR;
        }
        while o < outputs {
            self.block::<S, 1, NR, PARTS>(s, o, n);
            o += 1;
        }
    }

    /// OR rows of the weight and NR of x, each sum in PARTS vectors.
    #[inline(always)]
    fn block<S: Simd<A>, const OR: usize, const NR: usize, const PARTS: usize>(&mut self, s: S, o: usize, n: usize) {
        let (count, inputs) = (self.inputs / PAD, self.inputs);
        let (mut w, mut x) = ([&[][..]; OR], [&[][..]; NR]);
        for (i, w) in w.iter_mut().enumerate() {
            *w = &self.weight.data[(o + i) * self.weight.row_stride..][..inputs];
        }
        for (i, x) in x.iter_mut().enumerate() {
            *x = &self.x.data[(n + i) * self.x.row_stride..][..inputs];
        }
        let (mut whole_w, mut whole_x) = ([&[][..]; OR], [&[][..]; NR]);
        for (whole, w) in whole_w.iter_mut().zip(w) {
            *whole = &w.as_chunks::<PAD>().0[..count];
        }
        for (whole, x) in whole_x.iter_mut().zip(x) {
            *whole = &x.as_chunks::<PAD>().0[..count];
        }
        let mut parts = [[[s.splat(A::zero()); NR]; OR]; PARTS];
        // Steps of PARTS chunks, the rest of which goes to the first part.
        let steps = count / PARTS * PARTS;
        for c in (0..steps).step_by(PARTS) {
            if OR == 1 && n == 0 && (PARTS > 1 || c % 2 == 0) {
                prefetch_line(w[0].as_ptr().cast::<u8>().wrapping_add(c * PAD * size_of::<bf16>() + AHEAD_BYTES));
            }
            for (part, sums) in parts.iter_mut().enumerate() {
                add_chunk(s, &whole_w, &whole_x, c + part, sums);
            }
        }
        for c in steps..count {
            add_chunk(s, &whole_w, &whole_x, c, &mut parts[0]);
        }
        for i in 0..OR {
            for j in 0..NR {
                let mut sum = parts[0][i][j];
                for part in &parts[1..] {
                    sum = s.add(sum, part[i][j]);
                }
                let mut total = s.sum(sum);
                for (w, &x) in w[i][count * PAD..].iter().zip(&x[j][count * PAD..]) {
                    total += A::of(w.to_f64()) * x;
                }
                let place = &mut self.sums[(o + i) * self.n + n + j];
                *place = if self.store == Store::Add { *place + total } else { total };
            }
        }
    }
}

/// Adds the products of chunk c of some rows.
#[inline(always)]
fn add_chunk<A: Real, S: Simd<A>, const OR: usize, const NR: usize>(
    s: S,
    w: &[&[[bf16; PAD]]; OR],
    x: &[&[[A; PAD]]; NR],
    c: usize,
    sums: &mut [[S::V; NR]; OR],
) {
    for at in (0..PAD).step_by(S::WIDTH) {
        let mut vectors = [s.splat(A::zero()); NR];
        for (vector, x) in vectors.iter_mut().zip(x) {
            *vector = s.read(&x[c][at..]);
        }
        for (sums, w) in sums.iter_mut().zip(w) {
            let w = s.read_bf16(&w[c][at..]);
            for (sum, x) in sums.iter_mut().zip(vectors) {
                *sum = s.mul_add(w, x, *sum);
            }
        }
    }
}

impl<'a, A: Real> Compute<A> for Bf16Dots<'a, A> {
    type As<B: Real> = Bf16Dots<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(mut self, s: S) {
        // Known when compiled: as many sums as the instruction set has registers for.
        match S::BLOCK[1] {
            4 => self.blocks::<S, 4, 4>(s),
            2 => self.blocks::<S, 2, 4>(s),
            _ => self.blocks::<S, 2, 2>(s),
        }
    }

    fn cast<B: Real>(self) -> Bf16Dots<'a, B> {
        let Self { weight, inputs, x, n, sums, store } = self;
        let x = Mat { data: bytemuck::cast_slice(x.data), row_stride: x.row_stride, col_stride: x.col_stride };
        Bf16Dots { weight, inputs, x, n, sums: bytemuck::cast_slice_mut(sums), store }
    }
}

/// Σ_i w_i·x_i in [`DOT_LANES`] partial sums. Rows of x after the first find the weight's row in the nearest cache.
#[inline(always)]
fn dot<W: Element>(w: &[W], x: &[W::Acc]) -> W::Acc {
    let ((w, w_rest), (x, x_rest)) = (w.as_chunks::<DOT_LANES>(), x.as_chunks::<DOT_LANES>());
    let mut sums = [W::Acc::zero(); DOT_LANES];
    for (w, x) in w.iter().zip(x) {
        for lane in 0..DOT_LANES {
            sums[lane] += w[lane].to_acc() * x[lane];
        }
    }
    let mut total = [W::Acc::zero(); LANES];
    for part in sums.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            total[lane] += part[lane];
        }
    }
    let rest: W::Acc = w_rest.iter().zip(x_rest).map(|(w, &x)| w.to_acc() * x).sum();
    lane_total(total) + rest
}

/// y \[+\]= columnsᵀ, with columns `[O, N]` and y `[N, O]`.
fn add_transposed<A: Real>(columns: &[A], [n, outputs]: [usize; 2], y: &mut [A], store: Store) {
    // Rows of y that a task fills together at most: a cache line of f32 in each row of `columns`.
    const TASK_ROWS: usize = 16;
    if y.is_empty() {
        return;
    }
    let rows = n.div_ceil(rayon::current_num_threads()).clamp(1, TASK_ROWS);
    let task = |(index, y): (usize, &mut [A])| {
        let start = index * rows;
        let rows = y.len() / outputs;
        for o in 0..outputs {
            for (i, &value) in columns[o * n + start..][..rows].iter().enumerate() {
                let y = &mut y[i * outputs + o];
                *y = if store == Store::Add { *y + value } else { value };
            }
        }
    };
    if y.len() <= TASK_ELEMENTS {
        y.chunks_mut(rows * outputs).enumerate().for_each(task);
    } else {
        y.par_chunks_mut(rows * outputs).enumerate().for_each(task);
    }
}

/// Whether gradients of type G are multiplied with matrices of `dtype` as pairs.
pub fn pairs<G: Element>(cpu: &Cpu, dtype: DType) -> bool {
    cpu.multiplies_pairs(dtype) && (G::DTYPE == DType::Bf16 || G::DTYPE == G::Acc::DTYPE)
}

/// dx \[+\]= dy·W, with dy `[N, O]`, W `[O, I]`, dx `[N, I]`.
pub fn times<W, G>(cpu: &Cpu, dy: &View<'_, G, 2>, weight: &View<'_, W, 2>, dx: &mut [W::Acc], store: Store)
where
    W: Element,
    G: Element<Acc = W::Acc>,
{
    let (pool, [_, outputs], [_, inputs]) = (cpu.pool(), dy.shape(), weight.shape());
    if pairs::<G>(cpu, W::DTYPE) {
        return blocked::multiply(cpu, dy, &Strips::of_columns(cpu, weight), dx, store.into());
    }
    if outputs == 0 && store == Store::Write {
        dx.fill(W::Acc::default());
    }
    for_panels(pool, dy, |dy_start, n, dy, dy_stride| {
        for_panels(pool, weight, |w_start, o, w, w_stride| {
            let dy = Mat::rows(dy, dy_stride).columns_from(w_start);
            let store = if w_start == 0 { store } else { Store::Add };
            let dx = MatMut::rows(&mut dx[dy_start * inputs..][..n * inputs], inputs);
            gemm([n, inputs, o], dx, store, W::Acc::one(), dy, Mat::rows(w, w_stride), Threads::Pool);
        });
    });
}

/// dw += dyᵀ·x, with dy `[N, O]`, x `[N, I]`, dw `[O, I]`.
pub fn add_outer<T, G>(cpu: &Cpu, dy: &View<'_, G, 2>, x: &View<'_, T, 2>, dw: &mut [T::Acc])
where
    T: Element,
    G: Element<Acc = T::Acc>,
{
    let (pool, [_, outputs], [_, inputs]) = (cpu.pool(), dy.shape(), x.shape());
    if pairs::<G>(cpu, T::DTYPE) {
        return blocked::add_outer(cpu, dy, x, dw);
    }
    for_panels(pool, x, |x_start, n, x, x_stride| {
        for_panels(pool, &row_range(dy, x_start, n), |start, n, dy, dy_stride| {
            let (dy, x) = (Mat::rows(dy, dy_stride).transposed(), Mat::rows(&x[start * x_stride..], x_stride));
            gemm([outputs, inputs, n], MatMut::rows(dw, inputs), Store::Add, T::Acc::one(), dy, x, Threads::Pool);
        });
    });
}

/// sums_o += Σ_n dy_no: the product with a row of ones.
pub fn add_column_sums<G: Element>(cpu: &Cpu, dy: &View<'_, G, 2>, sums: &mut [G::Acc]) {
    let outputs = dy.shape()[1];
    let ones = Mat { data: &[G::Acc::one()], row_stride: 0, col_stride: 0 };
    for_panels(cpu.pool(), dy, |_, n, dy, stride| {
        let (sums, dy) = (MatMut::rows(sums, outputs), Mat::rows(dy, stride));
        gemm([1, outputs, n], sums, Store::Add, G::Acc::one(), ones, dy, Threads::Pool);
    });
}
