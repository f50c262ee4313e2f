//! A warp's registers: a row holds one register of all 32 lanes.

/// Lanes of a warp.
pub const LANES: usize = 32;
/// A 32-bit register of every lane; narrower ones are zero-extended.
pub type Row = [u32; LANES];
/// A 64-bit register of every lane.
pub type Row64 = [u64; LANES];

/// Which file a register lives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Up to 32 bits.
    Word,
    /// 64 bits.
    Double,
    /// Predicates: a bit a lane.
    Predicate,
}

/// A register: its file and row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reg {
    /// The file.
    pub class: Class,
    /// The row in it.
    pub row: u32,
}

/// The register files of a warp.
#[derive(Clone, Debug, Default)]
pub struct Regs {
    /// Registers of up to 32 bits.
    pub words: Vec<Row>,
    /// Registers of 64 bits.
    pub doubles: Vec<Row64>,
    /// Predicates.
    pub predicates: Vec<u32>,
}

impl Regs {
    /// A row of words.
    #[inline(always)]
    pub fn word(&self, row: u32) -> &Row {
        &self.words[row as usize]
    }

    /// A row of doubles.
    #[inline(always)]
    pub fn double(&self, row: u32) -> &Row64 {
        &self.doubles[row as usize]
    }

    /// Lanes where a predicate holds.
    #[inline(always)]
    pub fn predicate(&self, row: u32) -> u32 {
        self.predicates[row as usize]
    }

    /// A lane's value of any register, widened.
    pub fn value(&self, reg: Reg, lane: usize) -> u64 {
        match reg.class {
            Class::Word => u64::from(self.words[reg.row as usize][lane]),
            Class::Double => self.doubles[reg.row as usize][lane],
            Class::Predicate => u64::from(self.predicates[reg.row as usize] >> lane & 1),
        }
    }

    /// Sets a lane's value of any register.
    pub fn set(&mut self, reg: Reg, lane: usize, value: u64) {
        match reg.class {
            Class::Word => self.words[reg.row as usize][lane] = value as u32,
            Class::Double => self.doubles[reg.row as usize][lane] = value,
            Class::Predicate => {
                let bits = &mut self.predicates[reg.row as usize];
                *bits = *bits & !(1 << lane) | ((value & 1) as u32) << lane;
            }
        }
    }
}

/// How an operand of a lane function is read and written.
pub trait Operand {
    /// A lane's value.
    type Value: Copy + Default;
    /// All lanes' values.
    fn get(regs: &Regs, row: u32) -> [Self::Value; LANES];
    /// Sets the lanes of a mask.
    fn put(regs: &mut Regs, row: u32, values: [Self::Value; LANES], mask: u32);
}

/// Sets the lanes of a mask.
#[inline(always)]
pub fn blend<T: Copy>(row: &mut [T; LANES], values: [T; LANES], mask: u32) {
    if mask == u32::MAX {
        *row = values;
    } else {
        for lane in 0..LANES {
            if mask >> lane & 1 == 1 {
                row[lane] = values[lane];
            }
        }
    }
}

/// A function of every lane. Unlike `map` it is always inlined, so that it vectorises for the caller's features.
#[inline(always)]
fn each<T: Copy, U: Copy + Default>(values: &[T; LANES], f: impl Fn(T) -> U) -> [U; LANES] {
    let mut out = [U::default(); LANES];
    for lane in 0..LANES {
        out[lane] = f(values[lane]);
    }
    out
}

/// A word as `u32`.
pub struct W;
/// A double as `u64`.
pub struct D;
/// A predicate.
pub struct P;
/// A word as `f32`.
pub struct F;
/// A double as `f64`.
pub struct G;

impl Operand for W {
    type Value = u32;
    #[inline(always)]
    fn get(regs: &Regs, row: u32) -> Row {
        regs.words[row as usize]
    }
    #[inline(always)]
    fn put(regs: &mut Regs, row: u32, values: Row, mask: u32) {
        blend(&mut regs.words[row as usize], values, mask);
    }
}

impl Operand for D {
    type Value = u64;
    #[inline(always)]
    fn get(regs: &Regs, row: u32) -> Row64 {
        regs.doubles[row as usize]
    }
    #[inline(always)]
    fn put(regs: &mut Regs, row: u32, values: Row64, mask: u32) {
        blend(&mut regs.doubles[row as usize], values, mask);
    }
}

impl Operand for F {
    type Value = f32;
    #[inline(always)]
    fn get(regs: &Regs, row: u32) -> [f32; LANES] {
        each(&W::get(regs, row), f32::from_bits)
    }
    #[inline(always)]
    fn put(regs: &mut Regs, row: u32, values: [f32; LANES], mask: u32) {
        W::put(regs, row, each(&values, canonical_bits), mask);
    }
}

impl Operand for G {
    type Value = f64;
    #[inline(always)]
    fn get(regs: &Regs, row: u32) -> [f64; LANES] {
        each(&D::get(regs, row), f64::from_bits)
    }
    #[inline(always)]
    fn put(regs: &mut Regs, row: u32, values: [f64; LANES], mask: u32) {
        D::put(regs, row, each(&values, f64::to_bits), mask);
    }
}

impl Operand for P {
    type Value = bool;
    #[inline(always)]
    fn get(regs: &Regs, row: u32) -> [bool; LANES] {
        let bits = regs.predicates[row as usize];
        let mut out = [false; LANES];
        for lane in 0..LANES {
            out[lane] = bits >> lane & 1 == 1;
        }
        out
    }
    #[inline(always)]
    fn put(regs: &mut Regs, row: u32, values: [bool; LANES], mask: u32) {
        let mut bits = 0;
        for lane in 0..LANES {
            bits |= if values[lane] { 1 << lane } else { 0 };
        }
        let row = &mut regs.predicates[row as usize];
        *row = *row & !mask | bits & mask;
    }
}

/// Bits of an f32 result: every NaN is the one that the hardware writes.
#[inline(always)]
fn canonical_bits(value: f32) -> u32 {
    if value.is_nan() { 0x7fff_ffff } else { value.to_bits() }
}

/// Computes one instruction for the lanes of a mask: registers, rows of destination and sources, mask.
pub type AluFn = fn(&mut Regs, &[u32; 6], u32);

/// A lane function over whole rows, compiled for each instruction set: `alu!(W; W a, W b => a.wrapping_add(b))`.
macro_rules! alu {
    ($D:ident; $($C:ident $x:ident),+ => $body:expr) => {{
        struct Lanes<'a>(&'a mut $crate::exec::regs::Regs, &'a [u32; 6], u32);
        impl pulp::WithSimd for Lanes<'_> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: pulp::Simd>(self, _: S) {
                use $crate::exec::regs::{LANES, Operand};
                let Self(regs, rows, mask) = self;
                let mut source = 0;
                $(
                    source += 1;
                    let $x = <$crate::exec::regs::$C as Operand>::get(regs, rows[source]);
                )+
                let mut out = [<$crate::exec::regs::$D as Operand>::Value::default(); LANES];
                for lane in 0..LANES {
                    $(let $x = $x[lane];)+
                    out[lane] = $body;
                }
                <$crate::exec::regs::$D as Operand>::put(regs, rows[0], out, mask);
            }
        }
        fn run(regs: &mut $crate::exec::regs::Regs, rows: &[u32; 6], mask: u32) {
            pulp::Arch::new().dispatch(Lanes(regs, rows, mask));
        }
        run as $crate::exec::regs::AluFn
    }};
}
pub(crate) use alu;
