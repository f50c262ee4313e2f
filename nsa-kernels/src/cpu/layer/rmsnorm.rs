//! RMSNorm. Bound by memory: forward reads and writes each element once, backward reads three and writes one.

use super::par::{Widened, elements, for_rows, for_rows2, lane_sum, sum_over_rows};
use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::simd::{Loops, compiled_for};
use crate::layer::rmsnorm::{Backward, Forward};
use nsa_core::{Element, Real};
use num_traits::Float;

pub fn forward<T, W>(cpu: &Cpu, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (x, weight) = (args.x.to_host()?, Widened::new(cpu.pool(), args.weight.to_host()?));
    let (channels, eps) = (x.shape()[1], T::Acc::of(args.eps));
    let normalise = |n: usize, y: &mut [T], rstd: &mut T::Acc| {
        compiled_for(cpu.isa(), ForwardRow { x: x.row(n), weight: &weight, eps, y, rstd });
    };
    let y = args.y.into_host()?.into_data();
    match args.rstd {
        None => for_rows(y, channels, |n, y| normalise(n, y, &mut T::Acc::default())),
        Some(rstd) => {
            let rstd = rstd.into_host()?.into_data();
            for_rows2((y, channels), (rstd, 1), |n, y, rstd| normalise(n, y, &mut rstd[0]));
        }
    }
    Ok(())
}

struct ForwardRow<'a, T: Element> {
    x: &'a [T],
    weight: &'a [T::Acc],
    eps: T::Acc,
    y: &'a mut [T],
    rstd: &'a mut T::Acc,
}

impl<T: Element> Loops for ForwardRow<'_, T> {
    #[inline(always)]
    fn run(self) {
        let Self { x, weight, eps, y, rstd } = self;
        let squares = lane_sum(x, x, x, |x, _, _| x.to_acc() * x.to_acc());
        let r = (squares / T::Acc::of(x.len() as f64) + eps).sqrt().recip();
        for ((y, x), &w) in y.iter_mut().zip(x).zip(weight) {
            *y = T::from_acc(x.to_acc() * r * w);
        }
        *rstd = r;
    }
}

pub fn backward<T, W>(cpu: &Cpu, args: Backward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (x, dy, rstd) = (args.x.to_host()?, args.dy.to_host()?, elements(args.rstd.to_host()?));
    let weight = Widened::new(cpu.pool(), args.weight.to_host()?);
    let channels = x.shape()[1];
    let (dx, dw) = (args.dx.into_host()?.into_data(), args.dw.into_host()?.into_data());
    sum_over_rows(cpu.pool(), (dx, channels), dw, |n, dx, dw| {
        let (x, dy, weight) = (x.row(n), dy.row(n), &weight[..]);
        let row = BackwardRow { x, dy, weight, rstd: rstd[n], dx, accumulate: args.accumulate, dw };
        compiled_for(cpu.isa(), row);
    });
    Ok(())
}

struct BackwardRow<'a, T: Element> {
    x: &'a [T],
    dy: &'a [T::Acc],
    weight: &'a [T::Acc],
    rstd: T::Acc,
    dx: &'a mut [T::Acc],
    accumulate: bool,
    dw: &'a mut [T::Acc],
}

impl<T: Element> Loops for BackwardRow<'_, T> {
    #[inline(always)]
    fn run(self) {
        let channels = self.x.len();
        let (dy, weight, r) = (&self.dy[..channels], &self.weight[..channels], self.rstd);
        let (x, dx, dw) = (self.x, &mut self.dx[..channels], &mut self.dw[..channels]);
        let dot = lane_sum(dy, weight, x, |dy, w, x| dy * w * x.to_acc());
        let factor = r * r * r * dot / T::Acc::of(channels as f64);
        if !self.accumulate {
            dx.fill(T::Acc::default());
        }
        for c in 0..channels {
            let x = x[c].to_acc();
            dx[c] += r * dy[c] * weight[c] - factor * x;
            dw[c] += dy[c] * x * r;
        }
    }
}
