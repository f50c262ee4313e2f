//! Products of matrices by cuBLAS, which is loaded when the first one is asked for.

use super::launch::Call;
use super::library;
use crate::{Error, Result};
use cudarc::cublas::{CudaBlas, result, sys};
use nsa_core::DType;
use std::ffi::c_int;

/// A row-major matrix in device memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    /// The first element's address.
    pub(crate) address: u64,
    /// Type of its elements.
    pub(crate) dtype: DType,
    /// Rows and columns as it lies in memory.
    pub(crate) shape: [usize; 2],
}

/// A factor of a product: a matrix, or its transpose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factor {
    pub(crate) matrix: Matrix,
    pub(crate) transposed: bool,
}

/// A handle of the library on a device's stream.
pub(super) fn open(cuda: &super::Cuda) -> Result<CudaBlas> {
    library::check_cublas(&cuda.name())?;
    let broken =
        |error: result::CublasError| Error::Device { op: "cuBLAS".to_owned(), message: format!("{:?}", error.0) };
    let blas = CudaBlas::new(cuda.stream().clone()).map_err(broken)?;
    // Sums of bf16 and f16 products stay in f32 where a library splits them.
    let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the handle was just made.
    unsafe { sys::cublasSetMathMode(*blas.handle(), mode) }.result().map_err(broken)?;
    Ok(blas)
}

/// C = A·B, or C += A·B. A and B are of one type, C is of that type or f32; sums in f32.
///
/// # Errors
/// If there is no cuBLAS, or a size is more than it takes.
pub(crate) fn multiply(call: &Call<'_>, a: Factor, b: Factor, c: Matrix, accumulate: bool) -> Result<()> {
    let [rows, columns] = c.shape;
    let depth = a.matrix.shape[usize::from(!a.transposed)];
    assert_eq!(a.matrix.dtype, b.matrix.dtype, "factors of one type");
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let size = |size: usize| {
        c_int::try_from(size).map_err(|_| Error::Device {
            op: call.op().to_owned(),
            message: format!("a matrix with a side of {size} is more than cuBLAS takes"),
        })
    };
    let operation = |factor: Factor| match factor.transposed {
        true => sys::cublasOperation_t::CUBLAS_OP_T,
        false => sys::cublasOperation_t::CUBLAS_OP_N,
    };
    let leading = |matrix: Matrix| size(matrix.shape[1].max(1));
    let (alpha, beta) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
    let blas = call.cuda().blas()?;
    // cuBLAS reads columns where rows lie: Cᵀ = Bᵀ·Aᵀ, each matrix as its own transpose.
    // SAFETY: the addresses are of matrices of these sizes, borrowed by the caller, on the handle's stream; the scales are
    // read before the call returns.
    let done = unsafe {
        result::gemm_ex(
            *blas.handle(),
            operation(b),
            operation(a),
            size(columns)?,
            size(rows)?,
            size(depth)?,
            (&raw const alpha).cast(),
            b.matrix.address as *const _,
            data_type(b.matrix.dtype),
            leading(b.matrix)?,
            a.matrix.address as *const _,
            data_type(a.matrix.dtype),
            leading(a.matrix)?,
            (&raw const beta).cast(),
            c.address as *mut _,
            data_type(c.dtype),
            leading(c)?,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    done.map_err(|error| Error::Device { op: format!("{}, cuBLAS", call.op()), message: format!("{:?}", error.0) })
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::F64 => sys::cudaDataType::CUDA_R_64F,
    }
}
