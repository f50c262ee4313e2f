//! Moves, packing, address conversions.

use super::opcode::Opcode;
use super::{Lower, class_of};
use crate::code::Op;
use crate::error::At;
use crate::exec::regs::{Class, alu};
use crate::exec::window;
use crate::ptx::{Instruction, Kind, Operand, Type};

const U64: Type = Type { kind: Kind::Unsigned, bits: 64 };

impl<'m> Lower<'m> {
    /// `mov`, `cvta`, `isspacep`, `mapa`, `getctarank`.
    pub(super) fn moves(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        match o.base {
            "mov" => self.mov(o, i),
            "cvta" => self.cvta(o, i),
            "isspacep" => self.isspacep(o, i),
            _ => self.mapa(o, i),
        }
    }

    fn mov(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let ty = self.some_type(o, i)?;
        self.arity(i, 2..=2)?;
        match (&i.operands[0], &i.operands[1]) {
            (dst, Operand::Vector(parts)) => self.pack(dst, parts, ty),
            (Operand::Vector(parts), source) => self.unpack(parts, source, ty),
            (dst, Operand::Name(name, 0))
                if matches!(name.as_str(), "%clock" | "%clock64" | "%globaltimer" | "%clock_hi") =>
            {
                let dst = self.dst(dst, ty)?;
                self.emit(Op::Clock(dst), &[], &[dst])
            }
            (dst, source) => {
                let source = self.source(source, ty)?;
                let dst = self.dst(dst, ty)?;
                let f = match class_of(ty) {
                    Class::Word => alu!(W; W a => a),
                    Class::Double => alu!(D; D a => a),
                    Class::Predicate => alu!(P; P a => a),
                };
                self.alu(f, dst, &[source])
            }
        }
    }

    fn part_type(&self, ty: Type, parts: usize) -> Result<Type, At> {
        let bits = ty.bits / parts.max(1) as u32;
        if bits * parts as u32 != ty.bits || !matches!(bits, 8 | 16 | 32) {
            return self.fail("parts that do not fill the register");
        }
        Ok(Type { kind: Kind::Bits, bits })
    }

    fn pack(&mut self, dst: &Operand, parts: &'m [Operand], ty: Type) -> Result<(), At> {
        let part = self.part_type(ty, parts.len())?;
        let mut sources = Vec::new();
        for operand in parts {
            sources.push(self.source(operand, part)?);
        }
        let dst = self.dst(dst, ty)?;
        let f = match (parts.len(), ty.bits) {
            (1, _) => return self.fail("a vector of one"),
            (2, 64) => alu!(D; W a, W b => u64::from(a) | u64::from(b) << 32),
            (4, 64) => alu!(D; W a, W b, W c, W d => {
                u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48
            }),
            (2, 32) => alu!(W; W a, W b => a & 0xffff | b << 16),
            (4, 32) => alu!(W; W a, W b, W c, W d => a & 255 | (b & 255) << 8 | (c & 255) << 16 | d << 24),
            (2, 16) => alu!(W; W a, W b => a & 255 | (b & 255) << 8),
            _ => return self.fail("this vector is not supported"),
        };
        self.alu(f, dst, &sources)
    }

    fn unpack(&mut self, parts: &'m [Operand], source: &Operand, ty: Type) -> Result<(), At> {
        let part = self.part_type(ty, parts.len())?;
        let source = self.source(source, ty)?;
        // A part may be the source itself: all parts are taken before any is written.
        let mut taken = Vec::new();
        for at in 0..parts.len() {
            let shift = self.constant(Class::Word, at as u64 * u64::from(part.bits));
            let mask = self.constant(Class::Word, if part.bits == 32 { u64::MAX } else { (1 << part.bits) - 1 });
            let out = self.new_reg(Class::Word);
            let f = match ty.bits {
                64 => alu!(W; D a, W n, W mask => (a >> n) as u32 & mask),
                _ => alu!(W; W a, W n, W mask => a >> n & mask),
            };
            self.alu(f, out, &[source, shift, mask])?;
            taken.push(out);
        }
        for (operand, value) in parts.iter().zip(taken) {
            let dst = self.dst(operand, part)?;
            self.alu(alu!(W; W a => a), dst, &[value])?;
        }
        Ok(())
    }

    fn cvta(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let to = o.flag("to");
        let Some(space) = o.one_of(&["global", "shared", "shared::cta", "shared::cluster", "local", "const", "param"])
        else {
            return self.fail("cvta needs a space");
        };
        if o.one_of(&["u64", "b64", "s64"]).is_none() {
            return self.fail("only 64-bit addresses are supported");
        }
        let base = match space {
            "global" | "const" => 0,
            "local" => window::LOCAL,
            "param" => window::PARAM,
            _ => window::SHARED,
        };
        self.arity(i, 2..=2)?;
        let source = self.source(&i.operands[1], U64)?;
        let dst = self.dst(&i.operands[0], U64)?;
        let base = self.constant(Class::Double, if to { base.wrapping_neg() } else { base });
        self.alu(alu!(D; D a, D base => a.wrapping_add(base)), dst, &[source, base])
    }

    fn isspacep(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let space = o.next();
        self.arity(i, 2..=2)?;
        let source = self.source(&i.operands[1], U64)?;
        let dst = self.dst(&i.operands[0], Type { kind: Kind::Predicate, bits: 1 })?;
        let f = match space {
            Some("shared" | "shared::cta" | "shared::cluster") => alu!(P; D a => window::holds(window::SHARED, a)),
            Some("local") => alu!(P; D a => window::holds(window::LOCAL, a)),
            Some("param") => alu!(P; D a => window::holds(window::PARAM, a)),
            Some("global") => alu!(P; D a => {
                !window::holds(window::SHARED, a) && !window::holds(window::LOCAL, a) && !window::holds(window::PARAM, a)
            }),
            _ => return self.unsupported(i),
        };
        self.alu(f, dst, &[source])
    }

    /// Clusters hold one CTA: an address maps to itself.
    fn mapa(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        o.one_of(&["shared::cluster"]);
        let ty = self.some_type(o, i)?;
        if o.base == "getctarank" {
            return self.unsupported(i);
        }
        self.arity(i, 3..=3)?;
        let source = self.source(&i.operands[1], ty)?;
        let dst = self.dst(&i.operands[0], ty)?;
        let f = if ty.bits == 64 { alu!(D; D a => a) } else { alu!(W; W a => a) };
        self.alu(f, dst, &[source])
    }
}
