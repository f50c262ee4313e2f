//! `mma.sync`: fragments of the PTX ISA's tables, products exact, sums in f64 and rounded once.

use super::regs::{LANES, Reg, Regs};
use crate::code::{Accumulator, Element, Mma};
use crate::number::{BF16, F16, Rounding, TF32};
use half::{bf16, f16};

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

fn element(value: u64, ty: Element, i: usize) -> f64 {
    match ty {
        Element::Double => f64::from_bits(value),
        Element::Float(TF32) => f64::from(f32::from_bits(value as u32 & !0x1fff)),
        Element::Float(format) => {
            let bits = (value >> (16 * i)) as u16;
            if format == BF16 { f64::from(bf16::from_bits(bits)) } else { f64::from(f16::from_bits(bits)) }
        }
        Element::Int { bits, signed } => {
            let field = (value as u32) << (32 - bits - bits * i as u32);
            if signed { f64::from(field as i32 >> (32 - bits)) } else { f64::from(field >> (32 - bits)) }
        }
    }
}

/// Multiplies and adds; all lanes take part.
pub fn multiply(regs: &mut Regs, mma: &Mma) {
    let rows = mma.shape[0] as usize;
    let depth = mma.shape[2] as usize;
    let mut a = [[0.0; DEPTH]; ROWS];
    let mut b = [[0.0; COLUMNS]; DEPTH];
    let mut c = [[0.0; COLUMNS]; ROWS];
    let per = per_register(mma.a_type);
    for (r, reg) in mma.a.iter().enumerate() {
        for lane in 0..LANES {
            let value = regs.value(*reg, lane);
            for i in 0..per {
                let (row, column) = place_a(rows, per, lane, r, i);
                a[row][column] = element(value, mma.a_type, i);
            }
        }
    }
    for (r, reg) in mma.b.iter().enumerate() {
        for lane in 0..LANES {
            let value = regs.value(*reg, lane);
            for i in 0..per {
                let (row, column) = place_b(per, lane, r, i);
                b[row][column] = element(value, mma.b_type, i);
            }
        }
    }
    for_each_c(mma, |lane, _, i, reg, (row, column)| c[row][column] = accumulator(regs.value(reg, lane), mma.acc, i));
    product(&a, &b, &mut c, depth);
    let mut out = vec![[0u64; LANES]; mma.d.len()];
    for_each_c(mma, |lane, r, i, _, (row, column)| out[r][lane] |= result(c[row][column], mma) << (16 * i));
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

fn accumulator(value: u64, acc: Accumulator, i: usize) -> f64 {
    match acc {
        Accumulator::Single => f64::from(f32::from_bits(value as u32)),
        Accumulator::Half => f64::from(f16::from_bits((value >> (16 * i)) as u16)),
        Accumulator::Int => f64::from(value as u32 as i32),
        Accumulator::Double => f64::from_bits(value),
    }
}

fn result(value: f64, mma: &Mma) -> u64 {
    match mma.acc {
        Accumulator::Single if value.is_nan() => 0x7fff_ffff,
        Accumulator::Single => u64::from((value as f32).to_bits()),
        Accumulator::Half => u64::from(F16.narrow(value, Rounding::Nearest)),
        Accumulator::Int if mma.saturate => {
            u64::from(value.clamp(f64::from(i32::MIN), f64::from(i32::MAX)) as i32 as u32)
        }
        Accumulator::Int => u64::from(value as i64 as u32),
        Accumulator::Double => value.to_bits(),
    }
}

/// c += a b
fn product(a: &[[f64; DEPTH]; ROWS], b: &[[f64; COLUMNS]; DEPTH], c: &mut [[f64; COLUMNS]; ROWS], depth: usize) {
    pulp::Arch::new().dispatch(|| {
        for (row, sums) in a.iter().zip(c.iter_mut()) {
            let mut sum = *sums;
            for (left, right) in row[..depth].iter().zip(b) {
                for column in 0..COLUMNS {
                    sum[column] = left.mul_add(right[column], sum[column]);
                }
            }
            *sums = sum;
        }
    });
}
