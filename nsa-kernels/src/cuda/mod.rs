//! The CUDA backend: NVIDIA GPUs from compute capability 8.0 on (Ampere).
//!
//! Nothing of CUDA is needed to build or to start a program: the driver (`libcuda`), the compiler (`libnvrtc`) and
//! cuBLAS are loaded when a [`Cuda`] is made or needs them. Kernels are C++ texts in this library; the first call of an
//! operation compiles its kernel for the configuration's constants and the device, see [`compile`].
//!
//! All work of one [`Cuda`] goes to one stream, in order; tensors on other streams are refused. Operations do not wait
//! for the device: what goes wrong there is an error of the next call that does, such as
//! [`Buffer::read`](crate::Buffer::read).

pub mod ahead;
pub mod compile;
#[expect(unsafe_code, reason = "a graph is launched on another stream than it was recorded on")]
pub mod graph;
pub mod program;
pub mod workspace;

#[expect(unsafe_code, reason = "kernels get addresses and write to them")]
pub(crate) mod launch;
#[expect(unsafe_code, reason = "memory is made, and copied as bytes")]
pub(crate) mod memory;
pub(crate) mod params;

#[expect(unsafe_code, reason = "cuBLAS takes addresses")]
pub(crate) mod blas;
pub(crate) mod cmp;
pub(crate) mod compress;
pub mod decode;
pub(crate) mod dense;
pub(crate) mod gate;
pub(crate) mod geometry;
pub(crate) mod layer;
pub(crate) mod reduce;
pub(crate) mod slc;
pub(crate) mod win;

mod attention;
mod gradients;
mod placed;

mod cache;
#[expect(unsafe_code, reason = "asks which libraries there are, and NVRTC what it knows")]
mod library;
#[expect(unsafe_code, reason = "the driver takes addresses of sizes")]
pub(crate) mod tensor_map;

use crate::{Error, Result};
use blas::Blas;
use compile::Compiler;
use cudarc::driver::sys::{CUdevice_attribute_enum as Attribute, cudaError_enum};
use cudarc::driver::{CudaContext, CudaStream, DriverError};
use graph::Recording;
use launch::Modules;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::ThreadId;
use workspace::Lent;

/// The oldest compute capability that kernels are written for.
const OLDEST: (i32, i32) = (8, 0);

/// An NVIDIA GPU with a stream on it. Clones share everything.
#[derive(Clone)]
pub struct Cuda {
    inner: Arc<Inner>,
}

struct Inner {
    stream: Arc<CudaStream>,
    device: Device,
    compiler: Compiler,
    modules: Modules,
    blas: OnceLock<Arc<Blas>>,
    /// The workspaces that operations of threads are in, where they are in one.
    lent: Mutex<HashMap<ThreadId, Lent>>,
    /// What the first record made.
    recording: Mutex<Option<Arc<Recording>>>,
    /// See [`Cuda::limit_shares`].
    share_bytes: AtomicUsize,
}

/// What [`Cuda::limit_shares`] is at first: so many queries that each block of keys is read for many of them (2,048 of 16 heads that
/// select 16 blocks, with Dv = 128).
const SHARE_BYTES: usize = 260 << 20;

/// What a device is and has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Number of the device, as CUDA counts.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of memory.
    pub memory_bytes: usize,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// The most bytes of shared memory that a block can have.
    pub shared_bytes: usize,
    /// Version of CUDA that the driver supports.
    pub driver: (i32, i32),
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cuda").field("device", &self.inner.device).finish_non_exhaustive()
    }
}

impl Cuda {
    /// Device `ordinal` with a stream of its own.
    ///
    /// # Errors
    /// If there is no driver, no such device, or it is too old; the error says what to do.
    pub fn new(ordinal: usize) -> Result<Self> {
        let name = format!("cuda:{ordinal}");
        library::check_driver(&name)?;
        let count = CudaContext::device_count().map_err(|error| unavailable(&name, &error))?;
        if usize::try_from(count).is_ok_and(|count| ordinal >= count) {
            let missing = format!("the driver shows {count} device(s)");
            let advice =
                "ask for one of them, or look at CUDA_VISIBLE_DEVICES and at what `nvidia-smi` lists".to_owned();
            return Err(Error::Backend { requested: name, missing, advice });
        }
        let context = CudaContext::new(ordinal).map_err(|error| unavailable(&name, &error))?;
        let stream = memory::own_stream(&context).map_err(|error| unavailable(&name, &error))?;
        Self::on_stream(stream)
    }

    /// The device and stream of a caller that has them already.
    ///
    /// # Errors
    /// If the device is too old or does not answer.
    pub fn on_stream(stream: Arc<CudaStream>) -> Result<Self> {
        let name = format!("cuda:{}", stream.context().ordinal());
        let device = Device::of(stream.context()).map_err(|error| unavailable(&name, &error))?;
        if device.capability < OLDEST {
            let (major, minor) = device.capability;
            let missing = format!("{} has compute capability {major}.{minor}, kernels need 8.0", device.name);
            let advice = "use a GPU from Ampere on, or the backend `cpu`".to_owned();
            return Err(Error::Backend { requested: name, missing, advice });
        }
        let compiler = Compiler::new(device.capability);
        Ok(Self {
            inner: Arc::new(Inner {
                stream,
                device,
                compiler,
                modules: Modules::default(),
                blas: OnceLock::new(),
                lent: Mutex::default(),
                recording: Mutex::default(),
                share_bytes: AtomicUsize::new(SHARE_BYTES),
            }),
        })
    }

    /// The backend's name, as `Backend::pick` takes it.
    pub fn name(&self) -> String {
        format!("cuda:{}", self.inner.device.ordinal)
    }

    /// What the device is and has.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// Who makes products of matrices.
    pub(crate) fn unit(&self) -> geometry::Unit {
        geometry::Unit::of(self.device().capability)
    }

    /// Lets operations that keep shares of their outputs until these are joined, and can do so in runs of queries, take at most about
    /// so many bytes for the shares of a run, of memory or of a [`workspace`]; 260 MiB unless it is said. Selected attention of small
    /// groups does so. Clones take part.
    pub fn limit_shares(&self, bytes: usize) {
        self.inner.share_bytes.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn share_bytes(&self) -> usize {
        self.inner.share_bytes.load(Ordering::Relaxed)
    }

    /// The stream that all work goes to.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.inner.stream
    }

    /// Waits until the device has done all work given to it.
    ///
    /// # Errors
    /// What went wrong in that work.
    pub fn synchronize(&self) -> Result<()> {
        self.inner.stream.synchronize().map_err(|error| failed("Cuda::synchronize", &error))
    }

    /// The stream that this thread's work goes to: that, or one that records it.
    pub(crate) fn target(&self) -> Arc<CudaStream> {
        graph::target(self.stream())
    }

    /// cuBLAS on the stream that this thread's work goes to, and the device as the thread's, which cuBLAS asks for.
    fn blas(&self) -> Result<Arc<Blas>> {
        self.stream().context().bind_to_thread().map_err(|error| failed("cuBLAS", &error))?;
        if let Some(recording) = graph::recording(self.stream()) {
            return recording.blas();
        }
        if let Some(blas) = self.inner.blas.get() {
            return Ok(blas.clone());
        }
        // Where there is no memory now, there may be later.
        let opened = Blas::open(self, self.stream())?;
        Ok(self.inner.blas.get_or_init(|| opened).clone())
    }

    /// What compiles its kernels.
    pub fn compiler(&self) -> &Compiler {
        &self.inner.compiler
    }
}

impl Device {
    /// An A100 of 80 GB, for what is asked without one.
    pub fn a100() -> Self {
        Self {
            ordinal: 0,
            name: "NVIDIA A100-SXM4-80GB".to_owned(),
            capability: (8, 0),
            memory_bytes: 80 << 30,
            multiprocessors: 108,
            shared_bytes: 163 << 10,
            driver: (13, 0),
        }
    }

    /// An H100 of 80 GB, for what is asked without one.
    pub fn h100() -> Self {
        Self {
            name: "NVIDIA H100 80GB HBM3".to_owned(),
            capability: (9, 0),
            multiprocessors: 132,
            shared_bytes: 227 << 10,
            ..Self::a100()
        }
    }

    fn of(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        let number = |attribute| Ok(usize::try_from(context.attribute(attribute)?).unwrap_or(0));
        Ok(Self {
            ordinal: context.ordinal(),
            name: context.name()?,
            capability: context.compute_capability()?,
            memory_bytes: context.total_mem()?,
            multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            driver: library::driver_version()?,
        })
    }
}

/// What an error of the driver says.
fn words(error: &DriverError) -> String {
    match (error.error_name(), error.error_string()) {
        (Ok(name), Ok(text)) => format!("{} ({})", name.to_string_lossy(), text.to_string_lossy()),
        // A driver that does not start does not know its errors either.
        _ => format!("{:?}", error.0),
    }
}

/// The error for a device that cannot be used at all.
fn unavailable(name: &str, error: &DriverError) -> Error {
    let advice = if error.0 == cudaError_enum::CUDA_ERROR_STUB_LIBRARY {
        "the libcuda.so that was found is the toolkit's, for linking: take its folder `stubs` off LD_LIBRARY_PATH"
    } else {
        "see whether `nvidia-smi` lists the device; a driver that was just updated needs a restart"
    };
    Error::Backend {
        requested: name.to_owned(),
        missing: format!("the driver answers {}", words(error)),
        advice: advice.to_owned(),
    }
}

/// The error for something that the driver or the device refused in operation `op`.
pub(crate) fn failed(op: &str, error: &DriverError) -> Error {
    Error::Device { op: op.to_owned(), message: words(error) }
}
