//! One decoding step on the CPU, bound by reading the caches.
//!
//! FLOP a row of K and V: 2·(Dk + Dv)·R for (Dk + Dv) elements read once: at R = 16 in bf16 the products are as long as
//! the reads. Keys are read where they lie and spread over a vector of query rows; softmax runs down the keys.
//!
//! The keys of a branch are cut into chunks of [`CHUNK`], each a task with a softmax of its own; their results are joined
//! in the order of the chunks, so neither threads nor other sequences matter. Compressed and window chunks come first,
//! then the selection, then the selected blocks.

use crate::Result;
use crate::cpu::cmp::Selector;
use crate::cpu::flash::Heads;
use crate::cpu::keys::KEYS;
use crate::cpu::product::{Left, Product, Right, Steps, Store, Target, product};
use crate::cpu::rows::SeqRows;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{padded, vectorize};
use crate::cpu::softmax::{Columns, MixLanes, finite};
use crate::cpu::unit::{Pair, Unit};
use crate::cpu::{Cpu, gate};
use crate::op::decode::{Cache, RowsRead, Step};
use nsa_core::{Element, NsaConfig, View, index};
use num_traits::{Float, Zero};
use rayon::prelude::*;
use std::ops::Range;

/// Keys of a task: 128 KiB of them in f32 with 128 dims, some ten microseconds.
const CHUNK: usize = 256;

/// The caches of one sequence in host memory, keys and values.
struct Caches<'a, T> {
    context: usize,
    cmp: [SeqRows<'a, T>; 2],
    slc: [SeqRows<'a, T>; 2],
    /// Rings with all their rows.
    win: [SeqRows<'a, T>; 2],
}

impl<'a, T: Element> Caches<'a, T> {
    fn new(cache: &'a Cache<'a, T>) -> Result<Self> {
        Ok(Self {
            context: cache.context,
            cmp: [SeqRows::paged(&cache.k_cmp), SeqRows::paged(&cache.v_cmp)],
            slc: [SeqRows::paged(&cache.k_slc), SeqRows::paged(&cache.v_slc)],
            win: [SeqRows::whole(cache.k_win.to_host()?), SeqRows::whole(cache.v_win.to_host()?)],
        })
    }
}

/// See `op::decode::step`.
pub(crate) fn step<T: Element>(cpu: &Cpu, args: Step<'_, T>) -> Result<RowsRead> {
    match cpu.multiplies_pairs(T::DTYPE) {
        true => step_in::<T, Pair<T::Acc>>(cpu, args),
        false => step_in::<T, T::Acc>(cpu, args),
    }
}

fn step_in<T: Element, U: Unit<Acc = T::Acc>>(cpu: &Cpu, args: Step<'_, T>) -> Result<RowsRead> {
    let Step { config, caches, q, gates, o, block_indices } = args;
    let (q, gates) = (q.to_host()?, gates.to_host()?);
    let caches = caches.iter().map(Caches::new).collect::<Result<Vec<_>>>()?;
    let (groups, group_size, dim_v) = (config.num_kv_heads(), config.group_size(), config.head_dim_v());
    let o = o.into_host()?.into_data().par_chunks_exact_mut(group_size * dim_v);
    let lists = block_indices.into_host()?.into_data().par_chunks_exact_mut(config.select_count());
    let selector = Selector::new(config);
    let tasks = o.zip(lists).enumerate().with_max_len(1);
    let attend = |(task, (o, list))| {
        let (s, g) = (task / groups, task % groups);
        let query = Query::<T, U>::new(cpu, config, &q, (s, g), &caches[s]);
        query.attend(&selector, &gates, o, list)
    };
    let rows: Vec<usize> = tasks.map(attend).collect();
    Ok(rows.chunks_exact(groups).map(|rows| rows.iter().copied().max().unwrap_or(0)).collect())
}

/// The current token of one sequence, for one KV head.
struct Query<'a, T, U: Unit> {
    cpu: &'a Cpu,
    config: &'a NsaConfig,
    heads: Heads<U::Acc>,
    s: usize,
    g: usize,
    caches: &'a Caches<'a, T>,
    /// Rows of queries, to whole vectors.
    lanes: usize,
    /// The query's rows as the right operand of a sum over the dims: `[⌈Dk / STEP⌉, lanes]`.
    q: Scratch<'a, U>,
}

/// The keys of a branch, of which some are a task's.
#[derive(Clone, Copy)]
struct Branch<'a, T, F> {
    /// Keys and values.
    rows: &'a [SeqRows<'a, T>; 2],
    /// The stored row of key `i`.
    row: F,
}

/// The softmax of the query over some keys.
struct Part<'p, U: Unit> {
    /// exp(score − max), `[keys, lanes]`.
    weights: Scratch<'p, U::Acc>,
    /// Greatest scaled score, one a lane.
    max: Scratch<'p, U::Acc>,
    /// Σ exp(score − max), one a lane.
    sum: Scratch<'p, U::Acc>,
    /// Σ exp(score − max)·v, `[R, padded(Dv)]`.
    o: Scratch<'p, U::Acc>,
}

impl<'a, T: Element, U: Unit<Acc = T::Acc>> Query<'a, T, U> {
    fn new(
        cpu: &'a Cpu,
        config: &'a NsaConfig,
        q: &View<'_, T, 3>,
        (s, g): (usize, usize),
        caches: &'a Caches<'a, T>,
    ) -> Self {
        let heads = Heads::new(config);
        let (lanes, units) = (padded(heads.group_size), heads.dim_qk.div_ceil(U::STEP));
        let (mut row, mut panel) = (cpu.pool().take(units), cpu.pool().zeroed::<U>(units * lanes));
        for r in 0..heads.group_size {
            U::put_row(q.row(s, g * heads.group_size + r), &mut row);
            for (p, &unit) in row.iter().enumerate() {
                panel[p * lanes + r] = unit;
            }
        }
        Self { cpu, config, heads, s, g, caches, lanes, q: panel }
    }

    /// Writes o `[R, Dv]` and the selected blocks `[n]`; returns the rows read.
    fn attend(&self, selector: &Selector<T::Acc>, gates: &View<'_, T, 3>, o: &mut [T], list: &mut [i32]) -> usize {
        let position = self.caches.context - 1;
        let window = index::window_tokens(self.config, position);
        let cmp = Branch { rows: &self.caches.cmp, row: |i| i };
        let win = Branch { rows: &self.caches.win, row: |i| index::ring_row(self.config.window(), window.start + i) };
        let (blocks, cmp_chunks) = chunks(self.caches.cmp[0].len());
        let (tokens, win_chunks) = chunks(window.len());
        let parts = (0..cmp_chunks + win_chunks).into_par_iter().with_max_len(1);
        let mut parts: Vec<Part<'_, U>> = parts
            .map(|i| match i.checked_sub(cmp_chunks) {
                None => self.part(&cmp, blocks(i)),
                Some(i) => self.part(&win, tokens(i)),
            })
            .collect();
        let win = self.join(&parts.split_off(cmp_chunks));
        self.select(selector, &parts, list);
        let cmp = self.join(&parts);
        drop(parts);
        let selected = |i: usize| {
            let block = self.config.select_block();
            list[i / block] as usize * block + i % block
        };
        let slc = Branch { rows: &self.caches.slc, row: selected };
        // Blocks are whole but for the query's own, which comes last.
        let listed = list.iter().filter_map(|&j| usize::try_from(j).ok());
        let read: usize = listed.map(|j| index::select_tokens(self.config, j, position).len()).sum();
        let (tokens, slc_chunks) = chunks(read);
        let parts = (0..slc_chunks).into_par_iter().with_max_len(1);
        let parts: Vec<Part<'_, U>> = parts.map(|i| self.part(&slc, tokens(i))).collect();
        self.store([cmp, self.join(&parts), win], gates, o);
        self.caches.cmp[0].len() + read + window.len()
    }

    /// The softmax over keys `range` of a branch.
    fn part(&self, branch: &Branch<'_, T, impl Fn(usize) -> usize>, range: Range<usize>) -> Part<'a, U> {
        let (pool, isa, Heads { group_size, dim_v, scale, .. }) = (self.cpu.pool(), self.cpu.isa(), self.heads);
        let mut weights = pool.take(range.len() * self.lanes);
        for tile in range.clone().step_by(KEYS) {
            let at = (tile - range.start) * self.lanes;
            self.scores(branch, tile..(tile + KEYS).min(range.end), &mut weights[at..]);
        }
        let (mut max, mut sum) = (pool.take(self.lanes), pool.take(self.lanes));
        vectorize(isa, Columns { scores: &mut weights, scale, max: &mut max, sum: &mut sum });
        let mut o = pool.zeroed(group_size * padded(dim_v));
        for tile in range.clone().step_by(KEYS) {
            let keys = tile..(tile + KEYS).min(range.end);
            let at = (tile - range.start) * self.lanes;
            self.add_values(branch, keys.clone(), &weights[at..][..keys.len() * self.lanes], &mut o);
        }
        Part { weights, max, sum, o }
    }

    /// Scores of a few keys: `[keys, lanes]`.
    fn scores(&self, branch: &Branch<'_, T, impl Fn(usize) -> usize>, keys: Range<usize>, scores: &mut [U::Acc]) {
        let (dim, count) = (self.heads.dim_qk, keys.len());
        let units = dim.div_ceil(U::STEP);
        let mut buffer = None;
        let (data, stride) = self.in_place(&branch.rows[0], branch, &keys).unwrap_or_else(|| {
            let buffer = buffer.insert(self.cpu.pool().take::<U>(count * units));
            for (key, units) in keys.clone().zip(buffer.chunks_exact_mut(units)) {
                U::put_row(branch.rows[0].row((branch.row)(key), self.g), units);
            }
            (&buffer[..], units)
        });
        let (left, places): ([usize; KEYS], [usize; KEYS]) =
            (std::array::from_fn(|i| i * stride), std::array::from_fn(|i| i * self.lanes));
        product(
            self.cpu.isa(),
            Product {
                left: Left { data, rows: &left[..count], step: 1 },
                right: Right { data: &self.q, stride: self.lanes },
                target: Target { data: scores, rows: &places[..count], store: Store::Write },
                columns: self.lanes,
                steps: Steps::First(dim),
            },
        );
    }

    /// Adds Σ weight·v over a few keys to o `[R, padded(Dv)]`.
    fn add_values(
        &self,
        branch: &Branch<'_, T, impl Fn(usize) -> usize>,
        keys: Range<usize>,
        weights: &[U::Acc],
        o: &mut [U::Acc],
    ) {
        let (pool, isa, Heads { group_size, dim_v, .. }) = (self.cpu.pool(), self.cpu.isa(), self.heads);
        let (mut buffer, stride) = (None, padded(dim_v));
        let whole = |(data, row_stride)| (U::STEP == 1 && stride == dim_v).then_some((data, row_stride));
        let in_place = self.in_place(&branch.rows[1], branch, &keys).and_then(whole);
        let (data, row_stride) = in_place.unwrap_or_else(|| {
            let buffer = buffer.insert(pool.take::<U>(keys.len().div_ceil(U::STEP) * stride));
            for (key, units) in keys.clone().step_by(U::STEP).zip(buffer.chunks_exact_mut(stride)) {
                // Behind the last key none is seen: itself stands in.
                let rows = [key, (key + U::STEP - 1).min(keys.end - 1)];
                let rows = rows.map(|key| branch.rows[1].row((branch.row)(key), self.g));
                U::put_rows(&rows[..U::STEP], units);
            }
            (&buffer[..], stride)
        });
        let mut units = pool.take(if U::STEP == 1 { 0 } else { keys.len().div_ceil(U::STEP) * self.lanes });
        let (left, places) = (pool.multiples(group_size, 1), pool.multiples(group_size, stride));
        product(
            isa,
            Product {
                left: Left {
                    data: U::along_columns(isa, weights, self.lanes, &mut units),
                    rows: &left,
                    step: self.lanes,
                },
                right: Right { data, stride: row_stride },
                target: Target { data: o, rows: &places, store: Store::Add },
                columns: dim_v,
                steps: Steps::First(keys.len()),
            },
        );
    }

    /// The rows of keys as units where they lie, if they lie so.
    fn in_place<'b>(
        &self,
        rows: &'b SeqRows<'_, T>,
        branch: &Branch<'_, T, impl Fn(usize) -> usize>,
        keys: &Range<usize>,
    ) -> Option<(&'b [U], usize)> {
        let (first, last) = ((branch.row)(keys.start), (branch.row)(keys.end - 1));
        // Positions ascend, so rows as far apart as their numbers are consecutive.
        if last.checked_sub(first) != Some(keys.len() - 1) {
            return None;
        }
        let (data, stride) = rows.spaced(first..last + 1, self.g)?;
        let even = stride.is_multiple_of(U::STEP);
        U::borrow(data).filter(|_| even).map(|units| (units, stride / U::STEP))
    }

    /// Writes the blocks that the query selects by the softmax over the compressed keys.
    fn select(&self, selector: &Selector<T::Acc>, parts: &[Part<'_, U>], list: &mut [i32]) {
        let (pool, position) = (self.cpu.pool(), self.caches.context - 1);
        let mut importance = selector.importance(self.config, pool, position);
        let (max, sum) = self.totals(parts);
        let mut factors = pool.take(self.lanes);
        let mut at = 0;
        for part in parts {
            for (lane, factor) in factors.iter_mut().enumerate() {
                let seen = lane < self.heads.group_size;
                let rescaled = || (part.max[lane] - finite(max[lane])).exp() / sum[lane];
                *factor = if seen { rescaled() } else { T::Acc::zero() };
            }
            let keys = part.weights.len() / self.lanes;
            let mixed = &mut importance.of_blocks(at + keys)[at..];
            vectorize(self.cpu.isa(), MixLanes { weights: &part.weights, factors: &factors, mixed });
            at += keys;
        }
        importance.select(self.config, position, at, list);
    }

    /// The greatest score and the sum of the weights of all parts, one a lane.
    fn totals(&self, parts: &[Part<'_, U>]) -> (Scratch<'a, U::Acc>, Scratch<'a, U::Acc>) {
        let pool = self.cpu.pool();
        let (mut max, mut sum) = (pool.take(self.lanes), pool.zeroed(self.lanes));
        max.fill(T::Acc::neg_infinity());
        for lane in 0..self.heads.group_size {
            max[lane] = parts.iter().map(|part| part.max[lane]).fold(max[lane], |a, b| if b > a { b } else { a });
            let rescaled = |part: &Part<'_, U>| part.sum[lane] * (part.max[lane] - finite(max[lane])).exp();
            sum[lane] = parts.iter().map(rescaled).sum();
        }
        (max, sum)
    }

    /// The outputs of all parts of a branch as one: `[R, padded(Dv)]`; 0 without keys.
    fn join(&self, parts: &[Part<'_, U>]) -> Scratch<'a, U::Acc> {
        let stride = padded(self.heads.dim_v);
        let mut o = self.cpu.pool().zeroed(self.heads.group_size * stride);
        let (max, sum) = self.totals(parts);
        for (lane, o) in o.chunks_exact_mut(stride).enumerate().filter(|(lane, _)| sum[*lane] != T::Acc::zero()) {
            for part in parts {
                let decay = (part.max[lane] - finite(max[lane])).exp();
                for (o, &x) in o.iter_mut().zip(&part.o[lane * stride..][..stride]) {
                    *o += decay * x;
                }
            }
            o.iter_mut().for_each(|x| *x /= sum[lane]);
        }
        o
    }

    /// Mixes the branches, each rounded as if it had been stored, into o `[R, Dv]`.
    fn store(&self, branches: [Scratch<'_, U::Acc>; 3], gates: &View<'_, T, 3>, o: &mut [T]) {
        let (dim, stride) = (self.heads.dim_v, padded(self.heads.dim_v));
        let mut rounded = [0; 3].map(|_| self.cpu.pool().take::<T>(dim));
        for (r, o) in o.chunks_exact_mut(dim).enumerate() {
            for (rounded, branch) in rounded.iter_mut().zip(&branches) {
                crate::cpu::math::narrow(&branch[r * stride..][..dim], rounded);
            }
            let [cmp, slc, win] = &rounded;
            gate::add(gates.row(self.s, self.g * self.heads.group_size + r), [cmp, slc, win], o);
        }
    }
}

/// Chunk i of `keys` keys, and how many chunks there are.
fn chunks(keys: usize) -> (impl Fn(usize) -> Range<usize>, usize) {
    (move |i| i * CHUNK..((i + 1) * CHUNK).min(keys), keys.div_ceil(CHUNK))
}
