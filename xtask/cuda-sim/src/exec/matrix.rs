//! `ldmatrix`, `stmatrix` and `cp.async`.

use super::access::{addresses, read_words, write_words};
use super::checks::{Checks, Touch, TouchKind};
use super::cta::Cta;
use super::fault::{FaultKind, Finding};
use super::regs::LANES;
use super::warp::{Warp, lanes};
use crate::code::{CopyAsync, Matrix, Order};
use crate::ptx::Space;

/// Bytes of a matrix's row.
const ROW: u32 = 16;

impl<C: Checks> Cta<'_, C> {
    /// Loads or stores matrices of 8 by 8 elements of 16 bits.
    pub fn matrix(&mut self, warp: &mut Warp, matrix: &Matrix, pc: u32) -> Result<(), Finding> {
        let at = addresses(&warp.regs, &matrix.place);
        let rows = 8 * matrix.regs.len();
        let active = if rows == LANES { u32::MAX } else { (1 << rows) - 1 };
        self.aligned(Space::Shared, &at, ROW, active)?;
        let mut offsets = [0; LANES];
        for lane in lanes(active) {
            let kind =
                FaultKind::OutOfBounds { space: Space::Shared, address: at[lane], bytes: ROW, write: matrix.store };
            offsets[lane] = self.shared_offset(at[lane], ROW).ok_or((kind, lane as u32))?;
        }
        if C::ON {
            let kind = if matrix.store { TouchKind::Write { uniform: false } } else { TouchKind::Read };
            let touch = Touch { space: Space::Shared, at: &at, active, bytes: ROW, kind, order: Order::Weak, pc };
            self.checks.touch(warp.index, &touch, &self.launch.memory, &mut self.hint)?;
        }
        for (number, reg) in matrix.regs.iter().enumerate() {
            for lane in 0..LANES {
                let (major, minor) = (lane >> 2, lane & 3);
                // Two elements of a lane: one row's neighbours, or one column's where transposed.
                let places: [u64; 2] = std::array::from_fn(|i| {
                    let (row, column) = if matrix.transposed { (2 * minor + i, major) } else { (major, 2 * minor + i) };
                    offsets[8 * number + row] + 2 * column as u64
                });
                if matrix.store {
                    let value = warp.regs.value(*reg, lane);
                    write_words(&mut self.shared, places[0], 2, value & 0xffff);
                    write_words(&mut self.shared, places[1], 2, value >> 16);
                } else {
                    let low = read_words(&self.shared, places[0], 2);
                    let high = read_words(&self.shared, places[1], 2);
                    warp.regs.set(*reg, lane, low | high << 16);
                }
            }
        }
        Ok(())
    }

    /// Copies from global to shared memory at once; the checker knows that nobody may rely on it before a wait.
    pub fn copy_async(&mut self, warp: &mut Warp, copy: &CopyAsync, pc: u32, active: u32) -> Result<(), Finding> {
        let (to, from) = (addresses(&warp.regs, &copy.dst), addresses(&warp.regs, &copy.src));
        self.aligned(Space::Shared, &to, copy.bytes, active)?;
        self.aligned(Space::Global, &from, copy.bytes, active)?;
        let ignored = copy.ignore.map_or(0, |predicate| warp.encoded(predicate));
        for lane in lanes(active) {
            let (space, address) = (Space::Shared, to[lane]);
            let kind = FaultKind::OutOfBounds { space, address, bytes: copy.bytes, write: true };
            self.shared_offset(address, copy.bytes).ok_or((kind, lane as u32))?;
        }
        if C::ON {
            let kind = TouchKind::Copy;
            let touch =
                Touch { space: Space::Shared, at: &to, active, bytes: copy.bytes, kind, order: Order::Weak, pc };
            self.checks.touch(warp.index, &touch, &self.launch.memory, &mut self.hint)?;
        }
        for lane in lanes(active) {
            let wanted = copy.src_bytes.map_or(copy.bytes, |reg| warp.regs.value(reg, lane) as u32);
            let bytes = if ignored >> lane & 1 == 1 { 0 } else { wanted };
            if bytes > copy.bytes {
                let what = format!("a source of {bytes} bytes for a copy of {}", copy.bytes);
                return Err((FaultKind::BadOperand { what }, lane as u32));
            }
            self.copy_lane(warp.index, copy, pc, lane, (to[lane], &from), bytes)?;
        }
        Ok(())
    }

    fn copy_lane(
        &mut self,
        warp: u32,
        copy: &CopyAsync,
        pc: u32,
        lane: usize,
        (to, from): (u64, &[u64; LANES]),
        bytes: u32,
    ) -> Result<(), Finding> {
        let fault =
            |space, address, bytes, write| (FaultKind::OutOfBounds { space, address, bytes, write }, lane as u32);
        let target = self.shared_offset(to, copy.bytes).ok_or_else(|| fault(Space::Shared, to, copy.bytes, true))?;
        let mut data = [0u32; 4];
        if bytes > 0 {
            let address = from[lane];
            let found = self.allocation(address, u64::from(bytes));
            let found = found.ok_or_else(|| fault(Space::Global, address, bytes, false))?;
            let offset = address - found.base;
            for byte in 0..bytes {
                let value = found.read(offset + u64::from(byte), 1) as u32;
                data[byte as usize / 4] |= value << (8 * (byte % 4));
            }
            if C::ON {
                let touch = Touch {
                    space: Space::Global,
                    at: from,
                    active: 1 << lane,
                    bytes,
                    kind: TouchKind::Read,
                    order: Order::Weak,
                    pc,
                };
                self.checks.touch(warp, &touch, &self.launch.memory, &mut self.hint)?;
            }
        }
        for word in 0..copy.bytes / 4 {
            self.shared[(target / 4) as usize + word as usize] = data[word as usize];
        }
        Ok(())
    }
}
