//! Softmax attention of a few queries over tiles of keys: the online softmax that dense, window and selected attention
//! share.

use crate::cpu::Cpu;
use crate::cpu::ahead::Lines;
use crate::cpu::isa::Isa;
use crate::cpu::keys::{KEYS, Tile};
use crate::cpu::math;
use crate::cpu::product::{Left, Product, Right, Steps, Store, Target, product_ahead};
use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::simd::{Loops, PAD, compiled_for, padded, vectorize};
use crate::cpu::softmax::{Lanes, Online};
use crate::cpu::unit::Unit;
use nsa_core::{Element, Real, View};
use num_traits::{Float, Zero};
use std::ops::Range;

/// Rows of queries that a tile aims at: each packed key is used that often.
pub(crate) const ROWS: usize = 256;

/// Queries of a tile, `group_size` rows each.
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

    /// Divides rows of Σ exp(score − max)·v `[queries · R, padded(Dv)]` by their sums and writes them and their lse as KV
    /// head `g` of o `[queries, Hq, Dv]` and lse `[queries, Hq]`.
    pub(crate) fn store<T: Element<Acc = A>>(
        &self,
        isa: Isa,
        rows: &mut [A],
        (max, sum): (&[A], &[A]),
        g: usize,
        o: &mut [T],
        lse: &mut [A],
    ) {
        compiled_for(isa, StoreRows { heads: *self, rows, max, sum, g, o, lse });
    }
}

/// See [`Heads::store`].
struct StoreRows<'a, T, A> {
    heads: Heads<A>,
    rows: &'a mut [A],
    max: &'a [A],
    sum: &'a [A],
    g: usize,
    o: &'a mut [T],
    lse: &'a mut [A],
}

impl<A: Real, T: Element<Acc = A>> Loops for StoreRows<'_, T, A> {
    #[inline(always)]
    fn run(self) {
        let Heads { group_size, dim_v, .. } = self.heads;
        for (i, row) in self.rows.chunks_exact_mut(padded(dim_v)).enumerate() {
            let place = self.heads.row(i / group_size, self.g, i % group_size);
            let row = &mut row[..dim_v];
            self.lse[place] = normalize(row, self.max[i], self.sum[i]);
            math::narrow(row, &mut self.o[place * dim_v..][..dim_v]);
        }
    }
}

/// Writes the rows of KV head `g` of consecutive queries as units: `[queries · R, ⌈D / STEP⌉]`.
pub(crate) fn gather<U: Unit, T: Element<Acc = U::Acc>>(
    x: &View<'_, T, 3>,
    queries: Range<usize>,
    g: usize,
    r: usize,
    rows: &mut [U],
) {
    let len = x.shape()[2].div_ceil(U::STEP);
    for (i, t) in queries.enumerate() {
        for h in 0..r {
            U::put_row(x.row(t, g * r + h), &mut rows[(i * r + h) * len..][..len]);
        }
    }
}

/// The keys from the first to the last that some row sees.
#[inline(always)]
pub(crate) fn seen_by_some(spans: &[[usize; 2]]) -> Range<usize> {
    let seen = spans.iter().filter(|span| span[0] < span[1]).map(|span| span[0]..span[1]);
    seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
}

/// The whole vectors that hold a range of keys.
#[inline(always)]
pub(crate) fn whole_vectors(keys: &Range<usize>) -> Range<usize> {
    keys.start / PAD * PAD..padded(keys.end)
}

/// The state of the online softmax of some query rows: row i belongs to query i / R.
pub(crate) struct Flash<'p, U: Unit> {
    pool: &'p Pool,
    isa: Isa,
    heads: Heads<U::Acc>,
    rows: usize,
    /// `[rows, ⌈Dk / STEP⌉]`.
    q: Scratch<'p, U>,
    /// Scores, then weights, of the rows at hand: `[rows, KEYS]`.
    scores: Scratch<'p, U::Acc>,
    /// The weights in units: `[rows, KEYS / STEP]`.
    weights: Scratch<'p, U>,
    /// Greatest scaled score so far.
    max: Scratch<'p, U::Acc>,
    /// Σ exp(score − max) so far, spread over the lanes of a vector: `[rows, PAD]`.
    sum: Scratch<'p, U::Acc>,
    /// Σ exp(score − max) · v so far, `[rows, padded(Dv)]`.
    o: Scratch<'p, U::Acc>,
    at: Rows<'p>,
}

/// The rows at hand: those of queries that see some key of the tile.
struct Rows<'p> {
    /// Their numbers.
    states: Scratch<'p, usize>,
    /// The keys that each sees.
    spans: Scratch<'p, [usize; 2]>,
    /// Where they lie in `q`, `scores`, `weights` and `o`.
    q: Scratch<'p, usize>,
    scores: Scratch<'p, usize>,
    weights: Scratch<'p, usize>,
    o: Scratch<'p, usize>,
}

impl<'p, U: Unit> Flash<'p, U> {
    /// Memory for up to `queries` queries.
    pub(crate) fn new(cpu: &'p Cpu, heads: Heads<U::Acc>, queries: usize) -> Self {
        let (pool, rows) = (cpu.pool(), queries * heads.group_size);
        let at = Rows {
            states: pool.take(rows),
            spans: pool.take(rows),
            q: pool.take(rows),
            scores: pool.multiples(rows, KEYS),
            weights: pool.multiples(rows, KEYS / U::STEP),
            o: pool.take(rows),
        };
        Self {
            pool,
            isa: cpu.isa(),
            heads,
            rows: 0,
            q: pool.take(rows * heads.dim_qk.div_ceil(U::STEP)),
            scores: pool.take(rows * KEYS),
            weights: pool.take(if U::STEP == 1 { 0 } else { rows * KEYS / U::STEP }),
            max: pool.take(rows),
            sum: pool.take(rows * PAD),
            o: pool.take(rows * padded(heads.dim_v)),
            at,
        }
    }

    /// Starts with KV head `g` of consecutive queries that have seen no key.
    pub(crate) fn start<T: Element<Acc = U::Acc>>(&mut self, q: &View<'_, T, 3>, queries: Range<usize>, g: usize) {
        self.rows = queries.len() * self.heads.group_size;
        gather(q, queries, g, self.heads.group_size, &mut self.q);
        self.max.fill(U::Acc::neg_infinity());
        self.sum.fill(U::Acc::zero());
        self.o[..self.rows * padded(self.heads.dim_v)].fill(U::Acc::zero());
    }

    /// Attends to a tile of keys (over the dims) and values (over the keys). `seen` are the queries that see some of it
    /// and the keys that they see. What is read next comes nearer meanwhile: `ahead[0]` with the product of the keys,
    /// `ahead[1]` with that of the values.
    pub(crate) fn step(
        &mut self,
        (k, v): (Tile<'_, U>, Tile<'_, U>),
        seen: impl Iterator<Item = (usize, Range<usize>)>,
        ahead: [Lines<'_>; 2],
    ) {
        let Heads { group_size, dim_qk, dim_v, scale, .. } = self.heads;
        let (q_stride, o_stride) = (dim_qk.div_ceil(U::STEP), padded(dim_v));
        let mut rows = 0;
        for (query, span) in seen.filter(|(_, span)| !span.is_empty()) {
            for row in query * group_size..(query + 1) * group_size {
                self.at.states[rows] = row;
                self.at.spans[rows] = [span.start, span.end];
                (self.at.q[rows], self.at.o[rows]) = (row * q_stride, row * o_stride);
                rows += 1;
            }
        }
        let spans = &self.at.spans[..rows];
        let columns = whole_vectors(&seen_by_some(spans));
        let scores = &mut self.scores[..rows * KEYS];
        product_ahead(
            self.isa,
            Product {
                left: Left { data: &self.q, rows: &self.at.q[..rows], step: 1 },
                right: Right { data: &k.data[columns.start..], stride: k.stride },
                target: Target {
                    data: &mut scores[columns.start.min(rows * KEYS)..],
                    rows: &self.at.scores[..rows],
                    store: Store::Write,
                },
                columns: columns.len(),
                steps: Steps::First(dim_qk),
            },
            ahead[0],
        );
        let states = &self.at.states[..rows];
        let (max, sum, o) = (&mut self.max, &mut self.sum, &mut self.o);
        vectorize(self.isa, Online { scores, spans, states, scale, max, sum, o, o_stride });
        let weights = U::along_rows(self.isa, scores, &mut self.weights);
        product_ahead(
            self.isa,
            Product {
                left: Left { data: weights, rows: &self.at.weights[..rows], step: 1 },
                right: Right { data: v.data, stride: v.stride },
                target: Target { data: &mut self.o, rows: &self.at.o[..rows], store: Store::Add },
                columns: dim_v,
                steps: Steps::Each(spans),
            },
            ahead[1],
        );
    }

    /// Writes output and lse of KV head `g` of the queries: o `[queries, Hq, Dv]`, lse `[queries, Hq]`.
    pub(crate) fn finish<T: Element<Acc = U::Acc>>(&mut self, g: usize, o: &mut [T], lse: &mut [U::Acc]) {
        let rows = &mut self.o[..self.rows * padded(self.heads.dim_v)];
        let mut sum = self.pool.take(self.rows);
        vectorize(self.isa, Lanes { lanes: &self.sum, sums: &mut sum });
        self.heads.store(self.isa, rows, (&self.max, &sum), g, o, lse);
    }
}

/// Divides a row of Σ exp(score − max)·v by its `sum` and returns its lse; a row that saw nothing is 0 with −∞.
#[inline(always)]
pub(crate) fn normalize<A: Real>(row: &mut [A], max: A, sum: A) -> A {
    if sum == A::zero() {
        row.fill(A::zero());
        return A::neg_infinity();
    }
    row.iter_mut().for_each(|x| *x /= sum);
    max + sum.ln()
}
