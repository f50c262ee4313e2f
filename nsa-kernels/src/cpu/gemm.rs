//! Matrix products over slices: the one door to the library's GEMM, and the only place here that hands it pointers.

use nsa_core::Real;

/// A read-only matrix in a slice: element (i, j) lies at i·`row_stride` + j·`col_stride`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat<'a, R> {
    pub data: &'a [R],
    pub row_stride: usize,
    pub col_stride: usize,
}

/// A writable matrix in a slice, addressed like [`Mat`].
#[derive(Debug)]
pub(crate) struct MatMut<'a, R> {
    pub data: &'a mut [R],
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a, R> Mat<'a, R> {
    /// Rows of `row_stride` elements each, columns next to each other.
    pub fn rows(data: &'a [R], row_stride: usize) -> Self {
        Self { data, row_stride, col_stride: 1 }
    }

    /// The columns from `start` on.
    pub fn columns_from(self, start: usize) -> Self {
        Self { data: &self.data[(start * self.col_stride).min(self.data.len())..], ..self }
    }

    /// The same matrix with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }
}

impl<'a, R> MatMut<'a, R> {
    /// Rows of `row_stride` elements each, columns next to each other.
    pub fn rows(data: &'a mut [R], row_stride: usize) -> Self {
        Self { data, row_stride, col_stride: 1 }
    }

    /// The columns from `start` on.
    pub fn columns_from(self, start: usize) -> Self {
        let start = (start * self.col_stride).min(self.data.len());
        Self { data: &mut self.data[start..], ..self }
    }
}

/// Who computes a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread alone; for products inside a parallel loop.
    One,
    /// The threads of the current rayon pool, if the product is large enough to be worth it.
    Pool,
}

/// What happens to the old content of the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
    /// It is not read.
    Write,
    /// The product is added to it.
    Add,
}

/// One more than the offset of a matrix' last element; 0 if it has none.
fn reach(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Option<usize> {
    if rows == 0 || cols == 0 {
        return Some(0);
    }
    let last = (rows - 1).checked_mul(row_stride)?.checked_add((cols - 1).checked_mul(col_stride)?)?;
    last.checked_add(1).filter(|&reach| isize::try_from(reach).is_ok())
}

/// Whether a matrix' elements may share memory.
fn overlaps(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> bool {
    let (short, count, long) =
        if row_stride < col_stride { (row_stride, rows, col_stride) } else { (col_stride, cols, row_stride) };
    let outer = if row_stride < col_stride { cols } else { rows };
    (count > 1 && short == 0) || (outer > 1 && long <= count.saturating_sub(1).saturating_mul(short))
}

fn stride(stride: usize, count: usize) -> isize {
    // The stride of a single row or column is never used, and need not fit.
    if count <= 1 { 0 } else { stride as isize }
}

/// dst ← \[dst +\] `scale`·lhs·rhs, with dst `[m, n]`, lhs `[m, k]` and rhs `[k, n]`.
///
/// The sum over k of an element runs in the same order whatever the number of threads.
///
/// # Panics
/// If a matrix reaches beyond its slice, if elements of `dst` share memory, or if `R` is neither f32 nor f64: mistakes
/// of the calling kernel, whose arguments were checked before.
pub(crate) fn gemm<R: Real>(
    [m, n, k]: [usize; 3],
    dst: MatMut<'_, R>,
    store: Store,
    scale: R,
    lhs: Mat<'_, R>,
    rhs: Mat<'_, R>,
    threads: Threads,
) {
    let inside = |len, rows, cols, row_stride, col_stride| {
        reach(rows, cols, row_stride, col_stride).is_some_and(|reach| reach <= len)
    };
    assert!(inside(dst.data.len(), m, n, dst.row_stride, dst.col_stride), "gemm: dst reaches beyond its slice");
    assert!(inside(lhs.data.len(), m, k, lhs.row_stride, lhs.col_stride), "gemm: lhs reaches beyond its slice");
    assert!(inside(rhs.data.len(), k, n, rhs.row_stride, rhs.col_stride), "gemm: rhs reaches beyond its slice");
    assert!(!overlaps(m, n, dst.row_stride, dst.col_stride), "gemm: elements of dst share memory");
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::Pool => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: every element (i, j) that the library touches in dst, lhs and rhs lies inside its slice, because the
    // last one does (asserted above) and strides are not negative. dst is borrowed exclusively, so it overlaps neither
    // lhs nor rhs, and no two of its elements coincide (asserted above), so threads never write to the same place.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.data.as_mut_ptr(),
            stride(dst.col_stride, n),
            stride(dst.row_stride, m),
            store == Store::Add,
            lhs.data.as_ptr(),
            stride(lhs.col_stride, k),
            stride(lhs.row_stride, m),
            rhs.data.as_ptr(),
            stride(rhs.col_stride, n),
            stride(rhs.row_stride, k),
            R::one(),
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
