//! Loops over the rows of outputs, split among threads where that pays, and sums in a fixed order.

use crate::cpu::math::{as_acc, widen};
use crate::cpu::scratch::{Pool, Scratch};
use nsa_core::view::Strided;
use nsa_core::{Element, Real, View};
use rayon::prelude::*;

/// Elements that a task has at least: fewer are done before another thread has woken up.
const TASK_ELEMENTS: usize = 1 << 14;
/// Partial sums over rows that are kept at most.
const MAX_BLOCKS: usize = 64;
/// Rows that a partial sum covers at least.
const MIN_BLOCK_ROWS: usize = 64;
/// Partial sums that a long sum runs in, so that additions do not wait for each other: two vectors of the widest
/// instruction set.
pub const LANES: usize = 32;

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

/// sums_c += Σ_n (what `f(n, row n of out, partial sums)` adds to the partial sums), for rows of `out` and sums of given
/// lengths: partial sums cover blocks of rows whose size depends on the number of rows alone, and are added in order.
pub fn sum_over_rows<A: Real>(
    pool: &Pool,
    (out, row_len): (&mut [A], usize),
    sums: &mut [A],
    f: impl Fn(usize, &mut [A], &mut [A]) + Sync,
) {
    if out.is_empty() || sums.is_empty() {
        return;
    }
    let rows = out.len() / row_len;
    let block = MIN_BLOCK_ROWS.max(rows.div_ceil(MAX_BLOCKS));
    let mut partial = pool.zeroed(rows.div_ceil(block) * sums.len());
    let task = |(index, (out, partial)): (usize, (&mut [A], &mut [A]))| {
        for (i, row) in out.chunks_exact_mut(row_len).enumerate() {
            f(index * block + i, row, partial);
        }
    };
    if rows <= block {
        task((0, (out, &mut partial)));
    } else {
        out.par_chunks_mut(block * row_len).zip(partial.par_chunks_mut(sums.len())).enumerate().for_each(task);
    }
    for partial in partial.chunks_exact(sums.len()) {
        for (sum, &part) in sums.iter_mut().zip(partial) {
            *sum += part;
        }
    }
}

/// Σ of `f` over triples of elements, in [`LANES`] partial sums.
#[inline(always)]
pub fn lane_sum<A: Real, T: Copy, U: Copy, V: Copy>(a: &[T], b: &[U], c: &[V], f: impl Fn(T, U, V) -> A) -> A {
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let (c, c_rest) = c.as_chunks::<LANES>();
    let mut lanes = [A::zero(); LANES];
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for lane in 0..LANES {
            lanes[lane] += f(a[lane], b[lane], c[lane]);
        }
    }
    let rest: A = a_rest.iter().zip(b_rest).zip(c_rest).map(|((&a, &b), &c)| f(a, b, c)).sum();
    lane_total(lanes) + rest
}

/// The sum of partial sums.
#[inline(always)]
pub fn lane_total<A: Real>(mut lanes: [A; LANES]) -> A {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The elements as A, if they are stored as A.
pub fn as_acc_mut<T: Element>(data: &mut [T]) -> Option<&mut [T::Acc]> {
    (T::DTYPE == T::Acc::DTYPE).then(|| bytemuck::cast_slice_mut(data))
}

/// A vector as A: where it lies, or widened.
pub enum Widened<'a, 'p, A> {
    InPlace(&'a [A]),
    Scratch(Scratch<'p, A>),
}

impl<'a, 'p, A: Real> Widened<'a, 'p, A> {
    pub fn new<T: Element<Acc = A>>(pool: &'p Pool, vector: View<'a, T, 1>) -> Self {
        let data = elements(vector);
        if let Some(data) = as_acc(data) {
            return Self::InPlace(data);
        }
        let mut scratch = pool.take(data.len());
        widen(data, &mut scratch);
        Self::Scratch(scratch)
    }
}

impl<A: Real> std::ops::Deref for Widened<'_, '_, A> {
    type Target = [A];

    fn deref(&self) -> &[A] {
        match self {
            Self::InPlace(data) => data,
            Self::Scratch(scratch) => scratch,
        }
    }
}

/// The elements of a vector.
pub fn elements<'a, T>(vector: View<'a, T, 1>) -> &'a [T] {
    &vector.data()[..vector.shape()[0]]
}

/// The rows `start..start + rows` of a view.
pub fn row_range<'a, T>(view: &View<'a, T, 2>, start: usize, rows: usize) -> View<'a, T, 2> {
    let (strides, [_, cols]) = (view.layout().strides(), view.shape());
    let offset = (start * strides[0]).min(view.data().len());
    let part = Strided::new([rows, cols], strides).expect("part of a legal layout");
    View::with_layout(&view.data()[offset..], part).expect("rows of the view")
}
