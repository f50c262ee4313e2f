//! Rows in pages that forks share.

use super::new_version;
use crate::Result;
use bytemuck::Pod;
use nsa_kernels::layer::copy::Piece;
use nsa_kernels::{Backend, Buffer, Element, Pages};
use std::ops::Range;
use std::sync::Arc;

/// Rows `[len, G, D]` in pages of `page_rows` rows. Clones share pages; a page that is shared is copied before it is
/// written to.
#[derive(Clone, Debug)]
pub(crate) struct Paged<T: Pod> {
    pages: Vec<Arc<Buffer<T>>>,
    page_rows: usize,
    row_shape: [usize; 2],
    len: usize,
    /// Another one whenever there are other pages.
    version: u64,
}

impl<T: Element> Paged<T> {
    pub(crate) fn new(page_rows: usize, row_shape: [usize; 2]) -> Self {
        Self { pages: Vec::new(), page_rows, row_shape, len: 0, version: 0 }
    }

    fn row_len(&self) -> usize {
        self.row_shape[0] * self.row_shape[1]
    }

    /// Equal numbers are equal pages.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Bytes of the pages, those shared with forks included.
    pub(crate) fn bytes(&self) -> u64 {
        self.pages.iter().map(|page| size_of::<T>() as u64 * page.len() as u64).sum()
    }

    /// Appends rows `rows` of `source` `[.., G, D]`, once `copies` are made.
    pub(crate) fn push<'a>(
        &'a mut self,
        backend: &Backend,
        source: &'a Buffer<T>,
        rows: Range<usize>,
        copies: &mut Vec<Piece<'a, T>>,
    ) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let (row_len, page_rows) = (self.row_len(), self.page_rows);
        let (first, used) = (self.len / page_rows, self.len % page_rows);
        self.make_room(backend, rows.len())?;
        self.len += rows.len();
        let (mut next, mut at) = (rows.start, used);
        for page in self.pages[first..].iter_mut() {
            let page = Arc::get_mut(page).expect("`make_room` left it one owner");
            let count = (page_rows - at).min(rows.end - next);
            copies.push(Piece {
                source: source.tensor_at(next * row_len, [count * row_len])?,
                target: page.tensor_mut_at(at * row_len, [count * row_len])?,
            });
            (next, at) = (next + count, 0);
        }
        Ok(())
    }

    /// Forgets the rows from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        debug_assert!(len <= self.len);
        self.len = len;
        let count = len.div_ceil(self.page_rows);
        if count < self.pages.len() {
            self.pages.truncate(count);
            self.version = new_version();
        }
    }

    /// The page table, as operations take it.
    pub(crate) fn table(&self) -> Pages<'_, T> {
        let pages = self.pages.iter().map(|page| page.mem()).collect();
        Pages { pages, page_rows: self.page_rows, len: self.len, row_shape: self.row_shape }
    }

    /// Makes the pages of the next `rows` rows, and the first of them, if it is there already, no longer shared with anyone.
    fn make_room(&mut self, backend: &Backend, rows: usize) -> Result<()> {
        let (size, row_len) = (self.page_rows * self.row_len(), self.row_len());
        let (first, used) = (self.len / self.page_rows, self.len % self.page_rows);
        if let Some(page) = self.pages.get_mut(first)
            && Arc::get_mut(page).is_none()
        {
            let mut copy = backend.alloc(size);
            copy.copy_from(0, page, 0..used * row_len)?;
            *page = Arc::new(copy);
            self.version = new_version();
        }
        let count = (self.len + rows).div_ceil(self.page_rows);
        while self.pages.len() < count {
            self.pages.push(Arc::new(backend.alloc(size)));
            self.version = new_version();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_kernels::layer::copy;

    fn backend() -> Backend {
        Backend::pick(Some("cpu")).unwrap().0
    }

    fn push(paged: &mut Paged<f32>, source: &Buffer<f32>, rows: Range<usize>) {
        let mut copies = Vec::new();
        paged.push(&backend(), source, rows, &mut copies).unwrap();
        copy::all(&backend(), copies).unwrap();
    }

    fn rows(paged: &Paged<f32>) -> Vec<f32> {
        let table = paged.table();
        let mut data = Vec::new();
        for page in &paged.pages {
            let mut host = vec![0.0; page.len()];
            page.read(&mut host).unwrap();
            data.extend(host);
        }
        data.truncate(table.len * paged.row_len());
        data
    }

    #[test]
    fn forks_share_pages_until_they_write() {
        let source = backend().upload(&(0..40).map(|x| x as f32).collect::<Vec<_>>());
        let mut first = Paged::new(3, [2, 1]);
        push(&mut first, &source, 0..7);
        assert_eq!((first.len, first.pages.len(), first.bytes()), (7, 3, 3 * 3 * 2 * 4));
        let mut second = first.clone();
        push(&mut second, &source, 10..12);
        push(&mut first, &source, 7..8);
        assert!(Arc::ptr_eq(&first.pages[0], &second.pages[0]) && Arc::ptr_eq(&first.pages[1], &second.pages[1]));
        assert!(!Arc::ptr_eq(&first.pages[2], &second.pages[2]));
        assert_eq!(rows(&first), (0..16).map(|x| x as f32).collect::<Vec<_>>());
        assert_eq!(rows(&second), (0..14).chain(20..24).map(|x| x as f32).collect::<Vec<_>>());
        // Cut back into a shared page and written on: the other keeps its rows.
        second.truncate(4);
        assert_eq!(second.pages.len(), 2);
        push(&mut second, &source, 19..20);
        assert_eq!(rows(&second), (0..8).chain(38..40).map(|x| x as f32).collect::<Vec<_>>());
        assert_eq!(rows(&first), (0..16).map(|x| x as f32).collect::<Vec<_>>());
    }
}
