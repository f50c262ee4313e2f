//! What kernels take of a device: what ptxas says, or a bound where there is no ptxas.

use crate::code::Kernel;
use crate::toolchain::{Resources, Toolchain};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Registers of a multiprocessor.
const REGISTERS: u32 = 65536;
/// The most registers of a thread.
const MOST: u32 = 255;
/// The fewest that are assumed.
const FEWEST: u32 = 16;

/// What a thread and a CTA of a kernel take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread.
    pub local_bytes: u32,
}

/// The kernels of a module, assembled when somebody asks what they take.
#[derive(Debug)]
pub struct Assembled {
    source: String,
    arch: String,
    found: OnceLock<HashMap<String, Resources>>,
}

impl Assembled {
    /// Kernels of PTX text for a target on a device of a capability. Targets with a letter are for that device alone.
    pub fn new(source: &str, target: &str, (major, minor): (u32, u32)) -> Self {
        let own = target.ends_with(['a', 'f']);
        let arch = if own { target.to_owned() } else { format!("sm_{major}{minor}") };
        Self { source: source.to_owned(), arch, found: OnceLock::new() }
    }

    /// What a kernel takes.
    pub fn taken(&self, kernel: &Kernel) -> Taken {
        self.known(kernel).unwrap_or_else(|| bound(kernel))
    }

    /// What a kernel takes, where ptxas says it.
    pub fn known(&self, kernel: &Kernel) -> Option<Taken> {
        let found = self.found.get_or_init(|| self.assemble()).get(&kernel.name)?;
        Some(Taken { registers: found.registers, local_bytes: found.stack_bytes })
    }

    /// Asks ptxas. Where there is none, or it refuses, that is said once a module.
    fn assemble(&self) -> HashMap<String, Resources> {
        let folder = folder();
        let found = match Toolchain::find(&folder) {
            Some(toolchain) => {
                toolchain.resources(&self.source, &self.arch, &folder).map_err(|error| error.to_string())
            }
            None => Err(format!(
                "no ptxas in CUDA_HOME, CUDA_PATH, /usr/local/cuda or {} (CUDA_SIM_TOOLCHAIN)",
                folder.display()
            )),
        };
        let found = found.unwrap_or_else(|why| {
            eprintln!(
                "cuda-sim: registers and occupancy are bounds, from the registers that the PTX declares and the launch \
                 bounds: {}",
                why.trim()
            );
            Vec::new()
        });
        found.into_iter().map(|resources| (resources.kernel.clone(), resources)).collect()
    }
}

/// Where the toolchain lies that tests fetch, and where what ptxas said is kept.
fn folder() -> PathBuf {
    let usual = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/toolchain");
    std::env::var_os("CUDA_SIM_TOOLCHAIN").map_or_else(usual, PathBuf::from)
}

/// A bound without an assembler: the registers that the source declares, each used once, and no more than the launch bounds
/// leave a thread; an assembler nearly always takes fewer, so that occupancy is at least what this gives.
fn bound(kernel: &Kernel) -> Taken {
    let threads = kernel.required_threads.map(|size| size.iter().product()).or(kernel.max_threads).unwrap_or(1);
    let most = (REGISTERS / threads.clamp(1, REGISTERS) / 8 * 8).clamp(FEWEST, MOST);
    Taken { registers: kernel.declared_registers.clamp(FEWEST, most), local_bytes: kernel.local_bytes }
}
