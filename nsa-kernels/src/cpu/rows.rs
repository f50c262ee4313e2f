//! Keys and values of one sequence in host memory, packed or paged, one face for both.

use crate::cpu::math;
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

/// Rows of one KV head in the type that is computed with: row i starts at `i · stride`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile<'a, A> {
    /// The elements.
    pub(crate) data: &'a [A],
    /// Distance between rows.
    pub(crate) stride: usize,
}

impl<'a, T: Element> SeqRows<'a, T> {
    /// The rows of a page table.
    pub(crate) fn paged(pages: &'a Pages<'a, T>) -> Self {
        Self { source: Source::Paged(pages), len: pages.len }
    }

    /// All rows of a tensor.
    pub(crate) fn whole(view: View<'a, T, 3>) -> Self {
        Self { source: Source::Packed { view, start: 0 }, len: view.shape()[0] }
    }

    /// Number of rows.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Row `r` of KV head `g`: `[D]`.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize, g: usize) -> &'a [T] {
        debug_assert!(r < self.len);
        match self.source {
            Source::Packed { view, start } => view.row(start + r, g),
            Source::Paged(pages) => {
                let [heads, dim] = pages.row_shape;
                let Mem::Host(page) = pages.pages[r / pages.page_rows];
                let at = ((r % pages.page_rows) * heads + g) * dim;
                &page[at..at + dim]
            }
        }
    }

    /// Rows `range` of KV head `g`, widened: where they lie if they need no conversion and are evenly spaced, else in
    /// `buffer`, which holds `range.len() · D` elements.
    #[inline(always)]
    pub(crate) fn tile<'b>(&self, range: Range<usize>, g: usize, buffer: &'b mut [T::Acc]) -> Tile<'b, T::Acc>
    where
        'a: 'b,
    {
        if let Source::Packed { view, start } = self.source
            && let Some(data) = math::as_acc(view.data())
            && !range.is_empty()
        {
            let [stride, head_stride, _] = view.layout().strides();
            let first = (start + range.start) * stride + g * head_stride;
            let len = (range.len() - 1) * stride + view.shape()[2];
            return Tile { data: &data[first..first + len], stride };
        }
        let stride = if range.is_empty() { 0 } else { self.row(range.start, g).len() };
        for (i, r) in range.enumerate() {
            math::widen(self.row(r, g), &mut buffer[i * stride..(i + 1) * stride]);
        }
        Tile { data: buffer, stride }
    }
}

/// One [`SeqRows`] a sequence. The rows have passed `Rows::check`.
pub(crate) fn host_rows<'a, T: Element>(rows: &Rows<'a, T>) -> Result<Vec<SeqRows<'a, T>>> {
    match *rows {
        Rows::Packed { tensor, offsets } => packed_rows(tensor, offsets),
        Rows::Paged(tables) => Ok(tables.iter().map(SeqRows::paged).collect()),
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
    use half::bf16;
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
        let mut buffer = [0.0; 9];
        for g in 0..2 {
            for r in 0..3 {
                assert_eq!(packed[1].row(r, g), paged[0].row(r, g));
            }
            let direct = packed[1].tile(0..3, g, &mut []);
            let copied = paged[0].tile(0..3, g, &mut buffer);
            assert_eq!((direct.stride, copied.stride), (10, 3));
            for r in 0..3 {
                assert_eq!(direct.data[r * 10..r * 10 + 3], copied.data[r * 3..r * 3 + 3]);
            }
        }
    }

    #[test]
    fn tiles_of_halves_are_widened() {
        let data: Vec<bf16> = (0..12).map(|x| bf16::from_f32(x as f32)).collect();
        let offsets = CuSeqlens::single(3).unwrap();
        let rows = packed_rows(Tensor::host(&data, [3, 2, 2]).unwrap(), &offsets).unwrap();
        let mut buffer = [0.0; 4];
        assert_eq!(rows[0].tile(1..3, 1, &mut buffer).data, [6.0, 7.0, 10.0, 11.0]);
        assert!(rows[0].tile(1..1, 1, &mut []).data.is_empty());
    }
}
