//! φ: compression blocks of keys or values.
//!
//! `sum` has the kinds that weigh tokens (mean, weighted), `matrix` those that multiply flattened blocks (linear, mlp).

mod matrix;
mod sum;

use crate::cpu::Cpu;
use crate::op::compress::{Backward, Forward, Phi, PhiGrad};
use crate::{Element, Result, Tensor};
use nsa_core::{NsaConfig, Packing, Real, View, index};
use std::ops::Range;

/// A run of compression blocks of one sequence, small enough for scratch memory. Pieces depend on the sequence alone,
/// and so do the bits of what is computed for them.
struct Piece {
    /// Packed row of the first block's first token.
    token: usize,
    /// Packed row of the first block.
    block: usize,
    /// Number of blocks.
    blocks: usize,
}

impl Piece {
    /// Packed rows of its blocks.
    fn rows(&self) -> Range<usize> {
        self.block..self.block + self.blocks
    }
}

/// All compression blocks in order, at most `limit` a piece.
fn pieces(config: &NsaConfig, packing: &Packing, limit: usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut block = 0;
    for seq in packing.seqs() {
        let blocks = index::num_blocks(config, seq.rows.len());
        for first in (0..blocks).step_by(limit) {
            let token = seq.rows.start + first * config.compress_stride();
            pieces.push(Piece { token, block: block + first, blocks: limit.min(blocks - first) });
        }
        block += blocks;
    }
    pieces
}

/// Σ_i of the rows of KV head `g`, with sums in f64.
fn sum_rows<A: Real>(rows: &View<'_, A, 3>, g: usize) -> Vec<f64> {
    let [count, _, dim] = rows.shape();
    let mut sums = vec![0.0; dim];
    for i in 0..count {
        for (sum, x) in sums.iter_mut().zip(rows.row(i, g)) {
            *sum += (*x).to_f64();
        }
    }
    sums
}

fn host<'a, T, const N: usize>(tensor: Option<Tensor<'a, T, N>>) -> Result<Option<View<'a, T, N>>> {
    tensor.map(|tensor| tensor.to_host()).transpose()
}

pub(crate) fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let (x, position) = (args.x.to_host()?, host(args.position)?);
    if x.shape().contains(&0) {
        return Ok(());
    }
    let call = sum::Call { config: args.config, packing: args.packing, x, position };
    let blocks = args.blocks.into_host()?.into_data();
    match args.phi {
        Phi::Mean => sum::forward(cpu, &call, &sum::mean(args.config), blocks),
        Phi::Weighted { weight } => sum::forward(cpu, &call, &sum::weighted(&weight.to_host()?), blocks),
        Phi::Linear { weight } => {
            let network = matrix::Network::linear(weight.to_host()?);
            matrix::forward(cpu, &call, &network, blocks);
        }
        Phi::Mlp { weight1, bias1, weight2, bias2 } => {
            let network = matrix::Network::mlp(weight1.to_host()?, host(bias1)?, weight2.to_host()?, host(bias2)?);
            matrix::forward(cpu, &call, &network, blocks);
        }
    }
    Ok(())
}

pub(crate) fn backward<T: Element>(cpu: &Cpu, args: Backward<'_, T>) -> Result<()> {
    let (x, position, d_blocks) = (args.x.to_host()?, host(args.position)?, args.d_blocks.to_host()?);
    if x.shape().contains(&0) {
        return Ok(());
    }
    let call = sum::Call { config: args.config, packing: args.packing, x, position };
    let dx = args.dx.into_host()?.into_data();
    let d_position = args.d_position.map(|d| d.into_host()).transpose()?;
    let d_position = d_position.map(|d| d.into_data());
    match (args.phi, args.d_phi) {
        (Phi::Weighted { weight }, PhiGrad::Weighted { weight: d_weight }) => {
            let d_weight = Some(d_weight.into_host()?.into_data());
            let grads = sum::Grads { dx, d_position, d_weight };
            sum::backward(&call, &sum::weighted(&weight.to_host()?), &d_blocks, grads);
        }
        (Phi::Linear { weight }, PhiGrad::Linear { weight: d_weight }) => {
            let network = matrix::Network::linear(weight.to_host()?);
            let d_network = matrix::NetworkGrad::linear(d_weight.into_host()?.into_data());
            matrix::backward(cpu, &call, &network, &d_blocks, matrix::Grads { dx, d_position, d_network });
        }
        (
            Phi::Mlp { weight1, bias1, weight2, bias2 },
            PhiGrad::Mlp { weight1: d_weight1, bias1: d_bias1, weight2: d_weight2, bias2: d_bias2 },
        ) => {
            let network = matrix::Network::mlp(weight1.to_host()?, host(bias1)?, weight2.to_host()?, host(bias2)?);
            let (d_bias1, d_bias2) =
                (d_bias1.map(|d| d.into_host()).transpose()?, d_bias2.map(|d| d.into_host()).transpose()?);
            let d_network = matrix::NetworkGrad {
                weight1: d_weight1.into_host()?.into_data(),
                bias1: d_bias1.map(|d| d.into_data()),
                second: Some((d_weight2.into_host()?.into_data(), d_bias2.map(|d| d.into_data()))),
            };
            matrix::backward(cpu, &call, &network, &d_blocks, matrix::Grads { dx, d_position, d_network });
        }
        // The kinds are the same, the face has checked.
        (_, _) => {
            sum::backward(&call, &sum::mean(args.config), &d_blocks, sum::Grads { dx, d_position, d_weight: None })
        }
    }
    Ok(())
}
