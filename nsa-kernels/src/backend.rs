//! The choice of machine code: a value with a reason.

use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::cuda::memory::DeviceBuffer;
use crate::{Buffer, Error, Isa, Result};
use bytemuck::Pod;
use nsa_core::{DType, Element};
use std::ffi::OsStr;
use std::fmt;

/// Environment variable that forces a backend: `cpu` with the best instruction set of the machine, `cpu:NAME` with
/// the one of that [name](Isa::name), `cuda` for the first NVIDIA GPU, or `cuda:N` for the one of that number.
pub const BACKEND_VARIABLE: &str = "NSA_BACKEND";

/// Environment variable that sets the number of threads: a positive whole number; 0 or nothing takes one a core.
pub const THREADS_VARIABLE: &str = "RAYON_NUM_THREADS";

/// Checks [`THREADS_VARIABLE`] for a program that is about to start: the thread pool passes over a value that it cannot read
/// and takes every core.
///
/// # Errors
/// If the value is no whole number.
pub fn check_threads_variable() -> Result<()> {
    std::env::var_os(THREADS_VARIABLE).map_or(Ok(()), |value| check_threads(&value))
}

/// Threads to compute with, at most: where the system has no room for more, starting them never ends.
pub const MOST_THREADS: usize = 4096;

fn check_threads(value: &OsStr) -> Result<()> {
    let number = value.to_str().and_then(|text| text.parse::<usize>().ok());
    if value.is_empty() || number.is_some_and(|threads| threads <= MOST_THREADS) {
        return Ok(());
    }
    let rule = "must be a positive whole number up to 4096; 0 or nothing takes one thread a core";
    Err(Error::Variable { variable: THREADS_VARIABLE, value: value.to_string_lossy().into_owned(), rule })
}

/// What runs the operations.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Backend {
    /// The host's processor.
    Cpu(Cpu),
    /// An NVIDIA GPU.
    Cuda(Cuda),
}

/// Why a backend was chosen, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Why(String);

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Backend {
    /// Chooses: what `request` names, else what the environment variable `NSA_BACKEND` names, else the best there is.
    ///
    /// # Errors
    /// If the backend asked for is unknown or not available; there is no silent fallback.
    pub fn pick(request: Option<&str>) -> Result<(Self, Why)> {
        let variable = std::env::var(BACKEND_VARIABLE).ok().filter(|value| !value.is_empty());
        match (request, variable) {
            (Some(name), _) => Ok((Self::named(name)?, Why(format!("`{name}` was asked for")))),
            (None, Some(name)) => Ok((Self::named(&name)?, Why(format!("{BACKEND_VARIABLE}={name} forces it")))),
            (None, None) => {
                let isa = Isa::best();
                let more = Isa::available().filter_map(|isa| Some(format!("; not {isa}: {}", isa.slower()?)));
                let why = format!("{isa} is the best that this processor has a path for{}", more.collect::<String>());
                Ok((Self::with_isa(isa)?, Why(why)))
            }
        }
    }

    /// Runs `work`, which calls many operations, where they are started the fastest: on the CPU in a thread of the pool, which
    /// other threads need not be told of at every operation.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match self {
            Self::Cpu(_) => rayon::scope(|_| work()),
            Self::Cuda(_) => work(),
        }
    }

    /// Waits until all work given to it is done. Operations on the CPU are when they return.
    ///
    /// # Errors
    /// What went wrong in work on a device.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Self::Cpu(_) => Ok(()),
            Self::Cuda(cuda) => cuda.synchronize(),
        }
    }

    fn named(name: &str) -> Result<Self> {
        let unknown = || {
            let isas: Vec<String> = Isa::ALL.iter().map(|isa| format!("`cpu:{isa}`")).collect();
            Error::Backend {
                requested: name.to_owned(),
                missing: format!(
                    "this build has `cpu` (the best of the following), {}, `cuda` and `cuda:N`",
                    isas.join(", ")
                ),
                advice: format!("ask for one of those, or unset {BACKEND_VARIABLE}"),
            }
        };
        match name.split_once(':') {
            None if name == "cpu" => Self::with_isa(Isa::best()),
            None if name == "cuda" => Self::cuda(0),
            Some(("cpu", isa)) => Self::with_isa(Isa::named(isa).ok_or_else(unknown)?),
            Some(("cuda", ordinal)) => Self::cuda(ordinal.parse().map_err(|_| unknown())?),
            _ => Err(unknown()),
        }
    }

    /// NVIDIA GPU number `ordinal`.
    ///
    /// # Errors
    /// If there is no driver, no such device, or it is too old.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Cuda::new(ordinal).map(Self::Cuda)
    }

    /// The host's processor with an instruction set.
    ///
    /// # Errors
    /// If the processor lacks it.
    pub fn with_isa(isa: Isa) -> Result<Self> {
        Cpu::new(isa).map(Self::Cpu).map_err(|missing| Error::Backend {
            requested: format!("cpu:{isa}"),
            missing: format!("this processor lacks {}", missing.join(", ")),
            advice: format!("ask for `cpu:{}`, the best that it has", Isa::best()),
        })
    }

    /// The type that what is computed (probabilities, gradients) is rounded to before it is multiplied with tensors of this
    /// type.
    pub fn operand_type(&self, storage: DType) -> DType {
        match (self, storage) {
            (Self::Cpu(_) | Self::Cuda(_), DType::F64) => DType::F64,
            (Self::Cpu(cpu), _) if cpu.multiplies_pairs(storage) => DType::Bf16,
            (Self::Cpu(_), _) => DType::F32,
            // Tensor cores multiply operands of one type.
            (Self::Cuda(_), storage) => storage,
        }
    }

    /// Checks that there are kernels for tensors of type `T`, before anything is computed.
    ///
    /// # Errors
    /// If there are none.
    pub fn check_type<T: Element>(&self) -> Result<()> {
        match self {
            Self::Cpu(_) => Ok(()),
            Self::Cuda(cuda) => cuda.check_type::<T>("Backend::check_type"),
        }
    }

    /// The backend's name, as `pick` takes it.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu(cpu) => format!("cpu:{}", cpu.isa()),
            Self::Cuda(cuda) => cuda.name(),
        }
    }

    /// Whether operations take tensors in the host's memory, such as mapped files; else tensors are in buffers of this backend
    /// alone.
    pub fn computes_in_host_memory(&self) -> bool {
        matches!(self, Self::Cpu(_))
    }

    /// A zeroed buffer of `len` elements in this backend's memory.
    /// If a device has too little memory, using the buffer is that error.
    pub fn alloc<T: Pod>(&self, len: usize) -> Buffer<T> {
        match self {
            Self::Cpu(_) => Buffer::from_host(vec![T::zeroed(); len]),
            Self::Cuda(cuda) => Buffer::from_device(DeviceBuffer::zeros(cuda, len)),
        }
    }

    /// A buffer with a copy of `data` in this backend's memory.
    /// If a device has too little memory, using the buffer is that error.
    pub fn upload<T: Pod>(&self, data: &[T]) -> Buffer<T> {
        match self {
            Self::Cpu(_) => Buffer::from_host(data.to_vec()),
            Self::Cuda(cuda) => Buffer::from_device(DeviceBuffer::upload(cuda, data)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_available_path_is_picked_by_its_name() {
        for isa in Isa::available() {
            let name = format!("cpu:{isa}");
            let (backend, why) = Backend::pick(Some(&name)).unwrap();
            assert_eq!((backend.name(), why.to_string()), (name.clone(), format!("`{name}` was asked for")));
        }
        assert_eq!(Backend::pick(Some("cpu")).unwrap().0.name(), format!("cpu:{}", Isa::best()));
    }

    #[test]
    fn what_is_not_there_is_an_error_that_says_what_to_ask_for() {
        for name in ["gpu", "cpu:", "cpu:sse9", "CPU", "cpu:avx2:"] {
            let error = Backend::pick(Some(name)).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("`cpu:avx2`"), "{error}");
        }
        for isa in Isa::ALL.into_iter().filter(|isa| !isa.missing().is_empty()) {
            let error = Backend::with_isa(isa).unwrap_err().to_string();
            assert!(error.contains(isa.missing()[0]) && error.contains(&Isa::best().to_string()), "{error}");
        }
    }

    #[test]
    fn a_gpu_is_there_or_the_error_says_what_to_do() {
        match Backend::pick(Some("cuda")) {
            Ok((backend, _)) => assert_eq!(backend.name(), "cuda:0"),
            Err(error) => {
                let text = error.to_string();
                assert!(text.starts_with("backend `cuda:0` is not available: ") && text.contains("; "), "{text}");
            }
        }
        let error = Backend::pick(Some("cuda:first")).unwrap_err().to_string();
        assert!(error.contains("`cuda:N`"), "{error}");
    }

    #[test]
    fn probabilities_are_rounded_where_pairs_are_multiplied() {
        for isa in Isa::available() {
            let backend = Backend::with_isa(isa).unwrap();
            let bf16 = if isa == Isa::Avx512Bf16 { DType::Bf16 } else { DType::F32 };
            let types = [DType::F64, DType::F32, DType::F16, DType::Bf16].map(|t| backend.operand_type(t));
            assert_eq!(types, [DType::F64, DType::F32, DType::F32, bf16], "{isa}");
        }
    }

    #[test]
    fn numbers_of_threads_are_whole_numbers() {
        for value in ["", "0", "1", "16", "4096"] {
            assert_eq!(check_threads(OsStr::new(value)), Ok(()), "{value}");
        }
        for value in ["abc", "-1", "1.5", " 2", "2 ", "4097", "99999999999999999999"] {
            let error = check_threads(OsStr::new(value)).unwrap_err().to_string();
            let start = format!("environment variable RAYON_NUM_THREADS = `{value}`: must be a positive whole number");
            assert!(error.starts_with(&start), "{error}");
        }
    }
}
