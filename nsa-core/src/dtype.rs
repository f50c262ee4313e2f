//! Element types: what is stored (`Element`) and what is computed with (`Real`).

use half::{bf16, f16};
use std::fmt;

/// Names of the element types, as in safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// bfloat16: 8 bits of precision, the exponent of f32.
    Bf16,
    /// IEEE half: 11 bits of precision.
    F16,
    /// IEEE single.
    F32,
    /// IEEE double; the reference's.
    F64,
}

impl DType {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::F64 => "f64",
        })
    }
}

/// A type that kernels accumulate in: f32 or f64.
pub trait Real:
    Element<Acc = Self> + num_traits::Float + num_traits::NumAssign + std::iter::Sum + Default + bytemuck::Pod
{
    /// The nearest value to `x`.
    fn of(x: f64) -> Self;
    /// The error function, to the type's precision (for the erf form of GELU).
    fn erf(self) -> Self;
}

/// A type that tensors are stored in, with the type that its kernels accumulate in.
pub trait Element: Copy + Default + Send + Sync + PartialEq + fmt::Debug + bytemuck::Pod + 'static {
    /// f32 for f32, bf16 and f16; f64 for f64.
    type Acc: Real;
    /// The type's name.
    const DTYPE: DType;
    /// Widens exactly.
    fn to_acc(self) -> Self::Acc;
    /// Rounds to nearest, ties to even.
    fn from_acc(x: Self::Acc) -> Self;
    /// Widens exactly to f64.
    fn to_f64(self) -> f64;
    /// Rounds from f64 to nearest, ties to even.
    fn from_f64(x: f64) -> Self;
}

macro_rules! element {
    ($t:ty, $acc:ty, $name:ident, $to:expr, $from:expr, $to64:expr, $from64:expr) => {
        impl Element for $t {
            type Acc = $acc;
            const DTYPE: DType = DType::$name;
            #[inline(always)]
            fn to_acc(self) -> $acc {
                $to(self)
            }
            #[inline(always)]
            fn from_acc(x: $acc) -> Self {
                $from(x)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                $to64(self)
            }
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                $from64(x)
            }
        }
    };
}

element!(f32, f32, F32, |x| x, |x| x, f64::from, |x| x as f32);
element!(f64, f64, F64, |x| x, |x| x, |x| x, |x| x);
element!(bf16, f32, Bf16, bf16::to_f32, bf16::from_f32, bf16::to_f64, bf16::from_f64);
element!(f16, f32, F16, f16::to_f32, f16::from_f32, f16::to_f64, f16::from_f64);

impl Real for f32 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn erf(self) -> Self {
        libm::erff(self)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn erf(self) -> Self {
        libm::erf(self)
    }
}
