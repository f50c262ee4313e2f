//! φ: compression blocks of keys or values.
//!
//! `sum` has the kinds that weigh tokens (mean, weighted), `matrix` those that multiply flattened blocks (linear, mlp).

mod matrix;
mod sum;

use super::Cuda;
use super::ahead::Build;
use crate::op::compress::{Backward, Forward, Phi};
use crate::{Element, Result};
use nsa_core::{DType, NsaConfig, Packing, index};

/// What φ of every kind runs.
pub(crate) fn builds(config: &NsaConfig, dtype: DType) -> Vec<Build> {
    vec![sum::build(config, dtype), matrix::build(config, dtype)]
}

/// The first row of each block of each sequence.
fn starts(config: &NsaConfig, packing: &Packing) -> impl Iterator<Item = impl Iterator<Item = i32>> {
    packing.seqs().map(move |seq| {
        let blocks = 0..index::num_blocks(config, seq.rows.len());
        // Rows of a packing fit.
        blocks.map(move |i| (seq.rows.start + i * config.compress_stride()) as i32)
    })
}

pub(crate) fn forward<T: Element>(cuda: &Cuda, op: &'static str, args: Forward<'_, T>) -> Result<()> {
    match args.phi {
        Phi::Mean => sum::forward(cuda, op, args, None),
        Phi::Weighted { weight } => sum::forward(cuda, op, args, Some(&weight)),
        Phi::Linear { .. } | Phi::Mlp { .. } => matrix::forward(cuda, op, args),
    }
}

pub(crate) fn backward<T: Element>(cuda: &Cuda, op: &'static str, args: Backward<'_, T>) -> Result<()> {
    match args.phi {
        Phi::Mean => sum::backward(cuda, op, args, None),
        Phi::Weighted { weight } => sum::backward(cuda, op, args, Some(&weight)),
        Phi::Linear { .. } | Phi::Mlp { .. } => matrix::backward(cuda, op, args),
    }
}
