//! The heads that attention is measured with.

use anyhow::{Context, Result};
use clap::Args;
use nsa_core::{CompressKind, NsaConfig, NsaConfigBuilder};

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
        self.build(|builder| builder)
    }

    /// The same with blocks that are compressed as long as those that are selected, without overlap.
    ///
    /// # Errors
    /// If they do not fit together.
    pub fn config_without_overlap(&self) -> Result<NsaConfig> {
        let block = self.config()?.select_block();
        self.build(|builder| builder.compress_block(block).compress_stride(block))
    }

    fn build(&self, change: impl FnOnce(NsaConfigBuilder) -> NsaConfigBuilder) -> Result<NsaConfig> {
        let Self { heads, kv_heads, dim_qk, dim_v } = *self;
        change(NsaConfig::builder(heads, kv_heads, dim_qk, dim_v).compress_kind(CompressKind::Mean))
            .build()
            .with_context(|| format!("--heads {heads} --kv-heads {kv_heads} --dim-qk {dim_qk} --dim-v {dim_v}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_overlap_compressed_blocks_are_those_that_are_selected() {
        let [paper, whole] =
            [Heads::config, Heads::config_without_overlap].map(|of| of(&Heads::default()).expect("legal"));
        assert_eq!((paper.compress_block(), paper.compress_stride(), paper.select_block()), (32, 16, 64));
        assert_eq!((whole.compress_block(), whole.compress_stride(), whole.select_block()), (64, 64, 64));
    }
}
