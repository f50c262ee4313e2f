//! Attention over a range of consecutive keys that moves on with the query: what dense and window attention share.

use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::ahead::Lines;
use crate::cpu::chunks::{CHUNK, Keys, Query};
use crate::cpu::flash::{self, Flash, Heads, queries_per_tile};
use crate::cpu::grad::{self, Cell, Loaded, Place, Queries};
use crate::cpu::keys::{Grid, KEYS, Layout, Order, Tiles};
use crate::cpu::rows::{SeqRows, host_rows};
use crate::cpu::tasks::{QueryTile, query_tiles, split_rows, tile_len};
use crate::cpu::turns::{Cut, Row, for_each_row};
use crate::cpu::unit::{Pair, Unit};
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
    /// Whether the only query of a sequence attends in chunks if it sees more than one: its keys are then shared out among
    /// the threads.
    pub(crate) lone_in_chunks: bool,
}

/// Keys and values of one sequence.
struct SeqKeys<'p, T, U> {
    k: Tiles<'p, T, U>,
    v: Tiles<'p, T, U>,
}

/// Attends to all visible keys: a task a tile of queries, with all heads.
pub(crate) fn forward<T: Element, F>(cpu: &Cpu, args: Forward<'_, T, F>) -> Result<()>
where
    F: Fn(usize) -> Range<usize> + Sync,
{
    match cpu.multiplies_pairs(T::DTYPE) {
        true => forward_in::<T, Pair<T::Acc>, F>(cpu, args),
        false => forward_in::<T, T::Acc, F>(cpu, args),
    }
}

fn forward_in<T: Element, U: Unit<Acc = T::Acc>, F>(cpu: &Cpu, args: Forward<'_, T, F>) -> Result<()>
where
    F: Fn(usize) -> Range<usize> + Sync,
{
    let Forward { config, packing, q, k, v, o, lse, visible, lone_in_chunks } = args;
    let (q, o, lse) = (q.to_host()?, o.into_host()?.into_data(), lse.into_host()?.into_data());
    let (k, v) = (host_rows(&k)?, host_rows(&v)?);
    let tiles = query_tiles(packing, |_| queries_per_tile(config.group_size()));
    // How many tiles of keys the tiles of queries of each sequence look at.
    let mut looks = vec![0; packing.num_seqs()];
    for tile in &tiles {
        looks[tile.seq] += Grid::plain().tiles(&seen(tile, &visible)).len();
    }
    let seqs: Vec<SeqKeys<'_, T, U>> = k
        .iter()
        .zip(&v)
        .zip(packing.seqs())
        .zip(looks)
        .map(|(((k, v), seq), looks)| {
            // The last row belongs to the last query; a window's rows need not reach back to position 0.
            let (grid, first, heads) = (Grid::plain(), seq.end() - k.len(), config.num_kv_heads());
            let k = Layout::new(*k, first, config.head_dim_qk(), grid, Order::OverDims);
            let v = Layout::new(*v, first, config.head_dim_v(), grid, Order::OverKeys);
            SeqKeys { k: k.tiles(cpu.pool(), heads, looks), v: v.tiles(cpu.pool(), heads, looks) }
        })
        .collect();
    let rows = || tiles.iter().map(|tile| tile.rows.clone());
    let heads = config.num_heads();
    let o = split_rows(o, heads * config.head_dim_v(), rows());
    let lse = split_rows(lse, heads, rows());
    tiles.par_iter().zip(o).zip(lse).with_max_len(1).for_each(|((tile, o), lse)| {
        let (seq, seen) = (packing.seq(tile.seq), seen(tile, &visible));
        if lone_in_chunks && seq.rows.len() == 1 && seen.len() > CHUNK {
            let keys = (k[tile.seq], v[tile.seq], seq.end() - k[tile.seq].len());
            attend_alone::<T, U>(cpu, Heads::new(config), &q, tile.rows.start, keys, seen, (o, lse));
        } else {
            attend(cpu, config, &q, &seqs[tile.seq], tile, &visible, (o, lse));
        }
    });
    Ok(())
}

/// The query in row `t` of q, alone: a task a KV head and chunk of the keys. `first` is the position of their first row.
fn attend_alone<T: Element, U: Unit<Acc = T::Acc>>(
    cpu: &Cpu,
    heads: Heads<T::Acc>,
    q: &View<'_, T, 3>,
    t: usize,
    (k, v, first): (SeqRows<'_, T>, SeqRows<'_, T>, usize),
    seen: Range<usize>,
    (o, lse): (&mut [T], &mut [T::Acc]),
) {
    let Heads { group_size, dim_v, .. } = heads;
    let groups = o.par_chunks_mut(group_size * dim_v).zip(lse.par_chunks_mut(group_size));
    groups.enumerate().with_max_len(1).for_each(|(g, (o, lse))| {
        let query = Query::<U>::new(cpu, heads, q, t, g);
        let parts = query.attend(&Keys { k, v, len: seen.len(), row: |i| seen.start - first + i }, &mut []);
        let totals = parts.totals(cpu);
        heads.store(cpu.isa(), &mut parts.join(cpu, heads, &totals), (&totals.max, &totals.sum), 0, o, lse);
    });
}

/// The positions that the queries of a tile attend to.
fn seen(tile: &QueryTile, visible: &impl Fn(usize) -> Range<usize>) -> Range<usize> {
    visible(tile.position).start..visible(tile.position + tile.rows.len() - 1).end
}

/// One tile of queries, head after head.
fn attend<T: Element, U: Unit<Acc = T::Acc>>(
    cpu: &Cpu,
    config: &NsaConfig,
    q: &View<'_, T, 3>,
    seq: &SeqKeys<'_, T, U>,
    tile: &QueryTile,
    visible: &impl Fn(usize) -> Range<usize>,
    (o, lse): (&mut [T], &mut [T::Acc]),
) {
    let mut flash = Flash::<U>::new(cpu, Heads::new(config), tile.rows.len());
    let (mut k_buffer, mut v_buffer) = (seq.k.buffer(cpu.pool()), seq.v.buffer(cpu.pool()));
    for g in 0..config.num_kv_heads() {
        flash.start(q, tile.rows.clone(), g);
        for i in Grid::plain().tiles(&seen(tile, visible)) {
            let part = Grid::plain().tokens(i);
            let (k, v) = (seq.k.tile(i, g, &mut k_buffer), seq.v.tile(i, g, &mut v_buffer));
            let queries = 0..tile.rows.len();
            let seen = queries.map(|query| (query, clip(visible(tile.position + query), &part)));
            // One tile behind the other, each for many rows: the processor foresees them.
            flash.step((k, v), seen, [Lines::none(); 2]);
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
    /// Whether dq is added to what it holds.
    pub(crate) accumulate: bool,
    /// `[rows, G, Dk]`.
    pub(crate) dk: TensorMut<'a, T::Acc, 3>,
    /// `[rows, G, Dv]`.
    pub(crate) dv: TensorMut<'a, T::Acc, 3>,
}

/// Gradients of the attention to all visible rows.
pub(crate) fn backward<T: Element, F>(cpu: &Cpu, args: Backward<'_, T, F>) -> Result<()>
where
    F: Fn(usize) -> Range<usize> + Sync,
{
    match cpu.multiplies_pairs(T::DTYPE) {
        true => backward_in::<T, Pair<T::Acc>, F>(cpu, args),
        false => backward_in::<T, T::Acc, F>(cpu, args),
    }
}

fn backward_in<T: Element, U: Unit<Acc = T::Acc>, F>(cpu: &Cpu, args: Backward<'_, T, F>) -> Result<()>
where
    F: Fn(usize) -> Range<usize> + Sync,
{
    let Backward { config, packing, queries, k, v, offsets, stride, visible, dq, accumulate, dk, dv } = args;
    let keys = grad::SeqKeys::<T, U>::pack(cpu.pool(), config, (k, v), offsets, Grid::plain())?;
    let cuts: Vec<Cut> = packing
        .seqs()
        .zip(0..)
        .map(|(seq, s)| cut(seq.rows.len(), offsets.range(s).len(), stride, config.group_size(), &visible))
        .collect();
    for_each_row((cpu.pool(), config), packing, offsets, &cuts, (dq, accumulate, dk, dv), |row| {
        let cut = &cuts[row.seq];
        let start = row.tile * cut.queries;
        let tile = BandRow {
            cpu,
            config,
            visible: &visible,
            first_row: packing.seq(row.seq).rows.start,
            queries: start..(start + cut.queries).min(packing.seq(row.seq).rows.len()),
            cut,
        };
        tile.add_gradients(&queries, &keys[row.seq], row);
    })
}

/// Keys of a tile whose gradients are summed together.
const BAND_KEYS: usize = 4 * KEYS;

/// Parts of a sequence's queries with sums of their own over compressed keys, at most, and tiles of queries in each, at least.
const SEGMENTS: usize = 4;
const SEGMENT_TILES: usize = 16;

/// How a sequence of `len` queries and `rows` keys is cut. Where all keys stay in the last cache (the compressed ones: there
/// is one a few tokens), a tile of queries is one load. Else it is as many as read the keys of a tile often enough.
fn cut(len: usize, rows: usize, stride: usize, group_size: usize, visible: &impl Fn(usize) -> Range<usize>) -> Cut {
    let load = flash::queries_per_tile(group_size);
    let queries = if stride > 1 { load } else { tile_len(len, KEYS..=BAND_KEYS).next_multiple_of(load) };
    let keys = tile_len(rows, KEYS..=BAND_KEYS);
    let seen = |start: usize| {
        let last = (start + queries).min(len) - 1;
        visible(start).start.min(visible(last).end) / keys..visible(last).end.div_ceil(keys)
    };
    let seen: Vec<Range<usize>> = (0..len).step_by(queries).map(seen).collect();
    let segments = if stride > 1 { (seen.len() / SEGMENT_TILES).clamp(1, SEGMENTS) } else { 1 };
    Cut { queries, keys, seen, segments }
}

/// A tile of queries.
struct BandRow<'a, F> {
    cpu: &'a Cpu,
    config: &'a NsaConfig,
    visible: &'a F,
    /// First row of the sequence in the packed tensors.
    first_row: usize,
    /// Positions.
    queries: Range<usize>,
    cut: &'a Cut,
}

impl<F: Fn(usize) -> Range<usize>> BandRow<'_, F> {
    /// Adds its gradients to each tile of keys that it sees, head after head.
    fn add_gradients<T: Element, U: Unit<Acc = T::Acc>>(
        &self,
        source: &Queries<'_, T>,
        keys: &grad::SeqKeys<'_, T, U>,
        mut row: Row<'_, '_, T::Acc>,
    ) {
        let heads = Heads::<T::Acc>::new(self.config);
        let capacity = Loaded::<U>::capacity(heads);
        let seen = self.cut.seen[row.tile].clone();
        let mut loads = Vec::new();
        if !seen.is_empty() {
            for (g, start) in
                (0..heads.num_kv_heads).flat_map(|g| self.queries.clone().step_by(capacity).map(move |x| (g, x)))
            {
                let end = (start + capacity).min(self.queries.end);
                let mut loaded = Loaded::new(self.cpu, heads);
                loaded.load(source, end - start, |i| self.first_row + start + i, g);
                loads.push((start..end, loaded));
            }
        }
        let mut cell = Cell::<U>::new(self.cpu, heads, false);
        for j in seen.rev() {
            let mut sums = row.turns.take(j);
            let keys_of = j * self.cut.keys..(j + 1) * self.cut.keys;
            for (queries, loaded) in &loads {
                let reach = (self.visible)(queries.start).start..(self.visible)(queries.end - 1).end;
                let reach = reach.start.max(keys_of.start)..reach.end.min(keys_of.end);
                for tile in Grid::plain().tiles(&reach) {
                    let part = Grid::plain().tokens(tile);
                    let span = |i| clip((self.visible)(queries.start + i), &part);
                    let query = |i| queries.start - self.queries.start + i;
                    let key = |s| part.start + s - keys_of.start;
                    cell.step(loaded, keys, span, (&mut *row.dq, &mut sums), &Place { tile, key, query });
                }
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
