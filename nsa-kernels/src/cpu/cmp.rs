//! Compressed attention on the CPU, with importance and selection.
//!
//! A task is a tile of a few queries. Scores against all visible blocks are computed once and kept in scratch, a panel
//! of query rows after the other, `[panels][M][LANES]`: at 64k tokens 1 MiB for 64 rows. Their exponentials give lse
//! and output, and divided by the sums the importance, without a second product.

use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::band::{self, clip};
use crate::cpu::flash::{self, Heads};
use crate::cpu::grad::Queries;
use crate::cpu::rows::{SeqRows, host_rows};
use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::tasks::{QueryTile, query_tiles, split_rows};
use crate::cpu::tile::{self, KEYS, LANES, Left, Right, Store, Target};
use crate::op::cmp::{Backward, Forward};
use nsa_core::select::{SelectScratch, select_blocks};
use nsa_core::{Element, NsaConfig, Real, View, index};
use rayon::prelude::*;
use std::ops::Range;

/// The branch's column of the gates.
const GATE: usize = 0;

/// Rows of queries that a tile aims at: few enough for their scores to stay in the L2 cache up to 64k tokens.
const ROWS: usize = 64;

/// See `op::cmp::forward`.
pub(crate) fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k_blocks, v_blocks, o, lse, block_indices } = args;
    let (q, o, lse) = (q.to_host()?, o.into_host()?.into_data(), lse.into_host()?.into_data());
    let seqs: Vec<SeqBlocks<'_, T>> =
        host_rows(&k_blocks)?.into_iter().zip(host_rows(&v_blocks)?).map(|(k, v)| SeqBlocks { k, v }).collect();
    let tiles = query_tiles(packing, (ROWS / config.group_size()).max(1));
    let rows = || tiles.iter().map(|tile| tile.rows.clone());
    let heads = config.num_heads();
    let o = split_rows(o, heads * config.head_dim_v(), rows());
    let lse = split_rows(lse, heads, rows());
    let lists: Vec<Option<&mut [i32]>> = match block_indices {
        None => tiles.iter().map(|_| None).collect(),
        Some(lists) => {
            let row_len = config.num_kv_heads() * config.select_count();
            split_rows(lists.into_host()?.into_data(), row_len, rows()).into_iter().map(Some).collect()
        }
    };
    let selector = Selector::new(config);
    tiles.par_iter().zip(o).zip(lse).zip(lists).with_max_len(1).for_each(|(((tile, o), lse), mut lists)| {
        let mut scores = Scores::new(cpu.pool(), config, tile);
        let mut select = SelectScratch::default();
        for g in 0..config.num_kv_heads() {
            scores.weigh(&q, &seqs[tile.seq].k, g);
            if let Some(lists) = &mut lists {
                selector.select(&scores, cpu.pool(), &mut select, g, lists);
            }
            scores.attend(&seqs[tile.seq].v, g, g, o, lse);
        }
    });
    Ok(())
}

/// k̃ and ṽ of one sequence.
struct SeqBlocks<'a, T> {
    k: SeqRows<'a, T>,
    v: SeqRows<'a, T>,
}

/// The softmax of a tile of queries over all blocks that they see: row i belongs to query i / R.
pub(crate) struct Scores<'p, A: Real> {
    pool: &'p Pool,
    config: &'p NsaConfig,
    heads: Heads<A>,
    tile: &'p QueryTile,
    rows: usize,
    /// Blocks that the last query sees, M.
    blocks: usize,
    /// exp(score − max), `[⌈rows/LANES⌉][M][LANES]`; 0 for blocks that a row does not see, up to those that the last
    /// row of its panel sees.
    weights: Scratch<'p, A>,
    /// Greatest scaled score.
    max: Scratch<'p, A>,
    /// Sum of the weights.
    sum: Scratch<'p, A>,
}

impl<'p, A: Real> Scores<'p, A> {
    pub(crate) fn new(pool: &'p Pool, config: &'p NsaConfig, tile: &'p QueryTile) -> Self {
        let rows = tile.rows.len() * config.group_size();
        let lanes = rows.next_multiple_of(LANES);
        let blocks = index::visible_blocks(config, tile.position + tile.rows.len() - 1);
        Self {
            pool,
            config,
            heads: Heads::new(config),
            tile,
            rows,
            blocks,
            weights: pool.take(lanes * blocks),
            max: pool.take(lanes),
            sum: pool.take(lanes),
        }
    }

    /// Blocks that query `i` of the tile sees.
    fn visible(&self, i: usize) -> usize {
        index::visible_blocks(self.config, self.tile.position + i)
    }

    /// Blocks that the rows of the panel of row `first` see; lanes behind the last row take after it.
    fn panel_spans(&self, first: usize) -> [Range<usize>; LANES] {
        std::array::from_fn(|x| 0..self.visible((first + x).min(self.rows - 1) / self.heads.group_size))
    }

    /// Computes weights, maxima and sums of KV head `g`.
    pub(crate) fn weigh<T: Element<Acc = A>>(&mut self, q: &View<'_, T, 3>, k: &SeqRows<'_, T>, g: usize) {
        let Heads { group_size, dim_qk, scale, .. } = self.heads;
        let mut gathered = self.pool.take(self.rows * dim_qk);
        let mut panels = self.pool.take(self.rows.next_multiple_of(LANES) * dim_qk);
        let mut buffer = self.pool.take(KEYS * dim_qk);
        flash::gather(q, self.tile.rows.clone(), g, group_size, &mut gathered);
        tile::pack(&gathered, dim_qk, &mut panels);
        self.max.fill(A::neg_infinity());
        self.sum.fill(A::zero());
        for base in (0..self.blocks).step_by(KEYS) {
            let part = base..(base + KEYS).min(self.blocks);
            let k = k.tile(part.clone(), g, &mut buffer);
            for first in (0..self.rows).step_by(LANES) {
                let spans = self.panel_spans(first);
                let Some(seen) = flash::union(&spans.clone().map(|span| clip(span, &part))) else { continue };
                let panel = Right { data: &panels[first * dim_qk..][..LANES * dim_qk], stride: LANES };
                let scores = &mut self.weights[(first * self.blocks + base * LANES)..];
                flash::product_of_scores(k, dim_qk, seen.clone(), panel, scores);
                let partly = spans.iter().any(|span| span.end < base + seen.end);
                let scores = &mut scores.as_chunks_mut().0[seen];
                if partly {
                    flash::mask(scores, &spans, base);
                }
                flash::raise(self.max[first..].first_chunk_mut().expect("a panel"), scores, scale);
            }
        }
        for first in (0..self.rows).step_by(LANES) {
            let seen = self.panel_spans(first)[LANES - 1].end;
            let scores = &mut self.weights[first * self.blocks..][..seen * LANES];
            let max: &[A; LANES] = self.max[first..].first_chunk().expect("a panel");
            let sum = self.sum[first..].first_chunk_mut().expect("a panel");
            flash::exponentiate(scores.as_chunks_mut().0, scale, &max.map(flash::finite), sum);
        }
    }

    /// Attends with KV head `g` and writes output and lse as KV head `place` of o `[queries, Hq, Dv]` and lse
    /// `[queries, Hq]`. (Of a single query's, the part of one KV head is place 0 of itself.)
    pub(crate) fn attend<T: Element<Acc = A>>(
        &self,
        v: &SeqRows<'_, T>,
        g: usize,
        place: usize,
        o: &mut [T],
        lse: &mut [A],
    ) {
        let dim_v = self.heads.dim_v;
        let mut buffer = self.pool.take(KEYS * dim_v);
        let mut sums = self.pool.zeroed(self.rows * dim_v);
        for base in (0..self.blocks).step_by(KEYS) {
            let part = base..(base + KEYS).min(self.blocks);
            let v = v.tile(part.clone(), g, &mut buffer);
            for first in (0..self.rows).step_by(LANES) {
                let rows = (self.rows - first).min(LANES);
                let spans = self.panel_spans(first).map(|span| clip(span, &part));
                let weights = &self.weights[(first * self.blocks + base * LANES)..];
                let weights = Left::Columns { data: weights, stride: LANES };
                let data = &mut sums[first * dim_v..];
                let target = Target { data, row: |i| i * dim_v, store: Store::Add };
                let values = Right { data: v.data, stride: v.stride };
                tile::product([rows, dim_v], weights, values, target, |i| spans[i].clone());
            }
        }
        self.heads.store(&mut sums, (&self.max, &self.sum), place, o, lse);
    }

    /// Adds up the probabilities of query `i` over the heads, in their order: importance P of the blocks that it sees.
    fn importance(&self, i: usize, importance: &mut [A]) {
        importance.fill(A::zero());
        let rows = i * self.heads.group_size..(i + 1) * self.heads.group_size;
        for panel in rows.start / LANES..rows.end.div_ceil(LANES) {
            let first = panel * LANES;
            let lanes = rows.start.max(first) - first..rows.end.min(first + LANES) - first;
            let weights = self.weights[first * self.blocks..].as_chunks::<LANES>().0;
            let inverse: [A; LANES] = std::array::from_fn(|x| self.sum[first + x].recip());
            for (importance, weights) in importance.iter_mut().zip(weights) {
                for x in lanes.clone() {
                    *importance += weights[x] * inverse[x];
                }
            }
        }
    }
}

/// From importance to selected blocks.
pub(crate) struct Selector<A> {
    /// Compression strides in a selection block.
    chunks: usize,
    /// Weights of the compression blocks that touch a selection block, from the first.
    weights: Vec<A>,
}

impl<A: Real> Selector<A> {
    pub(crate) fn new(config: &NsaConfig) -> Self {
        let chunks = config.select_block() / config.compress_stride();
        let span = config.compress_block() / config.compress_stride();
        // Weights are the same for all selection blocks; at block `span` none is cut off.
        let weight = |i| A::of(index::importance_weight(config, i, span) as f64);
        let weights = (span * chunks - (span - 1)..(span + 1) * chunks).map(weight).collect();
        Self { chunks, weights }
    }

    /// Writes the blocks selected by the queries of a tile as KV head `place` of `[queries, G, n]`.
    pub(crate) fn select(
        &self,
        scores: &Scores<'_, A>,
        pool: &Pool,
        scratch: &mut SelectScratch<A>,
        place: usize,
        lists: &mut [i32],
    ) {
        let config = scores.config;
        let (groups, count) = (config.num_kv_heads(), config.select_count());
        // Blocks before the first have no importance.
        let before = self.weights.len() - self.chunks;
        for i in 0..scores.tile.rows.len() {
            let t = scores.tile.position + i;
            let candidates = index::num_candidates(config, t);
            let mut importance = pool.zeroed(before + candidates * self.chunks);
            scores.importance(i, &mut importance[before..before + scores.visible(i)]);
            let mut mapped = pool.take(candidates);
            for (j, mapped) in mapped.iter_mut().enumerate() {
                let touching = &importance[j * self.chunks..][..self.weights.len()];
                let score: A = touching.iter().zip(&self.weights).map(|(&p, &weight)| p * weight).sum();
                // NaN has no order.
                *mapped = if score.is_nan() { A::zero() } else { score };
            }
            select_blocks(config, t, &mapped, scratch, &mut lists[(i * groups + place) * count..][..count]);
        }
    }
}

/// See `op::cmp::backward`.
pub(crate) fn backward<T: Element>(cpu: &Cpu, args: Backward<'_, T>) -> Result<()> {
    let Backward { config, packing, q, k_blocks, v_blocks, o, lse, d_o, gates, dq, dk_blocks, dv_blocks } = args;
    let queries = Queries::new(cpu.pool(), (q, o, lse, d_o), gates.map(|gates| (gates, GATE)))?;
    let args = band::Backward {
        config,
        packing,
        queries,
        k: k_blocks,
        v: v_blocks,
        offsets: &packing.cu_blocks(config)?,
        stride: config.compress_stride(),
        visible: |t| 0..index::visible_blocks(config, t),
        dq,
        dk: dk_blocks,
        dv: dv_blocks,
    };
    band::backward(cpu, args)
}
