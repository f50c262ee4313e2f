//! Compressed attention, importance and selection (SPEC 2.1, 2.2).

use crate::branch::{self, Gradients, Inputs, Output, Query, Upstream};
use crate::select::{self, BlockIndices};
use crate::{Arithmetic, Result};
use nsa_core::{CuSeqlens, NsaConfig, Packing};

/// What compressed attention yields.
#[derive(Clone, Debug, PartialEq)]
pub struct Selected {
    /// The branch's output.
    pub output: Output,
    /// The blocks chosen.
    pub block_indices: BlockIndices,
    /// S of every candidate, one list a query and group (row-major `[N, G]`).
    pub scores: Vec<Vec<f64>>,
}

fn pattern<'a>(config: &'a NsaConfig, cu_blocks: &'a CuSeqlens) -> impl Fn(&Query<'_>) -> Vec<usize> + 'a {
    move |query| {
        // Query t sees block i iff i·d + l − 1 ≤ t.
        let sees = |i: usize| i * config.compress_stride() + config.compress_block() - 1 <= query.t();
        let range = cu_blocks.range(query.s);
        (0..range.len()).filter(|&i| sees(i)).map(|i| range.start + i).collect()
    }
}

/// Softmax attention of q_t over the visible (k̃, ṽ), with P_g,i = Σ_{h in g} p_h,i, its scores S and the blocks chosen.
///
/// **Shapes**: [`Inputs`] with k̃ `[M, G, Dk]` and ṽ `[M, G, Dv]`, packed per sequence.
///
/// **Source**: paper equations 8 to 10; SPEC 2.1, 2.2.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<A: Arithmetic>(a: &A, config: &NsaConfig, packing: &Packing, inputs: &Inputs<'_>) -> Result<Selected> {
    let cu_blocks = packing.cu_blocks(config)?;
    branch::check("cmp", config, packing, inputs, cu_blocks.total())?;
    let (n, groups) = (packing.num_tokens(), config.num_kv_heads());
    let mut importance = vec![Vec::new(); n * groups];
    let mut positions = vec![0; n];
    let see = |query: &Query<'_>, probabilities: &[f64]| {
        positions[query.row] = query.t();
        let sum: &mut Vec<f64> = &mut importance[query.row * groups + query.g];
        sum.resize(probabilities.len(), 0.0);
        a.add_scaled(sum, 1.0, probabilities);
    };
    let output = branch::forward(a, config, packing, inputs, pattern(config, &cu_blocks), see);
    let scores: Vec<Vec<f64>> =
        importance.iter().enumerate().map(|(i, p)| select::scores(a, config, positions[i / groups], p)).collect();
    let data = scores.iter().flat_map(|scores| select::choose(config, scores)).collect();
    let block_indices = BlockIndices { shape: [n, groups, config.select_count()], data };
    Ok(Selected { output, block_indices, scores })
}

/// Gradients of the attention (SPEC 3); selection passes none.
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
    let cu_blocks = packing.cu_blocks(config)?;
    branch::check("cmp", config, packing, inputs, cu_blocks.total())?;
    branch::check_upstream("cmp", config, packing, upstream)?;
    Ok(branch::backward(a, config, packing, inputs, upstream, pattern(config, &cu_blocks)))
}
