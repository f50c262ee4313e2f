//! RMSNorm. Bound by memory: forward reads and writes each element once, backward reads three and writes one.

use super::par::{Widened, elements, for_rows, for_rows2, lane_sum, sum_over_rows};
use crate::Result;
use crate::cpu::scratch::Pool;
use crate::layer::rmsnorm::{Backward, Forward};
use nsa_core::{Element, Real};
use num_traits::Float;

pub fn forward<T, W>(pool: &Pool, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (x, weight) = (args.x.to_host()?, Widened::new(pool, args.weight.to_host()?));
    let channels = x.shape()[1];
    let (count, eps) = (T::Acc::of(channels as f64), T::Acc::of(args.eps));
    let normalise = |n: usize, y: &mut [T]| {
        let x = x.row(n);
        let squares = lane_sum(x, x, x, |x, _, _| x.to_acc() * x.to_acc());
        let rstd = (squares / count + eps).sqrt().recip();
        for ((y, x), &w) in y.iter_mut().zip(x).zip(weight.iter()) {
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

pub fn backward<T, W>(pool: &Pool, args: Backward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (x, dy, rstd) = (args.x.to_host()?, args.dy.to_host()?, elements(args.rstd.to_host()?));
    let weight = Widened::new(pool, args.weight.to_host()?);
    let channels = x.shape()[1];
    let count = T::Acc::of(channels as f64);
    let (dx, dw) = (args.dx.into_host()?.into_data(), args.dw.into_host()?.into_data());
    sum_over_rows(pool, (dx, channels), dw, |n, dx, dw| {
        let (x, dy, weight, r) = (&x.row(n)[..channels], &dy.row(n)[..channels], &weight[..channels], rstd[n]);
        let (dx, dw) = (&mut dx[..channels], &mut dw[..channels]);
        let dot = lane_sum(dy, weight, x, |dy, w, x| dy * w * x.to_acc());
        let factor = r * r * r * dot / count;
        let mut row = |keep: fn(T::Acc) -> T::Acc| {
            for c in 0..channels {
                let x = x[c].to_acc();
                dx[c] = keep(dx[c]) + (r * dy[c] * weight[c] - factor * x);
                dw[c] += dy[c] * x * r;
            }
        };
        if args.accumulate { row(|old| old) } else { row(|_| T::Acc::default()) }
    });
    Ok(())
}
