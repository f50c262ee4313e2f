//! `wgmma`: a warp's 16 rows of the product of matrices in shared memory that descriptors describe.

use super::access::read_words;
use super::checks::{Checks, Touch, TouchKind};
use super::cta::Cta;
use super::fault::{FaultKind, Finding};
use super::mma::{Tile, accumulator, decode_row, place_a, place_c, round};
use super::regs::LANES;
use super::swizzle::swizzle;
use super::warp::Warp;
use crate::code::{Accumulator, Element, Left, Order, Wgmma};
use crate::number::TF32;
use crate::ptx::Space;

/// Rows of a warp.
const ROWS: usize = 16;

/// A matrix in shared memory, by its descriptor.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    start: u64,
    leading: u64,
    stride: u64,
    /// As `CUtensorMapSwizzle`: 0 none, 1 to 3 for 32, 64, 128 bytes.
    swizzle: u32,
}

impl Descriptor {
    fn new(bits: u64) -> Self {
        let field = |at: u32| (bits >> at & 0x3fff) << 4;
        let swizzle = match bits >> 62 {
            0 => 0,
            1 => 3,
            2 => 2,
            _ => 1,
        };
        Self { start: field(0), leading: field(16), stride: field(32), swizzle }
    }

    /// The address of an element: `line` is its row of A or column of B, `byte` its place along the depth.
    fn along_depth(&self, line: u64, byte: u64) -> u64 {
        let (group, within) = (line / 8, line % 8);
        let at = match self.swizzle {
            0 => within * 16 + byte % 16 + byte / 16 * self.leading,
            span => within * (16 << span) + byte,
        };
        swizzle(self.start + group * self.stride + at, self.swizzle)
    }

    /// The same where rows of A or columns of B are contiguous: `depth` is the element's place along the depth.
    fn along_lines(&self, line: u64, depth: u64) -> u64 {
        let (piece, within) = (line / 8, line % 8 * 2);
        let (group, row) = (depth / 8, depth % 8);
        let at = match self.swizzle {
            0 => piece * self.stride + row * 16 + group * self.leading,
            span => {
                let pieces = 1 << span;
                piece % pieces * 16 + piece / pieces * self.leading + row * 16 * pieces + group * self.stride
            }
        };
        swizzle(self.start + at + within, self.swizzle)
    }
}

fn element_bytes(ty: Element) -> u64 {
    match ty {
        Element::Float(TF32) => 4,
        Element::Int { .. } => 1,
        _ => 2,
    }
}

impl<C: Checks> Cta<'_, C> {
    /// Multiplies; all lanes take part.
    pub fn wgmma(&mut self, warp: &mut Warp, wgmma: &Wgmma, pc: u32) -> Result<(), Finding> {
        let depth = wgmma.depth as usize;
        let mut tile = Tile::new(depth, wgmma.acc == Accumulator::Single);
        self.left(warp, wgmma, pc, &mut tile)?;
        let matrix = Descriptor::new(warp.regs.value(wgmma.b, 0));
        let mut b = vec![0.0; wgmma.columns as usize * depth];
        self.read_lines((warp.index, pc), matrix, (wgmma, 1), 0..u64::from(wgmma.columns), &mut b)?;
        let accumulate = warp.encoded(wgmma.accumulate) & 1 == 1;
        let half = wgmma.acc == Accumulator::Half;
        let per_block = if half { 2 } else { 4 };
        for (block, regs) in wgmma.d.chunks(per_block).enumerate() {
            for column in 0..8 {
                (0..depth).for_each(|k| tile.b[k][column] = b[(8 * block + column) * depth + k]);
            }
            let places = |r: usize, lane: usize, i: usize| place_c(half, lane, r, i);
            for (r, reg) in regs.iter().enumerate() {
                for (lane, i) in (0..LANES).flat_map(|lane| (0..1 + usize::from(half)).map(move |i| (lane, i))) {
                    let (row, column) = places(r, lane, i);
                    let old = accumulator(warp.regs.value(*reg, lane), wgmma.acc, i);
                    tile.c[row][column] = if accumulate { old } else { 0.0 };
                }
            }
            tile.multiply();
            for (r, reg) in regs.iter().enumerate() {
                for lane in 0..LANES {
                    let value = (0..1 + usize::from(half)).fold(0, |bits, i| {
                        let (row, column) = places(r, lane, i);
                        bits | round(tile.c[row][column], wgmma.acc, wgmma.saturate) << (16 * i)
                    });
                    warp.regs.set(*reg, lane, value);
                }
            }
        }
        Ok(())
    }

    /// The warp's rows of A, with the sign of the product.
    fn left(&mut self, warp: &Warp, wgmma: &Wgmma, pc: u32, tile: &mut Tile) -> Result<(), Finding> {
        let depth = wgmma.depth as usize;
        match &wgmma.a {
            Left::Registers(regs) => {
                let mut elements = [[0.0; LANES]; 8];
                for (r, reg) in regs.iter().enumerate() {
                    let per = decode_row(&warp.regs, *reg, wgmma.types[0], &mut elements);
                    for (i, values) in elements.iter().enumerate().take(per) {
                        for lane in 0..LANES {
                            let (row, column) = place_a(ROWS, per, lane, r, i);
                            tile.a[row][column] = values[lane];
                        }
                    }
                }
            }
            Left::Descriptor(reg) => {
                let matrix = Descriptor::new(warp.regs.value(*reg, 0));
                let first = u64::from(warp.index % 4) * ROWS as u64;
                let mut a = vec![0.0; ROWS * depth];
                self.read_lines((warp.index, pc), matrix, (wgmma, 0), first..first + ROWS as u64, &mut a)?;
                for (row, values) in tile.a.iter_mut().zip(a.chunks_exact(depth)) {
                    row[..depth].copy_from_slice(values);
                }
            }
        }
        if wgmma.negate[0] != wgmma.negate[1] {
            tile.a.iter_mut().flatten().for_each(|value| *value = -*value);
        }
        Ok(())
    }

    /// Reads rows of A or columns of B, one after the other, in pieces of 16 bytes.
    fn read_lines(
        &mut self,
        (warp, pc): (u32, u32),
        matrix: Descriptor,
        (wgmma, side): (&Wgmma, usize),
        lines: std::ops::Range<u64>,
        out: &mut [f64],
    ) -> Result<(), Finding> {
        let (ty, depth) = (wgmma.types[side], wgmma.depth as u64);
        let bytes = element_bytes(ty);
        let mut pieces = Vec::new();
        for (number, line) in lines.enumerate() {
            for k in 0..depth {
                let address = match wgmma.transposed[side] {
                    true => matrix.along_lines(line, k),
                    false => matrix.along_depth(line, k * bytes),
                };
                let space = Space::Shared;
                let kind = FaultKind::OutOfBounds { space, address, bytes: bytes as u32, write: false };
                let offset = self.shared_offset(address, bytes as u32).ok_or((kind, 0))?;
                let value = read_words(&self.shared, offset, bytes as u32);
                out[number * depth as usize + k as usize] = one(value, ty);
                if C::ON && address.is_multiple_of(16) {
                    pieces.push(address);
                }
            }
        }
        for group in pieces.chunks(LANES) {
            let mut at = [0; LANES];
            at[..group.len()].copy_from_slice(group);
            let active = if group.len() == LANES { u32::MAX } else { (1 << group.len()) - 1 };
            let kind = TouchKind::Read;
            let touch = Touch { space: Space::Shared, at: &at, active, bytes: 16, kind, order: Order::Weak, pc };
            self.checks.touch(warp, &touch, &self.launch.memory, &mut self.hint)?;
        }
        Ok(())
    }
}

fn one(value: u64, ty: Element) -> f64 {
    match ty {
        Element::Float(TF32) => f64::from(f32::from_bits(value as u32 & !0x1fff)),
        Element::Float(format) => format.widen(value as u32),
        Element::Int { signed: true, .. } => f64::from(value as u8 as i8),
        Element::Int { .. } => f64::from(value as u8),
        Element::Double => f64::from_bits(value),
    }
}
