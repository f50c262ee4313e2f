//! The linear layer.

use super::blocked::{self, Strips};
use super::matmul::{FEW_ROWS, add_column_sums, add_outer, times, times_transposed};
use super::par::{Widened, as_acc_mut, for_rows, row_range};
use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::gemm::Store;
use crate::layer::linear::{BackwardInput, BackwardWeight, Forward};
use nsa_core::{Element, Real};

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
        let strips = Strips::of_rows(pool, &weight);
        blocked::multiply_rounded(cpu, &x, &strips, y, |y, sums| finish(y, sums, bias, args.accumulate));
        return Ok(());
    }
    let mut chunk = pool.take(CHUNK_ROWS.min(n) * outputs);
    for start in (0..n).step_by(CHUNK_ROWS) {
        let rows = CHUNK_ROWS.min(n - start);
        let (sums, y) = (&mut chunk[..rows * outputs], &mut y[start * outputs..][..rows * outputs]);
        times_transposed(cpu, &row_range(&x, start, rows), &weight, sums, Store::Write);
        for_rows(y, outputs, |i, y| finish(y, &sums[i * outputs..][..outputs], bias, args.accumulate));
    }
    Ok(())
}

/// Rounds a row of sums with its bias, and with what `y` holds if they are added to it.
fn finish<T: Element>(y: &mut [T], sums: &[T::Acc], bias: Option<&[T::Acc]>, accumulate: bool) {
    let zero = T::Acc::default();
    let old = |y: T| if accumulate { y.to_acc() } else { zero };
    match bias {
        None => y.iter_mut().zip(sums).for_each(|(y, &sum)| *y = T::from_acc(old(*y) + sum)),
        Some(bias) => {
            let sums = sums.iter().zip(bias);
            y.iter_mut().zip(sums).for_each(|(y, (&sum, &bias))| *y = T::from_acc(old(*y) + (sum + bias)));
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

pub fn backward_input<W: Element>(cpu: &Cpu, args: BackwardInput<'_, W>) -> Result<()> {
    let (dy, weight) = (args.dy.to_host()?, args.weight.to_host()?);
    let store = if args.accumulate { Store::Add } else { Store::Write };
    times(cpu, &dy, &weight, args.dx.into_host()?.into_data(), store);
    Ok(())
}

pub fn backward_weight<T: Element>(cpu: &Cpu, args: BackwardWeight<'_, T>) -> Result<()> {
    let (x, dy) = (args.x.to_host()?, args.dy.to_host()?);
    add_outer(cpu, &dy, &x, args.dw.into_host()?.into_data());
    if let Some(db) = args.db {
        add_column_sums(&dy, db.into_host()?.into_data());
    }
    Ok(())
}
