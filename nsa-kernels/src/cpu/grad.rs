//! Gradients of attention: what the branches share.
//!
//! A few rows of queries against a tile of keys: scores and do·v are computed once and added to dq of the queries and to
//! dk and dv of the keys, five products in all. [`turns`](super::turns) says in which order.

use crate::cpu::Cpu;
use crate::cpu::ahead::{Lines, Run};
use crate::cpu::flash::{Heads, ROWS, seen_by_some, whole_vectors};
use crate::cpu::isa::Isa;
use crate::cpu::keys::{Grid, KEYS, Layout, Order, Tile, Tiles};
use crate::cpu::math;
use crate::cpu::product::{Left, Product, Right, Steps, Store, Target, product, product_ahead};
use crate::cpu::rows::packed_rows;
use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::simd::{Compute, PAD, Simd, padded, prefetch, vectorize};
use crate::cpu::softmax::Gradient;
use crate::cpu::turns::KeySums;
use crate::cpu::unit::Unit;
use crate::op::Gating;
use crate::{Result, Tensor};
use nsa_core::{CuSeqlens, Element, NsaConfig, Real, View};
use num_traits::Zero;
use rayon::prelude::*;
use std::ops::Range;

/// What a branch's backward reads of its queries.
pub(crate) struct Queries<'a, T: Element> {
    /// `[N, Hq, Dk]`.
    q: View<'a, T, 3>,
    /// `[N, Hq]`.
    lse: View<'a, T::Acc, 2>,
    /// `[N, Hq, Dv]`.
    d_o: View<'a, T, 3>,
    /// `[N, Hq, 3]` and the branch's column.
    gates: Option<(View<'a, T, 3>, usize)>,
    /// δ = Σ do^c·o, `[N, Hq]`.
    delta: Scratch<'a, T::Acc>,
}

impl<'a, T: Element> Queries<'a, T> {
    /// Takes the tensors of an operation's arguments and computes δ.
    pub(crate) fn new(
        cpu: &'a Cpu,
        (q, o, lse, d_o): (Tensor<'a, T, 3>, Tensor<'a, T, 3>, Tensor<'a, T::Acc, 2>, Tensor<'a, T, 3>),
        Gating { gates, d_gates, column }: Gating<'a, T>,
    ) -> Result<Self> {
        let gates = gates.map(|gates| gates.to_host()).transpose()?.map(|gates| (gates, column));
        let sums = d_gates.map(|d_gates| d_gates.to_host()).transpose()?;
        let [n, heads, _] = q.shape();
        let (q, o, lse, d_o) = (q.to_host()?, o.to_host()?, lse.to_host()?, d_o.to_host()?);
        let mut queries = Self { q, lse, d_o, gates, delta: cpu.pool().take(0) };
        let mut delta = cpu.pool().take(n * heads);
        delta.par_chunks_mut(heads).enumerate().with_min_len(16).for_each(|(t, delta)| {
            match sums {
                Some(sums) => delta.iter_mut().enumerate().for_each(|(h, delta)| *delta = sums.row(t, h)[column]),
                None => vectorize(cpu.isa(), Dots { x: d_o, y: o, t, dots: &mut *delta }),
            }
            delta.iter_mut().enumerate().for_each(|(h, delta)| *delta *= queries.gate(t, h));
        });
        queries.delta = delta;
        Ok(queries)
    }

    /// The gate of a row; 1 without gates.
    #[inline(always)]
    fn gate(&self, t: usize, h: usize) -> T::Acc {
        self.gates.map_or_else(|| T::Acc::of(1.0), |(gates, column)| gates.row(t, h)[column].to_acc())
    }
}

/// Σ x·y over the dims of each head of token t: `[Hq]`.
struct Dots<'a, T, A> {
    /// `[N, Hq, D]`.
    x: View<'a, T, 3>,
    /// `[N, Hq, D]`.
    y: View<'a, T, 3>,
    t: usize,
    dots: &'a mut [A],
}

/// Elements that are widened at once; whole vectors.
const WIDENED: usize = 2 * PAD;

impl<'a, T: Element, A: Real> Compute<A> for Dots<'a, T, A> {
    type As<B: Real> = Dots<'a, T, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        for (h, dot) in self.dots.iter_mut().enumerate() {
            let mut sums = [s.splat(A::zero()); 2];
            let [mut x, mut y] = [[T::Acc::zero(); WIDENED]; 2];
            for (a, b) in self.x.row(self.t, h).chunks(WIDENED).zip(self.y.row(self.t, h).chunks(WIDENED)) {
                math::widen(a, &mut x[..a.len()]);
                math::widen(b, &mut y[..b.len()]);
                x[a.len()..].fill(T::Acc::zero());
                // A is Acc under another name.
                let [x, y] = [&x, &y].map(|x| bytemuck::cast_slice::<T::Acc, A>(x));
                for (i, at) in (0..WIDENED).step_by(S::WIDTH).enumerate() {
                    sums[i % 2] = s.mul_add(s.read(&x[at..]), s.read(&y[at..]), sums[i % 2]);
                }
            }
            *dot = s.sum(s.add(sums[0], sums[1]));
        }
    }

    fn cast<B: Real>(self) -> Dots<'a, T, B> {
        Dots { x: self.x, y: self.y, t: self.t, dots: bytemuck::cast_slice_mut(self.dots) }
    }
}

/// Keys and values of one sequence as the products of a cell want them.
pub(crate) struct SeqKeys<'p, T, U> {
    k: Tiles<'p, T, U>,
    v: Tiles<'p, T, U>,
    k_over_keys: Tiles<'p, T, U>,
}

impl<'p, T: Element, U: Unit<Acc = T::Acc>> SeqKeys<'p, T, U> {
    /// Lays out the rows of each sequence.
    pub(crate) fn pack(
        pool: &'p Pool,
        config: &NsaConfig,
        (k, v): (Tensor<'p, T, 3>, Tensor<'p, T, 3>),
        offsets: &CuSeqlens,
        grid: Grid,
    ) -> Result<Vec<Self>> {
        let seqs = packed_rows(k, offsets)?.into_iter().zip(packed_rows(v, offsets)?);
        let tiles =
            |rows, dim, order| Layout::new(rows, 0, dim, grid, order).tiles(pool, config.num_kv_heads(), usize::MAX);
        let pack = |(k, v)| Self {
            k: tiles(k, config.head_dim_qk(), Order::OverDims),
            v: tiles(v, config.head_dim_v(), Order::OverDims),
            k_over_keys: tiles(k, config.head_dim_qk(), Order::OverKeys),
        };
        Ok(seqs.map(pack).collect())
    }
}

/// Where loaded queries and the keys at hand lie in the tiles that gradients are summed in.
pub(crate) struct Place<K, Q> {
    /// The tile of keys in the sequence's grid.
    pub(crate) tile: usize,
    /// Number of key s of that tile in the tile of the sums.
    pub(crate) key: K,
    /// Number of query i in its tile.
    pub(crate) query: Q,
}

/// Distance between rows over the dims, copied: with one element a unit, those over the rows serve.
fn stride<U: Unit>(dim: usize) -> usize {
    if U::STEP == 1 { padded(dim) } else { dim.div_ceil(U::STEP) }
}

/// The rows of queries as a left operand: where they lie in the tensor, or copied.
struct LeftRows<'p, U> {
    in_place: Option<&'p [U]>,
    copy: Scratch<'p, U>,
    rows: Scratch<'p, usize>,
}

impl<'p, U: Unit> LeftRows<'p, U> {
    fn new(pool: &'p Pool, rows: usize, dim: usize) -> Self {
        Self { in_place: None, copy: pool.take(second::<U>(rows * stride::<U>(dim))), rows: pool.take(rows) }
    }

    /// Takes the rows whose heads of a tensor `place` says; with one element a unit those over the rows serve.
    fn load<T: Element<Acc = U::Acc>>(&mut self, x: &View<'p, T, 3>, rows: usize, place: impl Fn(usize) -> [usize; 2]) {
        let ([_, _, dim], [row_stride, head_stride, _]) = (x.shape(), x.layout().strides());
        let whole = [dim, row_stride, head_stride].iter().all(|x| x.is_multiple_of(U::STEP));
        let units = x.data().len() / U::STEP * U::STEP;
        self.in_place = if whole && U::STEP > 1 { U::borrow(&x.data()[..units]) } else { None };
        for (i, start) in self.rows[..rows].iter_mut().enumerate() {
            let [t, h] = place(i);
            *start = match self.in_place {
                Some(_) => (t * row_stride + h * head_stride) / U::STEP,
                None => i * stride::<U>(dim),
            };
            if self.in_place.is_none() && U::STEP > 1 {
                U::put_row(x.row(t, h), &mut self.copy[*start..]);
            }
        }
    }

    /// The operand of some rows, of which those over the rows are `over_rows`.
    fn operand<'b>(&'b self, rows: usize, over_rows: &'b [U]) -> Left<'b, U> {
        let data = if U::STEP == 1 { over_rows } else { self.in_place.unwrap_or(&self.copy) };
        Left { data, rows: &self.rows[..rows], step: 1 }
    }
}

/// Elements of a form that units of one element do without.
fn second<U: Unit>(len: usize) -> usize {
    if U::STEP == 1 { 0 } else { len }
}

/// Up to [`ROWS`] rows of queries in units: those of one KV head. Row i belongs to query i / R.
pub(crate) struct Loaded<'p, U: Unit> {
    isa: Isa,
    heads: Heads<U::Acc>,
    g: usize,
    queries: usize,
    /// `[rows, ⌈Dk / STEP⌉]`, `[rows, ⌈Dv / STEP⌉]`: over the dims.
    q: LeftRows<'p, U>,
    d_o: LeftRows<'p, U>,
    /// `[⌈rows / STEP⌉, padded(Dk)]`, `[⌈rows / STEP⌉, padded(Dv)]`: over the rows.
    q_over_rows: Scratch<'p, U>,
    d_o_over_rows: Scratch<'p, U>,
    /// One a row.
    lse: Scratch<'p, U::Acc>,
    delta: Scratch<'p, U::Acc>,
    gates: Scratch<'p, U::Acc>,
}

impl<'p, U: Unit> Loaded<'p, U> {
    /// Queries that fit.
    pub(crate) fn capacity(heads: Heads<U::Acc>) -> usize {
        (ROWS / heads.group_size).max(1)
    }

    /// Memory for [`Loaded::capacity`] queries.
    pub(crate) fn new(cpu: &'p Cpu, heads: Heads<U::Acc>) -> Self {
        let rows = Self::capacity(heads) * heads.group_size;
        let (pool, units) = (cpu.pool(), rows.div_ceil(U::STEP));
        Self {
            isa: cpu.isa(),
            heads,
            g: 0,
            queries: 0,
            q: LeftRows::new(pool, rows, heads.dim_qk),
            d_o: LeftRows::new(pool, rows, heads.dim_v),
            q_over_rows: pool.take(units * padded(heads.dim_qk)),
            d_o_over_rows: pool.take(units * padded(heads.dim_v)),
            lse: pool.take(rows),
            delta: pool.take(rows),
            gates: pool.take(rows),
        }
    }

    /// Loads KV head `g` of some queries; query i lies in row `token(i)` of the tensors.
    pub(crate) fn load<T: Element<Acc = U::Acc>>(
        &mut self,
        source: &Queries<'p, T>,
        queries: usize,
        token: impl Fn(usize) -> usize,
        g: usize,
    ) {
        let r = self.heads.group_size;
        let rows = queries * r;
        (self.queries, self.g) = (queries, g);
        for t in (0..queries).map(&token) {
            for x in [&source.q, &source.d_o] {
                (0..r).for_each(|h| prefetch(x.row(t, g * r + h)));
            }
        }
        for i in 0..rows {
            let (t, h) = (token(i / r), g * r + i % r);
            self.lse[i] = source.lse.row(t)[h];
            self.delta[i] = source.delta[self.heads.row(t, g, i % r)];
            self.gates[i] = source.gate(t, h);
        }
        for (x, left, right) in
            [(&source.q, &mut self.q, &mut self.q_over_rows), (&source.d_o, &mut self.d_o, &mut self.d_o_over_rows)]
        {
            let (dim, row) = (x.shape()[2], |i: usize| x.row(token(i / r), g * r + i % r));
            // Behind the last row none is seen: itself stands in.
            U::put_tile(self.isa, rows, |i| row(i.min(rows - 1)), padded(dim), right);
            left.load(x, rows, |i| [token(i / r), g * r + i % r]);
        }
    }
}

/// What is computed of loaded queries with a tile of keys.
pub(crate) struct Cell<'p, U: Unit> {
    isa: Isa,
    heads: Heads<U::Acc>,
    /// Scores, then g·p, `[rows, KEYS]`.
    weights: Scratch<'p, U::Acc>,
    /// do·v, then scale·ds, `[rows, KEYS]`.
    d_scores: Scratch<'p, U::Acc>,
    /// In units: scale·ds `[rows, KEYS / STEP]`; g·p and scale·ds `[⌈rows / STEP⌉, KEYS]`.
    units: [Scratch<'p, U>; 3],
    /// The keys that each row sees.
    spans: Scratch<'p, [usize; 2]>,
    at: CellRows<'p>,
    /// If cells are far apart: what gradients of the queries are added to, then those of the keys, with the keys themselves.
    runs: Option<[Scratch<'p, Run>; 2]>,
}

/// Where the rows lie in the operands of the products.
struct CellRows<'p> {
    scores: Scratch<'p, usize>,
    units: Scratch<'p, usize>,
    dq: Scratch<'p, usize>,
}

impl<'p, U: Unit> Cell<'p, U> {
    /// Memory for the rows of [`Loaded`]. Cells that follow one another far apart (`far`) ask for what they add to before
    /// they come to it.
    pub(crate) fn new(cpu: &'p Cpu, heads: Heads<U::Acc>, far: bool) -> Self {
        let pool = cpu.pool();
        let rows = Loaded::<U>::capacity(heads) * heads.group_size;
        let units = rows.div_ceil(U::STEP) * KEYS;
        Self {
            isa: cpu.isa(),
            heads,
            weights: pool.take(rows * KEYS),
            d_scores: pool.take(rows * KEYS),
            units: [rows * (KEYS / U::STEP), units, units].map(|len| pool.take(second::<U>(len))),
            spans: pool.take(rows),
            at: CellRows {
                scores: pool.multiples(rows, KEYS),
                units: pool.multiples(rows, KEYS / U::STEP),
                dq: pool.take(rows),
            },
            runs: far.then(|| [pool.take(rows), pool.take(2 * KEYS + 1)]),
        }
    }

    /// Adds the gradients of a tile of keys, of which query i sees `span(i)`; neither end of a span ever moves back.
    pub(crate) fn step<T: Element<Acc = U::Acc>>(
        &mut self,
        queries: &Loaded<'_, U>,
        keys: &SeqKeys<'_, T, U>,
        span: impl Fn(usize) -> Range<usize>,
        (dq, sums): (&mut [U::Acc], &mut KeySums<'_, U::Acc>),
        place: &Place<impl Fn(usize) -> usize, impl Fn(usize) -> usize>,
    ) {
        let Heads { group_size, dim_qk, .. } = self.heads;
        let (rows, g) = (queries.queries * group_size, queries.g);
        for query in 0..queries.queries {
            let span = span(query);
            for r in 0..group_size {
                let i = query * group_size + r;
                self.spans[i] = [span.start, span.end.max(span.start)];
                self.at.dq[i] = self.heads.row((place.query)(query), g, r) * dim_qk;
            }
        }
        let seen = seen_by_some(&self.spans[..rows]);
        if seen.is_empty() {
            return;
        }
        let (k, v) = (keys.k.tile(place.tile, g, &mut []), keys.v.tile(place.tile, g, &mut []));
        let k_over_keys = keys.k_over_keys.tile(place.tile, g, &mut []);
        if let Some(runs) = &mut self.runs {
            let keys = seen.clone().map(|s| (place.key)(s) * self.heads.num_kv_heads + g);
            Self::find_runs(runs, self.heads, k_over_keys, (dq, &self.at.dq[..rows]), (sums, keys));
        }
        self.scores(queries, (k, v), &whole_vectors(&seen));
        product(
            self.isa,
            Product {
                left: Left {
                    data: U::along_rows(self.isa, &self.d_scores[..rows * KEYS], &mut self.units[0]),
                    rows: &self.at.units[..rows],
                    step: 1,
                },
                right: Right { data: k_over_keys.data, stride: k_over_keys.stride },
                target: Target { data: dq, rows: &self.at.dq[..rows], store: Store::Add },
                columns: dim_qk,
                steps: Steps::Each(&self.spans[..rows]),
            },
        );
        self.key_gradients(queries, seen, sums, &place.key);
    }

    /// Where the gradients lie that a cell is about to add to.
    fn find_runs(
        runs: &mut [Scratch<'p, Run>; 2],
        heads: Heads<U::Acc>,
        k_over_keys: Tile<'_, U>,
        (dq, dq_rows): (&[U::Acc], &[usize]),
        (sums, keys): (&KeySums<'_, U::Acc>, impl Iterator<Item = usize>),
    ) {
        let Heads { dim_qk, dim_v, .. } = heads;
        let [of_queries, of_keys] = runs;
        for (run, &row) in of_queries.iter_mut().zip(dq_rows) {
            *run = Run::of(&dq[row..row + dim_qk]);
        }
        of_keys.fill(Run::of::<U>(&[]));
        of_keys[0] = Run::of(k_over_keys.data);
        for (runs, key) in of_keys[1..].as_chunks_mut().0.iter_mut().zip(keys) {
            *runs = [Run::of(&sums.dk[key * dim_qk..][..dim_qk]), Run::of(&sums.dv[key * dim_v..][..dim_v])];
        }
    }

    /// g·p and scale·ds of all rows for the keys of a tile in some columns.
    fn scores(&mut self, queries: &Loaded<'_, U>, (k, v): (Tile<'_, U>, Tile<'_, U>), columns: &Range<usize>) {
        let Heads { group_size, dim_qk, dim_v, scale, .. } = self.heads;
        let rows = queries.queries * group_size;
        let q = queries.q.operand(rows, &queries.q_over_rows);
        let d_o = queries.d_o.operand(rows, &queries.d_o_over_rows);
        let ahead = match &self.runs {
            Some([of_queries, of_keys]) => [Lines::runs(&of_queries[..rows]), Lines::runs(of_keys)],
            None => [Lines::none(); 2],
        };
        for (tile, dim, left, scores, ahead) in
            [(k, dim_qk, q, &mut self.weights, ahead[0]), (v, dim_v, d_o, &mut self.d_scores, ahead[1])]
        {
            product_ahead(
                self.isa,
                Product {
                    left,
                    right: Right { data: &tile.data[columns.start..], stride: tile.stride },
                    target: Target {
                        data: &mut scores[columns.start..],
                        rows: &self.at.scores[..rows],
                        store: Store::Write,
                    },
                    columns: columns.len(),
                    steps: Steps::First(dim),
                },
                ahead,
            );
        }
        vectorize(
            self.isa,
            Gradient {
                scores: &mut self.weights[..rows * KEYS],
                d_scores: &mut self.d_scores[..rows * KEYS],
                spans: &self.spans[..rows],
                columns: columns.clone(),
                scale,
                lse: &queries.lse[..rows],
                delta: &queries.delta[..rows],
                gates: &queries.gates[..rows],
            },
        );
    }

    /// Adds dk = Σ scale·ds·q and dv = Σ g·p·do over the rows that see each key.
    fn key_gradients(
        &mut self,
        queries: &Loaded<'_, U>,
        seen: Range<usize>,
        sums: &mut KeySums<'_, U::Acc>,
        key: &impl Fn(usize) -> usize,
    ) {
        let Heads { num_kv_heads, group_size, dim_qk, dim_v, .. } = self.heads;
        let rows = queries.queries * group_size;
        let mut seeing = [[0; 2]; KEYS];
        rows_that_see(&self.spans[..rows], &mut seeing[..seen.end]);
        let mut targets = [0; KEYS];
        for s in seen.clone() {
            targets[s] = key(s) * num_kv_heads + queries.g;
        }
        let columns: [usize; KEYS] = std::array::from_fn(|s| s);
        let [_, p_units, ds_units] = &mut self.units;
        for (source, units, right, dim, target) in [
            (&self.d_scores, ds_units, &queries.q_over_rows, dim_qk, &mut *sums.dk),
            (&self.weights, p_units, &queries.d_o_over_rows, dim_v, &mut *sums.dv),
        ] {
            let places = targets.map(|row| row * dim);
            product(
                self.isa,
                Product {
                    left: Left {
                        data: U::along_columns(self.isa, &source[..rows * KEYS], KEYS, units),
                        rows: &columns[seen.clone()],
                        step: KEYS,
                    },
                    right: Right { data: right, stride: padded(dim) },
                    target: Target { data: target, rows: &places[seen.clone()], store: Store::Add },
                    columns: dim,
                    steps: Steps::Each(&seeing[seen.clone()]),
                },
            );
        }
    }
}

/// The rows that see each key, of spans whose ends never move back: from the first row whose span ends behind it to the
/// last that starts before.
fn rows_that_see(spans: &[[usize; 2]], keys: &mut [[usize; 2]]) {
    let (mut first, mut last) = (0, 0);
    for (key, rows) in keys.iter_mut().enumerate() {
        while first < spans.len() && spans[first][1] <= key {
            first += 1;
        }
        while last < spans.len() && spans[last][0] <= key {
            last += 1;
        }
        *rows = [first, last.max(first)];
    }
}
