//! The heads that attention is measured with.

use anyhow::{Context, Result};
use clap::Args;
use nsa_core::{CompressKind, NsaConfig};

/// Options of the commands that measure attention alone.
#[derive(Args, Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads
    #[arg(long, default_value_t = 16, allow_negative_numbers = true)]
    heads: usize,
    /// KV heads
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    kv_heads: usize,
    /// Head dimension of queries and keys
    #[arg(long, default_value_t = 128, allow_negative_numbers = true)]
    dim_qk: usize,
    /// Head dimension of values
    #[arg(long, default_value_t = 128, allow_negative_numbers = true)]
    dim_v: usize,
}

impl Default for Heads {
    fn default() -> Self {
        Self { heads: 16, kv_heads: 1, dim_qk: 128, dim_v: 128 }
    }
}

impl Heads {
    /// With the paper's block sizes and the mean as φ.
    ///
    /// # Errors
    /// If they do not fit together.
    pub fn config(&self) -> Result<NsaConfig> {
        let Self { heads, kv_heads, dim_qk, dim_v } = *self;
        NsaConfig::builder(heads, kv_heads, dim_qk, dim_v)
            .compress_kind(CompressKind::Mean)
            .build()
            .with_context(|| format!("--heads {heads} --kv-heads {kv_heads} --dim-qk {dim_qk} --dim-v {dim_v}"))
    }
}
