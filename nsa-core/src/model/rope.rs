//! Rotary frequencies, with YaRN.

use super::config::{ModelConfig, RopeScaling};
use std::f64::consts::TAU;

/// Frequencies of the rotary embedding: pair i of a head (elements i and i + Dk/2) of the token at position p turns by
/// p·`inv_freq[i]`, and cos and sin are multiplied by `attention_factor`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Radians a position, `[Dk/2]`.
    pub inv_freq: Vec<f64>,
    /// Factor on the rotated queries and keys; 1 without YaRN.
    pub attention_factor: f64,
}

/// The rotary frequencies of a model.
///
/// θ_i = base^(−2i/Dk). With YaRN, pairs that turn at least `beta_fast` times within the original context keep θ_i,
/// those that turn at most `beta_slow` times get θ_i/`factor`, and a ramp, linear in i, blends between the two; the
/// ramp's ends are rounded outwards to whole pairs. The attention factor is 0.1·ln(`factor`) + 1 unless given.
///
/// **Source**: RoFormer (arXiv 2104.09864), section 3.4; YaRN (arXiv 2309.00071), section 3.
///
/// ```
/// use nsa_core::model::{ModelConfig, rope_frequencies};
/// let table = rope_frequencies(&ModelConfig::preset("bench-4m")?);
/// assert_eq!((table.inv_freq.len(), table.inv_freq[0], table.attention_factor), (32, 1.0, 1.0));
/// # Ok::<(), nsa_core::ConfigError>(())
/// ```
pub fn rope_frequencies(config: &ModelConfig) -> RopeTable {
    let (dim, theta) = (config.head_dim(), config.rope_theta());
    let plain = (0..dim / 2).map(|i| theta.powf(-((2 * i) as f64) / dim as f64));
    let Some(scaling) = config.rope_scaling() else {
        return RopeTable { inv_freq: plain.collect(), attention_factor: 1.0 };
    };
    let (low, high) = ramp_ends(scaling, dim, theta);
    let blend = |(i, freq): (usize, f64)| {
        let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        freq * (1.0 - interpolated) + freq / scaling.factor * interpolated
    };
    let attention_factor = scaling.attention_factor.unwrap_or_else(|| 0.1 * scaling.factor.ln() + 1.0);
    RopeTable { inv_freq: plain.enumerate().map(blend).collect(), attention_factor }
}

/// Pairs between which YaRN's ramp runs: up to the first nothing is interpolated, from the second on everything.
fn ramp_ends(scaling: &RopeScaling, dim: usize, theta: f64) -> (f64, f64) {
    let context = scaling.original_max_position_embeddings as f64;
    // The pair that turns `turns` times within the context: context·theta^(−2i/dim) = turns·2π, solved for i.
    let pair = |turns: f64| dim as f64 * (context / (turns * TAU)).ln() / (2.0 * theta.ln());
    let last = (dim - 1) as f64;
    let low = pair(scaling.beta_fast).floor().clamp(0.0, last);
    let high = pair(scaling.beta_slow).ceil().clamp(0.0, last);
    // Ends that meet make a step; a ramp this steep is one at whole pairs.
    (low, if high > low { high } else { low + 1e-3 })
}
