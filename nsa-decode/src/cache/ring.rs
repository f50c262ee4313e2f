//! The last rows of a stream, and what of their past can be brought back.

use super::new_version;
use crate::Result;
use bytemuck::Pod;
use nsa_core::index::ring_row;
use nsa_kernels::layer::copy::{self, Piece};
use nsa_kernels::{Backend, Buffer, Element, Tensor, TensorMut};
use std::ops::Range;
use std::sync::Arc;

/// The last `rows` rows `[G, D]` of a stream: position s lies in row s mod `rows`. Rows that fall out go to a second ring
/// of `undo` rows, so that the stream can be cut back by up to `undo` positions. Clones share memory until one is
/// written to.
#[derive(Clone, Debug)]
pub(crate) struct Ring<T: Pod> {
    live: Lane<T>,
    undo: Lane<T>,
    len: usize,
    /// Lowest position that is still there, in either ring.
    low: usize,
}

/// Rows in a ring of memory, made at the first write.
#[derive(Clone, Debug)]
struct Lane<T: Pod> {
    data: Option<Arc<Buffer<T>>>,
    rows: usize,
    row_shape: [usize; 2],
    /// Another one whenever it is other memory.
    version: u64,
}

impl<T: Element> Lane<T> {
    fn row_len(&self) -> usize {
        self.row_shape[0] * self.row_shape[1]
    }

    /// The memory, no longer shared with anyone.
    fn writable(&mut self, backend: &Backend) -> Result<&mut Buffer<T>> {
        let size = self.rows * self.row_len();
        if self.data.is_none() {
            self.version = new_version();
        }
        let data = self.data.get_or_insert_with(|| Arc::new(backend.alloc(size)));
        if Arc::get_mut(data).is_none() {
            let mut copy = backend.alloc(size);
            copy.copy_from(0, data, 0..size)?;
            *data = Arc::new(copy);
            self.version = new_version();
        }
        Ok(Arc::get_mut(data).expect("memory just copied has one owner"))
    }

    /// Writes positions `positions`, at most `rows` of them, from row `from` of `source` on, once `copies` are made.
    fn write_later<'a>(
        &'a mut self,
        backend: &Backend,
        positions: Range<usize>,
        (source, from): (&'a Buffer<T>, usize),
        copies: &mut Vec<Piece<'a, T>>,
    ) -> Result<()> {
        if positions.is_empty() {
            return Ok(());
        }
        let (rows, row_len) = (self.rows, self.row_len());
        let memory = self.writable(backend)?.tensor_mut([rows * row_len])?;
        let first = ring_row(rows, positions.start);
        // From there to the ring's end, and on from its start.
        let after = positions.len().min(rows - first);
        let (front, back) = memory.split_at(first * row_len)?;
        for (part, run, from) in [(back, after, from), (front, positions.len() - after, from + after)] {
            let (target, _) = part.split_at(run * row_len)?;
            if run > 0 {
                copies.push(Piece { source: source.tensor_at(from * row_len, [run * row_len])?, target });
            }
        }
        Ok(())
    }

    /// Writes positions `positions`, at most `rows` of them, from row `from` of `source` on.
    fn write(&mut self, backend: &Backend, positions: Range<usize>, source: &Buffer<T>, from: usize) -> Result<()> {
        let mut copies = Vec::new();
        self.write_later(backend, positions, (source, from), &mut copies)?;
        Ok(copy::all(backend, copies)?)
    }

    /// Copies positions `positions` to the first rows of `target`, once `copies` are made. Returns the rest of `target`.
    fn read<'a>(
        &'a self,
        positions: Range<usize>,
        mut target: TensorMut<'a, T, 1>,
        copies: &mut Vec<Piece<'a, T>>,
    ) -> Result<TensorMut<'a, T, 1>> {
        let row_len = self.row_len();
        let Some(data) = self.data.as_ref().filter(|_| !positions.is_empty()) else { return Ok(target) };
        for (row, run, _) in runs(self.rows, positions) {
            let (part, rest) = target.split_at(run * row_len)?;
            copies.push(Piece { source: data.tensor_at(row * row_len, [run * row_len])?, target: part });
            target = rest;
        }
        Ok(target)
    }

    fn bytes(&self) -> u64 {
        self.data.as_ref().map_or(0, |data| size_of::<T>() as u64 * data.len() as u64)
    }
}

/// Positions `positions` of a ring of `rows` rows as runs of neighbouring rows: first row, number, positions before it.
fn runs(rows: usize, positions: Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut next = positions.start;
    std::iter::from_fn(move || {
        if next >= positions.end {
            return None;
        }
        let row = ring_row(rows, next);
        let (run, done) = ((rows - row).min(positions.end - next), next - positions.start);
        next += run;
        Some((row, run, done))
    })
}

impl<T: Element> Ring<T> {
    pub(crate) fn new(rows: usize, undo: usize, row_shape: [usize; 2]) -> Self {
        let lane = |rows| Lane { data: None, rows, row_shape, version: 0 };
        Self { live: lane(rows), undo: lane(undo), len: 0, low: 0 }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.live.bytes() + self.undo.bytes()
    }

    /// Equal numbers are equal memory.
    pub(crate) fn version(&self) -> u64 {
        self.live.version
    }

    /// The ring `[rows, G, D]`, as a decoding step takes it. Something must have been pushed.
    pub(crate) fn tensor(&self) -> Result<Tensor<'_, T, 3>> {
        let data = self.live.data.as_ref().expect("a ring that was written to");
        Ok(data.tensor([self.live.rows, self.live.row_shape[0], self.live.row_shape[1]])?)
    }

    /// Copies the rows of positions `positions`, which are in the ring, to the first rows of `target`, once `copies` are made.
    /// Returns the rest of `target`.
    pub(crate) fn read<'a>(
        &'a self,
        positions: Range<usize>,
        target: TensorMut<'a, T, 1>,
        copies: &mut Vec<Piece<'a, T>>,
    ) -> Result<TensorMut<'a, T, 1>> {
        debug_assert!(positions.end <= self.len && positions.start + self.live.rows >= self.len);
        self.live.read(positions, target, copies)
    }

    /// Appends rows `rows` of `source` `[.., G, D]`, once `copies` are made. (What falls out is saved now.)
    pub(crate) fn push<'a>(
        &'a mut self,
        backend: &Backend,
        source: &'a Buffer<T>,
        rows: Range<usize>,
        copies: &mut Vec<Piece<'a, T>>,
    ) -> Result<()> {
        let (old, new) = (self.len, self.len + rows.len());
        self.save(backend, source, &rows)?;
        self.len = new;
        self.low = self.low.max(new.saturating_sub(self.live.rows + self.undo.rows));
        let kept = new.saturating_sub(self.live.rows).max(old);
        self.live.write_later(backend, kept..new, (source, rows.start + (kept - old)), copies)
    }

    /// Saves what falls out when `rows` of `source` come in: rows of the ring, and of `source` itself if it is longer.
    fn save(&mut self, backend: &Backend, source: &Buffer<T>, rows: &Range<usize>) -> Result<()> {
        let (old, new) = (self.len, self.len + rows.len());
        if self.undo.rows == 0 || new <= self.live.rows {
            return Ok(());
        }
        // Positions that the ring holds no longer afterwards, the last `undo` of them.
        let end = new - self.live.rows;
        let start = end.saturating_sub(self.undo.rows).max(old.saturating_sub(self.live.rows));
        let split = old.clamp(start, end);
        if let Some(data) = &self.live.data {
            for (row, run, done) in runs(self.live.rows, start..split) {
                self.undo.write(backend, start + done..start + done + run, data, row)?;
            }
        }
        if split < end {
            self.undo.write(backend, split..end, source, rows.start + (split - old))?;
        }
        Ok(())
    }

    /// Whether [`Ring::rewind`] to `len` is possible.
    pub(crate) fn can_rewind(&self, len: usize) -> bool {
        len <= self.len && len.saturating_sub(self.live.rows) >= self.low
    }

    /// Cuts the stream back to `len` positions; the ring is then as it was when it had so many.
    pub(crate) fn rewind(&mut self, backend: &Backend, len: usize) -> Result<()> {
        debug_assert!(self.can_rewind(len));
        let lost = len.saturating_sub(self.live.rows)..self.len.saturating_sub(self.live.rows).min(len);
        if !lost.is_empty()
            && let Some(data) = &self.undo.data
        {
            for (row, run, done) in runs(self.undo.rows, lost.clone()) {
                self.live.write(backend, lost.start + done..lost.start + done + run, data, row)?;
            }
        }
        self.len = len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend() -> Backend {
        Backend::pick(Some("cpu")).unwrap().0
    }

    fn push(ring: &mut Ring<f32>, source: &Buffer<f32>, rows: Range<usize>) {
        let mut copies = Vec::new();
        ring.push(&backend(), source, rows, &mut copies).unwrap();
        copy::all(&backend(), copies).unwrap();
    }

    /// Rows of positions as the ring gives them back; row s holds s and −s.
    fn read(ring: &Ring<f32>, positions: Range<usize>) -> Vec<f32> {
        let backend = backend();
        let mut target = backend.alloc(2 * positions.len() + 2);
        let (mut copies, len) = (Vec::new(), target.len());
        let (_, rows) = target.tensor_mut([len]).unwrap().split_at(2).unwrap();
        let rest = ring.read(positions.clone(), rows, &mut copies).unwrap();
        assert_eq!(rest.shape(), [0]);
        copy::all(&backend, copies).unwrap();
        let mut host = vec![0.0; target.len()];
        target.read(&mut host).unwrap();
        host[2..].to_vec()
    }

    fn expected(positions: Range<usize>) -> Vec<f32> {
        positions.flat_map(|s| [s as f32, -(s as f32)]).collect()
    }

    /// The ring against a list of all positions, through pushes of every size and rewinds to every length.
    #[test]
    fn a_ring_keeps_the_last_rows_and_can_go_back() {
        let backend = backend();
        let source = backend.upload(&expected(0..64));
        for (rows, undo) in [(1, 0), (1, 3), (4, 0), (4, 1), (4, 6), (5, 40)] {
            for first in [0, 1, 3, 4, 9, 20] {
                for second in [1, 2, 4, 5, 13] {
                    let mut ring = Ring::new(rows, undo, [1, 2]);
                    push(&mut ring, &source, 0..first);
                    push(&mut ring, &source, first..first + second);
                    let len = first + second;
                    let last = |len: usize| len.saturating_sub(rows)..len;
                    assert_eq!(read(&ring, last(len)), expected(last(len)));
                    for to in (0..=len).rev() {
                        let possible = len <= rows || len - to <= undo || to == len || to <= rows && len - rows <= undo;
                        assert_eq!(ring.can_rewind(to), possible, "{rows} {undo} {first} {second} {to}");
                        if possible {
                            // On a fork, which must not disturb the original; then straight on from there.
                            let mut fork = ring.clone();
                            fork.rewind(&backend, to).unwrap();
                            assert_eq!(read(&fork, last(to)), expected(last(to)), "{rows} {undo} {len} {to}");
                            push(&mut fork, &source, to..to + 3);
                            assert_eq!(read(&fork, last(to + 3)), expected(last(to + 3)));
                            assert_eq!(read(&ring, last(len)), expected(last(len)));
                        }
                    }
                    // Step by step back is as good as at once.
                    for to in (0..len).rev() {
                        if !ring.can_rewind(to) {
                            break;
                        }
                        ring.rewind(&backend, to).unwrap();
                        assert_eq!(read(&ring, last(to)), expected(last(to)));
                    }
                }
            }
        }
    }
}
