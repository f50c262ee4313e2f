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
            std::array::from_fn(|lane| u64::from(base[lane].wrapping_add(place.offset as u32)))
        }
        Some(Reg { row, .. }) => {
            let base = regs.double(row);
            std::array::from_fn(|lane| base[lane].wrapping_add(place.offset as u64))
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
        let bad = |lane: usize| {
            (FaultKind::OutOfBounds { space, address: at[lane], bytes: total, write: false }, lane as u32)
        };
        let mut values = [[0u64; LANES]; 8];
        match space {
            Space::Shared => {
                for lane in lanes(active) {
                    let offset = self.shared_offset(at[lane], total).ok_or_else(|| bad(lane))?;
                    for element in 0..access.regs.len() {
                        let place = offset + element as u64 * u64::from(access.bytes);
                        values[element & 7][lane] = read_words(&self.shared, place, access.bytes);
                    }
                }
            }
            Space::Global | Space::Const | Space::Generic => {
                for lane in lanes(active) {
                    let found = self.allocation(at[lane], u64::from(total)).ok_or_else(|| bad(lane))?;
                    let offset = at[lane] - found.base;
                    for element in 0..access.regs.len() {
                        let place = offset + element as u64 * u64::from(access.bytes);
                        values[element & 7][lane] = found.read(place, access.bytes);
                    }
                }
            }
            Space::Local => {
                for lane in lanes(active) {
                    let offset = self.local_offset(at[lane], total, lane).ok_or_else(|| bad(lane))?;
                    for element in 0..access.regs.len() {
                        let place = offset + element as u64 * u64::from(access.bytes);
                        values[element & 7][lane] = read_words(&warp.local, place, access.bytes);
                    }
                }
            }
            Space::Param => {
                for lane in lanes(active) {
                    for element in 0..access.regs.len() {
                        let from = at[lane] as usize + element * access.bytes as usize;
                        let bytes =
                            self.launch.params.get(from..from + access.bytes as usize).ok_or_else(|| bad(lane))?;
                        values[element & 7][lane] = bytes.iter().rev().fold(0, |value, b| value << 8 | u64::from(*b));
                    }
                }
            }
        }
        if C::ON {
            let touch = Touch { space, at, active, bytes: total, kind: TouchKind::Read, order: access.order, pc };
            self.checks.touch(warp.index, &touch, &self.launch.memory, &mut self.hint)?;
        }
        for (element, reg) in access.regs.iter().enumerate() {
            put(&mut warp.regs, *reg, &values[element & 7], access, active);
        }
        Ok(())
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
        let bad =
            |lane: usize| (FaultKind::OutOfBounds { space, address: at[lane], bytes: total, write: true }, lane as u32);
        let mut offsets = [0; LANES];
        for lane in lanes(active) {
            let offset = match space {
                Space::Shared => self.shared_offset(at[lane], total),
                Space::Local => self.local_offset(at[lane], total, lane),
                Space::Global => self.writable_offset(at[lane], total),
                _ => None,
            };
            offsets[lane] = offset.ok_or_else(|| bad(lane))?;
        }
        if C::ON {
            let kind = TouchKind::Write { uniform: self.same_values(warp, access, at, active) };
            let touch = Touch { space, at, active, bytes: total, kind, order: access.order, pc };
            self.checks.touch(warp.index, &touch, &self.launch.memory, &mut self.hint)?;
        }
        for lane in lanes(active) {
            if space == Space::Global {
                self.allocation(at[lane], u64::from(total)).ok_or_else(|| bad(lane))?;
                self.launch.memory[self.hint].mark(offsets[lane], u64::from(total));
            }
            for (element, reg) in access.regs.iter().enumerate() {
                let place = offsets[lane] + element as u64 * u64::from(access.bytes);
                let value = warp.regs.value(*reg, lane);
                match space {
                    Space::Shared => write_words(&mut self.shared, place, access.bytes, value),
                    Space::Local => write_words(&mut warp.local, place, access.bytes, value),
                    _ => self.launch.memory[self.hint].write(place, access.bytes, value),
                }
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
        let mut order: Vec<usize> = lanes(active).collect();
        order.sort_unstable_by_key(|lane| at[*lane]);
        order.windows(2).all(|pair| {
            at[pair[0]] != at[pair[1]]
                || access.regs.iter().all(|reg| warp.regs.value(*reg, pair[0]) == warp.regs.value(*reg, pair[1]))
        })
    }
}

/// Writes loaded values to a register, extended to its width.
#[inline(always)]
fn put(regs: &mut Regs, reg: Reg, values: &[u64; LANES], access: &Access, active: u32) {
    let extended: [u64; LANES] =
        if access.signed && access.bytes < 8 { values.map(|value| sign_extend(value, access.bytes)) } else { *values };
    match reg.class {
        Class::Word => {
            let kept = if access.width == 16 { 0xffff } else { u32::MAX };
            super::regs::blend(&mut regs.words[reg.row as usize], extended.map(|value| value as u32 & kept), active);
        }
        Class::Double => super::regs::blend(&mut regs.doubles[reg.row as usize], extended, active),
        Class::Predicate => {}
    }
}
