//! What must be done: pairs of query and key, FLOP, bytes. Rates and limits come from these.

use nsa_core::{NsaConfig, index};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pass {
    /// Attention of every token
    Forward,
    /// Its gradients
    Backward,
    /// One query after a context in a cache
    Decode,
}

impl Pass {
    /// All, in the order of the table.
    pub const ALL: [Self; 3] = [Self::Forward, Self::Backward, Self::Decode];

    /// As options and files name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Decode => "decode",
        }
    }
}

/// Pairs of query and key in one head: those that NSA touches, those of full causal attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pairs {
    /// Compressed, selected and window keys.
    pub nsa: u64,
    /// All keys up to the query's own.
    pub dense: u64,
}

impl Pairs {
    /// Of a pass over `tokens`.
    pub fn of(config: &NsaConfig, pass: Pass, tokens: usize) -> Self {
        if pass == Pass::Decode {
            return Self { nsa: index::decode_rows(config, tokens) as u64, dense: tokens as u64 };
        }
        let nsa = |t: usize| {
            let blocks = index::num_candidates(config, t).min(config.select_count());
            // The own block, always selected, ends at t; the others are whole.
            let selected = (blocks - 1) * config.select_block() + t % config.select_block() + 1;
            (index::visible_blocks(config, t) + selected + index::window_tokens(config, t).len()) as u64
        };
        let tokens = tokens as u64;
        Self { nsa: (0..tokens as usize).map(nsa).sum(), dense: tokens * (tokens + 1) / 2 }
    }

    /// How many times faster NSA is than full attention where both run at the same rate.
    pub fn limit(self) -> f64 {
        self.dense as f64 / self.nsa as f64
    }
}

/// FLOP of `pairs` in all heads: forward 2·Dk + 2·Dv each; backward five products, 6·Dk + 4·Dv.
pub fn flop(config: &NsaConfig, pass: Pass, pairs: u64) -> f64 {
    let (dim_qk, dim_v) = (config.head_dim_qk() as f64, config.head_dim_v() as f64);
    let each = if pass == Pass::Backward { 6.0 * dim_qk + 4.0 * dim_v } else { 2.0 * dim_qk + 2.0 * dim_v };
    pairs as f64 * config.num_heads() as f64 * each
}

/// Bytes of `rows` rows of keys and values: what a decoding step reads.
pub fn row_bytes(config: &NsaConfig, rows: u64, element_bytes: usize) -> f64 {
    let row = config.num_kv_heads() * (config.head_dim_qk() + config.head_dim_v()) * element_bytes;
    rows as f64 * row as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::CompressKind;

    fn config() -> NsaConfig {
        NsaConfig::builder(16, 1, 128, 128).compress_kind(CompressKind::Mean).build().expect("valid")
    }

    /// The specification's averages s/d + n·l' + w against s/2; short sequences have fewer keys at their start.
    #[test]
    fn limits_are_those_of_the_specification() {
        for (tokens, limit) in
            [(8192, 4096.0 / 1792.0), (16_384, 4.0), (32_768, 16_384.0 / 2560.0), (65_536, 32_768.0 / 3584.0)]
        {
            let counted = Pairs::of(&config(), Pass::Forward, tokens).limit();
            assert!((counted / limit - 1.0).abs() < 0.12, "{tokens}: counted {counted}, specified {limit}");
        }
        let counted = Pairs::of(&config(), Pass::Forward, 65_536).limit();
        assert!((counted / (32_768.0 / 3584.0) - 1.0).abs() < 0.02, "{counted}");
    }

    #[test]
    fn decoding_reads_the_papers_rows() {
        for (tokens, ratio) in [(8192, 4.0), (16_384, 6.4), (32_768, 9.1), (65_536, 11.6)] {
            let limit = Pairs::of(&config(), Pass::Decode, tokens).limit();
            assert!((limit - ratio).abs() < 0.1, "{tokens}: {limit}");
        }
        assert_eq!(row_bytes(&config(), 2, 4), 2048.0);
    }

    #[test]
    fn pairs_agree_with_the_ranges_of_each_query() {
        let config = NsaConfig::builder(2, 1, 8, 8)
            .compress_kind(CompressKind::Mean)
            .compress_block(8)
            .compress_stride(4)
            .select_block(16)
            .select_count(4)
            .window(10)
            .build()
            .expect("valid");
        let mut expected = 0;
        for t in 0..100 {
            let candidates = index::num_candidates(&config, t);
            // Which blocks are chosen does not matter for their number of tokens, but the own one must be among them.
            let chosen = (0..candidates).rev().take(4);
            expected += chosen.map(|j| index::select_tokens(&config, j, t).len()).sum::<usize>();
            expected += (0..25).filter(|i| i * 4 + 7 <= t).count() + (0..=t).filter(|s| s + 10 > t).count();
        }
        let pairs = Pairs::of(&config, Pass::Backward, 100);
        assert_eq!(pairs, Pairs { nsa: expected as u64, dense: 5050 });
    }

    #[test]
    fn flop_of_the_products() {
        let config = NsaConfig::builder(4, 2, 192, 128).compress_kind(CompressKind::Mean).build().expect("valid");
        // q·k and p·v; with gradients q·k, do·v, ds·k, ds·q, p·do.
        assert_eq!(flop(&config, Pass::Forward, 10), 10.0 * 4.0 * 2.0 * (192.0 + 128.0));
        assert_eq!(flop(&config, Pass::Backward, 10), 10.0 * 4.0 * 2.0 * (3.0 * 192.0 + 2.0 * 128.0));
        assert_eq!(flop(&config, Pass::Decode, 10), flop(&config, Pass::Forward, 10));
    }
}
