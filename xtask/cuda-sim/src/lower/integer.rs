//! Integer arithmetic.

use super::Lower;
use super::opcode::Opcode;
use crate::error::At;
use crate::exec::regs::{AluFn, Class, Reg, alu};
use crate::ptx::{Instruction, Kind, Type};

const U32: Type = Type { kind: Kind::Unsigned, bits: 32 };

fn signed16(value: u32) -> i32 {
    i32::from(value as u16 as i16)
}

/// Which part of a product is kept.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Low,
    High,
    Wide,
}

impl<'m> Lower<'m> {
    /// Opcodes that integers and floats share.
    pub(super) fn arithmetic(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        if o.flag("cc") {
            return self.with_carry(o, i);
        }
        let text = i.opcode.rsplit('.').find_map(Type::named);
        match text.map(|ty| ty.kind) {
            Some(Kind::Float | Kind::FloatPair | Kind::Brain | Kind::BrainPair) => self.float(o, i),
            Some(Kind::Unsigned | Kind::Signed | Kind::Bits) => self.integer(o, i),
            _ => self.fail(format!("`{}` has no type", i.opcode)),
        }
    }

    /// Applies a function whose operands all have one type.
    pub(super) fn plain(&mut self, i: &'m Instruction, ty: Type, sources: usize, f: AluFn) -> Result<(), At> {
        self.arity(i, sources + 1..=sources + 1)?;
        let mut regs = Vec::with_capacity(sources);
        for operand in &i.operands[1..] {
            regs.push(self.source(operand, ty)?);
        }
        let dst = self.dst(&i.operands[0], ty)?;
        self.alu(f, dst, &regs)
    }

    /// Integer opcodes.
    pub(super) fn integer(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        match o.base {
            "mul" | "mad" => return self.product(o, i),
            "addc" | "subc" | "madc" => return self.with_carry(o, i),
            "mul24" | "mad24" => return self.product24(o, i),
            "dp4a" | "dp2a" => return self.dot(o, i),
            _ => {}
        }
        let Some(ty) = o.ty() else { return self.fail(format!("`{}` has no type", i.opcode)) };
        if o.flag("sat") {
            let f = match (o.base, ty.kind, ty.bits) {
                ("add", Kind::Signed, 32) => alu!(W; W a, W b => (a as i32).saturating_add(b as i32) as u32),
                ("sub", Kind::Signed, 32) => alu!(W; W a, W b => (a as i32).saturating_sub(b as i32) as u32),
                _ => return self.fail(format!("`{}` is not supported", i.opcode)),
            };
            return self.plain(i, ty, 2, f);
        }
        let relu = o.flag("relu");
        let unary = matches!(o.base, "abs" | "neg");
        let f = if unary { unary_function(o.base, ty) } else { binary_function(o.base, ty) };
        let f = if relu { relu_function(o.base, ty) } else { f };
        let Some(f) = f else { return self.fail(format!("`{}` is not supported", i.opcode)) };
        let sources = if o.base == "sad" { 3 } else { 2 - usize::from(unary) };
        self.plain(i, ty, sources, f)
    }

    /// `mul` and `mad`.
    fn product(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let part = match o.one_of(&["lo", "hi", "wide"]) {
            Some("lo") => Part::Low,
            Some("hi") => Part::High,
            Some("wide") => Part::Wide,
            _ => return self.fail("an integer product needs .lo, .hi or .wide"),
        };
        let Some(ty) = o.ty() else { return self.fail("an integer product needs a type") };
        let mad = o.base == "mad";
        let sat = o.flag("sat");
        let Some(f) = product_function(part, ty, mad) else {
            return self.fail(format!("`{}` is not supported", i.opcode));
        };
        let f = if !sat {
            f
        } else if part == Part::High && ty == (Type { kind: Kind::Signed, bits: 32 }) && mad {
            alu!(W; W a, W b, W c => {
                (((i64::from(a as i32) * i64::from(b as i32)) >> 32) as i32).saturating_add(c as i32) as u32
            })
        } else {
            return self.fail(format!("`{}` is not supported", i.opcode));
        };
        self.arity(i, if mad { 4..=4 } else { 3..=3 })?;
        let wide = if part == Part::Wide { Type { bits: ty.bits * 2, ..ty } } else { ty };
        let mut sources = vec![self.source(&i.operands[1], ty)?, self.source(&i.operands[2], ty)?];
        if mad {
            sources.push(self.source(&i.operands[3], wide)?);
        }
        let dst = self.dst(&i.operands[0], wide)?;
        self.alu(f, dst, &sources)
    }

    fn product24(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let low = match o.one_of(&["lo", "hi"]) {
            Some(part) => part == "lo",
            None => return self.fail("mul24 needs .lo or .hi"),
        };
        let ty = o.ty().unwrap_or(U32);
        let f = match (o.base, ty.kind, low) {
            ("mul24", Kind::Unsigned, true) => {
                alu!(W; W a, W b => (u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)) as u32)
            }
            ("mul24", Kind::Unsigned, false) => {
                alu!(W; W a, W b => ((u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)) >> 16) as u32)
            }
            ("mul24", Kind::Signed, true) => {
                alu!(W; W a, W b => (i64::from((a << 8) as i32 >> 8) * i64::from((b << 8) as i32 >> 8)) as u32)
            }
            ("mul24", Kind::Signed, false) => {
                alu!(W; W a, W b => ((i64::from((a << 8) as i32 >> 8) * i64::from((b << 8) as i32 >> 8)) >> 16) as u32)
            }
            ("mad24", Kind::Unsigned, true) => {
                alu!(W; W a, W b, W c => ((u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)) as u32).wrapping_add(c))
            }
            ("mad24", Kind::Signed, true) => alu!(W; W a, W b, W c => {
                ((i64::from((a << 8) as i32 >> 8) * i64::from((b << 8) as i32 >> 8)) as u32).wrapping_add(c)
            }),
            _ => return self.fail(format!("`{}` is not supported", i.opcode)),
        };
        self.plain(i, ty, if o.base == "mad24" { 3 } else { 2 }, f)
    }

    /// `dp4a` and `dp2a`.
    fn dot(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let low = if o.base == "dp2a" { o.one_of(&["lo", "hi"]).map(|part| part == "lo") } else { None };
        let (Some(a), Some(b)) = (o.ty(), o.ty()) else { return self.fail("a dot product needs two types") };
        self.arity(i, 4..=4)?;
        let flags = u64::from(a.kind == Kind::Signed) | u64::from(b.kind == Kind::Signed) << 1;
        let flags = flags | u64::from(low == Some(false)) << 2;
        let flags = self.constant(Class::Word, flags);
        let f = if o.base == "dp4a" {
            alu!(W; W a, W b, W c, W flags => {
                (0..4).fold(c, |sum, k| {
                    let (x, y) = (a >> (8 * k) & 255, b >> (8 * k) & 255);
                    let x = if flags & 1 == 1 { x as u8 as i8 as i32 } else { x as i32 };
                    let y = if flags & 2 == 2 { y as u8 as i8 as i32 } else { y as i32 };
                    sum.wrapping_add((x * y) as u32)
                })
            })
        } else {
            alu!(W; W a, W b, W c, W flags => {
                (0..2).fold(c, |sum, k| {
                    let x = a >> (16 * k) & 0xffff;
                    let y = b >> (8 * k + if flags & 4 == 4 { 16 } else { 0 }) & 255;
                    let x = if flags & 1 == 1 { signed16(x) } else { x as i32 };
                    let y = if flags & 2 == 2 { y as u8 as i8 as i32 } else { y as i32 };
                    sum.wrapping_add(x.wrapping_mul(y) as u32)
                })
            })
        };
        let sources = [
            self.source(&i.operands[1], U32)?,
            self.source(&i.operands[2], U32)?,
            self.source(&i.operands[3], U32)?,
            flags,
        ];
        let dst = self.dst(&i.operands[0], U32)?;
        self.alu(f, dst, &sources)
    }

    /// Additions and products that read or write the carry.
    fn with_carry(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let reads = matches!(o.base, "addc" | "subc" | "madc");
        let writes = o.flag("cc") || i.opcode.split('.').any(|part| part == "cc");
        let part = o.one_of(&["lo", "hi"]);
        let Some(ty) = o.ty() else { return self.fail("a carry needs a type") };
        let product = matches!(o.base, "mad" | "madc");
        if product != part.is_some() || !matches!(ty.bits, 32 | 64) {
            return self.fail(format!("`{}` is not supported", i.opcode));
        }
        let mut sources = Vec::new();
        self.arity(i, if product { 4..=4 } else { 3..=3 })?;
        for operand in &i.operands[1..] {
            sources.push(self.source(operand, ty)?);
        }
        let dst = self.dst(&i.operands[0], ty)?;
        if let Some(part) = part {
            let part = if part == "lo" { Part::Low } else { Part::High };
            let Some(f) = product_function(part, ty, false) else {
                return self.fail(format!("`{}` is not supported", i.opcode));
            };
            let partial = self.new_reg(dst.class);
            self.alu(f, partial, &sources[..2])?;
            sources = vec![partial, sources[2]];
        }
        let subtract = o.base.starts_with("sub");
        let carry = match self.carry {
            Some(carry) => carry,
            None => *self.carry.insert(Reg { class: Class::Predicate, row: self.rows[2] }),
        };
        self.rows[2] = self.rows[2].max(carry.row + 1);
        sources.push(if reads { carry } else { self.constant(Class::Predicate, 0) });
        let sum = self.new_reg(dst.class);
        let (add, over) = carry_functions(ty.bits, subtract);
        self.alu(add, sum, &sources)?;
        if writes {
            self.alu(over, carry, &sources)?;
        }
        let copy = if ty.bits == 32 { alu!(W; W a => a) } else { alu!(D; D a => a) };
        self.alu(copy, dst, &[sum])
    }
}

/// Sum or difference with a carry in, and its carry out.
fn carry_functions(bits: u32, subtract: bool) -> (AluFn, AluFn) {
    match (bits, subtract) {
        (32, false) => (
            alu!(W; W a, W b, P c => a.wrapping_add(b).wrapping_add(u32::from(c))),
            alu!(P; W a, W b, P c => u64::from(a) + u64::from(b) + u64::from(c) > u64::from(u32::MAX)),
        ),
        (32, true) => (
            alu!(W; W a, W b, P c => a.wrapping_sub(b).wrapping_sub(u32::from(c))),
            alu!(P; W a, W b, P c => u64::from(a) < u64::from(b) + u64::from(c)),
        ),
        (_, false) => (
            alu!(D; D a, D b, P c => a.wrapping_add(b).wrapping_add(u64::from(c))),
            alu!(P; D a, D b, P c => u128::from(a) + u128::from(b) + u128::from(c) > u128::from(u64::MAX)),
        ),
        (_, true) => (
            alu!(D; D a, D b, P c => a.wrapping_sub(b).wrapping_sub(u64::from(c))),
            alu!(P; D a, D b, P c => u128::from(a) < u128::from(b) + u128::from(c)),
        ),
    }
}

fn unary_function(base: &str, ty: Type) -> Option<AluFn> {
    Some(match (base, ty.bits) {
        ("abs", 16) => alu!(W; W a => signed16(a).wrapping_abs() as u32 & 0xffff),
        ("abs", 32) => alu!(W; W a => (a as i32).wrapping_abs() as u32),
        ("abs", 64) => alu!(D; D a => (a as i64).wrapping_abs() as u64),
        ("neg", 16) => alu!(W; W a => a.wrapping_neg() & 0xffff),
        ("neg", 32) => alu!(W; W a => a.wrapping_neg()),
        ("neg", 64) => alu!(D; D a => a.wrapping_neg()),
        _ => return None,
    })
}

fn relu_function(base: &str, ty: Type) -> Option<AluFn> {
    Some(match (base, ty.kind, ty.bits) {
        ("min", Kind::Signed, 32) => alu!(W; W a, W b => (a as i32).min(b as i32).max(0) as u32),
        ("max", Kind::Signed, 32) => alu!(W; W a, W b => (a as i32).max(b as i32).max(0) as u32),
        _ => return None,
    })
}

fn binary_function(base: &str, ty: Type) -> Option<AluFn> {
    match ty.bits {
        16 => binary16(base, ty.kind == Kind::Signed),
        32 => binary32(base, ty.kind == Kind::Signed),
        64 => binary64(base, ty.kind == Kind::Signed),
        _ => None,
    }
}

fn binary16(base: &str, signed: bool) -> Option<AluFn> {
    Some(match (base, signed) {
        ("add", _) => alu!(W; W a, W b => a.wrapping_add(b) & 0xffff),
        ("sub", _) => alu!(W; W a, W b => a.wrapping_sub(b) & 0xffff),
        ("div", false) => alu!(W; W a, W b => a.checked_div(b).unwrap_or(0xffff)),
        ("div", true) => alu!(W; W a, W b => signed16(a).checked_div(signed16(b)).unwrap_or(-1) as u32 & 0xffff),
        ("rem", false) => alu!(W; W a, W b => a.checked_rem(b).unwrap_or(0xffff)),
        ("rem", true) => {
            alu!(W; W a, W b => signed16(a).checked_rem(signed16(b)).unwrap_or(-1) as u32 & 0xffff)
        }
        ("min", false) => alu!(W; W a, W b => a.min(b)),
        ("min", true) => alu!(W; W a, W b => signed16(a).min(signed16(b)) as u32 & 0xffff),
        ("max", false) => alu!(W; W a, W b => a.max(b)),
        ("max", true) => alu!(W; W a, W b => signed16(a).max(signed16(b)) as u32 & 0xffff),
        ("sad", false) => alu!(W; W a, W b, W c => c.wrapping_add(a.abs_diff(b)) & 0xffff),
        ("sad", true) => alu!(W; W a, W b, W c => c.wrapping_add(signed16(a).abs_diff(signed16(b))) & 0xffff),
        _ => return None,
    })
}

fn binary32(base: &str, signed: bool) -> Option<AluFn> {
    Some(match (base, signed) {
        ("add", _) => alu!(W; W a, W b => a.wrapping_add(b)),
        ("sub", _) => alu!(W; W a, W b => a.wrapping_sub(b)),
        ("div", false) => alu!(W; W a, W b => a.checked_div(b).unwrap_or(u32::MAX)),
        ("div", true) => alu!(W; W a, W b => if b == 0 { u32::MAX } else { (a as i32).wrapping_div(b as i32) as u32 }),
        ("rem", false) => alu!(W; W a, W b => a.checked_rem(b).unwrap_or(u32::MAX)),
        ("rem", true) => alu!(W; W a, W b => if b == 0 { u32::MAX } else { (a as i32).wrapping_rem(b as i32) as u32 }),
        ("min", false) => alu!(W; W a, W b => a.min(b)),
        ("min", true) => alu!(W; W a, W b => (a as i32).min(b as i32) as u32),
        ("max", false) => alu!(W; W a, W b => a.max(b)),
        ("max", true) => alu!(W; W a, W b => (a as i32).max(b as i32) as u32),
        ("sad", false) => alu!(W; W a, W b, W c => c.wrapping_add(a.abs_diff(b))),
        ("sad", true) => alu!(W; W a, W b, W c => c.wrapping_add((a as i32).abs_diff(b as i32))),
        _ => return None,
    })
}

fn binary64(base: &str, signed: bool) -> Option<AluFn> {
    Some(match (base, signed) {
        ("add", _) => alu!(D; D a, D b => a.wrapping_add(b)),
        ("sub", _) => alu!(D; D a, D b => a.wrapping_sub(b)),
        ("div", false) => alu!(D; D a, D b => a.checked_div(b).unwrap_or(u64::MAX)),
        ("div", true) => alu!(D; D a, D b => if b == 0 { u64::MAX } else { (a as i64).wrapping_div(b as i64) as u64 }),
        ("rem", false) => alu!(D; D a, D b => a.checked_rem(b).unwrap_or(u64::MAX)),
        ("rem", true) => alu!(D; D a, D b => if b == 0 { u64::MAX } else { (a as i64).wrapping_rem(b as i64) as u64 }),
        ("min", false) => alu!(D; D a, D b => a.min(b)),
        ("min", true) => alu!(D; D a, D b => (a as i64).min(b as i64) as u64),
        ("max", false) => alu!(D; D a, D b => a.max(b)),
        ("max", true) => alu!(D; D a, D b => (a as i64).max(b as i64) as u64),
        ("sad", false) => alu!(D; D a, D b, D c => c.wrapping_add(a.abs_diff(b))),
        ("sad", true) => alu!(D; D a, D b, D c => c.wrapping_add((a as i64).abs_diff(b as i64))),
        _ => return None,
    })
}

fn product_function(part: Part, ty: Type, mad: bool) -> Option<AluFn> {
    let signed = ty.kind == Kind::Signed;
    Some(match (ty.bits, part, signed, mad) {
        (16, Part::Low, _, false) => alu!(W; W a, W b => a.wrapping_mul(b) & 0xffff),
        (16, Part::Low, _, true) => alu!(W; W a, W b, W c => a.wrapping_mul(b).wrapping_add(c) & 0xffff),
        (16, Part::High, false, false) => alu!(W; W a, W b => a.wrapping_mul(b) >> 16),
        (16, Part::High, true, false) => alu!(W; W a, W b => ((signed16(a) * signed16(b)) >> 16) as u32 & 0xffff),
        (16, Part::Wide, false, false) => alu!(W; W a, W b => a.wrapping_mul(b)),
        (16, Part::Wide, true, false) => alu!(W; W a, W b => (signed16(a) * signed16(b)) as u32),
        (16, Part::Wide, false, true) => alu!(W; W a, W b, W c => a.wrapping_mul(b).wrapping_add(c)),
        (16, Part::Wide, true, true) => alu!(W; W a, W b, W c => ((signed16(a) * signed16(b)) as u32).wrapping_add(c)),
        (32, Part::Low, _, false) => alu!(W; W a, W b => a.wrapping_mul(b)),
        (32, Part::Low, _, true) => alu!(W; W a, W b, W c => a.wrapping_mul(b).wrapping_add(c)),
        (32, Part::High, false, false) => alu!(W; W a, W b => ((u64::from(a) * u64::from(b)) >> 32) as u32),
        (32, Part::High, true, false) => {
            alu!(W; W a, W b => ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32)
        }
        (32, Part::High, false, true) => {
            alu!(W; W a, W b, W c => (((u64::from(a) * u64::from(b)) >> 32) as u32).wrapping_add(c))
        }
        (32, Part::High, true, true) => {
            alu!(W; W a, W b, W c => (((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32).wrapping_add(c))
        }
        (32, Part::Wide, false, false) => alu!(D; W a, W b => u64::from(a) * u64::from(b)),
        (32, Part::Wide, true, false) => alu!(D; W a, W b => (i64::from(a as i32) * i64::from(b as i32)) as u64),
        (32, Part::Wide, false, true) => alu!(D; W a, W b, D c => (u64::from(a) * u64::from(b)).wrapping_add(c)),
        (32, Part::Wide, true, true) => {
            alu!(D; W a, W b, D c => ((i64::from(a as i32) * i64::from(b as i32)) as u64).wrapping_add(c))
        }
        (64, Part::Low, _, false) => alu!(D; D a, D b => a.wrapping_mul(b)),
        (64, Part::Low, _, true) => alu!(D; D a, D b, D c => a.wrapping_mul(b).wrapping_add(c)),
        (64, Part::High, false, false) => alu!(D; D a, D b => ((u128::from(a) * u128::from(b)) >> 64) as u64),
        (64, Part::High, true, false) => {
            alu!(D; D a, D b => ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64)
        }
        (64, Part::High, false, true) => {
            alu!(D; D a, D b, D c => (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c))
        }
        (64, Part::High, true, true) => {
            alu!(D; D a, D b, D c => (((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64).wrapping_add(c))
        }
        _ => return None,
    })
}
