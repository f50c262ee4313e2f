//! The choice of machine code: a value with a reason.

use crate::cpu::Cpu;
use crate::{Buffer, Error, Isa, Result};
use nsa_core::DType;
use std::fmt;

/// Environment variable that forces a backend: `cpu` with the best instruction set of the machine, or `cpu:NAME` with
/// the one of that [name](Isa::name).
pub const BACKEND_VARIABLE: &str = "NSA_BACKEND";

/// What runs the operations.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Backend {
    /// The host's processor.
    Cpu(Cpu),
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
                Ok((Self::with_isa(isa)?, Why(format!("{isa} is the best that this processor has a path for"))))
            }
        }
    }

    fn named(name: &str) -> Result<Self> {
        let isa = match name.split_once(':') {
            None if name == "cpu" => Some(Isa::best()),
            Some(("cpu", isa)) => Isa::named(isa),
            _ => None,
        };
        isa.map_or_else(
            || {
                let isas: Vec<String> = Isa::ALL.iter().map(|isa| format!("`cpu:{isa}`")).collect();
                Err(Error::Backend {
                    requested: name.to_owned(),
                    missing: format!("this build has `cpu` (the best of the following), {}", isas.join(", ")),
                    advice: format!("ask for one of those, or unset {BACKEND_VARIABLE}"),
                })
            },
            Self::with_isa,
        )
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

    /// The type that probabilities and the gradients of scores are rounded to before they are multiplied with tensors of
    /// this type.
    pub fn probability_type(&self, storage: DType) -> DType {
        match (self, storage) {
            (Self::Cpu(_), DType::F64) => DType::F64,
            (Self::Cpu(cpu), _) if cpu.multiplies_pairs(storage) => DType::Bf16,
            (Self::Cpu(_), _) => DType::F32,
        }
    }

    /// The type that gradients are rounded to before they are multiplied with matrices of this type.
    pub fn gradient_type(&self, storage: DType) -> DType {
        self.probability_type(storage)
    }

    /// The backend's name, as `pick` takes it.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu(cpu) => format!("cpu:{}", cpu.isa()),
        }
    }

    /// A zeroed buffer of `len` elements in this backend's memory.
    pub fn alloc<T: Copy + Default>(&self, len: usize) -> Buffer<T> {
        match self {
            Self::Cpu(_) => Buffer::from_host(vec![T::default(); len]),
        }
    }

    /// A buffer with a copy of `data` in this backend's memory.
    pub fn upload<T: Copy>(&self, data: &[T]) -> Buffer<T> {
        match self {
            Self::Cpu(_) => Buffer::from_host(data.to_vec()),
        }
    }
}
