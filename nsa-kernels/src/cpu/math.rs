//! Elementary functions and conversions in a form that the compiler vectorises.

use half::f16;
use half::slice::HalfFloatSliceExt;
use nsa_core::{DType, Element, Real};

/// e^x: in f32 within 2 ulp, with exact zeros, subnormals, infinities and NaN, without branches; in f64 the library's.
#[inline(always)]
pub(crate) fn exp<A: Real>(x: A) -> A {
    // Both branches are known when compiled.
    if A::DTYPE == DType::F32 { bytemuck::cast(exp_f32(bytemuck::cast(x))) } else { x.exp() }
}

/// e^x = 2^n · e^r with n = round(x / ln 2) and |r| ≤ ln 2 / 2; e^r by its Taylor series, whose first term left out is
/// below 6e-9. 2^n is applied in two halves, so that subnormal results round once and n = 128 does not overflow early.
#[inline(always)]
pub(crate) fn exp_f32(x: f32) -> f32 {
    // Adding 1.5 · 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has 9 bits, so n times it is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Beyond these the result is 0 or infinite. Comparisons are false for NaN, which passes through.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut y = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5] {
        y = y * r + c;
    }
    let y = 1.0 + (r + r * r * y);
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Widens a slice exactly.
#[inline(always)]
pub(crate) fn widen<T: Element>(source: &[T], target: &mut [T::Acc]) {
    if T::DTYPE == DType::F16 {
        let source: &[f16] = bytemuck::cast_slice(source);
        source.convert_to_f32_slice(bytemuck::cast_slice_mut(target));
        return;
    }
    for (y, &x) in target.iter_mut().zip(source) {
        *y = x.to_acc();
    }
}

/// Rounds a slice to nearest, ties to even.
#[inline(always)]
pub(crate) fn narrow<T: Element>(source: &[T::Acc], target: &mut [T]) {
    if T::DTYPE == DType::F16 {
        let target: &mut [f16] = bytemuck::cast_slice_mut(target);
        target.convert_from_f32_slice(bytemuck::cast_slice(source));
        return;
    }
    for (y, &x) in target.iter_mut().zip(source) {
        *y = T::from_acc(x);
    }
}

/// The elements themselves if they are stored in the type that is computed with.
#[inline(always)]
pub(crate) fn as_acc<T: Element>(source: &[T]) -> Option<&[T::Acc]> {
    (T::DTYPE == T::Acc::DTYPE).then(|| bytemuck::cast_slice(source))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the exact value.
    fn ulps(got: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        if nearest.is_infinite() || got.is_infinite() {
            return if got == nearest { 0.0 } else { f64::INFINITY };
        }
        let ulp = f64::from(nearest.next_up()) - f64::from(nearest);
        (f64::from(got) - exact).abs() / ulp
    }

    #[test]
    fn exp_is_within_two_ulp_over_the_range() {
        let mut worst = 0.0f64;
        // Every 1009th float of both signs.
        for bits in (0..0x7f80_0000u32).step_by(1009) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                worst = worst.max(ulps(exp_f32(x), f64::from(x).exp()));
            }
        }
        assert!(worst < 2.0, "{worst} ulp");
    }

    #[test]
    fn exp_of_the_special_values() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!((exp(0.0f32), exp(-0.0f32)), (1.0, 1.0));
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
        assert_eq!(exp(1.0f64), std::f64::consts::E);
    }

    #[test]
    fn conversions_equal_the_scalar_ones() {
        let source: Vec<f16> = (0..=u16::MAX).step_by(7).map(f16::from_bits).filter(|x| !x.is_nan()).collect();
        let mut wide = vec![0.0f32; source.len()];
        widen(&source, &mut wide);
        assert!(source.iter().zip(&wide).all(|(x, &y)| x.to_f32() == y));
        let mut back = vec![f16::ZERO; source.len()];
        narrow(&wide, &mut back);
        assert_eq!(source, back);
        assert!(as_acc(&source).is_none() && as_acc(&wide).is_some());
    }
}
