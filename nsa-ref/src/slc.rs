//! Attention over the selected blocks (SPEC 2.2).

use crate::branch::{self, Gradients, Inputs, Output, Query, Upstream};
use crate::select::BlockIndices;
use crate::{Arithmetic, Result};
use nsa_core::{CuSeqlens, NsaConfig, Packing};

fn pattern<'a>(
    config: &'a NsaConfig,
    cu_keys: &'a CuSeqlens,
    indices: &'a BlockIndices,
) -> impl Fn(&Query<'_>) -> Vec<usize> + 'a {
    move |query| {
        let (start, t, size) = (cu_keys.range(query.s).start, query.t(), config.select_block());
        let tokens = indices.blocks(query.row, query.g).flat_map(|j| j * size..(j + 1) * size);
        tokens.filter(|&s| s <= t).map(|s| start + s).collect()
    }
}

fn check(config: &NsaConfig, packing: &Packing, inputs: &Inputs<'_>, indices: &BlockIndices) -> Result<CuSeqlens> {
    let cu_keys = packing.cu_keys()?;
    branch::check("slc", config, packing, inputs, cu_keys.total())?;
    indices.check("slc", config, packing)?;
    Ok(cu_keys)
}

/// Softmax attention of q_t over the tokens s ≤ t of its selected blocks.
///
/// **Shapes**: [`Inputs`] with one row of keys per token, contexts included; block lists `[N, G, n]`.
///
/// **Source**: paper equations 11 and 12; SPEC 2.2.
///
/// # Errors
/// If a shape does not fit, or a block list is not strictly ascending candidates (0..=⌊t/l'⌋) followed by −1.
pub fn forward<A: Arithmetic>(
    a: &A,
    config: &NsaConfig,
    packing: &Packing,
    inputs: &Inputs<'_>,
    indices: &BlockIndices,
) -> Result<Output> {
    let cu_keys = check(config, packing, inputs, indices)?;
    Ok(branch::forward(a, config, packing, inputs, pattern(config, &cu_keys, indices), |_, _| ()))
}

/// Gradients of [`forward`] (SPEC 3).
///
/// # Errors
/// As [`forward`].
pub fn backward<A: Arithmetic>(
    a: &A,
    config: &NsaConfig,
    packing: &Packing,
    inputs: &Inputs<'_>,
    indices: &BlockIndices,
    upstream: &Upstream<'_>,
) -> Result<Gradients> {
    let cu_keys = check(config, packing, inputs, indices)?;
    branch::check_upstream("slc", config, packing, upstream)?;
    Ok(branch::backward(a, config, packing, inputs, upstream, pattern(config, &cu_keys, indices)))
}
