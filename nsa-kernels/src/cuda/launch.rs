//! The only place that launches kernels.

use super::geometry::Geometry;
use super::params::{Cpp, Grad, In, Out, Params, Stored, Weight};
use super::program::{Constants, Program};
use super::workspace::Scratch;
use super::{Cuda, failed};
use crate::{Error, Result, Tensor, TensorMut};
use bytemuck::Pod;
use cudarc::driver::sys::{CUfunction_attribute_enum as FunctionAttribute, cudaError_enum};
use cudarc::driver::{CudaFunction, CudaModule, LaunchConfig, PushKernelArg};
use nsa_core::{DType, Element};
use std::any::TypeId;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

/// The kernels that this process has loaded: by program, constants and name.
#[derive(Debug, Default)]
pub(super) struct Modules {
    modules: Mutex<HashMap<(&'static str, Constants), Arc<CudaModule>>>,
    kernels: Mutex<HashMap<Kernel, CudaFunction>>,
}

type Kernel = (&'static str, Constants, &'static str);

/// One call of an operation: checks its tensors, and launches kernels on them.
#[derive(Clone)]
pub(crate) struct Call<'c> {
    cuda: &'c Cuda,
    op: &'static str,
    constants: Constants,
}

/// A type name of kernels and the types of Rust that it stands for.
pub(crate) trait Names: 'static {
    /// Whether tensors of type `U` are that type in a call with these constants.
    fn fits<U: 'static>(constants: &Constants) -> bool;
}

macro_rules! named {
    ($($name:ty),*) => {
        $(impl Names for $name {
            fn fits<U: 'static>(constants: &Constants) -> bool {
                constants.dtype(<$name>::NAME).is_some_and(|dtype| type_of(dtype) == TypeId::of::<U>())
            }
        })*
    };
}

named!(Stored, Weight, Grad);

macro_rules! plain {
    ($($t:ty),*) => {
        $(impl Names for $t {
            fn fits<U: 'static>(_: &Constants) -> bool {
                TypeId::of::<U>() == TypeId::of::<$t>()
            }
        })*
    };
}

plain!(f32, f64, i32, u32, i64, u64);

impl Cuda {
    /// Checks that there are kernels for tensors of type `T`.
    pub(crate) fn check_type<T: Element>(&self, op: &'static str) -> Result<()> {
        if T::DTYPE != DType::F64 {
            return Ok(());
        }
        let (backend, what) = (self.name(), "tensors of f64".to_owned());
        Err(Error::Unsupported { op, backend, what, advice: "use f32, bf16 or f16, or the backend `cpu`" })
    }
}

fn type_of(dtype: DType) -> TypeId {
    match dtype {
        DType::Bf16 => TypeId::of::<half::bf16>(),
        DType::F16 => TypeId::of::<half::f16>(),
        DType::F32 => TypeId::of::<f32>(),
        DType::F64 => TypeId::of::<f64>(),
    }
}

impl<'c> Call<'c> {
    /// A call of `op` on tensors of type `T`.
    ///
    /// # Errors
    /// If there are no kernels for that type.
    pub(crate) fn new<T: Element>(cuda: &'c Cuda, op: &'static str) -> Result<Self> {
        cuda.check_type::<T>(op)?;
        Ok(Self { cuda, op, constants: Constants::new(T::DTYPE) })
    }

    /// With the type of `K`'s name, of the same call.
    ///
    /// # Errors
    /// If there are no kernels for that type.
    pub(crate) fn with_type<T: Element, K: Cpp>(self) -> Result<Self> {
        self.cuda.check_type::<T>(self.op)?;
        Ok(self.constants(|constants| constants.with_type(K::NAME, T::DTYPE)))
    }

    /// The same call with more constants, beside this one.
    pub(crate) fn again(&self, more: impl FnOnce(Constants) -> Constants) -> Self {
        Self { cuda: self.cuda, op: self.op, constants: more(self.constants.clone()) }
    }

    /// A call of the same operation on tensors of another type.
    pub(crate) fn of_type(&self, dtype: DType) -> Self {
        Self { cuda: self.cuda, op: self.op, constants: Constants::new(dtype) }
    }

    /// The operation.
    pub(crate) fn op(&self) -> &'static str {
        self.op
    }

    /// The device.
    pub(crate) fn cuda(&self) -> &'c Cuda {
        self.cuda
    }

    /// With more constants.
    pub(crate) fn constants(mut self, more: impl FnOnce(Constants) -> Constants) -> Self {
        self.constants = more(self.constants);
        self
    }

    /// The address of a tensor that kernels read.
    ///
    /// # Errors
    /// If it is not in this device's memory, or has gaps.
    pub(crate) fn input<U, K, const N: usize>(&self, arg: &str, tensor: &Tensor<'_, U, N>) -> Result<In<K>>
    where
        U: 'static,
        K: Names,
    {
        assert!(K::fits::<U>(&self.constants), "{}: `{arg}` has another type in the kernel", self.op);
        self.address(arg, tensor).map(|address| In(address, PhantomData))
    }

    /// The address of a tensor that is read.
    ///
    /// # Errors
    /// If it is not in this device's memory, or has gaps.
    pub(crate) fn address<U, const N: usize>(&self, arg: &str, tensor: &Tensor<'_, U, N>) -> Result<u64> {
        if !tensor.layout().is_contiguous() {
            return Err(Error::Unsupported {
                op: self.op,
                backend: self.cuda.name(),
                what: format!("`{arg}` of strides {:?}", tensor.layout().strides()),
                advice: "copy it to memory without gaps",
            });
        }
        Ok(tensor.mem().on_device(self.op, arg, self.cuda)?.address())
    }

    /// The address of a tensor that kernels write.
    ///
    /// # Errors
    /// If it is not in this device's memory.
    pub(crate) fn output<U, K, const N: usize>(&self, arg: &str, tensor: &mut TensorMut<'_, U, N>) -> Result<Out<K>>
    where
        U: 'static,
        K: Names,
    {
        assert!(K::fits::<U>(&self.constants), "{}: `{arg}` has another type in the kernel", self.op);
        self.address_mut(arg, tensor).map(|address| Out(address, PhantomData))
    }

    /// The address of a tensor that is written.
    ///
    /// # Errors
    /// If it is not in this device's memory.
    pub(crate) fn address_mut<U, const N: usize>(&self, arg: &str, tensor: &mut TensorMut<'_, U, N>) -> Result<u64> {
        tensor.device_address(self.op, arg, self.cuda)
    }

    /// The address of an argument that may be absent: 0 then.
    ///
    /// # Errors
    /// As `input`.
    pub(crate) fn optional_input<U, K, const N: usize>(
        &self,
        arg: &str,
        tensor: Option<&Tensor<'_, U, N>>,
    ) -> Result<In<K>>
    where
        U: 'static,
        K: Names,
    {
        tensor.map_or(Ok(In::none()), |tensor| self.input(arg, tensor))
    }

    /// The address of an output that may be absent: 0 then.
    ///
    /// # Errors
    /// As `output`.
    pub(crate) fn optional_output<U, K, const N: usize>(
        &self,
        arg: &str,
        tensor: Option<&mut TensorMut<'_, U, N>>,
    ) -> Result<Out<K>>
    where
        U: 'static,
        K: Names,
    {
        tensor.map_or(Ok(Out(0, PhantomData)), |tensor| self.output(arg, tensor))
    }

    /// Memory for the call alone.
    ///
    /// # Errors
    /// If the device has too little.
    pub(crate) fn workspace<U: Pod>(&self, len: usize) -> Result<Scratch<U>> {
        Scratch::unwritten(self.cuda, len)
    }

    /// The same, of zeros.
    ///
    /// # Errors
    /// If the device has too little.
    pub(crate) fn zeros<U: Pod>(&self, len: usize) -> Result<Scratch<U>> {
        Scratch::zeros(self.cuda, len)
    }

    /// A copy of the host's elements for the call to read.
    ///
    /// # Errors
    /// If the device has too little memory.
    pub(crate) fn upload<U: Pod>(&self, data: &[U]) -> Result<Scratch<U>> {
        Scratch::upload(self.cuda, data)
    }

    /// Launches a kernel of the program, if there is anything to do. `params` must be the struct that the kernel takes, and
    /// hold addresses of tensors that are as large as the kernel's constants and the struct's numbers say.
    ///
    /// # Errors
    /// If the kernel cannot be compiled, loaded or launched.
    pub(crate) fn launch<P: Params>(
        &self,
        program: &'static Program,
        kernel: &'static str,
        geometry: Geometry,
        params: P,
    ) -> Result<()> {
        if geometry.is_empty() {
            return Ok(());
        }
        let grid = geometry.grid.map(u32::try_from);
        let [Ok(x), Ok(y @ ..=0xffff), Ok(z @ ..=0xffff)] = grid else {
            let message = format!("{kernel}: a grid of {:?} blocks is more than a device takes", geometry.grid);
            return Err(Error::Device { op: self.op.to_owned(), message });
        };
        let function = self.kernel(program, kernel)?;
        let config = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (geometry.threads, 1, 1),
            shared_mem_bytes: geometry.shared_bytes,
        };
        let argument = Argument(params);
        let stream = self.cuda.target();
        let mut builder = stream.launch_builder(&function);
        builder.arg(&argument);
        // SAFETY: the struct is the kernel's, whose C++ declaration is made from it with assertions on its layout; its
        // addresses come from `input` and `output`, which hold borrows of memory on this stream, whose sizes the operation's
        // face checked against those that the kernel is given.
        let launched = unsafe { builder.launch(config) };
        launched.map_err(|error| self.failed(kernel, &error))?;
        Ok(())
    }

    fn failed(&self, kernel: &str, error: &cudarc::driver::DriverError) -> Error {
        failed(&format!("{}, kernel {kernel}", self.op), error)
    }

    fn kernel(&self, program: &'static Program, kernel: &'static str) -> Result<CudaFunction> {
        let modules = &self.cuda.inner.modules;
        let key = (program.file, self.constants.clone(), kernel);
        let lock = || modules.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = lock().get(&key) {
            return Ok(function.clone());
        }
        let module = self.module(program)?;
        let load = || {
            let function = module.load_function(kernel)?;
            // All that the device has: launches of other threads may need more than this one.
            let of_kernel = function.get_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
            let most = i32::try_from(self.cuda.device().shared_bytes).unwrap_or(i32::MAX) - of_kernel;
            function.set_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)?;
            Ok(function)
        };
        let function = load().map_err(|error| self.failed(kernel, &error))?;
        lock().insert(key, function.clone());
        Ok(function)
    }

    fn module(&self, program: &'static Program) -> Result<Arc<CudaModule>> {
        let modules = &self.cuda.inner.modules;
        let key = (program.file, self.constants.clone());
        let lock = || modules.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = lock().get(&key) {
            return Ok(module.clone());
        }
        // Not under the lock: others may need modules that are there.
        let ptx = self.cuda.compiler().ptx(program, &self.constants)?;
        let module = self.cuda.stream().context().load_module(ptx.into()).map_err(|error| {
            let mut failure = failed(&format!("loading {}", program.file), &error);
            if let (cudaError_enum::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, Error::Device { message, .. }) =
                (error.0, &mut failure)
            {
                message
                    .push_str(": NVRTC is newer than the driver; update the driver, or install NVRTC of its version");
            }
            failure
        })?;
        Ok(lock().entry(key).or_insert(module).clone())
    }
}

/// A struct of arguments as the driver takes it.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Argument<P>(P);

// SAFETY: a struct of `params!` holds addresses and numbers as the kernel declares them.
unsafe impl<P: Params> cudarc::driver::DeviceRepr for Argument<P> {}
