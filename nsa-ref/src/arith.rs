//! Where a kernel rounds. The same loops run exactly (the truth) or rounded (the error model of the tests).

use half::{bf16, f16};
use nsa_core::{DType, Element};

/// The places where a kernel rounds.
pub trait Arithmetic {
    /// The result of an operation in the accumulator: sums, products, exponentials.
    fn acc(&self, x: f64) -> f64;
    /// A probability P or a dS before it enters a product.
    fn prob(&self, x: f64) -> f64;
    /// An output or a stored intermediate. Gradients are not among them: kernels hand them over in the accumulator, and
    /// who stores them rounds them ([`crate::quantize`]).
    fn store(&self, x: f64) -> f64;

    /// a·b summed over the elements, in order.
    fn dot(&self, a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).fold(0.0, |sum, (&x, &y)| self.acc(sum + self.acc(x * y)))
    }

    /// y += factor·x.
    fn add_scaled(&self, y: &mut [f64], factor: f64, x: &[f64]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = self.acc(*y + self.acc(factor * x));
        }
    }
}

/// No rounding but f64's own: the truth.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exact;

impl Arithmetic for Exact {
    fn acc(&self, x: f64) -> f64 {
        x
    }
    fn prob(&self, x: f64) -> f64 {
        x
    }
    fn store(&self, x: f64) -> f64 {
        x
    }
}

/// Rounds where a kernel does that stores `storage`, accumulates in f32 (in f64 when it stores f64) and feeds
/// probabilities of type `prob` to its products.
#[derive(Clone, Copy, Debug)]
pub struct Rounded {
    /// Type of inputs and outputs.
    pub storage: DType,
    /// Type of P and dS in products.
    pub prob: DType,
}

impl Rounded {
    /// A kernel that keeps probabilities in its accumulators' type.
    pub fn wide(storage: DType) -> Self {
        let prob = if storage == DType::F64 { DType::F64 } else { DType::F32 };
        Self { storage, prob }
    }
}

impl Arithmetic for Rounded {
    fn acc(&self, x: f64) -> f64 {
        if self.storage == DType::F64 { x } else { round_to(DType::F32, x) }
    }
    fn prob(&self, x: f64) -> f64 {
        round_to(self.prob, x)
    }
    fn store(&self, x: f64) -> f64 {
        round_to(self.storage, x)
    }
}

/// The value of `dtype` nearest to `x`, ties to even.
pub fn round_to(dtype: DType, x: f64) -> f64 {
    fn through<T: Element>(x: f64) -> f64 {
        T::from_f64(x).to_f64()
    }
    match dtype {
        DType::Bf16 => through::<bf16>(x),
        DType::F16 => through::<f16>(x),
        DType::F32 => through::<f32>(x),
        DType::F64 => x,
    }
}
