//! Keys and values of one sequence in host memory, packed or paged, one face for both.

use crate::mem::{Mem, Pages, Rows};
use crate::{Result, Tensor};
use nsa_core::{CuSeqlens, Element, View};
use std::ops::Range;

/// The rows `[len, G, D]` of one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeqRows<'a, T> {
    source: Source<'a, T>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
enum Source<'a, T> {
    /// The rows from `start` on of a packed tensor.
    Packed { view: View<'a, T, 3>, start: usize },
    /// A page table.
    Paged(&'a Pages<'a, T>),
}

impl<'a, T: Element> SeqRows<'a, T> {
    /// The rows of a page table.
    ///
    /// # Errors
    /// If a page is not in the host's memory.
    pub(crate) fn paged(pages: &'a Pages<'a, T>) -> Result<Self> {
        pages.pages.iter().try_for_each(|page| page.on_host("Pages", "page").map(drop))?;
        Ok(Self { source: Source::Paged(pages), len: pages.len })
    }

    /// All rows of a tensor.
    pub(crate) fn whole(view: View<'a, T, 3>) -> Self {
        Self { source: Source::Packed { view, start: 0 }, len: view.shape()[0] }
    }

    /// Number of rows.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// D.
    pub(crate) fn dim(&self) -> usize {
        match self.source {
            Source::Packed { view, .. } => view.shape()[2],
            Source::Paged(pages) => pages.row_shape[1],
        }
    }

    /// Row `r` of KV head `g`: `[D]`.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize, g: usize) -> &'a [T] {
        debug_assert!(r < self.len);
        match self.source {
            Source::Packed { view, start } => view.row(start + r, g),
            Source::Paged(pages) => {
                let [heads, dim] = pages.row_shape;
                let page = host(pages.pages[r / pages.page_rows]);
                let at = ((r % pages.page_rows) * heads + g) * dim;
                &page[at..at + dim]
            }
        }
    }

    /// Rows `range` of KV head `g` where they lie, if they are evenly spaced: the elements from the first row's to the last
    /// row's, and the distance between rows.
    #[inline(always)]
    pub(crate) fn spaced(&self, range: Range<usize>, g: usize) -> Option<(&'a [T], usize)> {
        debug_assert!(range.end <= self.len);
        if range.is_empty() {
            return None;
        }
        let rows = range.len() - 1;
        match self.source {
            Source::Packed { view, start } => {
                let [stride, head_stride, _] = view.layout().strides();
                let first = (start + range.start) * stride + g * head_stride;
                Some((&view.data()[first..first + rows * stride + view.shape()[2]], stride))
            }
            Source::Paged(pages) => {
                let page = range.start / pages.page_rows;
                let [heads, dim] = pages.row_shape;
                let first = (range.start % pages.page_rows * heads + g) * dim;
                let data = host(pages.pages[page]);
                let stride = heads * dim;
                ((range.end - 1) / pages.page_rows == page).then(|| (&data[first..first + rows * stride + dim], stride))
            }
        }
    }
}

/// The elements of a page.
#[inline(always)]
fn host<T>(page: Mem<'_, T>) -> &[T] {
    match page {
        Mem::Host(data) => data,
        Mem::Device(_) => unreachable!("`SeqRows::paged` takes pages of the host only"),
    }
}

/// One [`SeqRows`] a sequence. The rows have passed `Rows::check`.
pub(crate) fn host_rows<'a, T: Element>(rows: &Rows<'a, T>) -> Result<Vec<SeqRows<'a, T>>> {
    match *rows {
        Rows::Packed { tensor, offsets } => packed_rows(tensor, offsets),
        Rows::Paged(tables) => tables.iter().map(SeqRows::paged).collect(),
    }
}

/// One [`SeqRows`] a sequence of a packed tensor.
pub(crate) fn packed_rows<'a, T: Element>(
    tensor: Tensor<'a, T, 3>,
    offsets: &CuSeqlens,
) -> Result<Vec<SeqRows<'a, T>>> {
    let view = tensor.to_host()?;
    let seq = |s| {
        let range = offsets.range(s);
        SeqRows { source: Source::Packed { view, start: range.start }, len: range.len() }
    };
    Ok((0..offsets.num_seqs()).map(seq).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::view::Strided;

    #[test]
    fn packed_and_paged_rows_are_the_same() {
        // [5, 2, 3] in two sequences of 2 and 3 rows, with gaps between rows and heads.
        let data: Vec<f32> = (0..64).map(|x| x as f32).collect();
        let layout = Strided::new([5, 2, 3], [10, 4, 1]).unwrap();
        let tensor = Tensor::new(Mem::Host(&data), layout).unwrap();
        let offsets = CuSeqlens::from_lengths([2, 3]).unwrap();
        let packed = host_rows(&Rows::packed(tensor, &offsets)).unwrap();
        let dense: Vec<f32> = (2..5)
            .flat_map(|r| (0..2).flat_map(move |g| (0..3).map(move |x| (r, g, x))))
            .map(|(r, g, x)| (r * 10 + g * 4 + x) as f32)
            .chain([f32::NAN; 6])
            .collect();
        let (first, second) = dense.split_at(12);
        let table =
            [Pages { pages: vec![Mem::Host(first), Mem::Host(second)], page_rows: 2, len: 3, row_shape: [2, 3] }];
        let paged = host_rows(&Rows::Paged(&table)).unwrap();
        assert_eq!((packed[0].len(), packed[1].len(), paged[0].len()), (2, 3, 3));
        for g in 0..2 {
            for r in 0..3 {
                assert_eq!(packed[1].row(r, g), paged[0].row(r, g));
            }
            let (data, stride) = packed[1].spaced(0..3, g).unwrap();
            assert_eq!((data.len(), stride), (23, 10));
            (0..3).for_each(|r| assert_eq!(&data[r * stride..][..3], paged[0].row(r, g)));
            // The second row ends a page.
            let (data, stride) = paged[0].spaced(0..2, g).unwrap();
            assert_eq!((data.len(), stride), (9, 6));
            (0..2).for_each(|r| assert_eq!(&data[r * stride..][..3], paged[0].row(r, g)));
            assert!(paged[0].spaced(1..3, g).is_none());
        }
    }
}
