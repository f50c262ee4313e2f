//! Comparisons and selections.

use super::Lower;
use super::opcode::Opcode;
use crate::error::At;
use crate::exec::regs::{AluFn, Class, Reg, alu};
use crate::number::flush;
use crate::ptx::{Instruction, Kind, Operand, Type};
use half::{bf16, f16};

const PREDICATE: Type = Type { kind: Kind::Predicate, bits: 1 };
const OPERATORS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan",
];

macro_rules! ordered {
    ($op:expr, $C:ident, $a:ident, $b:ident, $x:expr, $y:expr) => {
        match $op {
            "eq" => alu!(P; $C $a, $C $b => $x == $y),
            "ne" => alu!(P; $C $a, $C $b => $x != $y),
            "lt" | "lo" => alu!(P; $C $a, $C $b => $x < $y),
            "le" | "ls" => alu!(P; $C $a, $C $b => $x <= $y),
            "gt" | "hi" => alu!(P; $C $a, $C $b => $x > $y),
            "ge" | "hs" => alu!(P; $C $a, $C $b => $x >= $y),
            _ => return None,
        }
    };
}

macro_rules! floating {
    ($op:expr, $C:ident, $a:ident, $b:ident, $x:expr, $y:expr) => {
        match $op {
            "eq" => alu!(P; $C $a, $C $b => $x == $y),
            "ne" => alu!(P; $C $a, $C $b => $x != $y && !$x.is_nan() && !$y.is_nan()),
            "lt" => alu!(P; $C $a, $C $b => $x < $y),
            "le" => alu!(P; $C $a, $C $b => $x <= $y),
            "gt" => alu!(P; $C $a, $C $b => $x > $y),
            "ge" => alu!(P; $C $a, $C $b => $x >= $y),
            "equ" => alu!(P; $C $a, $C $b => $x == $y || $x.is_nan() || $y.is_nan()),
            "neu" => alu!(P; $C $a, $C $b => $x != $y),
            "ltu" => alu!(P; $C $a, $C $b => !($x >= $y)),
            "leu" => alu!(P; $C $a, $C $b => !($x > $y)),
            "gtu" => alu!(P; $C $a, $C $b => !($x <= $y)),
            "geu" => alu!(P; $C $a, $C $b => !($x < $y)),
            "num" => alu!(P; $C $a, $C $b => !$x.is_nan() && !$y.is_nan()),
            "nan" => alu!(P; $C $a, $C $b => $x.is_nan() || $y.is_nan()),
            _ => return None,
        }
    };
}

fn half(bits: u32) -> f32 {
    f16::from_bits(bits as u16).to_f32()
}

fn brain(bits: u32) -> f32 {
    bf16::from_bits(bits as u16).to_f32()
}

/// The predicate of a comparison.
#[expect(clippy::neg_cmp_op_on_partial_ord, reason = "unordered comparisons hold for NaN")]
fn comparison(op: &str, ty: Type, ftz: bool) -> Option<AluFn> {
    Some(match (ty.kind, ty.bits) {
        (Kind::Signed, 16) => ordered!(op, W, a, b, (a as u16 as i16), (b as u16 as i16)),
        (Kind::Signed, 32) => ordered!(op, W, a, b, (a as i32), (b as i32)),
        (Kind::Signed, 64) => ordered!(op, D, a, b, (a as i64), (b as i64)),
        (Kind::Unsigned | Kind::Bits, 16 | 32) => ordered!(op, W, a, b, a, b),
        (Kind::Unsigned | Kind::Bits, 64) => ordered!(op, D, a, b, a, b),
        (Kind::Float, 32) if ftz => floating!(op, F, a, b, flush(a), flush(b)),
        (Kind::Float, 32) => floating!(op, F, a, b, a, b),
        (Kind::Float, 64) => floating!(op, G, a, b, a, b),
        (Kind::Float, 16) => floating!(op, W, a, b, half(a), half(b)),
        (Kind::Brain, 16) => floating!(op, W, a, b, brain(a), brain(b)),
        _ => return None,
    })
}

impl<'m> Lower<'m> {
    /// `set`, `setp`, `selp`, `slct`.
    pub(super) fn compare(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        match o.base {
            "selp" => self.selp(o, i),
            "slct" => self.slct(o, i),
            _ => self.set(o, i),
        }
    }

    fn selp(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let ty = self.some_type(o, i)?;
        self.arity(i, 4..=4)?;
        let sources =
            [self.source(&i.operands[1], ty)?, self.source(&i.operands[2], ty)?, self.predicate_reg(&i.operands[3])?];
        let dst = self.dst(&i.operands[0], ty)?;
        let f = match ty.bits {
            64 => alu!(D; D a, D b, P p => if p { a } else { b }),
            _ => alu!(W; W a, W b, P p => if p { a } else { b }),
        };
        self.alu(f, dst, &sources)
    }

    fn slct(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let ftz = o.flag("ftz");
        let ty = self.some_type(o, i)?;
        let by = self.some_type(o, i)?;
        self.arity(i, 4..=4)?;
        let sources =
            [self.source(&i.operands[1], ty)?, self.source(&i.operands[2], ty)?, self.source(&i.operands[3], by)?];
        let dst = self.dst(&i.operands[0], ty)?;
        let f = match (ty.bits, by.kind, ftz) {
            (64, Kind::Signed, false) => alu!(D; D a, D b, W c => if c as i32 >= 0 { a } else { b }),
            (_, Kind::Signed, false) => alu!(W; W a, W b, W c => if c as i32 >= 0 { a } else { b }),
            (64, Kind::Float, false) => alu!(D; D a, D b, F c => if c >= 0.0 { a } else { b }),
            (64, Kind::Float, true) => alu!(D; D a, D b, F c => if flush(c) >= 0.0 { a } else { b }),
            (_, Kind::Float, false) => alu!(W; W a, W b, F c => if c >= 0.0 { a } else { b }),
            (_, Kind::Float, true) => alu!(W; W a, W b, F c => if flush(c) >= 0.0 { a } else { b }),
            _ => return self.unsupported(i),
        };
        self.alu(f, dst, &sources)
    }

    /// `setp.op[.bool].type p|q, a, b, c` and `set.op.dtype.stype d, a, b`.
    fn set(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let Some(op) = o.one_of(&OPERATORS) else { return self.fail("a comparison needs an operator") };
        let combine = o.one_of(&["and", "or", "xor"]);
        let ftz = o.flag("ftz");
        let result = if o.base == "set" { Some(self.some_type(o, i)?) } else { None };
        let ty = self.some_type(o, i)?;
        self.arity(i, if combine.is_some() { 4..=4 } else { 3..=3 })?;
        if matches!(ty.kind, Kind::FloatPair | Kind::BrainPair) {
            return self.set_pair(i, op, combine, result, ty);
        }
        let Some(f) = comparison(op, ty, ftz) else { return self.unsupported(i) };
        let sources = [self.source(&i.operands[1], ty)?, self.source(&i.operands[2], ty)?];
        if let (None, None, Operand::Name(..)) = (combine, result, &i.operands[0]) {
            let dst = self.dst(&i.operands[0], PREDICATE)?;
            return self.alu(f, dst, &sources);
        }
        let holds = self.new_reg(Class::Predicate);
        self.alu(f, holds, &sources)?;
        let with = match combine {
            Some(_) => Some(self.predicate_reg(&i.operands[3])?),
            None => None,
        };
        if let Some(result) = result {
            let value = self.combined(holds, combine, with, false)?;
            let dst = self.dst(&i.operands[0], result)?;
            let f = match (result.kind, result.bits) {
                (Kind::Float, 32) => alu!(F; P p => if p { 1.0 } else { 0.0 }),
                (Kind::Unsigned | Kind::Signed | Kind::Bits, 32) => alu!(W; P p => if p { u32::MAX } else { 0 }),
                (Kind::Unsigned | Kind::Signed | Kind::Bits, 16) => alu!(W; P p => if p { 0xffff } else { 0 }),
                _ => return self.unsupported(i),
            };
            return self.alu(f, dst, &[value]);
        }
        match &i.operands[0] {
            Operand::Pair(p, q) => {
                let yes = self.combined(holds, combine, with, false)?;
                let no = self.combined(holds, combine, with, true)?;
                self.copy_predicate(p, yes)?;
                self.copy_predicate(q, no)
            }
            p => {
                let yes = self.combined(holds, combine, with, false)?;
                self.copy_predicate(p, yes)
            }
        }
    }

    fn copy_predicate(&mut self, dst: &Operand, from: Reg) -> Result<(), At> {
        let dst = self.dst(dst, PREDICATE)?;
        self.alu(alu!(P; P p => p), dst, &[from])
    }

    fn combined(&mut self, holds: Reg, combine: Option<&str>, with: Option<Reg>, negate: bool) -> Result<Reg, At> {
        let f = match (combine, negate) {
            (None, false) => return Ok(holds),
            (None, true) => alu!(P; P a => !a),
            (Some("and"), false) => alu!(P; P a, P b => a & b),
            (Some("and"), true) => alu!(P; P a, P b => !a & b),
            (Some("or"), false) => alu!(P; P a, P b => a | b),
            (Some("or"), true) => alu!(P; P a, P b => !a | b),
            (Some(_), false) => alu!(P; P a, P b => a ^ b),
            (Some(_), true) => alu!(P; P a, P b => !a ^ b),
        };
        let out = self.new_reg(Class::Predicate);
        let sources: Vec<Reg> = std::iter::once(holds).chain(with).collect();
        self.alu(f, out, &sources)?;
        Ok(out)
    }

    /// Comparisons of two numbers at once: `setp` gives a predicate for each, `set` a mask or a pair.
    fn set_pair(
        &mut self,
        i: &'m Instruction,
        op: &str,
        combine: Option<&str>,
        result: Option<Type>,
        ty: Type,
    ) -> Result<(), At> {
        let single = Type { kind: if ty.kind == Kind::FloatPair { Kind::Float } else { Kind::Brain }, bits: 16 };
        let Some(f) = comparison(op, single, false) else { return self.unsupported(i) };
        let sources = [self.source(&i.operands[1], ty)?, self.source(&i.operands[2], ty)?];
        let mut holds = Vec::new();
        for half in [alu!(W; W a => a & 0xffff), alu!(W; W a => a >> 16)] {
            let (a, b) = (self.new_reg(Class::Word), self.new_reg(Class::Word));
            self.alu(half, a, &sources[..1])?;
            self.alu(half, b, &sources[1..])?;
            let p = self.new_reg(Class::Predicate);
            self.alu(f, p, &[a, b])?;
            holds.push(p);
        }
        let with = match combine {
            Some(_) => Some(self.predicate_reg(&i.operands[3])?),
            None => None,
        };
        let low = self.combined(holds[0], combine, with, false)?;
        let high = self.combined(holds[1], combine, with, false)?;
        let Some(result) = result else {
            let Operand::Pair(p, q) = &i.operands[0] else {
                return self.fail("a comparison of pairs gives two predicates");
            };
            self.copy_predicate(p, low)?;
            return self.copy_predicate(q, high);
        };
        let dst = self.dst(&i.operands[0], result)?;
        let f = match (result.kind, result.bits) {
            (Kind::FloatPair, _) => alu!(W; P p, P q => if p { 0x3c00 } else { 0 } | if q { 0x3c00_0000 } else { 0 }),
            (Kind::BrainPair, _) => alu!(W; P p, P q => if p { 0x3f80 } else { 0 } | if q { 0x3f80_0000 } else { 0 }),
            (_, 32) => alu!(W; P p, P q => if p { 0xffff } else { 0 } | if q { 0xffff_0000 } else { 0 }),
            _ => return self.unsupported(i),
        };
        self.alu(f, dst, &[low, high])
    }
}
