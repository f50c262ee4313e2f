//! `ldmatrix`, `stmatrix` and `cp.async`.

use super::access::{addresses, write_words};
use super::checks::{Checks, Touch, TouchKind};
use super::cta::Cta;
use super::fault::{FaultKind, Finding};
use super::regs::{LANES, Row};
use super::warp::{Warp, lanes};
use crate::code::{CopyAsync, Matrix, Order, Scope};
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
        self.shared_offsets(&at, ROW, (active, matrix.store), &mut offsets)?;
        if C::ON {
            let kind = if matrix.store { TouchKind::Write { uniform: false } } else { TouchKind::Read };
            let touch = Touch {
                space: Space::Shared,
                at: &at,
                active,
                bytes: ROW,
                kind,
                order: Order::Weak,
                scope: Scope::Device,
                pc,
            };
            self.checks.touch(warp.index, &touch, &self.launch.memory, &mut self.hint)?;
        }
        for (number, reg) in matrix.regs.iter().enumerate() {
            let places = &offsets[8 * number..][..8];
            if matrix.store {
                self.store_matrix(warp.regs.word(reg.row), places, matrix.transposed);
            } else {
                self.load_matrix(&mut warp.regs.words[reg.row as usize], places, matrix.transposed);
            }
        }
        Ok(())
    }

    /// A lane holds two elements: one row's neighbours, or one column's where transposed.
    fn load_matrix(&self, row: &mut Row, places: &[u64], transposed: bool) {
        let mut rows = [[0u32; 4]; 8];
        for (row, place) in rows.iter_mut().zip(places) {
            row.copy_from_slice(&self.shared[(place / 4) as usize..][..4]);
        }
        for lane in 0..LANES {
            let (major, minor) = (lane >> 2, lane & 3);
            row[lane] = if transposed {
                let element = |row: usize| rows[row][major >> 1] >> (16 * (major & 1)) & 0xffff;
                element(2 * minor) | element(2 * minor + 1) << 16
            } else {
                rows[major][minor]
            };
        }
    }

    fn store_matrix(&mut self, row: &Row, places: &[u64], transposed: bool) {
        for (lane, pair) in row.iter().enumerate() {
            let (major, minor) = (lane >> 2, lane & 3);
            for i in 0..2 {
                let (row, column) = if transposed { (2 * minor + i, major) } else { (major, 2 * minor + i) };
                let place = places[row] + 2 * column as u64;
                write_words(&mut self.shared, place, 2, u64::from(pair >> (16 * i)) & 0xffff);
            }
        }
    }

    /// Copies from global to shared memory; the checker knows that nobody may rely on it before a wait.
    pub fn copy_async(&mut self, warp: &mut Warp, copy: &CopyAsync, pc: u32, active: u32) -> Result<(), Finding> {
        let (to, from) = (addresses(&warp.regs, &copy.dst), addresses(&warp.regs, &copy.src));
        self.aligned(Space::Shared, &to, copy.bytes, active)?;
        self.aligned(Space::Global, &from, copy.bytes, active)?;
        let ignored = copy.ignore.map_or(0, |predicate| warp.encoded(predicate));
        let mut targets = [0; LANES];
        self.shared_offsets(&to, copy.bytes, (active, true), &mut targets)?;
        if C::ON {
            let kind = TouchKind::Copy;
            let touch = Touch {
                space: Space::Shared,
                at: &to,
                active,
                bytes: copy.bytes,
                kind,
                order: Order::Weak,
                scope: Scope::Device,
                pc,
            };
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
            let data = self.copy_source(from[lane], counts[lane]).map_err(|kind| (kind, lane as u32))?;
            let words = (copy.bytes / 4) as usize;
            warp.late.copy(lane, (targets[lane] / 4) as usize, &data[..words], &mut self.shared);
        }
        if !C::ON {
            return Ok(());
        }
        // Lanes that read alike are one request.
        let mut rest = lanes(active).filter(|lane| counts[*lane] > 0).fold(0u32, |mask, lane| mask | 1 << lane);
        while rest != 0 {
            let bytes = counts[rest.trailing_zeros() as usize];
            let alike = lanes(rest).filter(|lane| counts[*lane] == bytes).fold(0, |mask, lane| mask | 1 << lane);
            rest &= !alike;
            let (kind, order) = (TouchKind::Read, Order::Weak);
            let touch =
                Touch { space: Space::Global, at: &from, active: alike, bytes, kind, order, scope: Scope::Device, pc };
            self.checks.touch(warp.index, &touch, &self.launch.memory, &mut self.hint)?;
        }
        Ok(())
    }

    /// The bytes of a copy's source as words, zeros behind them.
    #[inline(always)]
    fn copy_source(&mut self, from: u64, bytes: u32) -> Result<[u32; 4], FaultKind> {
        let mut data = [0u32; 4];
        if bytes > 0 {
            let kind = FaultKind::OutOfBounds { space: Space::Global, address: from, bytes, write: false };
            let found = self.allocation(from, u64::from(bytes)).ok_or(kind)?;
            let offset = from - found.base;
            for word in 0..bytes.div_ceil(4) {
                let left = bytes - 4 * word;
                let value = found.read(offset + u64::from(4 * word), 4) as u32;
                data[word as usize] = if left >= 4 { value } else { value & ((1 << (8 * left)) - 1) };
            }
        }
        Ok(data)
    }
}
