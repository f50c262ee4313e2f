//! Operations on matrices.

use super::Place;
use crate::exec::regs::Reg;
use crate::number::Format;

/// What a matrix operand's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// A floating-point format of 16 or fewer bits, or tf32.
    Float(Format),
    /// f64.
    Double,
    /// Integers of 4 or 8 bits, with sign or without.
    Int {
        /// Bits.
        bits: u32,
        /// With sign.
        signed: bool,
    },
}

/// `mma.sync`.
#[derive(Clone, Debug)]
pub struct Mma {
    /// Rows, columns, depth.
    pub shape: [u32; 3],
    /// A's elements.
    pub a_type: Element,
    /// B's elements.
    pub b_type: Element,
    /// Accumulators: f32, s32, or f16 (two a register), or f64.
    pub acc: Accumulator,
    /// Clamp integers instead of wrapping.
    pub saturate: bool,
    /// Result.
    pub d: Box<[Reg]>,
    /// Left operand.
    pub a: Box<[Reg]>,
    /// Right operand.
    pub b: Box<[Reg]>,
    /// Addend.
    pub c: Box<[Reg]>,
}

/// The type of an accumulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulator {
    /// f32.
    Single,
    /// f16.
    Half,
    /// s32.
    Int,
    /// f64.
    Double,
}

/// `ldmatrix` and `stmatrix` of 8 by 8 matrices of 16 bits.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Where: lane 8i + r holds the address of row r of matrix i.
    pub place: Place,
    /// One register a matrix.
    pub regs: Box<[Reg]>,
    /// Transposed.
    pub transposed: bool,
    /// A store.
    pub store: bool,
}

/// Where `wgmma` finds its left operand.
#[derive(Clone, Debug)]
pub enum Left {
    /// In registers.
    Registers(Box<[Reg]>),
    /// In shared memory, by a descriptor.
    Descriptor(Reg),
}

/// `wgmma.mma_async`: a warp's 16 rows of the warpgroup's 64.
#[derive(Clone, Debug)]
pub struct Wgmma {
    /// Columns.
    pub columns: u32,
    /// Depth.
    pub depth: u32,
    /// A's and B's elements.
    pub types: [Element; 2],
    /// The accumulator's type.
    pub acc: Accumulator,
    /// Accumulators, read and written.
    pub d: Box<[Reg]>,
    /// Left operand.
    pub a: Left,
    /// Descriptor of the right operand.
    pub b: Reg,
    /// Accumulators are added (`row << 1 | negated`).
    pub accumulate: u32,
    /// Signs of A and B.
    pub negate: [bool; 2],
    /// The rows, or columns, are contiguous rather than the depth.
    pub transposed: [bool; 2],
    /// Clamp integers.
    pub saturate: bool,
}
