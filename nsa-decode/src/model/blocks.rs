//! The compression blocks that the new tokens of a pass complete: gathered, compressed, appended.

use super::attention::{gather, nsa_cache, rotate, whole};
use super::forward::{Pass, Run};
use super::layers::{Compress, NsaWeights, norm};
use super::net::Activation;
use super::workspace::{Workspace, fit};
use crate::Result;
use crate::cache::NsaCache;
use nsa_core::{CuSeqlens, NsaConfig, Packing, index};
use nsa_kernels::layer::copy::Piece;
use nsa_kernels::{Buffer, op};
use std::ops::Range;

/// Which blocks these are.
#[derive(Debug)]
pub(super) struct NewBlocks {
    /// What they are of, in order.
    owners: Vec<Owner>,
    /// Raw tokens of each owner.
    tails: Packing,
    /// Positions of the blocks' first tokens.
    positions: Vec<i32>,
}

/// A sequence that has new blocks.
#[derive(Debug)]
struct Owner {
    sequence: usize,
    /// First token of the first new block: all from there on are raw tokens of new blocks.
    start: usize,
    /// Its rows among all new blocks.
    rows: Range<usize>,
}

impl NewBlocks {
    pub(super) fn of(config: &NsaConfig, packing: &Packing) -> Result<Self> {
        let (mut owners, mut lengths, mut positions) = (Vec::new(), Vec::new(), Vec::<i32>::new());
        for (sequence, seq) in packing.seqs().enumerate() {
            let (before, after) = (index::num_blocks(config, seq.context), index::num_blocks(config, seq.end()));
            if before < after {
                let start = before * config.compress_stride();
                owners.push(Owner { sequence, start, rows: positions.len()..positions.len() + after - before });
                lengths.push(seq.end() - start);
                positions.extend((before..after).map(|i| (i * config.compress_stride()) as i32));
            }
        }
        Ok(Self { owners, tails: Packing::new(CuSeqlens::from_lengths(lengths)?), positions })
    }

    /// Sequences that have new blocks.
    pub(super) fn owners(&self) -> usize {
        self.owners.len()
    }
}

/// Makes room for the blocks, and writes their positions.
pub(super) fn prepare<T: Activation>(pass: &Pass<'_, T>, new: &NewBlocks, ws: &mut Workspace<T>) -> Result<()> {
    let (config, backend) = (&pass.model.attention, &pass.model.backend);
    let (kv_heads, dim_k, dim_v) = (config.num_kv_heads(), config.head_dim_qk(), config.head_dim_v());
    let (rows, blocks) = (new.tails.num_tokens(), new.positions.len());
    fit(backend, &mut ws.tail_k, rows * kv_heads * dim_k)?;
    fit(backend, &mut ws.tail_v, rows * kv_heads * dim_v)?;
    fit(backend, &mut ws.raw_blocks, blocks * kv_heads * dim_k)?;
    fit(backend, &mut ws.k_blocks, blocks * kv_heads * dim_k)?;
    fit(backend, &mut ws.v_blocks, blocks * kv_heads * dim_v)?;
    fit(backend, &mut ws.block_positions, blocks)?;
    Ok(ws.block_positions.write(&new.positions)?)
}

/// Gathers the raw tokens of new blocks: those of the ring, from the first incomplete block's start on, and the new ones.
pub(super) fn tails<'a, T: Activation>(
    pass: &Pass<'_, T>,
    new: &NewBlocks,
    ws: &'a mut Workspace<T>,
    runs: &'a mut [Run<'_, T>],
    layer: usize,
) -> Result<Vec<Piece<'a, T>>> {
    let Workspace { k_cmp, v_cmp, tail_k, tail_v, .. } = ws;
    let mut to = [whole(tail_k)?, whole(tail_v)?];
    let (mut copies, mut owners) = (Vec::new(), new.owners.iter().peekable());
    for (s, run) in runs.iter_mut().enumerate() {
        let Some(Owner { start, .. }) = owners.next_if(|owner| owner.sequence == s) else { continue };
        let (cache, seq) = (&*nsa_cache(run, layer), pass.packing.seq(s));
        let parts = [(&cache.k_cmp, &*k_cmp), (&cache.v_cmp, &*v_cmp)];
        to = gather(pass, parts, (*start..seq.context, seq.rows), to, &mut copies)?;
    }
    Ok(copies)
}

/// Appends the new blocks to their pages.
pub(super) fn new_rows<'a, T: Activation>(
    pass: &Pass<'_, T>,
    new: &NewBlocks,
    ws: &'a Workspace<T>,
    runs: &'a mut [Run<'_, T>],
    layer: usize,
) -> Result<Vec<Piece<'a, T>>> {
    let backend = &pass.model.backend;
    let (mut copies, mut owners) = (Vec::new(), new.owners.iter().peekable());
    for (s, run) in runs.iter_mut().enumerate() {
        let Some(Owner { rows, .. }) = owners.next_if(|owner| owner.sequence == s) else { continue };
        let NsaCache { k_blocks, v_blocks, .. } = nsa_cache(run, layer);
        k_blocks.push(backend, &ws.k_blocks, rows.clone(), &mut copies)?;
        v_blocks.push(backend, &ws.v_blocks, rows.clone(), &mut copies)?;
    }
    Ok(copies)
}

/// φ, norm and rotation of the new blocks.
pub(super) fn compress<T: Activation>(
    pass: &Pass<'_, T>,
    new: &NewBlocks,
    ws: &mut Workspace<T>,
    weights: &NsaWeights<T>,
) -> Result<()> {
    let config = &pass.model.attention;
    let (kv_heads, blocks) = (config.num_kv_heads(), new.positions.len());
    let normed = weights.k_norm.as_ref().map(|norms| &norms[0]);
    let k_target = if normed.is_some() { &mut ws.raw_blocks } else { &mut ws.k_blocks };
    phi(pass, &new.tails, &weights.compress_k, &ws.tail_k, k_target, config.head_dim_qk())?;
    phi(pass, &new.tails, &weights.compress_v, &ws.tail_v, &mut ws.v_blocks, config.head_dim_v())?;
    if let Some(weight) = normed {
        norm(&pass.model.backend, &ws.raw_blocks, weight, pass.eps(), blocks * kv_heads, &mut ws.k_blocks)?;
    }
    rotate(pass, &ws.block_positions, blocks, [(&mut ws.k_blocks, kv_heads)])
}

/// φ of the sequences of `packing`.
fn phi<T: Activation>(
    pass: &Pass<'_, T>,
    packing: &Packing,
    weights: &Compress<T>,
    x: &Buffer<T>,
    blocks: &mut Buffer<T>,
    dim: usize,
) -> Result<()> {
    let config = &pass.model.attention;
    let (kv_heads, count) = (config.num_kv_heads(), packing.cu_blocks(config)?.total());
    let args = op::compress::Forward {
        config,
        packing,
        x: x.tensor([packing.num_tokens(), kv_heads, dim])?,
        position: weights.position()?,
        phi: weights.phi()?,
        blocks: blocks.tensor_mut([count, kv_heads, dim])?,
    };
    Ok(op::compress::forward(&pass.model.backend, args)?)
}
