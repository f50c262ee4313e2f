//! Products summed in f32 as a tensor core does it: 16 rows of A, 8 columns of B, up to 16 deep.
//!
//! A tensor core of an H100 lines all products and the addend up with the largest (by the sum of its factors' exponents),
//! cuts each off 25 bits behind that one's leading bit, adds them exactly and cuts the sum to f32. [`Tile::exactly`] computes
//! that in f64, whatever the numbers. [`Tile::multiply`] does the same in f32 and integers where the numbers allow it, which
//! is nearly always: factors are scaled by their row's and column's largest exponent, a product of two has at most 22 bits,
//! and scaled once more so that the last bit kept is 1, what is behind it falls to the conversion to an integer.

use crate::number::{Rounding, to_f32};

/// Rows of A.
pub const ROWS: usize = 16;
/// Columns of B.
pub const COLUMNS: usize = 8;
/// The deepest product.
pub const DEPTH: usize = 16;

/// Bits behind the leading one of the largest term that a sum keeps.
const KEPT: i32 = 25;
/// The exponent of zero: below every other.
const NOTHING: i32 = -5000;
/// Exponents of the largest term between which all sums and scales are normal numbers of f32.
const LOWEST: i32 = -100;
const HIGHEST: i32 = 127;
/// From this exponent on a term is infinite or NaN.
const BEYOND: i32 = 1024;
/// The least exponent of the largest term against the factors' largest: smaller terms may lose bits in f32.
const LEAST: i32 = -60;
/// The depth of products of tf32.
const SHORT: usize = 8;

type Lanes<T> = [T; ROWS];

/// The operands of a product. All numbers of 16 bits and tf32 are numbers of f32.
#[derive(Clone, Debug)]
pub struct Tile {
    /// A: along the depth, all rows.
    pub a: [Lanes<f32>; DEPTH],
    /// B: along the depth, all columns.
    pub b: [[f32; COLUMNS]; DEPTH],
    /// The addend, then the sum: column by column, all rows.
    pub c: [Lanes<f32>; COLUMNS],
    /// How deep.
    pub depth: usize,
}

impl Tile {
    /// A product of zeros.
    pub fn new(depth: usize) -> Self {
        Self { a: [[0.0; ROWS]; DEPTH], b: [[0.0; COLUMNS]; DEPTH], c: [[0.0; ROWS]; COLUMNS], depth }
    }

    /// c += a b
    #[inline(always)]
    pub fn multiply(&mut self, vectors: impl Vectors) {
        let done = if self.depth <= SHORT { self.quickly::<SHORT>(vectors) } else { self.quickly::<DEPTH>(vectors) };
        if !done {
            self.exactly();
        }
    }

    /// c += a b, for any numbers.
    #[cold]
    #[inline(never)]
    pub fn exactly(&mut self) {
        for column in 0..COLUMNS {
            for row in 0..ROWS {
                let factors = (0..self.depth).map(|k| (f64::from(self.a[k][row]), f64::from(self.b[k][column])));
                self.c[column][row] = sum(factors, f64::from(self.c[column][row]));
            }
        }
    }

    /// c += a b, where numbers are such that f32 and 32 bits hold all that counts. Else nothing changes and the answer is
    /// `false`: infinities, NaN, subnormal addends, sums near the ends of f32's range, and rows and columns whose large
    /// numbers meet only small ones or zeros. `D` is at least the depth.
    // Loops run over rows outside and over the depth inside, where compilers make vectors of the rows.
    #[inline(always)]
    fn quickly<const D: usize>(&mut self, vectors: impl Vectors) -> bool {
        let left = Factors::<ROWS, D>::new(&self.a);
        let right = Factors::<COLUMNS, D>::new(&self.b);
        let mut odd = left.odd;
        (0..COLUMNS).for_each(|column| odd[column] |= right.odd[column]);
        let mut sums = [[0.0; ROWS]; COLUMNS];
        for column in 0..COLUMNS {
            let mut tops = [i16::MIN; ROWS];
            for row in 0..ROWS {
                for k in 0..D {
                    tops[row] = tops[row].max(left.exponents[k][row] + right.exponents[k][column]);
                }
            }
            let terms = Terms::new(&self.c[column], &tops, &left.largest, right.largest[column]);
            let mut factors = [0.0; D];
            (0..D).for_each(|k| factors[k] = right.scaled[k][column]);
            // Half the depth at a time: the sum of so many fits 32 bits.
            let (front, back) = (&left.scaled[..D / 2], &left.scaled[D / 2..]);
            let front = vectors.products(front, &factors[..D / 2], &terms.scale);
            let back = vectors.products(back, &factors[D / 2..], &terms.scale);
            let addend = vectors.products(&self.c[column..=column], &[1.0], &terms.addend_scale);
            for row in 0..ROWS {
                let total = f64::from(front[row].wrapping_add(addend[row])) + f64::from(back[row]);
                sums[column][row] = cut(total) * terms.unit[row];
                odd[row] |= terms.odd[row];
            }
        }
        let done = odd.iter().fold(0, |all, odd| all | odd) == 0;
        if done {
            self.c = sums;
        }
        done
    }
}

/// What the largest term of a column's sums says.
struct Terms {
    /// What makes 1 of the last bit kept of a product of scaled factors.
    scale: Lanes<f32>,
    /// The same for the addend.
    addend_scale: Lanes<f32>,
    /// The last bit kept.
    unit: Lanes<f32>,
    odd: Lanes<u32>,
}

impl Terms {
    #[inline(always)]
    fn new(addends: &Lanes<f32>, tops: &Lanes<i16>, largest: &Lanes<i32>, column: i32) -> Self {
        let zeros = [0.0; ROWS];
        let mut new = Self { scale: zeros, addend_scale: zeros, unit: zeros, odd: [0; ROWS] };
        for row in 0..ROWS {
            let bits = addends[row].to_bits();
            let field = (bits >> 23 & 0xff) as i32;
            // Zeros are among the factors or make them.
            let nothing = (largest[row] == 0) | (column == 0);
            let offset = largest[row] + column - 254;
            let own = if field == 0 { NOTHING } else { field - 127 };
            let products = if nothing { NOTHING } else { i32::from(tops[row]) + offset };
            let top = own.max(products);
            let lossy = (top - offset < LEAST) & !nothing;
            let strange = (field == 255) | (field == 0) & (bits != 0);
            let beyond = !(LOWEST..=HIGHEST).contains(&top) & (top != NOTHING);
            new.odd[row] = u32::from(lossy | strange | beyond);
            let last = top.clamp(LOWEST, HIGHEST) - KEPT;
            new.addend_scale[row] = power_single(-last);
            new.unit[row] = power_single(last);
            new.scale[row] = power_single((offset - last).clamp(-126, KEPT - LEAST));
        }
        new
    }
}

/// Factors scaled by the power of two of the largest in each of `N` rows or columns.
struct Factors<const N: usize, const D: usize> {
    /// Exponent fields of the largest; 0 for zeros.
    largest: [i32; N],
    /// Exponents against the largest; about −127 for zeros.
    exponents: [[i16; N]; D],
    scaled: [[f32; N]; D],
    /// Not 0 where a number is infinite, NaN or nearly as large, or all are subnormal.
    odd: [u32; N],
}

impl<const N: usize, const D: usize> Factors<N, D> {
    #[inline(always)]
    fn new(values: &[[f32; N]; DEPTH]) -> Self {
        let mut new = Self { largest: [0; N], exponents: [[0; N]; D], scaled: [[0.0; N]; D], odd: [0; N] };
        let mut factors = [0.0; N];
        for at in 0..N {
            let mut largest = 0;
            for k in 0..D {
                largest = largest.max(values[k][at].to_bits() & 0x7fff_ffff);
            }
            let field = (largest >> 23) as i32;
            // 2^(127 − field), which the largest field of all has not.
            new.odd[at] = u32::from((field >= 254) | (field == 0) & (largest != 0));
            factors[at] = power_single(127 - field.min(253));
            new.largest[at] = field;
        }
        for at in 0..N {
            for k in 0..D {
                new.scaled[k][at] = values[k][at] * factors[at];
            }
        }
        for at in 0..N {
            for k in 0..D {
                new.exponents[k][at] = (new.scaled[k][at].to_bits() >> 23 & 0xff) as i16 - 127;
            }
        }
        new
    }
}

/// A power of two that is a normal number of f32.
#[inline(always)]
fn power_single(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

/// A power of two.
#[inline(always)]
fn power(exponent: i32) -> f64 {
    f64::from_bits(((1023 + exponent) as u64) << 52)
}

/// A number whose size is no subnormal one of f32, cut to f32.
#[inline(always)]
fn cut(value: f64) -> f32 {
    f64::from_bits(value.to_bits() & !0x1fff_ffff) as f32
}

/// The exponent of a number's leading bit.
fn exponent(value: f64) -> i32 {
    let field = (value.to_bits() >> 52 & 0x7ff) as i32;
    if value == 0.0 { NOTHING } else { field - 1023 }
}

/// The addend and the products of factors, summed as a tensor core does.
fn sum(factors: impl Iterator<Item = (f64, f64)> + Clone, addend: f64) -> f32 {
    let plain = factors.clone().fold(addend, |sum, (a, b)| a.mul_add(b, sum));
    let exponents = factors.clone().map(|(a, b)| exponent(a) + exponent(b));
    let top = exponents.fold(exponent(addend), i32::max);
    if top >= BEYOND || !plain.is_finite() {
        return if plain.is_nan() { f32::from_bits(0x7fff_ffff) } else { plain as f32 };
    }
    let last = top.clamp(-900, 900) - KEPT;
    let total = factors.fold((addend * power(-last)).trunc(), |sum, (a, b)| sum + (a * b * power(-last)).trunc());
    let sum = total * power(last);
    let subnormal = sum != 0.0 && sum.abs() < f64::from(f32::MIN_POSITIVE);
    if subnormal { to_f32(sum, Rounding::Zero) } else { cut(sum) }
}

/// The processor's vectors, where compilers do not find them.
pub trait Vectors: Copy {
    /// Σ of a row's value times a factor times the row's scale, each cut to an integer. Products are below 2^31.
    fn products(self, rows: &[Lanes<f32>], factors: &[f32], scale: &Lanes<f32>) -> Lanes<i32>;
}

impl Vectors for pulp::Scalar {
    #[inline(always)]
    fn products(self, rows: &[Lanes<f32>], factors: &[f32], scale: &Lanes<f32>) -> Lanes<i32> {
        let mut sums = [0i32; ROWS];
        for (row, factor) in rows.iter().zip(factors) {
            (0..ROWS).for_each(|at| sums[at] = sums[at].wrapping_add((row[at] * factor * scale[at]) as i32));
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
impl Vectors for pulp::x86::V3 {
    #[inline(always)]
    fn products(self, rows: &[Lanes<f32>], factors: &[f32], scale: &Lanes<f32>) -> Lanes<i32> {
        let halves = |row: &Lanes<f32>| -> [pulp::f32x8; 2] { pulp::cast(*row) };
        let scale = halves(scale);
        let mut sums = [self.splat_i32x8(0); 2];
        for (row, factor) in rows.iter().zip(factors) {
            let (row, factor) = (halves(row), self.splat_f32x8(*factor));
            for half in 0..2 {
                let product = self.mul_f32x8(self.mul_f32x8(row[half], factor), scale[half]);
                let whole = pulp::cast(self.avx._mm256_cvttps_epi32(pulp::cast(product)));
                sums[half] = self.wrapping_add_i32x8(sums[half], whole);
            }
        }
        pulp::cast(sums)
    }
}

#[cfg(target_arch = "x86_64")]
impl Vectors for pulp::x86::V4 {
    #[inline(always)]
    fn products(self, rows: &[Lanes<f32>], factors: &[f32], scale: &Lanes<f32>) -> Lanes<i32> {
        let scale = pulp::cast(*scale);
        let mut sums = self.splat_i32x16(0);
        for (row, factor) in rows.iter().zip(factors) {
            let product = self.mul_f32x16(pulp::cast(*row), self.splat_f32x16(*factor));
            let product = self.mul_f32x16(product, scale);
            let whole = pulp::cast(self.avx512f._mm512_cvttps_epi32(pulp::cast(product)));
            sums = self.wrapping_add_i32x16(sums, whole);
        }
        pulp::cast(sums)
    }
}

/// What is to be compiled for each of the processor's vectors.
pub trait WithVectors {
    /// Its code.
    fn run(self, vectors: impl Vectors);
}

struct Vectorised<Op, V>(Op, V);

impl<Op: WithVectors, V: Vectors> pulp::NullaryFnOnce for Vectorised<Op, V> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.0.run(self.1);
    }
}

/// Runs code with the processor's vectors.
#[inline(always)]
pub fn dispatch(op: impl WithVectors) {
    match pulp::Arch::new() {
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V3(simd) => simd.vectorize(Vectorised(op, simd)),
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V4(simd) => simd.vectorize(Vectorised(op, simd)),
        _ => op.run(pulp::Scalar),
    }
}

#[cfg(test)]
mod tests {
    use super::{COLUMNS, DEPTH, ROWS, Tile, Vectors, WithVectors, dispatch};
    use rand::RngExt;
    use rand_chacha::ChaCha8Rng;

    struct Multiply<'t>(&'t mut Tile, &'t mut bool);

    impl WithVectors for Multiply<'_> {
        fn run(self, vectors: impl Vectors) {
            *self.1 = self.0.quickly::<DEPTH>(vectors);
        }
    }

    /// Numbers of 11 bits with exponents in a range, zeros and now and then something strange.
    fn number(random: &mut ChaCha8Rng, (zeros, spread, strange): (f64, i32, f64)) -> f32 {
        if random.random_bool(zeros) {
            return 0.0;
        }
        if random.random_bool(strange) {
            return [f32::INFINITY, f32::NAN, -0.0, 1e-40, f32::MAX, 1e-38, -3e38][random.random_range(0..7)];
        }
        let exponent = random.random_range(-spread..=spread);
        let size = f32::from_bits(((127 + exponent) as u32) << 23 | random.random_range(0..1u32 << 10) << 13);
        if random.random() { size } else { -size }
    }

    /// The sum in f32 and 32 bits is the one in f64, wherever it is made; and mostly it is made.
    #[test]
    fn both_ways_give_the_same_bits() {
        let mut random = crate::probe::random("product");
        for (kind, least) in [
            ((0.0, 0, 0.0), 100),
            ((0.0, 6, 0.0), 100),
            ((0.5, 12, 0.0), 100),
            ((0.9, 12, 0.0), 0),
            ((0.0, 40, 0.0), 20),
            ((0.2, 100, 0.0), 0),
            ((0.1, 4, 0.002), 10),
        ] {
            let mut made = 0;
            for round in 0..200 {
                let mut tile = Tile::new(DEPTH);
                tile.a.iter_mut().flatten().for_each(|a| *a = number(&mut random, kind));
                tile.b.iter_mut().flatten().for_each(|b| *b = number(&mut random, kind));
                let wide = (kind.0, if round % 2 == 0 { 2 } else { 2 * kind.1 }, kind.2);
                tile.c.iter_mut().flatten().for_each(|c| *c = number(&mut random, wide));
                if round % 5 == 0 {
                    // A row and a column of nothing.
                    tile.a.iter_mut().for_each(|a| a[round % ROWS] = 0.0);
                    tile.b.iter_mut().for_each(|b| b[round % COLUMNS] = 0.0);
                }
                let (mut quick, mut scalar, mut done) = (tile.clone(), tile.clone(), false);
                dispatch(Multiply(&mut quick, &mut done));
                assert_eq!(scalar.quickly::<DEPTH>(pulp::Scalar), done);
                made += u32::from(done);
                tile.exactly();
                for (quick, scalar, exact) in (0..COLUMNS * ROWS).map(|at| {
                    let (column, row) = (at / ROWS, at % ROWS);
                    let of = |tile: &Tile| tile.c[column][row].to_bits();
                    (of(&quick), of(&scalar), of(&tile))
                }) {
                    assert!(!done || quick == exact && scalar == exact, "{kind:?}: {quick:#x} {scalar:#x} {exact:#x}");
                }
            }
            assert!(made >= least, "{kind:?}: {made} of 200");
        }
    }
}
