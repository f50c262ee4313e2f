//! cudarc, unmodified, on the simulator: contexts, copies, modules, launches, events, errors.

use cuda_sim::toolchain::Toolchain;
use cudarc::cublas::sys::{cublasOperation_t, cublasStatus_t};
use cudarc::cublas::{CudaBlas, Gemm, GemmConfig, StridedBatchedConfig};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError, LaunchConfig,
};
use cudarc::driver::{PushKernelArg, result, sys};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use sys::{CUgraphInstantiate_flags as Flags, CUresult, CUstreamCaptureMode as Mode, CUstreamCaptureStatus as Status};

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

/// A kernel of so many registers that all must be loaded before the first is stored.
fn many_registers(bounds: &str) -> String {
    let each = |line: &str| -> String { (0..100).map(|n| line.replace('#', &n.to_string()) + "\n").collect() };
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry many(.param .u64 x) {bounds}\n{{\n.reg .b64 d;\n.reg .b32 r<100>;\n\
         ld.param.u64 d, [x];\n{}{}ret;\n}}\n",
        each("ld.volatile.global.u32 r#, [d+#00];"),
        each("st.volatile.global.u32 [d+#00], r#;")
    )
}

/// A CTA whose registers no multiprocessor has is not launched; launch bounds make it small enough.
#[test]
fn registers_bound_a_block() {
    Toolchain::find_or_fetch(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/toolchain")).unwrap();
    on_simulator("registers_bound_a_block", || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let mut x = stream.alloc_zeros::<u8>(100 * 100).unwrap();
        let mut launch = |bounds: &str, threads: u32| {
            let module = context.load_module(many_registers(bounds).into()).unwrap();
            let kernel = module.load_function("many").unwrap();
            let shape = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
            let mut builder = stream.launch_builder(&kernel);
            builder.arg(&mut x);
            // SAFETY: the kernel stays within `x`, where its threads store what is there.
            unsafe { builder.launch(shape) }.map(|_| ()).map_err(|error| error.0)
        };
        assert_eq!(launch("", 1024), Err(CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES));
        assert_eq!(launch("", 512), Ok(()));
        assert_eq!(launch(".maxntid 1024, 1, 1", 1024), Ok(()));
    });
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

/// What the documentation of cuBLAS refuses: combinations of types, columns that overlap, workspaces that are none.
#[test]
fn misuse_of_cublas() {
    use cudarc::cublas::sys as blas_sys;
    use cudarc::driver::{DevicePtr, DevicePtrMut};
    on_simulator("misuse_of_cublas", || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let blas = CudaBlas::new(stream.clone()).unwrap();
        let factors = stream.alloc_zeros::<u8>(1024).unwrap();
        let mut out = stream.alloc_zeros::<u8>(1024).unwrap();
        let (from, _kept) = factors.device_ptr(&stream);
        let (to, _held) = out.device_ptr_mut(&stream);
        // Zeros in every type.
        let zeros = [0u64; 2];
        let multiply = |[a, b, c]: [u32; 3], compute: u32, ldc: i32, batch: bool| {
            let kind = |number: u32| -> blas_sys::cudaDataType {
                use blas_sys::cudaDataType_t::*;
                [CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF][number as usize]
            };
            use blas_sys::cublasComputeType_t::*;
            let computes = [
                CUBLAS_COMPUTE_16F,
                CUBLAS_COMPUTE_32F,
                CUBLAS_COMPUTE_32F_FAST_16F,
                CUBLAS_COMPUTE_32F_FAST_16BF,
                CUBLAS_COMPUTE_32F_FAST_TF32,
                CUBLAS_COMPUTE_64F,
            ];
            let (operation, algorithm) =
                (cublasOperation_t::CUBLAS_OP_N, blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT);
            let (handle, scale) = (*blas.handle(), zeros.as_ptr().cast());
            let (a, b, c, compute) = (kind(a), kind(b), kind(c), computes[compute as usize]);
            let (x, y) = (from as *const _, to as *mut _);
            // SAFETY: matrices of 4 by 4 lie within the memory, and the scales are read before the call returns.
            unsafe {
                if batch {
                    blas_sys::cublasGemmStridedBatchedEx(
                        handle, operation, operation, 4, 4, 4, scale, x, a, 4, 16, x, b, 4, 16, scale, y, c, ldc, 16,
                        2, compute, algorithm,
                    )
                } else {
                    blas_sys::cublasGemmEx(
                        handle, operation, operation, 4, 4, 4, scale, x, a, 4, x, b, 4, scale, y, c, ldc, compute,
                        algorithm,
                    )
                }
            }
        };
        let [single, double, half, brain] = [0, 1, 2, 3];
        // A's and B's type, C's, and the type of sums.
        let known = [
            (half, half, 0),
            (brain, brain, 1),
            (half, half, 1),
            (brain, single, 1),
            (half, single, 1),
            (single, single, 1),
            (single, single, 2),
            (single, single, 3),
            (single, single, 4),
            (double, double, 5),
        ];
        for (number, batch) in (0..4 * 4 * 4 * 6).flat_map(|number| [(number, false), (number, true)]) {
            let [a, b, c, compute] = [number % 4, number / 4 % 4, number / 16 % 4, number / 64];
            let expected = if a == b && known.contains(&(a, c, compute)) {
                cublasStatus_t::CUBLAS_STATUS_SUCCESS
            } else {
                cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
            };
            assert_eq!(multiply([a, b, c], compute, 4, batch), expected, "{a} {b} {c}, sums {compute}, {batch}");
        }
        let invalid = cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE;
        assert_eq!(multiply([single; 3], 1, 3, false), invalid);
        // SAFETY: what is no workspace is refused.
        let workspace = |address: u64, bytes: usize| unsafe {
            blas_sys::cublasSetWorkspace_v2(*blas.handle(), address as *mut _, bytes)
        };
        assert_eq!(workspace(to, 1024), cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        assert_eq!(workspace(0, 0), cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        assert_eq!(workspace(to + 128, 512), invalid);
        assert_eq!(workspace(to, 1 << 40), invalid);
        assert_eq!(workspace((&raw const zeros) as u64 / 256 * 256, 16), invalid);
    });
}

/// A context with a stream and the kernel `add`: y += a x over four numbers, at the start of a capture.
struct Capturing {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernel: CudaFunction,
    x: CudaSlice<f32>,
    y: CudaSlice<f32>,
}

impl Capturing {
    fn begin(mode: Mode) -> Self {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: all work is on one stream, or ordered by events that the test records.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().unwrap();
        let kernel = context.load_module(ADD.into()).unwrap().load_function("add").unwrap();
        let x = stream.clone_htod(&[1.0f32, 2.0, 3.0, 4.0]).unwrap();
        let y = stream.alloc_zeros::<f32>(4).unwrap();
        stream.begin_capture(mode).unwrap();
        Self { context, stream, kernel, x, y }
    }

    fn add(&mut self, stream: &Arc<CudaStream>, scale: f32) -> Result<(), DriverError> {
        let mut builder = stream.launch_builder(&self.kernel);
        builder.arg(&self.x).arg(&mut self.y).arg(&4u32).arg(&scale);
        // SAFETY: the kernel writes within `y`.
        unsafe { builder.launch(LaunchConfig::for_num_elems(4)) }.map(|_| ())
    }

    fn end(&self) -> Result<CudaGraph, CUresult> {
        self.stream.end_capture(Flags(0)).map(|graph| graph.unwrap()).map_err(|error| error.0)
    }

    /// What a call answers during the capture, and what the capture then ends with.
    fn spoiled(call: impl FnOnce(&mut Self) -> Result<(), DriverError>) -> (CUresult, CUresult) {
        let mut capturing = Self::begin(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        let error = call(&mut capturing).unwrap_err().0;
        (error, capturing.end().map(|_| ()).unwrap_err())
    }
}

/// The driver knows the device's memory and what it has made of the host's.
#[test]
fn addresses_are_of_known_memory_or_none() {
    on_simulator("addresses_are_of_known_memory_or_none", || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let device = stream.clone_htod(&[1.0f32; 4]).unwrap();
        // SAFETY: nothing reads it.
        let pinned = unsafe { context.alloc_pinned::<f32>(4) }.unwrap();
        let ordinary = [0.0f32; 4];
        let ask = |attribute, address: u64| {
            let mut found = 0u32;
            // SAFETY: the answer is a 32-bit number.
            unsafe { sys::cuPointerGetAttribute((&raw mut found).cast(), attribute, address) }.result().map(|()| found)
        };
        let kind = |address| ask(sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address).ok();
        let (of_device, _) = device.device_ptr(&stream);
        let of_pinned = pinned.as_ptr().unwrap() as u64;
        assert_eq!(
            [of_device, of_device + 15, of_pinned, of_pinned + 15].map(kind),
            [Some(2), Some(2), Some(1), Some(1)]
        );
        assert_eq!([of_pinned + 16, ordinary.as_ptr() as u64, 0].map(kind), [None; 3]);
        assert!(ask(sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_CONTEXT, of_device).is_err());
    });
}

#[test]
fn a_graph_repeats_what_was_captured() {
    on_simulator("a_graph_repeats_what_was_captured", || {
        let mut it = Capturing::begin(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        let stream = it.stream.clone();
        assert_eq!(stream.capture_status().unwrap(), Status::CU_STREAM_CAPTURE_STATUS_ACTIVE);
        let mut host = [5.0f32; 4];
        stream.memcpy_htod(&host, &mut it.x).unwrap();
        it.add(&stream, 2.0).unwrap();
        stream.memset_zeros(&mut it.x).unwrap();
        it.add(&stream, 1.0).unwrap();
        let graph = it.end().unwrap();
        assert_eq!(stream.capture_status().unwrap(), Status::CU_STREAM_CAPTURE_STATUS_NONE);
        assert_eq!(stream.clone_dtoh(&it.y).unwrap(), [0.0; 4], "nothing has run yet");
        graph.upload().unwrap();
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&it.y).unwrap(), [10.0; 4]);
        // The host's memory is read at each launch.
        std::hint::black_box(&mut host)[2] = 1.0;
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&it.y).unwrap(), [20.0, 20.0, 12.0, 20.0]);
        std::hint::black_box(&host);
        // A graph becomes part of another.
        stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
        graph.launch().unwrap();
        graph.launch().unwrap();
        let twice = it.end().unwrap();
        twice.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&it.y).unwrap(), [40.0, 40.0, 16.0, 40.0]);
    });
}

#[test]
fn captures_branch_and_join() {
    on_simulator("captures_branch_and_join", || {
        let mut it = Capturing::begin(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
        let (stream, side) = (it.stream.clone(), it.context.new_stream().unwrap());
        it.add(&stream, 1.0).unwrap();
        side.wait(&stream.record_event(None).unwrap()).unwrap();
        it.add(&side, 2.0).unwrap();
        assert_eq!(
            side.end_capture(Flags(0)).map(|_| ()).unwrap_err().0,
            CUresult::CUDA_ERROR_STREAM_CAPTURE_UNMATCHED
        );
        assert_eq!(it.end().map(|_| ()).unwrap_err(), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        for joins in [false, true] {
            stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
            side.wait(&stream.record_event(None).unwrap()).unwrap();
            it.add(&side, 2.0).unwrap();
            if joins {
                stream.wait(&side.record_event(None).unwrap()).unwrap();
            }
            match it.end() {
                Ok(graph) if joins => graph.launch().unwrap(),
                Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED) if !joins => {}
                other => panic!("joins {joins}: {:?}", other.map(|_| ())),
            }
        }
        assert_eq!(stream.clone_dtoh(&it.y).unwrap(), [2.0, 4.0, 6.0, 8.0]);
    });
}

#[test]
fn captures_forbid_what_a_graph_cannot_hold() {
    on_simulator("captures_forbid_what_a_graph_cannot_hold", || {
        let over = CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        let unsupported = (CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, over);
        assert_eq!(Capturing::spoiled(|it| it.stream.synchronize()), unsupported);
        assert_eq!(Capturing::spoiled(|it| it.context.synchronize()), unsupported);
        // SAFETY: the memory is freed by nobody, and used by nobody.
        assert_eq!(Capturing::spoiled(|_| unsafe { result::malloc_sync(16) }.map(|_| ())), unsupported);
        assert_eq!(Capturing::spoiled(|it| it.context.load_module(ADD.into()).map(|_| ())), unsupported);
        let captured = |it: &mut Capturing| it.stream.record_event(None)?.synchronize();
        assert_eq!(Capturing::spoiled(captured), (CUresult::CUDA_ERROR_CAPTURED_EVENT, over));
        let foreign = |it: &mut Capturing| it.stream.wait(&it.context.new_stream()?.record_event(None)?);
        assert_eq!(Capturing::spoiled(foreign), (CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION, over));
        let merged = |it: &mut Capturing| {
            let other = it.context.new_stream()?;
            other.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
            it.stream.wait(&other.record_event(None)?)
        };
        assert_eq!(Capturing::spoiled(merged), (CUresult::CUDA_ERROR_STREAM_CAPTURE_MERGE, over));
        let it = Capturing::begin(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        let opened = CudaBlas::new(it.stream.clone()).map(|_| ());
        assert_eq!(opened.unwrap_err().0, cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED);
        assert_eq!(it.end().map(|_| ()).unwrap_err(), over);
        let again = |it: &mut Capturing| it.stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
        let mut it = Capturing::begin(Mode::CU_STREAM_CAPTURE_MODE_GLOBAL);
        assert_eq!(again(&mut it).unwrap_err().0, CUresult::CUDA_ERROR_ILLEGAL_STATE);
        let elsewhere = std::thread::scope(|scope| scope.spawn(|| it.end().map(|_| ()).unwrap_err()).join().unwrap());
        assert_eq!(elsewhere, CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        // Streams that do not wait for the legacy stream let it be used.
        let default = it.context.default_stream();
        default.memset_zeros(&mut it.y).unwrap();
        it.end().unwrap();
        assert_eq!(it.end().map(|_| ()).unwrap_err(), CUresult::CUDA_ERROR_ILLEGAL_STATE);
        let begin = default.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_RELAXED);
        assert_eq!(begin.unwrap_err().0, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    });
}

#[test]
fn the_legacy_stream_spoils_captures_that_wait_for_it() {
    on_simulator("the_legacy_stream_spoils_captures_that_wait_for_it", || {
        let context = CudaContext::new(0).unwrap();
        let blocking = result::stream::create(result::stream::StreamKind::Default).unwrap();
        let mut x = context.default_stream().alloc_zeros::<u32>(4).unwrap();
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(blocking, Mode::CU_STREAM_CAPTURE_MODE_RELAXED) }.unwrap();
        let error = context.default_stream().memset_zeros(&mut x).unwrap_err();
        assert_eq!(error.0, CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        // SAFETY: the stream is alive.
        let error = unsafe { result::stream::end_capture(blocking) }.unwrap_err();
        assert_eq!(error.0, CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    });
}

#[test]
fn graphs_hold_memory_and_products() {
    on_simulator("graphs_hold_memory_and_products", || {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: all work is on one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().unwrap();
        let blas = CudaBlas::new(stream.clone()).unwrap();
        let x = stream.clone_htod(&[1.0f32, 2.0, 3.0, 4.0]).unwrap();
        let mut out = stream.alloc_zeros::<f32>(4).unwrap();
        let operation = cublasOperation_t::CUBLAS_OP_N;
        let config = GemmConfig {
            transa: operation,
            transb: operation,
            m: 2,
            n: 2,
            k: 2,
            alpha: 1.0f32,
            lda: 2,
            ldb: 2,
            beta: 1.0,
            ldc: 2,
        };
        stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        let mut scratch = stream.alloc_zeros::<f32>(4).unwrap();
        // SAFETY: the sizes are those of the matrices.
        unsafe { blas.gemm(config, &x, &x, &mut scratch) }.unwrap();
        // SAFETY: as above.
        unsafe { blas.gemm(config, &scratch, &x, &mut out) }.unwrap();
        drop(scratch);
        let graph = stream.end_capture(Flags(0)).unwrap().unwrap();
        assert_eq!(stream.clone_dtoh(&out).unwrap(), [0.0; 4]);
        let free = result::mem_get_info().unwrap().0;
        for times in 1..3 {
            graph.launch().unwrap();
            let cube = [37.0f32, 54.0, 81.0, 118.0].map(|value| value * times as f32);
            assert_eq!(stream.clone_dtoh(&out).unwrap(), cube);
            assert_eq!(result::mem_get_info().unwrap().0, free, "the graph's memory is free again");
        }
        for (flags, error) in [(5, CUresult::CUDA_ERROR_INVALID_VALUE), (16, CUresult::CUDA_ERROR_INVALID_VALUE)] {
            stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
            assert_eq!(stream.end_capture(Flags(flags)).map(|_| ()).unwrap_err().0, error);
        }
    });
}

#[test]
fn a_graph_that_leaves_memory_allocated_runs_once() {
    on_simulator("a_graph_that_leaves_memory_allocated_runs_once", || {
        for (flags, repeats) in [(Flags(0), false), (Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH, true)] {
            let context = CudaContext::new(0).unwrap();
            let stream = context.new_stream().unwrap();
            stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            // SAFETY: the graph below writes the memory before it is read.
            let address = unsafe { result::malloc_async(stream.cu_stream(), 64) }.unwrap();
            // SAFETY: 64 bytes were allocated.
            unsafe { result::memset_d8_async(address, 7, 64, stream.cu_stream()) }.unwrap();
            let graph = stream.end_capture(flags).unwrap().unwrap();
            graph.launch().unwrap();
            let again = graph.launch().map_err(|error| error.0);
            assert_eq!(again, if repeats { Ok(()) } else { Err(CUresult::CUDA_ERROR_INVALID_VALUE) });
            let mut bytes = [0u8; 64];
            // SAFETY: 64 bytes on both sides.
            unsafe { result::memcpy_dtoh_sync(&mut bytes, address) }.unwrap();
            assert_eq!(bytes, [7; 64]);
            // SAFETY: nobody uses the memory any more.
            unsafe { result::free_async(address, stream.cu_stream()) }.unwrap();
        }
    });
}

/// A launch may name clusters of one CTA alone.
#[test]
fn larger_clusters_are_refused() {
    on_simulator("larger_clusters_are_refused", || {
        let context = CudaContext::new(0).unwrap();
        let source = std::ffi::CString::new(ADD).unwrap();
        // SAFETY: the text ends with NUL.
        let module = unsafe { result::module::load_data(source.as_ptr().cast()) }.unwrap();
        // SAFETY: the module is loaded.
        let kernel = unsafe { result::module::get_function(module, c"add".into()) }.unwrap();
        for (x, expected) in [(1, CUresult::CUDA_SUCCESS), (2, CUresult::CUDA_ERROR_NOT_SUPPORTED)] {
            let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            let cluster = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y: 1, z: 1 };
            let value = sys::CUlaunchAttributeValue_union { clusterDim: cluster };
            let mut attribute = sys::CUlaunchAttribute_st { id, pad: [0; 4], value };
            let config = sys::CUlaunchConfig_st {
                gridDimX: 2,
                gridDimY: 1,
                gridDimZ: 1,
                blockDimX: 32,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: 0,
                hStream: std::ptr::null_mut(),
                attrs: &raw mut attribute,
                numAttrs: 1,
            };
            let mut zero = 0u64;
            let mut arguments = [(&raw mut zero).cast(); 4];
            // SAFETY: four arguments of at most eight bytes; the kernel has no elements to compute.
            let code = unsafe { sys::cuLaunchKernelEx(&config, kernel, arguments.as_mut_ptr(), std::ptr::null_mut()) };
            assert_eq!(code, expected, "a cluster of {x}");
        }
        context.synchronize().unwrap();
    });
}
