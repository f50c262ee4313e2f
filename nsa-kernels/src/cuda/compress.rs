//! φ: compression blocks of keys or values.
//!
//! `sum` has the kinds that weigh tokens (mean, weighted), `matrix` those that multiply flattened blocks (linear, mlp).

mod chunks;
mod matrix;
mod sum;

use super::Cuda;
use super::ahead::Build;
use super::workspace::{Needs, PhiParts, Places};
use crate::op::compress::{Backward, Forward, Phi};
use crate::{Element, Result};
use nsa_core::{CompressKind, DType, NsaConfig};

/// What [`forward`] takes of a workspace.
pub(super) fn forward_places(needs: &Needs<'_>, dim: usize, given: PhiParts) -> Places {
    match needs.config.compress_kind() {
        CompressKind::Mean | CompressKind::Weighted => sum::forward_places(needs, dim),
        CompressKind::Linear | CompressKind::Mlp => matrix::forward_places(needs, dim, given),
    }
}

/// What [`backward`] takes of a workspace.
pub(super) fn backward_places(needs: &Needs<'_>, dim: usize, given: PhiParts) -> Places {
    match needs.config.compress_kind() {
        CompressKind::Mean | CompressKind::Weighted => sum::backward_places(needs, dim, given),
        CompressKind::Linear | CompressKind::Mlp => matrix::backward_places(needs, dim, given),
    }
}

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
