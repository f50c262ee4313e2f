//! Kernels become PTX through NVRTC, once: results are kept on disk, under a name made of everything that they depend on
//! (text, options, version of NVRTC).
//!
//! The folder is the one that `NSA_CUDA_CACHE` names, else `nsa/cuda` in the user's cache folder (`XDG_CACHE_HOME`,
//! `~/.cache`, `%LOCALAPPDATA%`). Files are written under a temporary name and renamed, so that several processes may
//! share it; a file that does not hold what it says is compiled again. It may be deleted at any time. Where there is no such
//! folder or it cannot be written, each process compiles for itself.

use super::cache::Cache;
use super::library::{self, Nvrtc};
use super::program::{Constants, Program};
use crate::{Error, Result};
use cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};
use std::path::Path;
use std::sync::OnceLock;

pub use super::cache::CACHE_VARIABLE;

/// Compiles kernels for a compute capability. NVRTC is loaded when the first kernel needs it.
#[derive(Debug)]
pub struct Compiler {
    capability: (i32, i32),
    nvrtc: OnceLock<Result<Nvrtc>>,
    cache: Cache,
}

impl Compiler {
    /// For devices of a compute capability, with the cache that the environment names.
    pub fn new(capability: (i32, i32)) -> Self {
        Self { capability, nvrtc: OnceLock::new(), cache: Cache::of_environment() }
    }

    /// The folder of compiled kernels, if there is one.
    pub fn cache_folder(&self) -> Option<&Path> {
        self.cache.folder()
    }

    /// The version of NVRTC.
    ///
    /// # Errors
    /// If it is not there; the error says what to do.
    pub fn version(&self) -> Result<(i32, i32)> {
        Ok(self.nvrtc()?.version)
    }

    fn nvrtc(&self) -> Result<&Nvrtc> {
        self.nvrtc.get_or_init(library::nvrtc).as_ref().map_err(Clone::clone)
    }

    /// The architecture to compile for, such as `compute_80`: the newest up to the device's that NVRTC knows, whose PTX later
    /// devices run too; but the oldest for devices from 8.0 to 9.0, which share compiled kernels so: their PTX is the same, save that
    /// of kernels whose warps multiply together (`warpgroups`), which is for 9.0 alone.
    ///
    /// # Errors
    /// If NVRTC is not there or knows none that fits.
    pub fn arch(&self, warpgroups: bool) -> Result<String> {
        let nvrtc = self.nvrtc()?;
        let wanted = self.capability.0 * 10 + self.capability.1;
        // The versions before know 9.0, but not what it alone has.
        let knows = !warpgroups || nvrtc.version >= (12, 0);
        arch(&nvrtc.archs, wanted, warpgroups).filter(|_| knows).ok_or_else(|| Error::Backend {
            requested: "cuda".to_owned(),
            missing: format!(
                "NVRTC {}.{} compiles for none of sm_{} to sm_{wanted}{}",
                nvrtc.version.0,
                nvrtc.version.1,
                if warpgroups { wanted } else { 80 },
                if warpgroups { "a" } else { "" }
            ),
            advice: "install NVRTC of CUDA 11 to 13 (for sm_90a 12 or 13), whose version fits the device".to_owned(),
        })
    }

    /// The program's PTX with these constants, from the cache or compiled now.
    ///
    /// # Errors
    /// If NVRTC is not there or refuses the text.
    pub fn ptx(&self, program: &Program, constants: &Constants) -> Result<String> {
        let source = program.source(constants);
        let options = options(&self.arch(constants.warpgroups())?);
        let (major, minor) = self.version()?;
        let key = [source.as_str(), &options.join(" "), &format!("NVRTC {major}.{minor}")];
        if let Some(ptx) = self.cache.get(&key) {
            return Ok(ptx);
        }
        let start = std::time::Instant::now();
        let ptx = compile(program.file, &source, options)?;
        tracing::debug!(file = program.file, seconds = start.elapsed().as_secs_f64(), "compiled");
        self.cache.put(&key, &ptx);
        Ok(ptx)
    }
}

/// Of those that are `known`, ascending.
fn arch(known: &[i32], wanted: i32, warpgroups: bool) -> Option<String> {
    if warpgroups {
        return (wanted == 90 && known.contains(&90)).then(|| "compute_90a".to_owned());
    }
    let mut fitting = known.iter().filter(|&&arch| (80..=wanted).contains(&arch));
    let found = if wanted <= 90 { fitting.next() } else { fitting.next_back() };
    found.map(|arch| format!("compute_{arch}"))
}

/// NVRTC's options. Its defaults: division and roots are rounded as IEEE 754 asks, products and sums may be fused. Functions
/// without a word for where they run, such as lambdas, run on the device.
fn options(arch: &str) -> Vec<String> {
    let arch = format!("--gpu-architecture={arch}");
    ["--std=c++17", &arch, "-lineinfo", "--device-as-default-execution-space"].map(str::to_owned).to_vec()
}

fn compile(file: &str, source: &str, options: Vec<String>) -> Result<String> {
    let options = CompileOptions { options, name: Some(file.to_owned()), ..CompileOptions::default() };
    compile_ptx_with_opts(source, options).map(|ptx| ptx.to_src()).map_err(|error| {
        let message = match error {
            CompileError::CompileError { log, .. } => log.to_string_lossy().trim().to_owned(),
            other => other.to_string(),
        };
        Error::Device { op: format!("compiling {file}"), message }
    })
}

#[cfg(test)]
mod tests {
    use super::arch;

    #[test]
    fn devices_up_to_9_0_share_what_is_not_for_it_alone() {
        let known = [75, 80, 86, 89, 90, 100];
        let found = |wanted| arch(&known, wanted, false);
        for device in [80, 86, 87, 90] {
            assert_eq!(found(device).as_deref(), Some("compute_80"));
        }
        assert_eq!(found(103).as_deref(), Some("compute_100"));
        assert_eq!(arch(&[70, 75], 80, false), None);
        assert_eq!(arch(&[80, 90], 120, false).as_deref(), Some("compute_90"));
        assert_eq!(arch(&known, 90, true).as_deref(), Some("compute_90a"));
        assert_eq!(arch(&[80, 86], 90, true), None);
        assert_eq!(arch(&known, 100, true), None);
    }
}
