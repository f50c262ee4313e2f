//! Arithmetic of f16 and bf16, one number or two a register.

use super::Lower;
use super::opcode::Opcode;
use crate::error::At;
use crate::exec::regs::{AluFn, Class, alu};
use crate::number::{add_odd, flush, pick};
use crate::ptx::{Instruction, Kind, Type};
use half::{bf16, f16};

const FLUSH: u32 = 1;
const SATURATE: u32 = 2;
const RELU: u32 = 4;
const LARGER: u32 = 8;
const NAN: u32 = 16;
const ABS: u32 = 32;

fn from_f16(bits: u32, flags: u32) -> f64 {
    let value = f16::from_bits(bits as u16);
    if flags & FLUSH != 0 && bits & 0x7c00 == 0 { f64::from(0.0f32.copysign(value.to_f32())) } else { f64::from(value) }
}

fn from_bf16(bits: u32, flags: u32) -> f64 {
    let value = f32::from_bits(bits << 16);
    f64::from(if flags & FLUSH != 0 { flush(value) } else { value })
}

/// Clamps as the flags say.
fn clamp(value: f64, flags: u32) -> f64 {
    if flags & SATURATE != 0 {
        return if value > 0.0 { value.min(1.0) } else { 0.0 };
    }
    if flags & RELU != 0 && value <= 0.0 { 0.0 } else { value }
}

/// An f64 as f32, rounded to odd, so that a further rounding is as if from the f64.
fn odd(value: f64) -> f32 {
    let near = value as f32;
    let back = f64::from(near);
    if back == value || value.is_nan() || near.to_bits() & 1 == 1 {
        near
    } else if near.is_infinite() {
        f32::MAX.copysign(near)
    } else if back < value {
        near.next_up()
    } else {
        near.next_down()
    }
}

fn to_f16(value: f64, flags: u32) -> u32 {
    if value.is_nan() {
        return if flags & SATURATE != 0 { 0 } else { 0x7fff };
    }
    let clamped = clamp(value, flags);
    let bits = u32::from(f16::from_f32(odd(clamped)).to_bits());
    // Subnormal before it is rounded.
    let tiny = clamped.abs() < f64::from(f16::MIN_POSITIVE);
    if flags & FLUSH != 0 && tiny { bits & 0x8000 } else { bits }
}

fn to_bf16(value: f64, flags: u32) -> u32 {
    if value.is_nan() {
        return if flags & SATURATE != 0 { 0 } else { 0x7fff };
    }
    let bits = u32::from(bf16::from_f32(odd(clamp(value, flags))).to_bits());
    if flags & FLUSH != 0 && bits & 0x7f80 == 0 { bits & 0x8000 } else { bits }
}

fn pick_by(a: f64, b: f64, flags: u32) -> f64 {
    if flags & ABS == 0 {
        return pick(a, b, flags & LARGER != 0, flags & NAN != 0);
    }
    let size = pick(a.abs(), b.abs(), flags & LARGER != 0, flags & NAN != 0);
    if a.is_sign_negative() != b.is_sign_negative() { -size } else { size }
}

/// A function of numbers as f64, for each of the four types; the last source holds the flags.
macro_rules! of_half {
    ($kind:expr; $flags:ident; $($x:ident),+ => $e:expr) => {
        match $kind {
            Kind::Float => alu!(W; $(W $x),+, W $flags => { $(let $x = from_f16($x, $flags);)+ to_f16($e, $flags) }),
            Kind::Brain => alu!(W; $(W $x),+, W $flags => { $(let $x = from_bf16($x, $flags);)+ to_bf16($e, $flags) }),
            Kind::FloatPair => alu!(W; $(W $x),+, W $flags => {
                let low = { $(let $x = from_f16($x & 0xffff, $flags);)+ to_f16($e, $flags) };
                let high = { $(let $x = from_f16($x >> 16, $flags);)+ to_f16($e, $flags) };
                low | high << 16
            }),
            _ => alu!(W; $(W $x),+, W $flags => {
                let low = { $(let $x = from_bf16($x & 0xffff, $flags);)+ to_bf16($e, $flags) };
                let high = { $(let $x = from_bf16($x >> 16, $flags);)+ to_bf16($e, $flags) };
                low | high << 16
            }),
        }
    };
}

impl<'m> Lower<'m> {
    /// `add`, `sub`, `mul`, `fma`, `min`, `max`, `abs`, `neg`.
    pub(super) fn half(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        o.one_of(&["rn"]);
        let mut flags = 0;
        for (name, flag) in [("ftz", FLUSH), ("sat", SATURATE), ("relu", RELU), ("NaN", NAN)] {
            flags |= if o.flag(name) { flag } else { 0 };
        }
        if o.flag("xorsign") && o.flag("abs") {
            flags |= ABS;
        }
        let ty = self.some_type(o, i)?;
        let f: AluFn = match o.base {
            "add" => of_half!(ty.kind; k; a, b => add_odd(a, b)),
            "sub" => of_half!(ty.kind; k; a, b => add_odd(a, -b)),
            "mul" => of_half!(ty.kind; k; a, b => a * b),
            "fma" => of_half!(ty.kind; k; a, b, c => add_odd(a * b, c)),
            "min" | "max" => {
                flags |= if o.base == "max" { LARGER } else { 0 };
                of_half!(ty.kind; k; a, b => pick_by(a, b, k))
            }
            "abs" | "neg" => return self.half_sign(o.base, i, ty, flags & FLUSH != 0),
            _ => return self.unsupported(i),
        };
        self.with_flags(i, ty, if o.base == "fma" { 3 } else { 2 }, f, flags)
    }

    fn with_flags(&mut self, i: &'m Instruction, ty: Type, count: usize, f: AluFn, flags: u32) -> Result<(), At> {
        self.arity(i, count + 1..=count + 1)?;
        let mut sources = Vec::new();
        for operand in &i.operands[1..] {
            sources.push(self.source(operand, ty)?);
        }
        sources.push(self.constant(Class::Word, u64::from(flags)));
        let dst = self.dst(&i.operands[0], ty)?;
        self.alu(f, dst, &sources)
    }

    fn half_sign(&mut self, base: &str, i: &'m Instruction, ty: Type, ftz: bool) -> Result<(), At> {
        let f = match base {
            "abs" => of_half!(ty.kind; k; a => a.abs()),
            _ => of_half!(ty.kind; k; a => -a),
        };
        self.with_flags(i, ty, 1, f, u32::from(ftz))
    }

    /// `ex2` and `tanh`.
    pub(super) fn half_function(&mut self, base: &str, i: &'m Instruction, ty: Type, ftz: bool) -> Result<(), At> {
        let f = match base {
            "ex2" => of_half!(ty.kind; k; a => a.exp2()),
            "tanh" => of_half!(ty.kind; k; a => a.tanh()),
            _ => return self.unsupported(i),
        };
        self.with_flags(i, ty, 1, f, u32::from(ftz))
    }
}
