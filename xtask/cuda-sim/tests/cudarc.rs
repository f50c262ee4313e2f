//! cudarc, unmodified, on the simulator: contexts, copies, modules, launches, events, errors.

use cudarc::cublas::{CudaBlas, Gemm, GemmConfig, StridedBatchedConfig, sys::cublasOperation_t};
use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg, sys};
use std::process::Command;

/// Marks a process whose libcuda is the simulator.
const INSIDE: &str = "CUDA_SIM_TEST_INSIDE";

/// Runs a test of this file again, in a process whose libcuda is the simulator.
fn on_simulator(test: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let program = std::env::current_exe().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let built = program.parent().unwrap().join("libcuda_sim.so");
    for name in ["libcuda.so", "libcublas.so"] {
        std::os::unix::fs::symlink(&built, folder.path().join(name)).unwrap();
    }
    let output = Command::new(&program)
        .args(["--exact", test, "--nocapture"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

const ADD: &str = ".version 8.0\n.target sm_80\n.address_size 64\n\
    .visible .entry add(.param .u64 x, .param .u64 y, .param .u32 n, .param .f32 a)\n{\n\
    .reg .b64 d<4>;\n.reg .b32 r<4>;\n.reg .f32 f<4>;\n.reg .pred p;\n\
    mov.u32 r0, %ctaid.x;\nmov.u32 r1, %ntid.x;\nmov.u32 r2, %tid.x;\nmad.lo.u32 r0, r0, r1, r2;\nld.param.u32 r1, [n];\n\
    setp.ge.u32 p, r0, r1;\n@p bra END;\nld.param.u64 d0, [x];\nld.param.u64 d1, [y];\nmul.wide.u32 d2, r0, 4;\nadd.u64 d0, d0, d2;\nadd.u64 d1, d1, d2;\n\
    ld.global.f32 f0, [d0];\nld.global.f32 f1, [d1];\nld.param.f32 f2, [a];\nfma.rn.f32 f1, f0, f2, f1;\nst.global.f32 [d1], f1;\nEND:\nret;\n}\n";

#[test]
fn a_kernel_is_launched() {
    on_simulator("a_kernel_is_launched", || {
        let context = CudaContext::new(0).unwrap();
        assert_eq!(context.compute_capability().unwrap(), (9, 0));
        let stream = context.new_stream().unwrap();
        let module = context.load_module(ADD.into()).unwrap();
        let kernel = module.load_function("add").unwrap();
        let n = 1000u32;
        let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
        let device_x = stream.clone_htod(&x).unwrap();
        let mut device_y = stream.alloc_zeros::<f32>(n as usize).unwrap();
        let start = context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
        start.record(&stream).unwrap();
        let mut builder = stream.launch_builder(&kernel);
        let scale = 3.0f32;
        builder.arg(&device_x).arg(&mut device_y).arg(&n).arg(&scale);
        // SAFETY: the kernel writes within `device_y`.
        unsafe { builder.launch(LaunchConfig::for_num_elems(n)) }.unwrap();
        let end = context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
        end.record(&stream).unwrap();
        stream.synchronize().unwrap();
        assert!(start.elapsed_ms(&end).unwrap() >= 0.0);
        let y = stream.clone_dtoh(&device_y).unwrap();
        assert!(y.iter().zip(&x).all(|(y, x)| *y == 3.0 * x));
        let copy = stream.clone_dtod(&device_y).unwrap();
        assert_eq!(stream.clone_dtoh(&copy).unwrap(), y);
    });
}

#[test]
fn a_fault_ends_the_context() {
    on_simulator("a_fault_ends_the_context", || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let kernel = context.load_module(ADD.into()).unwrap().load_function("add").unwrap();
        let x = stream.clone_htod(&[1.0f32; 16]).unwrap();
        let mut y = stream.alloc_zeros::<f32>(8).unwrap();
        let mut builder = stream.launch_builder(&kernel);
        builder.arg(&x).arg(&mut y).arg(&16u32).arg(&1.0f32);
        // SAFETY: the simulator stops the kernel where it reads beyond `y`.
        unsafe { builder.launch(LaunchConfig::for_num_elems(16)) }.unwrap();
        let error = stream.synchronize().unwrap_err();
        assert_eq!(error.0, sys::cudaError_enum::CUDA_ERROR_ILLEGAL_ADDRESS);
        assert!(stream.clone_dtoh(&x).is_err());
    });
}

#[test]
fn modules_that_are_none_are_refused() {
    on_simulator("modules_that_are_none_are_refused", || {
        let context = CudaContext::new(0).unwrap();
        let error = context.load_module("no module".into()).unwrap_err();
        assert_eq!(error.0, sys::cudaError_enum::CUDA_ERROR_INVALID_IMAGE);
        let module = context.load_module(ADD.into()).unwrap();
        let error = module.load_function("subtract").unwrap_err();
        assert_eq!(error.0, sys::cudaError_enum::CUDA_ERROR_NOT_FOUND);
    });
}

/// Row i, column j of a matrix that lies column by column.
fn product(a: impl Fn(usize, usize) -> f64, b: impl Fn(usize, usize) -> f64, depth: usize, i: usize, j: usize) -> f64 {
    (0..depth).map(|k| a(i, k) * b(k, j)).sum()
}

#[test]
fn products_of_cublas() {
    on_simulator("products_of_cublas", || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let blas = CudaBlas::new(stream.clone()).unwrap();
        let (m, n, k) = (5, 7, 3);
        let x: Vec<f32> = (0..2 * k * m).map(|i| i as f32 * 0.5 - 3.0).collect();
        let y: Vec<f32> = (0..2 * k * n).map(|i| 2.0 - i as f32 * 0.25).collect();
        let (a, b) = (stream.clone_htod(&x).unwrap(), stream.clone_htod(&y).unwrap());
        let mut c = stream.clone_htod(&vec![1.0f32; 2 * m * n]).unwrap();
        let gemm = GemmConfig {
            transa: cublasOperation_t::CUBLAS_OP_T,
            transb: cublasOperation_t::CUBLAS_OP_N,
            m: m as i32,
            n: n as i32,
            k: k as i32,
            alpha: 2.0f32,
            lda: k as i32,
            ldb: k as i32,
            beta: 3.0f32,
            ldc: m as i32,
        };
        let (stride_a, stride_b, stride_c) = ((k * m) as i64, (k * n) as i64, (m * n) as i64);
        let config = StridedBatchedConfig { gemm, batch_size: 2, stride_a, stride_b, stride_c };
        // SAFETY: the sizes are those of the matrices.
        unsafe { blas.gemm_strided_batched(config, &a, &b, &mut c) }.unwrap();
        let got = stream.clone_dtoh(&c).unwrap();
        for (at, got) in got.iter().enumerate() {
            let (batch, i, j) = (at / (m * n), at % m, at / m % n);
            let left = |i: usize, p: usize| f64::from(x[batch * k * m + i * k + p]);
            let right = |p: usize, j: usize| f64::from(y[batch * k * n + j * k + p]);
            assert_eq!(f64::from(*got), 2.0 * product(left, right, k, i, j) + 3.0, "batch {batch}, [{i}, {j}]");
        }
        let short: Vec<half::bf16> = x.iter().map(|value| half::bf16::from_f32(*value)).collect();
        let square = stream.clone_htod(&short[..9]).unwrap();
        let mut out = stream.alloc_zeros::<half::bf16>(9).unwrap();
        let one = half::bf16::ONE;
        let zero = half::bf16::ZERO;
        let operation = cublasOperation_t::CUBLAS_OP_N;
        let config = GemmConfig {
            transa: operation,
            transb: operation,
            m: 3,
            n: 3,
            k: 3,
            alpha: one,
            lda: 3,
            ldb: 3,
            beta: zero,
            ldc: 3,
        };
        // SAFETY: the sizes are those of the matrices.
        unsafe { blas.gemm(config, &square, &square, &mut out) }.unwrap();
        let element = |i: usize, j: usize| short[j * 3 + i].to_f64();
        for (at, got) in stream.clone_dtoh(&out).unwrap().iter().enumerate() {
            assert_eq!(*got, half::bf16::from_f64(product(element, element, 3, at % 3, at / 3)), "element {at}");
        }
    });
}
