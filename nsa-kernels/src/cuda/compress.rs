//! φ: compression blocks of keys or values.
//!
//! `sum` has the kinds that weigh tokens (mean, weighted), `matrix` those that multiply flattened blocks (linear, mlp).

mod chunks;
mod matrix;
mod sum;

use super::Cuda;
use super::ahead::Build;
use crate::op::compress::{Backward, Forward, Phi};
use crate::{Element, Result};
use nsa_core::{DType, NsaConfig};

/// What φ of every kind runs.
pub(crate) fn builds(config: &NsaConfig, dtype: DType) -> Vec<Build> {
    vec![sum::build(config, dtype), matrix::build(config, dtype)]
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
