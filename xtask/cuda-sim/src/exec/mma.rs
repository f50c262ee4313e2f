//! `mma.sync`: fragments of the PTX ISA's tables. Sums in f32 are those of a tensor core (`product.rs`), others are exact.

use super::product::{self, COLUMNS, ROWS, Vectors, WithVectors};
use super::regs::{LANES, Reg, Regs, Row};
use crate::code::{Accumulator, Element, Mma};
use crate::number::{BF16, F16, Rounding, TF32};
use half::f16;

/// The largest depth.
const DEPTH: usize = 64;

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
    if mma.acc == Accumulator::Single {
        return product::dispatch(Singly(regs, mma));
    }
    let rows = mma.shape[0] as usize;
    let mut tile = Tile::new(mma.shape[2] as usize);
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

/// A product with accumulators of f32.
struct Singly<'r>(&'r mut Regs, &'r Mma);

impl WithVectors for Singly<'_> {
    #[inline(always)]
    fn run(self, vectors: impl Vectors) {
        let Self(regs, mma) = self;
        let mut tile = product::Tile::new(mma.shape[2] as usize);
        load_left(regs, &mma.a, mma.a_type, &mut tile);
        for (r, reg) in mma.b.iter().enumerate() {
            each_element(regs.word(reg.row), mma.b_type, |k, values| tile.b[k_of(mma.b_type, r) + k] = values);
        }
        load_addend(regs, &mma.c, &mut tile);
        tile.multiply(vectors);
        store_sum(regs, &mma.d, &tile);
    }
}

/// The depth at which a register's elements of thread 0 begin.
fn k_of(ty: Element, r: usize) -> usize {
    4 * per_register(ty) * r
}

/// A warp's 16 rows of A from registers.
#[inline(always)]
fn load_left(regs: &Regs, a: &[Reg], ty: Element, tile: &mut product::Tile) {
    for (r, reg) in a.iter().enumerate() {
        each_element(regs.word(reg.row), ty, |k, values| {
            tile.a[k_of(ty, r >> 1) + k][8 * (r & 1)..][..8].copy_from_slice(&values);
        });
    }
}

/// The accumulators of 16 rows and 8 columns.
#[inline(always)]
pub fn load_addend(regs: &Regs, c: &[Reg], tile: &mut product::Tile) {
    for (r, reg) in c.iter().enumerate() {
        for (thread, values) in by_thread(regs.word(reg.row)).iter().enumerate() {
            tile.c[2 * thread + (r & 1)][8 * (r >> 1)..][..8].copy_from_slice(&values.map(f32::from_bits));
        }
    }
}

/// The sums to the accumulators' registers.
#[inline(always)]
pub fn store_sum(regs: &mut Regs, d: &[Reg], tile: &product::Tile) {
    for (r, reg) in d.iter().enumerate() {
        let row = &mut regs.words[reg.row as usize];
        for thread in 0..4 {
            let values = &tile.c[2 * thread + (r & 1)][8 * (r >> 1)..][..8];
            for group in 0..8 {
                row[4 * group + thread] = values[group].to_bits();
            }
        }
    }
}

/// A register of lanes 4g + t as rows of t.
#[inline(always)]
fn by_thread(row: &Row) -> [[u32; 8]; 4] {
    let mut out = [[0; 8]; 4];
    for thread in 0..4 {
        for group in 0..8 {
            out[thread][group] = row[4 * group + thread];
        }
    }
    out
}

/// Calls a function for each depth that a register of A or B holds, with the numbers of its eight groups of lanes.
#[inline(always)]
fn each_element(row: &Row, ty: Element, mut visit: impl FnMut(usize, [f32; 8])) {
    for (thread, words) in by_thread(row).iter().enumerate() {
        match ty {
            Element::Float(BF16) => {
                visit(2 * thread, words.map(|word| f32::from_bits(word << 16)));
                visit(2 * thread + 1, words.map(|word| f32::from_bits(word & 0xffff_0000)));
            }
            Element::Float(TF32) => visit(thread, words.map(|word| f32::from_bits(word & !0x1fff))),
            _ => {
                visit(2 * thread, words.map(half));
                visit(2 * thread + 1, words.map(|word| half(word >> 16)));
            }
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

/// The operands of an exact product: 16 rows of A, 8 columns of B, up to 64 deep.
pub struct Tile {
    /// A, row by row.
    pub a: [[f64; DEPTH]; ROWS],
    /// B, along the depth.
    pub b: [[f64; COLUMNS]; DEPTH],
    /// The addend, then the sum.
    pub c: [[f64; COLUMNS]; ROWS],
    /// How deep.
    pub depth: usize,
}

impl Tile {
    /// A product of zeros.
    pub fn new(depth: usize) -> Self {
        let (a, b, c) = ([[0.0; DEPTH]; ROWS], [[0.0; COLUMNS]; DEPTH], [[0.0; COLUMNS]; ROWS]);
        Self { a, b, c, depth }
    }

    /// c += a b, in f64.
    pub fn multiply(&mut self) {
        pulp::Arch::new().dispatch(Product(self));
    }
}

struct Product<'t>(&'t mut Tile);

impl pulp::WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Tile { a, b, c, depth } = self.0;
        for (row, sums) in a.iter().zip(c.iter_mut()) {
            for k in 0..*depth {
                for column in 0..COLUMNS {
                    sums[column] = row[k].mul_add(b[k][column], sums[column]);
                }
            }
        }
    }
}
