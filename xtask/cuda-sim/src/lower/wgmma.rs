//! `wgmma`: products of matrices in shared memory.

use super::Lower;
use super::opcode::Opcode;
use crate::code::{Accumulator, Element, Left, Op, Pipe, Wgmma};
use crate::error::At;
use crate::exec::regs::{Class, Reg};
use crate::number::{BF16, F16, TF32};
use crate::ptx::{Instruction, Kind, Operand, Type};

const B32: Type = Type { kind: Kind::Bits, bits: 32 };
const B64: Type = Type { kind: Kind::Bits, bits: 64 };

impl<'m> Lower<'m> {
    /// `wgmma.fence`, `.commit_group`, `.wait_group`, `.mma_async`
    pub(super) fn wgmma(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let what = o.next();
        if !o.flag("sync") || !o.flag("aligned") {
            return self.fail(format!("`{}` needs .sync.aligned", i.opcode));
        }
        match what {
            Some("fence") => self.emit(Op::ProductFence, &[], &[]),
            Some("commit_group") => self.emit(Op::AsyncCommit(Pipe::Product), &[], &[]),
            Some("wait_group") => {
                let groups = self.groups(i)?;
                self.emit(Op::AsyncWait(Pipe::Product, groups), &[], &[])
            }
            Some("mma_async") => self.wgmma_product(o, i),
            _ => self.unsupported(i),
        }
    }

    fn wgmma_product(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let saturate = o.flag("satfinite");
        let (shape, d, a, b) = (o.next(), o.next(), o.next(), o.next());
        let (Some(shape), Some(d), Some(a), Some(b)) = (shape, d, a, b) else { return self.unsupported(i) };
        let Some((columns, depth)) = shape.strip_prefix("m64n").and_then(|rest| rest.split_once('k')) else {
            return self.unsupported(i);
        };
        let (Ok(columns), Ok(depth)) = (columns.parse::<u32>(), depth.parse::<u32>()) else {
            return self.unsupported(i);
        };
        let (Some(a_type), Some(b_type)) = (Self::element(a), Self::element(b)) else { return self.unsupported(i) };
        let acc = match d {
            "f32" => Accumulator::Single,
            "f16" => Accumulator::Half,
            "s32" => Accumulator::Int,
            _ => return self.unsupported(i),
        };
        let right_depth = match (a_type, b_type, acc) {
            (Element::Float(F16), Element::Float(F16), Accumulator::Single | Accumulator::Half) => 16,
            (Element::Float(BF16), Element::Float(BF16), Accumulator::Single) => 16,
            (Element::Float(TF32), Element::Float(TF32), Accumulator::Single) => 8,
            (Element::Int { bits: 8, .. }, Element::Int { bits: 8, .. }, Accumulator::Int) => 32,
            _ => return self.unsupported(i),
        };
        if depth != right_depth || columns == 0 || columns > 256 || !columns.is_multiple_of(8) {
            return self.unsupported(i);
        }
        let floating = acc != Accumulator::Int;
        let half = matches!(a_type, Element::Float(F16 | BF16));
        let in_registers = matches!(i.operands.get(1), Some(Operand::Vector(_)));
        let immediates = if !floating { 0 } else { 2 + if half { 2 - usize::from(in_registers) } else { 0 } };
        self.arity(i, 4 + immediates..=4 + immediates)?;
        let count = if acc == Accumulator::Half { columns / 4 } else { columns / 2 };
        let d = self.fragment(&i.operands[0], count as usize, B32, true)?;
        let a = if in_registers {
            Left::Registers(self.fragment(&i.operands[1], 4, B32, false)?.into())
        } else {
            Left::Descriptor(self.source(&i.operands[1], B64)?)
        };
        let b = self.source(&i.operands[2], B64)?;
        let accumulate = self.predicate_operand(&i.operands[3])?;
        let mut numbers = Vec::new();
        for operand in &i.operands[4..] {
            let Operand::Int(value) = operand else { return self.fail("expected a number") };
            numbers.push(*value);
        }
        let negate = [numbers.first() == Some(&-1), numbers.get(1) == Some(&-1)];
        let last = numbers.last() == Some(&1);
        let transposed = match (half, in_registers) {
            (false, _) => [false, false],
            (true, true) => [false, last],
            (true, false) => [numbers.get(2) == Some(&1), last],
        };
        let mut reads: Vec<Reg> = vec![b, Reg { class: Class::Predicate, row: accumulate >> 1 }];
        match &a {
            Left::Registers(regs) => reads.extend(regs.iter()),
            Left::Descriptor(reg) => reads.push(*reg),
        }
        let writes = d.clone();
        let types = [a_type, b_type];
        let wgmma = Wgmma { columns, depth, types, acc, d: d.into(), a, b, accumulate, negate, transposed, saturate };
        self.emit(Op::Wgmma(Box::new(wgmma)), &reads, &writes)
    }
}
