//! Views over host memory: a shape, 64-bit strides in elements, innermost dimension contiguous.
//!
//! ```
//! use nsa_core::view::{Strided, View};
//! // Keys and values interleaved in one buffer of 2 tokens: each token has 3 numbers of K, then 2 of V.
//! let buffer = [1, 2, 3, 10, 20, 4, 5, 6, 30, 40];
//! let k = View::with_layout(&buffer, Strided::new([2, 3], [5, 1])?)?;
//! let v = View::with_layout(&buffer[3..], Strided::new([2, 2], [5, 1])?)?;
//! assert_eq!((k.row(1), v.row(1)), (&[4, 5, 6][..], &[30, 40][..]));
//! assert!(View::new(&buffer, [3, 4]).is_err());
//! # Ok::<(), nsa_core::ShapeError>(())
//! ```

use crate::ShapeError;

/// A shape with strides, in elements; the last stride is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strided<const N: usize> {
    shape: [usize; N],
    strides: [usize; N],
}

impl<const N: usize> Strided<N> {
    /// Row-major, without gaps.
    ///
    /// # Errors
    /// If the number of elements overflows.
    pub fn contiguous(shape: [usize; N]) -> Result<Self, ShapeError> {
        let mut strides = [1; N];
        let mut size = 1usize;
        for axis in (0..N).rev() {
            strides[axis] = size;
            let dim = shape[axis];
            size = size.checked_mul(dim).ok_or_else(|| error(shape, strides, 0, "the number of elements overflows"))?;
        }
        Ok(Self { shape, strides })
    }

    /// Any strides whose innermost is 1.
    ///
    /// # Errors
    /// If the innermost stride is not 1, or the number of elements or the reach overflows.
    pub fn new(shape: [usize; N], strides: [usize; N]) -> Result<Self, ShapeError> {
        if N > 0 && strides[N - 1] != 1 && shape[N - 1] > 1 {
            return Err(error(shape, strides, 0, "the innermost dimension must be contiguous"));
        }
        // Strides of 0 repeat elements, so that the reach does not bound their number.
        if !shape.contains(&0) && shape.iter().try_fold(1usize, |size, &dim| size.checked_mul(dim)).is_none() {
            return Err(error(shape, strides, 0, "the number of elements overflows"));
        }
        let layout = Self { shape, strides };
        layout.reach_checked().ok_or_else(|| error(shape, strides, 0, "the reach overflows"))?;
        Ok(layout)
    }

    /// Sizes, outermost first.
    pub const fn shape(&self) -> [usize; N] {
        self.shape
    }

    /// Distances between neighbours, in elements.
    pub const fn strides(&self) -> [usize; N] {
        self.strides
    }

    /// Number of elements.
    pub fn size(&self) -> usize {
        if self.shape.contains(&0) { 0 } else { self.shape.iter().product() }
    }

    /// Whether the elements lie behind one another without gaps, in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.contains(&0)
            || (0..N).rev().all(|axis| {
                let ok = self.shape[axis] == 1 || self.strides[axis] == expected;
                expected *= self.shape[axis];
                ok
            })
    }

    fn reach_checked(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let mut last = 0usize;
        for axis in 0..N {
            last = last.checked_add((self.shape[axis] - 1).checked_mul(self.strides[axis])?)?;
        }
        last.checked_add(1)
    }

    /// One more than the offset of the last element; 0 if there is none.
    pub fn reach(&self) -> usize {
        self.reach_checked().expect("checked when made")
    }

    /// Checks that memory of `len` elements holds every element.
    ///
    /// # Errors
    /// If it does not.
    pub fn check_len(&self, len: usize) -> Result<(), ShapeError> {
        if self.reach() <= len {
            return Ok(());
        }
        Err(error(self.shape, self.strides, len, "it reaches beyond the memory"))
    }
}

fn error<const N: usize>(shape: [usize; N], strides: [usize; N], len: usize, rule: &'static str) -> ShapeError {
    ShapeError::View { shape: shape.to_vec(), strides: strides.to_vec(), len, rule }
}

/// A read-only strided view.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T, const N: usize> {
    data: &'a [T],
    layout: Strided<N>,
}

impl<'a, T, const N: usize> View<'a, T, N> {
    /// All of `data` as a row-major tensor.
    ///
    /// # Errors
    /// If `data` is shorter than the shape asks for.
    pub fn new(data: &'a [T], shape: [usize; N]) -> Result<Self, ShapeError> {
        Self::with_layout(data, Strided::contiguous(shape)?)
    }

    /// `data` through any legal layout.
    ///
    /// # Errors
    /// If the layout reaches beyond `data`.
    pub fn with_layout(data: &'a [T], layout: Strided<N>) -> Result<Self, ShapeError> {
        layout.check_len(data.len())?;
        Ok(Self { data, layout })
    }

    /// Sizes, outermost first.
    pub const fn shape(&self) -> [usize; N] {
        self.layout.shape
    }

    /// Shape and strides.
    pub const fn layout(&self) -> Strided<N> {
        self.layout
    }

    /// The memory behind the view.
    pub const fn data(&self) -> &'a [T] {
        self.data
    }

    /// Whether there are no gaps.
    pub fn is_contiguous(&self) -> bool {
        self.layout.is_contiguous()
    }
}

impl<'a, T> View<'a, T, 2> {
    /// Row `i`: `[shape[1]]`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [T] {
        debug_assert!(i < self.layout.shape[0]);
        let start = i * self.layout.strides[0];
        &self.data[start..start + self.layout.shape[1]]
    }
}

impl<'a, T> View<'a, T, 3> {
    /// Row `(i, j)`: `[shape[2]]`.
    #[inline(always)]
    pub fn row(&self, i: usize, j: usize) -> &'a [T] {
        debug_assert!(i < self.layout.shape[0] && j < self.layout.shape[1]);
        let start = i * self.layout.strides[0] + j * self.layout.strides[1];
        &self.data[start..start + self.layout.shape[2]]
    }
}

/// A writable view, row-major without gaps: kernels write outputs that own their memory.
#[derive(Debug)]
pub struct ViewMut<'a, T, const N: usize> {
    data: &'a mut [T],
    shape: [usize; N],
}

impl<'a, T, const N: usize> ViewMut<'a, T, N> {
    /// The first elements of `data` as a row-major tensor.
    ///
    /// # Errors
    /// If `data` is shorter than the shape asks for.
    pub fn new(data: &'a mut [T], shape: [usize; N]) -> Result<Self, ShapeError> {
        let layout = Strided::contiguous(shape)?;
        layout.check_len(data.len())?;
        let size = layout.size();
        Ok(Self { data: &mut data[..size], shape })
    }

    /// Sizes, outermost first.
    pub const fn shape(&self) -> [usize; N] {
        self.shape
    }

    /// The elements.
    pub fn data(&mut self) -> &mut [T] {
        self.data
    }

    /// The elements, for as long as the memory is borrowed.
    pub fn into_data(self) -> &'a mut [T] {
        self.data
    }

    /// A shorter borrow of the same view.
    pub fn reborrow(&mut self) -> ViewMut<'_, T, N> {
        ViewMut { data: self.data, shape: self.shape }
    }
}
