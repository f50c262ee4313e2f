//! One decoding step on the CPU: the three branches as attention in chunks (see `chunks`), bound by reading the caches.
//!
//! Compressed chunks come first. Then the selection and the selected blocks are one task and the window is another. The
//! step enters the pool of threads once: from outside of it every parallel loop has a thread wake up.

use crate::cpu::chunks::{CHUNK, Keys, Parts, Query, Totals};
use crate::cpu::cmp::Selector;
use crate::cpu::flash::{Heads, normalize};
use crate::cpu::rows::SeqRows;
use crate::cpu::scratch::Scratch;
use crate::cpu::simd::{padded, vectorize};
use crate::cpu::softmax::MixLanes;
use crate::cpu::unit::{Pair, Unit};
use crate::cpu::{Cpu, gate};
use crate::op::decode::{Cache, RowsRead, Step};
use crate::{Element, Result};
use nsa_core::{NsaConfig, index};
use rayon::prelude::*;

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
            cmp: [SeqRows::paged(&cache.k_cmp)?, SeqRows::paged(&cache.v_cmp)?],
            slc: [SeqRows::paged(&cache.k_slc)?, SeqRows::paged(&cache.v_slc)?],
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
    let (o, lists) = (o.into_host()?.into_data(), block_indices.into_host()?.into_data());
    let (groups, heads) = (config.num_kv_heads(), Heads::new(config));
    let selector = Selector::new(config);
    let attend = |(task, (o, list)): (usize, (&mut [T], &mut [i32]))| {
        let (s, g) = (task / groups, task % groups);
        let query = Query::<U>::new(cpu, heads, &q, s, g);
        let token = Token { cpu, config, selector: &selector, heads, caches: &caches[s], query };
        token.attend(|r| gates.row(s, g * heads.group_size + r), o, list)
    };
    let rows: Vec<usize> = rayon::scope(|_| {
        let o = o.par_chunks_exact_mut(heads.group_size * heads.dim_v);
        let lists = lists.par_chunks_exact_mut(config.select_count());
        o.zip(lists).enumerate().with_max_len(1).map(attend).collect()
    });
    Ok(rows.chunks_exact(groups).map(|rows| rows.iter().copied().max().unwrap_or(0)).collect())
}

/// The current token of one sequence, for one KV head.
struct Token<'a, T, U: Unit> {
    cpu: &'a Cpu,
    config: &'a NsaConfig,
    selector: &'a Selector<U::Acc>,
    heads: Heads<U::Acc>,
    caches: &'a Caches<'a, T>,
    query: Query<'a, U>,
}

impl<'a, T: Element, U: Unit<Acc = T::Acc>> Token<'a, T, U> {
    /// Writes o `[R, Dv]` and the selected blocks `[n]`; returns the rows read.
    fn attend<'g>(&self, gates: impl Fn(usize) -> &'g [T], o: &mut [T], list: &mut [i32]) -> usize
    where
        T: 'g,
    {
        let Caches { context, cmp: [k, v], .. } = *self.caches;
        let blocks = Keys { k, v, len: k.len(), row: |i| i };
        let mut weights = self.cpu.pool().take(blocks.len * self.query.lanes());
        let parts = self.query.attend(&blocks, &mut weights);
        let totals = parts.totals(self.cpu);
        let ((slc, read), (cmp, win)) = rayon::join(
            || {
                self.select(&totals, &weights, list);
                self.attend_selected(list)
            },
            || (self.join(&parts, &totals), self.attend_window()),
        );
        self.store([cmp, slc, win], gates, o);
        blocks.len + read + self.config.window().min(context)
    }

    /// The output of the window.
    fn attend_window(&self) -> Scratch<'a, T::Acc> {
        let Caches { context, win: [k, v], .. } = *self.caches;
        let window = index::window_tokens(self.config, context - 1);
        let row = |i| index::ring_row(self.config.window(), window.start + i);
        let parts = self.query.attend(&Keys { k, v, len: window.len(), row }, &mut []);
        self.join(&parts, &parts.totals(self.cpu))
    }

    /// The output of the selected blocks, and how many keys they have.
    fn attend_selected(&self, list: &[i32]) -> (Scratch<'a, T::Acc>, usize) {
        let Caches { context, slc: [k, v], .. } = *self.caches;
        let block = self.config.select_block();
        let row = |i: usize| list[i / block] as usize * block + i % block;
        // Blocks are whole but for the query's own, which comes last.
        let listed = list.iter().filter_map(|&j| usize::try_from(j).ok());
        let len = listed.map(|j| index::select_tokens(self.config, j, context - 1).len()).sum();
        let parts = self.query.attend(&Keys { k, v, len, row }, &mut []);
        (self.join(&parts, &parts.totals(self.cpu)), len)
    }

    /// The output of a branch, `[R, padded(Dv)]`; 0 without keys.
    fn join(&self, parts: &Parts<'_, T::Acc>, totals: &Totals<'_, T::Acc>) -> Scratch<'a, T::Acc> {
        let mut o = parts.join(self.cpu, self.heads, totals);
        for (r, row) in o.chunks_exact_mut(padded(self.heads.dim_v)).enumerate() {
            normalize(row, totals.max[r], totals.sum[r]);
        }
        o
    }

    /// Writes the blocks that the query selects by the softmax over the compressed keys, whose weights are those of
    /// chunks.
    fn select(&self, totals: &Totals<'_, T::Acc>, weights: &[T::Acc], list: &mut [i32]) {
        let (pool, lanes, position) = (self.cpu.pool(), self.query.lanes(), self.caches.context - 1);
        let (mut importance, blocks) =
            (self.selector.importance(self.config, pool, position), self.caches.cmp[0].len());
        let mut factors = pool.zeroed(lanes);
        let mixed = importance.of_blocks(blocks).chunks_mut(CHUNK);
        let parts = weights.chunks(CHUNK * lanes).zip(totals.decays.chunks_exact(lanes));
        for (mixed, (weights, decays)) in mixed.zip(parts) {
            for (r, factor) in factors.iter_mut().enumerate().take(self.heads.group_size) {
                *factor = decays[r] / totals.sum[r];
            }
            vectorize(self.cpu.isa(), MixLanes { weights, factors: &factors, mixed });
        }
        importance.select(self.config, position, blocks, list);
    }

    /// Mixes the branches, each rounded as if it had been stored, into o `[R, Dv]`.
    fn store<'g>(&self, branches: [Scratch<'_, T::Acc>; 3], gates: impl Fn(usize) -> &'g [T], o: &mut [T])
    where
        T: 'g,
    {
        let (dim, stride) = (self.heads.dim_v, padded(self.heads.dim_v));
        let mut rounded = [0; 3].map(|_| self.cpu.pool().take::<T>(dim));
        for (r, o) in o.chunks_exact_mut(dim).enumerate() {
            for (rounded, branch) in rounded.iter_mut().zip(&branches) {
                crate::cpu::math::narrow(&branch[r * stride..][..dim], rounded);
            }
            let [cmp, slc, win] = &rounded;
            gate::add(gates(r), [cmp, slc, win], o);
        }
    }
}
