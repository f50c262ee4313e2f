//! Barrier objects in shared memory: arrivals and bytes.

use super::access::resolve;
use super::checks::{Checks, ObjectUse};
use super::cta::Cta;
use super::fault::{FaultKind, Finding};
use super::regs::Class;
use super::warp::{Warp, lanes};
use crate::code::{Mbarrier, Place};
use crate::ptx::Space;
use std::collections::HashMap;

/// The most bytes that may be missing at an object, or be there too early.
const MOST_BYTES: i64 = (1 << 20) - 1;

#[derive(Clone, Copy, Debug)]
struct Object {
    /// Arrivals of a phase.
    count: u32,
    /// Arrivals that are missing.
    pending: u32,
    /// Bytes that are missing.
    bytes: i64,
    /// Phases that are over.
    phase: u64,
}

/// The barrier objects of a CTA by their offset.
#[derive(Debug, Default)]
pub struct Mbarriers {
    objects: HashMap<u64, Object>,
}

impl Object {
    fn count_bytes(&mut self, bytes: i64) -> Result<(), FaultKind> {
        self.bytes += bytes;
        if self.bytes.abs() > MOST_BYTES {
            let what = format!("a barrier object that {} bytes are missing at: {MOST_BYTES} at most", self.bytes);
            return Err(FaultKind::BadOperand { what });
        }
        Ok(())
    }

    fn settle(&mut self) {
        if self.pending == 0 && self.bytes == 0 {
            self.phase += 1;
            self.pending = self.count;
        }
    }
}

impl<C: Checks> Cta<'_, C> {
    /// Runs an instruction on barrier objects; `true` where the warp should give way to others.
    pub fn mbarrier(&mut self, warp: &mut Warp, op: &Mbarrier, pc: u32, active: u32) -> Result<bool, Finding> {
        let mut turn = false;
        for lane in lanes(active) {
            turn |= self.mbarrier_lane(warp, op, pc, lane).map_err(|kind| (kind, lane as u32))?;
        }
        Ok(turn)
    }

    /// The offset of a barrier object.
    pub fn object_offset(&self, warp: &Warp, place: &Place, lane: usize) -> Result<u64, FaultKind> {
        let base = place.base.map_or(0, |reg| warp.regs.value(reg, lane));
        let address = base.wrapping_add(place.offset as u64);
        let address = match place.base.map(|reg| reg.class) {
            Some(Class::Double) => match resolve(address) {
                (Space::Shared, address) => address,
                (_, address) => address,
            },
            _ => address & 0xffff_ffff,
        };
        if address & 7 != 0 {
            return Err(FaultKind::Misaligned { space: Space::Shared, address, bytes: 8 });
        }
        let space = Space::Shared;
        self.shared_offset(address, 8).ok_or(FaultKind::OutOfBounds { space, address, bytes: 8, write: true })
    }

    fn object(&mut self, offset: u64) -> Result<&mut Object, FaultKind> {
        let what = "a barrier object that was never initialised".to_owned();
        self.mbarriers.objects.get_mut(&offset).ok_or(FaultKind::BadOperand { what })
    }

    /// Bytes of a copy are there.
    pub fn complete_bytes(&mut self, offset: u64, bytes: i64) -> Result<(), FaultKind> {
        let object = self.object(offset)?;
        object.count_bytes(-bytes)?;
        object.settle();
        Ok(())
    }

    fn mbarrier_lane(&mut self, warp: &mut Warp, op: &Mbarrier, pc: u32, lane: usize) -> Result<bool, FaultKind> {
        let offset = self.object_offset(warp, op.place(), lane)?;
        let how = match op {
            Mbarrier::Init { .. } => ObjectUse::Begin,
            Mbarrier::Invalidate { .. } => ObjectUse::End,
            _ => ObjectUse::Strong,
        };
        if how != ObjectUse::Begin {
            self.object(offset)?;
        }
        self.checks.object_used((warp.index, lane as u32, pc), offset, how)?;
        match op {
            Mbarrier::Init { count, .. } => {
                let count = warp.regs.value(*count, lane) as u32;
                if count == 0 || count >= 1 << 20 {
                    return Err(FaultKind::BadOperand { what: format!("a barrier object for {count} arrivals") });
                }
                self.mbarriers.objects.insert(offset, Object { count, pending: count, bytes: 0, phase: 0 });
            }
            Mbarrier::Invalidate { .. } => {
                self.mbarriers.objects.remove(&offset);
            }
            Mbarrier::Expect { bytes, .. } => {
                let bytes = warp.regs.value(*bytes, lane) as i64;
                self.object(offset)?.count_bytes(bytes)?;
            }
            Mbarrier::Complete { bytes, .. } => {
                let bytes = warp.regs.value(*bytes, lane) as i64;
                self.complete_bytes(offset, bytes)?;
            }
            Mbarrier::Arrive { state, bytes, count, .. } => {
                let bytes = bytes.map_or(0, |reg| warp.regs.value(reg, lane) as i64);
                let count = count.map_or(1, |reg| warp.regs.value(reg, lane) as u32);
                let phase = self.arrive_at(warp.index, offset, bytes, count)?;
                if let Some(state) = state {
                    warp.regs.set(*state, lane, phase);
                }
            }
            Mbarrier::CopyArrive { noinc, .. } => {
                // The copies are as late as they may be, which is here.
                warp.late.land(1 << lane, None, &mut self.shared);
                self.checks.copy_wait(warp.index, 1 << lane, None);
                if !noinc {
                    self.object(offset)?.pending += 1;
                }
                self.arrive_at(warp.index, offset, 0, 1)?;
            }
            Mbarrier::Test { done, phase, parity, waits, .. } => {
                let phase = warp.regs.value(*phase, lane);
                let over = self.object(offset)?.phase;
                let holds = if *parity { over & 1 != phase & 1 } else { over > phase };
                warp.regs.set(*done, lane, u64::from(holds));
                if holds {
                    self.checks.object_wait(warp.index, offset);
                }
                return Ok(*waits && !holds);
            }
        }
        Ok(false)
    }

    fn arrive_at(&mut self, warp: u32, offset: u64, bytes: i64, count: u32) -> Result<u64, FaultKind> {
        self.checks.object_arrive(warp, offset);
        let object = self.object(offset)?;
        if count == 0 || count > object.pending {
            return Err(FaultKind::BadOperand {
                what: format!("{count} arrivals where {} are missing", object.pending),
            });
        }
        let phase = object.phase;
        object.count_bytes(bytes)?;
        object.pending -= count;
        object.settle();
        Ok(phase)
    }
}
