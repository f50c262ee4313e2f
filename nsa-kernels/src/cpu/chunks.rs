//! Attention of one query to many keys, which bounds decoding: bound by reading K and V.
//!
//! FLOP a row of K and V: 2·(Dk + Dv)·R for (Dk + Dv) elements read once: at R = 16 the products take as long as one core's
//! reads, in f32 and in bf16. Keys are read where they lie and spread over a vector of query rows; softmax runs down the
//! keys. While a tile is computed the next one comes nearer.
//!
//! The keys are cut into chunks of [`CHUNK`], each a task with a softmax of its own; their results are joined in the order
//! of the chunks, so the number of threads does not matter.

use crate::cpu::Cpu;
use crate::cpu::ahead::Lines;
use crate::cpu::flash::Heads;
use crate::cpu::keys::KEYS;
use crate::cpu::product::{Left, Product, Right, Steps, Store, Target, product_ahead};
use crate::cpu::rows::SeqRows;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{Compute, Simd, padded, vectorize};
use crate::cpu::softmax::{Columns, finite};
use crate::cpu::unit::Unit;
use nsa_core::{Element, Real, View};
use num_traits::Zero;
use rayon::prelude::*;
use std::ops::Range;

/// Keys of a task: 128 KiB of them in f32 with 128 dims, some ten microseconds.
pub(crate) const CHUNK: usize = 256;

/// Keys and values of one sequence.
pub(crate) struct Keys<'a, T, F> {
    pub(crate) k: SeqRows<'a, T>,
    pub(crate) v: SeqRows<'a, T>,
    /// How many there are.
    pub(crate) len: usize,
    /// The stored row of key i; ascending, but for a ring's end.
    pub(crate) row: F,
}

/// The heads of one query for one KV head.
pub(crate) struct Query<'p, U: Unit> {
    cpu: &'p Cpu,
    heads: Heads<U::Acc>,
    g: usize,
    /// Heads, to whole vectors.
    lanes: usize,
    /// The right operand of a sum over the dims: `[⌈Dk / STEP⌉, lanes]`.
    q: Scratch<'p, U>,
    /// 0, 1, …: the heads' weights of a key.
    weights: Scratch<'p, usize>,
    /// The heads' sums of a part.
    sums: Scratch<'p, usize>,
}

/// Memory of one task.
struct Memory<'p, U: Unit> {
    /// A tile of K or V.
    tile: Scratch<'p, U>,
    /// The weights of a chunk in units: `[⌈CHUNK / STEP⌉, lanes]`.
    weights: Scratch<'p, U>,
}

impl<'p, U: Unit> Query<'p, U> {
    /// KV head `g` of row `t` of q.
    pub(crate) fn new<T: Element<Acc = U::Acc>>(
        cpu: &'p Cpu,
        heads: Heads<U::Acc>,
        q: &View<'_, T, 3>,
        t: usize,
        g: usize,
    ) -> Self {
        let (pool, lanes, units) = (cpu.pool(), padded(heads.group_size), heads.dim_qk.div_ceil(U::STEP));
        let (mut row, mut panel) = (pool.take(units), pool.zeroed::<U>(units * lanes));
        for r in 0..heads.group_size {
            U::put_row(q.row(t, heads.row(0, g, r)), &mut row);
            for (p, &unit) in row.iter().enumerate() {
                panel[p * lanes + r] = unit;
            }
        }
        let (weights, sums) =
            (pool.multiples(heads.group_size, 1), pool.multiples(heads.group_size, padded(heads.dim_v)));
        Self { cpu, heads, g, lanes, q: panel, weights, sums }
    }

    /// Heads, to whole vectors.
    pub(crate) fn lanes(&self) -> usize {
        self.lanes
    }

    /// Attends to all keys, chunk by chunk. Their weights exp(score − the chunk's maximum), `[keys, lanes]`, are left in
    /// `kept` if it is not empty.
    pub(crate) fn attend<T: Element<Acc = U::Acc>>(
        &self,
        keys: &Keys<'_, T, impl Fn(usize) -> usize + Sync>,
        kept: &mut [U::Acc],
    ) -> Parts<'p, U::Acc> {
        let (pool, chunk_len) = (self.cpu.pool(), CHUNK * self.lanes);
        let sums = self.heads.group_size * padded(self.heads.dim_v);
        let mut parts = Parts {
            data: pool.take(keys.len.div_ceil(CHUNK) * (2 * self.lanes + sums)),
            len: 2 * self.lanes + sums,
            lanes: self.lanes,
        };
        let tasks = parts.data.par_chunks_mut(parts.len).enumerate().with_max_len(1);
        let chunk = |i: usize| i * CHUNK..((i + 1) * CHUNK).min(keys.len);
        if kept.is_empty() {
            tasks.for_each(|(i, part)| self.part(keys, chunk(i), &mut pool.take(chunk(i).len() * self.lanes), part));
        } else {
            let kept = kept.par_chunks_mut(chunk_len);
            tasks.zip(kept).for_each(|((i, part), weights)| self.part(keys, chunk(i), weights, part));
        }
        parts
    }

    /// The softmax over keys `range`: weights `[range, lanes]`, and a part of [`Parts`].
    fn part<T: Element<Acc = U::Acc>>(
        &self,
        keys: &Keys<'_, T, impl Fn(usize) -> usize>,
        range: Range<usize>,
        weights: &mut [U::Acc],
        part: &mut [U::Acc],
    ) {
        let (pool, isa, Heads { dim_qk, dim_v, scale, .. }) = (self.cpu.pool(), self.cpu.isa(), self.heads);
        let pairs = if U::STEP == 1 { 0 } else { range.len().div_ceil(U::STEP) * self.lanes };
        let tile = (KEYS * dim_qk.div_ceil(U::STEP)).max(KEYS / U::STEP * padded(dim_v));
        let mut memory = Memory { tile: pool.take(tile), weights: pool.take(pairs) };
        let tiles = || range.clone().step_by(KEYS).map(|start| start..(start + KEYS).min(range.end));
        let after = |end: usize| end..(end + KEYS).min(keys.len);
        for tile in tiles() {
            let ahead = match tile.end < range.end {
                true => self.lines(&keys.k, keys, after(tile.end)),
                false => self.lines(&keys.v, keys, after(range.start)),
            };
            let at = (tile.start - range.start) * self.lanes;
            self.scores(keys, tile, &mut memory, &mut weights[at..], ahead);
        }
        let (max, rest) = part.split_at_mut(self.lanes);
        let (sum, o) = rest.split_at_mut(self.lanes);
        vectorize(isa, Columns { scores: weights, scale, max, sum });
        o.fill(U::Acc::zero());
        let weights = U::along_columns(isa, weights, self.lanes, &mut memory.weights);
        for tile in tiles() {
            let ahead = match tile.end < range.end {
                true => self.lines(&keys.v, keys, after(tile.end)),
                false => self.lines(&keys.k, keys, after(range.end)),
            };
            let at = (tile.start - range.start) / U::STEP * self.lanes;
            self.add_values(keys, tile, &mut memory.tile, &weights[at..], o, ahead);
        }
    }

    /// Scores of a few keys: `[keys, lanes]`.
    fn scores<T: Element<Acc = U::Acc>>(
        &self,
        keys: &Keys<'_, T, impl Fn(usize) -> usize>,
        tile: Range<usize>,
        memory: &mut Memory<'_, U>,
        scores: &mut [U::Acc],
        ahead: Lines<'_>,
    ) {
        let (dim, count) = (self.heads.dim_qk, tile.len());
        let units = dim.div_ceil(U::STEP);
        let (data, stride) = self.in_place(&keys.k, keys, &tile).unwrap_or_else(|| {
            for (key, units) in tile.zip(memory.tile.chunks_exact_mut(units)) {
                U::put_row(keys.k.row((keys.row)(key), self.g), units);
            }
            (&memory.tile, units)
        });
        let (left, places): ([usize; KEYS], [usize; KEYS]) =
            (std::array::from_fn(|i| i * stride), std::array::from_fn(|i| i * self.lanes));
        let product = Product {
            left: Left { data, rows: &left[..count], step: 1 },
            right: Right { data: &self.q, stride: self.lanes },
            target: Target { data: scores, rows: &places[..count], store: Store::Write },
            columns: self.lanes,
            steps: Steps::First(dim),
        };
        product_ahead(self.cpu.isa(), product, ahead);
    }

    /// Adds Σ weight·v over a few keys to o `[R, padded(Dv)]`.
    fn add_values<T: Element<Acc = U::Acc>>(
        &self,
        keys: &Keys<'_, T, impl Fn(usize) -> usize>,
        tile: Range<usize>,
        buffer: &mut [U],
        weights: &[U],
        o: &mut [U::Acc],
        ahead: Lines<'_>,
    ) {
        let (dim_v, stride, count) = (self.heads.dim_v, padded(self.heads.dim_v), tile.len());
        let whole = U::STEP == 1 && stride == dim_v;
        let in_place = if whole { self.in_place(&keys.v, keys, &tile) } else { None };
        let (data, row_stride) = in_place.unwrap_or_else(|| {
            // Behind the last key none is seen: itself stands in.
            let row = |i: usize| keys.v.row((keys.row)((tile.start + i).min(tile.end - 1)), self.g);
            U::put_tile(self.cpu.isa(), count, row, stride, buffer);
            (buffer, stride)
        });
        let product = Product {
            left: Left { data: weights, rows: &self.weights, step: self.lanes },
            right: Right { data, stride: row_stride },
            target: Target { data: o, rows: &self.sums, store: Store::Add },
            columns: dim_v,
            steps: Steps::First(count),
        };
        product_ahead(self.cpu.isa(), product, ahead);
    }

    /// The rows of keys as units where they lie, if they lie so.
    fn in_place<'b, T: Element<Acc = U::Acc>>(
        &self,
        rows: &'b SeqRows<'_, T>,
        keys: &Keys<'_, T, impl Fn(usize) -> usize>,
        tile: &Range<usize>,
    ) -> Option<(&'b [U], usize)> {
        let (data, stride) = self.spaced(rows, keys, tile)?;
        let even = stride.is_multiple_of(U::STEP);
        U::borrow(data).filter(|_| even).map(|units| (units, stride / U::STEP))
    }

    /// The rows of keys where they lie, if they lie one behind the other.
    fn spaced<'b, T: Element<Acc = U::Acc>>(
        &self,
        rows: &'b SeqRows<'_, T>,
        keys: &Keys<'_, T, impl Fn(usize) -> usize>,
        tile: &Range<usize>,
    ) -> Option<(&'b [T], usize)> {
        let (first, last) = ((keys.row)(tile.start), (keys.row)(tile.end - 1));
        // Positions ascend, so rows as far apart as their numbers are consecutive.
        let consecutive = last.checked_sub(first) == Some(tile.len() - 1);
        if consecutive { rows.spaced(first..last + 1, self.g) } else { None }
    }

    /// The lines of some keys; none if they do not lie one behind the other.
    fn lines<T: Element<Acc = U::Acc>>(
        &self,
        rows: &SeqRows<'_, T>,
        keys: &Keys<'_, T, impl Fn(usize) -> usize>,
        tile: Range<usize>,
    ) -> Lines<'_> {
        if tile.is_empty() {
            return Lines::none();
        }
        let spaced = self.spaced(rows, keys, &tile);
        spaced.map_or_else(Lines::none, |(data, stride)| Lines::new(data, rows.dim(), stride))
    }
}

/// The softmax of a query over the chunks of its keys.
pub(crate) struct Parts<'p, A> {
    /// A part is the greatest scaled score and Σ exp(score − max), one a lane each, and Σ exp(score − max)·v,
    /// `[R, padded(Dv)]`.
    data: Scratch<'p, A>,
    /// Length of a part.
    len: usize,
    lanes: usize,
}

/// What the parts are to the whole.
pub(crate) struct Totals<'p, A> {
    /// exp(the part's maximum − the greatest): `[parts, lanes]`.
    pub(crate) decays: Scratch<'p, A>,
    /// Greatest scaled score, one a lane.
    pub(crate) max: Scratch<'p, A>,
    /// Σ exp(score − max), one a lane.
    pub(crate) sum: Scratch<'p, A>,
}

impl<A: Real> Parts<'_, A> {
    /// What they are to the whole.
    pub(crate) fn totals<'p>(&self, cpu: &'p Cpu) -> Totals<'p, A> {
        let (pool, lanes, count) = (cpu.pool(), self.lanes, self.data.len() / self.len);
        let mut totals = Totals { decays: pool.take(count * lanes), max: pool.take(lanes), sum: pool.take(lanes) };
        let Totals { decays, max, sum } = &mut totals;
        vectorize(cpu.isa(), Decays { parts: &self.data, len: self.len, decays, max, sum });
        totals
    }

    /// Σ exp(score − max)·v of the heads over all keys, `[R, padded(Dv)]`.
    pub(crate) fn join<'p>(&self, cpu: &'p Cpu, heads: Heads<A>, totals: &Totals<'_, A>) -> Scratch<'p, A> {
        let stride = padded(heads.dim_v);
        let mut o = cpu.pool().take(heads.group_size * stride);
        let (parts, len, decays, lanes) = (&self.data, self.len, &totals.decays, self.lanes);
        vectorize(cpu.isa(), Join { parts, len, decays, lanes, stride, o: &mut o });
        o
    }
}

/// Computes [`Totals`].
struct Decays<'a, A> {
    /// Parts of this length.
    parts: &'a [A],
    len: usize,
    /// Written, as the fields of [`Totals`].
    decays: &'a mut [A],
    max: &'a mut [A],
    sum: &'a mut [A],
}

impl<'a, A: Real> Compute<A> for Decays<'a, A> {
    type As<B: Real> = Decays<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        let lanes = self.max.len();
        for at in (0..lanes).step_by(S::WIDTH) {
            let mut best = s.splat(A::neg_infinity());
            for part in self.parts.chunks_exact(self.len) {
                best = s.max(s.read(&part[at..]), best);
            }
            s.write(&mut self.max[at..], best);
            // The sums' place serves for what is subtracted.
            for (shift, &max) in self.sum[at..at + S::WIDTH].iter_mut().zip(&self.max[at..]) {
                *shift = finite(max);
            }
            let shift = s.read(&self.sum[at..]);
            let mut sum = s.splat(A::zero());
            for (part, decays) in self.parts.chunks_exact(self.len).zip(self.decays.chunks_exact_mut(lanes)) {
                let decay = s.exp(s.sub(s.read(&part[at..]), shift));
                s.write(&mut decays[at..], decay);
                sum = s.add(sum, s.mul(s.read(&part[lanes + at..]), decay));
            }
            s.write(&mut self.sum[at..], sum);
        }
    }

    fn cast<B: Real>(self) -> Decays<'a, B> {
        Decays {
            parts: bytemuck::cast_slice(self.parts),
            len: self.len,
            decays: bytemuck::cast_slice_mut(self.decays),
            max: bytemuck::cast_slice_mut(self.max),
            sum: bytemuck::cast_slice_mut(self.sum),
        }
    }
}

/// Σ over the parts of decay · o.
struct Join<'a, A> {
    /// Parts of this length.
    parts: &'a [A],
    len: usize,
    /// `[parts, lanes]`.
    decays: &'a [A],
    lanes: usize,
    /// Distance between the rows of o.
    stride: usize,
    /// Written: `[R, stride]`.
    o: &'a mut [A],
}

impl<'a, A: Real> Compute<A> for Join<'a, A> {
    type As<B: Real> = Join<'a, B>;

    #[inline(always)]
    fn run<S: Simd<A>>(self, s: S) {
        for (lane, o) in self.o.chunks_exact_mut(self.stride).enumerate() {
            for (v, o) in o.chunks_exact_mut(S::WIDTH).enumerate() {
                let at = 2 * self.lanes + lane * self.stride + v * S::WIDTH;
                let mut sum = s.splat(A::zero());
                for (part, decays) in self.parts.chunks_exact(self.len).zip(self.decays.chunks_exact(self.lanes)) {
                    sum = s.mul_add(s.read(&part[at..]), s.splat(decays[lane]), sum);
                }
                s.write(o, sum);
            }
        }
    }

    fn cast<B: Real>(self) -> Join<'a, B> {
        Join {
            parts: bytemuck::cast_slice(self.parts),
            len: self.len,
            decays: bytemuck::cast_slice(self.decays),
            lanes: self.lanes,
            stride: self.stride,
            o: bytemuck::cast_slice_mut(self.o),
        }
    }
}
