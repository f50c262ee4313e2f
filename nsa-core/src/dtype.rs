//! Element types: what is stored (`Element`) and what is computed with (`Real`).

use half::{bf16, f16};
use std::fmt;
use std::str::FromStr;

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

/// The type that a model computes in: that of its activations, and of the matrices that they are multiplied with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
}

impl Precision {
    /// The type's name.
    pub const fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::Bf16,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dtype().fmt(f)
    }
}

/// A name that is no [`Precision`]'s.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no precision: must be f32 or bf16")]
pub struct PrecisionError(String);

impl FromStr for Precision {
    type Err = PrecisionError;

    fn from_str(name: &str) -> Result<Self, PrecisionError> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err(PrecisionError(name.to_owned())),
        }
    }
}

/// A type that kernels accumulate in: f32 or f64.
pub trait Real:
    Element<Acc = Self> + num_traits::Float + num_traits::NumAssign + std::iter::Sum + Default + bytemuck::Pod
{
    /// The nearest value to `x`.
    fn of(x: f64) -> Self;
    /// 1 − erf, to the type's precision where it is small too (for the erf form of GELU).
    fn erfc(self) -> Self;
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
element!(bf16, f32, Bf16, bf16_to_f32, bf16_from_f32, bf16::to_f64, |x| bf16_from_f32(f32_to_odd(x)));
element!(f16, f32, F16, f16_to_f32, f16_from_f32, f16::to_f64, |x| f16_from_f32(f32_to_odd(x)));

// The conversions of crate half ask for the processor's features or branch on NaN at each element, which keeps loops from
// being vectorised; these do not.

/// bf16 is the upper half of f32.
#[inline(always)]
fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Rounds 16 bits off to nearest, ties to even, by a carry (which may reach infinity). NaN keeps its upper half, quiet.
#[inline(always)]
fn bf16_from_f32(x: f32) -> bf16 {
    let bits = x.to_bits() as i32;
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = bits & 0x7fff_ffff > 0x7f80_0000;
    bf16::from_bits(if nan { bits >> 16 | 0x40 } else { rounded } as u16)
}

/// The nearer to zero of the two f32 beside `x`, its last bit set if `x` lies between them. Rounded to a type with at least two bits
/// fewer it is what `x` itself is rounded to, which the nearest f32 is not: that may be halfway where `x` is not.
#[inline(always)]
fn f32_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let exact = f64::from(nearest) == x || x.is_nan();
    let beyond = f64::from(nearest).abs() > x.abs();
    f32::from_bits(if exact { nearest.to_bits() } else { (nearest.to_bits() - u32::from(beyond)) | 1 })
}

/// Moves the exponent's bias from 15 to 127. A subnormal gets exponent −14 and an implicit one that is then taken off.
#[inline(always)]
fn f16_to_f32(x: f16) -> f32 {
    let bits = i32::from(x.to_bits());
    let magnitude = (bits & 0x7fff) << 13;
    let normal = magnitude + (112 << 23);
    let infinite_or_nan = magnitude + (224 << 23);
    let subnormal = (float(magnitude + (113 << 23)) - float(113 << 23)).to_bits() as i32;
    let small = if magnitude < 1 << 23 { subnormal } else { normal };
    let magnitude = if magnitude >= 31 << 23 { infinite_or_nan } else { small };
    float(magnitude | (bits & 0x8000) << 16)
}

/// Moves the exponent's bias from 127 to 15 and rounds 13 bits off to nearest, ties to even: of normal numbers by a carry
/// (which may reach infinity), of subnormal ones by adding 1/2, whose unit in the last place is theirs.
#[inline(always)]
fn f16_from_f32(x: f32) -> f16 {
    let bits = x.to_bits() as i32;
    let magnitude = bits & 0x7fff_ffff;
    let odd = (magnitude >> 13) & 1;
    let normal = (magnitude.wrapping_sub(112 << 23) + 0xfff + odd) >> 13;
    let subnormal = ((float(magnitude) + 0.5).to_bits() as i32).wrapping_sub(0.5f32.to_bits() as i32);
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let beyond = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    let magnitude = if magnitude >= 143 << 23 { beyond } else { finite };
    f16::from_bits((magnitude | (bits >> 16) & 0x8000) as u16)
}

#[inline(always)]
fn float(bits: i32) -> f32 {
    f32::from_bits(bits as u32)
}

impl Real for f32 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn erfc(self) -> Self {
        libm::erfcf(self)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn erfc(self) -> Self {
        libm::erfc(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (x, y) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert!(x.to_acc().to_bits() == x.to_f32().to_bits() || x.is_nan() && x.to_acc().is_nan(), "{bits:#x}");
            assert!(y.to_acc().to_bits() == y.to_f32().to_bits() || y.is_nan() && y.to_acc().is_nan(), "{bits:#x}");
        }
    }

    #[test]
    fn singles_round_to_the_nearest_bf16() {
        let check = |bits: u32| {
            let x = f32::from_bits(bits);
            let (got, expected) = (<bf16 as Element>::from_acc(x), bf16::from_f32(x));
            assert_eq!(got.to_bits(), expected.to_bits(), "{bits:#x}");
        };
        // Every bf16, the point halfway to the next one, and their neighbours.
        for upper in 0..=u32::from(u16::MAX) {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                check(upper << 16 | lower);
            }
        }
    }

    /// Doubles beside the points halfway between neighbours, nearer to them than an f32 can be, and at them.
    #[test]
    fn doubles_round_to_the_nearest() {
        fn check<T: Element>(of_bits: fn(u16) -> T, infinity: u16) {
            for bits in 0..infinity - 1 {
                let [low, high] = [of_bits(bits), of_bits(bits + 1)];
                let middle = f64::midpoint(low.to_f64(), high.to_f64());
                let even = if bits % 2 == 0 { low } else { high };
                for (x, expected) in [(middle.next_down(), low), (middle, even), (middle.next_up(), high)] {
                    assert_eq!(T::from_f64(x), expected, "{x:e}");
                    assert_eq!(T::from_f64(-x).to_f64(), -expected.to_f64(), "{x:e}");
                }
                assert_eq!(T::from_f64(low.to_f64()), low);
            }
            let largest = of_bits(infinity - 1).to_f64();
            let step = largest - of_bits(infinity - 2).to_f64();
            for (x, expected) in [(largest + step / 2.0, infinity), ((largest + step / 2.0).next_down(), infinity - 1)]
            {
                assert_eq!(T::from_f64(x), of_bits(expected), "{x:e}");
            }
            assert_eq!(T::from_f64(f64::MAX), of_bits(infinity));
            assert_eq!(T::from_f64(f64::INFINITY), of_bits(infinity));
            assert_eq!(T::from_f64(f64::from_bits(1)), of_bits(0));
            assert!(T::from_f64(f64::NAN).to_f64().is_nan());
        }
        check(bf16::from_bits, 0x7f80);
        check(f16::from_bits, 0x7c00);
    }

    #[test]
    fn singles_round_to_the_nearest_half() {
        let check = |bits: u32| {
            let x = f32::from_bits(bits);
            let (got, expected) = (<bf16 as Element>::from_acc(x), bf16::from_f32(x));
            assert!(
                got.to_bits() == expected.to_bits() || x.is_nan() && got.is_nan(),
                "{bits:#x}: {got:?} {expected:?}"
            );
            let (got, expected) = (<f16 as Element>::from_acc(x), f16::from_f32(x));
            assert!(
                got.to_bits() == expected.to_bits() || x.is_nan() && got.is_nan(),
                "{bits:#x}: {got:?} {expected:?}"
            );
        };
        // Every half, the point halfway to the next one, and their neighbours.
        for half in 0..=u16::MAX {
            let at = f16::from_bits(half).to_f32().to_bits();
            for middle in [at, at.wrapping_add(1 << 12), at.wrapping_sub(1 << 12)] {
                (0..3).for_each(|step| check(middle.wrapping_add(step).wrapping_sub(1)));
            }
        }
        // The same for bf16.
        for half in 0..=u16::MAX {
            let at = u32::from(half) << 16;
            for middle in [at, at + (1 << 15), at + 0xffff] {
                (0..3).for_each(|step| check(middle.wrapping_add(step).wrapping_sub(1)));
            }
        }
        // Halfway points of subnormals.
        for k in 0..4096 {
            let at = (k as f32 * 2f32.powi(-26)).to_bits();
            (0..3).for_each(|step| check(at.wrapping_add(step).wrapping_sub(1)));
        }
        (0..u32::MAX).step_by(65_521).for_each(check);
    }
}
