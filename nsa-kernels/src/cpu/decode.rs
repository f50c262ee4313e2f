//! One decoding step on the CPU: a task a sequence and KV head, bound by reading the caches.
//!
//! FLOP a row of K and V: 2·(Dk + Dv)·R for (Dk + Dv) elements read once. A task runs the same tiles in the same order as
//! the forward pass of a whole sequence, so both round alike; the window, which needs no selection, runs beside the
//! other two branches where a thread is free.

use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::cmp::{Scores, Selector};
use crate::cpu::flash::{Flash, Heads};
use crate::cpu::rows::{SeqRows, Tile};
use crate::cpu::tasks::QueryTile;
use crate::cpu::tile::KEYS;
use crate::cpu::{gate, math};
use crate::op::decode::{Cache, RowsRead, Step};
use nsa_core::select::SelectScratch;
use nsa_core::{Element, NsaConfig, View, index};
use rayon::prelude::*;
use std::ops::Range;

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
        Query { cpu, config, q: &q, gates: &gates, s, g, caches: &caches[s], selector: &selector }.attend(o, list)
    };
    let rows: Vec<usize> = tasks.map(attend).collect();
    Ok(rows.chunks_exact(groups).map(|rows| rows.iter().copied().max().unwrap_or(0)).collect())
}

/// The current token of one sequence, for one KV head.
struct Query<'a, T: Element> {
    cpu: &'a Cpu,
    config: &'a NsaConfig,
    q: &'a View<'a, T, 3>,
    gates: &'a View<'a, T, 3>,
    s: usize,
    g: usize,
    caches: &'a Caches<'a, T>,
    selector: &'a Selector<T::Acc>,
}

impl<T: Element> Query<'_, T> {
    /// Writes o `[R, Dv]` and the selected blocks `[n]`; returns the rows read.
    fn attend(&self, o: &mut [T], list: &mut [i32]) -> usize {
        let (group_size, dim) = (self.config.group_size(), self.config.head_dim_v());
        let mut branches = self.cpu.pool().take::<T>(3 * o.len());
        let (cmp, rest) = branches.split_at_mut(o.len());
        let (slc, win) = rest.split_at_mut(o.len());
        let selected = || {
            self.compressed(cmp, list);
            self.selected(list, slc)
        };
        let (selected, window) = rayon::join(selected, || self.window(win));
        let branches = cmp.chunks_exact(dim).zip(slc.chunks_exact(dim)).zip(win.chunks_exact(dim));
        for ((h, o), ((cmp, slc), win)) in o.chunks_exact_mut(dim).enumerate().zip(branches) {
            gate::add(self.gates.row(self.s, self.g * group_size + h), [cmp, slc, win], o);
        }
        self.caches.cmp[0].len() + selected + window
    }

    /// Position of the query.
    fn position(&self) -> usize {
        self.caches.context - 1
    }

    fn compressed(&self, o: &mut [T], list: &mut [i32]) {
        let tile = QueryTile { seq: self.s, rows: self.s..self.s + 1, position: self.position() };
        let mut lse = self.cpu.pool().take(self.config.group_size());
        let mut scores = Scores::new(self.cpu.pool(), self.config, &tile);
        let [k, v] = &self.caches.cmp;
        scores.weigh(self.q, k, self.g);
        self.selector.select(&scores, self.cpu.pool(), &mut SelectScratch::default(), 0, list);
        scores.attend(v, self.g, 0, o, &mut lse);
    }

    fn selected(&self, list: &[i32], o: &mut [T]) -> usize {
        let blocks = list.iter().filter_map(|&j| usize::try_from(j).ok());
        let tokens = blocks.map(|j| index::select_tokens(self.config, j, self.position()));
        let tiles = tokens.clone().flat_map(|tokens| {
            let end = tokens.end;
            tokens.step_by(KEYS).map(move |start| start..(start + KEYS).min(end))
        });
        // A cache that holds every token is a ring that never wraps round.
        self.over(tiles, &self.caches.slc, usize::MAX, o);
        tokens.map(|tokens| tokens.len()).sum()
    }

    fn window(&self, o: &mut [T]) -> usize {
        let tokens = index::window_tokens(self.config, self.position());
        // Tiles start at multiples of their size, as in the forward pass.
        let tiles = (tokens.start / KEYS * KEYS..tokens.end).step_by(KEYS);
        let tiles = tiles.map(|base| base.max(tokens.start)..(base + KEYS).min(tokens.end));
        self.over(tiles, &self.caches.win, self.config.window(), o);
        tokens.len()
    }

    /// Softmax attention over tiles of keys and values in rings of `ring` rows, all of them visible: o `[R, Dv]`.
    fn over(&self, tiles: impl Iterator<Item = Range<usize>>, [k, v]: &[SeqRows<'_, T>; 2], ring: usize, o: &mut [T]) {
        let (pool, heads) = (self.cpu.pool(), Heads::<T::Acc>::new(self.config));
        let mut flash = Flash::new(pool, heads, 1);
        let (mut k_buffer, mut v_buffer) = (pool.take(KEYS * heads.dim_qk), pool.take(KEYS * heads.dim_v));
        let mut lse = pool.take(heads.group_size);
        flash.start(self.q, self.s..self.s + 1, self.g);
        for tokens in tiles {
            let seen = 0..tokens.len();
            let k = ring_tile(k, ring, tokens.clone(), self.g, &mut k_buffer);
            flash.step(k, ring_tile(v, ring, tokens, self.g, &mut v_buffer), |_| seen.clone());
        }
        flash.finish(0, o, &mut lse);
    }
}

/// Rows of KV head `g` of consecutive positions: where they lie, or joined in `buffer` where the ring wraps round.
fn ring_tile<'b, T: Element>(
    rows: &'b SeqRows<'_, T>,
    ring: usize,
    tokens: Range<usize>,
    g: usize,
    buffer: &'b mut [T::Acc],
) -> Tile<'b, T::Acc> {
    let start = index::ring_row(ring, tokens.start);
    if start + tokens.len() <= ring {
        return rows.tile(start..start + tokens.len(), g, buffer);
    }
    let mut stride = 0;
    for (i, token) in tokens.enumerate() {
        let row = rows.row(index::ring_row(ring, token), g);
        stride = row.len();
        math::widen(row, &mut buffer[i * stride..][..stride]);
    }
    Tile { data: buffer, stride }
}
