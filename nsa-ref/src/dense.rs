//! Full causal attention: the baseline.

use crate::branch::{self, Gradients, Inputs, Output, Query, Upstream};
use crate::{Arithmetic, Result};
use nsa_core::{CuSeqlens, NsaConfig, Packing};

fn pattern(cu_keys: &CuSeqlens) -> impl Fn(&Query<'_>) -> Vec<usize> + '_ {
    move |query| {
        let start = cu_keys.range(query.s).start;
        (start..=start + query.t()).collect()
    }
}

/// o_t = Σ_{s ≤ t} softmax_s(scale · q_t·k_s)·v_s.
///
/// **Shapes**: [`Inputs`] with one row of keys per token, contexts included.
///
/// **Source**: paper equation 1; SPEC 1.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<A: Arithmetic>(a: &A, config: &NsaConfig, packing: &Packing, inputs: &Inputs<'_>) -> Result<Output> {
    let cu_keys = packing.cu_keys()?;
    branch::check("dense", config, packing, inputs, cu_keys.total())?;
    Ok(branch::forward(a, config, packing, inputs, pattern(&cu_keys), |_, _| ()))
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
    branch::check("dense", config, packing, inputs, cu_keys.total())?;
    branch::check_upstream("dense", config, packing, upstream)?;
    Ok(branch::backward(a, config, packing, inputs, upstream, pattern(&cu_keys)))
}
