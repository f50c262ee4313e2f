//! Random inputs, asymmetric in every index.

use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};
use nsa_ref::Tensor;
use nsa_ref::compress::Phi;
use nsa_ref::nsa::{Compressed, Inputs, Side};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A generator of random tensors.
pub struct Random(ChaCha8Rng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in [-size, size].
    pub fn tensor(&mut self, shape: &[usize], size: f64) -> Tensor {
        let len = shape.iter().product();
        Tensor::new(shape, (0..len).map(|_| self.0.random_range(-size..=size)).collect())
    }

    /// Uniform in (0, 1).
    pub fn gates(&mut self, tokens: usize, heads: usize) -> Tensor {
        self.tensor(&[tokens, heads, 3], 2.0).map(|x| 1.0 / (1.0 + (-x).exp()))
    }

    pub fn side(&mut self, config: &NsaConfig, tokens: usize, dim: usize, biases: bool) -> Side {
        let (l, groups) = (config.compress_block(), config.num_kv_heads());
        let phi = match config.compress_kind() {
            CompressKind::Mean => Phi::Mean,
            CompressKind::Weighted => Phi::Weighted { weight: self.tensor(&[l, groups], 0.5) },
            CompressKind::Linear => Phi::Linear { weight: self.tensor(&[groups, l * dim, dim], 0.4) },
            CompressKind::Mlp => {
                let hidden = config.compress_hidden().unwrap();
                Phi::Mlp {
                    weight1: self.tensor(&[groups, l * dim, hidden], 0.5),
                    bias1: biases.then(|| self.tensor(&[groups, hidden], 0.5)),
                    weight2: self.tensor(&[groups, hidden, dim], 0.7),
                    bias2: biases.then(|| self.tensor(&[groups, dim], 0.5)),
                }
            }
        };
        let position = biases.then(|| self.tensor(&[l, groups, dim], 0.5));
        Side { x: self.tensor(&[tokens, groups, dim], 1.5), position, phi }
    }

    pub fn inputs(&mut self, config: &NsaConfig, tokens: usize, biases: bool) -> Inputs {
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (dim_qk, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let kv = [self.side(config, tokens, dim_qk, biases), self.side(config, tokens, dim_v, biases)];
        Inputs {
            q: self.tensor(&[tokens, heads, dim_qk], 1.5),
            gates: self.gates(tokens, heads),
            cmp: Compressed::Tokens { kv: Box::new(kv) },
            k_slc: self.tensor(&[tokens, groups, dim_qk], 1.5),
            v_slc: self.tensor(&[tokens, groups, dim_v], 1.5),
            k_win: self.tensor(&[tokens, groups, dim_qk], 1.5),
            v_win: self.tensor(&[tokens, groups, dim_v], 1.5),
            block_indices: None,
        }
    }
}

pub fn packing(lengths: &[usize]) -> Packing {
    Packing::new(CuSeqlens::from_lengths(lengths.iter().copied()).unwrap())
}
