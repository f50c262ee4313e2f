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
        let mut counts = [0; LANES];
        for lane in lanes(active) {
            let wanted = copy.src_bytes.map_or(copy.bytes, |reg| warp.regs.value(reg, lane) as u32);
            counts[lane] = if ignored >> lane & 1 == 1 { 0 } else { wanted };
            if counts[lane] > copy.bytes {
                let what = format!("a source of {} bytes for a copy of {}", counts[lane], copy.bytes);
                return Err((FaultKind::BadOperand { what }, lane as u32));
            }
        }
        for lane in lanes(active) {
            self.copy_lane(copy, lane, to[lane], from[lane], counts[lane])?;
        }
        if !C::ON {
            return Ok(());
        }
        // Lanes that read alike are one request.
        for bytes in 1..=copy.bytes {
            let alike = lanes(active).filter(|lane| counts[*lane] == bytes).fold(0, |mask, lane| mask | 1 << lane);
            if alike != 0 {
                let (kind, order) = (TouchKind::Read, Order::Weak);
                let touch = Touch { space: Space::Global, at: &from, active: alike, bytes, kind, order, pc };
                self.checks.touch(warp.index, &touch, &self.launch.memory, &mut self.hint)?;
            }
        }
        Ok(())
    }

    fn copy_lane(&mut self, copy: &CopyAsync, lane: usize, to: u64, from: u64, bytes: u32) -> Result<(), Finding> {
        let fault =
            |space, address, bytes, write| (FaultKind::OutOfBounds { space, address, bytes, write }, lane as u32);
        let target = self.shared_offset(to, copy.bytes).ok_or_else(|| fault(Space::Shared, to, copy.bytes, true))?;
        let mut data = [0u32; 4];
        if bytes > 0 {
            let found = self.allocation(from, u64::from(bytes));
            let found = found.ok_or_else(|| fault(Space::Global, from, bytes, false))?;
            let offset = from - found.base;
            for word in 0..bytes.div_ceil(4) {
                let left = bytes - 4 * word;
                let value = found.read(offset + u64::from(4 * word), 4) as u32;
                data[word as usize] = if left >= 4 { value } else { value & ((1 << (8 * left)) - 1) };
            }
        }
        for word in 0..copy.bytes / 4 {
            self.shared[(target / 4) as usize + word as usize] = data[word as usize];
        }
        Ok(())
    }
}
