//! Gradients of attention: what the branches share.
//!
//! Queries and keys of a sequence are cut into tiles so that no query tile sees a key tile with a higher number. Cell
//! (i, j) is query tile i against key tile j: it computes scores and do·v once and adds to dq of tile i and to dk and
//! dv of tile j, five products in all. The cells of a diagonal i − j = c share no tile, so they run in parallel, one
//! diagonal after the other: sums have an order that depends on the sequence alone, without atomics or copies.

use crate::cpu::Cpu;
use crate::cpu::flash::{Heads, ROWS, seen_by_some, whole_vectors};
use crate::cpu::isa::Isa;
use crate::cpu::keys::{Grid, KEYS, Layout, Order, Tile, Tiles};
use crate::cpu::product::{Left, Product, Right, Steps, Store, Target, product};
use crate::cpu::rows::packed_rows;
use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::simd::{padded, vectorize};
use crate::cpu::softmax::Gradient;
use crate::cpu::tasks::split_rows;
use crate::cpu::unit::Unit;
use crate::{Result, Tensor, TensorMut};
use nsa_core::{CuSeqlens, Element, NsaConfig, Packing, Real, View};
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
        pool: &'a Pool,
        (q, o, lse, d_o): (Tensor<'a, T, 3>, Tensor<'a, T, 3>, Tensor<'a, T::Acc, 2>, Tensor<'a, T, 3>),
        gates: Option<(Tensor<'a, T, 3>, usize)>,
    ) -> Result<Self> {
        let gates = match gates {
            Some((gates, column)) => Some((gates.to_host()?, column)),
            None => None,
        };
        let [n, heads, _] = q.shape();
        let (q, o, lse, d_o) = (q.to_host()?, o.to_host()?, lse.to_host()?, d_o.to_host()?);
        let mut queries = Self { q, lse, d_o, gates, delta: pool.take(0) };
        let mut delta = pool.take(n * heads);
        delta.par_chunks_mut(heads).enumerate().with_min_len(16).for_each(|(t, delta)| {
            for (h, delta) in delta.iter_mut().enumerate() {
                let products = queries.d_o.row(t, h).iter().zip(o.row(t, h)).map(|(&x, &y)| x.to_acc() * y.to_acc());
                *delta = products.sum::<T::Acc>() * queries.gate(t, h);
            }
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

/// Where the gradients of a cell are added.
pub(crate) struct Sums<'a, A> {
    /// dq of the tile of queries, `[queries, Hq, Dk]`.
    pub(crate) dq: &'a mut [A],
    /// dk of the tile of keys, `[keys, G, Dk]`.
    pub(crate) dk: &'a mut [A],
    /// dv of the tile of keys, `[keys, G, Dv]`.
    pub(crate) dv: &'a mut [A],
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

/// Where the loaded queries and the keys at hand lie in the tiles of a [`Sums`].
pub(crate) struct Place<K, Q> {
    /// The KV head.
    pub(crate) g: usize,
    /// The tile of keys in the sequence's grid.
    pub(crate) tile: usize,
    /// Number of key s of that tile in the tile of the sums.
    pub(crate) key: K,
    /// Number of query i in its tile.
    pub(crate) query: Q,
}

/// Up to [`ROWS`] rows of queries in units, and what is computed with them. Row i belongs to query i / R.
pub(crate) struct Cell<'p, U: Unit> {
    isa: Isa,
    heads: Heads<U::Acc>,
    queries: usize,
    /// `[rows, ⌈Dk / STEP⌉]`, `[rows, ⌈Dv / STEP⌉]`: over the dims. With one element a unit the next ones serve.
    q: Scratch<'p, U>,
    d_o: Scratch<'p, U>,
    /// `[⌈rows / STEP⌉, padded(Dk)]`, `[⌈rows / STEP⌉, padded(Dv)]`: over the rows.
    q_over_rows: Scratch<'p, U>,
    d_o_over_rows: Scratch<'p, U>,
    /// One a row.
    lse: Scratch<'p, U::Acc>,
    delta: Scratch<'p, U::Acc>,
    gates: Scratch<'p, U::Acc>,
    /// Scores, then g·p, `[rows, KEYS]`.
    weights: Scratch<'p, U::Acc>,
    /// do·v, then scale·ds, `[rows, KEYS]`.
    d_scores: Scratch<'p, U::Acc>,
    /// In units: scale·ds `[rows, KEYS / STEP]`; g·p and scale·ds `[⌈rows / STEP⌉, KEYS]`.
    units: [Scratch<'p, U>; 3],
    /// The keys that each row sees.
    spans: Scratch<'p, [usize; 2]>,
    at: CellRows<'p>,
}

/// Where the rows lie in the operands of the products.
struct CellRows<'p> {
    q: Scratch<'p, usize>,
    d_o: Scratch<'p, usize>,
    scores: Scratch<'p, usize>,
    units: Scratch<'p, usize>,
    dq: Scratch<'p, usize>,
}

impl<'p, U: Unit> Cell<'p, U> {
    /// Memory for the rows of [`Cell::capacity`] queries.
    pub(crate) fn new(cpu: &'p Cpu, heads: Heads<U::Acc>) -> Self {
        let pool = cpu.pool();
        let rows = Self::capacity(heads) * heads.group_size;
        let (units, dims) = (rows.div_ceil(U::STEP), [heads.dim_qk, heads.dim_v]);
        // Elements one at a time need no second form.
        let second = |len: usize| if U::STEP == 1 { 0 } else { len };
        let stride = |dim: usize| if U::STEP == 1 { padded(dim) } else { dim.div_ceil(U::STEP) };
        let at = CellRows {
            q: pool.multiples(rows, stride(dims[0])),
            d_o: pool.multiples(rows, stride(dims[1])),
            scores: pool.multiples(rows, KEYS),
            units: pool.multiples(rows, KEYS / U::STEP),
            dq: pool.take(rows),
        };
        Self {
            isa: cpu.isa(),
            heads,
            queries: 0,
            q: pool.take(second(rows * stride(dims[0]))),
            d_o: pool.take(second(rows * stride(dims[1]))),
            q_over_rows: pool.take(units * padded(dims[0])),
            d_o_over_rows: pool.take(units * padded(dims[1])),
            lse: pool.take(rows),
            delta: pool.take(rows),
            gates: pool.take(rows),
            weights: pool.take(rows * KEYS),
            d_scores: pool.take(rows * KEYS),
            units: [rows * (KEYS / U::STEP), units * KEYS, units * KEYS].map(|len| pool.take(second(len))),
            spans: pool.take(rows),
            at,
        }
    }

    /// Queries that fit.
    pub(crate) fn capacity(heads: Heads<U::Acc>) -> usize {
        (ROWS / heads.group_size).max(1)
    }

    /// Loads KV head `g` of the queries in the given rows.
    pub(crate) fn load<T: Element<Acc = U::Acc>>(
        &mut self,
        source: &Queries<'_, T>,
        queries: usize,
        token: impl Fn(usize) -> usize,
        g: usize,
    ) {
        let r = self.heads.group_size;
        let rows = queries * r;
        self.queries = queries;
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
            for (at, units) in (0..rows).step_by(U::STEP).zip(right.chunks_exact_mut(padded(dim))) {
                // Behind the last row none is seen: itself stands in.
                let pair = [row(at), row((at + U::STEP - 1).min(rows - 1))];
                U::put_rows(&pair[..U::STEP], units);
            }
            if U::STEP > 1 {
                let rows = left.chunks_exact_mut(dim.div_ceil(U::STEP)).take(rows).enumerate();
                rows.for_each(|(i, units)| U::put_row(row(i), units));
            }
        }
    }

    /// Adds the gradients of a tile of keys, of which query i sees `span(i)`; neither end of a span ever moves back.
    pub(crate) fn step<T: Element<Acc = U::Acc>>(
        &mut self,
        keys: &SeqKeys<'_, T, U>,
        span: impl Fn(usize) -> Range<usize>,
        sums: &mut Sums<'_, U::Acc>,
        place: &Place<impl Fn(usize) -> usize, impl Fn(usize) -> usize>,
    ) {
        let Heads { group_size, dim_qk, .. } = self.heads;
        let rows = self.queries * group_size;
        for query in 0..self.queries {
            let span = span(query);
            for r in 0..group_size {
                let i = query * group_size + r;
                self.spans[i] = [span.start, span.end.max(span.start)];
                self.at.dq[i] = self.heads.row((place.query)(query), place.g, r) * dim_qk;
            }
        }
        let seen = seen_by_some(&self.spans[..rows]);
        if seen.is_empty() {
            return;
        }
        let (k, v) = (keys.k.tile(place.tile, place.g, &mut []), keys.v.tile(place.tile, place.g, &mut []));
        self.scores(k, v, &whole_vectors(&seen));
        let k = keys.k_over_keys.tile(place.tile, place.g, &mut []);
        product(
            self.isa,
            Product {
                left: Left {
                    data: U::along_rows(self.isa, &self.d_scores[..rows * KEYS], &mut self.units[0]),
                    rows: &self.at.units[..rows],
                    step: 1,
                },
                right: Right { data: k.data, stride: k.stride },
                target: Target { data: &mut *sums.dq, rows: &self.at.dq[..rows], store: Store::Add },
                columns: dim_qk,
                steps: Steps::Each(&self.spans[..rows]),
            },
        );
        self.key_gradients(rows, seen, sums, place);
    }

    /// g·p and scale·ds of all rows for the keys of a tile in some columns.
    fn scores(&mut self, k: Tile<'_, U>, v: Tile<'_, U>, columns: &Range<usize>) {
        let Heads { group_size, dim_qk, dim_v, scale, .. } = self.heads;
        let rows = self.queries * group_size;
        let (q, d_o) = if U::STEP == 1 { (&self.q_over_rows, &self.d_o_over_rows) } else { (&self.q, &self.d_o) };
        for (tile, dim, left, places, scores) in
            [(k, dim_qk, q, &self.at.q, &mut self.weights), (v, dim_v, d_o, &self.at.d_o, &mut self.d_scores)]
        {
            let rows = ..rows;
            product(
                self.isa,
                Product {
                    left: Left { data: left, rows: &places[rows], step: 1 },
                    right: Right { data: &tile.data[columns.start..], stride: tile.stride },
                    target: Target {
                        data: &mut scores[columns.start..],
                        rows: &self.at.scores[rows],
                        store: Store::Write,
                    },
                    columns: columns.len(),
                    steps: Steps::First(dim),
                },
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
                lse: &self.lse[..rows],
                delta: &self.delta[..rows],
                gates: &self.gates[..rows],
            },
        );
    }

    /// Adds dk = Σ scale·ds·q and dv = Σ g·p·do over the rows that see each key.
    fn key_gradients(
        &mut self,
        rows: usize,
        seen: Range<usize>,
        sums: &mut Sums<'_, U::Acc>,
        place: &Place<impl Fn(usize) -> usize, impl Fn(usize) -> usize>,
    ) {
        let Heads { num_kv_heads, dim_qk, dim_v, .. } = self.heads;
        let mut seeing = [[0; 2]; KEYS];
        rows_that_see(&self.spans[..rows], &mut seeing[..seen.end]);
        let mut targets = [0; KEYS];
        for s in seen.clone() {
            targets[s] = (place.key)(s) * num_kv_heads + place.g;
        }
        let columns: [usize; KEYS] = std::array::from_fn(|s| s);
        let [_, p_units, ds_units] = &mut self.units;
        for (source, units, right, dim, target) in [
            (&self.d_scores, ds_units, &self.q_over_rows, dim_qk, &mut *sums.dk),
            (&self.weights, p_units, &self.d_o_over_rows, dim_v, &mut *sums.dv),
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

/// The tiles of one sequence.
pub(crate) struct SeqSums<'a, A> {
    /// dq of its tiles of queries.
    pub(crate) dq: Vec<&'a mut [A]>,
    /// dk and dv of its tiles of keys.
    pub(crate) dkv: Vec<(&'a mut [A], &'a mut [A])>,
}

/// Cuts gradients into the tiles of each sequence, `sizes(s)` queries and keys each, and zeroes dk and dv.
pub(crate) fn split_sums<'a, A: Real>(
    config: &NsaConfig,
    packing: &Packing,
    keys: &CuSeqlens,
    sizes: impl Fn(usize) -> [usize; 2],
    (dq, dk, dv): (TensorMut<'a, A, 3>, TensorMut<'a, A, 3>, TensorMut<'a, A, 3>),
) -> Result<Vec<SeqSums<'a, A>>> {
    let (dk, dv) = (zeroed(dk)?, zeroed(dv)?);
    let (dk_len, dv_len) = (config.num_kv_heads() * config.head_dim_qk(), config.num_kv_heads() * config.head_dim_v());
    let dq_len = config.num_heads() * config.head_dim_qk();
    let ranges = || (0..keys.num_seqs()).map(|s| keys.range(s));
    let dq = split_rows(dq.into_host()?.into_data(), dq_len, packing.seqs().map(|seq| seq.rows));
    let dkv = split_rows(dk, dk_len, ranges()).into_iter().zip(split_rows(dv, dv_len, ranges()));
    let seqs = dq.into_iter().zip(dkv).enumerate().map(|(s, (dq, (dk, dv)))| {
        let [queries, keys] = sizes(s);
        let dkv = dk.chunks_mut(keys * dk_len).zip(dv.chunks_mut(keys * dv_len));
        SeqSums { dq: dq.chunks_mut(queries * dq_len).collect(), dkv: dkv.collect() }
    });
    Ok(seqs.collect())
}

/// The elements of a tensor, set to zero.
fn zeroed<A: Real>(tensor: TensorMut<'_, A, 3>) -> Result<&mut [A]> {
    let data = tensor.into_host()?.into_data();
    data.par_chunks_mut(1 << 16).for_each(|chunk| chunk.fill(A::zero()));
    Ok(data)
}

/// Calls `cell(sequence, i, j, sums)` for all cells with i − j < `diagonals(sequence)`.
pub(crate) fn for_each_cell<A: Real>(
    seqs: Vec<SeqSums<'_, A>>,
    diagonals: impl Fn(usize) -> usize + Sync,
    cell: impl Fn(usize, usize, usize, Sums<'_, A>) + Sync,
) {
    seqs.into_par_iter().enumerate().with_max_len(1).for_each(|(s, mut seq)| {
        for diagonal in 0..seq.dq.len().min(diagonals(s)) {
            let queries = seq.dq[diagonal..].par_iter_mut();
            let cells = queries.zip(seq.dkv.par_iter_mut()).enumerate().with_max_len(1);
            cells.for_each(|(j, (dq, (dk, dv)))| cell(s, diagonal + j, j, Sums { dq, dk, dv }));
        }
    });
}
