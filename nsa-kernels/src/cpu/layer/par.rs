//! Loops over the rows of outputs, split among threads where that pays.

use nsa_core::{Element, View};
use rayon::prelude::*;

/// Elements that a task has at least: fewer are done before another thread has woken up.
const TASK_ELEMENTS: usize = 1 << 14;

/// Rows of `row_len` elements that make a task.
fn rows_per_task(row_len: usize) -> usize {
    TASK_ELEMENTS.div_ceil(row_len.max(1))
}

/// Calls `f(i, row i)` for each row of a row-major output.
pub fn for_rows<T: Send>(out: &mut [T], row_len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if out.is_empty() {
        return;
    }
    let rows = rows_per_task(row_len);
    let task = |(index, chunk): (usize, &mut [T])| {
        for (i, row) in chunk.chunks_exact_mut(row_len).enumerate() {
            f(index * rows + i, row);
        }
    };
    if out.len() <= rows * row_len {
        task((0, out));
    } else {
        out.par_chunks_mut(rows * row_len).enumerate().for_each(task);
    }
}

/// Calls `f(i, row i of a, row i of b)` for each row of two row-major outputs with the same number of rows.
pub fn for_rows2<T: Send, U: Send>(
    (a, a_len): (&mut [T], usize),
    (b, b_len): (&mut [U], usize),
    f: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    if a.is_empty() || b.is_empty() {
        return;
    }
    let rows = rows_per_task(a_len + b_len);
    let task = |(index, (a, b)): (usize, (&mut [T], &mut [U]))| {
        for (i, (a, b)) in a.chunks_exact_mut(a_len).zip(b.chunks_exact_mut(b_len)).enumerate() {
            f(index * rows + i, a, b);
        }
    };
    if a.len() <= rows * a_len {
        task((0, (a, b)));
    } else {
        a.par_chunks_mut(rows * a_len).zip(b.par_chunks_mut(rows * b_len)).enumerate().for_each(task);
    }
}

/// The elements as A, if they are stored as A: nothing to convert.
pub fn as_acc<T: Element>(data: &[T]) -> Option<&[T::Acc]> {
    (T::DTYPE == T::Acc::DTYPE).then(|| bytemuck::cast_slice(data))
}

/// [`as_acc`] of writable elements.
pub fn as_acc_mut<T: Element>(data: &mut [T]) -> Option<&mut [T::Acc]> {
    (T::DTYPE == T::Acc::DTYPE).then(|| bytemuck::cast_slice_mut(data))
}

/// Widens elements to A.
pub fn widen<T: Element>(source: &[T], target: &mut [T::Acc]) {
    for (target, &source) in target.iter_mut().zip(source) {
        *target = source.to_acc();
    }
}

/// The rows `start..start + rows` of a view.
pub fn row_range<'a, T>(view: &View<'a, T, 2>, start: usize, rows: usize) -> View<'a, T, 2> {
    let (layout, [_, cols]) = (view.layout(), view.shape());
    let strides = layout.strides();
    let offset = (start * strides[0]).min(view.data().len());
    let part = nsa_core::view::Strided::new([rows, cols], strides).expect("part of a legal layout");
    View::with_layout(&view.data()[offset..], part).expect("rows of the view")
}
