//! RMSNorm.

use super::par::{for_rows, for_rows2};
use crate::Result;
use crate::layer::rmsnorm::{Backward, Forward};
use nsa_core::{Element, Real};
use num_traits::Float;
use rayon::prelude::*;

/// Partial sums of dw that are kept at most.
const MAX_BLOCKS: usize = 64;
/// Rows that a partial sum of dw covers at least.
const MIN_BLOCK_ROWS: usize = 64;

pub fn forward<T, W>(args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (x, weight) = (args.x.to_host()?, args.weight.to_host()?);
    let channels = x.shape()[1];
    let weight: Vec<T::Acc> = weight.data()[..channels].iter().map(|w| w.to_acc()).collect();
    let eps = T::Acc::of(args.eps);
    let normalise = |n: usize, y: &mut [T]| {
        let x = x.row(n);
        let rstd = (sum(x.iter().map(|x| x.to_acc() * x.to_acc())) / T::Acc::of(channels as f64) + eps).sqrt().recip();
        for ((y, x), &w) in y.iter_mut().zip(x).zip(&weight) {
            *y = T::from_acc(x.to_acc() * rstd * w);
        }
        rstd
    };
    let y = args.y.into_host()?.into_data();
    match args.rstd {
        None => for_rows(y, channels, |n, y| {
            normalise(n, y);
        }),
        Some(rstd) => {
            let rstd = rstd.into_host()?.into_data();
            for_rows2((y, channels), (rstd, 1), |n, y, rstd| rstd[0] = normalise(n, y));
        }
    }
    Ok(())
}

pub fn backward<T, W>(args: Backward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (x, dy, rstd) = (args.x.to_host()?, args.dy.to_host()?, args.rstd.to_host()?);
    let [n, channels] = x.shape();
    let weight = args.weight.to_host()?;
    let weight: Vec<T::Acc> = weight.data()[..channels].iter().map(|w| w.to_acc()).collect();
    let (dx, dw) = (args.dx.into_host()?.into_data(), args.dw.into_host()?.into_data());
    let block = MIN_BLOCK_ROWS.max(n.div_ceil(MAX_BLOCKS));
    let mut partial = vec![T::Acc::default(); n.div_ceil(block) * channels];
    let task = |(index, (dx, dw)): (usize, (&mut [T::Acc], &mut [T::Acc]))| {
        for (i, dx) in dx.chunks_exact_mut(channels).enumerate() {
            let n = index * block + i;
            let (x, dy, r) = (x.row(n), dy.row(n), rstd.data()[n]);
            let dot = sum((0..channels).map(|c| dy[c] * weight[c] * x[c].to_acc()));
            let factor = r * r * r * dot / T::Acc::of(channels as f64);
            for c in 0..channels {
                let x = x[c].to_acc();
                let old = if args.accumulate { dx[c] } else { T::Acc::default() };
                dx[c] = old + (r * dy[c] * weight[c] - factor * x);
                dw[c] += dy[c] * x * r;
            }
        }
    };
    dx.par_chunks_mut(block * channels).zip(partial.par_chunks_mut(channels)).enumerate().for_each(task);
    for partial in partial.chunks_exact(channels) {
        for (dw, &part) in dw.iter_mut().zip(partial) {
            *dw += part;
        }
    }
    Ok(())
}

fn sum<A: Real>(terms: impl Iterator<Item = A>) -> A {
    terms.sum()
}
