//! AdamW.

use super::par::{elements, lane_sum};
use crate::layer::adamw::{AdamW, Step};
use crate::{Result, Tensor};
use nsa_core::{Element, Real};
use rayon::prelude::*;

/// Parameters of one task, and of one partial sum of squares.
const BLOCK: usize = 1 << 14;

pub fn step<R: Real>(args: Step<'_, R>) -> Result<()> {
    let grads = elements(args.grads.to_host()?);
    let (params, m, v) =
        (args.params.into_host()?.into_data(), args.m.into_host()?.into_data(), args.v.into_host()?.into_data());
    let AdamW { lr, beta1, beta2, eps, weight_decay } = args.config;
    // β₁ᵗ with t beyond i32 is 0 anyhow.
    let t = i32::try_from(args.step).unwrap_or(i32::MAX);
    let rate = R::of(lr / (1.0 - beta1.powi(t)));
    let root = R::of((1.0 - beta2.powi(t)).sqrt().recip());
    let (keep, eps, scale) = (R::of(1.0 - lr * weight_decay), R::of(eps), R::of(args.grad_scale));
    let (b1, b2, c1, c2) = (R::of(beta1), R::of(beta2), R::of(1.0 - beta1), R::of(1.0 - beta2));
    let update = |params: &mut [R], m: &mut [R], v: &mut [R], grads: &[R]| {
        for (((p, m), v), &g) in params.iter_mut().zip(m).zip(v).zip(grads) {
            let g = g * scale;
            *m = b1 * *m + c1 * g;
            *v = b2 * *v + c2 * g * g;
            *p = *p * keep - rate * *m / (v.sqrt() * root + eps);
        }
    };
    if params.len() <= BLOCK {
        update(params, m, v, grads);
        return Ok(());
    }
    let states = params.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK));
    states.zip(grads.par_chunks(BLOCK)).for_each(|(((p, m), v), g)| update(p, m, v, g));
    Ok(())
}

pub fn sum_of_squares<R: Real>(grads: Tensor<'_, R, 1>) -> Result<f64> {
    let grads = elements(grads.to_host()?);
    let block = |block: &[R]| -> f64 {
        lane_sum(block, block, block, |g, _, _| {
            let g = Element::to_f64(g);
            g * g
        })
    };
    let sums: Vec<f64> = grads.par_chunks(BLOCK).map(block).collect();
    Ok(sums.iter().sum())
}
