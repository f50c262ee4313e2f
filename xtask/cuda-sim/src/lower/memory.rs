//! Loads, stores, atomics.

use super::opcode::Opcode;
use super::{Lower, class_of};
use crate::code::{Access, Atomic, AtomicOp, AtomicType, Op, Order, Place, Scope};
use crate::error::At;
use crate::exec::regs::{Class, Reg};
use crate::ptx::{Address, Instruction, Kind, Operand, Space, Type};

impl<'m> Lower<'m> {
    /// `ld`, `st`, `atom`, `red`, and hints.
    pub(super) fn memory(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        match o.base {
            "ld" | "ldu" => self.load(o, i),
            "st" => self.store(o, i),
            "atom" | "red" => self.atomic(o, i),
            _ => {
                // A hint: the memory's contents stay as they are.
                while o.next().is_some() {}
                self.emit(Op::Nothing, &[], &[])
            }
        }
    }

    /// Cache operators and eviction priorities change no result.
    fn drop_hints(o: &mut Opcode<'_>) -> bool {
        for hint in ["ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"] {
            o.flag(hint);
        }
        let policy = o.flag("L2::cache_hint");
        o.drop_prefixed("L1::");
        o.drop_prefixed("L2::");
        policy
    }

    fn order(o: &mut Opcode<'_>) -> (Order, Scope) {
        let order = o.one_of(&["weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"]);
        let order = match order {
            None | Some("weak") => Order::Weak,
            Some("acquire") => Order::Acquire,
            Some("release") => Order::Release,
            Some("acq_rel") => Order::AcquireRelease,
            _ => Order::Relaxed,
        };
        (order, Self::scope_of(o))
    }

    /// The scope of an access or a fence; that of the device without one.
    pub(super) fn scope_of(o: &mut Opcode<'_>) -> Scope {
        match o.one_of(&["cta", "cluster", "gpu", "gl", "sys"]) {
            Some("cta" | "cluster") => Scope::Cta,
            _ => Scope::Device,
        }
    }

    /// The space of an access; an entry's parameters apart from those of calls.
    fn space(&self, o: &mut Opcode<'_>, operand: &Operand) -> Result<Space, At> {
        let name = o.one_of(&[
            "global",
            "shared",
            "shared::cta",
            "shared::cluster",
            "local",
            "const",
            "param",
            "param::entry",
            "param::func",
        ]);
        Ok(match name {
            None => Space::Generic,
            Some("global") => Space::Global,
            Some("local") => Space::Local,
            Some("const") => Space::Const,
            Some("param" | "param::entry" | "param::func") => {
                let Operand::Address(Address { base, .. }) = operand else { return self.fail("expected an address") };
                if self.is_local_param(base.as_deref()) { Space::Local } else { Space::Param }
            }
            Some(_) => Space::Shared,
        })
    }

    /// The registers of a scalar or a vector.
    fn value_regs(&mut self, operand: &Operand, lanes: usize, ty: Type, write: bool) -> Result<(Vec<Reg>, u32), At> {
        let parts = match operand {
            Operand::Vector(parts) => parts.as_slice(),
            other => std::slice::from_ref(other),
        };
        if parts.len() != lanes {
            return self.fail(format!("{} registers where {lanes} are needed", parts.len()));
        }
        let (mut regs, mut width) = (Vec::with_capacity(lanes), 0);
        for part in parts {
            let (reg, bits) = if write { self.any_dst(part, class_of(ty))? } else { self.any_source(part, ty)? };
            if reg.class == Class::Predicate || bits != 0 && bits < ty.bits {
                return self.fail("a register that is too narrow");
            }
            regs.push(reg);
            width = width.max(bits);
        }
        Ok((regs, width))
    }

    fn vector(o: &mut Opcode<'_>) -> usize {
        match o.one_of(&["v2", "v4", "v8"]) {
            Some("v2") => 2,
            Some("v4") => 4,
            Some(_) => 8,
            None => 1,
        }
    }

    fn check_vector(&self, lanes: usize, ty: Type) -> Result<(), At> {
        if ty.bits == 128 || ty.kind == Kind::Predicate || lanes as u32 * ty.bytes() > 32 {
            return self.fail("an access of this width is not supported");
        }
        Ok(())
    }

    /// Notes an access of so many bytes a lane, aligned to as many.
    pub(super) fn note_width(&mut self, space: Space, bytes: u32) {
        if matches!(space, Space::Shared | Space::Generic) {
            self.narrowest.shared = self.narrowest.shared.min(bytes);
        }
        if matches!(space, Space::Global | Space::Generic) {
            self.narrowest.global = self.narrowest.global.min(bytes);
        }
    }

    fn load(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let (order, scope) = Self::order(o);
        let policy = Self::drop_hints(o);
        o.one_of(&["unified"]);
        self.arity(i, if policy { 3..=3 } else { 2..=2 })?;
        let space = self.space(o, &i.operands[1])?;
        let lanes = Self::vector(o);
        let ty = self.some_type(o, i)?;
        self.check_vector(lanes, ty)?;
        let (regs, width) = self.value_regs(&i.operands[0], lanes, ty, true)?;
        let place = self.place(&i.operands[1])?;
        self.note_width(space, lanes as u32 * ty.bytes());
        let reads = Self::place_reads(&place, &[]);
        let access = Access {
            space,
            bytes: ty.bytes(),
            signed: ty.kind == Kind::Signed,
            width,
            regs: regs.clone().into(),
            place,
            order,
            scope,
        };
        self.emit(Op::Load(Box::new(access)), &reads, &regs)
    }

    fn store(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let (order, scope) = Self::order(o);
        let policy = Self::drop_hints(o);
        self.arity(i, if policy { 3..=3 } else { 2..=2 })?;
        let space = self.space(o, &i.operands[0])?;
        if matches!(space, Space::Const | Space::Param) {
            return self.fail("a store to memory that kernels only read");
        }
        if o.flag("async") {
            return self.fail("st.async is not supported");
        }
        let lanes = Self::vector(o);
        let ty = self.some_type(o, i)?;
        self.check_vector(lanes, ty)?;
        let (regs, width) = self.value_regs(&i.operands[1], lanes, ty, false)?;
        let place = self.place(&i.operands[0])?;
        self.note_width(space, lanes as u32 * ty.bytes());
        let reads = Self::place_reads(&place, &regs);
        let access = Access { space, bytes: ty.bytes(), signed: false, width, regs: regs.into(), place, order, scope };
        self.emit(Op::Store(Box::new(access)), &reads, &[])
    }

    /// The operation of an atomic or a reduction.
    pub(super) fn atomic_op(o: &mut Opcode<'_>) -> Option<AtomicOp> {
        Some(match o.one_of(&["and", "or", "xor", "exch", "cas", "add", "inc", "dec", "min", "max"])? {
            "and" => AtomicOp::And,
            "or" => AtomicOp::Or,
            "xor" => AtomicOp::Xor,
            "exch" => AtomicOp::Exchange,
            "cas" => AtomicOp::CompareExchange,
            "add" => AtomicOp::Add,
            "inc" => AtomicOp::Inc,
            "dec" => AtomicOp::Dec,
            "min" => AtomicOp::Min,
            _ => AtomicOp::Max,
        })
    }

    /// The type of an atomic or a reduction.
    pub(super) fn atomic_type(ty: Type) -> Option<AtomicType> {
        Some(match (ty.kind, ty.bits) {
            (Kind::Unsigned | Kind::Bits, 16 | 32 | 64) => AtomicType::Unsigned,
            (Kind::Signed, 32 | 64) => AtomicType::Signed,
            (Kind::Float, 16 | 32 | 64) => AtomicType::Float,
            (Kind::FloatPair, _) => AtomicType::HalfPair,
            (Kind::Brain, _) => AtomicType::Brain,
            (Kind::BrainPair, _) => AtomicType::BrainPair,
            _ => return None,
        })
    }

    fn atomic(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let (order, scope) = Self::order(o);
        let returns = o.base == "atom";
        if o.flag("async") {
            return self.fail("red.async is not supported");
        }
        let first = usize::from(returns);
        let policy = o.flag("L2::cache_hint");
        let Some(op) = Self::atomic_op(o) else { return self.fail("an atomic needs an operation") };
        let cas = op == AtomicOp::CompareExchange;
        self.arity(i, first + 2 + usize::from(cas)..=first + 2 + usize::from(cas) + usize::from(policy))?;
        let space = self.space(o, &i.operands[first])?;
        o.flag("noftz");
        let lanes = Self::vector(o);
        let ty = self.some_type(o, i)?;
        let Some(ty_of) = Self::atomic_type(ty) else { return self.unsupported(i) };
        let place = self.place(&i.operands[first])?;
        let (src, _) = self.value_regs(&i.operands[first + 1], lanes, ty, false)?;
        let swap = if cas { Some(self.source(&i.operands[first + 2], ty)?) } else { None };
        let dst = if returns { self.value_regs(&i.operands[0], lanes, ty, true)?.0 } else { Vec::new() };
        self.note_width(space, lanes as u32 * ty.bytes());
        let mut reads = Self::place_reads(&place, &src);
        reads.extend(swap);
        let atomic = Atomic {
            space,
            op,
            ty: ty_of,
            bytes: ty.bytes(),
            dst: dst.clone().into(),
            place,
            src: src.into(),
            swap,
            order,
            scope,
            flush: ty.kind == Kind::Float && ty.bits == 32 && op == AtomicOp::Add && space != Space::Shared,
        };
        self.emit(Op::Atomic(Box::new(atomic)), &reads, &dst)
    }

    /// A place of a shared variable or register, with what reads it.
    pub(super) fn shared_place(&mut self, operand: &Operand) -> Result<(Place, Vec<Reg>), At> {
        let place = self.place(operand)?;
        let reads = Self::place_reads(&place, &[]);
        Ok((place, reads))
    }
}
