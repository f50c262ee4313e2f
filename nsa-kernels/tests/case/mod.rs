//! Cases of the branches' tests: shapes, random tensors, comparison with the reference.

use nsa_core::{CuSeqlens, DType, Element, NsaConfig, Packing};
use nsa_kernels::{Backend, Tensor, TensorMut};
use nsa_ref::Tensor as Truth;
use rand::{RngExt, SeedableRng};

/// A configuration with the block sizes l/d/l' = 8/4/16, n = 4, w = 13.
pub fn config(heads: usize, kv_heads: usize, dim_qk: usize, dim_v: usize) -> NsaConfig {
    NsaConfig::small()
        .to_builder()
        .num_heads(heads)
        .num_kv_heads(kv_heads)
        .head_dim_qk(dim_qk)
        .head_dim_v(dim_v)
        .window(13)
        .build()
        .expect("a valid configuration")
}

/// Configurations with odd groups and dims: R = 1, 2, 3, 7, 16.
pub fn configs() -> Vec<NsaConfig> {
    let shapes = [(3, 3, 8, 8), (4, 2, 16, 16), (3, 1, 5, 9), (14, 2, 12, 33), (16, 1, 24, 16)];
    shapes.into_iter().map(|(heads, kv_heads, dk, dv)| config(heads, kv_heads, dk, dv)).collect()
}

/// Sequences of these lengths that continue these contexts.
pub fn packing(lengths: &[usize], contexts: &[usize]) -> Packing {
    let offsets = CuSeqlens::from_lengths(lengths.iter().copied()).expect("short sequences");
    Packing::with_contexts(offsets, contexts.to_vec()).expect("a context a sequence")
}

/// The portable backend.
pub fn backend() -> Backend {
    Backend::pick(Some("cpu:portable")).expect("the portable backend is always there").0
}

/// Runs `f` in a pool of `threads` threads.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a few threads").install(f)
}

/// Random elements in (−2, 2), rounded to `T`; other seeds, other elements.
pub fn random<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| T::from_f64(rng.random_range(-2.0..2.0))).collect()
}

/// As a tensor of the operation.
pub fn tensor<T: Element, const N: usize>(data: &[T], shape: [usize; N]) -> Tensor<'_, T, N> {
    Tensor::host(data, shape).expect("as many elements as the shape asks for")
}

/// As a writable tensor of the operation.
pub fn tensor_mut<T, const N: usize>(data: &mut [T], shape: [usize; N]) -> TensorMut<'_, T, N> {
    TensorMut::host(data, shape).expect("as many elements as the shape asks for")
}

/// As a tensor of the reference.
pub fn truth<T: Element, const N: usize>(data: &[T], shape: [usize; N]) -> Truth {
    Truth::from_elements(&shape, data)
}

/// Largest error allowed, relative to the root mean square of the truth, of values rounded to `dtype` at the end
/// and computed in f32 (f64 for f64).
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 2e-2,
        DType::F16 => 2e-3,
        DType::F32 => 1e-5,
        DType::F64 => 1e-12,
    }
}

/// Compares with the truth; infinities must be equal, NaN is an error.
pub fn compare<T: Element>(what: &str, got: &[T], truth: &Truth) {
    assert_eq!(got.len(), truth.data.len(), "{what}: elements");
    let finite: Vec<f64> = truth.data.iter().copied().filter(|x| x.is_finite()).collect();
    let rms = (finite.iter().map(|x| x * x).sum::<f64>() / finite.len().max(1) as f64).sqrt();
    for (i, (got, &truth)) in got.iter().map(|x| x.to_f64()).zip(&truth.data).enumerate() {
        let close = got == truth || (got - truth).abs() <= tolerance(T::DTYPE) * (rms + truth.abs());
        assert!(close, "{what}[{i}]: {got}, expected {truth} (rms {rms})");
    }
}

/// Whether two results have the same bits (NaN equal to itself).
pub fn same_bits<T: Element>(a: &[T], b: &[T]) -> bool {
    bytemuck::cast_slice::<T, u8>(a) == bytemuck::cast_slice::<T, u8>(b)
}
