//! Attention over the selected blocks on the CPU.
//!
//! A task is a tile of neighbouring queries. Their block lists are turned round: for each block that one of them
//! selected, ascending, the queries that selected it attend to it together, so a block is widened once a tile.

use crate::cpu::Cpu;
use crate::cpu::band::clip;
use crate::cpu::flash::{Flash, Heads, queries_per_tile};
use crate::cpu::rows::{SeqRows, host_rows};
use crate::cpu::tasks::{QueryTile, query_tiles, split_rows};
use crate::cpu::tile::KEYS;
use crate::op::slc::{Backward, Forward};
use crate::{Error, Result};
use nsa_core::{Element, NsaConfig, Packing, View, index, select};
use rayon::prelude::*;
use std::ops::Range;

/// See `op::slc::forward`.
pub(crate) fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k, v, block_indices, o, lse } = args;
    let (q, o, lse) = (q.to_host()?, o.into_host()?.into_data(), lse.into_host()?.into_data());
    let lists = block_indices.to_host()?;
    check_lists("slc::forward", config, packing, &lists)?;
    let seqs: Vec<(SeqRows<'_, T>, SeqRows<'_, T>)> = host_rows(&k)?.into_iter().zip(host_rows(&v)?).collect();
    let tiles = query_tiles(packing, queries_per_tile(config.group_size()));
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
fn attend<T: Element>(
    cpu: &Cpu,
    config: &NsaConfig,
    q: &View<'_, T, 3>,
    lists: &View<'_, i32, 3>,
    (k, v): &(SeqRows<'_, T>, SeqRows<'_, T>),
    tile: &QueryTile,
    (o, lse): (&mut [T], &mut [T::Acc]),
) {
    let heads = Heads::<T::Acc>::new(config);
    let pool = cpu.pool();
    let mut flash = Flash::new(pool, heads, tile.rows.len());
    let mut k_buffer = pool.take(KEYS * heads.dim_qk);
    let mut v_buffer = pool.take(KEYS * heads.dim_v);
    let mut pairs = pool.take(tile.rows.len() * config.select_count());
    // Positions up to which each query of the tile sees the block at hand; 0 if it did not select it.
    let mut ends = pool.take::<usize>(tile.rows.len());
    for g in 0..config.num_kv_heads() {
        flash.start(q, tile.rows.clone(), g);
        invert(lists, tile.rows.clone(), g, &mut pairs);
        for pairs in pairs.chunk_by(|a, b| a.block == b.block).filter(|pairs| pairs[0].block != NONE) {
            ends.fill(0);
            for pair in pairs {
                ends[pair.query as usize] = tile.position + pair.query as usize + 1;
            }
            let last = tile.position + pairs[pairs.len() - 1].query as usize;
            let block = index::select_tokens(config, pairs[0].block as usize, last);
            for base in block.clone().step_by(KEYS) {
                let part = base..(base + KEYS).min(block.end);
                let k = k.tile(part.clone(), g, &mut k_buffer);
                let v = v.tile(part.clone(), g, &mut v_buffer);
                flash.step(k, v, |i| clip(0..ends[i], &part));
            }
        }
        flash.finish(g, config.num_heads(), o, lse);
    }
}

/// A query that selected a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Pair {
    /// The block.
    block: u32,
    /// The query, counted from the first of its tile.
    query: u32,
}

/// Block of pairs that stand for padding; behind all others.
const NONE: u32 = u32::MAX;

/// The block lists of some queries turned round: sorted by block, then by query, padding last.
fn invert(lists: &View<'_, i32, 3>, queries: Range<usize>, g: usize, pairs: &mut [Pair]) {
    let places = pairs.chunks_exact_mut(lists.shape()[2]);
    for ((query, t), pairs) in (0..).zip(queries).zip(places) {
        for (&block, pair) in lists.row(t, g).iter().zip(pairs) {
            *pair = Pair { block: u32::try_from(block).unwrap_or(NONE), query };
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

pub(crate) fn backward<T: Element>(_cpu: &Cpu, _args: Backward<'_, T>) -> Result<()> {
    unimplemented!("lands within the hour")
}
