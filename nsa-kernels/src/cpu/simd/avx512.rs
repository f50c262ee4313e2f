//! Vectors of AVX-512, and products of pairs of bf16.

use super::{Compute, Exponent, Multiply, Simd};
use crate::cpu::unit::Pair;
use half::bf16;
use std::arch::x86_64::*;
use std::ops::Range;

/// Proof of AVX-512 F, BW, DQ and VL: made in [`run`] and [`Avx512Bf16::run`] alone, whose callers have found them.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Runs a kernel compiled for AVX-512.
pub(super) fn run(kernel: impl Compute<f32>) {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    fn inner(kernel: impl Compute<f32>) {
        kernel.run(Avx512(()));
    }
    // SAFETY: no `Cpu` is made of an instruction set whose features `Isa::missing` did not find.
    unsafe { inner(kernel) }
}

/// Proof of AVX-512 with BF16: made in [`Avx512Bf16::run`] alone, whose caller has found it.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(Avx512);

/// A kernel over products of pairs. Its body and all that it calls are `#[inline(always)]`.
pub(crate) trait ComputePairs {
    /// The kernel.
    fn run(self, bf16: Avx512Bf16);
}

impl Avx512Bf16 {
    /// Runs a kernel compiled for AVX-512 with BF16.
    pub(crate) fn run(kernel: impl ComputePairs) {
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
        fn inner(kernel: impl ComputePairs) {
            kernel.run(Avx512Bf16(Avx512(())));
        }
        // SAFETY: pairs are the units of a `Cpu` with `Isa::Avx512Bf16` alone, and none is made whose features
        // `Isa::missing` did not find.
        unsafe { inner(kernel) }
    }

    /// Rounds 32 floats to bf16, to nearest, ties to even (subnormal ones to zero): 16 pairs of neighbours.
    #[inline(always)]
    pub(crate) fn pairs_of_neighbours(self, source: &[f32], target: &mut [Pair<f32>]) {
        let (low, high) = (self.0.read(source), self.0.read(&source[16..]));
        let target = &mut target[..16];
        // SAFETY: a value of the type proves the feature; the slice has 16 pairs, 64 bytes.
        unsafe {
            let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(target.as_mut_ptr().cast(), pairs);
        }
    }

    /// Pairs of one element of each of two rows: 32 pairs.
    #[inline(always)]
    pub(crate) fn interleave(self, low: &[u16; 32], high: &[u16; 32], target: &mut [Pair<f32>]) {
        // Numbers of elements: from 32 on those of the second row.
        const FIRST: [u16; 32] = pair_places(0);
        const SECOND: [u16; 32] = pair_places(16);
        let target = &mut target[..32];
        // SAFETY: a value of the type proves the features; the arrays have 64 bytes and the slice has 32 pairs, 128 bytes.
        unsafe {
            let load = |elements: &[u16; 32]| _mm512_loadu_si512(elements.as_ptr().cast());
            let (low, high) = (load(low), load(high));
            let first = _mm512_permutex2var_epi16(low, load(&FIRST), high);
            let second = _mm512_permutex2var_epi16(low, load(&SECOND), high);
            _mm512_storeu_si512(target.as_mut_ptr().cast(), first);
            _mm512_storeu_si512(target[16..].as_mut_ptr().cast(), second);
        }
    }

    /// Rounds 16 floats of each of two rows: 16 pairs of one element of each.
    #[inline(always)]
    pub(crate) fn pairs_of_rows(self, rows: [&[f32]; 2], target: &mut [Pair<f32>]) {
        let [low, high] = rows.map(|row| self.0.read(row));
        let target = &mut target[..16];
        // SAFETY: a value of the type proves the feature; the slice has 16 pairs, 64 bytes.
        unsafe {
            let widened = |v| -> __m512i { _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(v)) };
            let (low, high) = (widened(_mm512_cvtneps_pbh(low)), widened(_mm512_cvtneps_pbh(high)));
            let pairs = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
            _mm512_storeu_si512(target.as_mut_ptr().cast(), pairs);
        }
    }
}

/// Places of the elements of 16 pairs, from column `first` on, in two rows of 32.
const fn pair_places(first: u16) -> [u16; 32] {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 32 {
        places[i] = first + i as u16 / 2 + i as u16 % 2 * 32;
        i += 1;
    }
    places
}

/// Mask of a range of lanes.
#[inline(always)]
fn mask(lanes: Range<usize>) -> __mmask16 {
    let below = |end: usize| (1u32 << end.min(16)) - 1;
    (below(lanes.end) & !below(lanes.start)) as __mmask16
}

impl Simd<f32> for Avx512 {
    type V = __m512;
    const WIDTH: usize = 16;
    const BLOCK: [usize; 2] = [6, 4];

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: a value of the type proves the feature, here and below.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: the caller says that the elements can be read; the load needs no alignment.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m512 {
        // SAFETY: the caller says that 16 of 16 bits can be read; the load needs no alignment.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: the caller says that the elements can be written; the store needs no alignment.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn exp(self, x: __m512) -> __m512 {
        super::exp(self, x)
    }
    #[inline(always)]
    fn any_greater(self, a: __m512, b: __m512) -> bool {
        // SAFETY: see `splat`.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0 }
    }
    #[inline(always)]
    fn keep(self, v: __m512, lanes: Range<usize>, other: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_mask_blend_ps(mask(lanes), other, v) }
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: see `splat`.
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    fn greatest(self, v: __m512) -> f32 {
        // SAFETY: see `splat`. The first maximum puts −∞ in the place of NaN.
        unsafe { _mm512_reduce_max_ps(_mm512_max_ps(v, _mm512_set1_ps(f32::NEG_INFINITY))) }
    }
}

impl Exponent for Avx512 {
    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
    }
    #[inline(always)]
    fn times_power_of_two(self, v: __m512, n: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_scalef_ps(v, n) }
    }
}

impl Multiply<Pair<f32>, f32> for Avx512Bf16 {
    type Simd = Avx512;
    type Units = __m512bh;

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    unsafe fn splat_unit(self, p: *const Pair<f32>) -> __m512bh {
        // SAFETY: the caller says that the pair, 32 bits, can be read; a value of the type proves the feature.
        unsafe { std::mem::transmute(_mm512_set1_epi32(p.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn load_units(self, p: *const Pair<f32>) -> __m512bh {
        // SAFETY: the caller says that 16 pairs can be read; the load needs no alignment.
        unsafe { std::mem::transmute(_mm512_loadu_si512(p.cast())) }
    }
    #[inline(always)]
    fn multiply_add(self, a: __m512bh, b: __m512bh, sum: __m512) -> __m512 {
        // SAFETY: a value of the type proves the feature.
        unsafe { _mm512_dpbf16_ps(sum, a, b) }
    }
    #[inline(always)]
    fn keep_elements(self, units: __m512bh, elements: Range<usize>) -> __m512bh {
        let half = |x: usize| if elements.contains(&x) { 0xffff_u32 } else { 0 };
        let mask = half(0) | half(1) << 16;
        // SAFETY: a value of the type proves the feature.
        unsafe {
            let units: __m512i = std::mem::transmute(units);
            std::mem::transmute(_mm512_and_si512(units, _mm512_set1_epi32(mask as i32)))
        }
    }
}
