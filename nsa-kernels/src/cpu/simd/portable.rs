//! Vectors as arrays, which the compiler keeps in whatever registers the target has.

use super::{Exponent, Simd};
use half::bf16;
use nsa_core::{DType, Element, Real};
use std::ops::Range;

/// The vectors of every processor.
#[derive(Clone, Copy)]
pub(super) struct Portable;

/// Two registers of f32 with 128 bits: one chain of additions would wait for itself.
const LANES: usize = 8;

impl<A: Real> Simd<A> for Portable {
    type V = [A; LANES];
    const WIDTH: usize = LANES;
    const BLOCK: [usize; 2] = [4, 1];

    #[inline(always)]
    fn splat(self, x: A) -> [A; LANES] {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const A) -> [A; LANES] {
        // SAFETY: the caller says that the elements can be read; an array is aligned as its elements are.
        unsafe { p.cast::<[A; LANES]>().read() }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> [A; LANES] {
        // SAFETY: the caller says that the elements can be read; an array is aligned as its elements are.
        let elements = unsafe { p.cast::<[bf16; LANES]>().read() };
        // Both branches are known when compiled.
        if A::DTYPE == DType::F32 {
            elements.map(|x| bytemuck::cast(x.to_acc()))
        } else {
            elements.map(|x| A::of(x.to_acc().into()))
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut A, v: [A; LANES]) {
        // SAFETY: the caller says that the elements can be written; an array is aligned as its elements are.
        unsafe { p.cast::<[A; LANES]>().write(v) }
    }
    #[inline(always)]
    fn add(self, a: [A; LANES], b: [A; LANES]) -> [A; LANES] {
        std::array::from_fn(|x| a[x] + b[x])
    }
    #[inline(always)]
    fn sub(self, a: [A; LANES], b: [A; LANES]) -> [A; LANES] {
        std::array::from_fn(|x| a[x] - b[x])
    }
    #[inline(always)]
    fn mul(self, a: [A; LANES], b: [A; LANES]) -> [A; LANES] {
        std::array::from_fn(|x| a[x] * b[x])
    }
    #[inline(always)]
    fn mul_add(self, a: [A; LANES], b: [A; LANES], c: [A; LANES]) -> [A; LANES] {
        std::array::from_fn(|x| a[x] * b[x] + c[x])
    }
    #[inline(always)]
    fn max(self, a: [A; LANES], b: [A; LANES]) -> [A; LANES] {
        std::array::from_fn(|x| if a[x] > b[x] { a[x] } else { b[x] })
    }
    #[inline(always)]
    fn exp(self, v: [A; LANES]) -> [A; LANES] {
        // Both branches are known when compiled.
        if A::DTYPE == DType::F32 {
            let v: [f32; LANES] = std::array::from_fn(|x| bytemuck::cast(v[x]));
            let v = super::exp(self, v);
            std::array::from_fn(|x| bytemuck::cast(v[x]))
        } else {
            v.map(A::exp)
        }
    }
    #[inline(always)]
    fn any_greater(self, a: [A; LANES], b: [A; LANES]) -> bool {
        a.iter().zip(&b).fold(false, |any, (a, b)| any | (a > b))
    }
    #[inline(always)]
    fn keep(self, v: [A; LANES], lanes: Range<usize>, other: [A; LANES]) -> [A; LANES] {
        std::array::from_fn(|x| if lanes.contains(&x) { v[x] } else { other[x] })
    }
    #[inline(always)]
    fn sum(self, v: [A; LANES]) -> A {
        let half: [A; 4] = std::array::from_fn(|x| v[x] + v[x + 4]);
        (half[0] + half[2]) + (half[1] + half[3])
    }
    #[inline(always)]
    fn greatest(self, v: [A; LANES]) -> A {
        v.into_iter().fold(A::neg_infinity(), |a, b| if b > a { b } else { a })
    }
}

impl Exponent for Portable {
    #[inline(always)]
    fn round(self, v: [f32; LANES]) -> [f32; LANES] {
        // Adding 1.5 · 2^23 leaves no bits for a fraction.
        const ROUND: f32 = 12_582_912.0;
        v.map(|x| (x + ROUND) - ROUND)
    }
    #[inline(always)]
    fn times_power_of_two(self, v: [f32; LANES], n: [f32; LANES]) -> [f32; LANES] {
        // In two halves, so that subnormal results round once and n = 128 does not overflow early. NaN becomes 0.
        let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
        std::array::from_fn(|x| {
            let n = n[x] as i32;
            let half = n >> 1;
            v[x] * power(half) * power(n.wrapping_sub(half))
        })
    }
}
