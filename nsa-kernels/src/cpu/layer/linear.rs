//! The linear layer.

use super::matmul::{add_column_sums, add_outer, times, times_transposed};
use super::par::{Widened, as_acc_mut, for_rows, row_range};
use crate::Result;
use crate::cpu::gemm::Store;
use crate::cpu::scratch::Pool;
use crate::layer::linear::{BackwardInput, BackwardWeight, Forward};
use nsa_core::{Element, Real};

/// Rows whose results are kept in A before they are rounded, where outputs are not stored as A.
const CHUNK_ROWS: usize = 256;

pub fn forward<T, W>(pool: &Pool, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (x, weight) = (args.x.to_host()?, args.weight.to_host()?);
    let bias = args.bias.map(|bias| bias.to_host()).transpose()?.map(|bias| Widened::new(pool, bias));
    let bias = bias.as_deref();
    let ([n, _], [outputs, _]) = (x.shape(), weight.shape());
    let y = args.y.into_host()?.into_data();
    if let Some(y) = as_acc_mut(y) {
        let store = start_from_bias(y, outputs, bias, args.accumulate);
        times_transposed(pool, &x, &weight, y, store);
        return Ok(());
    }
    let mut chunk = pool.take(CHUNK_ROWS.min(n) * outputs);
    for start in (0..n).step_by(CHUNK_ROWS) {
        let rows = CHUNK_ROWS.min(n - start);
        let (sums, y) = (&mut chunk[..rows * outputs], &mut y[start * outputs..][..rows * outputs]);
        let store = start_from_bias(sums, outputs, bias, false);
        times_transposed(pool, &row_range(&x, start, rows), &weight, sums, store);
        let old = |y: T| if args.accumulate { y.to_acc() } else { T::Acc::default() };
        for_rows(y, outputs, |i, y| {
            for (y, &sum) in y.iter_mut().zip(&sums[i * outputs..]) {
                *y = T::from_acc(old(*y) + sum);
            }
        });
    }
    Ok(())
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

pub fn backward_input<W: Element>(pool: &Pool, args: BackwardInput<'_, W>) -> Result<()> {
    let (dy, weight) = (args.dy.to_host()?, args.weight.to_host()?);
    let store = if args.accumulate { Store::Add } else { Store::Write };
    times(pool, &dy, &weight, args.dx.into_host()?.into_data(), store);
    Ok(())
}

pub fn backward_weight<T: Element>(pool: &Pool, args: BackwardWeight<'_, T>) -> Result<()> {
    let (x, dy) = (args.x.to_host()?, args.dy.to_host()?);
    add_outer(pool, &dy, &x, args.dw.into_host()?.into_data());
    if let Some(db) = args.db {
        add_column_sums(&dy, db.into_host()?.into_data());
    }
    Ok(())
}
