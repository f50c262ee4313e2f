//! Data, comparison and finite differences.

use nsa_core::view::Strided;
use nsa_core::{DType, Element};
use nsa_kernels::{Backend, Isa, Mem, Tensor, TensorMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub fn backend() -> Backend {
    Backend::pick(Some("cpu")).expect("the CPU is always there").0
}

/// One for each instruction set that the machine has.
pub fn backends() -> impl Iterator<Item = Backend> {
    Isa::available().map(|isa| Backend::with_isa(isa).expect("an instruction set of this machine"))
}

/// Numbers in (−1, 1), a different sequence for each seed.
pub fn random<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| T::from_f64(rng.random_range(-1.0..1.0))).collect()
}

/// Values as f64.
pub fn exact<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

/// Gradients as f64, rounded as the backend rounds them before a product with a matrix of type `T`.
pub fn rounded<T: Element>(backend: &Backend, gradients: &[T::Acc]) -> Vec<f64> {
    match backend.operand_type(T::DTYPE) {
        // They are f32: the cast is exact.
        DType::Bf16 => gradients.iter().map(|x| half::bf16::from_f32(x.to_f64() as f32).to_f64()).collect(),
        _ => exact(gradients),
    }
}

pub fn tensor<T, const N: usize>(data: &[T], shape: [usize; N]) -> Tensor<'_, T, N> {
    Tensor::host(data, shape).expect("shape of the data")
}

pub fn tensor_mut<T, const N: usize>(data: &mut [T], shape: [usize; N]) -> TensorMut<'_, T, N> {
    TensorMut::host(data, shape).expect("shape of the data")
}

/// Rows with NaN between them.
pub struct Gapped<T> {
    data: Vec<T>,
    shape: [usize; 2],
    stride: usize,
}

impl<T: Element> Gapped<T> {
    pub fn new(rows: &[T], shape: [usize; 2], gap: usize) -> Self {
        let stride = shape[1] + gap;
        let mut data = vec![T::from_f64(f64::NAN); shape[0] * stride];
        for (row, target) in rows.chunks(shape[1].max(1)).zip(data.chunks_mut(stride.max(1))) {
            target[..row.len()].copy_from_slice(row);
        }
        Self { data, shape, stride }
    }

    pub fn tensor(&self) -> Tensor<'_, T, 2> {
        let layout = Strided::new(self.shape, [self.stride, 1]).expect("a legal layout");
        Tensor::new(Mem::Host(&self.data), layout).expect("rows of the data")
    }
}

/// Largest relative error of rounding to `T`.
pub fn unit<T: Element>() -> f64 {
    match T::DTYPE {
        DType::Bf16 => 2f64.powi(-9),
        DType::F16 => 2f64.powi(-12),
        DType::F32 => 2f64.powi(-24),
        DType::F64 => 2f64.powi(-53),
    }
}

/// Checks that `got` is `want` rounded to `T`, but for an error of `slack` units of A relative to `scale` (the sum of the
/// magnitudes of what was added up).
pub fn assert_near<T: Element>(what: &str, got: &[T], want: &[f64], scale: &[f64], slack: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let half_subnormal = if T::DTYPE == DType::F16 { 2f64.powi(-25) } else { 2f64.powi(-134) };
    for (i, ((got, want), scale)) in got.iter().zip(want).zip(scale).enumerate() {
        let bound = 2.0 * unit::<T>() * want.abs() + slack * unit::<T::Acc>() * scale.abs() + half_subnormal;
        let error = (got.to_f64() - want).abs();
        assert!(error <= bound, "{what}[{i}]: {got:?}, expected {want:e}; error {error:e} above {bound:e}");
    }
}

/// Checks a gradient in f64 against central differences of `f` around `x`.
pub fn assert_gradient(what: &str, x: &[f64], gradient: &[f64], f: impl Fn(&[f64]) -> f64) {
    const STEP: f64 = 1e-5;
    assert_eq!(x.len(), gradient.len(), "{what}");
    let mut moved = x.to_vec();
    for i in 0..x.len() {
        let mut at = |value| {
            moved[i] = value;
            f(&moved)
        };
        let slope = (at(x[i] + STEP) - at(x[i] - STEP)) / (2.0 * STEP);
        moved[i] = x[i];
        let error = (gradient[i] - slope).abs();
        assert!(error <= 1e-8 * (1.0 + slope.abs()), "{what}[{i}]: {}, but the slope is {slope}", gradient[i]);
    }
}

/// Σ a·b: a function of a tensor whose gradient is `b`.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Checks that `f` gives the same bits on 1, 2 and 5 threads.
pub fn assert_same_bits<T: PartialEq + std::fmt::Debug + Send>(what: &str, f: impl Fn() -> T + Sync) {
    let on = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads").install(&f);
    let one = on(1);
    for threads in [2, 5] {
        assert!(on(threads) == one, "{what}: {threads} threads give other bits than one");
    }
}
