//! `mma.sync`: fragments of the PTX ISA's tables, products exact, sums as a tensor core makes them.

use super::regs::{LANES, Reg, Regs, Row};
use crate::code::{Accumulator, Element, Mma};
use crate::number::{BF16, F16, Rounding, TF32};
use half::f16;

/// The largest depth.
const DEPTH: usize = 64;
const ROWS: usize = 16;
const COLUMNS: usize = 8;

/// Elements that one register holds.
fn per_register(element: Element) -> usize {
    match element {
        Element::Float(TF32) | Element::Double => 1,
        Element::Float(_) => 2,
        Element::Int { bits, .. } => 32 / bits as usize,
    }
}

/// Row and column of A's element `i` in register `r` of a lane.
pub fn place_a(rows: usize, per: usize, lane: usize, r: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane & 3);
    if rows == 8 {
        return (group, thread * per + i + 4 * per * r);
    }
    (group + 8 * (r & 1), thread * per + i + 4 * per * (r >> 1))
}

/// Row and column of B's element `i` in register `r` of a lane.
pub fn place_b(per: usize, lane: usize, r: usize, i: usize) -> (usize, usize) {
    ((lane & 3) * per + i + 4 * per * r, lane >> 2)
}

/// Row and column of the accumulator's element `i` in register `r` of a lane.
pub fn place_c(half: bool, lane: usize, r: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane & 3);
    if half { (group + 8 * r, thread * 2 + i) } else { (group + 8 * (r >> 1), thread * 2 + (r & 1)) }
}

/// The elements of a register, lane by lane.
struct Decode<'r> {
    row: &'r Row,
    ty: Element,
    out: &'r mut [[f64; LANES]; 8],
}

impl pulp::WithSimd for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self { row, ty, out } = self;
        match ty {
            Element::Float(BF16) => {
                for lane in 0..LANES {
                    out[0][lane] = f64::from(f32::from_bits(row[lane] << 16));
                    out[1][lane] = f64::from(f32::from_bits(row[lane] & 0xffff_0000));
                }
            }
            Element::Float(TF32) => {
                for lane in 0..LANES {
                    out[0][lane] = f64::from(f32::from_bits(row[lane] & !0x1fff));
                }
            }
            Element::Float(_) => {
                for lane in 0..LANES {
                    out[0][lane] = f64::from(half(row[lane]));
                    out[1][lane] = f64::from(half(row[lane] >> 16));
                }
            }
            Element::Int { bits, signed } => {
                for (i, out) in out.iter_mut().enumerate().take(32 / bits as usize) {
                    for lane in 0..LANES {
                        let field = row[lane] << (32 - bits - bits * i as u32);
                        out[lane] = if signed {
                            f64::from(field as i32 >> (32 - bits))
                        } else {
                            f64::from(field >> (32 - bits))
                        };
                    }
                }
            }
            Element::Double => {}
        }
    }
}

/// f16 of the lower bits, without branches.
#[inline(always)]
fn half(bits: u32) -> f32 {
    let size = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let size = if bits & 0x7c00 == 0x7c00 { f32::from_bits(0x7f80_0000 | (bits & 0x3ff) << 13) } else { size };
    f32::from_bits(size.to_bits() | (bits & 0x8000) << 16)
}

/// The elements of a register of any type; gives their number a lane.
pub fn decode_row(regs: &Regs, reg: Reg, ty: Element, out: &mut [[f64; LANES]; 8]) -> usize {
    decode(regs, reg, ty, out);
    per_register(ty)
}

fn decode(regs: &Regs, reg: Reg, ty: Element, out: &mut [[f64; LANES]; 8]) {
    if ty == Element::Double {
        let row = regs.double(reg.row);
        (0..LANES).for_each(|lane| out[0][lane] = f64::from_bits(row[lane]));
        return;
    }
    pulp::Arch::new().dispatch(Decode { row: regs.word(reg.row), ty, out });
}

/// Multiplies and adds; all lanes take part.
pub fn multiply(regs: &mut Regs, mma: &Mma) {
    let rows = mma.shape[0] as usize;
    let mut tile = Tile::new(mma.shape[2] as usize, mma.acc == Accumulator::Single);
    let per = per_register(mma.a_type);
    let mut elements = [[0.0; LANES]; 8];
    for (r, reg) in mma.a.iter().enumerate() {
        decode(regs, *reg, mma.a_type, &mut elements);
        for (i, values) in elements.iter().enumerate().take(per) {
            for lane in 0..LANES {
                let (row, column) = place_a(rows, per, lane, r, i);
                tile.a[row][column] = values[lane];
            }
        }
    }
    for (r, reg) in mma.b.iter().enumerate() {
        decode(regs, *reg, mma.b_type, &mut elements);
        for (i, values) in elements.iter().enumerate().take(per) {
            for lane in 0..LANES {
                let (row, column) = place_b(per, lane, r, i);
                tile.b[row][column] = values[lane];
            }
        }
    }
    for_each_c(mma, |lane, _, i, reg, (row, column)| {
        tile.c[row][column] = accumulator(regs.value(reg, lane), mma.acc, i);
    });
    tile.multiply();
    let mut out = [[0u64; LANES]; 4];
    for_each_c(mma, |lane, r, i, _, (row, column)| {
        out[r][lane] |= round(tile.c[row][column], mma.acc, mma.saturate) << (16 * i);
    });
    for (reg, values) in mma.d.iter().zip(&out) {
        for lane in 0..LANES {
            regs.set(*reg, lane, values[lane]);
        }
    }
}

fn for_each_c(mma: &Mma, mut visit: impl FnMut(usize, usize, usize, Reg, (usize, usize))) {
    let half = mma.acc == Accumulator::Half;
    for (r, reg) in mma.c.iter().enumerate() {
        for lane in 0..LANES {
            for i in 0..1 + usize::from(half) {
                visit(lane, r, i, *reg, place_c(half, lane, r, i));
            }
        }
    }
}

/// An accumulator's number.
pub fn accumulator(value: u64, acc: Accumulator, i: usize) -> f64 {
    match acc {
        Accumulator::Single => f64::from(f32::from_bits(value as u32)),
        Accumulator::Half => f64::from(f16::from_bits((value >> (16 * i)) as u16)),
        Accumulator::Int => f64::from(value as u32 as i32),
        Accumulator::Double => f64::from_bits(value),
    }
}

/// A sum as an accumulator's bits.
pub fn round(value: f64, acc: Accumulator, saturate: bool) -> u64 {
    match acc {
        Accumulator::Single if value.is_nan() => 0x7fff_ffff,
        Accumulator::Single => u64::from((value as f32).to_bits()),
        Accumulator::Half => u64::from(F16.narrow(value, Rounding::Nearest)),
        Accumulator::Int if saturate => u64::from(value.clamp(f64::from(i32::MIN), f64::from(i32::MAX)) as i32 as u32),
        Accumulator::Int => u64::from(value as i64 as u32),
        Accumulator::Double => value.to_bits(),
    }
}

/// Bits behind the leading one of the largest term that a sum keeps.
const KEPT: i32 = 25;
/// The exponent of zero: below every other.
const NOTHING: i32 = -5000;
/// From this exponent on a term is infinite or NaN.
const BEYOND: i32 = 1024;

/// The operands of a product: 16 rows of A, 8 columns of B, up to 64 deep.
pub struct Tile {
    /// A, row by row.
    pub a: [[f64; DEPTH]; ROWS],
    /// B, along the depth.
    pub b: [[f64; COLUMNS]; DEPTH],
    /// The addend, then the sum.
    pub c: [[f64; COLUMNS]; ROWS],
    /// How deep.
    pub depth: usize,
    /// Floating-point sums as tensor cores make them; else exact sums of f64.
    pub truncating: bool,
}

impl Tile {
    /// A product of zeros.
    pub fn new(depth: usize, truncating: bool) -> Self {
        let (a, b, c) = ([[0.0; DEPTH]; ROWS], [[0.0; COLUMNS]; DEPTH], [[0.0; COLUMNS]; ROWS]);
        Self { a, b, c, depth, truncating }
    }

    /// c += a b
    ///
    /// A tensor core of an H100 lines all products and the addend up with the largest (by the sum of its factors'
    /// exponents), cuts each off 25 bits behind that one's leading bit, adds them exactly and cuts the sum to f32.
    pub fn multiply(&mut self) {
        pulp::Arch::new().dispatch(Product(self));
    }
}

struct Product<'t>(&'t mut Tile);

/// The exponent of a number's leading bit.
#[inline(always)]
fn exponent(value: f64) -> i32 {
    let field = (value.to_bits() >> 52 & 0x7ff) as i32;
    if value == 0.0 { NOTHING } else { field - 1023 }
}

/// A sum cut to f32.
#[inline(always)]
fn cut(value: f64) -> f64 {
    let bits = f64::from_bits(value.to_bits() & !0x1fff_ffff);
    if bits.abs() >= f64::from(f32::MIN_POSITIVE) || value == 0.0 {
        return bits;
    }
    f64::from(crate::number::to_f32(value, Rounding::Zero))
}

impl pulp::WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Tile { a, b, c, depth, truncating } = self.0;
        let mut exponents = [[NOTHING; COLUMNS]; DEPTH];
        for k in 0..*depth {
            for column in 0..COLUMNS {
                exponents[k][column] = exponent(b[k][column]);
            }
        }
        for (row, sums) in a.iter().zip(c.iter_mut()) {
            let mut plain = *sums;
            for k in 0..*depth {
                for column in 0..COLUMNS {
                    plain[column] = row[k].mul_add(b[k][column], plain[column]);
                }
            }
            if !*truncating {
                *sums = plain;
                continue;
            }
            let mut largest = [NOTHING; COLUMNS];
            for column in 0..COLUMNS {
                largest[column] = exponent(sums[column]);
            }
            for k in 0..*depth {
                let left = exponent(row[k]);
                for column in 0..COLUMNS {
                    largest[column] = largest[column].max(left + exponents[k][column]);
                }
            }
            let (mut scale, mut back) = ([0.0; COLUMNS], [0.0; COLUMNS]);
            for column in 0..COLUMNS {
                let top = largest[column].clamp(-900, 900) - KEPT;
                scale[column] = f64::from_bits(((1023 - top) as u64) << 52);
                back[column] = f64::from_bits(((1023 + top) as u64) << 52);
            }
            let mut total = [0.0; COLUMNS];
            for column in 0..COLUMNS {
                total[column] = (sums[column] * scale[column]).trunc();
            }
            for k in 0..*depth {
                for column in 0..COLUMNS {
                    total[column] += (row[k] * b[k][column] * scale[column]).trunc();
                }
            }
            for column in 0..COLUMNS {
                let finite = largest[column] < BEYOND && plain[column].is_finite();
                sums[column] = if finite { cut(total[column] * back[column]) } else { plain[column] };
            }
        }
    }
}
