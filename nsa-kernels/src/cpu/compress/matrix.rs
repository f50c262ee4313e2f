//! Flattened blocks times matrices: bound by arithmetic, done by the library's GEMM.
//!
//! The tokens of a head lie behind one another as `[tokens, D]`; block i is the l·D numbers from i·d·D on. So all blocks
//! of a piece are one matrix `[blocks, l·D]` with rows d·D apart, which overlap where d < l: no copy, and each product
//! is done once. Only their gradients need the split into l/d slices of the weight, since a destination must not
//! overlap: slice s adds to the d tokens that start s·d after those of the block.
//!
//! Work a block: 2·l·D·H (+ 2·H·D) FLOP forward, twice that again backward plus the recomputed forward. Scratch of a piece: its
//! tokens, about 1 MiB in f32, and its hidden units.

use super::sum::Call;
use super::{Piece, pieces};
use crate::cpu::Cpu;
use crate::cpu::gemm::{Mat, MatMut, Store, Threads, gemm};
use crate::cpu::layer::par::{for_rows, for_rows2};
use crate::cpu::math::{self, exp, narrow, widen};
use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::tasks::split_rows;
use nsa_core::{Element, Real, View};
use num_traits::{One, Zero};
use rayon::prelude::*;

/// Elements that the tokens of a piece have at most, its last block's overlap aside.
const PIECE_ELEMENTS: usize = 1 << 18;

/// Blocks of a piece at most.
const PIECE_BLOCKS: usize = 256;

/// A linear layer on flattened blocks; for mlp, GELU and another one follow.
pub(super) struct Network<'a, T> {
    /// `[G, l·D, H]`; linear: H = D.
    weight1: View<'a, T, 3>,
    /// `[G, H]`.
    bias1: Option<View<'a, T, 2>>,
    /// `[G, H, D]` and `[G, D]`.
    second: Option<(View<'a, T, 3>, Option<View<'a, T, 2>>)>,
}

impl<'a, T> Network<'a, T> {
    pub(super) fn linear(weight: View<'a, T, 3>) -> Self {
        Self { weight1: weight, bias1: None, second: None }
    }

    pub(super) fn mlp(
        weight1: View<'a, T, 3>,
        bias1: Option<View<'a, T, 2>>,
        weight2: View<'a, T, 3>,
        bias2: Option<View<'a, T, 2>>,
    ) -> Self {
        Self { weight1, bias1, second: Some((weight2, bias2)) }
    }
}

/// Gradients of a [`Network`], accumulated.
pub(super) struct NetworkGrad<'a, A> {
    pub weight1: &'a mut [A],
    pub bias1: Option<&'a mut [A]>,
    pub second: Option<(&'a mut [A], Option<&'a mut [A]>)>,
}

impl<'a, A> NetworkGrad<'a, A> {
    pub(super) fn linear(weight: &'a mut [A]) -> Self {
        Self { weight1: weight, bias1: None, second: None }
    }
}

/// Rows in A: where they lie, or widened.
enum Held<'a, 'p, A> {
    InPlace { data: &'a [A], stride: usize },
    Copied { data: Scratch<'p, A>, stride: usize },
}

impl<A: Real> Held<'_, '_, A> {
    fn data(&self) -> &[A] {
        match self {
            Self::InPlace { data, .. } => data,
            Self::Copied { data, .. } => data,
        }
    }

    fn stride(&self) -> usize {
        match self {
            Self::InPlace { stride, .. } | Self::Copied { stride, .. } => *stride,
        }
    }

    fn mat(&self) -> Mat<'_, A> {
        Mat::rows(self.data(), self.stride())
    }
}

/// Matrix `g` of `[G, rows, cols]`.
fn head_matrix<'a, 'p, T: Element>(pool: &'p Pool, view: &View<'a, T, 3>, g: usize) -> Held<'a, 'p, T::Acc> {
    let ([_, rows, cols], [head_stride, stride, _]) = (view.shape(), view.layout().strides());
    if let Some(data) = math::as_acc(view.data()) {
        return Held::InPlace { data: &data[(g * head_stride).min(data.len())..], stride };
    }
    let mut data = pool.take(rows * cols);
    for_rows(&mut data, cols, |i, row| widen(view.row(g, i), row));
    Held::Copied { data, stride: cols }
}

/// Rows `first..first + rows` of head `g` of `[rows, G, D]`, without gaps.
fn head_rows<'a, 'p, T: Element>(
    pool: &'p Pool,
    view: &View<'a, T, 3>,
    g: usize,
    first: usize,
    rows: usize,
) -> Held<'a, 'p, T::Acc> {
    let ([_, _, dim], [stride, head_stride, _]) = (view.shape(), view.layout().strides());
    if let Some(data) = math::as_acc(view.data())
        && stride == dim
    {
        return Held::InPlace { data: &data[first * stride + g * head_stride..][..rows * dim], stride };
    }
    let mut data = pool.take(rows * dim);
    for_rows(&mut data, dim, |i, row| widen(view.row(first + i, g), row));
    Held::Copied { data, stride: dim }
}

/// One head's weights, and what the first layer adds to every block.
struct Head<'a, 'p, A> {
    weight1: Held<'a, 'p, A>,
    /// b1 + vec(e)·W1, `[H]`.
    constant: Vec<A>,
    second: Option<(Held<'a, 'p, A>, Vec<A>)>,
    /// l·D, d·D, D, H.
    sizes: Sizes,
}

#[derive(Clone, Copy)]
struct Sizes {
    block: usize,
    stride: usize,
    dim: usize,
    hidden: usize,
}

impl<'a, 'p, A: Real> Head<'a, 'p, A> {
    fn new<T: Element<Acc = A>>(pool: &'p Pool, call: &Call<'a, T>, network: &Network<'a, T>, g: usize) -> Self {
        let [_, block, hidden] = network.weight1.shape();
        let [_, _, dim] = call.x.shape();
        let sizes = Sizes { block, stride: call.config.compress_stride() * dim, dim, hidden };
        let widened = |bias: &Option<View<'_, T, 2>>, len| match bias {
            Some(bias) => bias.row(g).iter().map(|x| x.to_acc()).collect(),
            None => vec![A::zero(); len],
        };
        let weight1 = head_matrix(pool, &network.weight1, g);
        let mut constant = widened(&network.bias1, hidden);
        if let Some(position) = &call.position {
            let position = head_rows(pool, position, g, 0, call.config.compress_block());
            add_product(&mut constant, &position.data()[..block], &weight1);
        }
        let second = network.second.as_ref().map(|(weight, bias)| (head_matrix(pool, weight, g), widened(bias, dim)));
        Self { weight1, constant, second, sizes }
    }

    /// The first layer's result for every block of a piece, `[blocks, H]`.
    fn first(&self, pool: &'p Pool, tokens: &[A], blocks: usize, threads: Threads) -> Scratch<'p, A> {
        let Sizes { block, stride, hidden, .. } = self.sizes;
        let mut out = repeated(pool, &self.constant, blocks);
        let (dst, lhs) = (MatMut::rows(&mut out, hidden), Mat::rows(tokens, stride));
        gemm([blocks, hidden, block], dst, Store::Add, A::one(), lhs, self.weight1.mat(), threads);
        out
    }
}

/// target += x·W. The sum goes into every block, so its error would not average out over blocks: summed in f64.
fn add_product<A: Real>(target: &mut [A], x: &[A], weight: &Held<'_, '_, A>) {
    let mut sums: Vec<f64> = target.iter().map(|y| Element::to_f64(*y)).collect();
    for (i, x) in x.iter().enumerate() {
        let row = &weight.data()[i * weight.stride()..][..target.len()];
        sums.iter_mut().zip(row).for_each(|(y, w)| *y += Element::to_f64(*x) * Element::to_f64(*w));
    }
    target.iter_mut().zip(sums).for_each(|(y, sum)| *y = A::of(sum));
}

/// `count` copies of `row`.
fn repeated<'p, A: Real>(pool: &'p Pool, row: &[A], count: usize) -> Scratch<'p, A> {
    let mut rows = pool.take(count * row.len());
    rows.chunks_exact_mut(row.len()).for_each(|target| target.copy_from_slice(row));
    rows
}

fn pieces_of<T>(call: &Call<'_, T>) -> Vec<Piece> {
    let stride = call.config.compress_stride() * call.x.shape()[2];
    pieces(call.config, call.packing, (PIECE_ELEMENTS / stride).clamp(1, PIECE_BLOCKS))
}

fn tokens_of<T>(call: &Call<'_, T>, piece: &Piece) -> usize {
    (piece.blocks - 1) * call.config.compress_stride() + call.config.compress_block()
}

pub(super) fn forward<T: Element>(cpu: &Cpu, call: &Call<'_, T>, network: &Network<'_, T>, out: &mut [T]) {
    let (pool, [_, heads, dim]) = (cpu.pool(), call.x.shape());
    let pieces = pieces_of(call);
    if pieces.is_empty() {
        return;
    }
    for g in 0..heads {
        let head = Head::new(pool, call, network, g);
        let outs = split_rows(out, heads * dim, pieces.iter().map(Piece::rows));
        pieces.par_iter().zip(outs).for_each(|(piece, out)| {
            let tokens = head_rows(pool, &call.x, g, piece.token, tokens_of(call, piece));
            let mut blocks = head.first(pool, tokens.data(), piece.blocks, Threads::One);
            if let Some((weight, bias)) = &head.second {
                blocks.iter_mut().for_each(|z| *z = gelu(*z));
                let (sizes, lhs) = ([piece.blocks, dim, head.sizes.hidden], Mat::rows(&blocks, head.sizes.hidden));
                let mut second = repeated(pool, bias, piece.blocks);
                let dst = MatMut::rows(&mut second, dim);
                gemm(sizes, dst, Store::Add, T::Acc::one(), lhs, weight.mat(), Threads::One);
                blocks = second;
            }
            for (block, out) in blocks.chunks_exact(dim).zip(out.chunks_exact_mut(heads * dim)) {
                narrow(block, &mut out[g * dim..][..dim]);
            }
        });
    }
}

/// Where gradients go.
pub(super) struct Grads<'a, A> {
    /// Written: `[N, G, D]`.
    pub dx: &'a mut [A],
    /// Accumulated: `[l, G, D]`.
    pub d_position: Option<&'a mut [A]>,
    pub d_network: NetworkGrad<'a, A>,
}

/// Pieces in order, so that sums have one order; the threads share each product.
pub(super) fn backward<T: Element>(
    cpu: &Cpu,
    call: &Call<'_, T>,
    network: &Network<'_, T>,
    d_blocks: &View<'_, T::Acc, 3>,
    mut grads: Grads<'_, T::Acc>,
) {
    grads.dx.fill(T::Acc::zero());
    let pieces = pieces_of(call);
    if pieces.is_empty() {
        return;
    }
    for g in 0..call.x.shape()[1] {
        let head = Head::new(cpu.pool(), call, network, g);
        let mut sums = Sums { hidden: vec![0.0; head.sizes.hidden], out: vec![0.0; head.sizes.dim] };
        for piece in &pieces {
            backward_piece(cpu.pool(), call, (&head, g), piece, d_blocks, &mut grads, &mut sums);
        }
        add_sums(call, (&head, g), &sums, &mut grads);
    }
}

/// Σ over blocks of the gradients of what each layer adds to every block.
struct Sums {
    hidden: Vec<f64>,
    out: Vec<f64>,
}

fn backward_piece<'p, T: Element>(
    pool: &'p Pool,
    call: &Call<'_, T>,
    (head, g): (&Head<'_, 'p, T::Acc>, usize),
    piece: &Piece,
    d_blocks: &View<'_, T::Acc, 3>,
    grads: &mut Grads<'_, T::Acc>,
    sums: &mut Sums,
) {
    let (Sizes { block, stride, dim, hidden }, blocks, one) = (head.sizes, piece.blocks, T::Acc::one());
    let [d_stride, d_head_stride, _] = d_blocks.layout().strides();
    let dy = Mat::rows(&d_blocks.data()[piece.block * d_stride + g * d_head_stride..], d_stride);
    let tokens = head_rows(pool, &call.x, g, piece.token, tokens_of(call, piece));
    let d_hidden;
    let dz = match (&head.second, &mut grads.d_network.second) {
        (Some((weight, _)), Some((d_weight, _))) => {
            add_rows(&mut sums.out, dy, blocks);
            let d_weight = &mut d_weight[g * hidden * dim..][..hidden * dim];
            d_hidden = second_backward(pool, head, (weight, d_weight), tokens.data(), dy, blocks);
            Mat::rows(&d_hidden, hidden)
        }
        _ => dy,
    };
    add_rows(&mut sums.hidden, dz, blocks);
    let dst = MatMut::rows(&mut grads.d_network.weight1[g * block * hidden..][..block * hidden], hidden);
    let lhs = Mat::rows(tokens.data(), stride).transposed();
    gemm([block, hidden, blocks], dst, Store::Add, one, lhs, dz, Threads::Pool);
    let mut d_tokens = pool.zeroed::<T::Acc>(tokens.data().len());
    let weight1 = head.weight1.mat();
    for start in (0..block).step_by(stride) {
        let dst = MatMut::rows(&mut d_tokens[start..], stride);
        let slice = weight1.transposed().columns_from(start);
        gemm([blocks, stride, hidden], dst, Store::Add, one, dz, slice, Threads::Pool);
    }
    let row_len = call.x.shape()[1] * dim;
    let dx = &mut grads.dx[piece.token * row_len..][..tokens_of(call, piece) * row_len];
    for_rows(dx, row_len, |t, dx| {
        dx[g * dim..][..dim].iter_mut().zip(&d_tokens[t * dim..]).for_each(|(dx, d)| *dx += *d);
    });
}

/// Adds to the gradient of the second layer's weight of one head; returns the gradient of the first layer's result,
/// `[blocks, H]`.
fn second_backward<'p, A: Real>(
    pool: &'p Pool,
    head: &Head<'_, 'p, A>,
    (weight, d_weight): (&Held<'_, 'p, A>, &mut [A]),
    tokens: &[A],
    dy: Mat<'_, A>,
    blocks: usize,
) -> Scratch<'p, A> {
    let Sizes { dim, hidden, .. } = head.sizes;
    let mut z = head.first(pool, tokens, blocks, Threads::Pool);
    let mut active = pool.take(z.len());
    // Φ is what costs: once for both. From here on z is the slope.
    for_rows2((&mut active, hidden), (&mut z, hidden), |_, active, z| {
        active.iter_mut().zip(z).for_each(|(a, z)| (*a, *z) = gelu_and_slope(*z));
    });
    let (dst, lhs) = (MatMut::rows(d_weight, dim), Mat::rows(&active, hidden).transposed());
    gemm([hidden, dim, blocks], dst, Store::Add, A::one(), lhs, dy, Threads::Pool);
    let mut d_active = active;
    let (dst, rhs) = (MatMut::rows(&mut d_active, hidden), weight.mat().transposed());
    gemm([blocks, hidden, dim], dst, Store::Write, A::one(), dy, rhs, Threads::Pool);
    for_rows(&mut z, hidden, |i, row| {
        row.iter_mut().zip(&d_active[i * hidden..]).for_each(|(z, da)| *z *= *da);
    });
    z
}

/// sums_c += Σ_i m_ic.
fn add_rows<A: Real>(sums: &mut [f64], m: Mat<'_, A>, rows: usize) {
    for i in 0..rows {
        sums.iter_mut().zip(&m.data[i * m.row_stride..]).for_each(|(sum, x)| *sum += (*x).to_f64());
    }
}

/// The gradients that need only the sums over all blocks: biases; e, whose product with W1 every block has; and that
/// product's part in W1's.
fn add_sums<T: Element>(
    call: &Call<'_, T>,
    (head, g): (&Head<'_, '_, T::Acc>, usize),
    sums: &Sums,
    grads: &mut Grads<'_, T::Acc>,
) {
    let (Sizes { block, dim, hidden, .. }, [_, heads, _]) = (head.sizes, call.x.shape());
    let add = |target: &mut [T::Acc], sums: &[f64]| {
        target.iter_mut().zip(sums).for_each(|(target, sum)| *target += T::Acc::of(*sum));
    };
    if let Some(d_bias) = &mut grads.d_network.bias1 {
        add(&mut d_bias[g * hidden..][..hidden], &sums.hidden);
    }
    if let Some((_, Some(d_bias))) = &mut grads.d_network.second {
        add(&mut d_bias[g * dim..][..dim], &sums.out);
    }
    let Some(position) = &call.position else { return };
    let weight1 = head.weight1.mat();
    for row in 0..block {
        let (p, c) = (row / dim, row % dim);
        let e = position.row(p, g)[c].to_f64();
        let d_weight = &mut grads.d_network.weight1[(g * block + row) * hidden..][..hidden];
        let weight = &weight1.data[row * weight1.row_stride..][..hidden];
        let mut de = 0.0;
        for ((d_weight, weight), sum) in d_weight.iter_mut().zip(weight).zip(&sums.hidden) {
            *d_weight += T::Acc::of(e * sum);
            de += weight.to_f64() * sum;
        }
        if let Some(d_position) = &mut grads.d_position {
            d_position[(p * heads + g) * dim + c] += T::Acc::of(de);
        }
    }
}

/// z·Φ(z), Φ the normal distribution.
fn gelu<A: Real>(z: A) -> A {
    z * normal(z)
}

/// z·Φ(z) and its slope, Φ(z) + z·Φ'(z).
fn gelu_and_slope<A: Real>(z: A) -> (A, A) {
    let density =
        exp(A::of(-0.5) * z * z) * A::of(0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2);
    let below = normal(z);
    (z * below, below + z * density)
}

/// Φ(z); from erfc, since 1 + erf has lost its digits where z is far below 0.
fn normal<A: Real>(z: A) -> A {
    A::of(0.5) * (z * A::of(-std::f64::consts::FRAC_1_SQRT_2)).erfc()
}
