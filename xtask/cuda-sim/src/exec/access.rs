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
        for lane in lanes(active) {
            if at[lane] & u64::from(bytes - 1) != 0 {
                return Err((FaultKind::Misaligned { space, address: at[lane], bytes }, lane as u32));
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
        let total = access.bytes * access.regs.len() as u32;
        self.aligned(space, at, total, active)?;
        let places = self.places(space, at, total, active, false)?;
        if C::ON {
            let touch = Touch { space, at, active, bytes: total, kind: TouchKind::Read, order: access.order, pc };
            self.checks.touch(warp.index, &touch, &self.launch.memory, &mut self.hint)?;
        }
        let Warp { regs, local, .. } = warp;
        match space {
            Space::Shared => {
                gather(regs, access, active, &places, |_, offset, bytes| read_words(&self.shared, offset, bytes))
            }
            Space::Local => gather(regs, access, active, &places, |_, offset, bytes| read_words(local, offset, bytes)),
            Space::Param => gather(regs, access, active, &places, |_, offset, bytes| {
                let bytes = &self.launch.params[offset as usize..offset as usize + bytes as usize];
                bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
            }),
            Space::Global | Space::Const | Space::Generic => {
                let memory = &self.launch.memory;
                gather(regs, access, active, &places, |lane, offset, bytes| {
                    memory[places.allocations[lane] as usize].read(offset, bytes)
                });
            }
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
        active: u32,
        write: bool,
    ) -> Result<Places, Finding> {
        let mut places = Places { offsets: [0; LANES], allocations: [0; LANES] };
        for lane in lanes(active) {
            let offset = match space {
                Space::Shared => self.shared_offset(at[lane], bytes),
                Space::Local => self.local_offset(at[lane], bytes, lane),
                Space::Param => {
                    let inside = at[lane]
                        .checked_add(u64::from(bytes))
                        .is_some_and(|end| end <= self.launch.params.len() as u64);
                    (inside && !write).then_some(at[lane])
                }
                Space::Global | Space::Const | Space::Generic => {
                    let found = self.allocation(at[lane], u64::from(bytes)).filter(|found| !(write && found.read_only));
                    found.map(|found| at[lane] - found.base)
                }
            };
            let kind = FaultKind::OutOfBounds { space, address: at[lane], bytes, write };
            places.offsets[lane] = offset.ok_or((kind, lane as u32))?;
            places.allocations[lane] = self.hint as u32;
        }
        Ok(places)
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
        let total = access.bytes * access.regs.len() as u32;
        self.aligned(space, at, total, active)?;
        let places = self.places(space, at, total, active, true)?;
        if C::ON {
            let kind = TouchKind::Write { uniform: self.same_values(warp, access, at, active) };
            let touch = Touch { space, at, active, bytes: total, kind, order: access.order, pc };
            self.checks.touch(warp.index, &touch, &self.launch.memory, &mut self.hint)?;
        }
        for (element, reg) in access.regs.iter().enumerate() {
            let skip = element as u64 * u64::from(access.bytes);
            for lane in lanes(active) {
                let (offset, value) = (places.offsets[lane] + skip, warp.regs.value(*reg, lane));
                match space {
                    Space::Shared => write_words(&mut self.shared, offset, access.bytes, value),
                    Space::Local => write_words(&mut warp.local, offset, access.bytes, value),
                    _ => self.launch.memory[places.allocations[lane] as usize].write(offset, access.bytes, value),
                }
            }
        }
        if space == Space::Global {
            for lane in lanes(active) {
                let found = &self.launch.memory[places.allocations[lane] as usize];
                found.mark(places.offsets[lane], u64::from(total));
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
        // Ascending addresses, as most are, are all different.
        let mut last = None;
        if lanes(active).all(|lane| last.replace(at[lane]).is_none_or(|last| last < at[lane])) {
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
