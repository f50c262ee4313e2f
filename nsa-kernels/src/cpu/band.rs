//! Attention over a range of consecutive keys that moves on with the query: what dense and window attention share.

use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::flash::{Flash, Heads, queries_per_tile};
use crate::cpu::rows::{SeqRows, host_rows};
use crate::cpu::tasks::{QueryTile, query_tiles, split_rows};
use crate::cpu::tile::KEYS;
use crate::{Rows, Tensor, TensorMut};
use nsa_core::{Element, NsaConfig, Packing, View};
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
        flash.finish(g, config.num_heads(), o, lse);
    }
}

/// The part of `range` within `part`, counted from the start of `part`.
#[inline(always)]
pub(crate) fn clip(range: Range<usize>, part: &Range<usize>) -> Range<usize> {
    let end = range.end.clamp(part.start, part.end) - part.start;
    (range.start.clamp(part.start, part.end) - part.start).min(end)..end
}
