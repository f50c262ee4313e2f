//! What runs a command's operations: the reference, or a backend of `nsa-kernels`.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use nsa_kernels::backend::BACKEND_VARIABLE;
use nsa_kernels::{Backend, Isa};

/// The options that choose it.
#[derive(Args, Clone, Debug)]
pub struct Choice {
    /// What computes; without it: what NSA_BACKEND names, else the best backend there is
    #[arg(long, value_enum)]
    pub backend: Option<Kind>,
    /// Instruction set of the CPU backend; without it: the best there is
    #[arg(long, value_enum)]
    pub isa: Option<IsaName>,
}

/// Names of `--backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The reference: plain loops in f64
    Ref,
    /// The host's processor
    Cpu,
    /// An NVIDIA GPU
    Cuda,
}

/// Names of `--isa`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IsaName {
    /// What every processor of the target has
    Portable,
    /// NEON of 64-bit ARM
    Neon,
    /// AVX2 and FMA
    Avx2,
    /// AVX-512: bf16 is widened
    Avx512,
    /// AVX-512 with BF16: bf16 is multiplied in pairs, p and dS rounded
    #[value(name = "avx512bf16")]
    Avx512Bf16,
}

impl IsaName {
    fn name(self) -> &'static str {
        let isa = match self {
            Self::Portable => Isa::Portable,
            Self::Neon => Isa::Neon,
            Self::Avx2 => Isa::Avx2,
            Self::Avx512 => Isa::Avx512,
            Self::Avx512Bf16 => Isa::Avx512Bf16,
        };
        isa.name()
    }
}

/// The reference or a backend.
#[derive(Clone, Debug)]
pub enum Engine {
    /// `nsa-ref`.
    Reference,
    /// `nsa-kernels`.
    Kernels(Backend),
}

impl Choice {
    /// The engine asked for, and why it is this one.
    pub fn engine(&self) -> Result<(Engine, String)> {
        let variable = std::env::var(BACKEND_VARIABLE).unwrap_or_default();
        match (self.backend, self.isa) {
            (Some(kind @ (Kind::Ref | Kind::Cuda)), Some(isa)) => {
                let kind = if kind == Kind::Ref { "ref" } else { "cuda" };
                bail!("--isa {} does not fit --backend {kind}: instruction sets are the CPU backend's", isa.name())
            }
            (Some(Kind::Ref), None) => Ok((Engine::Reference, "`ref` was asked for".to_owned())),
            (None, None) if variable == "ref" => Ok((Engine::Reference, format!("{BACKEND_VARIABLE}=ref forces it"))),
            (Some(Kind::Cuda), None) => kernels(Some("cuda")),
            (Some(Kind::Cpu), None) => kernels(Some("cpu")),
            (None | Some(Kind::Cpu), Some(isa)) => kernels(Some(&format!("cpu:{}", isa.name()))),
            (None, None) => kernels(None),
        }
    }
}

fn kernels(request: Option<&str>) -> Result<(Engine, String)> {
    let (backend, why) = Backend::pick(request)?;
    Ok((Engine::Kernels(backend), why.to_string()))
}

impl Engine {
    /// Its name, as options and NSA_BACKEND take it.
    pub fn name(&self) -> String {
        match self {
            Self::Reference => "ref".to_owned(),
            Self::Kernels(backend) => backend.name(),
        }
    }
}
