//! Softmax attention of a few queries over tiles of keys: the online softmax that dense, window and selected attention
//! share.

use crate::cpu::math;
use crate::cpu::rows::Tile;
use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::tile::{self, KEYS, LANES, Left, Right, Store, Target};
use nsa_core::{Element, Real, View};
use std::ops::Range;

/// Rows of queries that a tile aims at: each widened key is used that often.
pub(crate) const ROWS: usize = 128;

/// Queries of a tile, `group_size` rows each: at least one, and no more than a panel of single rows needs.
pub(crate) fn queries_per_tile(group_size: usize) -> usize {
    (ROWS / group_size).max(1)
}

/// Heads, their dims and the scale of attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads<A> {
    /// G.
    pub(crate) num_kv_heads: usize,
    /// R: query heads of a KV head.
    pub(crate) group_size: usize,
    /// Dk.
    pub(crate) dim_qk: usize,
    /// Dv.
    pub(crate) dim_v: usize,
    /// Softmax scale.
    pub(crate) scale: A,
}

impl<A: Real> Heads<A> {
    /// Those of a configuration.
    pub(crate) fn new(config: &nsa_core::NsaConfig) -> Self {
        Self {
            num_kv_heads: config.num_kv_heads(),
            group_size: config.group_size(),
            dim_qk: config.head_dim_qk(),
            dim_v: config.head_dim_v(),
            scale: A::of(config.scale()),
        }
    }

    /// Row of the head `r` of KV head `g` of query `t` in `[N, Hq, D]`.
    #[inline(always)]
    pub(crate) fn row(&self, t: usize, g: usize, r: usize) -> usize {
        (t * self.num_kv_heads + g) * self.group_size + r
    }

    /// Divides rows of Σ exp(score − max)·v `[queries · R, Dv]` by their sums and writes them and their lse as KV head
    /// `g` of o `[queries, Hq, Dv]` and lse `[queries, Hq]`.
    #[inline(always)]
    pub(crate) fn store<T: Element<Acc = A>>(
        &self,
        rows: &mut [A],
        (max, sum): (&[A], &[A]),
        g: usize,
        o: &mut [T],
        lse: &mut [A],
    ) {
        for (i, row) in rows.chunks_exact_mut(self.dim_v).enumerate() {
            let place = self.row(i / self.group_size, g, i % self.group_size);
            lse[place] = normalize(row, max[i], sum[i]);
            math::narrow(row, &mut o[place * self.dim_v..][..self.dim_v]);
        }
    }
}

/// Copies the rows of KV head `g` of consecutive queries, widened: `[queries · R, D]`.
#[inline(always)]
pub(crate) fn gather<T: Element>(x: &View<'_, T, 3>, queries: Range<usize>, g: usize, r: usize, rows: &mut [T::Acc]) {
    let dim = x.shape()[2];
    for (i, t) in queries.enumerate() {
        for h in 0..r {
            math::widen(x.row(t, g * r + h), &mut rows[(i * r + h) * dim..][..dim]);
        }
    }
}

/// The state of the online softmax of some query rows: row i belongs to query i / R.
pub(crate) struct Flash<'p, A: Real> {
    heads: Heads<A>,
    rows: usize,
    /// Gathered rows, `[rows, Dk]`.
    gathered: Scratch<'p, A>,
    /// Packed rows, `[⌈rows/LANES⌉][Dk][LANES]`.
    panels: Scratch<'p, A>,
    /// Scores, then weights, of one panel: `[KEYS][LANES]`.
    scores: Scratch<'p, A>,
    /// Greatest scaled score so far.
    max: Scratch<'p, A>,
    /// Σ exp(score − max) so far.
    sum: Scratch<'p, A>,
    /// Σ exp(score − max) · v so far, `[rows, Dv]`.
    o: Scratch<'p, A>,
}

impl<'p, A: Real> Flash<'p, A> {
    /// Memory for up to `queries` queries.
    pub(crate) fn new(pool: &'p Pool, heads: Heads<A>, queries: usize) -> Self {
        let rows = queries * heads.group_size;
        let lanes = rows.next_multiple_of(LANES);
        Self {
            heads,
            rows: 0,
            gathered: pool.take(rows * heads.dim_qk),
            panels: pool.take(lanes * heads.dim_qk),
            scores: pool.take(KEYS * LANES),
            max: pool.take(lanes),
            sum: pool.take(lanes),
            o: pool.take(rows * heads.dim_v),
        }
    }

    /// Starts with KV head `g` of consecutive queries that have seen no key.
    #[inline(always)]
    pub(crate) fn start<T: Element<Acc = A>>(&mut self, q: &View<'_, T, 3>, queries: Range<usize>, g: usize) {
        self.rows = queries.len() * self.heads.group_size;
        let gathered = &mut self.gathered[..self.rows * self.heads.dim_qk];
        gather(q, queries, g, self.heads.group_size, gathered);
        tile::pack(gathered, self.heads.dim_qk, &mut self.panels);
        self.max.fill(A::neg_infinity());
        self.sum.fill(A::zero());
        self.o[..self.rows * self.heads.dim_v].fill(A::zero());
    }

    /// Attends to up to [`KEYS`] keys, of which query i sees `span(i)`.
    #[inline(always)]
    pub(crate) fn step(&mut self, k: Tile<'_, A>, v: Tile<'_, A>, span: impl Fn(usize) -> Range<usize>) {
        let Heads { group_size, dim_qk, dim_v, scale, .. } = self.heads;
        for first in (0..self.rows).step_by(LANES) {
            let rows = (self.rows - first).min(LANES);
            let spans: [Range<usize>; LANES] = std::array::from_fn(|x| span((first + x.min(rows - 1)) / group_size));
            let Some(keys) = union(&spans) else { continue };
            let panel = Right { data: &self.panels[first * dim_qk..][..LANES * dim_qk], stride: LANES };
            let scores = &mut self.scores[..KEYS * LANES];
            product_of_scores(k, dim_qk, keys.clone(), panel, scores);
            let scores = &mut scores.as_chunks_mut::<LANES>().0[keys.clone()];
            if spans.iter().any(|s| *s != keys) {
                mask(scores, &spans, keys.start);
            }
            let max = self.max[first..].first_chunk_mut().expect("a panel");
            let sum = self.sum[first..].first_chunk_mut().expect("a panel");
            let decay = softmax(scores, scale, max, sum);
            let o = &mut self.o[first * dim_v..][..rows * dim_v];
            if decay != [A::one(); LANES] {
                for (row, &decay) in o.chunks_exact_mut(dim_v).zip(&decay) {
                    row.iter_mut().for_each(|x| *x *= decay);
                }
            }
            let weights = Left::Columns { data: &self.scores, stride: LANES };
            let values = Right { data: v.data, stride: v.stride };
            let target = Target { data: o, row: |i| i * dim_v, store: Store::Add };
            tile::product([rows, dim_v], weights, values, target, |i| spans[i].clone());
        }
    }

    /// Writes output and lse of KV head `g` of the queries: o `[queries, Hq, Dv]`, lse `[queries, Hq]`.
    #[inline(always)]
    pub(crate) fn finish<T: Element<Acc = A>>(&mut self, g: usize, o: &mut [T], lse: &mut [A]) {
        let sums = &mut self.o[..self.rows * self.heads.dim_v];
        self.heads.store(sums, (&self.max, &self.sum), g, o, lse);
    }
}

/// Divides a row of Σ exp(score − max)·v by its `sum` and returns its lse; a row that saw nothing is 0 with −∞.
#[inline(always)]
fn normalize<A: Real>(row: &mut [A], max: A, sum: A) -> A {
    if sum == A::zero() {
        row.fill(A::zero());
        return A::neg_infinity();
    }
    row.iter_mut().for_each(|x| *x /= sum);
    max + sum.ln()
}

/// The keys that some row sees, from the first to the last.
#[inline(always)]
pub(crate) fn union(spans: &[Range<usize>; LANES]) -> Option<Range<usize>> {
    let seen = spans.iter().filter(|s| !s.is_empty());
    seen.cloned().reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
}

/// Scores of a panel for some keys of a tile: Sᵀ[key, lane] = k_key · q_lane.
#[inline(always)]
pub(crate) fn product_of_scores<A: Real>(
    k: Tile<'_, A>,
    dim: usize,
    keys: Range<usize>,
    panel: Right<'_, A>,
    scores: &mut [A],
) {
    let rows = Left::Rows { data: &k.data[keys.start * k.stride..], stride: k.stride };
    let target = Target { data: &mut scores[keys.start * LANES..], row: |i| i * LANES, store: Store::Write };
    tile::product([keys.len(), LANES], rows, panel, target, |_| 0..dim);
}

/// Sets the scores of keys that a row does not see to −∞; the first is key `start`.
#[inline(always)]
pub(crate) fn mask<A: Real>(scores: &mut [[A; LANES]], spans: &[Range<usize>; LANES], start: usize) {
    for (key, scores) in (start..).zip(scores) {
        for (score, span) in scores.iter_mut().zip(spans) {
            *score = if span.contains(&key) { *score } else { A::neg_infinity() };
        }
    }
}

/// Replaces scores by exp(scale·score − max) with the maximum brought up to date, adds them to the sums, and returns
/// what earlier sums are to be multiplied with.
#[inline(always)]
fn softmax<A: Real>(scores: &mut [[A; LANES]], scale: A, max: &mut [A; LANES], sum: &mut [A; LANES]) -> [A; LANES] {
    let old = *max;
    raise(max, scores, scale);
    let shift = max.map(finite);
    let decay: [A; LANES] = std::array::from_fn(|x| math::exp(old[x] - shift[x]));
    for x in 0..LANES {
        sum[x] *= decay[x];
    }
    exponentiate(scores, scale, &shift, sum);
    decay
}

/// Raises the maxima to those of scale·score. NaN is passed over here and met in the sums.
#[inline(always)]
pub(crate) fn raise<A: Real>(max: &mut [A; LANES], scores: &[[A; LANES]], scale: A) {
    let mut best = [A::neg_infinity(); LANES];
    for scores in scores {
        for x in 0..LANES {
            best[x] = if scores[x] > best[x] { scores[x] } else { best[x] };
        }
    }
    for x in 0..LANES {
        let best = best[x] * scale;
        max[x] = if best > max[x] { best } else { max[x] };
    }
}

/// Replaces scores by exp(scale·score − shift) and adds them to the sums, key by key.
#[inline(never)]
pub(crate) fn exponentiate<A: Real>(scores: &mut [[A; LANES]], scale: A, shift: &[A; LANES], sum: &mut [A; LANES]) {
    for scores in scores {
        for x in 0..LANES {
            let weight = math::exp(scores[x] * scale - shift[x]);
            scores[x] = weight;
            sum[x] += weight;
        }
    }
}

/// A maximum that can be subtracted: 0 while nothing was seen.
#[inline(always)]
pub(crate) fn finite<A: Real>(max: A) -> A {
    if max == A::neg_infinity() { A::zero() } else { max }
}
