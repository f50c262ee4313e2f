//! Attention over the selected blocks on the CPU.
//!
//! A task is a tile of neighbouring queries. Their block lists are turned round: for each block that one of them
//! selected, ascending, the queries that selected it attend to it together, so a block is widened once a tile.

use crate::cpu::Cpu;
use crate::cpu::ahead::Lines;
use crate::cpu::band::clip;
use crate::cpu::flash::{Flash, Heads, queries_per_tile};
use crate::cpu::grad::{self, Cell, Loaded, Place, Queries};
use crate::cpu::keys::{Grid, KEYS, Layout, Order, Tiles};
use crate::cpu::rows::host_rows;
use crate::cpu::tasks::{QueryTile, query_tiles, split_rows, tile_len};
use crate::cpu::turns::{Cut, Row, for_each_row};
use crate::cpu::unit::{Pair, Unit};
use crate::op::Gating;
use crate::op::slc::{Backward, Forward};
use crate::{Element, Error, Result};
use nsa_core::{NsaConfig, Packing, View, index, select};
use rayon::prelude::*;
use std::ops::Range;

/// The branch's column of the gates.
const GATE: usize = 1;

/// Keys and values of one sequence.
struct SeqKeys<'p, T, U> {
    k: Tiles<'p, T, U>,
    v: Tiles<'p, T, U>,
}

/// See `op::slc::forward`.
pub(crate) fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    match cpu.multiplies_pairs(T::DTYPE) {
        true => forward_in::<T, Pair<T::Acc>>(cpu, args),
        false => forward_in::<T, T::Acc>(cpu, args),
    }
}

fn forward_in<T: Element, U: Unit<Acc = T::Acc>>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k, v, block_indices, o, lse } = args;
    let (q, o, lse) = (q.to_host()?, o.into_host()?.into_data(), lse.into_host()?.into_data());
    let lists = block_indices.to_host()?;
    check_lists("slc::forward", config, packing, &lists)?;
    let (k, v) = (host_rows(&k)?, host_rows(&v)?);
    let grid = Grid::of_blocks(config.select_block());
    let seqs: Vec<SeqKeys<'_, T, U>> = k
        .iter()
        .zip(&v)
        .zip(packing.seqs())
        .map(|((k, v), seq)| {
            let looks = seq.rows.len() * config.select_count() * grid.tiles_of(0).len();
            let k = Layout::new(*k, 0, config.head_dim_qk(), grid, Order::OverDims);
            let v = Layout::new(*v, 0, config.head_dim_v(), grid, Order::OverKeys);
            let heads = config.num_kv_heads();
            SeqKeys { k: k.tiles(cpu.pool(), heads, looks), v: v.tiles(cpu.pool(), heads, looks) }
        })
        .collect();
    let tiles = query_tiles(packing, |_| queries_per_tile(config.group_size()));
    let rows = || tiles.iter().map(|tile| tile.rows.clone());
    let heads = config.num_heads();
    let o = split_rows(o, heads * config.head_dim_v(), rows());
    let lse = split_rows(lse, heads, rows());
    tiles.par_iter().zip(o).zip(lse).with_max_len(1).for_each(|((tile, o), lse)| {
        attend(cpu, config, &q, &lists, &seqs[tile.seq], tile, (o, lse));
    });
    Ok(())
}

/// One tile of queries, head after head.
fn attend<T: Element, U: Unit<Acc = T::Acc>>(
    cpu: &Cpu,
    config: &NsaConfig,
    q: &View<'_, T, 3>,
    lists: &View<'_, i32, 3>,
    seq: &SeqKeys<'_, T, U>,
    tile: &QueryTile,
    (o, lse): (&mut [T], &mut [T::Acc]),
) {
    let pool = cpu.pool();
    let grid = Grid::of_blocks(config.select_block());
    let mut flash = Flash::<U>::new(cpu, Heads::new(config), tile.rows.len());
    let (mut k_buffer, mut v_buffer) = (seq.k.buffer(pool), seq.v.buffer(pool));
    let mut pairs = pool.take(tile.rows.len() * config.select_count());
    for g in 0..config.num_kv_heads() {
        flash.start(q, tile.rows.clone(), g);
        invert(lists, tile.rows.clone(), g, &mut pairs);
        let blocks = pairs.chunk_by(|a, b| a.block == b.block).filter(|pairs| pairs[0].block != NONE);
        let steps = blocks.flat_map(|pairs| {
            let last = tile.position + pairs[pairs.len() - 1].query as usize;
            let tiles = grid.tiles_of(pairs[0].block as usize).take_while(move |&i| grid.tokens(i).start <= last);
            tiles.map(move |i| (i, pairs))
        });
        let mut steps = steps.peekable();
        while let Some((i, pairs)) = steps.next() {
            let part = grid.tokens(i);
            let (k, v) = (seq.k.tile(i, g, &mut k_buffer), seq.v.tile(i, g, &mut v_buffer));
            let queries = pairs.iter().map(|pair| pair.query as usize);
            let seen = queries.map(|query| (query, clip(0..tile.position + query + 1, &part)));
            // Blocks follow one another in an order that no processor foresees.
            let next = steps.peek().map_or_else(Lines::none, |&(next, _)| seq.k.lines(next, g));
            flash.step((k, v), seen, [seq.v.lines(i, g), next]);
        }
        flash.finish(g, o, lse);
    }
}

/// A query that selected a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Choice {
    /// The block.
    block: u32,
    /// The query, counted from the first of its tile.
    query: u32,
}

/// Block of pairs that stand for padding; behind all others.
const NONE: u32 = u32::MAX;

/// The block lists of some queries turned round: sorted by block, then by query, padding last.
fn invert(lists: &View<'_, i32, 3>, queries: Range<usize>, g: usize, pairs: &mut [Choice]) {
    let places = pairs.chunks_exact_mut(lists.shape()[2]);
    for ((query, t), pairs) in (0..).zip(queries).zip(places) {
        for (&block, pair) in lists.row(t, g).iter().zip(pairs) {
            *pair = Choice { block: u32::try_from(block).unwrap_or(NONE), query };
        }
    }
    pairs.sort_unstable();
}

/// Checks that each list is strictly ascending candidates, then padding. The error names the first place that is not.
fn check_lists(op: &'static str, config: &NsaConfig, packing: &Packing, lists: &View<'_, i32, 3>) -> Result<()> {
    let wrong = |t: usize, position: usize| {
        (0..config.num_kv_heads()).find_map(|g| {
            let list = lists.row(t, g);
            let (s, rule) = broken_rule(list, index::num_candidates(config, position))?;
            let value = format!("{} at [{t}, {g}, {s}], of the query at position {position}", list[s]);
            Some(Error::Value { op, arg: "block_indices", value, rule })
        })
    };
    for seq in packing.seqs() {
        let position = |t| seq.context + t - seq.rows.start;
        if let Some(error) = seq.rows.clone().into_par_iter().find_map_first(|t| wrong(t, position(t))) {
            return Err(error);
        }
    }
    Ok(())
}

/// The first place of a list that breaks a rule, and the rule.
fn broken_rule(list: &[i32], candidates: usize) -> Option<(usize, &'static str)> {
    let used = list.iter().position(|&block| block == select::NO_BLOCK).unwrap_or(list.len());
    for (s, &block) in list.iter().enumerate() {
        if s >= used && block != select::NO_BLOCK {
            return Some((s, "behind -1 there must be nothing but -1"));
        }
        if s < used && !usize::try_from(block).is_ok_and(|block| block < candidates) {
            return Some((s, "blocks must be candidates of their query, 0..=t/select_block, or -1"));
        }
        if (1..used).contains(&s) && block <= list[s - 1] {
            return Some((s, "blocks must ascend without duplicates"));
        }
    }
    None
}

/// See `op::slc::backward`.
pub(crate) fn backward<T: Element>(cpu: &Cpu, args: Backward<'_, T>) -> Result<()> {
    match cpu.multiplies_pairs(T::DTYPE) {
        true => backward_in::<T, Pair<T::Acc>>(cpu, args),
        false => backward_in::<T, T::Acc>(cpu, args),
    }
}

fn backward_in<T: Element, U: Unit<Acc = T::Acc>>(cpu: &Cpu, args: Backward<'_, T>) -> Result<()> {
    let Backward { config, packing, q, k, v, block_indices, o, lse, d_o, gates, d_gates, dq, accumulate, dk, dv } =
        args;
    let lists = block_indices.to_host()?;
    check_lists("slc::backward", config, packing, &lists)?;
    let pool = cpu.pool();
    let queries = Queries::new(cpu, (q, o, lse, d_o), Gating { gates, d_gates, column: GATE })?;
    let offsets = packing.cu_seqlens();
    let grid = Grid::of_blocks(config.select_block());
    let keys = grad::SeqKeys::<T, U>::pack(pool, config, (k, v), offsets, grid)?;
    let sizes: Vec<usize> = packing.seqs().map(|seq| queries_of_tile(config, seq.rows.len())).collect();
    let tiles = query_tiles(packing, |s| sizes[s]);
    let list_len = config.num_kv_heads() * config.select_count();
    let mut pairs = pool.take(packing.num_tokens() * list_len);
    let places = split_rows(&mut pairs, list_len, tiles.iter().map(|tile| tile.rows.clone()));
    tiles.par_iter().zip(places).for_each(|(tile, pairs)| {
        let per_head = tile.rows.len() * config.select_count();
        for (g, pairs) in pairs.chunks_exact_mut(per_head).enumerate() {
            invert(&lists, tile.rows.clone(), g, pairs);
        }
    });
    let inverse = Inverse { cpu, config, grid, pairs: &pairs };
    let cuts: Vec<Cut> = packing.seqs().zip(&sizes).map(|(seq, &size)| cut(config, seq.rows.len(), size)).collect();
    for_each_row((pool, config), packing, offsets, &cuts, (dq, accumulate, dk, dv), |row| {
        let (rows, size) = (packing.seq(row.seq).rows, sizes[row.seq]);
        let position = row.tile * size;
        let queries_of = rows.start + position..rows.end.min(rows.start + position + size);
        inverse.add_gradients(&queries, &keys[row.seq], (queries_of, position), row);
    })
}

/// A sequence of `len` tokens in tiles of `queries` queries and of one block.
fn cut(config: &NsaConfig, len: usize, queries: usize) -> Cut {
    let seen = |start: usize| 0..index::num_candidates(config, (start + queries).min(len) - 1);
    Cut { queries, keys: config.select_block(), seen: (0..len).step_by(queries).map(seen).collect(), segments: 1 }
}

/// Rows of queries that a tile should have at most: what they take of q, do and dq stays in the last cache.
const TILE_ROWS: usize = 1 << 13;

/// Queries of a tile of a sequence of `len`. The more there are, the more of them meet at a block: its keys are read once
/// for all of them, and its gradients are summed in registers.
fn queries_of_tile(config: &NsaConfig, len: usize) -> usize {
    tile_len(len, KEYS..=(TILE_ROWS / config.group_size()).max(KEYS))
}

/// The block lists of all tiles of queries turned round: per tile `[G][queries · n]`.
struct Inverse<'a> {
    cpu: &'a Cpu,
    config: &'a NsaConfig,
    grid: Grid,
    pairs: &'a [Choice],
}

impl Inverse<'_> {
    /// Adds the gradients of the queries in the rows `queries`, from position `position` on, from the last block to the
    /// first and head after head.
    fn add_gradients<T: Element, U: Unit<Acc = T::Acc>>(
        &self,
        source: &Queries<'_, T>,
        keys: &grad::SeqKeys<'_, T, U>,
        (queries, position): (Range<usize>, usize),
        mut row: Row<'_, '_, T::Acc>,
    ) {
        let heads = Heads::<T::Acc>::new(self.config);
        let per_head = queries.len() * self.config.select_count();
        let first_pair = queries.start * heads.num_kv_heads * self.config.select_count();
        let pairs = &self.pairs[first_pair..][..heads.num_kv_heads * per_head];
        // What is left of each head's pairs, by block.
        let heads_pairs = pairs.chunks_exact(per_head);
        let mut left: Vec<&[Choice]> =
            heads_pairs.map(|pairs| &pairs[..pairs.partition_point(|pair| pair.block != NONE)]).collect();
        let mut loaded = Loaded::<U>::new(self.cpu, heads);
        let mut cell = Cell::<U>::new(self.cpu, heads, true);
        while let Some(block) = left.iter().filter_map(|pairs| Some(pairs.last()?.block)).max() {
            let mut sums = row.turns.take(block as usize);
            for (g, left) in left.iter_mut().enumerate() {
                let (rest, pairs) = left.split_at(left.partition_point(|pair| pair.block < block));
                *left = rest;
                for pairs in pairs.chunks(Loaded::<U>::capacity(heads)) {
                    loaded.load(source, pairs.len(), |i| queries.start + pairs[i].query as usize, g);
                    for tile in self.grid.tiles_of(block as usize) {
                        let part = self.grid.tokens(tile);
                        let span = |i: usize| clip(0..position + pairs[i].query as usize + 1, &part);
                        let query = |i: usize| pairs[i].query as usize;
                        let key = |s| part.start + s - block as usize * self.config.select_block();
                        cell.step(&loaded, keys, span, (&mut *row.dq, &mut sums), &Place { tile, key, query });
                    }
                }
            }
        }
    }
}
