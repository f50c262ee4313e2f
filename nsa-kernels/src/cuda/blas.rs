//! Products of matrices by cuBLAS, which is loaded when the first one is asked for.

use super::launch::Call;
use super::memory::DeviceBuffer;
use super::{Cuda, library};
use crate::{Error, Result};
use cudarc::cublas::{CudaBlas, result, sys};
use cudarc::driver::CudaStream;
use nsa_core::DType;
use std::ffi::{c_int, c_longlong};
use std::sync::Arc;

/// A row-major matrix in device memory; of a batch, the first one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    /// The first element's address.
    pub(crate) address: u64,
    /// Type of its elements.
    pub(crate) dtype: DType,
    /// Rows and columns as it lies in memory.
    pub(crate) shape: [usize; 2],
    /// Elements from row to row.
    pub(crate) leading: usize,
    /// Elements from matrix to matrix of a batch.
    pub(crate) stride: usize,
}

impl Matrix {
    /// Rows without gaps, and matrices of a batch without gaps.
    pub(crate) fn packed(address: u64, dtype: DType, shape: [usize; 2]) -> Self {
        Self { address, dtype, shape, leading: shape[1], stride: shape[0] * shape[1] }
    }

    /// As a factor.
    pub(crate) fn plain(self) -> Factor {
        Factor { matrix: self, transposed: false }
    }

    /// Its transpose as a factor.
    pub(crate) fn transposed(self) -> Factor {
        Factor { matrix: self, transposed: true }
    }

    /// What begins `elements` after it.
    pub(crate) fn after(self, elements: usize) -> Self {
        Self { address: self.address + (elements * self.dtype.size_bytes()) as u64, ..self }
    }
}

/// A factor of a product: a matrix, or its transpose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factor {
    pub(crate) matrix: Matrix,
    pub(crate) transposed: bool,
}

/// A handle of the library on a stream of the device, and the memory that its products take beside their matrices: what the library
/// recommends. Else it makes some for each record that a product is in.
#[derive(Debug)]
pub(super) struct Blas {
    /// Ends before its memory.
    blas: CudaBlas,
    _workspace: DeviceBuffer<u8>,
}

impl Blas {
    /// Opens the library for the work of a stream.
    ///
    /// # Errors
    /// If it is not there, or the device has too little memory.
    pub(super) fn open(cuda: &Cuda, stream: &Arc<CudaStream>) -> Result<Arc<Self>> {
        library::check_cublas(&cuda.name())?;
        let broken =
            |error: result::CublasError| Error::Device { op: "cuBLAS".to_owned(), message: format!("{:?}", error.0) };
        let workspace_bytes = if cuda.device().capability < (9, 0) { 8 << 20 } else { 32 << 20 };
        let mut workspace = DeviceBuffer::unwritten(cuda, workspace_bytes)?;
        let blas = CudaBlas::new(stream.clone()).map_err(broken)?;
        // Sums of bf16 and f16 products stay in f32 where a library splits them.
        let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        let address = workspace.mem_mut(0..workspace_bytes).address();
        // SAFETY: the handle was just made; the memory is of its device, holds so many bytes and is given back after the handle.
        let set = unsafe {
            let of_memory = sys::cublasSetWorkspace_v2(*blas.handle(), address as *mut _, workspace_bytes).result();
            of_memory.and_then(|()| sys::cublasSetMathMode(*blas.handle(), mode).result())
        };
        set.map_err(broken)?;
        Ok(Arc::new(Self { blas, _workspace: workspace }))
    }

    fn handle(&self) -> sys::cublasHandle_t {
        *self.blas.handle()
    }
}

/// C = A·B, or C += A·B. A and B are of one type, C is of that type or f32; sums in f32.
///
/// # Errors
/// If there is no cuBLAS, or a size is more than it takes.
pub(crate) fn multiply(call: &Call<'_>, a: Factor, b: Factor, c: Matrix, accumulate: bool) -> Result<()> {
    let Some(Product { sizes: [m, n, k], operations, leading, types, .. }) = Product::new(call, [a, b], c)? else {
        return Ok(());
    };
    let (alpha, beta) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
    let blas = call.cuda().blas()?;
    // SAFETY: the addresses are of matrices of these sizes, borrowed by the caller, on the handle's stream; the scales are
    // read before the call returns.
    let done = unsafe {
        result::gemm_ex(
            blas.handle(),
            operations[1],
            operations[0],
            m,
            n,
            k,
            (&raw const alpha).cast(),
            b.matrix.address as *const _,
            types[1],
            leading[1],
            a.matrix.address as *const _,
            types[0],
            leading[0],
            (&raw const beta).cast(),
            c.address as *mut _,
            types[2],
            leading[2],
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    done.map_err(|error| refused(call, error))
}

/// The same for each of `count` matrices, which lie a stride apart.
///
/// # Errors
/// As `multiply`.
pub(crate) fn multiply_batch(
    call: &Call<'_>,
    count: usize,
    [a, b]: [Factor; 2],
    c: Matrix,
    accumulate: bool,
) -> Result<()> {
    let Some(Product { sizes: [m, n, k], operations, leading, types }) = Product::new(call, [a, b], c)? else {
        return Ok(());
    };
    let (alpha, beta) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
    let [a_stride, b_stride, c_stride] = [a.matrix, b.matrix, c].map(|matrix| matrix.stride as c_longlong);
    let count = size(call, count)?;
    let blas = call.cuda().blas()?;
    // SAFETY: as in `multiply`, for each matrix of the batches.
    let done = unsafe {
        result::gemm_strided_batched_ex(
            blas.handle(),
            operations[1],
            operations[0],
            m,
            n,
            k,
            (&raw const alpha).cast(),
            b.matrix.address as *const _,
            types[1],
            leading[1],
            b_stride,
            a.matrix.address as *const _,
            types[0],
            leading[0],
            a_stride,
            (&raw const beta).cast(),
            c.address as *mut _,
            types[2],
            leading[2],
            c_stride,
            count,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    done.map_err(|error| refused(call, error))
}

/// What cuBLAS asks about a product. It reads columns where rows lie: Cᵀ = Bᵀ·Aᵀ, each matrix as its own transpose.
struct Product {
    /// Columns and rows of C, and the depth of its sums.
    sizes: [c_int; 3],
    /// Of A and B.
    operations: [sys::cublasOperation_t; 2],
    /// Of A, B and C.
    leading: [c_int; 3],
    /// Of A, B and C.
    types: [sys::cudaDataType; 3],
}

impl Product {
    /// None if C has no elements.
    fn new(call: &Call<'_>, [a, b]: [Factor; 2], c: Matrix) -> Result<Option<Self>> {
        assert_eq!(a.matrix.dtype, b.matrix.dtype, "factors of one type");
        let [rows, columns] = c.shape;
        let depth = a.matrix.shape[usize::from(!a.transposed)];
        if rows == 0 || columns == 0 {
            return Ok(None);
        }
        let operation = |factor: Factor| match factor.transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let leading = |matrix: Matrix| size(call, matrix.leading.max(1));
        Ok(Some(Self {
            sizes: [size(call, columns)?, size(call, rows)?, size(call, depth)?],
            operations: [operation(a), operation(b)],
            leading: [leading(a.matrix)?, leading(b.matrix)?, leading(c)?],
            types: [a.matrix, b.matrix, c].map(|matrix| data_type(matrix.dtype)),
        }))
    }
}

fn size(call: &Call<'_>, size: usize) -> Result<c_int> {
    c_int::try_from(size).map_err(|_| Error::Device {
        op: call.op().to_owned(),
        message: format!("a matrix with a side of {size} is more than cuBLAS takes"),
    })
}

fn refused(call: &Call<'_>, error: result::CublasError) -> Error {
    Error::Device { op: format!("{}, cuBLAS", call.op()), message: format!("{:?}", error.0) }
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::F64 => sys::cudaDataType::CUDA_R_64F,
    }
}
