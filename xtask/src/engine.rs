//! What runs a command's operations: the reference, or a backend of `nsa-kernels`.

use anyhow::{Result, anyhow, bail, ensure};
use clap::{Args, ValueEnum};
use nsa_kernels::backend::BACKEND_VARIABLE;
use nsa_kernels::{Backend, Isa};
use nsa_tests::sim;
use std::str::FromStr;

/// The options that choose it.
#[derive(Args, Clone, Debug)]
pub struct Choice {
    /// What computes; without it: what NSA_BACKEND names, else the best backend there is
    #[arg(long, value_enum)]
    pub backend: Option<Kind>,
    /// Instruction set of the CPU backend; without it: the best there is
    #[arg(long, value_enum)]
    pub isa: Option<IsaName>,
    /// Which GPU: its number, or `sim` for the simulator as an H100, `sim:a100` as an A100; needs --backend cuda
    #[arg(long, value_name = "N|sim")]
    pub device: Option<Device>,
}

/// What the CUDA backend runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The GPU of that number.
    Gpu(usize),
    /// The simulator, as a GPU of that name.
    Simulated(&'static str),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "sim" | "sim:h100" => Ok(Self::Simulated("h100")),
            "sim:a100" => Ok(Self::Simulated("a100")),
            number => number.parse().map(Self::Gpu).map_err(|_| "a number, `sim`, `sim:a100` or `sim:h100`".to_owned()),
        }
    }
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
    /// Runs this command again in a process whose libcuda is the simulator, if that is the device asked for and this is
    /// not that process. Whether it did.
    ///
    /// # Errors
    /// If the command fails there.
    pub fn ran_on_simulator(&self) -> Result<bool> {
        let Some(Device::Simulated(name)) = self.device else { return Ok(false) };
        if sim::inside() {
            return Ok(false);
        }
        self.check_device()?;
        let mut command = sim::this_program().map_err(|message| anyhow!(message))?;
        let status = command.args(std::env::args_os().skip(1)).env("CUDA_SIM_DEVICE", name).status()?;
        ensure!(status.success(), "the run on the simulator failed");
        Ok(true)
    }

    fn check_device(&self) -> Result<()> {
        ensure!(self.device.is_none() || self.backend == Some(Kind::Cuda), "--device needs --backend cuda");
        Ok(())
    }

    /// The engine asked for, and why it is this one.
    pub fn engine(&self) -> Result<(Engine, String)> {
        self.check_device()?;
        let variable = std::env::var(BACKEND_VARIABLE).unwrap_or_default();
        match (self.backend, self.isa) {
            (Some(kind @ (Kind::Ref | Kind::Cuda)), Some(isa)) => {
                let kind = if kind == Kind::Ref { "ref" } else { "cuda" };
                bail!("--isa {} does not fit --backend {kind}: instruction sets are the CPU backend's", isa.name())
            }
            (Some(Kind::Ref), None) => Ok((Engine::Reference, "`ref` was asked for".to_owned())),
            (None, None) if variable == "ref" => Ok((Engine::Reference, format!("{BACKEND_VARIABLE}=ref forces it"))),
            (Some(Kind::Cuda), None) => match self.device {
                Some(Device::Gpu(number)) => kernels(Some(&format!("cuda:{number}"))),
                Some(Device::Simulated(_)) | None => kernels(Some("cuda")),
            },
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
