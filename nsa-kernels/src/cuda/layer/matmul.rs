//! Products of matrices of mixed types: operands are brought to one type, results rounded once.

use super::round::convert;
use crate::cuda::ahead::Build;
use crate::cuda::blas::{Factor, Matrix, multiply};
use crate::cuda::geometry::Geometry;
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Params, Stored, Weight, params};
use crate::cuda::program::{Constants, Program};
use crate::cuda::workspace::Scratch;
use crate::{Result, Tensor, TensorMut};
use nsa_core::{DType, Element};
use std::marker::PhantomData;

/// The kernel.
pub(crate) static PROGRAM: Program =
    Program { file: "matmul.cu", text: include_str!("../kernels/matmul.cu"), params: &[Finish::declaration] };

/// Threads of a block.
const THREADS: u32 = 256;

params! {
    /// Arguments of `finish`.
    struct Finish {
        /// `[rows, columns]`.
        sums: In<f32>,
        /// `[columns]`, or none.
        bias: In<Weight>,
        /// `[rows, columns]`.
        y: Out<Stored>,
        /// Rows.
        rows: i64,
        /// Columns.
        columns: i64,
    }
}

/// What products leave to run.
pub(super) fn build(constants: Constants) -> Build {
    Build::new(&PROGRAM, constants.with("ACCUMULATE", 1), &[("finish", THREADS)])
}

/// A bias of the columns of a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bias {
    pub(super) address: u64,
    pub(super) dtype: DType,
}

/// A matrix in memory of the call, or a converted copy of it.
pub(crate) enum Operand {
    There(Matrix),
    Copy(Matrix, #[expect(dead_code, reason = "holds the memory")] Scratch<u16>),
}

impl Operand {
    /// Where it is.
    pub(crate) fn matrix(&self) -> Matrix {
        let (Self::There(matrix) | Self::Copy(matrix, _)) = self;
        *matrix
    }

    fn factor(&self, transposed: bool) -> Factor {
        Factor { matrix: self.matrix(), transposed }
    }

    /// The matrix, whose rows have no gaps, with elements of type `to`.
    pub(crate) fn of_type(call: &Call<'_>, matrix: Matrix, to: DType) -> Result<Self> {
        if matrix.dtype == to {
            return Ok(Self::There(matrix));
        }
        let count = matrix.shape.iter().product::<usize>();
        let mut copy = call.workspace::<u16>(count * to.size_bytes() / 2)?;
        let y: Out<Stored> = copy.written_by();
        let types = call.of_type(to).constants(|constants| constants.with_type("Weight", matrix.dtype));
        convert(types, [matrix.dtype, to], In(matrix.address, PhantomData), y, count)?;
        Ok(Self::Copy(Matrix { address: y.0, dtype: to, ..matrix }, copy))
    }
}

/// A tensor as a matrix.
pub(super) fn matrix<T: Element>(call: &Call<'_>, arg: &str, tensor: &Tensor<'_, T, 2>) -> Result<Matrix> {
    Ok(Matrix::packed(call.address(arg, tensor)?, T::DTYPE, tensor.shape()))
}

/// A tensor that is written, as a matrix.
pub(super) fn matrix_mut<T: Element>(call: &Call<'_>, arg: &str, tensor: &mut TensorMut<'_, T, 2>) -> Result<Matrix> {
    Ok(Matrix::packed(call.address_mut(arg, tensor)?, T::DTYPE, tensor.shape()))
}

/// y = \[y +\] x·wᵀ + bias: factors of two types are widened to f32.
pub(super) fn times_transposed(
    call: &Call<'_>,
    [x, w, y]: [Matrix; 3],
    bias: Option<Bias>,
    accumulate: bool,
) -> Result<()> {
    let common = common([x.dtype, w.dtype]);
    let (x, w) = (Operand::of_type(call, x, common)?, Operand::of_type(call, w, common)?);
    product(call, x.factor(false), w.factor(true), y, (bias, accumulate))
}

/// dx = \[dx +\] dy·w: dy is rounded to the type of w.
pub(super) fn times(call: &Call<'_>, [dy, w, dx]: [Matrix; 3], accumulate: bool) -> Result<()> {
    let dy = Operand::of_type(call, dy, w.dtype)?;
    let w = Factor { matrix: w, transposed: false };
    product(call, dy.factor(false), w, dx, (None, accumulate))
}

/// dw += dyᵀ·x in f32: dy is rounded to the type of x.
pub(super) fn add_outer(call: &Call<'_>, [dy, x, dw]: [Matrix; 3]) -> Result<()> {
    let dy = Operand::of_type(call, dy, x.dtype)?;
    product(call, dy.factor(true), Factor { matrix: x, transposed: false }, dw, (None, true))
}

/// The type that factors of these types are multiplied in.
pub(in crate::cuda) fn common([x, w]: [DType; 2]) -> DType {
    if x == w { x } else { DType::F32 }
}

/// Whether a product of factors `a` to `y` is summed in f32 before it is rounded.
pub(in crate::cuda) fn is_summed_first([a, y]: [DType; 2], bias: bool, accumulate: bool) -> bool {
    bias || (y != DType::F32 && (y != a || accumulate))
}

/// y = \[y +\] a·b + bias. Where the library does not round as asked, it writes sums, which are rounded then: of bf16 and f16 it
/// rounds a product before it adds it (seen on an H100).
fn product(call: &Call<'_>, a: Factor, b: Factor, y: Matrix, (bias, accumulate): (Option<Bias>, bool)) -> Result<()> {
    if !is_summed_first([a.matrix.dtype, y.dtype], bias.is_some(), accumulate) {
        return multiply(call, a, b, y, accumulate);
    }
    let [rows, columns] = y.shape;
    let mut sums = call.workspace::<f32>(rows * columns)?;
    let address: Out<f32> = sums.written_by();
    multiply(call, a, b, Matrix::packed(address.0, DType::F32, y.shape), false)?;
    let params = Finish {
        sums: sums.read_by(),
        bias: In(bias.map_or(0, |bias| bias.address), PhantomData),
        y: Out(y.address, PhantomData),
        rows: rows as i64,
        columns: columns as i64,
    };
    let of_bias = bias.map_or(DType::F32, |bias| bias.dtype);
    let call = call
        .of_type(y.dtype)
        .constants(|constants| constants.with_type("Weight", of_bias).with("ACCUMULATE", usize::from(accumulate)));
    call.launch(&PROGRAM, "finish", Geometry::linear((rows * columns) as u64, THREADS), params)
}
