//! Inputs that differ in every index, outputs that start as NaN between guard zones.

use crate::Case;
use nsa_core::{CompressKind, Element};
use nsa_kernels::{Backend, Buffer, TensorMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Seed of one tensor of one case: a hash of both names, so that a failure is made again from its message alone.
pub fn seed(case: &str, tensor: &str) -> u64 {
    hash(case.bytes().chain([0]).chain(tensor.bytes()))
}

/// FNV-1a.
pub fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Random values of `shape`, about `amplitude` large, asymmetric in every index: each head (the axis before the last)
/// has a spread of its own and each column (the last axis) an offset of its own, so that swapped heads, swapped
/// columns and wrong strides change sums, not only elements.
pub fn tensor<T: Element>(case: &Case, name: &str, shape: &[usize], amplitude: f64) -> Vec<T> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed(&case.name, name));
    let columns = shape.last().copied().unwrap_or(1).max(1);
    let heads = shape.len().checked_sub(2).map_or(1, |axis| shape[axis]).max(1);
    (0..shape.iter().product())
        .map(|at: usize| {
            let (head, column) = (at / columns % heads, at % columns);
            let spread = 0.75 + 0.5 * (head + 1) as f64 / heads as f64;
            let offset = 0.3 * ((column * 7 + 3) % 11) as f64 / 11.0 - 0.15;
            // The sum of four uniforms: close to normal, bounded, the same on every platform.
            let noise: f64 = (0..4).map(|_| rng.random::<f64>() - 0.5).sum::<f64>() * 3f64.sqrt();
            T::from_f64(amplitude * (spread * noise + offset))
        })
        .collect()
}

/// Gates as a sigmoid gives them, `[N, Hq, 3]`.
pub fn gates<T: Element>(case: &Case) -> Vec<T> {
    let shape = [case.tokens(), case.config.num_heads(), 3];
    let logits: Vec<f64> = tensor(case, "gates", &shape, 1.5);
    logits.into_iter().map(|x| T::from_f64(1.0 / (1.0 + (-x).exp()))).collect()
}

/// Block lists `[N, G, n]`, random but legal: ascending, no block after the query's own, some lists shorter than n or
/// without the query's own block, some empty.
pub fn selection(case: &Case) -> Vec<i32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed(&case.name, "block_indices"));
    let (groups, count) = (case.config.num_kv_heads(), case.config.select_count());
    let mut lists = Vec::with_capacity(case.tokens() * groups * count);
    for t in case.lengths.iter().flat_map(|&length| 0..length) {
        for g in 0..groups {
            let candidates = nsa_core::index::num_candidates(&case.config, t);
            let mut blocks: Vec<i32> = (0..candidates as i32).collect();
            for i in (1..candidates).rev() {
                blocks.swap(i, rng.random_range(0..=i));
            }
            blocks.truncate(if (t + g) % 17 == 11 { 0 } else { count - (t % 5 == 3) as usize });
            blocks.sort_unstable();
            blocks.resize(count, -1);
            lists.extend(blocks);
        }
    }
    lists
}

/// Keys or values: which head dimension, which weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Keys: D = Dk.
    Key,
    /// Values: D = Dv.
    Value,
}

impl Side {
    /// `k` or `v`.
    pub const fn letter(self) -> &'static str {
        match self {
            Self::Key => "k",
            Self::Value => "v",
        }
    }

    /// D.
    pub fn dim(self, config: &nsa_core::NsaConfig) -> usize {
        match self {
            Self::Key => config.head_dim_qk(),
            Self::Value => config.head_dim_v(),
        }
    }
}

/// Weights of φ, owned.
#[derive(Clone, Debug, PartialEq)]
pub enum Weights<T> {
    /// Nothing to learn.
    Mean,
    /// `[l, G]`.
    Weighted(Vec<T>),
    /// `[G, l·D, D]`.
    Linear(Vec<T>),
    /// Two layers.
    Mlp {
        /// `[G, l·D, H]`.
        weight1: Vec<T>,
        /// `[G, H]`.
        bias1: Option<Vec<T>>,
        /// `[G, H, D]`.
        weight2: Vec<T>,
        /// `[G, D]`.
        bias2: Option<Vec<T>>,
    },
}

impl<T> Weights<T> {
    /// The same weights with every tensor changed.
    pub fn map<U>(&self, f: impl Fn(&[T]) -> Vec<U>) -> Weights<U> {
        match self {
            Self::Mean => Weights::Mean,
            Self::Weighted(weight) => Weights::Weighted(f(weight)),
            Self::Linear(weight) => Weights::Linear(f(weight)),
            Self::Mlp { weight1, bias1, weight2, bias2 } => Weights::Mlp {
                weight1: f(weight1),
                bias1: bias1.as_deref().map(&f),
                weight2: f(weight2),
                bias2: bias2.as_deref().map(&f),
            },
        }
    }
}

impl<T: Copy> Weights<T> {
    /// With the order of features (D) and hidden units (H) reversed; twice is once.
    pub fn mirror(&self, dim: usize, hidden: usize) -> Self {
        match self {
            Self::Mean | Self::Weighted(_) => self.clone(),
            Self::Linear(weight) => Self::Linear(mirror(weight, dim * dim)),
            Self::Mlp { weight1, bias1, weight2, bias2 } => Self::Mlp {
                weight1: mirror(weight1, dim * hidden),
                bias1: bias1.as_deref().map(|bias| mirror(bias, hidden)),
                weight2: mirror(weight2, hidden * dim),
                bias2: bias2.as_deref().map(|bias| mirror(bias, dim)),
            },
        }
    }
}

/// Each run of `chunk` values in reverse: features last first. Twice is once.
pub fn mirror<T: Copy>(values: &[T], chunk: usize) -> Vec<T> {
    values.chunks(chunk.max(1)).flat_map(|chunk| chunk.iter().rev().copied()).collect()
}

/// Every value, exactly, in f64.
pub fn widen<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

/// Shapes of φ's weights for a head dimension.
#[derive(Clone, Copy, Debug)]
pub struct PhiShapes {
    /// `weighted`: `[l, G]`.
    pub weighted: [usize; 2],
    /// `linear`: `[G, l·D, D]`.
    pub linear: [usize; 3],
    /// `mlp`, first layer: `[G, l·D, H]`.
    pub weight1: [usize; 3],
    /// Its bias: `[G, H]`.
    pub bias1: [usize; 2],
    /// `mlp`, second layer: `[G, H, D]`.
    pub weight2: [usize; 3],
    /// Its bias: `[G, D]`.
    pub bias2: [usize; 2],
    /// Intra-block position embedding: `[l, G, D]`.
    pub position: [usize; 3],
}

impl PhiShapes {
    /// The shapes for `side`.
    pub fn new(config: &nsa_core::NsaConfig, side: Side) -> Self {
        let (l, g, d) = (config.compress_block(), config.num_kv_heads(), side.dim(config));
        let h = config.compress_hidden().unwrap_or(0);
        Self {
            weighted: [l, g],
            linear: [g, l * d, d],
            weight1: [g, l * d, h],
            bias1: [g, h],
            weight2: [g, h, d],
            bias2: [g, d],
            position: [l, g, d],
        }
    }
}

/// Weights of the case's φ for keys or values. The first layer of an `mlp` has a bias for keys only, the second for
/// values only: each combination runs.
pub fn weights<T: Element>(case: &Case, side: Side) -> Weights<T> {
    let shapes = PhiShapes::new(&case.config, side);
    let make = |part: &str, shape: &[usize], fan_in: usize| {
        let name = format!("phi_{}.{part}", side.letter());
        tensor(case, &name, shape, 2.0 / (fan_in as f64).sqrt())
    };
    match case.config.compress_kind() {
        CompressKind::Mean => Weights::Mean,
        CompressKind::Weighted => Weights::Weighted(make("weight", &shapes.weighted, shapes.weighted[0])),
        CompressKind::Linear => Weights::Linear(make("weight", &shapes.linear, shapes.linear[1])),
        CompressKind::Mlp => Weights::Mlp {
            weight1: make("0.weight", &shapes.weight1, shapes.weight1[1]),
            bias1: (side == Side::Key).then(|| make("0.bias", &shapes.bias1, 16)),
            weight2: make("2.weight", &shapes.weight2, shapes.weight2[1]),
            bias2: (side == Side::Value).then(|| make("2.bias", &shapes.bias2, 16)),
        },
    }
}

/// Intra-block position embedding `[l, G, D]`.
pub fn position<T: Element>(case: &Case, side: Side) -> Vec<T> {
    let name = format!("pe_{}", side.letter());
    tensor(case, &name, &PhiShapes::new(&case.config, side).position, 0.5)
}

/// Elements before and after every output.
const GUARD: usize = 64;

/// What outputs hold before a kernel writes them, and what stands around them.
pub trait Poison: bytemuck::Pod + PartialEq + std::fmt::Debug {
    /// In the output: NaN, or a number that no output holds.
    const FILL: Self;
    /// Around it.
    const GUARD: Self;
}

impl Poison for f32 {
    const FILL: Self = f32::NAN;
    const GUARD: Self = -1234.5;
}
impl Poison for f64 {
    const FILL: Self = f64::NAN;
    const GUARD: Self = -1234.5;
}
impl Poison for half::bf16 {
    const FILL: Self = half::bf16::NAN;
    const GUARD: Self = half::bf16::from_f32_const(-1232.0);
}
impl Poison for half::f16 {
    const FILL: Self = half::f16::NAN;
    const GUARD: Self = half::f16::from_f32_const(-1234.0);
}
impl Poison for i32 {
    const FILL: Self = i32::MIN;
    const GUARD: Self = -77_777;
}

/// Memory of an output between guard zones.
#[derive(Debug)]
pub struct Guarded<T> {
    memory: Vec<T>,
    /// Where a backend computes, if not in `memory`.
    device: Option<Box<Buffer<T>>>,
}

impl<T: Poison> Guarded<T> {
    /// An output of `len` elements that a kernel must write: NaN until then.
    pub fn unwritten(len: usize) -> Self {
        Self::filled(len, T::FILL)
    }

    /// An output of `len` elements that a kernel adds to.
    pub fn filled(len: usize, value: T) -> Self {
        let mut memory = vec![T::GUARD; len + 2 * GUARD];
        memory[GUARD..GUARD + len].fill(value);
        Self { memory, device: None }
    }

    /// The output as an operation of the backend takes it.
    ///
    /// # Errors
    /// If the shape has more elements, or the device refuses.
    pub fn tensor<const N: usize>(
        &mut self,
        backend: &Backend,
        shape: [usize; N],
    ) -> Result<TensorMut<'_, T, N>, nsa_kernels::Error> {
        if let Backend::Cpu(_) = backend {
            return TensorMut::host(self.get_mut(), shape);
        }
        self.device.insert(Box::new(backend.upload(&self.memory))).tensor_mut_at(GUARD, shape)
    }

    /// Brings what a device computed to `get`.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn fetch(&mut self) -> Result<(), String> {
        match self.device.take() {
            None => Ok(()),
            Some(device) => device.read(&mut self.memory).map_err(|error| error.to_string()),
        }
    }

    /// The output.
    pub fn get(&self) -> &[T] {
        &self.memory[GUARD..self.memory.len() - GUARD]
    }

    /// The output, to write.
    pub fn get_mut(&mut self) -> &mut [T] {
        let end = self.memory.len() - GUARD;
        &mut self.memory[GUARD..end]
    }

    /// The output, if what stands around it is as it was.
    ///
    /// # Errors
    /// Names the output and the first guard element that was written; or what went wrong on the device.
    pub fn finish(mut self, name: &str) -> Result<Vec<T>, String> {
        self.fetch()?;
        let len = self.memory.len() - 2 * GUARD;
        let outside = (0..GUARD).chain(GUARD + len..self.memory.len());
        for at in outside {
            if self.memory[at] != T::GUARD {
                let place = at as i64 - GUARD as i64;
                return Err(format!(
                    "`{name}`: element {place} outside of 0..{len} was written: {:?}",
                    self.memory[at]
                ));
            }
        }
        Ok(self.get().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_differ_by_name_head_and_column() {
        let case = crate::case::find("ragged").unwrap();
        let shape = [200, 3, 10];
        let a: Vec<f64> = tensor(&case, "a", &shape, 1.0);
        assert_eq!(a, tensor::<f64>(&case, "a", &shape, 1.0));
        assert_ne!(a, tensor::<f64>(&case, "b", &shape, 1.0));
        let mean_square =
            |h: usize| (0..200).flat_map(|t| &a[(t * 3 + h) * 10..][..10]).map(|x| x * x).sum::<f64>() / 2000.0;
        assert!(mean_square(0) * 1.3 < mean_square(1) && mean_square(1) * 1.2 < mean_square(2));
    }

    #[test]
    fn a_write_outside_is_found() {
        let mut output = Guarded::<f32>::unwritten(3);
        output.get_mut().fill(1.0);
        assert_eq!(output.finish("o").unwrap(), [1.0; 3]);
        let mut output = Guarded::<f32>::unwritten(3);
        output.memory[GUARD + 3] = 0.0;
        assert!(output.finish("o").unwrap_err().contains("element 3 outside of 0..3"));
    }
}
