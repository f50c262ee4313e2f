//! The attention half of a layer: projections, caches, operator.

use super::blocks;
use super::forward::{Pass, Run};
use super::layers::{Layer, NsaWeights, norm, project_all};
use super::net::Activation;
use super::workspace::{Workspace, fit};
use crate::Result;
use crate::cache::{DenseCache, LayerCache, NsaCache, Paged, Ring};
use crate::weights::{F32Weight, Weight};
use nsa_core::CuSeqlens;
use nsa_kernels::layer::copy::{self, Piece};
use nsa_kernels::layer::{rope, sigmoid};
use nsa_kernels::op;
use nsa_kernels::{Backend, Buffer, Pages, Rows, TensorMut};
use std::ops::Range;

/// Where the caches of a pass are.
pub(super) enum Caches<'a, 'r, T: Activation> {
    /// Here: each operation is told of them when it is called.
    Here(&'a mut [Run<'r, T>]),
    /// Where the device was told before the pass, see [`place`].
    Placed(&'a mut Places<T>),
}

/// What a device was told of where new rows go and caches are.
#[derive(Debug)]
pub(super) struct Places<T> {
    /// Copies of all layers.
    table: copy::Table,
    /// Caches of all layers.
    caches: PlacedCaches<T>,
    /// Versions of the caches of each layer.
    versions: Vec<Vec<u64>>,
}

/// The caches of the model's kind of attention.
#[derive(Debug)]
enum PlacedCaches<T> {
    Nsa(op::decode::Workspace<T>),
    Dense(op::dense::Workspace<T>),
}

impl<T: Activation> PlacedCaches<T> {
    fn place_again(&mut self, layer: usize, contexts: &[usize]) -> Result<Option<op::decode::RowsRead>> {
        match self {
            Self::Nsa(caches) => Ok(caches.place_again(layer, contexts)?),
            Self::Dense(caches) => Ok(caches.place_again(layer, contexts)?),
        }
    }

    fn send(&mut self) -> Result<()> {
        match self {
            Self::Nsa(caches) => Ok(caches.send()?),
            Self::Dense(caches) => Ok(caches.send()?),
        }
    }
}

impl<T: Activation> Places<T> {
    /// For steps of up to so many sequences.
    pub(super) fn new(backend: &Backend, is_sparse: bool, layers: usize, sequences: usize) -> Result<Self> {
        // A sequence has a row for two page tables and four rings; the raw keys and values of a block are in two parts of a ring
        // and a new row each.
        let table = copy::Table::new(backend, 3 * layers, 6 * sequences)?;
        let caches = match is_sparse {
            true => PlacedCaches::Nsa(op::decode::Workspace::new(layers)),
            false => PlacedCaches::Dense(op::dense::Workspace::new(layers)),
        };
        Ok(Self { table, caches, versions: vec![Vec::new(); layers] })
    }

    /// Sequences of a step, at most.
    pub(super) fn sequences(&self) -> usize {
        self.table.shape()[1] / 6
    }

    /// Tells the device.
    pub(super) fn send(&mut self) -> Result<()> {
        self.table.send()?;
        self.caches.send()
    }
}

/// Copies of a layer: to the raw tokens of new blocks, of these blocks to their pages, of new rows to theirs.
#[derive(Clone, Copy)]
enum Copies {
    Tails,
    Blocks,
    Rows,
}

impl Copies {
    fn slot(self, layer: usize) -> usize {
        3 * layer + self as usize
    }
}

impl<'r, T: Activation> Caches<'_, 'r, T> {
    /// Makes copies that `collect` finds, or those that were placed.
    fn copy<'p>(
        &'p mut self,
        pass: &Pass<'_, T>,
        (copies, layer): (Copies, usize),
        collect: impl FnOnce(&'p mut [Run<'r, T>]) -> Result<Vec<Piece<'p, T>>>,
    ) -> Result<()> {
        match self {
            Self::Here(runs) => Ok(copy::all(&pass.model.backend, collect(runs)?)?),
            Self::Placed(places) => Ok(places.table.run(copies.slot(layer))?),
        }
    }
}

/// Makes room for the pass but for what the window reaches back to, and writes the new blocks' positions.
pub(super) fn prepare<T: Activation>(pass: &Pass<'_, T>, ws: &mut Workspace<T>) -> Result<()> {
    let (config, backend, n) = (&pass.model.attention, &pass.model.backend, pass.rows());
    let (heads, kv_heads) = (config.num_heads(), config.num_kv_heads());
    let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
    fit(backend, &mut ws.q, n * heads * dim_k)?;
    if pass.model.config.qk_norm() {
        fit(backend, &mut ws.raw_q, n * heads * dim_k)?;
        fit(backend, &mut ws.raw_k_slc, n * kv_heads * dim_k)?;
        fit(backend, &mut ws.raw_k_win, n * kv_heads * dim_k)?;
    }
    let outputs = [&mut ws.o, &mut ws.o_cmp, &mut ws.o_slc, &mut ws.o_win];
    let sums = [&mut ws.lse_cmp, &mut ws.lse_slc, &mut ws.lse_win];
    let keys = [&mut ws.k_slc, &mut ws.k_cmp, &mut ws.k_win];
    let values = [&mut ws.v_slc, &mut ws.v_cmp, &mut ws.v_win];
    // Dense attention has one of each branch's; sparse attention saves its branches' outputs, but not in a step.
    let sparse = pass.model.config.nsa_config().is_some();
    let branches = if sparse { 3 } else { 1 };
    let saved = if sparse && !pass.is_step { 3 } else { 0 };
    outputs.into_iter().take(1 + saved).try_for_each(|buffer| fit(backend, buffer, n * heads * dim_v))?;
    sums.into_iter().try_for_each(|buffer| fit(backend, buffer, n * heads))?;
    keys.into_iter().take(branches).try_for_each(|buffer| fit(backend, buffer, n * kv_heads * dim_k))?;
    values.into_iter().take(branches).try_for_each(|buffer| fit(backend, buffer, n * kv_heads * dim_v))?;
    if sparse {
        fit(backend, &mut ws.gate_logits, n * 3 * heads)?;
        fit(backend, &mut ws.gates, n * 3 * heads)?;
        fit(backend, &mut ws.indices, n * kv_heads * config.select_count())?;
    }
    pass.new_blocks.as_ref().map_or(Ok(()), |new| blocks::prepare(pass, new, ws))
}

/// Rotates `[rows, heads, Dk]` in place, each of its number of heads.
pub(super) fn rotate<T: Activation, const N: usize>(
    pass: &Pass<'_, T>,
    positions: &Buffer<i32>,
    rows: usize,
    tensors: [(&mut Buffer<T>, usize); N],
) -> Result<()> {
    let cache = &pass.net.rope;
    let mut x = Vec::with_capacity(N);
    for (buffer, heads) in tensors {
        x.push(buffer.tensor_mut([rows, heads, cache.head_dim()])?);
    }
    let args = rope::RotateInPlace { cache, positions: positions.tensor([rows])?, x };
    Ok(rope::forward_in_place(&pass.model.backend, args)?)
}

/// Norms heads, where the model has a norm: `raw` is where projections that are normed go.
fn norm_heads<T: Activation>(
    pass: &Pass<'_, T>,
    weight: Option<&F32Weight>,
    heads: usize,
    raw: &Buffer<T>,
    out: &mut Buffer<T>,
) -> Result<()> {
    weight.map_or(Ok(()), |weight| norm(&pass.model.backend, raw, weight, pass.eps(), pass.rows() * heads, out))
}

/// Full attention. Returns the token-rows that each sequence read.
pub(super) fn dense<T: Activation>(
    pass: &Pass<'_, T>,
    ws: &mut Workspace<T>,
    weights: &Layer<T>,
    (k, v, k_norm): (&Weight, &Weight, Option<&F32Weight>),
    caches: &mut Caches<'_, '_, T>,
    layer: usize,
) -> Result<Vec<usize>> {
    let (config, backend, n) = (&pass.model.attention, &pass.model.backend, pass.rows());
    let (heads, kv_heads, q_norm) = (config.num_heads(), config.num_kv_heads(), weights.q_norm.as_ref());
    let x = ws.h.tensor([n, pass.model.config.hidden_size()])?;
    let q_out = if q_norm.is_some() { &mut ws.raw_q } else { &mut ws.q };
    let k_out = if k_norm.is_some() { &mut ws.raw_k_slc } else { &mut ws.k_slc };
    project_all(backend, x, [(&weights.q, q_out), (k, k_out), (v, &mut ws.v_slc)])?;
    norm_heads(pass, q_norm, heads, &ws.raw_q, &mut ws.q)?;
    norm_heads(pass, k_norm, kv_heads, &ws.raw_k_slc, &mut ws.k_slc)?;
    rotate(pass, &ws.positions, n, [(&mut ws.q, heads), (&mut ws.k_slc, kv_heads)])?;
    caches.copy(pass, (Copies::Rows, layer), |runs| new_rows(pass, ws, runs, layer))?;
    let q = ws.q.tensor([n, heads, config.head_dim_qk()])?;
    let o = ws.o.tensor_mut([n, heads, config.head_dim_v()])?;
    let lse = ws.lse_slc.tensor_mut([n, heads])?;
    match caches {
        Caches::Here(runs) => {
            let (keys, values): (Vec<_>, Vec<_>) =
                dense_caches(runs, layer).into_iter().map(|op::dense::Cache { k, v }| (k, v)).unzip();
            let (k, v) = (Rows::Paged(&keys), Rows::Paged(&values));
            op::dense::forward(backend, op::dense::Forward { config, packing: &pass.packing, q, k, v, o, lse })?;
            Ok(pass.packing.seqs().map(|seq| seq.end()).collect())
        }
        Caches::Placed(Places { caches: PlacedCaches::Dense(caches), .. }) => {
            caches.launch(layer, q, o, lse)?;
            Ok(Vec::new())
        }
        Caches::Placed(_) => unreachable!("caches are placed for the model's kind of attention"),
    }
}

/// The caches, as full attention takes them.
fn dense_caches<'a, T: Activation>(runs: &'a mut [Run<'_, T>], layer: usize) -> Vec<op::dense::Cache<'a, T>> {
    let of_run = |run| {
        let cache = &*dense_cache(run, layer);
        op::dense::Cache { k: cache.k.table(), v: cache.v.table() }
    };
    runs.iter_mut().map(of_run).collect()
}

/// Sparse attention. Returns the token-rows that each sequence read, when the pass is a decoding step whose caches are here.
pub(super) fn nsa<T: Activation>(
    pass: &Pass<'_, T>,
    ws: &mut Workspace<T>,
    layer_weights: &Layer<T>,
    weights: &NsaWeights<T>,
    caches: &mut Caches<'_, '_, T>,
    layer: usize,
) -> Result<Vec<usize>> {
    project_branches(pass, ws, layer_weights, weights)?;
    if let Some(new) = &pass.new_blocks {
        caches.copy(pass, (Copies::Tails, layer), |runs| blocks::tails(pass, new, ws, runs, layer))?;
        blocks::compress(pass, new, ws, weights)?;
        caches.copy(pass, (Copies::Blocks, layer), |runs| blocks::new_rows(pass, new, ws, runs, layer))?;
    }
    let reach = match caches {
        Caches::Here(runs) if !pass.is_step => Some(gather_reach(pass, ws, runs, layer)?),
        _ => None,
    };
    caches.copy(pass, (Copies::Rows, layer), |runs| new_rows(pass, ws, runs, layer))?;
    match (caches, reach) {
        (Caches::Here(runs), Some(reach)) => chunk(pass, ws, runs, layer, &reach).map(|()| Vec::new()),
        (Caches::Here(runs), None) => step(pass, ws, runs, layer),
        (Caches::Placed(Places { caches: PlacedCaches::Nsa(caches), .. }), _) => {
            launch(pass, ws, caches, layer).map(|()| Vec::new())
        }
        (Caches::Placed(_), _) => unreachable!("caches are placed for the model's kind of attention"),
    }
}

/// Notes where the new rows of a decoding step go in one layer, and where its caches then are.
pub(super) fn place<T: Activation>(
    pass: &Pass<'_, T>,
    ws: &mut Workspace<T>,
    runs: &mut [Run<'_, T>],
    layer: usize,
    places: &mut Places<T>,
) -> Result<op::decode::Placed> {
    let Places { table, caches, versions } = places;
    if let Some(new) = &pass.new_blocks {
        table.set(Copies::Tails.slot(layer), blocks::tails(pass, new, ws, runs, layer)?)?;
        table.set(Copies::Blocks.slot(layer), blocks::new_rows(pass, new, ws, runs, layer)?)?;
    }
    table.set(Copies::Rows.slot(layer), new_rows(pass, ws, runs, layer)?)?;
    let now: Vec<u64> = runs.iter().flat_map(|run| run.cache.layers[layer].versions()).collect();
    if versions[layer] == now {
        let contexts: Vec<usize> = pass.packing.seqs().map(|seq| seq.end()).collect();
        if let Some(rows_read) = caches.place_again(layer, &contexts)? {
            return Ok(op::decode::Placed { rows_read, anew: false });
        }
    }
    let (backend, config) = (&pass.model.backend, &pass.model.attention);
    let placed = match caches {
        PlacedCaches::Nsa(caches) => caches.place(backend, config, layer, &step_caches(pass, runs, layer)?)?,
        PlacedCaches::Dense(caches) => caches.place(backend, config, layer, &dense_caches(runs, layer))?,
    };
    versions[layer] = now;
    Ok(placed)
}

/// Appends the new tokens' rows to pages and rings. All of these are apart, so that the order of their copies does not matter.
fn new_rows<'a, T: Activation>(
    pass: &Pass<'_, T>,
    ws: &'a Workspace<T>,
    runs: &'a mut [Run<'_, T>],
    layer: usize,
) -> Result<Vec<Piece<'a, T>>> {
    let backend = &pass.model.backend;
    let mut copies = Vec::new();
    for (run, seq) in runs.iter_mut().zip(pass.packing.seqs()) {
        let pages = match &mut run.cache.layers[layer] {
            LayerCache::Dense(DenseCache { k, v }) => [(k, &ws.k_slc), (v, &ws.v_slc)],
            LayerCache::Nsa(cache) => {
                let NsaCache { k_slc, v_slc, k_cmp, v_cmp, k_win, v_win, .. } = &mut **cache;
                for (ring, new) in [(k_cmp, &ws.k_cmp), (v_cmp, &ws.v_cmp), (k_win, &ws.k_win), (v_win, &ws.v_win)] {
                    ring.push(backend, new, seq.rows.clone(), &mut copies)?;
                }
                [(k_slc, &ws.k_slc), (v_slc, &ws.v_slc)]
            }
        };
        for (pages, new) in pages {
            pages.push(backend, new, seq.rows.clone(), &mut copies)?;
        }
    }
    Ok(copies)
}

/// Queries, keys and values of all branches, and the gates.
fn project_branches<T: Activation>(
    pass: &Pass<'_, T>,
    ws: &mut Workspace<T>,
    layer: &Layer<T>,
    weights: &NsaWeights<T>,
) -> Result<()> {
    let (config, backend, n) = (&pass.model.attention, &pass.model.backend, pass.rows());
    let [_, slc_norm, win_norm] = match &weights.k_norm {
        None => [None; 3],
        Some(norms) => norms.each_ref().map(Some),
    };
    let (heads, kv_heads, q_norm) = (config.num_heads(), config.num_kv_heads(), layer.q_norm.as_ref());
    let x = ws.h.tensor([n, pass.model.config.hidden_size()])?;
    let q_out = if q_norm.is_some() { &mut ws.raw_q } else { &mut ws.q };
    let k_slc = if slc_norm.is_some() { &mut ws.raw_k_slc } else { &mut ws.k_slc };
    let k_win = if win_norm.is_some() { &mut ws.raw_k_win } else { &mut ws.k_win };
    let (keys, values) = (&weights.k, &weights.v);
    let products = [
        (&layer.q, q_out),
        (&keys[0], &mut ws.k_cmp),
        (&keys[1], k_slc),
        (&keys[2], k_win),
        (&values[0], &mut ws.v_cmp),
        (&values[1], &mut ws.v_slc),
        (&values[2], &mut ws.v_win),
    ];
    project_all(backend, x, products)?;
    norm_heads(pass, q_norm, heads, &ws.raw_q, &mut ws.q)?;
    norm_heads(pass, slc_norm, kv_heads, &ws.raw_k_slc, &mut ws.k_slc)?;
    norm_heads(pass, win_norm, kv_heads, &ws.raw_k_win, &mut ws.k_win)?;
    rotate(pass, &ws.positions, n, [(&mut ws.q, heads), (&mut ws.k_slc, kv_heads), (&mut ws.k_win, kv_heads)])?;
    pass.project_biased(ws, &weights.gate, &weights.gate_bias)?;
    let shape = [n, 3 * config.num_heads()];
    let args = sigmoid::Forward { x: ws.gate_logits.tensor(shape)?, y: ws.gates.tensor_mut(shape)? };
    Ok(sigmoid::forward(&pass.model.backend, args)?)
}

/// All of a buffer.
pub(super) fn whole<T: Activation>(buffer: &mut Buffer<T>) -> Result<TensorMut<'_, T, 1>> {
    let len = buffer.len();
    Ok(buffer.tensor_mut([len])?)
}

/// Copies positions of rings of keys and of values, then new rows, to the first rows of `to`, once `copies` are made. Returns the rest
/// of `to`.
pub(super) fn gather<'a, T: Activation>(
    pass: &Pass<'_, T>,
    parts: [(&'a Ring<T>, &'a Buffer<T>); 2],
    (positions, rows): (Range<usize>, Range<usize>),
    to: [TensorMut<'a, T, 1>; 2],
    copies: &mut Vec<Piece<'a, T>>,
) -> Result<[TensorMut<'a, T, 1>; 2]> {
    let config = &pass.model.attention;
    let mut one = |(ring, new): (&'a Ring<T>, &'a Buffer<T>), to, dim| -> Result<TensorMut<'a, T, 1>> {
        let row_len = config.num_kv_heads() * dim;
        let (target, rest) = ring.read(positions.clone(), to, copies)?.split_at(rows.len() * row_len)?;
        copies.push(Piece { source: new.tensor_at(rows.start * row_len, target.shape())?, target });
        Ok(rest)
    };
    let ([keys, values], [to_k, to_v]) = (parts, to);
    Ok([one(keys, to_k, config.head_dim_qk())?, one(values, to_v, config.head_dim_v())?])
}

/// Lays out the window branch's rows: what the first new query of each sequence reaches back to, then the new ones.
fn gather_reach<T: Activation>(
    pass: &Pass<'_, T>,
    ws: &mut Workspace<T>,
    runs: &mut [Run<'_, T>],
    layer: usize,
) -> Result<CuSeqlens> {
    let (config, backend) = (&pass.model.attention, &pass.model.backend);
    let (keys, values) = (config.num_kv_heads() * config.head_dim_qk(), config.num_kv_heads() * config.head_dim_v());
    let back = |context: usize| context - (config.window() - 1).min(context);
    let offsets = CuSeqlens::from_lengths(pass.packing.seqs().map(|seq| seq.end() - back(seq.context)))?;
    fit(backend, &mut ws.reach_k, offsets.total() * keys)?;
    fit(backend, &mut ws.reach_v, offsets.total() * values)?;
    let Workspace { k_win, v_win, reach_k, reach_v, .. } = ws;
    let (mut copies, mut to) = (Vec::new(), [whole(reach_k)?, whole(reach_v)?]);
    for (run, seq) in runs.iter_mut().zip(pass.packing.seqs()) {
        let cache = &*nsa_cache(run, layer);
        let parts = [(&cache.k_win, &*k_win), (&cache.v_win, &*v_win)];
        to = gather(pass, parts, (back(seq.context)..seq.context, seq.rows), to, &mut copies)?;
    }
    copy::all(backend, copies)?;
    Ok(offsets)
}

/// The operator on chunks of any size.
fn chunk<T: Activation>(
    pass: &Pass<'_, T>,
    ws: &mut Workspace<T>,
    runs: &mut [Run<'_, T>],
    layer: usize,
    reach: &CuSeqlens,
) -> Result<()> {
    let (config, n) = (&pass.model.attention, pass.rows());
    let (kv_heads, dim_k, dim_v) = (config.num_kv_heads(), config.head_dim_qk(), config.head_dim_v());
    let caches: Vec<&NsaCache<T>> = runs.iter_mut().map(|run| &*nsa_cache(run, layer)).collect();
    let tables = |pages: fn(&NsaCache<T>) -> &Paged<T>| -> Vec<Pages<'_, T>> {
        caches.iter().map(|cache| pages(cache).table()).collect()
    };
    let (k_blocks, v_blocks) = (tables(|cache| &cache.k_blocks), tables(|cache| &cache.v_blocks));
    let (k_slc, v_slc) = (tables(|cache| &cache.k_slc), tables(|cache| &cache.v_slc));
    let k_win = Rows::packed(ws.reach_k.tensor([reach.total(), kv_heads, dim_k])?, reach);
    let v_win = Rows::packed(ws.reach_v.tensor([reach.total(), kv_heads, dim_v])?, reach);
    let ([queries, gates, outputs, lists], sums) = (shapes(pass), [n, config.num_heads()]);
    let args = op::nsa::Forward {
        config,
        packing: &pass.packing,
        q: ws.q.tensor(queries)?,
        k: [Rows::Paged(&k_blocks), Rows::Paged(&k_slc), k_win],
        v: [Rows::Paged(&v_blocks), Rows::Paged(&v_slc), v_win],
        gates: ws.gates.tensor(gates)?,
        selection: op::nsa::Selection::Compute(ws.indices.tensor_mut(lists)?),
        saved: op::nsa::Saved {
            o: [ws.o_cmp.tensor_mut(outputs)?, ws.o_slc.tensor_mut(outputs)?, ws.o_win.tensor_mut(outputs)?],
            lse: [ws.lse_cmp.tensor_mut(sums)?, ws.lse_slc.tensor_mut(sums)?, ws.lse_win.tensor_mut(sums)?],
        },
        o: ws.o.tensor_mut(outputs)?,
    };
    Ok(op::nsa::forward(&pass.model.backend, args)?)
}

/// The caches, as a decoding step takes them.
fn step_caches<'a, T: Activation>(
    pass: &Pass<'_, T>,
    runs: &'a mut [Run<'_, T>],
    layer: usize,
) -> Result<Vec<op::decode::Cache<'a, T>>> {
    let mut caches = Vec::with_capacity(runs.len());
    for (run, seq) in runs.iter_mut().zip(pass.packing.seqs()) {
        let cache = &*nsa_cache(run, layer);
        caches.push(op::decode::Cache {
            context: seq.end(),
            k_cmp: cache.k_blocks.table(),
            v_cmp: cache.v_blocks.table(),
            k_slc: cache.k_slc.table(),
            v_slc: cache.v_slc.table(),
            k_win: cache.k_win.tensor()?,
            v_win: cache.v_win.tensor()?,
        });
    }
    Ok(caches)
}

/// The operator's decoding step.
fn step<T: Activation>(
    pass: &Pass<'_, T>,
    ws: &mut Workspace<T>,
    runs: &mut [Run<'_, T>],
    layer: usize,
) -> Result<Vec<usize>> {
    let config = &pass.model.attention;
    let caches = step_caches(pass, runs, layer)?;
    let [queries, gates, outputs, lists] = shapes(pass);
    let args = op::decode::Step {
        config,
        caches: &caches,
        q: ws.q.tensor(queries)?,
        gates: ws.gates.tensor(gates)?,
        o: ws.o.tensor_mut(outputs)?,
        block_indices: ws.indices.tensor_mut(lists)?,
    };
    Ok(op::decode::step_with(&pass.model.backend, &mut ws.decode, layer, args)?)
}

/// The same on caches that were placed.
fn launch<T: Activation>(
    pass: &Pass<'_, T>,
    ws: &mut Workspace<T>,
    decode: &mut op::decode::Workspace<T>,
    layer: usize,
) -> Result<()> {
    let [queries, gates, outputs, lists] = shapes(pass);
    let (q, gates) = (ws.q.tensor(queries)?, ws.gates.tensor(gates)?);
    Ok(decode.launch(layer, q, gates, ws.o.tensor_mut(outputs)?, ws.indices.tensor_mut(lists)?)?)
}

/// Shapes of queries, gates, outputs and lists of blocks.
fn shapes<T: Activation>(pass: &Pass<'_, T>) -> [[usize; 3]; 4] {
    let (config, n) = (&pass.model.attention, pass.rows());
    let (heads, kv_heads) = (config.num_heads(), config.num_kv_heads());
    [
        [n, heads, config.head_dim_qk()],
        [n, heads, 3],
        [n, heads, config.head_dim_v()],
        [n, kv_heads, config.select_count()],
    ]
}

pub(super) fn nsa_cache<'a, T: Activation>(run: &'a mut Run<'_, T>, layer: usize) -> &'a mut NsaCache<T> {
    match &mut run.cache.layers[layer] {
        LayerCache::Nsa(cache) => cache,
        LayerCache::Dense(_) => unreachable!("caches are made for the model's kind of attention"),
    }
}

fn dense_cache<'a, T: Activation>(run: &'a mut Run<'_, T>, layer: usize) -> &'a mut DenseCache<T> {
    match &mut run.cache.layers[layer] {
        LayerCache::Dense(cache) => cache,
        LayerCache::Nsa(_) => unreachable!("caches are made for the model's kind of attention"),
    }
}
