//! Attention over a range of consecutive keys that moves on with the query: what dense and window attention share.

use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::flash::{Flash, Heads, queries_per_tile};
use crate::cpu::grad::{Cell, Place, Queries, Sums, for_each_cell, split_sums};
use crate::cpu::rows::{SeqRows, host_rows, packed_rows};
use crate::cpu::tasks::{QueryTile, query_tiles, split_rows};
use crate::cpu::tile::KEYS;
use crate::{Rows, Tensor, TensorMut};
use nsa_core::{CuSeqlens, Element, NsaConfig, Packing, View};
use rayon::prelude::*;
use std::ops::Range;

/// Arguments of [`forward`].
pub(crate) struct Forward<'a, T: Element, F> {
    pub(crate) config: &'a NsaConfig,
    pub(crate) packing: &'a Packing,
    pub(crate) q: Tensor<'a, T, 3>,
    pub(crate) k: Rows<'a, T>,
    pub(crate) v: Rows<'a, T>,
    pub(crate) o: TensorMut<'a, T, 3>,
    pub(crate) lse: TensorMut<'a, T::Acc, 2>,
    /// Positions that the query at a position attends to; neither end ever moves back.
    pub(crate) visible: F,
}

/// Keys and values of one sequence; the first row has position `first`.
struct SeqKeys<'a, T> {
    k: SeqRows<'a, T>,
    v: SeqRows<'a, T>,
    first: usize,
}

/// Attends to all visible keys: a task a tile of queries, with all heads.
pub(crate) fn forward<T: Element, F>(cpu: &Cpu, args: Forward<'_, T, F>) -> Result<()>
where
    F: Fn(usize) -> Range<usize> + Sync,
{
    let Forward { config, packing, q, k, v, o, lse, visible } = args;
    let (q, o, lse) = (q.to_host()?, o.into_host()?.into_data(), lse.into_host()?.into_data());
    let seqs: Vec<SeqKeys<'_, T>> = host_rows(&k)?
        .into_iter()
        .zip(host_rows(&v)?)
        .zip(packing.seqs())
        // The last row belongs to the last query; a window's rows need not reach back to position 0.
        .map(|((k, v), seq)| SeqKeys { k, v, first: seq.end() - k.len() })
        .collect();
    let tiles = query_tiles(packing, queries_per_tile(config.group_size()));
    let rows = || tiles.iter().map(|tile| tile.rows.clone());
    let heads = config.num_heads();
    let o = split_rows(o, heads * config.head_dim_v(), rows());
    let lse = split_rows(lse, heads, rows());
    tiles.par_iter().zip(o).zip(lse).with_max_len(1).for_each(|((tile, o), lse)| {
        attend(cpu, config, &q, &seqs[tile.seq], tile, &visible, (o, lse));
    });
    Ok(())
}

/// One tile of queries, head after head.
fn attend<T: Element>(
    cpu: &Cpu,
    config: &NsaConfig,
    q: &View<'_, T, 3>,
    seq: &SeqKeys<'_, T>,
    tile: &QueryTile,
    visible: &impl Fn(usize) -> Range<usize>,
    (o, lse): (&mut [T], &mut [T::Acc]),
) {
    let heads = Heads::<T::Acc>::new(config);
    let mut flash = Flash::new(cpu.pool(), heads, tile.rows.len());
    let mut k_buffer = cpu.pool().take(KEYS * heads.dim_qk);
    let mut v_buffer = cpu.pool().take(KEYS * heads.dim_v);
    let last = tile.position + tile.rows.len() - 1;
    let keys = visible(tile.position).start..visible(last).end;
    for g in 0..config.num_kv_heads() {
        flash.start(q, tile.rows.clone(), g);
        // Tiles of keys start at multiples of their size, wherever the queries start.
        for base in (keys.start / KEYS * KEYS..keys.end).step_by(KEYS) {
            let part = base.max(keys.start)..(base + KEYS).min(keys.end);
            let stored = part.start - seq.first..part.end - seq.first;
            let k = seq.k.tile(stored.clone(), g, &mut k_buffer);
            let v = seq.v.tile(stored, g, &mut v_buffer);
            flash.step(k, v, |i| clip(visible(tile.position + i), &part));
        }
        flash.finish(g, o, lse);
    }
}

/// Arguments of [`backward`].
pub(crate) struct Backward<'a, T: Element, F> {
    pub(crate) config: &'a NsaConfig,
    pub(crate) packing: &'a Packing,
    pub(crate) queries: Queries<'a, T>,
    /// `[rows, G, Dk]`.
    pub(crate) k: Tensor<'a, T, 3>,
    /// `[rows, G, Dv]`.
    pub(crate) v: Tensor<'a, T, 3>,
    /// Sequences of the rows.
    pub(crate) offsets: &'a CuSeqlens,
    /// Tokens from a row to the next: row i is seen by no token before i · stride.
    pub(crate) stride: usize,
    /// Rows that the query at a position attends to; neither end ever moves back.
    pub(crate) visible: F,
    /// `[N, Hq, Dk]`.
    pub(crate) dq: TensorMut<'a, T::Acc, 3>,
    /// `[rows, G, Dk]`.
    pub(crate) dk: TensorMut<'a, T::Acc, 3>,
    /// `[rows, G, Dv]`.
    pub(crate) dv: TensorMut<'a, T::Acc, 3>,
}

/// Rows of a tile of keys: enough tiles for the threads of a large machine, but no smaller than products need.
fn rows_per_tile(rows: usize, stride: usize) -> usize {
    let [least, most] = [(64 / stride).max(8), (256 / stride).max(64)];
    (rows / 32).next_power_of_two().clamp(least, most)
}

/// Gradients of the attention to all visible rows.
pub(crate) fn backward<T: Element, F>(cpu: &Cpu, args: Backward<'_, T, F>) -> Result<()>
where
    F: Fn(usize) -> Range<usize> + Sync,
{
    let Backward { config, packing, queries, k, v, offsets, stride, visible, dq, dk, dv } = args;
    let rows: Vec<_> = packed_rows(k, offsets)?.into_iter().zip(packed_rows(v, offsets)?).collect();
    let sizes: Vec<usize> = rows.iter().map(|(k, _)| rows_per_tile(k.len(), stride)).collect();
    let seqs = split_sums(config, packing, offsets, |s| [sizes[s] * stride, sizes[s]], (dq, dk, dv))?;
    // Tile i starts at token i · size · stride; its first query sees no row before `start`.
    let diagonals = |s: usize| {
        let tokens = sizes[s] * stride;
        let last = packing.seq(s).rows.len().saturating_sub(1) / tokens;
        last + 1 - visible(last * tokens).start / sizes[s]
    };
    for_each_cell(seqs, diagonals, |s, i, j, sums| {
        let position = i * sizes[s] * stride;
        let len = packing.seq(s).rows.len();
        let tile = BandCell {
            seq: packing.seq(s).rows.start,
            queries: position..(position + sizes[s] * stride).min(len),
            keys: j * sizes[s]..((j + 1) * sizes[s]).min(rows[s].0.len()),
        };
        add_gradients(cpu, config, &queries, &rows[s], &tile, &visible, sums);
    });
    Ok(())
}

/// A tile of queries and one of keys.
struct BandCell {
    /// First row of the sequence in the packed tensors.
    seq: usize,
    /// Positions.
    queries: Range<usize>,
    /// Rows of keys in their sequence.
    keys: Range<usize>,
}

/// The gradients of one cell, head after head.
fn add_gradients<T: Element>(
    cpu: &Cpu,
    config: &NsaConfig,
    queries: &Queries<'_, T>,
    (k, v): &(SeqRows<'_, T>, SeqRows<'_, T>),
    tile: &BandCell,
    visible: &impl Fn(usize) -> Range<usize>,
    mut sums: Sums<'_, T::Acc>,
) {
    let seen = visible(tile.queries.start).start..visible(tile.queries.end - 1).end;
    if clip(seen, &tile.keys).is_empty() {
        return;
    }
    let heads = Heads::<T::Acc>::new(config);
    let pool = cpu.pool();
    let mut cell = Cell::new(pool, heads);
    let mut k_buffer = pool.take(KEYS * heads.dim_qk);
    let mut v_buffer = pool.take(KEYS * heads.dim_v);
    for g in 0..config.num_kv_heads() {
        for start in tile.queries.clone().step_by(Cell::capacity(heads)) {
            let end = (start + Cell::capacity(heads)).min(tile.queries.end);
            cell.load(queries, tile.seq + start..tile.seq + end, g);
            for base in tile.keys.clone().step_by(KEYS) {
                let part = base..(base + KEYS).min(tile.keys.end);
                if clip(visible(start).start..visible(end - 1).end, &part).is_empty() {
                    continue;
                }
                let k = k.tile(part.clone(), g, &mut k_buffer);
                let v = v.tile(part.clone(), g, &mut v_buffer);
                let span = |i| clip(visible(start + i), &part);
                let query = |i| start - tile.queries.start + i;
                let place = Place { g, first_key: base - tile.keys.start, query };
                cell.step((k, v, part.len()), span, &mut sums, &place);
            }
        }
    }
}

/// The part of `range` within `part`, counted from the start of `part`.
#[inline(always)]
pub(crate) fn clip(range: Range<usize>, part: &Range<usize>) -> Range<usize> {
    let end = range.end.clamp(part.start, part.end) - part.start;
    (range.start.clamp(part.start, part.end) - part.start).min(end)..end
}
