//! Vectors of AVX2 and FMA.

use super::{Compute, Exponent, Simd};
use half::bf16;
use std::arch::x86_64::*;
use std::ops::Range;

/// Proof of AVX2 and FMA: made in [`run`] alone, whose caller has found them.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Runs a kernel compiled for AVX2 and FMA.
pub(super) fn run(kernel: impl Compute<f32>) {
    #[target_feature(enable = "avx2,fma")]
    fn inner(kernel: impl Compute<f32>) {
        kernel.run(Avx2(()));
    }
    // SAFETY: no `Cpu` is made of an instruction set whose features `Isa::missing` did not find.
    unsafe { inner(kernel) }
}

/// Eight from 8 − x on have all bits set in the lanes from x on.
const EDGES: [i32; 16] = [0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1];

impl Avx2 {
    /// All bits of the lanes below `end`.
    #[inline(always)]
    fn below(self, end: usize) -> __m256i {
        let edges = &EDGES[8 - end.min(8)..][..8];
        // SAFETY: eight elements, as the slice says; a value of the type proves the feature.
        let behind = unsafe { _mm256_loadu_si256(edges.as_ptr().cast()) };
        // SAFETY: a value of the type proves the feature.
        unsafe { _mm256_xor_si256(behind, _mm256_set1_epi32(-1)) }
    }
}

impl Simd<f32> for Avx2 {
    type V = __m256;
    const WIDTH: usize = 8;
    const BLOCK: [usize; 2] = [6, 2];

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: a value of the type proves the feature, here and below.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: the caller says that the elements can be read; the load needs no alignment.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m256 {
        // SAFETY: the caller says that 8 of 16 bits can be read; the load needs no alignment.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: the caller says that the elements can be written; the store needs no alignment.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn exp(self, x: __m256) -> __m256 {
        super::exp(self, x)
    }
    #[inline(always)]
    fn any_greater(self, a: __m256, b: __m256) -> bool {
        // SAFETY: see `splat`.
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) != 0 }
    }
    #[inline(always)]
    fn keep(self, v: __m256, lanes: Range<usize>, other: __m256) -> __m256 {
        let (start, end) = (self.below(lanes.start), self.below(lanes.end));
        // SAFETY: see `splat`.
        unsafe { _mm256_blendv_ps(other, v, _mm256_castsi256_ps(_mm256_andnot_si256(start, end))) }
    }
    #[inline(always)]
    fn sum(self, v: __m256) -> f32 {
        // SAFETY: see `splat`.
        unsafe {
            let half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)))
        }
    }
    #[inline(always)]
    fn greatest(self, v: __m256) -> f32 {
        // SAFETY: see `splat`. The first maximum puts −∞ in the place of NaN.
        unsafe {
            let v = _mm256_max_ps(v, _mm256_set1_ps(f32::NEG_INFINITY));
            let half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_max_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)))
        }
    }
}

impl Exponent for Avx2 {
    #[inline(always)]
    fn round(self, v: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
    }
    #[inline(always)]
    fn times_power_of_two(self, v: __m256, n: __m256) -> __m256 {
        // SAFETY: see `splat`. In two halves, so that subnormal results round once and n = 128 does not overflow early.
        unsafe {
            let power = |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))));
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            _mm256_mul_ps(_mm256_mul_ps(v, power(half)), power(_mm256_sub_epi32(n, half)))
        }
    }
}
