//! The choice of machine code: a value with a reason.

use crate::cpu::Cpu;
use crate::{Buffer, Error, Result};
use std::fmt;

/// Environment variable that forces a backend: `cpu`, `cpu:portable`.
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
                let why = "the portable CPU path is the only one in this build".to_owned();
                Ok((Self::Cpu(Cpu::portable()), Why(why)))
            }
        }
    }

    fn named(name: &str) -> Result<Self> {
        match name {
            "cpu" | "cpu:portable" => Ok(Self::Cpu(Cpu::portable())),
            _ => Err(Error::Backend {
                requested: name.to_owned(),
                missing: "this build has `cpu` and `cpu:portable`".to_owned(),
                advice: format!("ask for one of those, or unset {BACKEND_VARIABLE}"),
            }),
        }
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
