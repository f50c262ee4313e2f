//! The case table: configurations and sequence lengths where kernels break.

use nsa_core::{CompressKind, CuSeqlens, NsaConfig, NsaConfigBuilder, Packing};

/// A configuration with sequences to run it on.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name: printed in failures, and the seed of its inputs.
    pub name: String,
    /// Heads, dims, block sizes, φ.
    pub config: NsaConfig,
    /// Tokens of each sequence.
    pub lengths: Vec<usize>,
    /// Factor on the queries: how far the softmax is from uniform.
    pub sharpness: f64,
}

impl Case {
    /// A case with ordinary queries.
    ///
    /// # Panics
    /// If the configuration is not valid: a mistake in a test.
    pub fn new(name: impl Into<String>, config: NsaConfigBuilder, lengths: impl Into<Vec<usize>>) -> Self {
        let name = name.into();
        let config = config.build().unwrap_or_else(|e| panic!("case {name}: {e}"));
        Self { name, config, lengths: lengths.into(), sharpness: 1.0 }
    }

    /// Its sequences, each from position 0.
    pub fn packing(&self) -> Packing {
        Packing::new(CuSeqlens::from_lengths(self.lengths.iter().copied()).expect("cases are short"))
    }

    /// N: tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// M: compression blocks of all sequences.
    pub fn blocks(&self) -> usize {
        self.packing().cu_blocks(&self.config).expect("cases are short").total()
    }
}

/// Heads and dims of the table's small cases; block sizes 8/4/16, n = 4, w = 32.
fn small(num_heads: usize, num_kv_heads: usize, head_dim_qk: usize, head_dim_v: usize) -> NsaConfigBuilder {
    sizes(NsaConfig::builder(num_heads, num_kv_heads, head_dim_qk, head_dim_v), [8, 4, 16], 4, 32)
        .compress_kind(CompressKind::Mean)
}

/// Sets l, d, l', then n and w.
fn sizes(builder: NsaConfigBuilder, [l, d, p]: [usize; 3], count: usize, window: usize) -> NsaConfigBuilder {
    builder.compress_block(l).compress_stride(d).select_block(p).select_count(count).window(window)
}

fn mlp(builder: NsaConfigBuilder, hidden: usize) -> NsaConfigBuilder {
    builder.compress_kind(CompressKind::Mlp).compress_hidden(hidden)
}

/// Every case. Dims are small where sequences are long: the reference is plain loops.
pub fn cases() -> Vec<Case> {
    [lengths(), groups_and_dims(), block_sizes()].concat()
}

/// The case of that name.
pub fn find(name: &str) -> Option<Case> {
    cases().into_iter().find(|case| case.name == name)
}

/// Few tokens, no tokens, ragged batches.
fn lengths() -> Vec<Case> {
    vec![
        Case::new("no-sequence", small(4, 2, 16, 12), []),
        Case::new("empty", small(4, 2, 16, 12), [0]),
        Case::new("one-token", mlp(small(4, 2, 16, 12), 10), [1]),
        Case::new("below-block", mlp(small(4, 2, 16, 12), 10), [7]),
        Case::new("one-block", mlp(small(4, 2, 16, 12), 10), [8]),
        Case::new("ragged", small(6, 3, 10, 14).compress_kind(CompressKind::Linear), [0, 5, 37, 0, 64, 1, 90, 0]),
        Case::new("1025", sizes(mlp(small(4, 2, 8, 6), 10), [32, 16, 64], 6, 100), [1025]),
    ]
}

/// R ∈ {1, 2, 4, 5, 7, 16}, Dk ≠ Dv, dims with fast paths and without.
fn groups_and_dims() -> Vec<Case> {
    let weighted = CompressKind::Weighted;
    vec![
        Case::new("63-group-1", small(3, 3, 16, 8).compress_kind(weighted), [63]),
        Case::new("111-group-7", small(14, 2, 24, 16).compress_kind(CompressKind::Linear), [111]),
        Case::new("group-16", sizes(small(16, 1, 8, 8), [4, 4, 4], 6, 20).compress_kind(weighted), [111, 40]),
        Case::new("odd-sizes", sizes(mlp(small(15, 3, 5, 3), 7), [6, 3, 9], 3, 7), [50, 29]),
        Case::new("dims-64", small(4, 1, 64, 64), [111]),
        Case::new("dims-96", small(2, 2, 96, 96), [70]),
        Case::new("dims-128", small(4, 2, 128, 128).compress_kind(weighted), [70]),
        Case::new("dims-192-128", mlp(small(4, 2, 192, 128), 24), [63]),
        Case::new("dims-256", small(2, 1, 256, 256), [63]),
        Case::new("dims-256-64", small(4, 1, 256, 64), [63]),
        Case::new("dims-384", small(2, 1, 384, 384), [63]),
        Case::new("dims-576-512", small(16, 1, 576, 512), [63]),
        Case::new("given-scale", small(4, 2, 20, 20).scale(0.37), [63]),
        Case { sharpness: 12.0, ..Case::new("sharp", small(4, 2, 16, 12), [111]) },
    ]
}

/// l/d ∈ {1, 2, 4}, l = l', every block selected, no free place, every token in the window, blocks of one token; many more
/// blocks than a query selects, for small groups; blocks that dims as large as a model's divide into several steps of a kernel.
fn block_sizes() -> Vec<Case> {
    let kv1 = |l: [usize; 3], count, window| sizes(small(4, 1, 12, 16), l, count, window);
    let kv2 = |l: [usize; 3], count, window| sizes(small(4, 2, 16, 12), l, count, window);
    vec![
        Case::new("stride-quarter", kv2([16, 4, 16], 4, 24).compress_kind(CompressKind::Linear), [111]),
        Case::new("stride-eighth", kv1([16, 2, 32], 3, 24).compress_kind(CompressKind::Weighted), [90]),
        Case::new("stride-whole", kv2([8, 8, 32], 3, 24).compress_kind(CompressKind::Weighted), [111]),
        Case::new("block-is-select-block", kv2([16, 8, 16], 4, 24), [130]),
        Case::new("blocks-of-one", kv2([1, 1, 1], 9, 1), [63]),
        Case::new("no-free-place", kv2([8, 4, 16], 3, 24), [111]).with(|b| b.select_initial(0).select_local(3)),
        Case::new("no-initial", kv2([8, 4, 16], 4, 24), [130]).with(|b| b.select_initial(0).select_local(1)),
        Case::new("all-blocks", kv2([8, 4, 16], 64, 24), [111, 17]),
        Case::new("all-window", kv1([8, 4, 16], 4, 4096), [111, 17]),
        Case::new("far-group-1", sizes(small(2, 2, 16, 12), [8, 4, 16], 3, 24), [165, 20]),
        Case::new("far-group-2", sizes(small(4, 2, 20, 24), [4, 2, 4], 3, 24), [165]),
        Case::new("far-group-4", sizes(small(4, 1, 16, 12), [4, 4, 4], 3, 24), [245, 0, 33]),
        Case::new("blocks-of-many-steps", sizes(small(8, 1, 128, 128), [32, 16, 64], 3, 24), [140, 33]),
        Case::new("paper-blocks", sizes(small(2, 1, 8, 10), [32, 16, 64], 16, 512), [1300]),
    ]
}

impl Case {
    fn with(self, change: impl FnOnce(NsaConfigBuilder) -> NsaConfigBuilder) -> Self {
        let Self { name, config, lengths, sharpness } = self;
        Self { sharpness, ..Self::new(name, change(config.to_builder()), lengths) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_distinct_and_every_phi_and_group_size_occurs() {
        let cases = cases();
        let names: HashSet<_> = cases.iter().map(|case| &case.name).collect();
        assert_eq!(names.len(), cases.len());
        for kind in [CompressKind::Mean, CompressKind::Weighted, CompressKind::Linear, CompressKind::Mlp] {
            assert!(cases.iter().any(|case| case.config.compress_kind() == kind && case.tokens() > 60), "{kind:?}");
        }
        for group in [1, 2, 4, 7, 16] {
            assert!(cases.iter().any(|case| case.config.group_size() == group), "R = {group}");
        }
        for span in [1, 2, 4] {
            let found = |case: &Case| case.config.compress_block() == span * case.config.compress_stride();
            assert!(cases.iter().any(found), "l/d = {span}");
        }
    }
}
