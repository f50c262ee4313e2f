//! Inputs, and comparison against the reference: truth in f64 beside the same loops rounded where a kernel rounds.

use nsa_core::{CuSeqlens, DType, Element, Packing};
use nsa_kernels::Backend;
use nsa_ref::{Rounded, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Random values about 1 large, made from the tensor's name, asymmetric in every index, rounded to `T`.
pub fn values<T: Element>(name: &str, shape: &[usize]) -> Tensor {
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mut rng = ChaCha8Rng::seed_from_u64(name.bytes().fold(0xcbf2_9ce4_8422_2325, hash));
    let columns = shape.last().copied().unwrap_or(1).max(1);
    let value = |at: usize| {
        let offset = 0.3 * ((at % columns * 7 + at / columns * 3) % 11) as f64 / 11.0 - 0.15;
        T::from_f64(2.0 * rng.random::<f64>() - 1.0 + offset).to_f64()
    };
    Tensor::new(shape, (0..shape.iter().product()).map(value).collect())
}

/// Values of that size.
pub fn scaled<T: Element>(factor: f64, tensor: &Tensor) -> Tensor {
    tensor.map(|x| T::from_f64(factor * x).to_f64())
}

/// The elements as a kernel takes them.
pub fn typed<T: Element>(tensor: &Tensor) -> Vec<T> {
    tensor.data.iter().map(|&x| T::from_f64(x)).collect()
}

/// Sequences of these lengths from position 0.
pub fn packing(lengths: &[usize]) -> Packing {
    Packing::new(CuSeqlens::from_lengths(lengths.iter().copied()).unwrap())
}

/// The best backend that this machine has.
pub fn backend() -> Backend {
    Backend::pick(Some("cpu")).expect("the CPU is always there").0
}

/// The arithmetic of its kernels on tensors of type `T`.
pub fn rounded<T: Element>() -> Rounded {
    Rounded { storage: T::DTYPE, prob: backend().operand_type(T::DTYPE) }
}

/// Half an ulp at 1.
fn unit_roundoff(dtype: DType) -> f64 {
    let bits = match dtype {
        DType::Bf16 => 8,
        DType::F16 => 11,
        DType::F32 => 24,
        DType::F64 => 53,
    };
    0.5f64.powi(bits)
}

/// Asserts that a kernel's largest error is at most 1.5 times the rounded reference's, with the factor for chance of the error model
/// (of 40 draws of the inputs every fiftieth dv has more than 1.5 times that error, none 1.9), or the rounding of the result to its
/// type and a few ulps of the accumulator.
pub fn assert_close<O: Element>(what: &str, kernel: &[O], truth: &Tensor, rounded: &Tensor) {
    assert_eq!(kernel.len(), truth.data.len(), "{what}: number of elements");
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0f64, |m, x| m.max(x.abs()));
    let finite = |x: &f64| x.is_finite();
    let size = largest(&mut truth.data.iter().copied().filter(finite));
    let model = largest(&mut truth.data.iter().zip(&rounded.data).filter(|(x, _)| finite(x)).map(|(x, y)| x - y));
    // In f64 the truth itself is rounded, as often as its sums are long.
    let ulps = if O::DTYPE == DType::F64 { 1024.0 } else { 16.0 };
    let floor = (unit_roundoff(O::DTYPE) + ulps * unit_roundoff(<O::Acc as Element>::DTYPE)) * size.max(1.0);
    let rows = truth.shape.first().copied().unwrap_or(1).max(1);
    let chance = 1.0 + 3.0 / (rows as f64).sqrt();
    let limit = (1.5 * chance * model).max(floor);
    for (i, (x, &truth)) in kernel.iter().zip(&truth.data).enumerate() {
        let x = x.to_f64();
        if !truth.is_finite() {
            assert_eq!(x, truth, "{what}[{i}]");
            continue;
        }
        assert!((x - truth).abs() <= limit, "{what}[{i}] = {x}, truth {truth}: off by more than {limit:.2e}");
    }
}

/// Runs `f` on a pool of `threads` threads.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}
