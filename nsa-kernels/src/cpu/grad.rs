//! Gradients of attention: what the branches share.
//!
//! Queries and keys of a sequence are cut into tiles so that no query tile sees a key tile with a higher number. Cell
//! (i, j) is query tile i against key tile j: it computes scores and do·v once and adds to dq of tile i and to dk and
//! dv of tile j, five products in all. The cells of a diagonal i − j = c share no tile, so they run in parallel, one
//! diagonal after the other: sums have an order that depends on the sequence alone, without atomics or copies.

use crate::cpu::flash::{Heads, ROWS, union};
use crate::cpu::math;
use crate::cpu::rows::Tile;
use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::tasks::split_rows;
use crate::cpu::tile::{self, KEYS, LANES, Left, Right, Store, Target};
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

/// Where the loaded queries and the keys at hand lie in the tiles of a [`Sums`].
pub(crate) struct Place<F> {
    /// The KV head.
    pub(crate) g: usize,
    /// Number of the first key in its tile.
    pub(crate) first_key: usize,
    /// Number of query i in its tile.
    pub(crate) query: F,
}

/// Up to [`ROWS`] rows of queries, packed, and what is computed with them. Row i belongs to query i / R.
pub(crate) struct Cell<'p, A: Real> {
    heads: Heads<A>,
    queries: usize,
    /// Distance between keys in `weights` and `d_scores`.
    lanes: usize,
    /// `[rows, Dk]`, and in panels.
    q: Scratch<'p, A>,
    q_panels: Scratch<'p, A>,
    /// do^c `[rows, Dv]`, and in panels.
    d_o: Scratch<'p, A>,
    d_o_panels: Scratch<'p, A>,
    /// One a row.
    lse: Scratch<'p, A>,
    delta: Scratch<'p, A>,
    /// Scores, then p, `[KEYS][lanes]`.
    weights: Scratch<'p, A>,
    /// do^c·v, then scale·ds, `[KEYS][lanes]`.
    d_scores: Scratch<'p, A>,
    /// The keys that each query sees.
    spans: Scratch<'p, [usize; 2]>,
}

impl<'p, A: Real> Cell<'p, A> {
    /// Memory for the rows of [`Cell::capacity`] queries.
    pub(crate) fn new(pool: &'p Pool, heads: Heads<A>) -> Self {
        let rows = Self::capacity(heads) * heads.group_size;
        let panels = rows.next_multiple_of(LANES);
        // A cache line more than whole panels: the lines of one column then lie in all sets of the cache.
        let lanes = panels + 2 * LANES;
        Self {
            heads,
            queries: 0,
            lanes,
            q: pool.take(rows * heads.dim_qk),
            q_panels: pool.take(panels * heads.dim_qk),
            d_o: pool.take(rows * heads.dim_v),
            d_o_panels: pool.take(panels * heads.dim_v),
            lse: pool.take(panels),
            delta: pool.take(panels),
            weights: pool.take(KEYS * lanes),
            d_scores: pool.take(KEYS * lanes),
            spans: pool.take(rows),
        }
    }

    /// Queries that fit.
    pub(crate) fn capacity(heads: Heads<A>) -> usize {
        (ROWS / heads.group_size).max(1)
    }

    /// Loads KV head `g` of the queries in the given rows.
    #[inline(always)]
    pub(crate) fn load<T: Element<Acc = A>>(
        &mut self,
        source: &Queries<'_, T>,
        queries: impl ExactSizeIterator<Item = usize>,
        g: usize,
    ) {
        let Heads { group_size, dim_qk, dim_v, .. } = self.heads;
        self.queries = queries.len();
        self.lse.fill(A::zero());
        self.delta.fill(A::zero());
        for (i, t) in queries.enumerate() {
            for r in 0..group_size {
                let (row, h) = (i * group_size + r, g * group_size + r);
                math::widen(source.q.row(t, h), &mut self.q[row * dim_qk..][..dim_qk]);
                let d_o = &mut self.d_o[row * dim_v..][..dim_v];
                math::widen(source.d_o.row(t, h), d_o);
                let gate = source.gate(t, h);
                d_o.iter_mut().for_each(|x| *x *= gate);
                self.lse[row] = source.lse.row(t)[h];
                self.delta[row] = source.delta[self.heads.row(t, g, r)];
            }
        }
        let rows = self.queries * group_size;
        tile::pack(&self.q[..rows * dim_qk], dim_qk, &mut self.q_panels);
        tile::pack(&self.d_o[..rows * dim_v], dim_v, &mut self.d_o_panels);
    }

    /// Adds the gradients of up to [`KEYS`] keys, of which query i sees `span(i)`; neither end of a span ever moves
    /// back.
    #[inline(always)]
    pub(crate) fn step(
        &mut self,
        (k, v, num_keys): (Tile<'_, A>, Tile<'_, A>, usize),
        span: impl Fn(usize) -> Range<usize>,
        sums: &mut Sums<'_, A>,
        place: &Place<impl Fn(usize) -> usize>,
    ) {
        let Heads { num_kv_heads, group_size, dim_qk, dim_v, .. } = self.heads;
        for (i, place) in self.spans[..self.queries].iter_mut().enumerate() {
            let span = span(i);
            *place = [span.start, span.end];
        }
        let rows = self.queries * group_size;
        for first in (0..rows).step_by(LANES) {
            let spans: [Range<usize>; LANES] = std::array::from_fn(|x| {
                let [start, end] = self.spans[(first + x).min(rows - 1) / group_size];
                start..end
            });
            let Some(seen) = union(&spans) else { continue };
            self.scores(k, v, first, seen);
            let d_scores = Left::Columns { data: &self.d_scores[first..], stride: self.lanes };
            let keys = Right { data: k.data, stride: k.stride };
            let row = |i: usize| {
                let (query, r) = ((first + i) / group_size, (first + i) % group_size);
                self.heads.row((place.query)(query), place.g, r) * dim_qk
            };
            let target = Target { data: &mut *sums.dq, row, store: Store::Add };
            tile::product([(rows - first).min(LANES), dim_qk], d_scores, keys, target, |i| spans[i].clone());
        }
        let mut seeing = [const { 0..0 }; KEYS];
        self.seeing(&mut seeing[..num_keys]);
        let d_scores = Left::Rows { data: &self.d_scores, stride: self.lanes };
        let queries = Right { data: &self.q, stride: dim_qk };
        let key = |s: usize| (place.first_key + s) * num_kv_heads + place.g;
        let target = Target { data: &mut *sums.dk, row: |s| key(s) * dim_qk, store: Store::Add };
        tile::product([num_keys, dim_qk], d_scores, queries, target, |s| seeing[s].clone());
        let weights = Left::Rows { data: &self.weights, stride: self.lanes };
        let d_o = Right { data: &self.d_o, stride: dim_v };
        let target = Target { data: &mut *sums.dv, row: |s| key(s) * dim_v, store: Store::Add };
        tile::product([num_keys, dim_v], weights, d_o, target, |s| seeing[s].clone());
    }

    /// p and scale·ds of the panel of row `first` for the keys `seen`. Those of keys that a row does not see are never
    /// used.
    #[inline(always)]
    fn scores(&mut self, k: Tile<'_, A>, v: Tile<'_, A>, first: usize, seen: Range<usize>) {
        let Heads { dim_qk, dim_v, scale, .. } = self.heads;
        let at = seen.start * self.lanes + first;
        let sides = [(k, dim_qk, &self.q_panels, &mut self.weights), (v, dim_v, &self.d_o_panels, &mut self.d_scores)];
        for (tile, dim, panels, target) in sides {
            let rows = Left::Rows { data: &tile.data[seen.start * tile.stride..], stride: tile.stride };
            let panel = Right { data: &panels[first * dim..][..LANES * dim], stride: LANES };
            let target = Target { data: &mut target[at..], row: |i| i * self.lanes, store: Store::Write };
            tile::product([seen.len(), LANES], rows, panel, target, |_| 0..dim);
        }
        let lse = self.lse[first..].first_chunk().expect("a panel");
        let delta = self.delta[first..].first_chunk().expect("a panel");
        let weights = self.weights[at..].chunks_mut(self.lanes);
        let d_scores = self.d_scores[at..].chunks_mut(self.lanes);
        for (weights, d_scores) in weights.zip(d_scores).take(seen.len()) {
            let weights = weights.first_chunk_mut().expect("a panel");
            let d_scores = d_scores.first_chunk_mut().expect("a panel");
            differentiate(weights, d_scores, scale, lse, delta);
        }
    }

    /// The rows that see each key: from the first query whose span ends behind it to the last that starts before.
    #[inline(always)]
    fn seeing(&self, keys: &mut [Range<usize>]) {
        let spans = &self.spans[..self.queries];
        let (mut first, mut last) = (0, 0);
        for (key, rows) in keys.iter_mut().enumerate() {
            while first < spans.len() && spans[first][1] <= key {
                first += 1;
            }
            while last < spans.len() && spans[last][0] <= key {
                last += 1;
            }
            *rows = first * self.heads.group_size..last.max(first) * self.heads.group_size;
        }
    }
}

/// Turns scores into p = exp(scale·score − lse), and do^c·v into scale·ds = scale·p·(do^c·v − δ).
#[inline(never)]
fn differentiate<A: Real>(
    weights: &mut [A; LANES],
    d_scores: &mut [A; LANES],
    scale: A,
    lse: &[A; LANES],
    delta: &[A; LANES],
) {
    for x in 0..LANES {
        weights[x] = math::exp(weights[x] * scale - lse[x]);
        d_scores[x] = weights[x] * (d_scores[x] - delta[x]) * scale;
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
