//! Units: what the operands of products are made of, in memory. One element of the accumulator's type, or a pair of bf16.

use super::ahead::Ahead;
use super::isa::Isa;
use super::math;
use super::product::{Left, Product, Right, Target, Task};
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx512Bf16, ComputePairs};
use super::simd::{PAD, vectorize};
use half::bf16;
use nsa_core::{DType, Element, Real};
use std::marker::PhantomData;

/// A unit of a product's operands.
pub(crate) trait Unit: bytemuck::Pod + Send + Sync {
    /// The type of sums.
    type Acc: Real;
    /// Elements of a unit, neighbours along the sum.
    const STEP: usize;

    /// Computes a product.
    fn product<L: Ahead>(isa: Isa, task: Task<'_, Self, L>);

    /// Writes a row of elements as units, a last one that is not whole filled up with zeros.
    fn put_row<T: Element<Acc = Self::Acc>>(row: &[T], units: &mut [Self]);

    /// Writes STEP rows as one row of units.
    fn put_rows<T: Element<Acc = Self::Acc>>(rows: &[&[T]], units: &mut [Self]);

    /// Writes `count` rows as the right operand of a sum over the rows: `[⌈count / STEP⌉, stride]`. Rows behind the last,
    /// up to a whole unit, are asked for too.
    fn put_tile<'r, T: Element<Acc = Self::Acc>>(
        isa: Isa,
        count: usize,
        row: impl Fn(usize) -> &'r [T],
        stride: usize,
        units: &mut [Self],
    );

    /// The units that elements in memory are already, if they are.
    fn borrow<T: Element<Acc = Self::Acc>>(elements: &[T]) -> Option<&[Self]>;

    /// Rounds `[rows, stride]` results into units along the rows: `[rows, stride / STEP]`. The stride is that of whole
    /// vectors. What is there already in this form is not copied to `buffer`.
    fn along_rows<'a>(isa: Isa, source: &'a [Self::Acc], buffer: &'a mut [Self]) -> &'a [Self];

    /// Rounds `[rows, stride]` results into units along the columns: `[⌈rows / STEP⌉, stride]`.
    fn along_columns<'a>(isa: Isa, source: &'a [Self::Acc], stride: usize, buffer: &'a mut [Self]) -> &'a [Self];
}

/// Results of one product that are an operand of another: `[rows, columns]`, rows `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Results<'a, A> {
    /// The elements.
    pub(crate) data: &'a [A],
    /// Distance between rows.
    pub(crate) stride: usize,
    /// Rows and columns.
    pub(crate) shape: [usize; 2],
}

#[cfg(target_arch = "x86_64")]
impl<'a, A> Results<'a, A> {
    /// Row i.
    #[inline(always)]
    fn row(&self, i: usize) -> &'a [A] {
        &self.data[i * self.stride..][..self.shape[1]]
    }
}

impl<A: Real> Unit for A {
    type Acc = A;
    const STEP: usize = 1;

    fn product<L: Ahead>(isa: Isa, task: Task<'_, A, L>) {
        vectorize(isa, task);
    }
    #[inline(always)]
    fn put_row<T: Element<Acc = A>>(row: &[T], units: &mut [A]) {
        math::widen(row, &mut units[..row.len()]);
    }
    #[inline(always)]
    fn put_rows<T: Element<Acc = A>>(rows: &[&[T]], units: &mut [A]) {
        math::widen(rows[0], &mut units[..rows[0].len()]);
    }
    fn put_tile<'r, T: Element<Acc = A>>(
        _: Isa,
        count: usize,
        row: impl Fn(usize) -> &'r [T],
        stride: usize,
        units: &mut [A],
    ) {
        for (i, units) in units.chunks_exact_mut(stride).enumerate().take(count) {
            Self::put_row(row(i), units);
        }
    }
    #[inline(always)]
    fn borrow<T: Element<Acc = A>>(elements: &[T]) -> Option<&[A]> {
        math::as_acc(elements)
    }
    #[inline(always)]
    fn along_rows<'a>(_: Isa, source: &'a [A], _: &'a mut [A]) -> &'a [A] {
        source
    }
    #[inline(always)]
    fn along_columns<'a>(_: Isa, source: &'a [A], _: usize, _: &'a mut [A]) -> &'a [A] {
        source
    }
}

/// Two neighbours along the sum of a product, in bf16: the first in the lower half. A is f32, the type of the sums; a
/// parameter, so that generic callers can name their own.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub(crate) struct Pair<A>([u16; 2], PhantomData<A>)
where
    A: Real;

impl<A: Real> Pair<A> {
    #[inline(always)]
    fn new(low: u16, high: u16) -> Self {
        Self([low, high], PhantomData)
    }

    /// Rounds rows of results into rows of pairs, a last one that is not whole filled up with a zero:
    /// `[rows, ⌈columns / 2⌉]`.
    pub(crate) fn round_rows(source: Results<'_, A>, units: &mut [Self]) {
        with_pairs(RoundRows { source: singles(source), units: bytemuck::cast_slice_mut(units) });
    }

    /// Rounds columns of results into panels of [`PAD`] columns, pairs along the columns: `[panels, depth, PAD]`, of
    /// which ⌈rows / 2⌉ of each panel's depth are written. What stands for columns behind the last is unspecified.
    pub(crate) fn round_panels(source: Results<'_, A>, depth: usize, units: &mut [Self]) {
        Self::round_columns(source, [depth * PAD, PAD], units);
    }

    /// Rounds columns of results into pairs along them, [`PAD`] columns after another `steps[0]` units apart, and the pairs
    /// of a column `steps[1]`.
    fn round_columns(source: Results<'_, A>, steps: [usize; 2], units: &mut [Self]) {
        with_pairs(RoundColumns { source: singles(source), steps, units: bytemuck::cast_slice_mut(units) });
    }
}

/// The bits of a row of bf16; pairs are made of no other type.
#[inline(always)]
fn bits<T: Element>(row: &[T]) -> &[u16] {
    assert_eq!(T::DTYPE, DType::Bf16, "pairs hold bf16");
    bytemuck::cast_slice(row)
}

impl<A: Real> Unit for Pair<A> {
    type Acc = A;
    const STEP: usize = 2;

    fn product<L: Ahead>(isa: Isa, task: Task<'_, Self, L>) {
        assert_eq!(isa, Isa::Avx512Bf16, "pairs are multiplied by AVX-512 BF16");
        let Product { left, right, target, columns, steps } = task.product;
        let product = Product::<Pair<f32>> {
            left: Left { data: bytemuck::cast_slice(left.data), rows: left.rows, step: left.step },
            right: Right { data: bytemuck::cast_slice(right.data), stride: right.stride },
            target: Target { data: bytemuck::cast_slice_mut(target.data), rows: target.rows, store: target.store },
            columns,
            steps,
        };
        with_pairs(Task { product, ahead: task.ahead });
    }

    #[inline(always)]
    fn put_row<T: Element<Acc = A>>(row: &[T], units: &mut [Self]) {
        let (pairs, rest) = bits(row).as_chunks::<2>();
        for (unit, &pair) in units.iter_mut().zip(pairs) {
            *unit = Self::new(pair[0], pair[1]);
        }
        if let [last] = rest {
            units[pairs.len()] = Self::new(*last, bf16::ZERO.to_bits());
        }
    }

    #[inline(always)]
    fn put_rows<T: Element<Acc = A>>(rows: &[&[T]], units: &mut [Self]) {
        for ((unit, &low), &high) in units.iter_mut().zip(bits(rows[0])).zip(bits(rows[1])) {
            *unit = Self::new(low, high);
        }
    }

    fn put_tile<'r, T: Element<Acc = A>>(
        _: Isa,
        count: usize,
        row: impl Fn(usize) -> &'r [T],
        stride: usize,
        units: &mut [Self],
    ) {
        let units = bytemuck::cast_slice_mut(&mut units[..count.div_ceil(2) * stride]);
        with_pairs(Interleave { row: |i| bits(row(i)), stride, units });
    }

    #[inline(always)]
    fn borrow<T: Element<Acc = A>>(elements: &[T]) -> Option<&[Self]> {
        elements.len().is_multiple_of(2).then(|| bytemuck::cast_slice(bits(elements)))
    }

    fn along_rows<'a>(_: Isa, source: &'a [A], buffer: &'a mut [Self]) -> &'a [Self] {
        let units = &mut buffer[..source.len() / 2];
        // Whole vectors follow one another: as one row.
        Self::round_rows(Results { data: source, stride: source.len(), shape: [1, source.len()] }, units);
        units
    }

    fn along_columns<'a>(_: Isa, source: &'a [A], stride: usize, buffer: &'a mut [Self]) -> &'a [Self] {
        let rows = source.len() / stride;
        let units = &mut buffer[..rows.div_ceil(2) * stride];
        Self::round_columns(Results { data: source, stride, shape: [rows, stride] }, [PAD, stride], units);
        units
    }
}

/// Runs a kernel with AVX-512 BF16.
#[cfg(target_arch = "x86_64")]
fn with_pairs(kernel: impl ComputePairs) {
    Avx512Bf16::run(kernel);
}

/// Never called: no backend of another architecture multiplies pairs.
#[cfg(not(target_arch = "x86_64"))]
fn with_pairs<K>(_: K) {
    unreachable!("pairs are multiplied by AVX-512 BF16");
}

/// Results under the name of their type.
fn singles<A: Real>(source: Results<'_, A>) -> Results<'_, f32> {
    Results { data: bytemuck::cast_slice(source.data), stride: source.stride, shape: source.shape }
}

#[cfg(target_arch = "x86_64")]
impl<L: Ahead> ComputePairs for Task<'_, Pair<f32>, L> {
    #[inline(always)]
    fn run(self, bf16: Avx512Bf16) {
        self.product.blocks::<Avx512Bf16, 6, 4, 16>(bf16, self.ahead);
    }
}

#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "read by AVX-512 BF16 alone"))]
struct Interleave<'a, F> {
    row: F,
    stride: usize,
    units: &'a mut [Pair<f32>],
}

#[cfg(target_arch = "x86_64")]
impl<'r, F: Fn(usize) -> &'r [u16]> ComputePairs for Interleave<'_, F> {
    #[inline(always)]
    fn run(self, bf16: Avx512Bf16) {
        for (i, units) in self.units.chunks_exact_mut(self.stride).enumerate() {
            let rows = [(self.row)(2 * i), (self.row)(2 * i + 1)];
            let [(low, low_rest), (high, high_rest)] = rows.map(<[u16]>::as_chunks::<32>);
            let (whole, rest) = units.split_at_mut(low.len() * 32);
            for ((low, high), units) in low.iter().zip(high).zip(whole.chunks_exact_mut(32)) {
                bf16.interleave(low, high, units);
            }
            for ((unit, &low), &high) in rest.iter_mut().zip(low_rest).zip(high_rest) {
                *unit = Pair::new(low, high);
            }
        }
    }
}

#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "read by AVX-512 BF16 alone"))]
struct RoundRows<'a> {
    source: Results<'a, f32>,
    units: &'a mut [Pair<f32>],
}

#[cfg(target_arch = "x86_64")]
impl ComputePairs for RoundRows<'_> {
    #[inline(always)]
    fn run(self, bf16: Avx512Bf16) {
        let [rows, columns] = self.source.shape;
        let width = columns.div_ceil(2);
        for i in 0..rows {
            let (whole, rest) = self.source.row(i).as_chunks::<32>();
            let units = &mut self.units[i * width..][..width];
            for (source, units) in whole.iter().zip(units.chunks_exact_mut(16)) {
                bf16.pairs_of_neighbours(source, units);
            }
            if !rest.is_empty() {
                let (mut source, mut pairs) = ([0.0; 32], [bytemuck::Zeroable::zeroed(); 16]);
                source[..rest.len()].copy_from_slice(rest);
                bf16.pairs_of_neighbours(&source, &mut pairs);
                let units = &mut units[16 * whole.len()..];
                units.copy_from_slice(&pairs[..units.len()]);
            }
        }
    }
}

#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "read by AVX-512 BF16 alone"))]
struct RoundColumns<'a> {
    source: Results<'a, f32>,
    steps: [usize; 2],
    units: &'a mut [Pair<f32>],
}

#[cfg(target_arch = "x86_64")]
impl ComputePairs for RoundColumns<'_> {
    #[inline(always)]
    fn run(self, bf16: Avx512Bf16) {
        let [rows, columns] = self.source.shape;
        let zeros = [0.0; PAD];
        for (unit, i) in (0..rows).step_by(2).enumerate() {
            let (low, high) = (self.source.row(i), (i + 1 < rows).then(|| self.source.row(i + 1)));
            for (panel, at) in (0..columns).step_by(PAD).enumerate() {
                let units = &mut self.units[panel * self.steps[0] + unit * self.steps[1]..];
                if at + PAD <= columns {
                    bf16.pairs_of_rows([&low[at..], high.map_or(&zeros[..], |high| &high[at..])], units);
                } else {
                    let mut parts = [zeros; 2];
                    for (part, row) in parts.iter_mut().zip([Some(low), high]) {
                        row.iter().for_each(|row| part[..columns - at].copy_from_slice(&row[at..]));
                    }
                    bf16.pairs_of_rows([&parts[0], &parts[1]], units);
                }
            }
        }
    }
}
