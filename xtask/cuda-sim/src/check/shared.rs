//! What is known of each piece of a CTA's shared memory.

use super::clock::Clocks;
use crate::exec::checks::TouchKind;

/// What an access left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    #[default]
    None,
    /// A write or read.
    Plain,
    /// An atomic or another strong access.
    Strong,
    /// The start of a copy.
    Pending,
}

/// An access: who, when, where in the code.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamp {
    /// The warp's time.
    pub time: u32,
    /// The operation.
    pub pc: u32,
    /// The warp.
    pub warp: u8,
    /// The lane.
    pub lane: u8,
    /// What it was.
    pub kind: Kind,
}

/// Reads of a warp since the last write.
#[derive(Clone, Copy, Debug, Default)]
struct Reads {
    time: u32,
    pc: u32,
    lanes: u32,
    strong: bool,
}

/// What is wrong with an access.
#[derive(Clone, Copy, Debug)]
pub enum Wrong {
    /// Nobody wrote it.
    Unwritten,
    /// The other access and whether it writes.
    Race(Stamp, bool),
    /// A copy is under way.
    Pending(Stamp),
}

/// A lane's access.
#[derive(Clone, Copy, Debug)]
pub struct Visit {
    /// The warp.
    pub warp: u32,
    /// The lane.
    pub lane: u32,
    /// The operation.
    pub pc: u32,
    /// What it does.
    pub kind: TouchKind,
    /// It does not race with other strong ones.
    pub strong: bool,
}

/// The shadow of a CTA's shared memory.
#[derive(Debug)]
pub struct SharedShadow {
    /// log2 of a cell's bytes.
    shift: u32,
    warps: usize,
    writes: Vec<Stamp>,
    /// Warps that read a cell since it was written.
    readers: Vec<u32>,
    reads: Vec<Reads>,
}

impl SharedShadow {
    /// A shadow of so many bytes in cells of `granule` bytes.
    pub fn new(bytes: u32, granule: u32, warps: usize) -> Self {
        let shift = granule.trailing_zeros();
        let cells = (bytes as usize).div_ceil(granule as usize);
        Self {
            shift,
            warps,
            writes: vec![Stamp::default(); cells],
            readers: vec![0; cells],
            reads: vec![Reads::default(); cells * warps],
        }
    }

    /// Checks an access to bytes at an offset and remembers it. Gives the offset of what is wrong.
    #[inline(always)]
    pub fn visit(&mut self, clocks: &Clocks, offset: u64, bytes: u32, visit: &Visit) -> Result<(), (u64, Wrong)> {
        let first = (offset >> self.shift) as usize;
        let last = ((offset + u64::from(bytes) - 1) >> self.shift) as usize;
        for cell in first..=last {
            let result = match visit.kind {
                TouchKind::Read => self.read(clocks, cell, visit),
                _ => self.write(clocks, cell, visit),
            };
            result.map_err(|wrong| ((cell as u64) << self.shift, wrong))?;
        }
        Ok(())
    }

    #[inline(always)]
    fn after_write(&self, clocks: &Clocks, cell: usize, visit: &Visit) -> Result<(), Wrong> {
        let stamp = self.writes[cell];
        match stamp.kind {
            Kind::None => Ok(()),
            Kind::Pending => Err(Wrong::Pending(stamp)),
            Kind::Strong if visit.strong => Ok(()),
            _ => {
                let other = (u32::from(stamp.warp), u32::from(stamp.lane));
                if clocks.ordered((visit.warp, visit.lane), other, stamp.time) {
                    return Ok(());
                }
                // Lanes of one instruction may write one value to one place.
                let together = stamp.pc == visit.pc && other.0 == visit.warp && stamp.time == clocks.time(visit.warp);
                if together && visit.kind == (TouchKind::Write { uniform: true }) {
                    return Ok(());
                }
                Err(Wrong::Race(stamp, true))
            }
        }
    }

    #[inline(always)]
    fn read(&mut self, clocks: &Clocks, cell: usize, visit: &Visit) -> Result<(), Wrong> {
        if self.writes[cell].kind == Kind::None {
            return Err(Wrong::Unwritten);
        }
        self.after_write(clocks, cell, visit)?;
        let time = clocks.time(visit.warp);
        let bit = 1 << visit.warp;
        let reads = &mut self.reads[cell * self.warps + visit.warp as usize];
        let lanes = if self.readers[cell] & bit != 0 && reads.time == time { reads.lanes } else { 0 };
        *reads = Reads { time, pc: visit.pc, lanes: lanes | 1 << visit.lane, strong: visit.strong };
        self.readers[cell] |= bit;
        Ok(())
    }

    #[inline(always)]
    fn write(&mut self, clocks: &Clocks, cell: usize, visit: &Visit) -> Result<(), Wrong> {
        if visit.kind == TouchKind::Atomic && self.writes[cell].kind == Kind::None {
            return Err(Wrong::Unwritten);
        }
        self.after_write(clocks, cell, visit)?;
        let mut readers = self.readers[cell];
        while readers != 0 {
            let warp = readers.trailing_zeros();
            readers &= readers - 1;
            let reads = self.reads[cell * self.warps + warp as usize];
            let mut lanes = reads.lanes;
            while lanes != 0 && !(reads.strong && visit.strong) {
                let lane = lanes.trailing_zeros();
                lanes &= lanes - 1;
                if !clocks.ordered((visit.warp, visit.lane), (warp, lane), reads.time) {
                    let kind = Kind::Plain;
                    let stamp = Stamp { time: reads.time, pc: reads.pc, warp: warp as u8, lane: lane as u8, kind };
                    return Err(Wrong::Race(stamp, false));
                }
                if warp != visit.warp {
                    // Between warps the lane does not matter.
                    break;
                }
            }
        }
        let kind = match visit.kind {
            TouchKind::Copy => Kind::Pending,
            _ if visit.strong => Kind::Strong,
            _ => Kind::Plain,
        };
        let (time, pc) = (clocks.time(visit.warp), visit.pc);
        self.writes[cell] = Stamp { time, pc, warp: visit.warp as u8, lane: visit.lane as u8, kind };
        self.readers[cell] = 0;
        Ok(())
    }

    /// A copy is complete: it counts as a write of its thread now.
    pub fn complete(&mut self, clocks: &Clocks, warp: u32, offset: u64, bytes: u32) {
        let first = (offset >> self.shift) as usize;
        let last = ((offset + u64::from(bytes) - 1) >> self.shift) as usize;
        for stamp in &mut self.writes[first..=last] {
            if stamp.kind == Kind::Pending {
                (stamp.kind, stamp.time) = (Kind::Plain, clocks.time(warp));
            }
        }
    }
}
