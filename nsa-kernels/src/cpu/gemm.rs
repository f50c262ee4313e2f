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

    /// The same matrix with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
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

impl From<Store> for super::product::Store {
    fn from(store: Store) -> Self {
        match store {
            Store::Write => Self::Write,
            Store::Add => Self::Add,
        }
    }
}

/// One more than the offset of a matrix' last element; 0 if it has none.
fn reach(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Option<usize> {
    if rows == 0 || cols == 0 {
        return Some(0);
    }
    let last = (rows - 1).checked_mul(row_stride)?.checked_add((cols - 1).checked_mul(col_stride)?)?;
    last.checked_add(1).filter(|&reach| isize::try_from(reach).is_ok())
}

/// Whether elements of a matrix that has some may share memory.
fn overlaps(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> bool {
    let (row, col) = ((row_stride, rows), (col_stride, cols));
    let ((short, inner), (long, outer)) = if row_stride < col_stride { (row, col) } else { (col, row) };
    (inner > 1 && short == 0) || (outer > 1 && long <= (inner - 1).saturating_mul(short))
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
    if m == 0 || n == 0 {
        return;
    }
    assert!(!overlaps(m, n, dst.row_stride, dst.col_stride), "gemm: elements of dst share memory");
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that differ, small enough for exact sums.
    fn numbers(len: usize, step: usize) -> Vec<f64> {
        (0..len).map(|x| ((x * step) % 17) as f64 - 8.0).collect()
    }

    #[test]
    fn products_of_all_layouts_are_plain_loops() {
        for [m, n, k] in
            [[0, 3, 2], [3, 0, 2], [1, 1, 0], [2, 3, 0], [1, 1, 1], [1, 9, 5], [9, 1, 5], [7, 6, 5], [70, 35, 300]]
        {
            let (lhs, rhs, old) = (numbers(m * k, 5), numbers(k * n, 7), numbers(m * n, 3));
            // Row-major and column-major of each.
            for layout in 0..8 {
                let strides =
                    |bit: usize, rows: usize, cols: usize| if layout & bit == 0 { (cols, 1) } else { (1, rows) };
                let ((ds, dc), (ls, lc), (rs, rc)) = (strides(1, m, n), strides(2, m, k), strides(4, k, n));
                for (store, threads) in [(Store::Write, Threads::One), (Store::Add, Threads::Pool)] {
                    let mut dst = if store == Store::Add { old.clone() } else { vec![f64::NAN; m * n] };
                    let left = Mat { data: &lhs, row_stride: ls, col_stride: lc };
                    let right = Mat { data: &rhs, row_stride: rs, col_stride: rc };
                    let target = MatMut { data: &mut dst, row_stride: ds, col_stride: dc };
                    gemm([m, n, k], target, store, 2.0, left, right, threads);
                    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                        let sum: f64 = (0..k).map(|x| lhs[i * ls + x * lc] * rhs[x * rs + j * rc]).sum();
                        let start = if store == Store::Add { old[i * ds + j * dc] } else { 0.0 };
                        assert_eq!(dst[i * ds + j * dc], start + 2.0 * sum, "{m}x{n}x{k} {layout} {store:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn gaps_are_neither_read_nor_written() {
        let (mut lhs, mut rhs, mut dst) = (vec![f32::NAN; 30], vec![f32::NAN; 30], vec![7.0f32; 30]);
        (0..3).for_each(|i| lhs[i * 10..i * 10 + 3].fill(1.0));
        (0..3).for_each(|i| rhs[i * 10..i * 10 + 4].fill(2.0));
        gemm(
            [3, 4, 3],
            MatMut::rows(&mut dst, 10),
            Store::Write,
            1.0,
            Mat::rows(&lhs, 10),
            Mat::rows(&rhs, 10),
            Threads::One,
        );
        for (at, &x) in dst.iter().enumerate() {
            assert_eq!(x, if at % 10 < 4 { 6.0 } else { 7.0 });
        }
    }

    fn run(dst: (usize, usize, usize), lhs: usize, rhs: usize) {
        let (len, row_stride, col_stride) = dst;
        let (mut dst, lhs, rhs) = (vec![0f32; len], vec![0f32; lhs], vec![0f32; rhs]);
        let dst = MatMut { data: &mut dst, row_stride, col_stride };
        gemm([2, 3, 4], dst, Store::Write, 1.0, Mat::rows(&lhs, 4), Mat::rows(&rhs, 3), Threads::One);
    }

    #[test]
    fn exact_lengths_pass() {
        run((6, 3, 1), 8, 12);
        run((6, 1, 2), 8, 12);
    }

    #[test]
    #[should_panic(expected = "dst reaches beyond")]
    fn a_short_dst_is_refused() {
        run((5, 3, 1), 8, 12);
    }

    #[test]
    #[should_panic(expected = "lhs reaches beyond")]
    fn a_short_lhs_is_refused() {
        run((6, 3, 1), 7, 12);
    }

    #[test]
    #[should_panic(expected = "rhs reaches beyond")]
    fn a_short_rhs_is_refused() {
        run((6, 3, 1), 8, 11);
    }

    #[test]
    #[should_panic(expected = "share memory")]
    fn a_dst_over_itself_is_refused() {
        run((6, 2, 1), 8, 12);
    }

    #[test]
    #[should_panic(expected = "dst reaches beyond")]
    fn strides_that_overflow_are_refused() {
        run((6, usize::MAX, 1), 8, 12);
    }
}
