//! Matrices: `ldmatrix`, `stmatrix`, `mma`.

use super::Lower;
use super::opcode::Opcode;
use crate::code::{Accumulator, Element, Matrix, Mma, Op};
use crate::error::At;
use crate::exec::regs::{Class, Reg};
use crate::number::{BF16, F16, TF32};
use crate::ptx::{Instruction, Kind, Operand, Type};

const B32: Type = Type { kind: Kind::Bits, bits: 32 };

impl<'m> Lower<'m> {
    /// Opcodes on matrices.
    pub(super) fn tensor(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        if !o.flag("sync") || !o.flag("aligned") {
            return self.fail(format!("`{}` needs .sync.aligned", i.opcode));
        }
        if o.base == "mma" { self.mma(o, i) } else { self.matrix(o, i) }
    }

    fn matrix(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let shape = o.flag("m8n8");
        let count = match o.one_of(&["x1", "x2", "x4"]) {
            Some("x1") => 1,
            Some("x2") => 2,
            Some(_) => 4,
            None => return self.unsupported(i),
        };
        let transposed = o.flag("trans");
        o.one_of(&["shared", "shared::cta"]);
        if !shape || !o.flag("b16") {
            return self.unsupported(i);
        }
        self.arity(i, 2..=2)?;
        let store = o.base == "stmatrix";
        let (values, address) = if store { (&i.operands[1], &i.operands[0]) } else { (&i.operands[0], &i.operands[1]) };
        let regs = self.fragment(values, count, B32, !store)?;
        let (place, mut reads) = self.shared_place(address)?;
        let matrix = Matrix { place, regs: regs.clone().into(), transposed, store };
        if store {
            reads.extend(&regs);
            return self.emit(Op::Matrix(Box::new(matrix)), &reads, &[]);
        }
        self.emit(Op::Matrix(Box::new(matrix)), &reads, &regs)
    }

    /// The registers of a matrix operand.
    pub(super) fn fragment(&mut self, operand: &Operand, count: usize, ty: Type, write: bool) -> Result<Vec<Reg>, At> {
        let parts = match operand {
            Operand::Vector(parts) => parts.as_slice(),
            other => std::slice::from_ref(other),
        };
        if parts.len() != count {
            return self.fail(format!("{} registers where {count} are needed", parts.len()));
        }
        let mut regs = Vec::with_capacity(count);
        for part in parts {
            regs.push(if write { self.dst(part, ty)? } else { self.source(part, ty)? });
        }
        Ok(regs)
    }

    /// The elements of a type's name.
    pub(super) fn element(name: &str) -> Option<Element> {
        Some(match name {
            "f16" => Element::Float(F16),
            "bf16" => Element::Float(BF16),
            "tf32" => Element::Float(TF32),
            "f64" => Element::Double,
            "s8" => Element::Int { bits: 8, signed: true },
            "u8" => Element::Int { bits: 8, signed: false },
            "s4" => Element::Int { bits: 4, signed: true },
            "u4" => Element::Int { bits: 4, signed: false },
            _ => return None,
        })
    }

    fn mma(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let shape = match o
            .one_of(&["m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m16n8k64", "m8n8k4", "m8n8k16", "m8n8k32"])
        {
            Some("m16n8k4") => [16, 8, 4],
            Some("m16n8k8") => [16, 8, 8],
            Some("m16n8k16") => [16, 8, 16],
            Some("m16n8k32") => [16, 8, 32],
            Some("m16n8k64") => [16, 8, 64],
            Some("m8n8k4") => [8, 8, 4],
            Some("m8n8k16") => [8, 8, 16],
            Some("m8n8k32") => [8, 8, 32],
            _ => return self.unsupported(i),
        };
        let saturate = o.flag("satfinite");
        if !o.flag("row") || !o.flag("col") {
            return self.unsupported(i);
        }
        let (d, a, b, c) = (o.next(), o.next(), o.next(), o.next());
        let (Some(d), Some(a), Some(b), Some(c)) = (d, a, b, c) else { return self.fail("mma needs four types") };
        let (Some(a_type), Some(b_type)) = (Self::element(a), Self::element(b)) else { return self.unsupported(i) };
        let acc = match (d, c) {
            ("f32", "f32") => Accumulator::Single,
            ("f16", "f16") => Accumulator::Half,
            ("s32", "s32") => Accumulator::Int,
            ("f64", "f64") => Accumulator::Double,
            _ => return self.unsupported(i),
        };
        if !Self::possible(shape, a_type, b_type, acc) {
            return self.unsupported(i);
        }
        self.arity(i, 4..=4)?;
        let [rows, columns, depth] = shape;
        let in_registers = |elements: u32, bits: u32| (elements * bits / 32 / 32).max(1) as usize;
        let bits = match a_type {
            Element::Float(TF32) => 32,
            Element::Float(_) => 16,
            Element::Double => 32,
            Element::Int { bits, .. } => bits,
        };
        let (acc_bits, ty, acc_ty) = match acc {
            Accumulator::Half => (16, B32, B32),
            Accumulator::Double => {
                let double = Type { kind: Kind::Float, bits: 64 };
                (32, double, double)
            }
            _ => (32, B32, B32),
        };
        let results = in_registers(rows * columns, acc_bits);
        let d = self.fragment(&i.operands[0], results, acc_ty, true)?;
        let a = self.fragment(&i.operands[1], in_registers(rows * depth, bits), ty, false)?;
        let b = self.fragment(&i.operands[2], in_registers(depth * columns, bits), ty, false)?;
        let c = self.fragment(&i.operands[3], results, acc_ty, false)?;
        let reads: Vec<Reg> =
            a.iter().chain(&b).chain(&c).copied().filter(|reg| reg.class != Class::Predicate).collect();
        let writes = d.clone();
        let mma = Mma { shape, a_type, b_type, acc, saturate, d: d.into(), a: a.into(), b: b.into(), c: c.into() };
        self.emit(Op::Mma(Box::new(mma)), &reads, &writes)
    }

    /// The combinations of shape and types that exist.
    fn possible(shape: [u32; 3], a: Element, b: Element, acc: Accumulator) -> bool {
        let bits = |element: Element| match element {
            Element::Int { bits, .. } => bits,
            _ => 0,
        };
        match (shape, a, acc) {
            ([16, 8, 8 | 16], Element::Float(F16), Accumulator::Single | Accumulator::Half) => a == b,
            ([16, 8, 8 | 16], Element::Float(BF16), Accumulator::Single) => a == b,
            ([16, 8, 4 | 8], Element::Float(TF32), Accumulator::Single) => a == b,
            ([8, 8, 4] | [16, 8, 4 | 8 | 16], Element::Double, Accumulator::Double) => a == b,
            ([8, 8, 16] | [16, 8, 16 | 32], Element::Int { bits: 8, .. }, Accumulator::Int) => bits(b) == 8,
            ([8, 8, 32] | [16, 8, 32 | 64], Element::Int { bits: 4, .. }, Accumulator::Int) => bits(b) == 4,
            _ => false,
        }
    }
}
