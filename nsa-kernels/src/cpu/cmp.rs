//! Compressed attention on the CPU, with importance and selection.
//!
//! A task is a tile of a few queries. Scores against all visible blocks are computed once and kept in scratch,
//! `[rows, M]`. Their exponentials give lse and output, and divided by the sums the importance, without a second product.

use crate::cpu::Cpu;
use crate::cpu::band::{self, clip};
use crate::cpu::flash::{self, Heads};
use crate::cpu::grad::Queries;
use crate::cpu::isa::Isa;
use crate::cpu::keys::{Grid, KEYS, Layout, Order, Tiles};
use crate::cpu::product::{Left, Product, Right, Steps, Store, Target, product};
use crate::cpu::rows::host_rows;
use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::simd::{PAD, padded, vectorize};
use crate::cpu::softmax::{Mix, Whole};
use crate::cpu::tasks::{QueryTile, query_tiles, split_rows};
use crate::cpu::unit::{Pair, Unit};
use crate::op::Gating;
use crate::op::cmp::{Backward, Forward};
use crate::{Element, Result};
use nsa_core::select::{SelectScratch, select_blocks};
use nsa_core::{NsaConfig, Real, View, index};
use num_traits::Float;
use rayon::prelude::*;

/// The branch's column of the gates.
const GATE: usize = 0;

/// Scores that a tile aims at: they stay in the L2 cache from the product to the last sum.
const SCORES: usize = 1 << 17;

/// Tiles of values with one element a unit that are summed at once: a strip of their columns stays in the L1 cache.
const VALUES: usize = 2;

/// See `op::cmp::forward`.
pub(crate) fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    match cpu.multiplies_pairs(T::DTYPE) {
        true => forward_in::<T, Pair<T::Acc>>(cpu, args),
        false => forward_in::<T, T::Acc>(cpu, args),
    }
}

fn forward_in<T: Element, U: Unit<Acc = T::Acc>>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k_blocks, v_blocks, o, lse, block_indices } = args;
    let (q, o, lse) = (q.to_host()?, o.into_host()?.into_data(), lse.into_host()?.into_data());
    let (k, v) = (host_rows(&k_blocks)?, host_rows(&v_blocks)?);
    let most_blocks = k.iter().map(|k| k.len()).max().unwrap_or(0);
    let rows = (SCORES / most_blocks.max(1)).clamp(1, flash::ROWS);
    let tiles = query_tiles(packing, |_| (rows / config.group_size()).max(1));
    let mut looks = vec![0; packing.num_seqs()];
    for tile in &tiles {
        looks[tile.seq] += k[tile.seq].len().div_ceil(KEYS);
    }
    let heads = config.num_kv_heads();
    let blocks = k.iter().zip(&v).zip(looks).map(|((k, v), looks)| {
        let k = Layout::new(*k, 0, config.head_dim_qk(), Grid::plain(), Order::OverDims);
        let v = Layout::new(*v, 0, config.head_dim_v(), Grid::plain(), Order::OverKeys);
        SeqBlocks { k: k.tiles(cpu.pool(), heads, looks), v: v.tiles(cpu.pool(), heads, looks) }
    });
    let blocks: Vec<SeqBlocks<'_, T, U>> = blocks.collect();
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
        let mut scores = Scores::<U>::new(cpu, config, tile);
        for g in 0..config.num_kv_heads() {
            scores.weigh(&q, &blocks[tile.seq].k, g);
            if let Some(lists) = &mut lists {
                scores.select(&selector, g, lists);
            }
            scores.attend(&blocks[tile.seq].v, g, o, lse);
        }
    });
    Ok(())
}

/// k̃ and ṽ of one sequence.
struct SeqBlocks<'p, T, U> {
    k: Tiles<'p, T, U>,
    v: Tiles<'p, T, U>,
}

/// The softmax of a tile of queries over all blocks that they see: row i belongs to query i / R.
struct Scores<'p, U: Unit> {
    cpu: &'p Cpu,
    isa: Isa,
    config: &'p NsaConfig,
    heads: Heads<U::Acc>,
    tile: &'p QueryTile,
    rows: usize,
    /// Blocks that the last query sees, M.
    blocks: usize,
    /// M, to whole tiles: distance between rows of the weights.
    stride: usize,
    /// Scores, then exp(score − max), `[rows, stride]`.
    weights: Scratch<'p, U::Acc>,
    /// Blocks that each row sees.
    spans: Scratch<'p, [usize; 2]>,
    /// Greatest scaled score of each row.
    max: Scratch<'p, U::Acc>,
    /// Sum of each row's weights.
    sum: Scratch<'p, U::Acc>,
}

impl<'p, U: Unit> Scores<'p, U> {
    fn new(cpu: &'p Cpu, config: &'p NsaConfig, tile: &'p QueryTile) -> Self {
        let pool = cpu.pool();
        let rows = tile.rows.len() * config.group_size();
        let blocks = index::visible_blocks(config, tile.position + tile.rows.len() - 1);
        let stride = blocks.next_multiple_of(KEYS);
        let mut spans = pool.take(rows);
        for (i, span) in spans.iter_mut().enumerate() {
            *span = [0, index::visible_blocks(config, tile.position + i / config.group_size())];
        }
        Self {
            cpu,
            isa: cpu.isa(),
            config,
            heads: Heads::new(config),
            tile,
            rows,
            blocks,
            stride,
            weights: pool.take(rows * stride),
            spans,
            max: pool.take(rows),
            sum: pool.take(rows),
        }
    }

    /// Computes weights, maxima and sums of KV head `g`.
    fn weigh<T: Element<Acc = U::Acc>>(&mut self, q: &View<'_, T, 3>, k: &Tiles<'_, T, U>, g: usize) {
        let (pool, Heads { group_size, dim_qk, scale, .. }) = (self.cpu.pool(), self.heads);
        let units = dim_qk.div_ceil(U::STEP);
        let mut gathered = pool.take::<U>(self.rows * units);
        let mut buffer = k.buffer(pool);
        let (left, places) = (pool.multiples(self.rows, units), pool.multiples(self.rows, self.stride));
        flash::gather(q, self.tile.rows.clone(), g, group_size, &mut gathered);
        for tile in Grid::plain().tiles(&(0..self.blocks)) {
            let part = Grid::plain().tokens(tile);
            // Later queries see more.
            let first = self.spans.partition_point(|span| span[1] <= part.start);
            let k = k.tile(tile, g, &mut buffer);
            let target = &mut self.weights[part.start..];
            product(
                self.isa,
                Product {
                    left: Left { data: &gathered, rows: &left[first..], step: 1 },
                    right: Right { data: k.data, stride: k.stride },
                    target: Target { data: target, rows: &places[first..], store: Store::Write },
                    columns: padded(self.blocks.min(part.end) - part.start),
                    steps: Steps::First(dim_qk),
                },
            );
        }
        vectorize(
            self.isa,
            Whole {
                scores: &mut self.weights,
                stride: self.stride,
                spans: &self.spans,
                scale,
                max: &mut self.max,
                sum: &mut self.sum,
            },
        );
    }

    /// Attends with KV head `g` and writes its part of o `[queries, Hq, Dv]` and lse `[queries, Hq]`.
    fn attend<T: Element<Acc = U::Acc>>(&self, v: &Tiles<'_, T, U>, g: usize, o: &mut [T], lse: &mut [U::Acc]) {
        let (pool, dim_v) = (self.cpu.pool(), self.heads.dim_v);
        let most = VALUES * U::STEP;
        let mut buffer = v.buffer_of(pool, most);
        let mut units = pool.take(if U::STEP == 1 { 0 } else { self.weights.len() / U::STEP });
        let weights = U::along_rows(self.isa, &self.weights, &mut units);
        let mut sums = pool.zeroed(self.rows * padded(dim_v));
        let (mut left, mut steps) = (pool.take(self.rows), pool.take(self.rows));
        let places = pool.multiples(self.rows, padded(dim_v));
        let tiles = Grid::plain().tiles(&(0..self.blocks));
        let mut tile = 0;
        while tile < tiles.end {
            let (v, count) = v.several(tile..tiles.end, most, g, &mut buffer);
            let part = Grid::plain().tokens(tile).start..Grid::plain().tokens(tile + count - 1).end;
            for i in 0..self.rows {
                let span = clip(0..self.spans[i][1], &part);
                steps[i] = [span.start, span.end];
                left[i] = (i * self.stride + part.start) / U::STEP;
            }
            product(
                self.isa,
                Product {
                    left: Left { data: weights, rows: &left, step: 1 },
                    right: Right { data: v.data, stride: v.stride },
                    target: Target { data: &mut sums, rows: &places, store: Store::Add },
                    columns: dim_v,
                    steps: Steps::Each(&steps),
                },
            );
            tile += count;
        }
        self.heads.store(self.isa, &mut sums, (&self.max, &self.sum), g, o, lse);
    }

    /// Writes the blocks that the queries select as KV head `g` of `[queries, G, n]`.
    fn select(&self, selector: &Selector<U::Acc>, g: usize, lists: &mut [i32]) {
        let (groups, count, r) = (self.config.num_kv_heads(), self.config.select_count(), self.heads.group_size);
        let last = self.tile.position + self.tile.rows.len() - 1;
        let mut importance = selector.importance(self.config, self.cpu.pool(), last);
        let mut inverse = self.cpu.pool().take(r);
        for i in 0..self.tile.rows.len() {
            for (inverse, sum) in inverse.iter_mut().zip(&self.sum[i * r..(i + 1) * r]) {
                *inverse = sum.recip();
            }
            let visible = self.spans[i * r][1];
            let mix = Mix {
                weights: self.weights.get(i * r * self.stride..).unwrap_or(&[]),
                stride: self.stride,
                factors: &inverse,
                mixed: importance.of_blocks(padded(visible)),
            };
            vectorize(self.isa, mix);
            let list = &mut lists[(i * groups + g) * count..][..count];
            importance.select(self.config, self.tile.position + i, visible, list);
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

    /// Memory for one query after the other, up to position `last`.
    pub(crate) fn importance<'p>(&'p self, config: &NsaConfig, pool: &'p Pool, last: usize) -> Importance<'p, A> {
        let candidates = index::num_candidates(config, last);
        let before = self.weights.len() - self.chunks;
        Importance {
            selector: self,
            before,
            // Blocks before the first have none.
            importance: pool.zeroed(before + candidates * self.chunks + PAD),
            scores: pool.take(candidates),
            scratch: SelectScratch::default(),
        }
    }
}

/// The importance of compression blocks for one query, and what is selected from it.
pub(crate) struct Importance<'p, A: Real> {
    selector: &'p Selector<A>,
    /// Compression blocks that touch a selection block and start before it.
    before: usize,
    /// From `before` blocks before the first on.
    importance: Scratch<'p, A>,
    scores: Scratch<'p, A>,
    scratch: SelectScratch<A>,
}

impl<A: Real> Importance<'_, A> {
    /// The place of the first `len` blocks.
    pub(crate) fn of_blocks(&mut self, len: usize) -> &mut [A] {
        &mut self.importance[self.before..][..len]
    }

    /// Writes the blocks `[n]` that the query at position `t` selects; it sees the first `visible` blocks.
    pub(crate) fn select(&mut self, config: &NsaConfig, t: usize, visible: usize, list: &mut [i32]) {
        let Selector { chunks, weights } = self.selector;
        self.importance[self.before + visible..].fill(A::zero());
        let scores = &mut self.scores[..index::num_candidates(config, t)];
        match (*chunks, weights.first_chunk()) {
            // The paper's block sizes, with known loops.
            (4, Some(weights)) if self.selector.weights.len() == 5 => {
                sums::<A, 4, 5>(&self.importance, weights, scores);
            }
            _ => {
                for (j, score) in scores.iter_mut().enumerate() {
                    *score = sum(&self.importance[j * chunks..], weights);
                }
            }
        }
        select_blocks(config, t, scores, &mut self.scratch, list);
    }
}

/// S of every selection block: the importance of CHUNKS blocks from its own on and of those before that touch it.
fn sums<A: Real, const CHUNKS: usize, const TOUCHING: usize>(
    importance: &[A],
    weights: &[A; TOUCHING],
    scores: &mut [A],
) {
    let starts = importance.as_chunks::<CHUNKS>().0;
    for ((first, next), score) in starts.iter().zip(&starts[1..]).zip(scores) {
        let touching: [A; TOUCHING] = std::array::from_fn(|r| if r < CHUNKS { first[r] } else { next[r - CHUNKS] });
        *score = sum(&touching, weights);
    }
}

/// Σ weight · p; 0 if that is NaN, which has no order.
#[inline(always)]
fn sum<A: Real>(importance: &[A], weights: &[A]) -> A {
    let sum: A = importance.iter().zip(weights).map(|(&p, &weight)| p * weight).sum();
    if sum.is_nan() { A::zero() } else { sum }
}

/// See `op::cmp::backward`.
pub(crate) fn backward<T: Element>(cpu: &Cpu, args: Backward<'_, T>) -> Result<()> {
    let Backward {
        config,
        packing,
        q,
        k_blocks,
        v_blocks,
        o,
        lse,
        d_o,
        gates,
        d_gates,
        dq,
        accumulate,
        dk_blocks,
        dv_blocks,
    } = args;
    let queries = Queries::new(cpu, (q, o, lse, d_o), Gating { gates, d_gates, column: GATE })?;
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
        accumulate,
        dk: dk_blocks,
        dv: dv_blocks,
    };
    band::backward(cpu, args)
}
