//! What an executor tells a checker. The checker is a parameter of the executor: without one, nothing of it is left.

use super::Launch;
use super::access::Addresses;
use super::fault::{FaultKind, Finding};
use super::warp::Warp;
use crate::code::{Inst, Op, Order, Pipe, Scope, Site};
use crate::count::Counts;
use crate::memory::Allocation;
use crate::ptx::Space;
use std::sync::Arc;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TouchKind {
    /// Reads.
    Read,
    /// Writes.
    Write {
        /// Lanes with one address write one value.
        uniform: bool,
    },
    /// Reads and writes at once.
    Atomic,
    /// An asynchronous write, complete only after a wait.
    Copy,
    /// A read of a pipe, over only when its group was waited for.
    AsyncRead(Pipe),
    /// A write of a bulk copy, known to those who wait for a barrier object at this offset.
    AsyncWrite {
        /// The offset.
        object: u64,
    },
}

impl TouchKind {
    /// Whether it writes.
    pub fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::AsyncRead(_))
    }
}

/// What an instruction does to a barrier object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectUse {
    /// Begins its life: a plain write.
    Begin,
    /// Ends it: a plain write.
    End,
    /// Arrives, tests or counts bytes: strong accesses, which do not race with each other.
    Strong,
}

/// An access of a warp to one space.
#[derive(Clone, Copy, Debug)]
pub struct Touch<'t> {
    /// The space.
    pub space: Space,
    /// The address of each lane.
    pub at: &'t Addresses,
    /// Lanes that access.
    pub active: u32,
    /// Bytes a lane.
    pub bytes: u32,
    /// What it does.
    pub kind: TouchKind,
    /// Its order.
    pub order: Order,
    /// Whom it is ordered for.
    pub scope: Scope,
    /// The operation.
    pub pc: u32,
}

/// A checker of one CTA.
pub trait Checks: Send + Sized {
    /// Whether there is anything to call.
    const ON: bool;
    /// A checker for a CTA.
    fn new(launch: &Launch<'_>, id: [u32; 3], linear: u32, shared_bytes: u32) -> Self;
    /// An operation is about to run: `mask` are the lanes at it, `active` those whose guard holds.
    ///
    /// # Errors
    /// A register is read that was never written.
    fn before(&mut self, warp: &Warp, inst: &Inst, site: &Site, mask: u32, active: u32) -> Result<(), Finding>;
    /// Lanes of a warp are about to exchange values, or to multiply matrices.
    fn exchange(&mut self, _warp: &Warp, _op: &Op, _site: &Site, _active: u32) {}
    /// An access that lies within bounds.
    ///
    /// # Errors
    /// What is wrong with it.
    fn touch(
        &mut self,
        warp: u32,
        touch: &Touch<'_>,
        memory: &[Arc<Allocation>],
        hint: &mut usize,
    ) -> Result<(), Finding>;
    /// A function of the runtime wrote local memory.
    fn local_written(&mut self, warp: u32, lane: u32, address: u32, bytes: u32);
    /// A fence for a scope's threads.
    fn fence(&mut self, warp: u32, scope: Scope);
    /// Lanes of a warp synchronise.
    fn warp_sync(&mut self, warp: u32, members: u32, live: u32);
    /// A warp arrives at a barrier, or some of its lanes.
    fn barrier_arrive(&mut self, warp: u32, id: u32, waits: bool, whole: bool);
    /// A barrier completes.
    fn barrier_complete(&mut self, id: u32);
    /// Copies so far become a group.
    fn copy_commit(&mut self, warp: u32, active: u32);
    /// All but so many groups are complete; all copies if none.
    fn copy_wait(&mut self, warp: u32, active: u32, groups: Option<u32>);
    /// Lanes close a group of a pipe.
    fn async_commit(&mut self, warp: u32, active: u32, pipe: Pipe);
    /// Lanes wait for all but so many groups of a pipe.
    fn async_wait(&mut self, warp: u32, active: u32, pipe: Pipe, groups: u32);
    /// A warp executes a product of its warpgroup.
    ///
    /// # Errors
    /// The warpgroup's other warps do not.
    fn product(&mut self, _warp: u32, _pc: u32) -> Result<(), Finding> {
        Ok(())
    }
    /// A lane of a warp is about to use a barrier object.
    ///
    /// # Errors
    /// It is not ordered behind what others did there, or the object is in the way.
    fn object_used(&mut self, _by: (u32, u32, u32), _offset: u64, _how: ObjectUse) -> Result<(), FaultKind> {
        Ok(())
    }
    /// A warp arrives at a barrier object.
    fn object_arrive(&mut self, warp: u32, offset: u64);
    /// A bulk copy is complete: those who wait for the object know what it wrote.
    fn object_filled(&mut self, warp: u32, offset: u64);
    /// A warp saw a phase of a barrier object complete.
    fn object_wait(&mut self, warp: u32, offset: u64);
    /// The CTA ends.
    ///
    /// # Errors
    /// What it leaves open, with the warp and the operation that began it.
    fn end(&self) -> Result<(), (Finding, u32, u32)> {
        Ok(())
    }
    /// What was counted.
    fn counts(self) -> Option<Counts> {
        None
    }
}

/// No checks.
pub struct Unchecked;

impl Checks for Unchecked {
    const ON: bool = false;
    fn new(_: &Launch<'_>, _: [u32; 3], _: u32, _: u32) -> Self {
        Self
    }
    fn before(&mut self, _: &Warp, _: &Inst, _: &Site, _: u32, _: u32) -> Result<(), Finding> {
        Ok(())
    }
    fn touch(&mut self, _: u32, _: &Touch<'_>, _: &[Arc<Allocation>], _: &mut usize) -> Result<(), Finding> {
        Ok(())
    }
    fn local_written(&mut self, _: u32, _: u32, _: u32, _: u32) {}
    fn fence(&mut self, _: u32, _: Scope) {}
    fn warp_sync(&mut self, _: u32, _: u32, _: u32) {}
    fn barrier_arrive(&mut self, _: u32, _: u32, _: bool, _: bool) {}
    fn barrier_complete(&mut self, _: u32) {}
    fn copy_commit(&mut self, _: u32, _: u32) {}
    fn copy_wait(&mut self, _: u32, _: u32, _: Option<u32>) {}
    fn async_commit(&mut self, _: u32, _: u32, _: Pipe) {}
    fn async_wait(&mut self, _: u32, _: u32, _: Pipe, _: u32) {}
    fn object_arrive(&mut self, _: u32, _: u64) {}
    fn object_filled(&mut self, _: u32, _: u64) {}
    fn object_wait(&mut self, _: u32, _: u64) {}
}
