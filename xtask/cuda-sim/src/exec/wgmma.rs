//! `wgmma`: a warp's 16 rows of the product of matrices in shared memory that descriptors describe.

use super::checks::{Checks, Touch, TouchKind};
use super::cta::Cta;
use super::fault::{FaultKind, Finding};
use super::mma::{Tile, accumulator, decode_row, half, load_addend, place_a, place_c, round, store_sum};
use super::product::{self, ROWS, Vectors, WithVectors};
use super::regs::{LANES, Reg, Regs};
use super::swizzle::swizzle;
use super::warp::Warp;
use crate::code::{Accumulator, Element, Left, Order, Pipe, Scope, Wgmma};
use crate::number::{BF16, TF32};
use crate::ptx::Space;

/// Bytes that lie together in every layout.
const PIECE_BYTES: u32 = 16;

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

/// Rows of A or columns of B that are read together.
const LINES: usize = 8;
/// The deepest product.
const DEPTH: usize = 32;
/// Pieces of 16 bytes in which eight lines lie: two along the depth each, or one for each depth.
const PIECES: usize = 16;

/// Eight rows of A or columns of B, along the depth.
type Lines = [[f32; LINES]; DEPTH];

impl<C: Checks> Cta<'_, C> {
    /// Multiplies; all lanes take part.
    pub fn wgmma(&mut self, warp: &mut Warp, wgmma: &Wgmma, pc: u32) -> Result<(), Finding> {
        let (mut left, mut b) = ([[0.0; ROWS]; DEPTH], [[0.0; LINES]; DEPTH]);
        self.left(warp, wgmma, pc, &mut left)?;
        let matrix = Descriptor::new(warp.regs.value(wgmma.b, 0));
        let accumulate = warp.encoded(wgmma.accumulate) & 1 == 1;
        let single = wgmma.acc == Accumulator::Single;
        let per_block = if wgmma.acc == Accumulator::Half { 2 } else { 4 };
        for (block, d) in wgmma.d.chunks(per_block).enumerate() {
            self.lines((warp.index, pc), matrix, (wgmma, 1), (LINES * block) as u64, &mut b)?;
            let product = Block { regs: &mut warp.regs, wgmma, d, left: &left, b: &b, accumulate };
            if single { product::dispatch(product) } else { product.exactly() }
        }
        Ok(())
    }

    /// The warp's rows of A, along the depth, with the sign of the product.
    fn left(&mut self, warp: &Warp, wgmma: &Wgmma, pc: u32, left: &mut [[f32; ROWS]; DEPTH]) -> Result<(), Finding> {
        match &wgmma.a {
            Left::Registers(regs) => {
                let mut elements = [[0.0; LANES]; 8];
                for (r, reg) in regs.iter().enumerate() {
                    let per = decode_row(&warp.regs, *reg, wgmma.types[0], &mut elements);
                    for (i, values) in elements.iter().enumerate().take(per) {
                        for lane in 0..LANES {
                            let (row, column) = place_a(ROWS, per, lane, r, i);
                            left[column][row] = values[lane] as f32;
                        }
                    }
                }
            }
            Left::Descriptor(reg) => {
                let matrix = Descriptor::new(warp.regs.value(*reg, 0));
                let mut lines = [[0.0; LINES]; DEPTH];
                for half in 0..ROWS / LINES {
                    let first = warp.index as usize % 4 * ROWS + half * LINES;
                    self.lines((warp.index, pc), matrix, (wgmma, 0), first as u64, &mut lines)?;
                    for (to, from) in left.iter_mut().zip(&lines) {
                        to[half * LINES..][..LINES].copy_from_slice(from);
                    }
                }
            }
        }
        if wgmma.negate[0] != wgmma.negate[1] {
            left.iter_mut().flatten().for_each(|value| *value = -*value);
        }
        Ok(())
    }

    /// Reads eight rows of A or columns of B from the one numbered `first` on.
    fn lines(
        &mut self,
        (warp, pc): (u32, u32),
        matrix: Descriptor,
        (wgmma, side): (&Wgmma, usize),
        first: u64,
        lines: &mut Lines,
    ) -> Result<(), Finding> {
        let (ty, contiguous) = (wgmma.types[side], wgmma.transposed[side]);
        let mut at = [0; LANES];
        for (number, at) in (0..).zip(&mut at[..PIECES]) {
            *at = match contiguous {
                true => matrix.along_lines(first, number),
                false => matrix.along_depth(first + number / 2, number % 2 * 16),
            };
        }
        for (number, address) in at[..PIECES].iter().enumerate() {
            let kind =
                FaultKind::OutOfBounds { space: Space::Shared, address: *address, bytes: PIECE_BYTES, write: false };
            let offset = self.shared_offset(*address, PIECE_BYTES).ok_or((kind, 0))?;
            let mut values = [0.0; PIECE_BYTES as usize];
            let count = numbers(&self.shared[(offset / 4) as usize..][..4], ty, &mut values);
            for (element, value) in values[..count].iter().enumerate() {
                match contiguous {
                    true => lines[number][element] = *value,
                    false => lines[number % 2 * count + element][number / 2] = *value,
                }
            }
        }
        if C::ON {
            let (active, kind) = ((1 << PIECES) - 1, TouchKind::AsyncRead(Pipe::Product));
            let touch = Touch {
                space: Space::Shared,
                at: &at,
                active,
                bytes: PIECE_BYTES,
                kind,
                order: Order::Weak,
                scope: Scope::Device,
                pc,
            };
            self.checks.touch(warp, &touch, &self.launch.memory, &mut self.hint)?;
        }
        Ok(())
    }
}

/// A warp's rows and eight columns of a product.
struct Block<'b> {
    regs: &'b mut Regs,
    wgmma: &'b Wgmma,
    d: &'b [Reg],
    left: &'b [[f32; ROWS]; DEPTH],
    b: &'b Lines,
    accumulate: bool,
}

impl WithVectors for Block<'_> {
    #[inline(always)]
    fn run(self, vectors: impl Vectors) {
        let mut tile = product::Tile::new(self.wgmma.depth as usize);
        tile.a.copy_from_slice(&self.left[..product::DEPTH]);
        tile.b.copy_from_slice(&self.b[..product::DEPTH]);
        if self.accumulate {
            load_addend(self.regs, self.d, &mut tile);
        }
        tile.multiply(vectors);
        store_sum(self.regs, self.d, &tile);
    }
}

impl Block<'_> {
    /// The product in f64, for accumulators that are not f32.
    fn exactly(self) {
        let Self { regs, wgmma, d, left, b, accumulate } = self;
        let depth = wgmma.depth as usize;
        let mut tile = Tile::new(depth);
        for k in 0..depth {
            tile.b[k] = b[k].map(f64::from);
            (0..ROWS).for_each(|row| tile.a[row][k] = f64::from(left[k][row]));
        }
        let half = wgmma.acc == Accumulator::Half;
        let elements = 1 + usize::from(half);
        for (r, reg) in d.iter().enumerate().filter(|_| accumulate) {
            for (lane, i) in (0..LANES).flat_map(|lane| (0..elements).map(move |i| (lane, i))) {
                let (row, column) = place_c(half, lane, r, i);
                tile.c[row][column] = accumulator(regs.value(*reg, lane), wgmma.acc, i);
            }
        }
        tile.multiply();
        for (r, reg) in d.iter().enumerate() {
            for lane in 0..LANES {
                let value = (0..elements).fold(0, |bits, i| {
                    let (row, column) = place_c(half, lane, r, i);
                    bits | round(tile.c[row][column], wgmma.acc, wgmma.saturate) << (16 * i)
                });
                regs.set(*reg, lane, value);
            }
        }
    }
}

/// The numbers of a piece of shared memory, and how many there are. Those of 16 or fewer bits and tf32 are numbers of f32.
fn numbers(words: &[u32], ty: Element, out: &mut [f32; PIECE_BYTES as usize]) -> usize {
    let bytes = element_bytes(ty) as usize;
    let count = PIECE_BYTES as usize / bytes;
    let element = |at: usize| words[at * bytes / 4] >> (8 * (at * bytes % 4));
    let each = out[..count].iter_mut().enumerate();
    match ty {
        Element::Float(TF32) => each.for_each(|(at, out)| *out = f32::from_bits(words[at] & !0x1fff)),
        Element::Float(BF16) => each.for_each(|(at, out)| *out = f32::from_bits(element(at) << 16)),
        Element::Int { signed: true, .. } => each.for_each(|(at, out)| *out = f32::from(element(at) as u8 as i8)),
        Element::Int { .. } => each.for_each(|(at, out)| *out = f32::from(element(at) as u8)),
        _ => each.for_each(|(at, out)| *out = half(element(at))),
    }
    count
}
