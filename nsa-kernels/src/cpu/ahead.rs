//! Memory that comes nearer while something else is computed.
//!
//! A product reads the rows of a left operand in many short streams, which a processor's own prefetching does not keep up
//! with; products that read from memory therefore name what is read next.

use super::simd::prefetch_line;

/// Bytes that come at once.
const LINE: usize = 64;

/// What is brought nearer, a little every step of a product. A hint: no result depends on it.
pub(crate) trait Ahead: Copy {
    /// Spreads it over so many steps.
    fn pace(&mut self, steps: usize);
    /// One step.
    fn step(&mut self);
}

/// Nothing.
#[derive(Clone, Copy)]
pub(crate) struct Still;

impl Ahead for Still {
    #[inline(always)]
    fn pace(&mut self, _: usize) {}
    #[inline(always)]
    fn step(&mut self) {}
}

/// Memory that lies together.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Run {
    address: usize,
    bytes: usize,
}

impl Run {
    /// That of a slice.
    #[inline(always)]
    pub(crate) fn of<T>(data: &[T]) -> Self {
        Self { address: data.as_ptr().addr(), bytes: size_of_val(data) }
    }

    /// Lines that it touches, or one more.
    #[inline(always)]
    fn lines(&self) -> usize {
        self.bytes.div_ceil(LINE)
    }
}

/// Evenly spaced rows, then runs that lie anywhere, line by line.
#[derive(Clone, Copy)]
pub(crate) struct Lines<'a> {
    /// What is left of the row at hand, from its next line on.
    row: Run,
    /// The row at hand.
    start: usize,
    /// Bytes of a row.
    row_bytes: usize,
    /// Bytes from a row to the next.
    stride: usize,
    /// Rows, this one included.
    rows: usize,
    /// What comes behind the rows.
    runs: &'a [Run],
    /// Lines a step.
    pace: usize,
}

impl<'a> Lines<'a> {
    /// No line.
    pub(crate) fn none() -> Self {
        Self::runs(&[])
    }

    /// Whether there is no line.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows == 0 && self.runs.is_empty()
    }

    /// Runs, one after the other.
    pub(crate) fn runs(runs: &'a [Run]) -> Self {
        Self { row: Run { address: 0, bytes: 0 }, start: 0, row_bytes: 0, stride: 0, rows: 0, runs, pace: 0 }
    }

    /// Rows of `len` elements, `stride` apart, of which `data` holds all from the first's start to the last's end.
    pub(crate) fn new<T>(data: &[T], len: usize, stride: usize) -> Self {
        let bytes = size_of::<T>();
        // Rows without gaps are one, as are those that are one.
        let (rows, len) = match stride {
            0 => (1, len),
            _ if len == stride => (1, data.len()),
            _ => (data.len().div_ceil(stride), len),
        };
        let row = Run { address: data.as_ptr().addr(), bytes: len * bytes };
        Self { row, start: row.address, row_bytes: row.bytes, stride: stride * bytes, rows, runs: &[], pace: 0 }
    }

    /// The next row or run; false behind the last.
    #[inline(always)]
    fn go_on(&mut self) -> bool {
        if self.rows > 1 {
            self.rows -= 1;
            self.start += self.stride;
            self.row = Run { address: self.start, bytes: self.row_bytes };
        } else if let [next, rest @ ..] = self.runs {
            (self.row, self.runs) = (*next, rest);
        } else {
            return false;
        }
        true
    }
}

impl Ahead for Lines<'_> {
    #[inline(always)]
    fn pace(&mut self, steps: usize) {
        let row = Run { address: self.start, bytes: self.row_bytes };
        let lines = self.rows * row.lines() + self.runs.iter().map(Run::lines).sum::<usize>();
        self.pace = lines.div_ceil(steps.max(1));
    }

    #[inline(always)]
    fn step(&mut self) {
        for _ in 0..self.pace {
            while self.row.bytes == 0 {
                if !self.go_on() {
                    return;
                }
            }
            let address = self.row.address;
            // Never read: an address will do.
            prefetch_line(std::ptr::without_provenance(address));
            let step = (LINE - address % LINE).min(self.row.bytes);
            self.row = Run { address: address + step, bytes: self.row.bytes - step };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines that come, as places in `data`.
    fn lines(data: &[u8], mut lines: Lines<'_>, steps: usize) -> Vec<usize> {
        lines.pace(steps);
        let mut seen = Vec::new();
        for _ in 0..steps * lines.pace {
            lines.pace = 1;
            lines.step();
            let next = lines.row.address - 1;
            if lines.row.address != 0 && seen.last() != Some(&next) {
                seen.push(next);
            }
        }
        seen.iter().map(|address| (address - data.as_ptr().addr()) / LINE * LINE).collect()
    }

    #[test]
    fn every_line_of_every_row_comes_once_in_order() {
        #[repr(align(64))]
        struct Aligned([u8; 1024]);
        let Aligned(data) = &Aligned([0; 1024]);
        assert!(Lines::none().is_empty() && lines(data, Lines::none(), 9).is_empty());
        assert_eq!(lines(data, Lines::new(&data[..256], 32, 32), 1), [0, 64, 128, 192]);
        // Rows of 80 bytes from 0, 320 and 640 on; steps more than lines.
        assert_eq!(lines(data, Lines::new(&data[..720], 80, 320), 50), [0, 64, 320, 384, 640, 704]);
        // All rows are one.
        assert_eq!(lines(data, Lines::new(&data[..80], 80, 0), 3), [0, 64]);
        // From the middle of a line on.
        assert_eq!(lines(data, Lines::new(&data[32..200], 168, 168), 2), [0, 64, 128, 192]);
        let runs = [&data[640..700], &data[0..0], &data[128..300]].map(Run::of);
        assert!(!Lines::runs(&runs).is_empty());
        assert_eq!(lines(data, Lines::runs(&runs), 2), [640, 128, 192, 256]);
    }
}
