//! Bulk copies between global and shared memory, of bytes and of tiles of tensors.

use super::access::{read_words, resolve, write_words};
use super::checks::{Checks, ObjectUse, Touch, TouchKind};
use super::cta::Cta;
use super::fault::{FaultKind, Finding};
use super::regs::{Class, LANES, Reg};
use super::swizzle::swizzle;
use super::warp::{Warp, lanes};
use crate::code::{Atomic, AtomicOp, AtomicType, Bulk, Order, Pipe, Place, Scope};
use crate::lower::SHARED_BASE;
use crate::ptx::Space;
use crate::tensor_map::{self, TensorMap, element_bytes};

/// Bytes of all banks of shared memory.
const LINE: u64 = 128;

/// A copy's place in the code and the thread that makes it.
#[derive(Clone, Copy)]
struct By {
    warp: u32,
    lane: usize,
    pc: u32,
    /// The barrier object that a load completes.
    object: u64,
}

fn bad<T>(what: impl Into<String>) -> Result<T, FaultKind> {
    Err(FaultKind::BadOperand { what: what.into() })
}

impl<C: Checks> Cta<'_, C> {
    /// Runs a bulk copy of each lane.
    pub fn bulk(&mut self, warp: &mut Warp, bulk: &Bulk, pc: u32, active: u32) -> Result<(), Finding> {
        for lane in lanes(active) {
            let by = By { warp: warp.index, lane, pc, object: 0 };
            self.bulk_lane(warp, bulk, by).map_err(|kind| (kind, lane as u32))?;
        }
        Ok(())
    }

    fn bulk_lane(&mut self, warp: &Warp, bulk: &Bulk, by: By) -> Result<(), FaultKind> {
        let value = |reg: Reg| warp.regs.value(reg, by.lane);
        match bulk {
            Bulk::Load { dst, src, bytes, object } => {
                let (to, from) = (shared_address(warp, dst, by.lane), address(warp, src, by.lane));
                let count = value(*bytes) as u32;
                check_size(to, from, count)?;
                let by = By { object: self.object_offset(warp, object, by.lane)?, ..by };
                let data = self.read_global(from, count, by)?;
                self.write_shared(to, &data, by)?;
                self.complete(count, by)
            }
            Bulk::Store { dst, src, bytes, reduce } => {
                let (to, from) = (address(warp, dst, by.lane), shared_address(warp, src, by.lane));
                let count = value(*bytes) as u32;
                check_size(to, from, count)?;
                let data = self.read_shared(from, count, by)?;
                self.write_global(to, &data, reduce.as_deref(), by)
            }
            Bulk::LoadTile { dst, map, at, object } => {
                let map = self.tensor_map(warp, map, by.lane)?;
                let origin: Vec<i64> = at.iter().map(|reg| i64::from(value(*reg) as i32)).collect();
                let by = By { object: self.object_offset(warp, object, by.lane)?, ..by };
                let count = self.load_tile(&map, &origin, shared_address(warp, dst, by.lane), by)?;
                self.complete(count, by)
            }
            Bulk::StoreTile { src, map, at, reduce } => {
                let map = self.tensor_map(warp, map, by.lane)?;
                let origin: Vec<i64> = at.iter().map(|reg| i64::from(value(*reg) as i32)).collect();
                self.store_tile(&map, &origin, shared_address(warp, src, by.lane), *reduce, by)
            }
        }
    }

    fn touch_one(&mut self, by: By, space: Space, address: u64, bytes: u32, kind: TouchKind) -> Result<(), FaultKind> {
        if !C::ON {
            return Ok(());
        }
        let at = [address; LANES];
        let touch = Touch {
            space,
            at: &at,
            active: 1 << by.lane,
            bytes,
            kind,
            order: Order::Weak,
            scope: Scope::Device,
            pc: by.pc,
        };
        self.checks.touch(by.warp, &touch, &self.launch.memory, &mut self.hint).map_err(|finding| finding.0)
    }

    fn read_global(&mut self, address: u64, bytes: u32, by: By) -> Result<Vec<u8>, FaultKind> {
        let kind = FaultKind::OutOfBounds { space: Space::Global, address, bytes, write: false };
        let found = self.allocation(address, u64::from(bytes)).ok_or(kind)?;
        let offset = address - found.base;
        let data = (0..u64::from(bytes)).map(|at| found.read(offset + at, 1) as u8).collect();
        self.touch_one(by, Space::Global, address, bytes, TouchKind::Read)?;
        Ok(data)
    }

    fn write_global(&mut self, address: u64, data: &[u8], reduce: Option<&Atomic>, by: By) -> Result<(), FaultKind> {
        let bytes = data.len() as u32;
        let kind = FaultKind::OutOfBounds { space: Space::Global, address, bytes, write: true };
        let offset = self.writable_offset(address, bytes).ok_or(kind)?;
        let _alone = reduce.and_then(|reduce| self.launch.alone::<C>(Space::Global, reduce.order));
        let touched = if reduce.is_some() { TouchKind::Atomic } else { TouchKind::Write { uniform: true } };
        self.touch_one(by, Space::Global, address, bytes, touched)?;
        let found = &self.launch.memory[self.hint];
        let step = reduce.map_or(1, |reduce| reduce.bytes as usize);
        for (at, element) in data.chunks_exact(step).enumerate() {
            let operand = element.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            let place = offset + (at * step) as u64;
            match reduce {
                None => found.write(place, 1, operand),
                Some(atomic) => _ = self.global_atomic(atomic, place, operand, 0),
            }
        }
        found.mark(offset, u64::from(bytes));
        Ok(())
    }

    fn read_shared(&mut self, address: u64, bytes: u32, by: By) -> Result<Vec<u8>, FaultKind> {
        let kind = FaultKind::OutOfBounds { space: Space::Shared, address, bytes, write: false };
        let offset = self.shared_offset(address, bytes).ok_or(kind)?;
        self.touch_one(by, Space::Shared, address, bytes, TouchKind::AsyncRead(Pipe::Bulk))?;
        Ok((0..u64::from(bytes)).map(|at| read_words(&self.shared, offset + at, 1) as u8).collect())
    }

    fn write_shared(&mut self, address: u64, data: &[u8], by: By) -> Result<(), FaultKind> {
        let bytes = data.len() as u32;
        let kind = FaultKind::OutOfBounds { space: Space::Shared, address, bytes, write: true };
        let offset = self.shared_offset(address, bytes).ok_or(kind)?;
        self.touch_one(by, Space::Shared, address, bytes, TouchKind::AsyncWrite { object: by.object })?;
        for (at, byte) in data.iter().enumerate() {
            write_words(&mut self.shared, offset + at as u64, 1, u64::from(*byte));
        }
        Ok(())
    }

    /// A copy's bytes count for a barrier object, and what it wrote is known to those who wait for it.
    fn complete(&mut self, bytes: u32, by: By) -> Result<(), FaultKind> {
        self.checks.object_used((by.warp, by.lane as u32, by.pc), by.object, ObjectUse::Strong)?;
        self.checks.object_filled(by.warp, by.object);
        self.complete_bytes(by.object, i64::from(bytes))
    }

    fn tensor_map(&mut self, warp: &Warp, place: &Place, lane: usize) -> Result<TensorMap, FaultKind> {
        let generic = address(warp, place, lane);
        let (space, at) = resolve(generic);
        let mut bytes = [0; tensor_map::BYTES];
        match space {
            Space::Param => {
                let found = self.launch.params.get(at as usize..at as usize + bytes.len());
                match found {
                    Some(found) => bytes.copy_from_slice(found),
                    None => return bad("a tensor map beyond the parameters"),
                }
            }
            Space::Global => {
                let kind = FaultKind::OutOfBounds { space, address: at, bytes: bytes.len() as u32, write: false };
                let found = self.allocation(at, bytes.len() as u64).ok_or(kind)?;
                let offset = at - found.base;
                for (index, byte) in bytes.iter_mut().enumerate() {
                    *byte = found.read(offset + index as u64, 1) as u8;
                }
            }
            _ => return bad("a tensor map that is neither a parameter nor in global memory"),
        }
        TensorMap::decode(&bytes).map_or_else(|| bad("no tensor map"), Ok)
    }

    /// Rows of a tile: coordinates of their first element, and their number in the tile.
    fn rows(map: &TensorMap) -> impl Iterator<Item = (u64, Vec<i64>)> + use<C> {
        let tile = map.tile.clone();
        let count: u64 = tile[1..].iter().map(|size| u64::from(*size)).product();
        (0..count).map(move |number| {
            let mut rest = number;
            let mut at = vec![0];
            for size in &tile[1..] {
                at.push((rest % u64::from(*size)) as i64);
                rest /= u64::from(*size);
            }
            (number, at)
        })
    }

    /// The address of a row of the tensor, if the row exists.
    fn row_address(map: &TensorMap, origin: &[i64], row: &[i64]) -> Option<u64> {
        let mut address = map.address;
        for dimension in 1..map.sizes.len() {
            let at = origin[dimension] + row[dimension] * i64::from(map.steps[dimension]);
            if at < 0 || at as u64 >= map.sizes[dimension] {
                return None;
            }
            address += at as u64 * map.strides[dimension - 1];
        }
        Some(address)
    }

    fn load_tile(&mut self, map: &TensorMap, origin: &[i64], to: u64, by: By) -> Result<u32, FaultKind> {
        let size = element_bytes(map.data_type).unwrap_or(1);
        let width = map.tile[0];
        check_tile(map, origin, to)?;
        for (number, row) in Self::rows(map) {
            let mut data = fill(map, size, width);
            if let Some(address) = Self::row_address(map, origin, &row) {
                // The columns that exist.
                let first = (-origin[0]).clamp(0, i64::from(width));
                let last = (map.sizes[0] as i64 - origin[0]).clamp(first, i64::from(width));
                if last > first {
                    let from = address + (origin[0] + first) as u64 * u64::from(size);
                    let found = self.read_global(from, (last - first) as u32 * size, by)?;
                    let start = first as usize * size as usize;
                    data[start..start + found.len()].copy_from_slice(&found);
                }
            }
            let start = to + number * u64::from(map.pitch());
            let place = |piece: usize| swizzle(start + 16 * piece as u64, map.swizzle);
            let mut pieces: Vec<(u64, &[u8])> =
                data.chunks(16).enumerate().map(|(at, piece)| (place(at), piece)).collect();
            // What lies beside each other is written at once, as the hardware's lines are.
            pieces.sort_unstable_by_key(|(place, _)| *place);
            for line in pieces.chunk_by(|a, b| a.0 + a.1.len() as u64 == b.0 && a.0 / LINE == b.0 / LINE) {
                let bytes: Vec<u8> = line.iter().flat_map(|(_, piece)| *piece).copied().collect();
                self.write_shared(line[0].0, &bytes, by)?;
            }
        }
        Ok(width * size * map.tile[1..].iter().product::<u32>())
    }

    fn store_tile(
        &mut self,
        map: &TensorMap,
        origin: &[i64],
        from: u64,
        reduce: Option<AtomicOp>,
        by: By,
    ) -> Result<(), FaultKind> {
        let size = element_bytes(map.data_type).unwrap_or(1);
        let width = map.tile[0];
        check_tile(map, origin, from)?;
        let reduce = reduce.map(|op| combination(map.data_type, op, size)).transpose()?;
        for (number, row) in Self::rows(map) {
            let Some(address) = Self::row_address(map, origin, &row) else { continue };
            let start = from + number * u64::from(map.pitch());
            let mut data = Vec::new();
            for piece in 0..u64::from(width * size).div_ceil(16) {
                let bytes = (u64::from(width * size) - 16 * piece).min(16) as u32;
                data.extend(self.read_shared(swizzle(start + 16 * piece, map.swizzle), bytes, by)?);
            }
            let first = (-origin[0]).clamp(0, i64::from(width));
            let last = (map.sizes[0] as i64 - origin[0]).clamp(first, i64::from(width));
            if last > first {
                let to = address + (origin[0] + first) as u64 * u64::from(size);
                let kept = &data[first as usize * size as usize..last as usize * size as usize];
                self.write_global(to, kept, reduce.as_ref(), by)?;
            }
        }
        Ok(())
    }
}

fn address(warp: &Warp, place: &Place, lane: usize) -> u64 {
    let base = place.base.map_or(0, |reg| warp.regs.value(reg, lane));
    base.wrapping_add(place.offset as u64)
}

/// An address of shared memory, also where it is given as a generic one.
fn shared_address(warp: &Warp, place: &Place, lane: usize) -> u64 {
    let at = address(warp, place, lane);
    match place.base.map(|reg| reg.class) {
        Some(Class::Double) => resolve(at).1,
        _ => at & 0xffff_ffff,
    }
}

fn check_size(to: u64, from: u64, bytes: u32) -> Result<(), FaultKind> {
    if bytes == 0 || !bytes.is_multiple_of(16) {
        return bad(format!("a bulk copy of {bytes} bytes: a multiple of 16 is needed"));
    }
    for address in [to, from] {
        if !address.is_multiple_of(16) {
            return Err(FaultKind::Misaligned { space: Space::Generic, address, bytes: 16 });
        }
    }
    Ok(())
}

fn check_tile(map: &TensorMap, origin: &[i64], shared: u64) -> Result<(), FaultKind> {
    if origin.len() != map.sizes.len() {
        return bad(format!("{} coordinates of a tensor of {} dimensions", origin.len(), map.sizes.len()));
    }
    if !(shared - shared.min(SHARED_BASE)).is_multiple_of(128) {
        return Err(FaultKind::Misaligned { space: Space::Shared, address: shared, bytes: 128 });
    }
    Ok(())
}

/// A row of what lies outside the tensor.
fn fill(map: &TensorMap, size: u32, width: u32) -> Vec<u8> {
    // The hardware's NaN: each 16 bits are 0x7ff7.
    let floating = matches!(map.data_type, 6..=12);
    let bytes = (size * width) as usize;
    if map.nan_fill && floating { [0xf7, 0x7f].repeat(bytes / 2) } else { vec![0; bytes] }
}

/// How a reduction combines elements of a tensor's type.
fn combination(data_type: u32, op: AtomicOp, bytes: u32) -> Result<Atomic, FaultKind> {
    let ty = match data_type {
        3 | 5 => AtomicType::Signed,
        0..=2 | 4 => AtomicType::Unsigned,
        6..=8 | 10..=12 => AtomicType::Float,
        9 => AtomicType::Brain,
        _ => return bad("a reduction over this type"),
    };
    Ok(Atomic::of_elements(op, ty, bytes))
}
