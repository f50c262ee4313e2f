//! What is known of each piece of a CTA's shared memory.

use super::clock::{Clocks, Knows};
use crate::code::Scope;
use crate::exec::checks::{ObjectUse, TouchKind};

/// Bytes of a barrier object.
const OBJECT_BYTES: u32 = 8;

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
    /// One that is strong for its own CTA alone.
    Within,
    /// The start of a copy.
    Pending,
    /// The initialisation of a barrier object that lives.
    Object,
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
    /// Words of the cell that hold nothing but what an undefined register held.
    pub undefined: u8,
}

impl Stamp {
    /// The warp and lane.
    pub fn by(&self) -> (u32, u32) {
        (u32::from(self.warp), u32::from(self.lane))
    }
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
    /// A bulk copy or a product may still read it.
    Held,
    /// A barrier object lives there.
    Object(Stamp),
}

/// What a warp's access does.
#[derive(Clone, Copy, Debug)]
pub struct Visit {
    /// The operation.
    pub pc: u32,
    /// What it does.
    pub kind: TouchKind,
    /// It does not race with other strong ones.
    pub strong: bool,
    /// Whom it is strong for.
    pub scope: Scope,
    /// It is of the barrier object that lives there.
    pub owns: bool,
    /// Number and time of the barrier object that completes it, where it is a bulk copy's write.
    pub object: Option<(u8, u32)>,
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
    /// Reads of bulk copies and products that are not over, of each cell; empty before the first.
    held: Vec<u16>,
    /// Some cell holds what an undefined register held.
    pub tainted: bool,
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
            held: Vec::new(),
            tainted: false,
        }
    }

    fn cells(&self, offset: u64, bytes: u32) -> std::ops::RangeInclusive<usize> {
        (offset >> self.shift) as usize..=((offset + u64::from(bytes) - 1) >> self.shift) as usize
    }

    /// Checks a lane's access to bytes at an offset and remembers it. Gives the offset of what is wrong.
    #[inline(always)]
    pub fn visit(
        &mut self,
        knows: &Knows<'_>,
        visit: &Visit,
        (lane, offset, bytes): (u32, u64, u32),
    ) -> Result<(), (u64, Wrong)> {
        for cell in self.cells(offset, bytes) {
            let result = match visit.kind {
                TouchKind::Read | TouchKind::AsyncRead(_) => self.read(knows, visit, lane, cell),
                _ => self.write(knows, visit, lane, cell),
            };
            result.map_err(|wrong| ((cell as u64) << self.shift, wrong))?;
        }
        Ok(())
    }

    #[inline(always)]
    fn after_write(&self, knows: &Knows<'_>, visit: &Visit, lane: u32, stamp: &Stamp) -> Result<(), Wrong> {
        match stamp.kind {
            Kind::None => Ok(()),
            Kind::Pending => Err(Wrong::Pending(*stamp)),
            Kind::Object if !visit.owns => Err(Wrong::Object(*stamp)),
            Kind::Strong if visit.strong => Ok(()),
            _ => {
                let other = stamp.by();
                if knows.ordered(lane, other, stamp.time) {
                    return Ok(());
                }
                // Lanes of one instruction may write one value to one place.
                let together = stamp.pc == visit.pc && other.0 == knows.warp && stamp.time == knows.time;
                if together && visit.kind == (TouchKind::Write { uniform: true }) {
                    return Ok(());
                }
                Err(Wrong::Race(*stamp, true))
            }
        }
    }

    #[inline(always)]
    fn read(&mut self, knows: &Knows<'_>, visit: &Visit, lane: u32, cell: usize) -> Result<(), Wrong> {
        let stamp = &self.writes[cell];
        if stamp.kind == Kind::None {
            return Err(Wrong::Unwritten);
        }
        self.after_write(knows, visit, lane, stamp)?;
        let bit = 1 << knows.warp;
        let readers = &mut self.readers[cell];
        let reads = &mut self.reads[cell * self.warps + knows.warp as usize];
        let lanes = if *readers & bit != 0 && reads.time == knows.time { reads.lanes } else { 0 };
        *reads = Reads { time: knows.time, pc: visit.pc, lanes: lanes | 1 << lane, strong: visit.strong };
        *readers |= bit;
        Ok(())
    }

    #[inline(always)]
    fn write(&mut self, knows: &Knows<'_>, visit: &Visit, lane: u32, cell: usize) -> Result<(), Wrong> {
        let stamp = &self.writes[cell];
        let atomic = visit.kind == TouchKind::Atomic;
        if atomic && stamp.kind == Kind::None {
            return Err(Wrong::Unwritten);
        }
        if self.held.get(cell).is_some_and(|held| *held > 0) {
            return Err(Wrong::Held);
        }
        let undefined = if atomic { stamp.undefined } else { 0 };
        self.after_write(knows, visit, lane, stamp)?;
        if self.readers[cell] != 0 {
            self.after_reads(knows, visit, lane, cell)?;
        }
        let kind = match visit.kind {
            TouchKind::Copy => Kind::Pending,
            _ if visit.strong => Kind::Strong,
            _ => Kind::Plain,
        };
        let (warp, time, lane) = match visit.object {
            Some((number, time)) => (number, time, 0),
            None => (knows.warp as u8, knows.time, lane as u8),
        };
        self.writes[cell] = Stamp { time, pc: visit.pc, warp, lane, kind, undefined };
        self.readers[cell] = 0;
        Ok(())
    }

    fn after_reads(&self, knows: &Knows<'_>, visit: &Visit, lane: u32, cell: usize) -> Result<(), Wrong> {
        for warp in crate::exec::warp::lanes(self.readers[cell]) {
            let reads = self.reads[cell * self.warps + warp];
            if reads.strong && visit.strong {
                continue;
            }
            let warp = warp as u32;
            // Between warps the lane does not matter.
            let considered = if warp == knows.warp { reads.lanes } else { reads.lanes & reads.lanes.wrapping_neg() };
            for other in crate::exec::warp::lanes(considered) {
                if !knows.ordered(lane, (warp, other as u32), reads.time) {
                    let (kind, undefined) = (Kind::Plain, 0);
                    let (warp, lane) = (warp as u8, other as u8);
                    let stamp = Stamp { time: reads.time, pc: reads.pc, warp, lane, kind, undefined };
                    return Err(Wrong::Race(stamp, false));
                }
            }
        }
        Ok(())
    }

    /// Checks a lane's use of a barrier object and remembers it. Gives the offset of what is wrong.
    pub fn use_object(
        &mut self,
        knows: &Knows<'_>,
        (lane, offset, pc): (u32, u64, u32),
        how: ObjectUse,
    ) -> Result<(), (u64, Wrong)> {
        let strong = how == ObjectUse::Strong;
        // Strong uses leave the initialisation in its place, which all of them must follow: they are kept as reads.
        let kind = if strong { TouchKind::Read } else { TouchKind::Write { uniform: false } };
        let owns = how != ObjectUse::Begin;
        let visit = Visit { pc, kind, strong, scope: Scope::Cta, owns, object: None };
        self.visit(knows, &visit, (lane, offset, OBJECT_BYTES))?;
        if how == ObjectUse::Begin {
            let cells = self.cells(offset, OBJECT_BYTES);
            self.writes[cells].iter_mut().for_each(|stamp| stamp.kind = Kind::Object);
        }
        Ok(())
    }

    /// A copy is complete: it counts as a write of its thread now.
    pub fn complete(&mut self, clocks: &Clocks, warp: u32, offset: u64, bytes: u32) {
        let cells = self.cells(offset, bytes);
        for stamp in &mut self.writes[cells] {
            if stamp.kind == Kind::Pending {
                (stamp.kind, stamp.time) = (Kind::Plain, clocks.time(warp));
            }
        }
    }

    /// A read that lasts begins.
    pub fn hold(&mut self, offset: u64, bytes: u32) {
        self.held.resize(self.writes.len(), 0);
        let cells = self.cells(offset, bytes);
        self.held[cells].iter_mut().for_each(|held| *held = held.saturating_add(1));
    }

    /// A read that lasted is over now.
    pub fn release(&mut self, knows: &Knows<'_>, (lane, offset, bytes): (u32, u64, u32), pc: u32) {
        for cell in self.cells(offset, bytes) {
            self.held[cell] = self.held[cell].saturating_sub(1);
            let bit = 1 << knows.warp;
            let reads = &mut self.reads[cell * self.warps + knows.warp as usize];
            *reads = Reads { time: knows.time, pc, lanes: reads.lanes | 1 << lane, strong: false };
            self.readers[cell] |= bit;
        }
    }

    /// The cells and their words that bytes lie in.
    fn words(&self, offset: u64, bytes: u32) -> impl Iterator<Item = (usize, u8)> + use<> {
        let (shift, first, last) = (self.shift, offset >> 2, (offset + u64::from(bytes) - 1) >> 2);
        let per_cell = (1u64 << shift) / 4;
        let small = self.cells(offset, bytes).map(|cell| (cell, 1)).filter(move |_| per_cell <= 1);
        let large = (first..=last).filter(move |_| per_cell > 1);
        small.chain(large.map(move |word| ((word / per_cell.max(1)) as usize, 1 << (word % per_cell.max(1)))))
    }

    /// Bytes hold what an undefined register held.
    pub fn taint(&mut self, offset: u64, bytes: u32) {
        self.tainted = true;
        for (cell, word) in self.words(offset, bytes) {
            self.writes[cell].undefined |= word;
        }
    }

    /// Whether some of these bytes hold what an undefined register held.
    pub fn is_tainted(&self, offset: u64, bytes: u32) -> bool {
        self.words(offset, bytes).any(|(cell, word)| self.writes[cell].undefined & word != 0)
    }
}
