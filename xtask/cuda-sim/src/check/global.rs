//! What is known of global memory during a launch, across its CTAs.

use super::clock::{Knows, Public};
use super::shared::{Kind, Visit};
use crate::code::Scope;
use crate::exec::checks::TouchKind;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
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

/// Spreads the numbers of pages.
#[derive(Clone, Copy, Debug, Default)]
struct PageHasher(u64);

impl Hasher for PageHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(self.0 << 8 | u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        // An odd number near 2^64 over the golden ratio; the table looks at high bits and low ones.
        self.0 = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[derive(Debug, Default)]
struct Shard {
    pages: HashMap<u64, Box<[Cell]>, BuildHasherDefault<PageHasher>>,
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

/// Who looks: a warp of a CTA with what it knows, and what it does.
#[derive(Clone, Copy)]
pub struct View<'c> {
    /// The CTA.
    pub cta: u32,
    /// What the warp knows.
    pub knows: Knows<'c>,
    /// What it does.
    pub visit: Visit,
}

impl View<'_> {
    #[inline(always)]
    fn ordered(&self, lane: u32, stamp: &Stamp) -> bool {
        if stamp.cta == self.cta {
            return self.knows.ordered(lane, (u32::from(stamp.warp), u32::from(stamp.lane)), stamp.time);
        }
        self.knows.ordered_elsewhere(stamp.cta, u32::from(stamp.warp), stamp.time)
    }

    #[inline(always)]
    fn clash(&self, lane: u32, stamp: &Stamp) -> bool {
        // Two strong accesses do not clash if each is strong for the other's CTA.
        let strong = match stamp.kind {
            Kind::Strong => self.visit.scope == Scope::Device || stamp.cta == self.cta,
            Kind::Within => stamp.cta == self.cta,
            _ => false,
        };
        stamp.kind != Kind::None && !(self.visit.strong && strong) && !self.ordered(lane, stamp)
    }

    #[inline(always)]
    fn stamp(&self, lane: u32) -> Stamp {
        let kind = match (self.visit.strong, self.visit.scope) {
            (false, _) => Kind::Plain,
            (true, Scope::Device) => Kind::Strong,
            (true, Scope::Cta) => Kind::Within,
        };
        let Knows { warp, time, .. } = self.knows;
        Stamp { cta: self.cta, time, pc: self.visit.pc, warp: warp as u8, lane: lane as u8, kind }
    }

    fn together(&self, stamp: &Stamp) -> bool {
        stamp.cta == self.cta
            && stamp.pc == self.visit.pc
            && u32::from(stamp.warp) == self.knows.warp
            && stamp.time == self.knows.time
            && self.visit.kind == TouchKind::Write { uniform: true }
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
        view: &View<'_>,
        lanes: impl Iterator<Item = (u32, u64)>,
        bytes: u32,
    ) -> Result<(), (u32, u64, Race)> {
        let mut held: Option<(u64, MutexGuard<'_, Shard>)> = None;
        let in_page = PAGE - self.shift;
        for (lane, address) in lanes {
            let (mut cell, end) = (address >> self.shift, ((address + u64::from(bytes) - 1) >> self.shift) + 1);
            while cell < end {
                let page = cell >> in_page;
                if held.as_ref().is_none_or(|held| held.0 % SHARDS as u64 != page % SHARDS as u64) {
                    drop(held.take());
                }
                let (_, shard) = held.get_or_insert_with(|| (page, self.shard(page)));
                let empty = || vec![Cell::default(); 1 << in_page].into_boxed_slice();
                let cells = shard.pages.entry(page).or_insert_with(empty);
                let last = end.min((page + 1) << in_page);
                for cell in cell..last {
                    let place = &mut cells[cell as usize & ((1 << in_page) - 1)];
                    touch(place, view, lane).map_err(|race| (lane, cell << self.shift, race))?;
                }
                cell = last;
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

#[inline(always)]
fn touch(cell: &mut Cell, view: &View<'_>, lane: u32) -> Result<(), Race> {
    let stamp = view.stamp(lane);
    if view.clash(lane, &cell.write) && !view.together(&cell.write) {
        return Err((cell.write, true));
    }
    if view.visit.kind == TouchKind::Read {
        // The slots hold readers of two CTAs, so that a writer of any CTA meets one of another.
        let slot = usize::from(cell.reads[0].kind != Kind::None && cell.reads[0].cta != view.cta);
        cell.reads[slot] = stamp;
        return Ok(());
    }
    if let Some(read) = cell.reads.iter().find(|read| view.clash(lane, read)) {
        return Err((*read, false));
    }
    *cell = Cell { write: stamp, reads: [Stamp::default(); 2] };
    Ok(())
}
