//! What is known of global memory during a launch, across its CTAs.

use super::clock::{Clocks, Public};
use super::shared::{Kind, Visit};
use crate::exec::checks::TouchKind;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// log2 of a page's bytes.
const PAGE: u32 = 10;
/// Locks over pages.
const SHARDS: usize = 64;

/// An access by a thread of the grid.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamp {
    /// Its CTA.
    pub cta: u32,
    /// Its warp's time.
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

/// The last write, and reads by up to two CTAs.
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    write: Stamp,
    reads: [Stamp; 2],
}

#[derive(Debug, Default)]
struct Shard {
    pages: HashMap<u64, Box<[Cell]>>,
    /// What is known at addresses of strong accesses.
    places: HashMap<u64, Public>,
}

/// The shadow of global memory.
#[derive(Debug)]
pub struct GlobalShadow {
    shift: u32,
    shards: Vec<Mutex<Shard>>,
}

/// The other access of a race and whether it writes.
pub type Race = (Stamp, bool);

/// Who looks: a CTA with its clocks.
#[derive(Clone, Copy)]
pub struct View<'c> {
    /// The CTA.
    pub cta: u32,
    /// Its clocks.
    pub clocks: &'c Clocks,
}

impl View<'_> {
    fn ordered(&self, visit: &Visit, stamp: &Stamp) -> bool {
        let other = (u32::from(stamp.warp), u32::from(stamp.lane));
        if stamp.cta == self.cta {
            return self.clocks.ordered((visit.warp, visit.lane), other, stamp.time);
        }
        let known = self.clocks.warps[visit.warp as usize].others.get(&stamp.cta);
        known.and_then(|times| times.get(stamp.warp as usize)).is_some_and(|time| *time >= stamp.time)
    }

    fn stamp(&self, visit: &Visit, kind: Kind) -> Stamp {
        let time = self.clocks.time(visit.warp);
        Stamp { cta: self.cta, time, pc: visit.pc, warp: visit.warp as u8, lane: visit.lane as u8, kind }
    }

    fn together(&self, visit: &Visit, stamp: &Stamp) -> bool {
        stamp.cta == self.cta
            && stamp.pc == visit.pc
            && u32::from(stamp.warp) == visit.warp
            && stamp.time == self.clocks.time(visit.warp)
            && visit.kind == TouchKind::Write { uniform: true }
    }
}

impl GlobalShadow {
    /// A shadow in cells of `granule` bytes.
    pub fn new(granule: u32) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect();
        Self { shift: granule.trailing_zeros(), shards }
    }

    fn shard(&self, page: u64) -> MutexGuard<'_, Shard> {
        self.shards[page as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks lanes' accesses and remembers them. Gives the lane, the address and the race that it found.
    pub fn visit(
        &self,
        view: View<'_>,
        lanes: impl Iterator<Item = (u64, Visit)>,
        bytes: u32,
    ) -> Result<(), (u32, u64, Race)> {
        let mut held: Option<(u64, MutexGuard<'_, Shard>)> = None;
        for (address, visit) in lanes {
            for cell in address >> self.shift..=(address + u64::from(bytes) - 1) >> self.shift {
                let page = cell >> (PAGE - self.shift);
                if held.as_ref().is_none_or(|held| held.0 != page) {
                    drop(held.take());
                    held = Some((page, self.shard(page)));
                }
                let Some((_, shard)) = &mut held else { continue };
                let cells = 1usize << (PAGE - self.shift);
                let cells = shard.pages.entry(page).or_insert_with(|| vec![Cell::default(); cells].into_boxed_slice());
                let place = &mut cells[cell as usize & ((1 << (PAGE - self.shift)) - 1)];
                touch(place, view, &visit).map_err(|race| (visit.lane, cell << self.shift, race))?;
            }
        }
        Ok(())
    }

    /// What is known at an address.
    pub fn public(&self, address: u64) -> Option<Public> {
        self.shard(address >> PAGE).places.get(&address).cloned()
    }

    /// Changes what is known at an address.
    pub fn publish(&self, address: u64, change: impl FnOnce(&mut Public)) {
        change(self.shard(address >> PAGE).places.entry(address).or_default());
    }
}

fn touch(cell: &mut Cell, view: View<'_>, visit: &Visit) -> Result<(), Race> {
    let strong = visit.strong;
    let clash = |stamp: &Stamp| {
        stamp.kind != Kind::None && !(strong && stamp.kind == Kind::Strong) && !view.ordered(visit, stamp)
    };
    let kind = if strong { Kind::Strong } else { Kind::Plain };
    let stamp = view.stamp(visit, kind);
    if clash(&cell.write) && !view.together(visit, &cell.write) {
        return Err((cell.write, true));
    }
    if visit.kind == TouchKind::Read {
        // The slots hold readers of two CTAs, so that a writer of any CTA meets one of another.
        let slot = usize::from(cell.reads[0].kind != Kind::None && cell.reads[0].cta != view.cta);
        cell.reads[slot] = stamp;
        return Ok(());
    }
    if let Some(read) = cell.reads.iter().find(|read| clash(read)) {
        return Err((*read, false));
    }
    *cell = Cell { write: stamp, reads: [Stamp::default(); 2] };
    Ok(())
}
