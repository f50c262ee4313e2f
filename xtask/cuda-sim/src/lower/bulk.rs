//! Bulk copies, of bytes and of tiles.

use super::Lower;
use super::opcode::Opcode;
use crate::code::{Atomic, AtomicOp, Bulk, Op, Pipe};
use crate::error::At;
use crate::exec::regs::Reg;
use crate::ptx::{Address, Instruction, Kind, Operand, Space, Type};

const U32: Type = Type { kind: Kind::Unsigned, bits: 32 };

impl<'m> Lower<'m> {
    /// `cp.async.bulk…` and `cp.reduce.async.bulk…`
    pub(super) fn bulk(&mut self, o: &mut Opcode<'_>, i: &'m Instruction, reduces: bool) -> Result<(), At> {
        match o.one_of(&["commit_group", "wait_group", "prefetch"]) {
            Some("commit_group") => return self.emit(Op::AsyncCommit(Pipe::Bulk), &[], &[]),
            Some("prefetch") => {
                while o.next().is_some() {}
                return self.emit(Op::Nothing, &[], &[]);
            }
            Some(_) => {
                o.flag("read");
                let groups = self.groups(i)?;
                return self.emit(Op::AsyncWait(Pipe::Bulk, groups), &[], &[]);
            }
            None => {}
        }
        let tensor = o.flag("tensor");
        let dimensions = o.one_of(&["1d", "2d", "3d", "4d", "5d"]);
        o.flag("tile");
        let load = o.flag("mbarrier::complete_tx::bytes");
        let policy = o.flag("L2::cache_hint");
        let store = o.flag("bulk_group");
        let to_shared = o.one_of(&["shared::cluster", "shared::cta"]);
        if load == store || !o.flag("global") || to_shared.is_none() || tensor != dimensions.is_some() {
            return self.unsupported(i);
        }
        let operation = if reduces { Some(self.reduction(o)?) } else { None };
        if load && reduces {
            return self.unsupported(i);
        }
        let fixed = match (tensor, load) {
            (true, true) | (false, false) => 3,
            (true, false) => 2,
            (false, true) => 4,
        };
        self.arity(i, fixed + usize::from(policy)..=fixed + usize::from(policy))?;
        let (bulk, reads) = if tensor {
            let rank = dimensions.and_then(|name| name[..1].parse().ok()).unwrap_or(0);
            self.tile(i, rank, load, operation)?
        } else {
            self.bytes(i, o, load, operation)?
        };
        self.note_width(Space::Global, 4);
        self.emit(Op::Bulk(Box::new(bulk)), &reads, &[])
    }

    fn reduction(&self, o: &mut Opcode<'_>) -> Result<AtomicOp, At> {
        match Self::atomic_op(o) {
            Some(AtomicOp::CompareExchange | AtomicOp::Exchange) | None => self.fail("a reduction needs an operation"),
            Some(op) => Ok(op),
        }
    }

    fn bytes(
        &mut self,
        i: &'m Instruction,
        o: &mut Opcode<'_>,
        load: bool,
        operation: Option<AtomicOp>,
    ) -> Result<(Bulk, Vec<Reg>), At> {
        let (dst, mut reads) = self.shared_place(&i.operands[0])?;
        let (src, more) = self.shared_place(&i.operands[1])?;
        reads.extend(more);
        let bytes = self.source(&i.operands[2], U32)?;
        reads.push(bytes);
        if load {
            let (object, more) = self.shared_place(&i.operands[3])?;
            reads.extend(more);
            return Ok((Bulk::Load { dst, src, bytes, object }, reads));
        }
        let reduce = match operation {
            None => None,
            Some(op) => {
                o.flag("noftz");
                let ty = self.some_type(o, i)?;
                let Some(kind) = Self::atomic_type(ty) else { return self.unsupported(i) };
                Some(Box::new(Atomic::of_elements(op, kind, ty.bytes())))
            }
        };
        Ok((Bulk::Store { dst, src, bytes, reduce }, reads))
    }

    fn tile(
        &mut self,
        i: &'m Instruction,
        rank: usize,
        load: bool,
        reduce: Option<AtomicOp>,
    ) -> Result<(Bulk, Vec<Reg>), At> {
        let (tensor, shared) = if load { (&i.operands[1], &i.operands[0]) } else { (&i.operands[0], &i.operands[1]) };
        let Operand::Address(Address { base, offset, coordinates: Some(coordinates) }) = tensor else {
            return self.fail("expected a tensor map and coordinates");
        };
        if coordinates.len() != rank {
            return self.fail(format!("{} coordinates of a tensor of {rank} dimensions", coordinates.len()));
        }
        let map = self.address_place(base.as_deref(), *offset)?;
        let mut at = Vec::new();
        for coordinate in coordinates {
            at.push(self.source(coordinate, U32)?);
        }
        let (place, mut reads) = self.shared_place(shared)?;
        reads.extend(map.base);
        reads.extend(&at);
        let at = at.into();
        if !load {
            return Ok((Bulk::StoreTile { src: place, map, at, reduce }, reads));
        }
        let (object, more) = self.shared_place(&i.operands[2])?;
        reads.extend(more);
        Ok((Bulk::LoadTile { dst: place, map, at, object }, reads))
    }
}
