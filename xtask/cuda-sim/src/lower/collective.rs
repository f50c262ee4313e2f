//! What lanes and warps do together.

use super::Lower;
use super::opcode::Opcode;
use crate::code::{Barrier, BarrierKind, Op, ReduxOp, Scope, ShuffleMode, VoteMode};
use crate::error::At;
use crate::exec::regs::{Class, Reg};
use crate::ptx::{Instruction, Kind, Operand, Type};

const B32: Type = Type { kind: Kind::Bits, bits: 32 };
const PREDICATE: Type = Type { kind: Kind::Predicate, bits: 1 };

fn predicate_reg(encoded: u32) -> Reg {
    Reg { class: Class::Predicate, row: encoded >> 1 }
}

impl<'m> Lower<'m> {
    /// Shuffles, votes, barriers, fences.
    pub(super) fn collective(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        match o.base {
            "shfl" => self.shuffle(o, i),
            "vote" => self.vote(o, i),
            "match" => self.matching(o, i),
            "redux" => self.redux(o, i),
            "activemask" => {
                o.flag("b32");
                self.arity(i, 1..=1)?;
                let dst = self.dst(&i.operands[0], B32)?;
                self.emit(Op::ActiveMask(dst.row), &[], &[dst])
            }
            "elect" => self.elect(o, i),
            "bar" | "barrier" => self.barrier(o, i),
            "griddepcontrol" => {
                // Launches run one after another: what came before is complete.
                if o.one_of(&["launch_dependents", "wait"]).is_none() {
                    return self.unsupported(i);
                }
                self.emit(Op::Nothing, &[], &[])
            }
            _ => self.fence(o, i),
        }
    }

    fn sync(&self, o: &mut Opcode<'_>, i: &Instruction) -> Result<(), At> {
        if o.flag("sync") { Ok(()) } else { self.fail(format!("`{}`: only the .sync form is supported", i.opcode)) }
    }

    fn shuffle(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        self.sync(o, i)?;
        let mode = match o.one_of(&["up", "down", "bfly", "idx"]) {
            Some("up") => ShuffleMode::Up,
            Some("down") => ShuffleMode::Down,
            Some("bfly") => ShuffleMode::Butterfly,
            Some("idx") => ShuffleMode::Index,
            _ => return self.unsupported(i),
        };
        o.flag("b32");
        self.arity(i, 5..=5)?;
        let (dst, valid) = match &i.operands[0] {
            Operand::Pair(dst, valid) => (self.dst(dst, B32)?, Some(self.dst(valid, PREDICATE)?)),
            dst => (self.dst(dst, B32)?, None),
        };
        let mut rows = [dst.row; 5];
        let mut reads = Vec::new();
        for (row, operand) in rows[1..].iter_mut().zip(&i.operands[1..]) {
            let source = self.source(operand, B32)?;
            *row = source.row;
            reads.push(source);
        }
        let writes: Vec<Reg> = std::iter::once(dst).chain(valid).collect();
        self.emit(Op::Shuffle { mode, rows, valid: valid.map(|reg| reg.row) }, &reads, &writes)
    }

    fn vote(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        self.sync(o, i)?;
        let mode = match o.one_of(&["all", "any", "uni", "ballot"]) {
            Some("all") => VoteMode::All,
            Some("any") => VoteMode::Any,
            Some("uni") => VoteMode::Uniform,
            Some("ballot") => VoteMode::Ballot,
            _ => return self.unsupported(i),
        };
        let ty = self.some_type(o, i)?;
        self.arity(i, 3..=3)?;
        let dst = self.dst(&i.operands[0], ty)?;
        if (mode == VoteMode::Ballot) != (dst.class == Class::Word) {
            return self.unsupported(i);
        }
        let src = self.predicate_operand(&i.operands[1])?;
        let members = self.source(&i.operands[2], B32)?;
        self.emit(Op::Vote { mode, dst, src, members: members.row }, &[predicate_reg(src), members], &[dst])
    }

    fn matching(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let all = match o.one_of(&["any", "all"]) {
            Some(mode) => mode == "all",
            None => return self.unsupported(i),
        };
        self.sync(o, i)?;
        let ty = self.some_type(o, i)?;
        self.arity(i, 3..=3)?;
        let (dst, agree) = match &i.operands[0] {
            Operand::Pair(dst, agree) => (self.dst(dst, B32)?, Some(self.dst(agree, PREDICATE)?)),
            dst => (self.dst(dst, B32)?, None),
        };
        let src = self.source(&i.operands[1], ty)?;
        let members = self.source(&i.operands[2], B32)?;
        let writes: Vec<Reg> = std::iter::once(dst).chain(agree).collect();
        let op = Op::Match { all, dst: dst.row, agree: agree.map(|reg| reg.row), src, members: members.row };
        self.emit(op, &[src, members], &writes)
    }

    fn redux(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        self.sync(o, i)?;
        let op = o.next();
        let ty = self.some_type(o, i)?;
        let op = match (op, ty.kind, ty.bits) {
            (Some("add"), Kind::Signed | Kind::Unsigned, 32) => ReduxOp::Add,
            (Some("min"), Kind::Unsigned, 32) => ReduxOp::MinUnsigned,
            (Some("max"), Kind::Unsigned, 32) => ReduxOp::MaxUnsigned,
            (Some("min"), Kind::Signed, 32) => ReduxOp::MinSigned,
            (Some("max"), Kind::Signed, 32) => ReduxOp::MaxSigned,
            (Some("and"), Kind::Bits, 32) => ReduxOp::And,
            (Some("or"), Kind::Bits, 32) => ReduxOp::Or,
            (Some("xor"), Kind::Bits, 32) => ReduxOp::Xor,
            _ => return self.unsupported(i),
        };
        self.arity(i, 3..=3)?;
        let dst = self.dst(&i.operands[0], ty)?;
        let sources = [self.source(&i.operands[1], ty)?, self.source(&i.operands[2], B32)?];
        self.emit(Op::Redux { op, rows: [dst.row, sources[0].row, sources[1].row] }, &sources, &[dst])
    }

    fn elect(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        self.sync(o, i)?;
        self.arity(i, 2..=2)?;
        let Operand::Pair(lane, elected) = &i.operands[0] else { return self.fail("elect writes `lane|predicate`") };
        let lane = self.dst(lane, B32)?;
        let elected = self.dst(elected, PREDICATE)?;
        let members = self.source(&i.operands[1], B32)?;
        let op = Op::Elect { lane: Some(lane.row), elected: elected.row, members: members.row };
        self.emit(op, &[members], &[lane, elected])
    }

    fn barrier(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        if o.flag("warp") {
            self.sync(o, i)?;
            self.arity(i, 1..=1)?;
            let members = self.source(&i.operands[0], B32)?;
            return self.emit(Op::WarpSync(members.row), &[members], &[]);
        }
        if o.flag("cluster") {
            // A cluster of one CTA: its barrier orders nothing that is not ordered already.
            if o.one_of(&["arrive", "wait"]).is_none() {
                return self.unsupported(i);
            }
            for modifier in ["release", "relaxed", "acquire", "aligned"] {
                o.flag(modifier);
            }
            return self.emit(Op::Fence(Some(Scope::Cta)), &[], &[]);
        }
        o.flag("cta");
        let aligned = o.flag("aligned") || o.base == "bar";
        match o.one_of(&["sync", "arrive", "red"]) {
            Some("sync") => self.plain_barrier(i, BarrierKind::Sync, aligned),
            Some("arrive") => self.plain_barrier(i, BarrierKind::Arrive, aligned),
            Some(_) => self.reducing_barrier(o, i, aligned),
            None => self.unsupported(i),
        }
    }

    fn plain_barrier(&mut self, i: &'m Instruction, kind: BarrierKind, aligned: bool) -> Result<(), At> {
        self.arity(i, if kind == BarrierKind::Arrive { 2..=2 } else { 1..=2 })?;
        let id = self.source(&i.operands[0], B32)?;
        let count = match i.operands.get(1) {
            Some(operand) => Some(self.source(operand, B32)?),
            None => None,
        };
        let reads: Vec<Reg> = std::iter::once(id).chain(count).collect();
        self.emit(Op::Barrier(Box::new(Barrier { kind, id, count, reduce: None, aligned })), &reads, &[])
    }

    fn reducing_barrier(&mut self, o: &mut Opcode<'_>, i: &'m Instruction, aligned: bool) -> Result<(), At> {
        let kind = match o.one_of(&["popc", "and", "or"]) {
            Some("popc") => BarrierKind::Popc,
            Some("and") => BarrierKind::And,
            Some(_) => BarrierKind::Or,
            None => return self.unsupported(i),
        };
        let ty = self.some_type(o, i)?;
        self.arity(i, 3..=4)?;
        let dst = self.dst(&i.operands[0], ty)?;
        if (kind == BarrierKind::Popc) != (dst.class == Class::Word) {
            return self.unsupported(i);
        }
        let id = self.source(&i.operands[1], B32)?;
        let count = if i.operands.len() == 4 { Some(self.source(&i.operands[2], B32)?) } else { None };
        let predicate = self.predicate_operand(&i.operands[i.operands.len() - 1])?;
        let mut reads = vec![id, predicate_reg(predicate)];
        reads.extend(count);
        let barrier = Barrier { kind, id, count, reduce: Some((dst, predicate)), aligned };
        self.emit(Op::Barrier(Box::new(barrier)), &reads, &[dst])
    }

    fn fence(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        if o.flag("proxy") {
            let known = ["async", "async.shared::cta", "alias", "tensormap::generic"];
            let Some(proxy) = o.one_of(&known) else { return self.unsupported(i) };
            for modifier in ["global", "shared::cta", "shared::cluster", "acquire", "release"] {
                o.flag(modifier);
            }
            let scope = Self::scope_of(o);
            // Only that of tensor maps is a release or an acquire too.
            let scope = (proxy == "tensormap::generic").then_some(scope);
            return self.emit(Op::Fence(scope), &[], &[]);
        }
        let scope = Self::scope_of(o);
        if o.flag("mbarrier_init") {
            o.flag("release");
            return self.emit(Op::Fence(None), &[], &[]);
        }
        for modifier in ["sc", "acq_rel", "acquire", "release"] {
            o.flag(modifier);
        }
        self.emit(Op::Fence(Some(scope)), &[], &[])
    }
}
