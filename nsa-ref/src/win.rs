//! Sliding-window attention (SPEC 2.3).

use crate::branch::{self, Gradients, Inputs, Output, Query, Upstream};
use crate::{Arithmetic, Result};
use nsa_core::{CuSeqlens, NsaConfig, Packing};

fn pattern<'a>(config: &'a NsaConfig, cu_keys: &'a CuSeqlens) -> impl Fn(&Query<'_>) -> Vec<usize> + 'a {
    move |query| {
        let (start, t) = (cu_keys.range(query.s).start, query.t());
        // t − w < s ≤ t
        (0..=t).filter(|s| s + config.window() > t).map(|s| start + s).collect()
    }
}

/// Softmax attention of q_t over the tokens s with t − w < s ≤ t.
///
/// **Shapes**: [`Inputs`] with one row of keys per token, contexts included.
///
/// **Source**: SPEC 2.3.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<A: Arithmetic>(a: &A, config: &NsaConfig, packing: &Packing, inputs: &Inputs<'_>) -> Result<Output> {
    let cu_keys = packing.cu_keys()?;
    branch::check("win", config, packing, inputs, cu_keys.total())?;
    Ok(branch::forward(a, config, packing, inputs, pattern(config, &cu_keys), |_, _| ()))
}

/// Gradients of [`forward`] (SPEC 3).
///
/// # Errors
/// If a shape does not fit.
pub fn backward<A: Arithmetic>(
    a: &A,
    config: &NsaConfig,
    packing: &Packing,
    inputs: &Inputs<'_>,
    upstream: &Upstream<'_>,
) -> Result<Gradients> {
    let cu_keys = packing.cu_keys()?;
    branch::check("win", config, packing, inputs, cu_keys.total())?;
    branch::check_upstream("win", config, packing, upstream)?;
    Ok(branch::backward(a, config, packing, inputs, upstream, pattern(config, &cu_keys)))
}
