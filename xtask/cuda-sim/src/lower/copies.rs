//! Asynchronous copies and the barriers that wait for them.

use super::Lower;
use super::opcode::Opcode;
use crate::code::{CopyAsync, Mbarrier, Op};
use crate::error::At;
use crate::exec::regs::{Class, Reg};
use crate::ptx::{Instruction, Kind, Operand, Space, Type};

const U32: Type = Type { kind: Kind::Unsigned, bits: 32 };
const B64: Type = Type { kind: Kind::Bits, bits: 64 };
const PREDICATE: Type = Type { kind: Kind::Predicate, bits: 1 };

impl<'m> Lower<'m> {
    /// `cp.async` and `mbarrier`.
    pub(super) fn copies(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        if o.base == "mbarrier" {
            return self.mbarrier(o, i);
        }
        let reduces = o.flag("reduce");
        if !o.flag("async") {
            return self.unsupported(i);
        }
        if o.flag("bulk") {
            return self.bulk(o, i, reduces);
        }
        if reduces {
            return self.unsupported(i);
        }
        match o.one_of(&["commit_group", "wait_group", "wait_all", "mbarrier"]) {
            Some("commit_group") => self.emit(Op::CopyCommit, &[], &[]),
            Some("wait_all") => self.emit(Op::CopyWait(None), &[], &[]),
            Some("wait_group") => {
                let groups = self.groups(i)?;
                self.emit(Op::CopyWait(Some(groups)), &[], &[])
            }
            Some(_) => {
                if !o.flag("arrive") {
                    return self.unsupported(i);
                }
                let noinc = o.flag("noinc");
                o.one_of(&["shared", "shared::cta"]);
                o.flag("b64");
                self.arity(i, 1..=1)?;
                let (place, reads) = self.shared_place(&i.operands[0])?;
                self.emit(Op::Mbarrier(Box::new(Mbarrier::CopyArrive { place, noinc })), &reads, &[])
            }
            None => self.copy_async(o, i),
        }
    }

    /// How many groups a wait leaves open.
    pub(super) fn groups(&self, i: &Instruction) -> Result<u32, At> {
        self.arity(i, 1..=1)?;
        match i.operands[0] {
            Operand::Int(groups) => Ok(groups.clamp(0, 1 << 16) as u32),
            _ => self.fail("wait_group takes a number"),
        }
    }

    /// `cp.async.cg.shared.global [dst], [src], bytes{, source bytes | ignore}{, policy}`
    fn copy_async(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let Some(cache) = o.one_of(&["ca", "cg"]) else { return self.unsupported(i) };
        let shared = o.one_of(&["shared", "shared::cta"]).is_some();
        let policy = o.flag("L2::cache_hint");
        o.drop_prefixed("L2::");
        if !shared || !o.flag("global") {
            return self.unsupported(i);
        }
        self.arity(i, 3..=5)?;
        let Operand::Int(bytes) = i.operands[2] else { return self.fail("a copy's size is a number") };
        let sizes: &[i64] = if cache == "cg" { &[16] } else { &[4, 8, 16] };
        if !sizes.contains(&bytes) {
            return self.fail(format!("a copy of {bytes} bytes"));
        }
        let dst = self.place(&i.operands[0])?;
        let src = self.place(&i.operands[1])?;
        let extra = i.operands.get(3).filter(|_| i.operands.len() > 3 + usize::from(policy));
        let (mut src_bytes, mut ignore) = (None, None);
        let mut reads = Self::place_reads(&dst, &[]);
        reads.extend(src.base);
        match extra {
            None if i.operands.len() > 3 + usize::from(policy) => return self.unsupported(i),
            None => {}
            Some(Operand::Int(count)) => src_bytes = Some(self.constant(Class::Word, *count as u64)),
            Some(operand @ (Operand::Name(..) | Operand::Not(_))) => match self.predicate_operand(operand) {
                Ok(predicate) => {
                    reads.push(Reg { class: Class::Predicate, row: predicate >> 1 });
                    ignore = Some(predicate);
                }
                Err(_) => {
                    let reg = self.source(operand, U32)?;
                    reads.push(reg);
                    src_bytes = Some(reg);
                }
            },
            Some(_) => return self.unsupported(i),
        }
        self.note_width(Space::Shared, bytes as u32);
        self.note_width(Space::Global, bytes as u32);
        let copy = CopyAsync { dst, src, bytes: bytes as u32, src_bytes, ignore };
        self.emit(Op::CopyAsync(Box::new(copy)), &reads, &[])
    }

    fn mbarrier(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let Some(what) = o.next() else { return self.unsupported(i) };
        let bytes_too = o.flag("expect_tx");
        let parity = o.flag("parity");
        for modifier in
            ["release", "acquire", "relaxed", "cta", "cluster", "shared", "shared::cta", "shared::cluster", "b64"]
        {
            o.flag(modifier);
        }
        if o.flag("noComplete") {
            return self.unsupported(i);
        }
        match what {
            "init" => {
                self.arity(i, 2..=2)?;
                self.note_width(Space::Shared, 8);
                let (place, mut reads) = self.shared_place(&i.operands[0])?;
                let count = self.source(&i.operands[1], U32)?;
                reads.push(count);
                self.emit(Op::Mbarrier(Box::new(Mbarrier::Init { place, count })), &reads, &[])
            }
            "inval" => {
                self.arity(i, 1..=1)?;
                let (place, reads) = self.shared_place(&i.operands[0])?;
                self.emit(Op::Mbarrier(Box::new(Mbarrier::Invalidate { place })), &reads, &[])
            }
            "expect_tx" | "complete_tx" => {
                self.arity(i, 2..=2)?;
                let (place, mut reads) = self.shared_place(&i.operands[0])?;
                let bytes = self.source(&i.operands[1], U32)?;
                reads.push(bytes);
                let op = if what == "expect_tx" {
                    Mbarrier::Expect { place, bytes }
                } else {
                    Mbarrier::Complete { place, bytes }
                };
                self.emit(Op::Mbarrier(Box::new(op)), &reads, &[])
            }
            "arrive" => self.mbarrier_arrive(i, bytes_too),
            "test_wait" | "try_wait" => self.mbarrier_test(i, parity, what == "try_wait"),
            _ => self.unsupported(i),
        }
    }

    fn mbarrier_arrive(&mut self, i: &'m Instruction, bytes_too: bool) -> Result<(), At> {
        let first = usize::from(!matches!(i.operands.first(), Some(Operand::Address(_))));
        self.arity(i, first + 1..=first + 2)?;
        let state = if first == 1 { Some(self.dst(&i.operands[0], B64)?) } else { None };
        let (place, mut reads) = self.shared_place(&i.operands[first])?;
        let operand = match i.operands.get(first + 1) {
            Some(operand) => Some(self.source(operand, U32)?),
            None => None,
        };
        if bytes_too && operand.is_none() {
            return self.fail("expect_tx needs a number of bytes");
        }
        if operand.is_some() && !bytes_too && self.target.is_some_and(|target| !target.counts_arrivals()) {
            return self.fail(format!("`{}` of a number of arrivals needs .target sm_90", i.opcode));
        }
        reads.extend(operand);
        let (bytes, count) = if bytes_too { (operand, None) } else { (None, operand) };
        let writes: Vec<Reg> = state.into_iter().collect();
        self.emit(Op::Mbarrier(Box::new(Mbarrier::Arrive { place, state, bytes, count })), &reads, &writes)
    }

    fn mbarrier_test(&mut self, i: &'m Instruction, parity: bool, waits: bool) -> Result<(), At> {
        self.arity(i, 3..=4)?;
        let done = self.dst(&i.operands[0], PREDICATE)?;
        let (place, mut reads) = self.shared_place(&i.operands[1])?;
        let phase = self.source(&i.operands[2], if parity { U32 } else { B64 })?;
        reads.push(phase);
        self.emit(Op::Mbarrier(Box::new(Mbarrier::Test { place, done, phase, parity, waits })), &reads, &[done])
    }
}
