//! Bits: logic, shifts, fields, permutations.

use super::Lower;
use super::opcode::Opcode;
use crate::error::At;
use crate::exec::regs::{AluFn, Class, alu};
use crate::ptx::{Instruction, Kind, Type};

const U32: Type = Type { kind: Kind::Unsigned, bits: 32 };

fn extract32(a: u32, at: u32, bits: u32, signed: bool) -> u32 {
    let (at, bits) = (at & 255, bits & 255);
    let sign = if !signed || bits == 0 { 0 } else { a >> (at + bits - 1).min(31) & 1 };
    let field = if at > 31 { 0 } else { a >> at };
    let kept = if bits > 31 { u32::MAX } else { (1 << bits) - 1 };
    // Bits of the field past the value's end are copies of the sign.
    let beyond = if at > 31 { u32::MAX } else { !(u32::MAX >> at) };
    let filled = if sign == 1 { field | beyond } else { field };
    if bits == 0 { 0 } else { (filled & kept) | if sign == 1 { !kept } else { 0 } }
}

/// 64 bits: the hardware takes all bits of place and length, where those of 32 bits count modulo 256.
fn extract64(a: u64, at: u32, bits: u32, signed: bool) -> u64 {
    let sign = if !signed || bits == 0 { 0 } else { a >> at.saturating_add(bits - 1).min(63) & 1 };
    let field = if at > 63 { 0 } else { a >> at };
    let kept = if bits > 63 { u64::MAX } else { (1 << bits) - 1 };
    let beyond = if at > 63 { u64::MAX } else { !(u64::MAX >> at) };
    let filled = if sign == 1 { field | beyond } else { field };
    if bits == 0 { 0 } else { (filled & kept) | if sign == 1 { !kept } else { 0 } }
}

fn insert(a: u64, b: u64, at: u32, bits: u32, width: u32) -> u64 {
    let (at, bits) = if width == 32 { (at & 255, bits & 255) } else { (at, bits) };
    if at >= width || bits == 0 {
        return b;
    }
    let kept = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 } << at;
    b & !kept | a << at & kept
}

/// `prmt` with a mode as its number: 0 picks bytes by selector, the others by the selector's low bits.
fn permute(a: u32, b: u32, selector: u32, mode: u32) -> u32 {
    let bytes = u64::from(b) << 32 | u64::from(a);
    let s = selector & 3;
    let pick = |byte: u32| -> u32 {
        match mode {
            0 => selector >> (4 * byte) & 15,
            // f4e, b4e
            1 => s + byte,
            2 => s.wrapping_sub(byte) & 7,
            // rc8, ecl, ecr, rc16
            3 => s,
            4 => s.max(byte),
            5 => s.min(byte),
            _ => (s & 1) * 2 + (byte & 1),
        }
    };
    (0..4).fold(0, |out, byte| {
        let pick = pick(byte);
        let value = (bytes >> (8 * (pick & 7))) as u32 & 255;
        let value = if pick & 8 == 0 {
            value
        } else if value & 128 == 0 {
            0
        } else {
            255
        };
        out | value << (8 * byte)
    })
}

impl<'m> Lower<'m> {
    /// Opcodes on bits.
    pub(super) fn bits(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        match o.base {
            "and" | "or" | "xor" | "not" | "cnot" => {
                let ty = self.some_type(o, i)?;
                let unary = matches!(o.base, "not" | "cnot");
                let Some(f) = logic(o.base, ty) else { return self.unsupported(i) };
                self.plain(i, ty, 2 - usize::from(unary), f)
            }
            "shl" | "shr" => self.shift(o, i),
            "shf" => self.funnel(o, i),
            "lop3" => self.lop3(o, i),
            "prmt" => self.prmt(o, i),
            "bfe" | "bfi" | "bmsk" | "szext" => self.field(o, i),
            _ => self.count(o, i),
        }
    }

    pub(super) fn unsupported<T>(&self, i: &Instruction) -> Result<T, At> {
        self.fail(format!("`{}` is not supported", i.opcode))
    }

    /// The type that an opcode must have.
    pub(super) fn some_type(&self, o: &mut Opcode<'_>, i: &Instruction) -> Result<Type, At> {
        o.ty().ok_or(()).or_else(|()| self.fail(format!("`{}` has no type", i.opcode)))
    }

    fn shift(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let ty = self.some_type(o, i)?;
        let signed = ty.kind == Kind::Signed;
        let f = match (o.base, ty.bits, signed) {
            ("shl", 16, _) => alu!(W; W a, W n => if n > 15 { 0 } else { a << n & 0xffff }),
            ("shl", 32, _) => alu!(W; W a, W n => if n > 31 { 0 } else { a << n }),
            ("shl", 64, _) => alu!(D; D a, W n => if n > 63 { 0 } else { a << n }),
            ("shr", 16, false) => alu!(W; W a, W n => if n > 15 { 0 } else { a >> n }),
            ("shr", 32, false) => alu!(W; W a, W n => if n > 31 { 0 } else { a >> n }),
            ("shr", 64, false) => alu!(D; D a, W n => if n > 63 { 0 } else { a >> n }),
            ("shr", 16, true) => alu!(W; W a, W n => (i32::from(a as u16 as i16) >> n.min(15)) as u32 & 0xffff),
            ("shr", 32, true) => alu!(W; W a, W n => (a as i32 >> n.min(31)) as u32),
            ("shr", 64, true) => alu!(D; D a, W n => (a as i64 >> n.min(63)) as u64),
            _ => return self.unsupported(i),
        };
        self.arity(i, 3..=3)?;
        let sources = [self.source(&i.operands[1], ty)?, self.source(&i.operands[2], U32)?];
        let dst = self.dst(&i.operands[0], ty)?;
        self.alu(f, dst, &sources)
    }

    fn funnel(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let (direction, mode) = (o.one_of(&["l", "r"]), o.one_of(&["wrap", "clamp"]));
        let ty = self.some_type(o, i)?;
        let f = match (direction, mode) {
            (Some("l"), Some("wrap")) => {
                alu!(W; W a, W b, W n => (((u64::from(b) << 32 | u64::from(a)) << (n & 31)) >> 32) as u32)
            }
            (Some("l"), Some("clamp")) => {
                alu!(W; W a, W b, W n => (((u64::from(b) << 32 | u64::from(a)) << n.min(32)) >> 32) as u32)
            }
            (Some("r"), Some("wrap")) => {
                alu!(W; W a, W b, W n => ((u64::from(b) << 32 | u64::from(a)) >> (n & 31)) as u32)
            }
            (Some("r"), Some("clamp")) => {
                alu!(W; W a, W b, W n => ((u64::from(b) << 32 | u64::from(a)) >> n.min(32)) as u32)
            }
            _ => return self.unsupported(i),
        };
        self.plain(i, ty, 3, f)
    }

    fn lop3(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let ty = self.some_type(o, i)?;
        let f = alu!(W; W a, W b, W c, W table => {
            let term = |k: u32, x: u32, y: u32, z: u32| if table >> k & 1 == 1 { x & y & z } else { 0 };
            term(7, a, b, c) | term(6, a, b, !c) | term(5, a, !b, c) | term(4, a, !b, !c)
                | term(3, !a, b, c) | term(2, !a, b, !c) | term(1, !a, !b, c) | term(0, !a, !b, !c)
        });
        self.plain(i, ty, 4, f)
    }

    fn prmt(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let ty = self.some_type(o, i)?;
        let modes = ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"];
        let mode = o.one_of(&modes).and_then(|name| modes.iter().position(|mode| *mode == name)).map_or(0, |at| at + 1);
        self.arity(i, 4..=4)?;
        let sources = [
            self.source(&i.operands[1], ty)?,
            self.source(&i.operands[2], ty)?,
            self.source(&i.operands[3], ty)?,
            self.constant(Class::Word, mode as u64),
        ];
        let dst = self.dst(&i.operands[0], ty)?;
        self.alu(alu!(W; W a, W b, W c, W mode => permute(a, b, c, mode)), dst, &sources)
    }

    fn field(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        if matches!(o.base, "bmsk" | "szext") {
            return self.mask_or_extend(o, i);
        }
        let ty = self.some_type(o, i)?;
        let f = match (o.base, ty.bits, ty.kind == Kind::Signed) {
            ("bfe", 32, false) => alu!(W; W a, W at, W bits => extract32(a, at, bits, false)),
            ("bfe", 32, true) => alu!(W; W a, W at, W bits => extract32(a, at, bits, true)),
            ("bfe", 64, false) => alu!(D; D a, W at, W bits => extract64(a, at, bits, false)),
            ("bfe", 64, true) => alu!(D; D a, W at, W bits => extract64(a, at, bits, true)),
            ("bfi", 32, _) => {
                alu!(W; W a, W b, W at, W bits => insert(u64::from(a), u64::from(b), at, bits, 32) as u32)
            }
            ("bfi", 64, _) => alu!(D; D a, D b, W at, W bits => insert(a, b, at, bits, 64)),
            _ => return self.unsupported(i),
        };
        let values = if o.base == "bfe" { 1 } else { 2 };
        self.arity(i, values + 3..=values + 3)?;
        let mut sources = Vec::new();
        for (at, operand) in i.operands[1..].iter().enumerate() {
            sources.push(self.source(operand, if at < values { ty } else { U32 })?);
        }
        let dst = self.dst(&i.operands[0], ty)?;
        self.alu(f, dst, &sources)
    }

    fn mask_or_extend(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let clamp = o.one_of(&["clamp", "wrap"]);
        let ty = self.some_type(o, i)?;
        let f = match (o.base, clamp, ty.kind == Kind::Signed) {
            ("bmsk", Some("clamp"), _) => alu!(W; W at, W bits => {
                let (at, bits) = (at.min(32), bits.min(32));
                ((((1u64 << bits) - 1) << at) & 0xffff_ffff) as u32
            }),
            ("bmsk", Some("wrap"), _) => alu!(W; W at, W bits => ((1u32 << (bits & 31)) - 1) << (at & 31)),
            ("szext", Some("clamp"), false) => {
                alu!(W; W a, W bits => if bits > 31 { a } else { a & ((1u32 << bits) - 1) })
            }
            ("szext", Some("clamp"), true) => alu!(W; W a, W bits => extract32(a, 0, bits.min(32), true)),
            ("szext", Some("wrap"), false) => alu!(W; W a, W bits => a & ((1u32 << (bits & 31)) - 1)),
            ("szext", Some("wrap"), true) => alu!(W; W a, W bits => extract32(a, 0, bits & 31, true)),
            _ => return self.unsupported(i),
        };
        self.plain(i, ty, 2, f)
    }

    /// Counts of bits; the result has 32 bits.
    fn count(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let amount = o.flag("shiftamt");
        let ty = self.some_type(o, i)?;
        let signed = ty.kind == Kind::Signed;
        let f: AluFn = match (o.base, ty.bits, signed, amount) {
            ("popc", 32, ..) => alu!(W; W a => a.count_ones()),
            ("popc", 64, ..) => alu!(W; D a => a.count_ones()),
            ("clz", 32, ..) => alu!(W; W a => a.leading_zeros()),
            ("clz", 64, ..) => alu!(W; D a => a.leading_zeros()),
            ("bfind", 32, false, false) => alu!(W; W a => 31u32.wrapping_sub(a.leading_zeros())),
            ("bfind", 32, true, false) => {
                alu!(W; W a => 31u32.wrapping_sub((if a >> 31 == 1 { !a } else { a }).leading_zeros()))
            }
            ("bfind", 64, false, false) => alu!(W; D a => 63u32.wrapping_sub(a.leading_zeros())),
            ("bfind", 64, true, false) => {
                alu!(W; D a => 63u32.wrapping_sub((if a >> 63 == 1 { !a } else { a }).leading_zeros()))
            }
            ("bfind", 32, false, true) => alu!(W; W a => if a == 0 { u32::MAX } else { a.leading_zeros() }),
            ("bfind", 64, false, true) => alu!(W; D a => if a == 0 { u32::MAX } else { a.leading_zeros() }),
            ("brev", 32, ..) => return self.plain(i, ty, 1, alu!(W; W a => a.reverse_bits())),
            ("brev", 64, ..) => return self.plain(i, ty, 1, alu!(D; D a => a.reverse_bits())),
            _ => return self.unsupported(i),
        };
        self.arity(i, 2..=2)?;
        let source = self.source(&i.operands[1], ty)?;
        let dst = self.dst(&i.operands[0], U32)?;
        self.alu(f, dst, &[source])
    }
}

fn logic(base: &str, ty: Type) -> Option<AluFn> {
    Some(match (base, ty.bits) {
        ("and", 1) => alu!(P; P a, P b => a & b),
        ("or", 1) => alu!(P; P a, P b => a | b),
        ("xor", 1) => alu!(P; P a, P b => a ^ b),
        ("not", 1) => alu!(P; P a => !a),
        ("and", 16 | 32) => alu!(W; W a, W b => a & b),
        ("or", 16 | 32) => alu!(W; W a, W b => a | b),
        ("xor", 16 | 32) => alu!(W; W a, W b => a ^ b),
        ("not", 16) => alu!(W; W a => !a & 0xffff),
        ("not", 32) => alu!(W; W a => !a),
        ("and", 64) => alu!(D; D a, D b => a & b),
        ("or", 64) => alu!(D; D a, D b => a | b),
        ("xor", 64) => alu!(D; D a, D b => a ^ b),
        ("not", 64) => alu!(D; D a => !a),
        ("cnot", 16 | 32) => alu!(W; W a => u32::from(a == 0)),
        ("cnot", 64) => alu!(D; D a => u64::from(a == 0)),
        _ => return None,
    })
}
