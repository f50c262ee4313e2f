//! Vectors: the thin layer between the generic kernels and the instruction sets. A kernel is written once, over [`Simd`],
//! as a [`Compute`]; [`vectorize`] compiles it once an instruction set, inside a function that has the features
//! enabled, and runs the one that was chosen. Everything between that function and the intrinsics is inlined.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::{Avx512Bf16, ComputePairs};

use crate::cpu::isa::Isa;
use half::bf16;
use nsa_core::{DType, Real};
use std::ops::Range;

/// Elements that rows of scratch memory are padded to: whole vectors of any instruction set.
pub(crate) const PAD: usize = 16;

/// A length rounded up to whole vectors.
pub(crate) const fn padded(len: usize) -> usize {
    len.next_multiple_of(PAD)
}

/// Asks for the cache line at `p`: a hint, free of effects at any address, for what is read soon in an order that the
/// processor does not foresee.
#[inline(always)]
pub(crate) fn prefetch_line(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction, which reads nothing that a program sees and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Asks for the cache lines of a slice.
#[inline(always)]
pub(crate) fn prefetch<T>(data: &[T]) {
    for at in (0..size_of_val(data)).step_by(64) {
        prefetch_line(data.as_ptr().cast::<u8>().wrapping_add(at));
    }
}

/// Vectors of [`Simd::WIDTH`] elements. A value proves that the processor has the instructions.
pub(crate) trait Simd<A: Real>: Copy {
    /// A vector.
    type V: Copy;
    /// Elements of a vector; divides [`PAD`].
    const WIDTH: usize;
    /// Rows and vectors of a block of a product: as many sums as leave registers for the operands.
    const BLOCK: [usize; 2];

    /// All lanes `x`.
    fn splat(self, x: A) -> Self::V;
    /// The elements from `p` on.
    ///
    /// # Safety
    /// WIDTH elements at `p` can be read.
    unsafe fn load(self, p: *const A) -> Self::V;
    /// The bf16 from `p` on, widened.
    ///
    /// # Safety
    /// WIDTH of them at `p` can be read.
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V;
    /// Writes the lanes from `p` on.
    ///
    /// # Safety
    /// WIDTH elements at `p` can be written.
    unsafe fn store(self, p: *mut A, v: Self::V);
    /// a + b.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a − b.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once where the processor can.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The greater of each lane; b where one is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// e^x for x ≤ 88, which is all that a softmax asks for: in f32 within 2 ulp; 0 for −∞. Unspecified beyond.
    fn exp(self, x: Self::V) -> Self::V;
    /// Whether some lane of a is greater than that of b.
    fn any_greater(self, a: Self::V, b: Self::V) -> bool;
    /// The lanes in `lanes` of `v`, the others of `other`.
    fn keep(self, v: Self::V, lanes: Range<usize>, other: Self::V) -> Self::V;
    /// The sum of the lanes, halves added to halves.
    fn sum(self, v: Self::V) -> A;
    /// The greatest lane; NaN is passed over where another is greater than −∞.
    fn greatest(self, v: Self::V) -> A;

    /// The first WIDTH elements.
    #[inline(always)]
    fn read(self, data: &[A]) -> Self::V {
        let data = &data[..Self::WIDTH];
        // SAFETY: the slice has WIDTH elements.
        unsafe { self.load(data.as_ptr()) }
    }

    /// The first WIDTH bf16, widened.
    #[inline(always)]
    fn read_bf16(self, data: &[bf16]) -> Self::V {
        let data = &data[..Self::WIDTH];
        // SAFETY: the slice has WIDTH elements.
        unsafe { self.load_bf16(data.as_ptr()) }
    }

    /// Overwrites the first WIDTH elements.
    #[inline(always)]
    fn write(self, data: &mut [A], v: Self::V) {
        let data = &mut data[..Self::WIDTH];
        // SAFETY: the slice has WIDTH elements.
        unsafe { self.store(data.as_mut_ptr(), v) }
    }
}

/// How units of a product's operands are multiplied: one element at a time, or several of them summed at once.
pub(crate) trait Multiply<U: Copy, A: Real>: Copy {
    /// The vectors of results.
    type Simd: Simd<A>;
    /// A vector of units, as many as `Simd` has lanes.
    type Units: Copy;

    /// The vectors of results.
    fn simd(self) -> Self::Simd;
    /// All lanes the unit at `p`.
    ///
    /// # Safety
    /// A unit at `p` can be read.
    unsafe fn splat_unit(self, p: *const U) -> Self::Units;
    /// The units from `p` on.
    ///
    /// # Safety
    /// `Simd::WIDTH` units at `p` can be read.
    unsafe fn load_units(self, p: *const U) -> Self::Units;
    /// sum + Σ over the elements of a unit of a · b.
    fn multiply_add(
        self,
        a: Self::Units,
        b: Self::Units,
        sum: <Self::Simd as Simd<A>>::V,
    ) -> <Self::Simd as Simd<A>>::V;
    /// Units with their elements outside `elements` set to zero.
    fn keep_elements(self, units: Self::Units, elements: Range<usize>) -> Self::Units;
}

/// Elements that are multiplied one at a time, by the vectors themselves.
impl<A: Real, S: Simd<A>> Multiply<A, A> for S {
    type Simd = S;
    type Units = S::V;

    #[inline(always)]
    fn simd(self) -> S {
        self
    }
    #[inline(always)]
    unsafe fn splat_unit(self, p: *const A) -> S::V {
        // SAFETY: the caller says that the element can be read.
        self.splat(unsafe { *p })
    }
    #[inline(always)]
    unsafe fn load_units(self, p: *const A) -> S::V {
        // SAFETY: the caller says that the elements can be read.
        unsafe { self.load(p) }
    }
    #[inline(always)]
    fn multiply_add(self, a: S::V, b: S::V, sum: S::V) -> S::V {
        self.mul_add(a, b, sum)
    }
    #[inline(always)]
    fn keep_elements(self, units: S::V, elements: Range<usize>) -> S::V {
        if elements.is_empty() { self.splat(A::zero()) } else { units }
    }
}

/// A kernel over vectors of `A`. Its body and all that it calls are `#[inline(always)]`.
pub(crate) trait Compute<A: Real> {
    /// The same kernel on another type.
    type As<B: Real>: Compute<B>;

    /// The kernel.
    fn run<S: Simd<A>>(self, simd: S);
    /// The same under the name of the concrete type, which is this one.
    fn cast<B: Real>(self) -> Self::As<B>;
}

/// Runs a kernel with the instructions of `isa`, which the machine has. f64 has portable vectors alone.
pub(crate) fn vectorize<A: Real>(isa: Isa, kernel: impl Compute<A>) {
    if A::DTYPE == DType::F64 {
        return kernel.cast::<f64>().run(portable::Portable);
    }
    let kernel = kernel.cast::<f32>();
    match isa {
        Isa::Portable => kernel.run(portable::Portable),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::run(kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::run(kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => avx512::run(kernel),
        _ => unreachable!("no backend is made of an instruction set that is missing"),
    }
}

/// Plain loops that the compiler vectorises: without fused operations, so that their bits are the same on every
/// instruction set. The body and all that it calls are `#[inline(always)]`.
pub(crate) trait Loops {
    /// The loops.
    fn run(self);
}

/// Runs loops compiled for the instructions of `isa`, which the machine has.
pub(crate) fn compiled_for(isa: Isa, loops: impl Loops) {
    vectorize::<f32>(isa, Compiled(loops));
}

/// Loops as a kernel that needs no vectors by name.
struct Compiled<L>(L);

impl<A: Real, L: Loops> Compute<A> for Compiled<L> {
    type As<B: Real> = Self;

    #[inline(always)]
    fn run<S: Simd<A>>(self, _: S) {
        self.0.run();
    }
    fn cast<B: Real>(self) -> Self {
        self
    }
}

/// What an exponential needs beside [`Simd`]'s arithmetic.
trait Exponent: Simd<f32> {
    /// The nearest integer, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// v · 2^n for integral n in −151..=127, rounded once.
    fn times_power_of_two(self, v: Self::V, n: Self::V) -> Self::V;
}

/// e^x = 2^n · e^r with n = round(x / ln 2) and |r| ≤ ln 2 / 2; e^r by its Taylor series, whose first term left out is
/// below 6e-9.
#[inline(always)]
fn exp<S: Exponent>(s: S, x: S::V) -> S::V {
    // ln 2 in two parts; the first has 9 bits, so n times it is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Below this the result is 0. NaN passes through.
    let x = s.max(s.splat(-104.0), x);
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.mul_add(n, s.splat(-LN2_HIGH), x);
    let r = s.mul_add(n, s.splat(-LN2_LOW), r);
    let mut y = s.splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5] {
        y = s.mul_add(y, r, s.splat(c));
    }
    let y = s.mul_add(s.mul(r, r), y, r);
    s.times_power_of_two(s.add(y, s.splat(1.0)), n)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls exp on whole vectors.
    struct Exp<'a, A>(&'a mut [A]);

    impl<'a, A: Real> Compute<A> for Exp<'a, A> {
        type As<B: Real> = Exp<'a, B>;
        #[inline(always)]
        fn run<S: Simd<A>>(self, s: S) {
            for part in self.0.chunks_exact_mut(S::WIDTH) {
                let x = s.read(part);
                s.write(part, s.exp(x));
            }
        }
        fn cast<B: Real>(self) -> Exp<'a, B> {
            Exp(bytemuck::cast_slice_mut(self.0))
        }
    }

    /// Distance in units of the last place of the exact value.
    fn ulps(got: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        if nearest.is_infinite() || got.is_infinite() {
            return if got == nearest { 0.0 } else { f64::INFINITY };
        }
        (f64::from(got) - exact).abs() / (f64::from(nearest.next_up()) - f64::from(nearest))
    }

    #[test]
    fn exp_is_within_two_ulp_over_the_range_on_every_isa() {
        // Every 1009th float of both signs, to whole vectors.
        let floats = (0..0x7f80_0000u32).step_by(1009).map(f32::from_bits);
        let mut x: Vec<f32> = floats.flat_map(|x| [x.min(88.0), -x]).collect();
        x.truncate(x.len() / PAD * PAD);
        for isa in Isa::available() {
            let mut y = x.clone();
            vectorize(isa, Exp(&mut y));
            let worst = x.iter().zip(&y).map(|(&x, &y)| ulps(y, f64::from(x).exp())).fold(0.0, f64::max);
            println!("{isa}: {worst:.3} ulp");
            assert!(worst < 2.0, "{isa}: {worst} ulp");
        }
    }

    #[test]
    fn exp_of_the_special_values() {
        for isa in Isa::available() {
            let mut x = [0.0; PAD];
            x[..4].copy_from_slice(&[f32::NEG_INFINITY, f32::MIN, -0.0, f32::NAN]);
            vectorize(isa, Exp(&mut x));
            assert_eq!((x[0], x[1], x[2], x[4]), (0.0, 0.0, 1.0, 1.0), "{isa}");
            assert!(x[3].is_nan(), "{isa}");
        }
    }

    /// Widens whole vectors.
    struct Widen<'a, A>(&'a [bf16], &'a mut [A]);

    impl<'a, A: Real> Compute<A> for Widen<'a, A> {
        type As<B: Real> = Widen<'a, B>;
        #[inline(always)]
        fn run<S: Simd<A>>(self, s: S) {
            for (source, target) in self.0.chunks_exact(S::WIDTH).zip(self.1.chunks_exact_mut(S::WIDTH)) {
                s.write(target, s.read_bf16(source));
            }
        }
        fn cast<B: Real>(self) -> Widen<'a, B> {
            Widen(self.0, bytemuck::cast_slice_mut(self.1))
        }
    }

    #[test]
    fn every_bf16_is_widened_on_every_isa() {
        let source: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        for isa in Isa::available() {
            let mut wide = vec![0.0f32; source.len()];
            vectorize(isa, Widen(&source, &mut wide));
            let bits = |x: f32| x.to_bits() >> 16;
            assert!(source.iter().zip(&wide).all(|(x, &y)| u32::from(x.to_bits()) == bits(y)), "{isa}");
        }
        let mut wide = vec![0.0f64; 32];
        vectorize(Isa::Portable, Widen(&source[..32], &mut wide));
        assert!(source.iter().zip(&wide).all(|(x, &y)| x.to_f64() == y));
    }

    /// Results of a vector's methods, and its width.
    const RESULTS: usize = 12;

    /// Every method beside loads, stores and exp, on three rows: `[RESULTS, PAD]`.
    struct Methods<'a, A> {
        operands: [&'a [A]; 3],
        results: &'a mut [A],
    }

    impl<'a, A: Real> Compute<A> for Methods<'a, A> {
        type As<B: Real> = Methods<'a, B>;
        #[inline(always)]
        fn run<S: Simd<A>>(self, s: S) {
            for at in (0..PAD).step_by(S::WIDTH) {
                let [a, b, c] = self.operands.map(|x| s.read(&x[at..]));
                let vectors = [
                    s.add(a, b),
                    s.sub(a, b),
                    s.mul(a, b),
                    s.mul_add(a, b, c),
                    s.max(a, b),
                    s.splat(A::of(f64::from(u8::from(s.any_greater(a, b))))),
                    s.keep(a, 1..3, b),
                    s.keep(a, 0..S::WIDTH, b),
                    s.keep(a, 2..2, b),
                    s.splat(s.sum(a)),
                    s.splat(s.greatest(a)),
                    s.splat(A::of(S::WIDTH as f64)),
                ];
                for (row, v) in vectors.into_iter().enumerate() {
                    s.write(&mut self.results[row * PAD + at..], v);
                }
            }
        }
        fn cast<B: Real>(self) -> Methods<'a, B> {
            Methods {
                operands: self.operands.map(bytemuck::cast_slice),
                results: bytemuck::cast_slice_mut(self.results),
            }
        }
    }

    fn methods_are_plain_arithmetic<A: Real>(isa: Isa) {
        // Small integers: all results are exact.
        let numbers = |step: usize| std::array::from_fn(|i| A::of(((i * step + 3) % 13) as f64 - 6.0));
        let (mut a, b, c): ([A; PAD], [A; PAD], [A; PAD]) = (numbers(5), numbers(7), numbers(3));
        a[5] = A::nan();
        let mut results = vec![A::zero(); RESULTS * PAD];
        vectorize(isa, Methods { operands: [&a, &b, &c], results: &mut results });
        let width = results[RESULTS * PAD - 1].to_f64() as usize;
        assert!(PAD.is_multiple_of(width));
        for i in 0..PAD {
            let (lane, part) = (i % width, &a[i / width * width..][..width]);
            let greatest = part.iter().copied().filter(|x| !x.is_nan()).fold(A::neg_infinity(), A::max);
            let expected = [
                a[i] + b[i],
                a[i] - b[i],
                a[i] * b[i],
                a[i] * b[i] + c[i],
                if a[i] > b[i] { a[i] } else { b[i] },
                A::of(f64::from(u8::from(part.iter().zip(&b[i / width * width..]).any(|(a, b)| a > b)))),
                if (1..3).contains(&lane) { a[i] } else { b[i] },
                a[i],
                b[i],
                part.iter().copied().sum(),
                greatest,
            ];
            for (row, x) in expected.iter().enumerate() {
                let y = results[row * PAD + i];
                assert!(y == *x || (y.is_nan() && x.is_nan()), "{isa}: method {row}, lane {i}: {y:?} {x:?}");
            }
        }
    }

    #[test]
    fn methods_are_plain_arithmetic_on_every_isa() {
        methods_are_plain_arithmetic::<f64>(Isa::Portable);
        Isa::available().for_each(methods_are_plain_arithmetic::<f32>);
    }
}
