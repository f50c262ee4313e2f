//! The three products of a linear layer on views of any element type, with sums in A.
//!
//! What is not stored as A is widened in panels to scratch, so that extra memory does not grow with the matrices.

use super::par::{as_acc, for_rows, row_range, widen};
use crate::cpu::gemm::{Mat, MatMut, Store, Threads, gemm};
use nsa_core::{Element, View};
use num_traits::One;

/// Elements of a panel of widened weights: as A in f32 1 MiB, which the second-level cache holds.
const PANEL_ELEMENTS: usize = 1 << 18;

/// Calls `f` with each panel of rows of `matrix` as (first row, rows, elements as A, row stride).
fn for_panels<T: Element>(matrix: &View<'_, T, 2>, mut f: impl FnMut(usize, usize, &[T::Acc], usize)) {
    let [rows, cols] = matrix.shape();
    if let Some(data) = as_acc(matrix.data()) {
        return f(0, rows, data, matrix.layout().strides()[0]);
    }
    let panel_rows = (PANEL_ELEMENTS / cols.max(1)).clamp(1, rows.max(1));
    let mut panel = vec![T::Acc::default(); panel_rows * cols];
    for start in (0..rows).step_by(panel_rows) {
        let rows = panel_rows.min(rows - start);
        for_rows(&mut panel[..rows * cols], cols, |i, row| widen(matrix.row(start + i), row));
        f(start, rows, &panel[..rows * cols], cols);
    }
}

/// y \[+\]= x·Wᵀ, with x `[N, I]`, W `[O, I]`, y `[N, O]`.
pub fn times_transposed<T, W>(x: &View<'_, T, 2>, weight: &View<'_, W, 2>, y: &mut [T::Acc], store: Store)
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let ([_, inputs], [outputs, _]) = (x.shape(), weight.shape());
    for_panels(x, |x_start, n, x, x_stride| {
        for_panels(weight, |w_start, o, w, w_stride| {
            let y = MatMut::rows(&mut y[x_start * outputs..][..n * outputs], outputs).columns_from(w_start);
            let (x, w) = (Mat::rows(x, x_stride), Mat::rows(w, w_stride).transposed());
            gemm([n, o, inputs], y, store, T::Acc::one(), x, w, Threads::Pool);
        });
    });
}

/// dx \[+\]= dy·W, with dy `[N, O]`, W `[O, I]`, dx `[N, I]`.
pub fn times<W: Element>(dy: &View<'_, W::Acc, 2>, weight: &View<'_, W, 2>, dx: &mut [W::Acc], store: Store) {
    let ([n, outputs], [_, inputs]) = (dy.shape(), weight.shape());
    if outputs == 0 && store == Store::Write {
        dx.fill(W::Acc::default());
    }
    for_panels(weight, |start, o, w, w_stride| {
        let dy = Mat::rows(dy.data(), dy.layout().strides()[0]).columns_from(start);
        let store = if start == 0 { store } else { Store::Add };
        let dx = MatMut::rows(dx, inputs);
        gemm([n, inputs, o], dx, store, W::Acc::one(), dy, Mat::rows(w, w_stride), Threads::Pool);
    });
}

/// dw += dyᵀ·x, with dy `[N, O]`, x `[N, I]`, dw `[O, I]`.
pub fn add_outer<T: Element>(dy: &View<'_, T::Acc, 2>, x: &View<'_, T, 2>, dw: &mut [T::Acc]) {
    let ([_, outputs], [_, inputs]) = (dy.shape(), x.shape());
    for_panels(x, |start, n, x, x_stride| {
        let dy = row_range(dy, start, n);
        let dy = Mat::rows(dy.data(), dy.layout().strides()[0]).transposed();
        let dw = MatMut::rows(dw, inputs);
        gemm([outputs, inputs, n], dw, Store::Add, T::Acc::one(), dy, Mat::rows(x, x_stride), Threads::Pool);
    });
}
