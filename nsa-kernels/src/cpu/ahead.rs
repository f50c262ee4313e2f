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

/// Evenly spaced rows, line by line.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    /// The row at hand.
    row: *const u8,
    /// Its next line.
    line: *const u8,
    /// Its bytes.
    row_bytes: usize,
    /// Bytes from a row to the next.
    stride: usize,
    /// Rows, this one included.
    rows: usize,
    /// Lines a step.
    pace: usize,
}

impl Lines {
    /// No line.
    pub(crate) fn none() -> Self {
        Self { row: std::ptr::null(), line: std::ptr::null(), row_bytes: 0, stride: 0, rows: 0, pace: 0 }
    }

    /// Rows of `len` elements, `stride` apart, of which `data` holds all from the first's start to the last's end.
    pub(crate) fn new<T>(data: &[T], len: usize, stride: usize) -> Self {
        let bytes = size_of::<T>();
        // Rows without gaps are one.
        let (rows, len) = if len == stride { (1, data.len()) } else { (data.len().div_ceil(stride), len) };
        let row = data.as_ptr().cast();
        Self { row, line: line_of(row), row_bytes: len * bytes, stride: stride * bytes, rows, pace: 0 }
    }
}

/// The line that an address lies in.
#[inline(always)]
fn line_of(p: *const u8) -> *const u8 {
    p.wrapping_sub(p.addr() % LINE)
}

impl Ahead for Lines {
    #[inline(always)]
    fn pace(&mut self, steps: usize) {
        let lines = self.rows * self.row_bytes.div_ceil(LINE);
        self.pace = lines.div_ceil(steps.max(1));
    }

    #[inline(always)]
    fn step(&mut self) {
        for _ in 0..self.pace {
            if self.line >= self.row.wrapping_add(self.row_bytes) {
                if self.rows <= 1 {
                    return;
                }
                self.rows -= 1;
                self.row = self.row.wrapping_add(self.stride);
                self.line = line_of(self.row);
            }
            prefetch_line(self.line);
            self.line = self.line.wrapping_add(LINE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines that come, as places in `data`.
    fn lines(data: &[u8], mut lines: Lines, steps: usize) -> Vec<usize> {
        lines.pace(steps);
        let mut seen = Vec::new();
        for _ in 0..steps * lines.pace {
            let before = lines;
            lines.pace = 1;
            lines.step();
            if lines.line != before.line {
                seen.push(lines.line.addr() - LINE - line_of(data.as_ptr()).addr());
            }
        }
        seen
    }

    #[test]
    fn every_line_of_every_row_comes_once_in_order() {
        #[repr(align(64))]
        struct Aligned([u8; 1024]);
        let Aligned(data) = &Aligned([0; 1024]);
        assert!(lines(data, Lines::none(), 9).is_empty());
        assert_eq!(lines(data, Lines::new(&data[..256], 32, 32), 1), [0, 64, 128, 192]);
        // Rows of 80 bytes from 0, 320 and 640 on; steps more than lines.
        assert_eq!(lines(data, Lines::new(&data[..720], 80, 320), 50), [0, 64, 320, 384, 640, 704]);
        // From the middle of a line on.
        assert_eq!(lines(data, Lines::new(&data[32..200], 168, 168), 2), [0, 64, 128, 192]);
    }
}
