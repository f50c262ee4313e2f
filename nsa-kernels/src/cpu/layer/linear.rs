//! The linear layer.

use super::matmul::{add_outer, times, times_transposed};
use super::par::{as_acc_mut, for_rows, row_range};
use crate::Result;
use crate::cpu::gemm::Store;
use crate::layer::linear::{BackwardInput, BackwardWeight, Forward};
use nsa_core::{Element, View};

/// Rows whose results are kept in A before they are rounded, where outputs are not stored as A.
const CHUNK_ROWS: usize = 256;

pub fn forward<T, W>(args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (x, weight) = (args.x.to_host()?, args.weight.to_host()?);
    let bias = args.bias.map(|bias| bias.to_host()).transpose()?;
    let bias = bias.as_ref().map(|bias| &bias.data()[..bias.shape()[0]]);
    let ([n, _], [outputs, _]) = (x.shape(), weight.shape());
    let y = args.y.into_host()?.into_data();
    if let Some(y) = as_acc_mut(y) {
        let store = start_from_bias(y, outputs, bias, args.accumulate);
        times_transposed(&x, &weight, y, store);
        return Ok(());
    }
    let mut chunk = vec![T::Acc::default(); CHUNK_ROWS.min(n) * outputs];
    for start in (0..n).step_by(CHUNK_ROWS) {
        let rows = CHUNK_ROWS.min(n - start);
        let (sums, y) = (&mut chunk[..rows * outputs], &mut y[start * outputs..][..rows * outputs]);
        let store = start_from_bias(sums, outputs, bias, false);
        times_transposed(&row_range(&x, start, rows), &weight, sums, store);
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
fn start_from_bias<W: Element>(y: &mut [W::Acc], outputs: usize, bias: Option<&[W]>, accumulate: bool) -> Store {
    match (bias, accumulate) {
        (None, false) => return Store::Write,
        (None, true) => {}
        (Some(bias), false) => for_rows(y, outputs, |_, y| {
            for (y, bias) in y.iter_mut().zip(bias) {
                *y = bias.to_acc();
            }
        }),
        (Some(bias), true) => for_rows(y, outputs, |_, y| {
            for (y, bias) in y.iter_mut().zip(bias) {
                *y += bias.to_acc();
            }
        }),
    }
    Store::Add
}

pub fn backward_input<W: Element>(args: BackwardInput<'_, W>) -> Result<()> {
    let (dy, weight) = (args.dy.to_host()?, args.weight.to_host()?);
    let store = if args.accumulate { Store::Add } else { Store::Write };
    times(&dy, &weight, args.dx.into_host()?.into_data(), store);
    Ok(())
}

pub fn backward_weight<T: Element>(args: BackwardWeight<'_, T>) -> Result<()> {
    let (x, dy) = (args.x.to_host()?, args.dy.to_host()?);
    add_outer(&dy, &x, args.dw.into_host()?.into_data());
    if let Some(db) = args.db {
        add_column_sums(&dy, db.into_host()?.into_data());
    }
    Ok(())
}

/// sums_c += Σ_n x_nc.
fn add_column_sums<A: nsa_core::Real>(x: &View<'_, A, 2>, sums: &mut [A]) {
    for n in 0..x.shape()[0] {
        for (sum, &x) in sums.iter_mut().zip(x.row(n)) {
            *sum += x;
        }
    }
}
