//! The linear layer.

use super::blocked::{self, Strips};
use super::matmul::{FEW_ROWS, add_column_sums, add_outer, pairs, times, times_transposed};
use super::par::{Widened, as_acc_mut, for_rows, row_range};
use crate::cpu::Cpu;
use crate::cpu::gemm::Store;
use crate::cpu::simd::{Loops, compiled_for};
use crate::layer::linear::{BackwardInput, BackwardWeight, Forward, Product};
use crate::{Result, Tensor};
use nsa_core::{Element, Real};
use std::ops::Range;

/// Rows whose results are kept in A before they are rounded, where outputs are not stored as A.
const CHUNK_ROWS: usize = 256;

pub fn forward<T, W>(cpu: &Cpu, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (pool, x, weight) = (cpu.pool(), args.x.to_host()?, args.weight.to_host()?);
    let bias = args.bias.map(|bias| bias.to_host()).transpose()?.map(|bias| Widened::new(pool, bias));
    let bias = bias.as_deref();
    let ([n, _], [outputs, _]) = (x.shape(), weight.shape());
    let y = args.y.into_host()?.into_data();
    if let Some(y) = as_acc_mut(y) {
        let store = start_from_bias(y, outputs, bias, args.accumulate);
        times_transposed(cpu, &x, &weight, y, store);
        return Ok(());
    }
    if n > FEW_ROWS && cpu.multiplies_pairs(T::DTYPE) && cpu.multiplies_pairs(W::DTYPE) {
        let strips = Strips::of_rows(cpu, &weight);
        blocked::multiply_rounded(cpu, &x, &strips, y, (bias, args.accumulate));
        return Ok(());
    }
    in_chunks(cpu, y, outputs, (bias, args.accumulate), |rows, sums| {
        times_transposed(cpu, &row_range(&x, rows.start, rows.len()), &weight, sums, Store::Write);
    });
    Ok(())
}

pub fn forward_all<T, W>(cpu: &Cpu, x: Tensor<'_, T, 2>, products: Vec<Product<'_, T, W>>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    in_groups(cpu, x, products, rayon::current_num_threads())
}

/// Layers one after the other in each of so many groups, whose weights are of about the same size: tasks for small layers cost more
/// than they gain.
fn in_groups<T, W>(cpu: &Cpu, x: Tensor<'_, T, 2>, mut products: Vec<Product<'_, T, W>>, groups: usize) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    if groups < 2 || products.len() < 2 {
        let one = |Product { weight, y }| forward(cpu, Forward { x, weight, bias: None, y, accumulate: false });
        return products.into_iter().try_for_each(one);
    }
    let sizes = products.iter().map(|product| product.weight.shape()[0]);
    let half = sizes.clone().sum::<usize>() / 2;
    let before = sizes.scan(0, |sum, size| Some(std::mem::replace(sum, *sum + size)));
    let middle = before.take_while(|&sum| sum <= half).count().clamp(1, products.len() - 1);
    let rest = products.split_off(middle);
    let halves = [groups.div_ceil(2), groups / 2];
    let (first, second) = rayon::join(|| in_groups(cpu, x, products, halves[0]), || in_groups(cpu, x, rest, halves[1]));
    first.and(second)
}

/// Has rows of a product written to sums, some at a time, and rounds these.
fn in_chunks<T: Element>(
    cpu: &Cpu,
    y: &mut [T],
    columns: usize,
    (bias, accumulate): (Option<&[T::Acc]>, bool),
    product: impl Fn(Range<usize>, &mut [T::Acc]),
) {
    if y.is_empty() {
        return;
    }
    let mut chunk = cpu.pool().take(CHUNK_ROWS.min(y.len() / columns) * columns);
    for (i, y) in y.chunks_mut(CHUNK_ROWS * columns).enumerate() {
        let (start, sums) = (i * CHUNK_ROWS, &mut chunk[..y.len()]);
        product(start..start + y.len() / columns, sums);
        for_rows(y, columns, |i, target| {
            let (sums, stride) = (&sums[i * columns..][..columns], columns);
            let finish = Finish { target, row_len: columns, columns: 0..columns, sums, stride, bias, accumulate };
            compiled_for(cpu.isa(), finish);
        });
    }
}

/// Rounds some columns of rows of sums with their bias, and with what `target` holds if they are added to it.
pub(super) struct Finish<'a, T: Element> {
    /// Whole rows.
    pub(super) target: &'a mut [T],
    pub(super) row_len: usize,
    /// Those that there are sums of.
    pub(super) columns: Range<usize>,
    /// Rows `stride` apart.
    pub(super) sums: &'a [T::Acc],
    pub(super) stride: usize,
    /// Of whole rows.
    pub(super) bias: Option<&'a [T::Acc]>,
    pub(super) accumulate: bool,
}

impl<T: Element> Loops for Finish<'_, T> {
    #[inline(always)]
    fn run(self) {
        let Self { target, row_len, columns, sums, stride, bias, accumulate } = self;
        for (y, sums) in target.chunks_exact_mut(row_len).zip(sums.chunks(stride)) {
            let row = y[columns.clone()].iter_mut().zip(sums);
            match (bias.map(|bias| &bias[columns.clone()]), accumulate) {
                (None, false) => row.for_each(|(y, &sum)| *y = T::from_acc(sum)),
                (None, true) => row.for_each(|(y, &sum)| *y = T::from_acc(y.to_acc() + sum)),
                (Some(bias), false) => row.zip(bias).for_each(|((y, &sum), &bias)| *y = T::from_acc(sum + bias)),
                (Some(bias), true) => {
                    row.zip(bias).for_each(|((y, &sum), &bias)| *y = T::from_acc(y.to_acc() + (sum + bias)));
                }
            }
        }
    }
}

/// Puts the bias into `y` and says how the product joins it.
fn start_from_bias<A: Real>(y: &mut [A], outputs: usize, bias: Option<&[A]>, accumulate: bool) -> Store {
    match (bias, accumulate) {
        (None, false) => return Store::Write,
        (None, true) => {}
        (Some(bias), false) => for_rows(y, outputs, |_, y| y.copy_from_slice(bias)),
        (Some(bias), true) => for_rows(y, outputs, |_, y| {
            for (y, &bias) in y.iter_mut().zip(bias) {
                *y += bias;
            }
        }),
    }
    Store::Add
}

pub fn backward_input<W, G, D>(cpu: &Cpu, args: BackwardInput<'_, W, G, D>) -> Result<()>
where
    W: Element,
    G: Element<Acc = W::Acc>,
    D: Element<Acc = W::Acc>,
{
    let (dy, weight, accumulate) = (args.dy.to_host()?, args.weight.to_host()?, args.accumulate);
    let (dx, inputs) = (args.dx.into_host()?.into_data(), weight.shape()[1]);
    if let Some(dx) = as_acc_mut(dx) {
        times(cpu, &dy, &weight, dx, if accumulate { Store::Add } else { Store::Write });
    } else if pairs::<G>(cpu, W::DTYPE) {
        let strips = Strips::of_columns(cpu, &weight);
        blocked::multiply_rounded(cpu, &dy, &strips, dx, (None, accumulate));
    } else {
        in_chunks(cpu, dx, inputs, (None, accumulate), |rows, sums| {
            times(cpu, &row_range(&dy, rows.start, rows.len()), &weight, sums, Store::Write);
        });
    }
    Ok(())
}

pub fn backward_weight<T, G>(cpu: &Cpu, args: BackwardWeight<'_, T, G>) -> Result<()>
where
    T: Element,
    G: Element<Acc = T::Acc>,
{
    let (x, dy) = (args.x.to_host()?, args.dy.to_host()?);
    add_outer(cpu, &dy, &x, args.dw.into_host()?.into_data());
    if let Some(db) = args.db {
        add_column_sums(cpu, &dy, db.into_host()?.into_data());
    }
    Ok(())
}
