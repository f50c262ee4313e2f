//! The CUDA backend without a GPU: processes whose libcuda is the simulator.

use cuda_sim::toolchain::Toolchain;
use nsa_kernels::{Backend, Buffer};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Marks a process whose libcuda is the simulator.
pub const INSIDE: &str = "NSA_ON_SIMULATOR";

/// Whether this process's libcuda is the simulator.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Whether the test that runs here on the simulator has run as another device already.
pub fn again() -> bool {
    std::env::var_os(INSIDE).is_some_and(|value| value == AGAIN)
}

/// What [`INSIDE`] holds then.
const AGAIN: &str = "again";

/// A command that runs this program again on the simulator: with the simulator as libcuda and libcublas, the pinned NVRTC
/// (fetched below `target` if the machine has no CUDA toolkit), compiled kernels kept below `target`.
///
/// # Errors
/// If the simulator's library does not lie beside the program, or there is no NVRTC and it cannot be fetched.
pub fn this_program() -> Result<Command, String> {
    let text = |error: std::io::Error| error.to_string();
    let program = std::env::current_exe().map_err(text)?;
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let toolchain = toolchain()?;
    let folder = libraries(&program, &target).map_err(text)?;
    let paths = [Some(folder), Some(toolchain.libraries())].into_iter().flatten();
    let before = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let paths: Vec<PathBuf> = paths.chain(std::env::split_paths(&before)).collect();
    let paths: OsString = std::env::join_paths(paths).map_err(|error| error.to_string())?;
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", paths).env("NSA_CUDA_CACHE", target.join("cuda-cache")).env(INSIDE, "1");
    Ok(command)
}

/// NVIDIA's compilers: the machine's, or pinned ones fetched below `target`.
///
/// # Errors
/// If they are not there and cannot be fetched.
pub fn toolchain() -> Result<Toolchain, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/toolchain");
    Toolchain::find_or_fetch(&folder).map_err(|error| error.to_string())
}

/// A folder in which the libraries have the names that programs load them by.
fn libraries(program: &Path, target: &Path) -> std::io::Result<PathBuf> {
    let name = format!("{}cuda_sim{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let beside = program.parent().unwrap_or(Path::new("."));
    let built = [beside.join(&name), beside.join("deps").join(&name)].into_iter().find(|file| file.exists());
    let built = built.ok_or_else(|| {
        let message = format!("the simulator ({name}) is not beside {}: build crate cuda-sim too", program.display());
        std::io::Error::new(std::io::ErrorKind::NotFound, message)
    })?;
    // One folder a build: others may be in use.
    let folder = target.join("cuda-sim").join(built.parent().map_or_else(String::new, folder_name));
    std::fs::create_dir_all(&folder)?;
    for name in ["libcuda.so", "libcublas.so"] {
        let temporary = tempfile::tempdir_in(&folder)?;
        let link = temporary.path().join(name);
        link_to(&built, &link)?;
        std::fs::rename(link, folder.join(name))?;
    }
    Ok(folder)
}

/// A path as one name.
fn folder_name(path: &Path) -> String {
    path.components()
        .map(|part| part.as_os_str().to_string_lossy().replace(['/', '\\', ':'], ""))
        .collect::<Vec<_>>()
        .join("-")
}

#[cfg(unix)]
fn link_to(file: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(file, link)
}

#[cfg(not(unix))]
fn link_to(file: &Path, link: &Path) -> std::io::Result<()> {
    std::fs::copy(file, link).map(drop)
}

/// Begins a line of a test on the simulator with a hash of its results.
pub const BITS: &str = "bits of ";

/// Runs a test of this program again on the simulator, and there `body`: as an A100 and as an H100, which has kernels of its own, each
/// with two orders of blocks and warps.
///
/// # Panics
/// If it fails there, the simulator reports anything, or lines that begin with [`BITS`] depend on the order.
pub fn on_simulator(test: &str, body: impl FnOnce()) {
    on(&["a100", "h100"], &[], test, body);
}

/// The same as an A100 alone, for kernels that other devices have too, launched alike.
///
/// # Panics
/// As [`on_simulator`].
pub fn on_an_a100(test: &str, body: impl FnOnce()) {
    on(&["a100"], &[], test, body);
}

/// The same as an A100 with so many bytes of memory, for what happens when there is no more.
///
/// # Panics
/// As [`on_simulator`].
pub fn on_a_small_a100(test: &str, memory_bytes: usize, body: impl FnOnce()) {
    on(&["a100"], &[("CUDA_SIM_MEMORY", memory_bytes.to_string())], test, body);
}

/// The same as an H100 alone, for what it alone does.
///
/// # Panics
/// As [`on_simulator`].
pub fn on_an_h100(test: &str, body: impl FnOnce()) {
    on(&["h100"], &[], test, body);
}

/// Takes the memory of the device but for so many bytes, as long as the buffer is there.
///
/// # Panics
/// If the backend is no device, or has less memory.
pub fn leave_free(backend: &Backend, bytes: usize) -> Buffer<u8> {
    let Backend::Cuda(cuda) = backend else { panic!("{} has no memory of its own", backend.name()) };
    let (free, _) = cuda.stream().context().mem_get_info().unwrap_or_else(|error| panic!("{error}"));
    backend.alloc(free - bytes).made().unwrap_or_else(|error| panic!("{error}"))
}

fn on(devices: &[&str], variables: &[(&str, String)], test: &str, body: impl FnOnce()) {
    if inside() {
        return body();
    }
    let run = |at: usize, device: &str, seed: Option<&str>| {
        let mut command = this_program().unwrap_or_else(|error| panic!("{error}"));
        command.args(["--exact", test, "--nocapture"]).env("CUDA_SIM_DEVICE", device).env("CUDA_SIM_CHECK", "1");
        command.envs(variables.iter().cloned());
        if at > 0 {
            command.env(INSIDE, AGAIN);
        }
        match seed {
            Some(seed) => command.env("CUDA_SIM_SEED", seed),
            None => command.env_remove("CUDA_SIM_SEED"),
        };
        let output = command.output().unwrap_or_else(|error| panic!("{error}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let clean = output.status.success() && text.contains("1 passed") && !text.contains("cuda-sim:");
        assert!(clean, "on {device}, seed {seed:?}:\n{text}");
        text.lines().filter(|line| line.starts_with(BITS)).map(str::to_owned).collect::<Vec<_>>()
    };
    for (at, device) in devices.iter().enumerate() {
        let [first, second] = [None, Some("7")].map(|seed| run(at, device, seed));
        assert_eq!(first, second, "results depend on the order of blocks and warps, on {device}");
    }
}
