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
use crate::cpu::simd::{Compute, Loops, Simd, compiled_for, vectorize};
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
/// Rows of a block of the weight with at most [`VERY_FEW_ROWS`], and with more.
const BLOCK_ROWS: [usize; 2] = [64, 512];
/// Partial sums of [`Dots`]: four vectors of the widest instruction set, as many chains as keep it busy.
const DOT_LANES: usize = 64;
/// Elements of the weight that a task reads at least: fewer are done before another thread has woken up.
const TASK_ELEMENTS: usize = 1 << 16;

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
    let block = BLOCK_ROWS[usize::from(n > VERY_FEW_ROWS)];
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
    if n <= VERY_FEW_ROWS {
        if W::DTYPE == DType::Bf16 {
            let weight = Mat::rows(bytemuck::cast_slice(weight.data()), weight.layout().strides()[0]);
            return vectorize(cpu.isa(), Bf16Dots { weight, inputs, x, n, sums: columns, store });
        }
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

/// [`Dots`] of a weight in bf16, whose vectors are widened once for two rows of x. Left to the compiler, widening took twice
/// as long as reading; four rows at once were no faster than two by two.
struct Bf16Dots<'a, A> {
    weight: Mat<'a, bf16>,
    inputs: usize,
    x: Mat<'a, A>,
    n: usize,
    sums: &'a mut [A],
    store: Store,
}

/// Σ_i w_i·x_ni for N rows of x, each in two vectors of sums.
#[inline(always)]
fn bf16_dots<A: Real, S: Simd<A>, const N: usize>(s: S, w: &[bf16], x: [&[A]; N]) -> [A; N] {
    let mut parts = [[s.splat(A::zero()); 2]; N];
    let mut at = 0;
    while at + 2 * S::WIDTH <= w.len() {
        for half in 0..2 {
            let i = at + half * S::WIDTH;
            let w = s.read_bf16(&w[i..]);
            for n in 0..N {
                parts[n][half] = s.mul_add(w, s.read(&x[n][i..]), parts[n][half]);
            }
        }
        at += 2 * S::WIDTH;
    }
    std::array::from_fn(|n| {
        let rest: A = w[at..].iter().zip(&x[n][at..]).map(|(w, &x)| A::of(w.to_f64()) * x).sum();
        s.sum(s.add(parts[n][0], parts[n][1])) + rest
    })
}

impl<'a, A: Real> Compute<A> for Bf16Dots<'a, A> {
    type As<B: Real> = Bf16Dots<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        let Self { weight, inputs, x, n, sums, store } = self;
        let x = |n: usize| &x.data[n * x.row_stride..][..inputs];
        let put = |sum: &mut A, total: A| *sum = if store == Store::Add { *sum + total } else { total };
        for (o, sums) in sums.chunks_exact_mut(n).enumerate() {
            let w = &weight.data[o * weight.row_stride..][..inputs];
            let (pairs, last) = sums.as_chunks_mut::<2>();
            for (i, pair) in pairs.iter_mut().enumerate() {
                let totals = bf16_dots(s, w, [x(2 * i), x(2 * i + 1)]);
                pair.iter_mut().zip(totals).for_each(|(sum, total)| put(sum, total));
            }
            if let [last] = last {
                put(last, bf16_dots(s, w, [x(n - 1)])[0]);
            }
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
    // Rows of y that a task fills together: a cache line of f32 in each row of `columns`.
    const TASK_ROWS: usize = 16;
    if y.is_empty() {
        return;
    }
    let task = |(index, y): (usize, &mut [A])| {
        let start = index * TASK_ROWS;
        let rows = y.len() / outputs;
        for o in 0..outputs {
            for (i, &value) in columns[o * n + start..][..rows].iter().enumerate() {
                let y = &mut y[i * outputs + o];
                *y = if store == Store::Add { *y + value } else { value };
            }
        }
    };
    if y.len() <= TASK_ELEMENTS {
        y.chunks_mut(TASK_ROWS * outputs).enumerate().for_each(task);
    } else {
        y.par_chunks_mut(TASK_ROWS * outputs).enumerate().for_each(task);
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
