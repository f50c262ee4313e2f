//! AdamW.

use super::par::{elements, lane_sum};
use crate::cpu::Cpu;
use crate::cpu::simd::{Loops, compiled_for};
use crate::layer::adamw::{Factors, Step};
use crate::{Result, Tensor};
use nsa_core::{Element, Real};
use rayon::prelude::*;

/// Parameters of one task, and of one partial sum of squares.
const BLOCK: usize = 1 << 14;

pub fn step<R: Real>(cpu: &Cpu, args: Step<'_, R>) -> Result<()> {
    let factors = Factors::<R>::new(&args);
    let grads = elements(args.grads.to_host()?);
    let (params, m, v) =
        (args.params.into_host()?.into_data(), args.m.into_host()?.into_data(), args.v.into_host()?.into_data());
    let update = |params: &mut [R], m: &mut [R], v: &mut [R], grads: &[R]| {
        compiled_for(cpu.isa(), Update { factors, params, m, v, grads });
    };
    if params.len() <= BLOCK {
        update(params, m, v, grads);
        return Ok(());
    }
    let states = params.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK));
    states.zip(grads.par_chunks(BLOCK)).for_each(|(((p, m), v), g)| update(p, m, v, g));
    Ok(())
}

struct Update<'a, R> {
    factors: Factors<R>,
    params: &'a mut [R],
    m: &'a mut [R],
    v: &'a mut [R],
    grads: &'a [R],
}

impl<R: Real> Loops for Update<'_, R> {
    #[inline(always)]
    fn run(self) {
        let Factors { rate, root, keep, eps, scale, old, new } = self.factors;
        for (((p, m), v), &g) in self.params.iter_mut().zip(self.m).zip(self.v).zip(self.grads) {
            let g = g * scale;
            *m = old[0] * *m + new[0] * g;
            *v = old[1] * *v + new[1] * g * g;
            *p = *p * keep - rate * *m / (v.sqrt() * root + eps);
        }
    }
}

pub fn sum_of_squares<R: Real>(cpu: &Cpu, grads: Tensor<'_, R, 1>) -> Result<f64> {
    let grads = elements(grads.to_host()?);
    let block = |grads: &[R]| {
        let mut sum = 0.0;
        compiled_for(cpu.isa(), Squares { grads, sum: &mut sum });
        sum
    };
    let sums: Vec<f64> = grads.par_chunks(BLOCK).map(block).collect();
    Ok(sums.iter().sum())
}

struct Squares<'a, R> {
    grads: &'a [R],
    sum: &'a mut f64,
}

impl<R: Real> Loops for Squares<'_, R> {
    #[inline(always)]
    fn run(self) {
        *self.sum = lane_sum(self.grads, self.grads, self.grads, |g, _, _| {
            let g = Element::to_f64(g);
            g * g
        });
    }
}
