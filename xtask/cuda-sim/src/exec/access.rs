//! Loads and stores.

use super::checks::{Checks, Touch, TouchKind};
use super::cta::Cta;
use super::fault::{FaultKind, Finding};
use super::regs::{Class, LANES, Reg, Regs};
use super::warp::{Warp, lanes};
use super::window;
use crate::code::{Access, Place};
use crate::lower::{LOCAL_BASE, SHARED_BASE};
use crate::memory::Allocation;
use crate::ptx::Space;
use std::sync::Arc;

/// Addresses of all lanes.
pub type Addresses = [u64; LANES];

/// A place's addresses.
#[inline(always)]
pub fn addresses(regs: &Regs, place: &Place) -> Addresses {
    match place.base {
        None => [place.offset as u64; LANES],
        Some(Reg { class: Class::Word, row }) => {
            let base = regs.word(row);
            let mut at = [0; LANES];
            for lane in 0..LANES {
                at[lane] = u64::from(base[lane].wrapping_add(place.offset as u32));
            }
            at
        }
        Some(Reg { row, .. }) => {
            let base = regs.double(row);
            let mut at = [0; LANES];
            for lane in 0..LANES {
                at[lane] = base[lane].wrapping_add(place.offset as u64);
            }
            at
        }
    }
}

/// The space of a generic address and the address there.
pub fn resolve(address: u64) -> (Space, u64) {
    if window::holds(window::SHARED, address) {
        (Space::Shared, address - window::SHARED)
    } else if window::holds(window::LOCAL, address) {
        (Space::Local, address - window::LOCAL)
    } else if window::holds(window::PARAM, address) {
        (Space::Param, address - window::PARAM)
    } else {
        (Space::Global, address)
    }
}

/// An aligned number in words.
#[inline(always)]
pub fn read_words(words: &[u32], offset: u64, bytes: u32) -> u64 {
    let at = (offset >> 2) as usize;
    match bytes {
        4 => u64::from(words[at]),
        8 => u64::from(words[at]) | u64::from(words[at + 1]) << 32,
        2 => u64::from(words[at] >> (8 * (offset & 2)) & 0xffff),
        _ => u64::from(words[at] >> (8 * (offset & 3)) & 0xff),
    }
}

/// Writes an aligned number into words.
#[inline(always)]
pub fn write_words(words: &mut [u32], offset: u64, bytes: u32, value: u64) {
    let at = (offset >> 2) as usize;
    match bytes {
        4 => words[at] = value as u32,
        8 => {
            words[at] = value as u32;
            words[at + 1] = (value >> 32) as u32;
        }
        _ => {
            let shift = 8 * (offset & 3) as u32;
            let mask = if bytes == 2 { 0xffffu32 } else { 0xff } << shift;
            words[at] = words[at] & !mask | (value as u32) << shift & mask;
        }
    }
}

fn sign_extend(value: u64, bytes: u32) -> u64 {
    let shift = 64 - 8 * bytes;
    ((value << shift) as i64 >> shift) as u64
}

/// The allocation that holds an access, the one found last first.
#[inline(always)]
pub fn find<'a>(all: &'a [Arc<Allocation>], hint: &mut usize, address: u64, bytes: u64) -> Option<&'a Allocation> {
    if all.get(*hint).is_none_or(|found| !found.holds(address, bytes)) {
        let at = all.partition_point(|found| found.base <= address).checked_sub(1)?;
        if !all[at].holds(address, bytes) {
            return None;
        }
        *hint = at;
    }
    Some(&all[*hint])
}

impl<C: Checks> Cta<'_, C> {
    /// The allocation that holds an access.
    #[inline(always)]
    pub fn allocation(&mut self, address: u64, bytes: u64) -> Option<&Allocation> {
        find(&self.launch.memory, &mut self.hint, address, bytes)
    }

    /// The offset in shared memory of an access that lies within.
    #[inline(always)]
    pub fn shared_offset(&self, address: u64, bytes: u32) -> Option<u64> {
        let offset = address.wrapping_sub(SHARED_BASE);
        (offset < u64::from(self.shared_bytes) && u64::from(bytes) <= u64::from(self.shared_bytes) - offset)
            .then_some(offset)
    }

    /// The offset in a lane's local memory of an access that lies within.
    #[inline(always)]
    pub fn local_offset(&self, address: u64, bytes: u32, lane: usize) -> Option<u64> {
        let size = u64::from(self.launch.kernel.local_bytes);
        let offset = address.wrapping_sub(LOCAL_BASE);
        (offset < size && u64::from(bytes) <= size - offset).then_some(lane as u64 * size + offset)
    }

    /// Checks alignment of all lanes.
    #[inline(always)]
    pub fn aligned(&self, space: Space, at: &Addresses, bytes: u32, active: u32) -> Result<(), Finding> {
        let rest = u64::from(bytes - 1);
        if at.iter().fold(0, |all, address| all | address) & rest == 0 {
            return Ok(());
        }
        for lane in lanes(active) {
            if at[lane] & rest != 0 {
                return Err((FaultKind::Misaligned { space, address: at[lane], bytes }, lane as u32));
            }
        }
        Ok(())
    }

    /// The offsets in shared memory of accesses that lie within.
    #[inline(always)]
    pub fn shared_offsets(
        &self,
        at: &Addresses,
        bytes: u32,
        (active, write): (u32, bool),
        offsets: &mut [u64; LANES],
    ) -> Result<(), Finding> {
        let room = u64::from(self.shared_bytes).checked_sub(u64::from(bytes));
        let mut outside = u64::from(room.is_none());
        for lane in 0..LANES {
            offsets[lane] = at[lane].wrapping_sub(SHARED_BASE);
            outside |= u64::from(offsets[lane] > room.unwrap_or(0));
        }
        if outside != 0 {
            for lane in lanes(active) {
                let address = at[lane];
                let kind = FaultKind::OutOfBounds { space: Space::Shared, address, bytes, write };
                self.shared_offset(address, bytes).ok_or((kind, lane as u32))?;
            }
        }
        Ok(())
    }

    /// Splits generic addresses by space.
    fn by_space(at: &Addresses, active: u32) -> Vec<(Space, u32, Addresses)> {
        let mut parts: Vec<(Space, u32, Addresses)> = Vec::new();
        for lane in lanes(active) {
            let (space, address) = resolve(at[lane]);
            if !parts.iter().any(|part| part.0 == space) {
                parts.push((space, 0, [0; LANES]));
            }
            if let Some(part) = parts.iter_mut().find(|part| part.0 == space) {
                part.1 |= 1 << lane;
                part.2[lane] = address;
            }
        }
        parts
    }

    /// `ld`
    pub fn load(&mut self, warp: &mut Warp, access: &Access, pc: u32, active: u32) -> Result<(), Finding> {
        let at = addresses(&warp.regs, &access.place);
        if access.space != Space::Generic {
            return self.load_in(warp, access, access.space, &at, pc, active);
        }
        for (space, mask, at) in Self::by_space(&at, active) {
            self.load_in(warp, access, space, &at, pc, mask)?;
        }
        Ok(())
    }

    fn load_in(
        &mut self,
        warp: &mut Warp,
        access: &Access,
        space: Space,
        at: &Addresses,
        pc: u32,
        active: u32,
    ) -> Result<(), Finding> {
        let mut places = Places::new();
        self.begin(warp.index, access, (space, TouchKind::Read), at, (pc, active), &mut places)?;
        let Warp { regs, local, .. } = warp;
        match (space, places.one) {
            (Space::Shared, _) => {
                gather(regs, access, active, &places, |_, offset, bytes| read_words(&self.shared, offset, bytes))
            }
            (Space::Local, _) => {
                gather(regs, access, active, &places, |_, offset, bytes| read_words(local, offset, bytes))
            }
            (Space::Param, _) => gather(regs, access, active, &places, |_, offset, bytes| {
                let bytes = &self.launch.params[offset as usize..offset as usize + bytes as usize];
                bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
            }),
            (_, Some(one)) => {
                let found: &Allocation = &self.launch.memory[one as usize];
                gather(regs, access, active, &places, |_, offset, bytes| found.read(offset, bytes));
            }
            (_, None) => {
                let memory = &self.launch.memory;
                gather(regs, access, active, &places, |lane, offset, bytes| {
                    memory[places.allocations[lane] as usize].read(offset, bytes)
                });
            }
        }
        Ok(())
    }

    /// Checks an access of lanes to one space and finds where each of them lies.
    #[inline(always)]
    fn begin(
        &mut self,
        warp: u32,
        access: &Access,
        (space, kind): (Space, TouchKind),
        at: &Addresses,
        (pc, active): (u32, u32),
        places: &mut Places,
    ) -> Result<(), Finding> {
        let bytes = access.bytes * access.regs.len() as u32;
        self.aligned(space, at, bytes, active)?;
        self.places(space, at, bytes, (active, kind != TouchKind::Read), places)?;
        if C::ON {
            let touch = Touch { space, at, active, bytes, kind, order: access.order, scope: access.scope, pc };
            self.checks.touch(warp, &touch, &self.launch.memory, &mut self.hint)?;
        }
        Ok(())
    }

    /// Where each lane's access lies, which must be within bounds.
    #[inline(always)]
    fn places(
        &mut self,
        space: Space,
        at: &Addresses,
        bytes: u32,
        (active, write): (u32, bool),
        places: &mut Places,
    ) -> Result<(), Finding> {
        let outside = |lane: usize| (FaultKind::OutOfBounds { space, address: at[lane], bytes, write }, lane as u32);
        match space {
            Space::Shared => self.shared_offsets(at, bytes, (active, write), &mut places.offsets)?,
            Space::Local => {
                for lane in lanes(active) {
                    places.offsets[lane] = self.local_offset(at[lane], bytes, lane).ok_or_else(|| outside(lane))?;
                }
            }
            Space::Param => {
                let size = self.launch.params.len() as u64;
                for lane in lanes(active) {
                    let inside = at[lane].checked_add(u64::from(bytes)).is_some_and(|end| end <= size);
                    places.offsets[lane] = (inside && !write).then_some(at[lane]).ok_or_else(|| outside(lane))?;
                }
            }
            Space::Global | Space::Const | Space::Generic => {
                if let Some(base) = self.common(at, bytes, active).filter(|found| !(write && found.1)) {
                    places.one = Some(self.hint as u32);
                    (0..LANES).for_each(|lane| places.offsets[lane] = at[lane].wrapping_sub(base.0));
                    return Ok(());
                }
                for lane in lanes(active) {
                    let found = self.allocation(at[lane], u64::from(bytes)).filter(|found| !(write && found.read_only));
                    places.offsets[lane] = at[lane] - found.ok_or_else(|| outside(lane))?.base;
                    places.allocations[lane] = self.hint as u32;
                }
            }
        }
        Ok(())
    }

    /// The base of the allocation that holds all lanes' accesses, if one does, and whether kernels only read it.
    #[inline(always)]
    pub fn common(&mut self, at: &Addresses, bytes: u32, active: u32) -> Option<(u64, bool)> {
        let some = at[active.trailing_zeros() as usize & 31];
        let (mut low, mut high) = (some, some);
        for lane in 0..LANES {
            let address = if active >> lane & 1 == 1 { at[lane] } else { some };
            (low, high) = (low.min(address), high.max(address));
        }
        let found = self.allocation(low, (high - low).checked_add(u64::from(bytes))?)?;
        Some((found.base, found.read_only))
    }

    /// `st`
    pub fn store(&mut self, warp: &mut Warp, access: &Access, pc: u32, active: u32) -> Result<(), Finding> {
        let at = addresses(&warp.regs, &access.place);
        if access.space != Space::Generic {
            return self.store_in(warp, access, access.space, &at, pc, active);
        }
        for (space, mask, at) in Self::by_space(&at, active) {
            self.store_in(warp, access, space, &at, pc, mask)?;
        }
        Ok(())
    }

    fn store_in(
        &mut self,
        warp: &mut Warp,
        access: &Access,
        space: Space,
        at: &Addresses,
        pc: u32,
        active: u32,
    ) -> Result<(), Finding> {
        let kind = TouchKind::Write { uniform: !C::ON || self.same_values(warp, access, at, active) };
        let mut places = Places::new();
        self.begin(warp.index, access, (space, kind), at, (pc, active), &mut places)?;
        let Warp { regs, local, .. } = warp;
        match (space, places.one) {
            (Space::Shared, _) => {
                scatter(regs, access, active, &places, |_, offset, bytes, value| {
                    write_words(&mut self.shared, offset, bytes, value);
                });
            }
            (Space::Local, _) => {
                scatter(regs, access, active, &places, |_, offset, bytes, value| {
                    write_words(local, offset, bytes, value);
                });
            }
            (_, Some(one)) => {
                let found: &Allocation = &self.launch.memory[one as usize];
                scatter(regs, access, active, &places, |_, offset, bytes, value| found.write(offset, bytes, value));
            }
            (_, None) => {
                let memory = &self.launch.memory;
                scatter(regs, access, active, &places, |lane, offset, bytes, value| {
                    memory[places.allocations[lane] as usize].write(offset, bytes, value);
                });
            }
        }
        if space == Space::Global {
            let total = u64::from(access.bytes) * access.regs.len() as u64;
            for lane in lanes(active) {
                let number = places.one.unwrap_or(places.allocations[lane]);
                self.launch.memory[number as usize].mark(places.offsets[lane], total);
            }
        }
        Ok(())
    }

    /// The offset in its allocation of an access that kernels may write.
    pub fn writable_offset(&mut self, address: u64, bytes: u32) -> Option<u64> {
        let found = self.allocation(address, u64::from(bytes)).filter(|found| !found.read_only)?;
        Some(address - found.base)
    }

    /// Whether lanes that write one address write one value.
    fn same_values(&self, warp: &Warp, access: &Access, at: &Addresses, active: u32) -> bool {
        // Most accesses fall on different ones of 64 places.
        let bytes = u64::from(access.bytes) * access.regs.len() as u64;
        let mut taken = 0u64;
        let different = lanes(active).all(|lane| {
            let place = 1 << (at[lane] / bytes % 64);
            let free = taken & place == 0;
            taken |= place;
            free
        });
        if different {
            return true;
        }
        let mut order: Vec<usize> = lanes(active).collect();
        order.sort_unstable_by_key(|lane| at[*lane]);
        order.windows(2).all(|pair| {
            at[pair[0]] != at[pair[1]]
                || access.regs.iter().all(|reg| warp.regs.value(*reg, pair[0]) == warp.regs.value(*reg, pair[1]))
        })
    }
}

/// Where lanes' accesses lie: offsets, and in global memory the allocations.
struct Places {
    offsets: [u64; LANES],
    allocations: [u32; LANES],
    /// The allocation of all lanes, where they have one.
    one: Option<u32>,
}

impl Places {
    fn new() -> Self {
        Self { offsets: [0; LANES], allocations: [0; LANES], one: None }
    }
}

/// Reads elements into registers, extended to their width.
#[inline(always)]
fn gather(regs: &mut Regs, access: &Access, active: u32, places: &Places, read: impl Fn(usize, u64, u32) -> u64) {
    let kept = if access.width == 16 { 0xffff } else { u32::MAX };
    for (element, reg) in access.regs.iter().enumerate() {
        let skip = element as u64 * u64::from(access.bytes);
        match (reg.class, access.bytes) {
            (Class::Word, 4) => {
                let row = &mut regs.words[reg.row as usize];
                lanes(active).for_each(|lane| row[lane] = read(lane, places.offsets[lane] + skip, 4) as u32);
            }
            (Class::Word, bytes) => {
                let row = &mut regs.words[reg.row as usize];
                for lane in lanes(active) {
                    let value = read(lane, places.offsets[lane] + skip, bytes);
                    let value = if access.signed { sign_extend(value, bytes) } else { value };
                    row[lane] = value as u32 & kept;
                }
            }
            (_, bytes) => {
                let row = &mut regs.doubles[reg.row as usize];
                for lane in lanes(active) {
                    let value = read(lane, places.offsets[lane] + skip, bytes);
                    row[lane] = if access.signed && bytes < 8 { sign_extend(value, bytes) } else { value };
                }
            }
        }
    }
}

/// Writes registers' elements.
#[inline(always)]
fn scatter(regs: &Regs, access: &Access, active: u32, places: &Places, mut write: impl FnMut(usize, u64, u32, u64)) {
    for (element, reg) in access.regs.iter().enumerate() {
        let skip = element as u64 * u64::from(access.bytes);
        match (reg.class, access.bytes) {
            (Class::Word, 4) => {
                let row = regs.word(reg.row);
                lanes(active).for_each(|lane| write(lane, places.offsets[lane] + skip, 4, u64::from(row[lane])));
            }
            (_, bytes) => {
                lanes(active).for_each(|lane| write(lane, places.offsets[lane] + skip, bytes, regs.value(*reg, lane)));
            }
        }
    }
}
