//! The few functions of cuBLAS that programs call for products of matrices. The same library serves as `libcublas.so`: both
//! names must be links to one file, so that both share one device.

use super::stream::submit;
use super::{Outcome, call, put, state};
use crate::driver::blas::{Gemm, Matrix, Stored};
use crate::driver::error::CuError;
use crate::driver::graph::Work;
use half::f16;
use std::ffi::{c_int, c_longlong, c_void};

/// `CUBLAS_STATUS_INVALID_VALUE`
const INVALID: CuError = CuError(7);
/// `CUBLAS_STATUS_NOT_SUPPORTED`
const UNSUPPORTED: CuError = CuError(15);
/// `CUBLAS_STATUS_EXECUTION_FAILED`
const FAILED: CuError = CuError(13);
/// `CUBLAS_STATUS_NOT_INITIALIZED`
const NO_CONTEXT: CuError = CuError(1);
/// `CUBLAS_STATUS_ALLOC_FAILED`
const NO_MEMORY: CuError = CuError(3);

/// The stream of a context.
fn stream_of(handle: usize) -> Result<usize, CuError> {
    state().map_err(|_| FAILED)?.products(handle).copied().ok_or(NO_CONTEXT)
}

fn check(handle: usize) -> Outcome {
    stream_of(handle).map(|_| ())
}

/// A scale that a pointer to host memory gives, in the type that is computed in.
fn scale(from: *const c_void, compute: c_int) -> Result<f64, CuError> {
    if from.is_null() {
        return Err(INVALID);
    }
    match compute {
        // SAFETY: not null, and the API asks for a readable f16.
        64 | 65 => Ok(f16::from_bits(unsafe { from.cast::<u16>().read_unaligned() }).to_f64()),
        // SAFETY: not null, and the API asks for a readable f32.
        68 | 69 | 74 | 75 | 77 => Ok(f64::from(unsafe { from.cast::<f32>().read_unaligned() })),
        // SAFETY: not null, and the API asks for a readable f64.
        70 | 71 => Ok(unsafe { from.cast::<f64>().read_unaligned() }),
        _ => Err(UNSUPPORTED),
    }
}

fn transposed(operation: c_int) -> Result<bool, CuError> {
    match operation {
        0 => Ok(false),
        1 | 2 => Ok(true),
        _ => Err(INVALID),
    }
}

/// A matrix argument: operation, address, type, leading dimension, stride.
type Argument = (c_int, *const c_void, c_int, c_int, c_longlong);

fn matrix((operation, address, data_type, leading, stride): Argument) -> Result<Matrix, CuError> {
    Ok(Matrix {
        address: address as u64,
        leading: i64::from(leading),
        stride,
        stored: Stored::of_data_type(data_type).ok_or(UNSUPPORTED)?,
        transposed: transposed(operation)?,
    })
}

fn gemm(
    handle: usize,
    sizes: [c_int; 3],
    [alpha, beta]: [*const c_void; 2],
    [a, b, c]: [Argument; 3],
    (batch, compute): (c_int, c_int),
) -> Outcome {
    let stream = stream_of(handle)?;
    let gemm = Gemm {
        sizes: sizes.map(i64::from),
        a: matrix(a)?,
        b: matrix(b)?,
        c: matrix(c)?,
        scales: [scale(alpha, compute)?, scale(beta, compute)?],
        batch: i64::from(batch),
    };
    if !Stored::multiply([gemm.a.stored, gemm.b.stored, gemm.c.stored], compute) {
        return Err(UNSUPPORTED);
    }
    gemm.check().map_err(|_| INVALID)?;
    submit(stream, Work::Product(gemm)).map_err(|_| FAILED)
}

/// What the address of a workspace is a multiple of.
const WORKSPACE_ALIGNMENT: u64 = 256;

/// `CUBLAS_COMPUTE_32F` and `_64F`.
const COMPUTE: [c_int; 2] = [68, 70];

exports! {
    /// A context of cuBLAS. The real one makes memory for it, which a capture of this thread forbids.
    fn cublasCreate_v2(handle: *mut usize) {
        let mut state = state().map_err(|_| NO_CONTEXT)?;
        state.unsafe_call().map_err(|_| NO_MEMORY)?;
        put(handle, state.new_products()).map_err(|_| INVALID)
    }

    /// Ends a context.
    fn cublasDestroy_v2(handle: usize) { state().map_err(|_| FAILED)?.end_products(handle).ok_or(NO_CONTEXT) }

    /// The stream that products are work of.
    fn cublasSetStream_v2(handle: usize, stream: usize) {
        *state().map_err(|_| FAILED)?.products(handle).ok_or(NO_CONTEXT)? = stream;
        Ok(())
    }

    /// No workspace is needed, but one that is given must be there.
    fn cublasSetWorkspace_v2(handle: usize, workspace: *mut c_void, bytes: usize) {
        check(handle)?;
        let address = workspace as u64;
        if bytes > 0 {
            state().map_err(|_| FAILED)?.memory.find(address, bytes as u64).map_err(|_| INVALID)?;
        }
        if address.is_multiple_of(WORKSPACE_ALIGNMENT) { Ok(()) } else { Err(INVALID) }
    }

    /// Products are exact in every mode.
    fn cublasSetMathMode(handle: usize, _mode: c_int) { check(handle) }

    /// Scales are read from host memory alone.
    fn cublasSetPointerMode_v2(handle: usize, mode: c_int) { check(handle)?; if mode == 0 { Ok(()) } else { Err(UNSUPPORTED) } }

    /// f32
    fn cublasSgemm_v2(
        handle: usize, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: *const c_void, lda: c_int,
        b: *const c_void, ldb: c_int, beta: *const c_void, c: *mut c_void, ldc: c_int,
    ) {
        let matrices = [(ta, a, 0, lda, 0), (tb, b, 0, ldb, 0), (0, c.cast_const(), 0, ldc, 0)];
        gemm(handle, [m, n, k], [alpha, beta], matrices, (1, COMPUTE[0]))
    }

    /// f64
    fn cublasDgemm_v2(
        handle: usize, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: *const c_void, lda: c_int,
        b: *const c_void, ldb: c_int, beta: *const c_void, c: *mut c_void, ldc: c_int,
    ) {
        let matrices = [(ta, a, 1, lda, 0), (tb, b, 1, ldb, 0), (0, c.cast_const(), 1, ldc, 0)];
        gemm(handle, [m, n, k], [alpha, beta], matrices, (1, COMPUTE[1]))
    }

    /// f32, several
    fn cublasSgemmStridedBatched(
        handle: usize, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: *const c_void, lda: c_int,
        sa: c_longlong, b: *const c_void, ldb: c_int, sb: c_longlong, beta: *const c_void, c: *mut c_void, ldc: c_int,
        sc: c_longlong, batch: c_int,
    ) {
        let matrices = [(ta, a, 0, lda, sa), (tb, b, 0, ldb, sb), (0, c.cast_const(), 0, ldc, sc)];
        gemm(handle, [m, n, k], [alpha, beta], matrices, (batch, COMPUTE[0]))
    }

    /// f64, several
    fn cublasDgemmStridedBatched(
        handle: usize, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: *const c_void, lda: c_int,
        sa: c_longlong, b: *const c_void, ldb: c_int, sb: c_longlong, beta: *const c_void, c: *mut c_void, ldc: c_int,
        sc: c_longlong, batch: c_int,
    ) {
        let matrices = [(ta, a, 1, lda, sa), (tb, b, 1, ldb, sb), (0, c.cast_const(), 1, ldc, sc)];
        gemm(handle, [m, n, k], [alpha, beta], matrices, (batch, COMPUTE[1]))
    }

    /// Any types
    fn cublasGemmEx(
        handle: usize, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: *const c_void,
        a_type: c_int, lda: c_int, b: *const c_void, b_type: c_int, ldb: c_int, beta: *const c_void, c: *mut c_void,
        c_type: c_int, ldc: c_int, compute: c_int, _algorithm: c_int,
    ) {
        let matrices = [(ta, a, a_type, lda, 0), (tb, b, b_type, ldb, 0), (0, c.cast_const(), c_type, ldc, 0)];
        gemm(handle, [m, n, k], [alpha, beta], matrices, (1, compute))
    }

    /// Any types, several
    fn cublasGemmStridedBatchedEx(
        handle: usize, ta: c_int, tb: c_int, m: c_int, n: c_int, k: c_int, alpha: *const c_void, a: *const c_void,
        a_type: c_int, lda: c_int, sa: c_longlong, b: *const c_void, b_type: c_int, ldb: c_int, sb: c_longlong,
        beta: *const c_void, c: *mut c_void, c_type: c_int, ldc: c_int, sc: c_longlong, batch: c_int, compute: c_int,
        _algorithm: c_int,
    ) {
        let matrices = [(ta, a, a_type, lda, sa), (tb, b, b_type, ldb, sb), (0, c.cast_const(), c_type, ldc, sc)];
        gemm(handle, [m, n, k], [alpha, beta], matrices, (batch, compute))
    }
}
