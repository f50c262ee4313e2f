//! Vectors of NEON.

use super::{Compute, Exponent, Simd};
use half::bf16;
use std::arch::aarch64::*;
use std::ops::Range;

/// Proof of NEON: made in [`run`] alone, whose caller has found it.
#[derive(Clone, Copy)]
pub(super) struct Neon(());

/// Runs a kernel compiled for NEON.
pub(super) fn run(kernel: impl Compute<f32>) {
    #[target_feature(enable = "neon")]
    fn inner(kernel: impl Compute<f32>) {
        kernel.run(Neon(()));
    }
    // SAFETY: no `Cpu` is made of an instruction set whose features `Isa::missing` did not find.
    unsafe { inner(kernel) }
}

/// Four from 4 − x on have all bits set in the lanes from x on.
const EDGES: [u32; 8] = [0, 0, 0, 0, u32::MAX, u32::MAX, u32::MAX, u32::MAX];

impl Neon {
    /// All bits of the lanes from `start` on.
    #[inline(always)]
    fn from(self, start: usize) -> uint32x4_t {
        let edges = &EDGES[4 - start.min(4)..][..4];
        // SAFETY: four elements, as the slice says; a value of the type proves the feature.
        unsafe { vld1q_u32(edges.as_ptr()) }
    }
}

impl Simd<f32> for Neon {
    type V = float32x4_t;
    const WIDTH: usize = 4;
    /// 24 sums, four vectors and one of a row's elements in 32 registers.
    const BLOCK: [usize; 2] = [6, 4];

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        // SAFETY: a value of the type proves the feature, here and below.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> float32x4_t {
        // SAFETY: the caller says that the elements can be read; the load needs no more alignment than they have.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> float32x4_t {
        // SAFETY: the caller says that 4 of 16 bits can be read; the load needs no more alignment than they have.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: float32x4_t) {
        // SAFETY: the caller says that the elements can be written; the store needs no more alignment than they have.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see `splat`.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see `splat`.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see `splat`.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: see `splat`.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see `splat`. The instruction for a maximum would answer NaN for NaN in a.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn exp(self, x: float32x4_t) -> float32x4_t {
        super::exp(self, x)
    }
    #[inline(always)]
    fn any_greater(self, a: float32x4_t, b: float32x4_t) -> bool {
        // SAFETY: see `splat`.
        unsafe { vmaxvq_u32(vcgtq_f32(a, b)) != 0 }
    }
    #[inline(always)]
    fn keep(self, v: float32x4_t, lanes: Range<usize>, other: float32x4_t) -> float32x4_t {
        let (start, end) = (self.from(lanes.start), self.from(lanes.end));
        // SAFETY: see `splat`.
        unsafe { vbslq_f32(vbicq_u32(start, end), v, other) }
    }
    #[inline(always)]
    fn sum(self, v: float32x4_t) -> f32 {
        // SAFETY: see `splat`.
        unsafe {
            let half = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(half) + vget_lane_f32::<1>(half)
        }
    }
    #[inline(always)]
    fn greatest(self, v: float32x4_t) -> f32 {
        // SAFETY: see `splat`. This maximum passes over NaN; −∞ takes its place if there is nothing else.
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(v, vdupq_n_f32(f32::NEG_INFINITY))) }
    }
}

impl Exponent for Neon {
    #[inline(always)]
    fn round(self, v: float32x4_t) -> float32x4_t {
        // SAFETY: see `splat`.
        unsafe { vrndnq_f32(v) }
    }
    #[inline(always)]
    fn times_power_of_two(self, v: float32x4_t, n: float32x4_t) -> float32x4_t {
        // SAFETY: see `splat`. In two halves, so that subnormal results round once and n = 128 does not overflow early.
        unsafe {
            let power = |n| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))));
            let n = vcvtq_s32_f32(n);
            let half = vshrq_n_s32::<1>(n);
            vmulq_f32(vmulq_f32(v, power(half)), power(vsubq_s32(n, half)))
        }
    }
}
