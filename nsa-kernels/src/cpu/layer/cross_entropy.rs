//! The output head and the loss.

use super::matmul::{add_outer, times, times_transposed};
use super::par::{LANES, elements, for_rows2, lane_sum, row_range};
use crate::cpu::Cpu;
use crate::cpu::gemm::Store;
use crate::cpu::math::exp;
use crate::cpu::simd::{Loops, compiled_for};
use crate::layer::cross_entropy::{Forward, ForwardBackward, IGNORED, Loss};
use crate::layer::embedding::token_error;
use crate::{Result, Tensor};
use nsa_core::{Element, Real, View};

/// Logits that exist at a time, as far as [`MIN_ROWS`] allows.
const CHUNK_ELEMENTS: usize = 1 << 20;
/// Rows of a chunk at least: with fewer, reading the head costs more than the products.
const MIN_ROWS: usize = 64;

pub fn forward<T, W>(cpu: &Cpu, op: &'static str, args: Forward<'_, T, W>) -> Result<Loss>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (hidden, weight) = (args.hidden.to_host()?, args.weight.to_host()?);
    let targets = check_targets(op, &args.targets, weight.shape()[0])?;
    let mut losses = args.losses.map(|losses| losses.into_host()).transpose()?.map(|losses| losses.into_data());
    let mut loss = Loss::default();
    for_chunks(cpu, &hidden, &weight, targets, None, |start, _, row_losses, part| {
        if let Some(losses) = &mut losses {
            losses[start..start + row_losses.len()].copy_from_slice(row_losses);
        }
        loss.sum += part.sum;
        loss.count += part.count;
    });
    Ok(loss)
}

pub fn forward_backward<T, W>(cpu: &Cpu, op: &'static str, args: ForwardBackward<'_, T, W>) -> Result<Loss>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let (hidden, weight) = (args.hidden.to_host()?, args.weight.to_host()?);
    let ([_, channels], [vocabulary, _]) = (hidden.shape(), weight.shape());
    let targets = check_targets(op, &args.targets, vocabulary)?;
    let d_hidden = args.d_hidden.into_host()?.into_data();
    let mut d_weight = args.d_weight.map(|d| d.into_host()).transpose()?.map(|d| d.into_data());
    let mut loss = Loss::default();
    for_chunks(cpu, &hidden, &weight, targets, Some(T::Acc::of(args.scale)), |start, dz, row_losses, part| {
        let rows = row_losses.len();
        let dz = View::new(dz, [rows, vocabulary]).expect("a chunk of logits");
        times(cpu, &dz, &weight, &mut d_hidden[start * channels..][..rows * channels], Store::Write);
        if let Some(d_weight) = &mut d_weight {
            add_outer(cpu, &dz, &row_range(&hidden, start, rows), d_weight);
        }
        loss.sum += part.sum;
        loss.count += part.count;
    });
    Ok(loss)
}

/// Calls `f` with each chunk's first row, its logits (their gradients, if there is a scale), the losses of its rows and
/// their sum.
fn for_chunks<T, W>(
    cpu: &Cpu,
    hidden: &View<'_, T, 2>,
    weight: &View<'_, W, 2>,
    targets: &[u32],
    scale: Option<T::Acc>,
    mut f: impl FnMut(usize, &[T::Acc], &[T::Acc], Loss),
) where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let ([n, _], [vocabulary, _]) = (hidden.shape(), weight.shape());
    let chunk = (CHUNK_ELEMENTS / vocabulary.max(1)).max(MIN_ROWS).min(n);
    let (mut logits, mut losses) = (cpu.pool().take(chunk * vocabulary), cpu.pool().take::<T::Acc>(chunk));
    for start in (0..n).step_by(chunk.max(1)) {
        let targets = &targets[start..(start + chunk).min(n)];
        let rows = targets.len();
        let (logits, losses) = (&mut logits[..rows * vocabulary], &mut losses[..rows]);
        losses.fill(T::Acc::default());
        times_transposed(cpu, &row_range(hidden, start, rows), weight, logits, Store::Write);
        for_rows2((logits, vocabulary), (losses, 1), |i, z, loss| {
            compiled_for(cpu.isa(), Row { z, target: targets[i], scale, loss: &mut loss[0] });
        });
        let sum = losses.iter().map(|loss| loss.to_f64()).sum();
        let count = targets.iter().filter(|&&target| target != IGNORED).count();
        f(start, logits, losses, Loss { sum, count });
    }
}

/// A row with logits `z`, which become their gradients if there is a scale.
struct Row<'a, A> {
    z: &'a mut [A],
    target: u32,
    scale: Option<A>,
    loss: &'a mut A,
}

impl<A: Real> Loops for Row<'_, A> {
    #[inline(always)]
    fn run(self) {
        *self.loss = row_loss(self.z, self.target, self.scale);
    }
}

/// The loss of a [`Row`].
#[inline(always)]
fn row_loss<A: Real>(z: &mut [A], target: u32, scale: Option<A>) -> A {
    if target == IGNORED {
        z.fill(A::default());
        return A::default();
    }
    let target = target as usize;
    let (max, at_target) = (largest(z), z[target]);
    let sum = match scale {
        None => lane_sum(z, z, z, |z, _, _| exp(z - max)),
        Some(scale) => {
            for z in z.iter_mut() {
                *z = exp(*z - max);
            }
            let sum = lane_sum(z, z, z, |z, _, _| z);
            let factor = scale / sum;
            for z in z.iter_mut() {
                *z *= factor;
            }
            z[target] -= scale;
            sum
        }
    };
    sum.ln() + (max - at_target)
}

/// The largest element; NaN is passed over (and comes back with the exponentials).
#[inline(always)]
fn largest<A: Real>(z: &[A]) -> A {
    let larger = |a: A, b: A| if b > a { b } else { a };
    let (chunks, rest) = z.as_chunks::<LANES>();
    let mut lanes = [A::neg_infinity(); LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    lanes.iter().chain(rest).fold(A::neg_infinity(), |a, &b| larger(a, b))
}

fn check_targets<'a>(op: &'static str, targets: &Tensor<'a, u32, 1>, vocabulary: usize) -> Result<&'a [u32]> {
    let targets = elements(targets.to_host()?);
    match targets.iter().position(|&target| target != IGNORED && target as usize >= vocabulary) {
        None => Ok(targets),
        Some(position) => Err(token_error(op, "targets", position, targets[position])),
    }
}
