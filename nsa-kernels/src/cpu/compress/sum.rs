//! Weighted sums of tokens: bound by memory; each block reads its l rows, which the cache holds where blocks overlap.

use super::{Piece, pieces, sum_rows};
use crate::cpu::Cpu;
use crate::cpu::layer::par::for_rows;
use crate::cpu::math::narrow;
use crate::cpu::tasks::split_rows;
use nsa_core::{Element, NsaConfig, Packing, Real, View, index};
use num_traits::Zero;
use rayon::prelude::*;

/// Blocks of a piece: enough to outweigh its start.
const PIECE_BLOCKS: usize = 64;

/// What is compressed.
pub(super) struct Call<'a, T> {
    pub config: &'a NsaConfig,
    pub packing: &'a Packing,
    /// `[N, G, D]`.
    pub x: View<'a, T, 3>,
    /// `[l, G, D]`.
    pub position: Option<View<'a, T, 3>>,
}

/// Block = `scale` · Σ_p weight_p · token p.
pub(super) struct Coefficients<A> {
    /// `[l, G]`.
    weight: Vec<A>,
    scale: A,
}

/// 1/l each, applied after the sum so that it rounds once.
pub(super) fn mean<A: Real>(config: &NsaConfig) -> Coefficients<A> {
    let weight = vec![A::one(); config.compress_block() * config.num_kv_heads()];
    Coefficients { weight, scale: A::of(1.0 / config.compress_block() as f64) }
}

pub(super) fn weighted<T: Element>(weight: &View<'_, T, 2>) -> Coefficients<T::Acc> {
    let rows = 0..weight.shape()[0];
    let weight = rows.flat_map(|p| weight.row(p)).map(|a| a.to_acc()).collect();
    Coefficients { weight, scale: T::Acc::of(1.0) }
}

/// sum += Σ_p weight_p · row(p) for KV head `g`.
fn add_tokens<'a, T: Element>(sum: &mut [T::Acc], weights: &[T::Acc], row: impl Fn(usize) -> &'a [T]) {
    for (p, &a) in weights.iter().enumerate() {
        for (sum, x) in sum.iter_mut().zip(row(p)) {
            *sum += a * x.to_acc();
        }
    }
}

/// Σ_p a_p · e_p of every KV head, `[G, D]`. It goes into every block, so its error would not average out over blocks:
/// summed in f64.
fn constants<T: Element>(call: &Call<'_, T>, weights: &[Vec<T::Acc>]) -> Vec<T::Acc> {
    let [_, heads, dim] = call.x.shape();
    let mut sums = vec![0.0; heads * dim];
    if let Some(position) = &call.position {
        for (g, sums) in sums.chunks_exact_mut(dim).enumerate() {
            for (p, a) in weights[g].iter().enumerate() {
                sums.iter_mut().zip(position.row(p, g)).for_each(|(sum, e)| *sum += Element::to_f64(*a) * e.to_f64());
            }
        }
    }
    sums.into_iter().map(T::Acc::of).collect()
}

pub(super) fn forward<T: Element>(cpu: &Cpu, call: &Call<'_, T>, coefficients: &Coefficients<T::Acc>, out: &mut [T]) {
    let ([_, heads, dim], l, d) = (call.x.shape(), call.config.compress_block(), call.config.compress_stride());
    // Weights and constant of a head: `[G, l]`, `[G, D]`.
    let weights: Vec<Vec<T::Acc>> =
        (0..heads).map(|g| coefficients.weight[g..].iter().step_by(heads).copied().collect()).collect();
    let constants = constants(call, &weights);
    debug_assert!(weights.iter().all(|w| w.len() == l));
    let pieces = pieces(call.config, call.packing, PIECE_BLOCKS);
    let outs = split_rows(out, heads * dim, pieces.iter().map(Piece::rows));
    pieces.par_iter().zip(outs).for_each(|(piece, out)| {
        let mut sum = cpu.pool().take::<T::Acc>(dim);
        for i in 0..piece.blocks {
            for g in 0..heads {
                sum.fill(T::Acc::zero());
                add_tokens(&mut sum, &weights[g], |p| call.x.row(piece.token + i * d + p, g));
                let constant = &constants[g * dim..][..dim];
                sum.iter_mut().zip(constant).for_each(|(sum, c)| *sum = (*sum + *c) * coefficients.scale);
                narrow(&sum, &mut out[(i * heads + g) * dim..][..dim]);
            }
        }
    });
}

/// Where gradients go.
pub(super) struct Grads<'a, A> {
    /// Written: `[N, G, D]`.
    pub dx: &'a mut [A],
    /// Accumulated: `[l, G, D]`.
    pub d_position: Option<&'a mut [A]>,
    /// Accumulated: `[l, G]`.
    pub d_weight: Option<&'a mut [A]>,
}

pub(super) fn backward<T: Element>(
    call: &Call<'_, T>,
    coefficients: &Coefficients<T::Acc>,
    d_blocks: &View<'_, T::Acc, 3>,
    grads: Grads<'_, T::Acc>,
) {
    write_dx(call, coefficients, d_blocks, grads.dx);
    if grads.d_position.is_none() && grads.d_weight.is_none() {
        return;
    }
    let [_, heads, dim] = call.x.shape();
    let sums: Vec<Vec<f64>> = (0..heads).map(|g| sum_rows(d_blocks, g)).collect();
    if let Some(d_position) = grads.d_position {
        for (row, d) in d_position.chunks_exact_mut(dim).enumerate() {
            let a = coefficients.weight[row].to_f64() * coefficients.scale.to_f64();
            for (d, sum) in d.iter_mut().zip(&sums[row % heads]) {
                *d += T::Acc::of(a * sum);
            }
        }
    }
    if let Some(d_weight) = grads.d_weight {
        add_d_weight(call, &sums, d_blocks, d_weight);
    }
}

/// dx_t = scale · Σ_i a_(t − i·d) · dy_i over the blocks i that cover t.
fn write_dx<T: Element>(
    call: &Call<'_, T>,
    coefficients: &Coefficients<T::Acc>,
    d_blocks: &View<'_, T::Acc, 3>,
    dx: &mut [T::Acc],
) {
    let ([_, heads, dim], l, d) = (call.x.shape(), call.config.compress_block(), call.config.compress_stride());
    let seqs: Vec<_> = call.packing.seqs().map(|seq| seq.rows).collect();
    let cu_blocks: Vec<usize> = seqs
        .iter()
        .scan(0, |end, rows| {
            let start = *end;
            *end += index::num_blocks(call.config, rows.len());
            Some(start)
        })
        .collect();
    for_rows(dx, heads * dim, |row, dx| {
        let s = seqs.partition_point(|rows| rows.end <= row);
        let t = row - seqs[s].start;
        let blocks = index::num_blocks(call.config, seqs[s].len());
        dx.fill(T::Acc::zero());
        for i in (t + 1).saturating_sub(l).div_ceil(d)..blocks.min(t / d + 1) {
            for (g, dx) in dx.chunks_exact_mut(dim).enumerate() {
                let a = coefficients.weight[(t - i * d) * heads + g] * coefficients.scale;
                for (dx, dy) in dx.iter_mut().zip(d_blocks.row(cu_blocks[s] + i, g)) {
                    *dx += a * *dy;
                }
            }
        }
    });
}

/// da_p += Σ_i dy_i · (x_(i·d + p) + e_p), with sums over blocks in f64; `sums` is Σ_i dy_i.
fn add_d_weight<T: Element>(
    call: &Call<'_, T>,
    sums: &[Vec<f64>],
    d_blocks: &View<'_, T::Acc, 3>,
    d_weight: &mut [T::Acc],
) {
    let ([_, heads, _], d) = (call.x.shape(), call.config.compress_stride());
    let pieces = pieces(call.config, call.packing, PIECE_BLOCKS);
    d_weight.par_chunks_mut(heads).enumerate().for_each(|(p, d_weight)| {
        for (g, d_weight) in d_weight.iter_mut().enumerate() {
            let mut sum = 0.0;
            for (piece, i) in pieces.iter().flat_map(|piece| (0..piece.blocks).map(move |i| (piece, i))) {
                let (x, dy) = (call.x.row(piece.token + i * d + p, g), d_blocks.row(piece.block + i, g));
                sum += x.iter().zip(dy).map(|(x, dy)| x.to_acc() * *dy).sum::<T::Acc>().to_f64();
            }
            if let Some(position) = &call.position {
                sum += position.row(p, g).iter().zip(&sums[g]).map(|(e, dy)| e.to_f64() * dy).sum::<f64>();
            }
            *d_weight += T::Acc::of(sum);
        }
    });
}
