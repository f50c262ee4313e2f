//! Device memory: allocations at addresses that the host does not have, with gaps between them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, RwLock};
use thiserror::Error;

/// The first address.
const BASE: u64 = 0x0000_0302_0000_0000;
/// Addresses of allocations are multiples.
const ALIGN: u64 = 512;
/// Addresses left free behind an allocation, so that small overruns hit none.
const GAP: u64 = 4096;

/// What can go wrong with memory on the host's side.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MemoryError {
    /// No room.
    #[error("{wanted} bytes wanted, {free} are free")]
    Full {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes left.
        free: u64,
    },
    /// An address that is none of ours, or no longer.
    #[error("{address:#x} is not the start of an allocation")]
    NoAllocation {
        /// The address.
        address: u64,
    },
    /// A range that no allocation holds.
    #[error("{bytes} bytes at {address:#x} do not lie in one allocation")]
    OutOfBounds {
        /// The address.
        address: u64,
        /// Bytes.
        bytes: u64,
    },
}

/// A piece of device memory. Words are atomic, so that CTAs on several threads may race as on a device.
#[derive(Debug)]
pub struct Allocation {
    /// Its first address.
    pub base: u64,
    /// Its bytes.
    pub bytes: u64,
    /// Kernels may not write it.
    pub read_only: bool,
    words: Box<[AtomicU32]>,
    /// A bit a byte: written since the allocation.
    written: Box<[AtomicU32]>,
}

impl Allocation {
    fn new(base: u64, bytes: u64, read_only: bool) -> Self {
        let zeros = |count: u64| (0..count).map(|_| AtomicU32::new(0)).collect();
        Self { base, bytes, read_only, words: zeros(bytes.div_ceil(8) * 2), written: zeros(bytes.div_ceil(32)) }
    }

    /// Whether bytes at an offset lie within.
    #[inline(always)]
    pub fn holds(&self, address: u64, bytes: u64) -> bool {
        let offset = address.wrapping_sub(self.base);
        offset < self.bytes && bytes <= self.bytes - offset
    }

    /// A word.
    #[inline(always)]
    pub fn word(&self, index: usize) -> &AtomicU32 {
        &self.words[index]
    }

    /// An aligned number of 1, 2, 4 or 8 bytes.
    #[inline(always)]
    pub fn read(&self, offset: u64, bytes: u32) -> u64 {
        let at = (offset >> 2) as usize;
        let word = self.words[at].load(Relaxed);
        match bytes {
            4 => u64::from(word),
            8 => u64::from(word) | u64::from(self.words[at + 1].load(Relaxed)) << 32,
            2 => u64::from(word >> (8 * (offset & 2)) & 0xffff),
            _ => u64::from(word >> (8 * (offset & 3)) & 0xff),
        }
    }

    /// Writes an aligned number of 1, 2, 4 or 8 bytes.
    #[inline(always)]
    pub fn write(&self, offset: u64, bytes: u32, value: u64) {
        let at = (offset >> 2) as usize;
        match bytes {
            4 => self.words[at].store(value as u32, Relaxed),
            8 => {
                self.words[at].store(value as u32, Relaxed);
                self.words[at + 1].store((value >> 32) as u32, Relaxed);
            }
            _ => {
                let shift = 8 * (offset & 3) as u32;
                let mask = if bytes == 2 { 0xffffu32 } else { 0xff } << shift;
                let value = (value as u32) << shift & mask;
                let update = |word: u32| Some(word & !mask | value);
                let _ = self.words[at].fetch_update(Relaxed, Relaxed, update);
            }
        }
    }

    /// Notes that bytes were written.
    #[inline(always)]
    pub fn mark(&self, offset: u64, bytes: u64) {
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            let count = (32 - (at & 31)).min(end - at);
            let mask = if count == 32 { u32::MAX } else { ((1 << count) - 1) << (at & 31) };
            let cell = &self.written[(at >> 5) as usize];
            if cell.load(Relaxed) & mask != mask {
                cell.fetch_or(mask, Relaxed);
            }
            at += count;
        }
    }

    /// Whether all these bytes were written.
    #[inline(always)]
    pub fn is_written(&self, offset: u64, bytes: u64) -> bool {
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            let count = (32 - (at & 31)).min(end - at);
            let mask = if count == 32 { u32::MAX } else { ((1 << count) - 1) << (at & 31) };
            if self.written[(at >> 5) as usize].load(Relaxed) & mask != mask {
                return false;
            }
            at += count;
        }
        true
    }

    fn copy_in(&self, offset: u64, data: &[u8]) {
        self.mark(offset, data.len() as u64);
        let mut at = offset;
        let mut rest = data;
        while let Some((first, tail)) = rest.split_first() {
            if at & 3 == 0 && rest.len() >= 4 {
                let (word, tail) = rest.split_at(4);
                self.words[(at >> 2) as usize].store(u32::from_le_bytes([word[0], word[1], word[2], word[3]]), Relaxed);
                (at, rest) = (at + 4, tail);
            } else {
                self.write(at, 1, u64::from(*first));
                (at, rest) = (at + 1, tail);
            }
        }
    }

    fn copy_out(&self, offset: u64, data: &mut [u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let count = if at & 3 == 0 && rest.len() >= 4 { 4 } else { 1 };
            let (head, tail) = rest.split_at_mut(count);
            head.copy_from_slice(&self.read(at, count as u32).to_le_bytes()[..count]);
            (at, rest) = (at + count as u64, tail);
        }
    }
}

#[derive(Debug, Default)]
struct Table {
    allocations: BTreeMap<u64, Arc<Allocation>>,
    next: u64,
    used: u64,
}

/// All of a device's memory.
#[derive(Debug)]
pub struct DeviceMemory {
    /// Its size in bytes.
    pub total: u64,
    table: RwLock<Table>,
}

/// What an allocation takes of the device's memory.
fn taken(bytes: u64) -> u64 {
    bytes.max(1).next_multiple_of(ALIGN)
}

impl DeviceMemory {
    /// Memory of a size.
    pub fn new(total: u64) -> Self {
        Self { total, table: RwLock::new(Table { next: BASE, ..Table::default() }) }
    }

    fn read_table(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write_table(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Bytes that are free.
    pub fn free_bytes(&self) -> u64 {
        self.total - self.read_table().used
    }

    /// Allocates. Addresses are never given twice, so that a stale one is noticed.
    ///
    /// # Errors
    /// The memory is full.
    pub fn allocate(&self, bytes: u64, read_only: bool) -> Result<u64, MemoryError> {
        let mut table = self.write_table();
        let base = table.next;
        self.insert(&mut table, base, bytes, read_only)?;
        table.next += taken(bytes) + GAP;
        Ok(base)
    }

    /// An address for an allocation that is made later, perhaps several times.
    pub fn reserve(&self, bytes: u64) -> u64 {
        let mut table = self.write_table();
        let base = table.next;
        table.next += taken(bytes) + GAP;
        base
    }

    /// Allocates at a reserved address.
    ///
    /// # Errors
    /// The memory is full.
    pub fn allocate_at(&self, base: u64, bytes: u64) -> Result<(), MemoryError> {
        self.insert(&mut self.write_table(), base, bytes, false)
    }

    fn insert(&self, table: &mut Table, base: u64, bytes: u64, read_only: bool) -> Result<(), MemoryError> {
        let free = self.total - table.used;
        if taken(bytes) > free {
            return Err(MemoryError::Full { wanted: bytes, free });
        }
        table.used += taken(bytes);
        table.allocations.insert(base, Arc::new(Allocation::new(base, bytes, read_only)));
        Ok(())
    }

    /// Frees an allocation.
    ///
    /// # Errors
    /// The address is not the start of one.
    pub fn free(&self, address: u64) -> Result<(), MemoryError> {
        let mut table = self.write_table();
        let found = table.allocations.remove(&address).ok_or(MemoryError::NoAllocation { address })?;
        table.used -= taken(found.bytes);
        Ok(())
    }

    /// The allocation that holds a range.
    ///
    /// # Errors
    /// None does.
    pub fn find(&self, address: u64, bytes: u64) -> Result<Arc<Allocation>, MemoryError> {
        let table = self.read_table();
        let found = table.allocations.range(..=address).next_back().map(|(_, allocation)| allocation);
        let found = found.filter(|found| found.holds(address, bytes) || bytes == 0);
        found.cloned().ok_or(MemoryError::OutOfBounds { address, bytes })
    }

    /// Copies from the host.
    ///
    /// # Errors
    /// The range is not within one allocation.
    pub fn copy_in(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        let found = self.find(address, data.len() as u64)?;
        found.copy_in(address - found.base, data);
        Ok(())
    }

    /// Copies to the host.
    ///
    /// # Errors
    /// The range is not within one allocation.
    pub fn copy_out(&self, address: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let found = self.find(address, data.len() as u64)?;
        found.copy_out(address - found.base, data);
        Ok(())
    }

    /// Copies on the device, with what is known to be unwritten.
    ///
    /// # Errors
    /// A range is not within one allocation.
    pub fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), MemoryError> {
        let (source, target) = (self.find(from, bytes)?, self.find(to, bytes)?);
        let mut data = vec![0; bytes as usize];
        source.copy_out(from - source.base, &mut data);
        let unwritten: Vec<u64> = (0..bytes).filter(|at| !source.is_written(from - source.base + at, 1)).collect();
        if unwritten.is_empty() {
            target.copy_in(to - target.base, &data);
            return Ok(());
        }
        for (at, byte) in data.iter().enumerate() {
            target.write(to - target.base + at as u64, 1, u64::from(*byte));
            if unwritten.binary_search(&(at as u64)).is_err() {
                target.mark(to - target.base + at as u64, 1);
            }
        }
        Ok(())
    }

    /// All allocations in the order of their addresses.
    pub fn snapshot(&self) -> Vec<Arc<Allocation>> {
        self.read_table().allocations.values().cloned().collect()
    }
}
