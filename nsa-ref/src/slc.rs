//! Attention over the selected blocks (SPEC 2.2).

use crate::branch::{self, Gradients, Inputs, Output, Query, Upstream};
use crate::select::BlockIndices;
use crate::{Arithmetic, Result};
use nsa_core::{CuSeqlens, NsaConfig, Packing, ShapeError};

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
    let expected = [packing.num_tokens(), config.num_kv_heads(), config.select_count()];
    ShapeError::check("slc", "block_indices", &expected, &indices.shape)?;
    Ok(cu_keys)
}

/// Softmax attention of q_t over the tokens s ≤ t of its selected blocks.
///
/// **Shapes**: [`Inputs`] with one row of keys per token, contexts included; block lists `[N, G, n]`.
///
/// **Source**: paper equations 11 and 12; SPEC 2.2.
///
/// # Errors
/// If a shape does not fit.
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
/// If a shape does not fit.
pub fn backward<A: Arithmetic>(
    a: &A,
    config: &NsaConfig,
    packing: &Packing,
    inputs: &Inputs<'_>,
    indices: &BlockIndices,
    upstream: &Upstream<'_>,
) -> Result<Gradients> {
    let cu_keys = check(config, packing, inputs, indices)?;
    Ok(branch::backward(a, config, packing, inputs, upstream, pattern(config, &cu_keys, indices)))
}
