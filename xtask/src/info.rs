//! `cargo xtask info`: what this machine has, which backend would run and why.

use crate::machine::{self, Machine};
use anyhow::Result;
use nsa_core::units::Bytes;
use nsa_kernels::cuda::Device;
use nsa_kernels::cuda::compile::CACHE_VARIABLE;
use nsa_kernels::{Backend, Cuda, Isa};

/// Runs the command.
///
/// # Errors
/// If NSA_BACKEND names a backend that is not there.
pub fn run() -> Result<()> {
    let machine = Machine::here();
    let size = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), |bytes| Bytes(bytes).to_string());
    println!("processor   {} ({})", machine.cpu, std::env::consts::ARCH);
    println!("threads     {} (RAYON_NUM_THREADS sets them)", machine.threads);
    println!("memory      {}, {} available", size(machine.memory_bytes), size(machine.available_bytes));
    let (found, missing): (Vec<_>, Vec<_>) = machine::features().into_iter().partition(|(_, there)| *there);
    let names = |list: Vec<(&str, bool)>| match list.is_empty() {
        true => "none".to_owned(),
        false => list.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" "),
    };
    println!("features    {}; not there: {}", names(found), names(missing));
    for isa in Isa::ALL {
        let missing = isa.missing();
        let state = match (missing.is_empty(), isa.slower()) {
            (true, None) => "there".to_owned(),
            (true, Some(why)) => format!("there, taken only if asked for: {why}"),
            (false, _) => format!("lacks {}", missing.join(" ")),
        };
        println!("path        cpu:{isa}: {state}");
    }
    cuda();
    println!("commit      {}", machine.commit);
    let (backend, why) = Backend::pick(None)?;
    println!("backend     {}: {why}", backend.name());
    Ok(())
}

/// A GPU in one line.
pub fn device_line(device: &Device) -> String {
    let ((major, minor), (driver, minor_driver)) = (device.capability, device.driver);
    format!(
        "{}, compute capability {major}.{minor}, {} multiprocessors, {}; driver for CUDA {driver}.{minor_driver}",
        device.name,
        device.multiprocessors,
        Bytes(device.memory_bytes as u64)
    )
}

/// What there is of CUDA, or what is missing and what to do.
fn cuda() {
    let cuda = match Cuda::new(0) {
        Err(error) => {
            println!("path        {error}");
            return;
        }
        Ok(cuda) => {
            println!("path        cuda:0: {}", device_line(cuda.device()));
            cuda
        }
    };
    let compiler = cuda.compiler();
    match (compiler.version(), compiler.arch(false)) {
        (Ok((major, minor)), Ok(arch)) => {
            let archs: Vec<_> = [Some(arch), compiler.arch(true).ok()].into_iter().flatten().collect();
            println!("NVRTC       {major}.{minor}, compiles for {}", archs.join(", "));
        }
        (Err(error), _) | (_, Err(error)) => println!("NVRTC       {error}"),
    }
    match compiler.cache_folder() {
        Some(folder) => println!("kernels     kept in {} ({CACHE_VARIABLE} sets it)", folder.display()),
        None => println!("kernels     not kept: neither {CACHE_VARIABLE} nor a user's cache folder is set"),
    }
}
