//! Which of CUDA's libraries are there. Their functions must not be called before: the bindings panic where one is missing.

use crate::{Error, Result};
use cudarc::driver::{self, DriverError};
use cudarc::nvrtc;

/// What the functions below ask where the bindings have no such function: there they are linked to the libraries, because
/// another crate of the program (candle-core with its feature `cuda`) asks for that, and without one no program starts.
/// Where they have one, its import stands nearer and is called.
#[cfg_attr(not(feature = "candle-cuda"), expect(dead_code, reason = "the bindings have theirs"))]
unsafe fn is_culib_present() -> bool {
    true
}

#[cfg_attr(feature = "candle-cuda", expect(unused_imports, reason = "the bindings have none"))]
fn driver_is_present() -> bool {
    use cudarc::driver::sys::*;
    // SAFETY: loads a library of the system, or the simulator's, and runs nothing but its initialisation.
    unsafe { is_culib_present() }
}

#[cfg_attr(feature = "candle-cuda", expect(unused_imports, reason = "the bindings have none"))]
fn cublas_is_present() -> bool {
    use cudarc::cublas::sys::*;
    // SAFETY: loads a library of the system, or the simulator's, and runs nothing but its initialisation.
    unsafe { is_culib_present() }
}

#[cfg_attr(feature = "candle-cuda", expect(unused_imports, reason = "the bindings have none"))]
fn nvrtc_is_present() -> bool {
    use cudarc::nvrtc::sys::*;
    // SAFETY: loads a library of the system and runs nothing but its initialisation.
    unsafe { is_culib_present() }
}

/// Checks that the driver is there, for backend `name`.
pub(super) fn check_driver(name: &str) -> Result<()> {
    if driver_is_present() {
        return Ok(());
    }
    Err(Error::Backend {
        requested: name.to_owned(),
        missing: "no CUDA driver (libcuda.so, nvcuda.dll) is found".to_owned(),
        advice: "install NVIDIA's driver, put its folder on LD_LIBRARY_PATH, or ask for the backend `cpu`".to_owned(),
    })
}

/// Checks that cuBLAS is there, for backend `name`.
pub(super) fn check_cublas(name: &str) -> Result<()> {
    if cublas_is_present() {
        return Ok(());
    }
    Err(Error::Backend {
        requested: name.to_owned(),
        missing: "no cuBLAS (libcublas.so of CUDA 11 to 13) is found, which multiplies matrices".to_owned(),
        advice: "install it (CUDA toolkit, or `pip install nvidia-cublas`) and put its folder on LD_LIBRARY_PATH"
            .to_owned(),
    })
}

/// The version of CUDA that the driver supports.
pub(super) fn driver_version() -> std::result::Result<(i32, i32), DriverError> {
    let mut version = 0;
    // SAFETY: writes one number.
    unsafe { driver::sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok((version / 1000, version % 1000 / 10))
}

/// NVRTC, as far as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nvrtc {
    /// Its version.
    pub version: (i32, i32),
    /// Architectures that it compiles for, ascending: 80 is compute capability 8.0.
    pub archs: Vec<i32>,
}

/// Finds NVRTC and asks what it is.
pub(super) fn nvrtc() -> Result<Nvrtc> {
    if !nvrtc_is_present() {
        return Err(Error::Backend {
            requested: "cuda".to_owned(),
            missing: "no NVRTC (libnvrtc.so of CUDA 11 to 13) is found, which compiles the kernels".to_owned(),
            advice:
                "install it (CUDA toolkit, or `pip install nvidia-cuda-nvrtc`) and put its folder on LD_LIBRARY_PATH"
                    .to_owned(),
        });
    }
    let broken =
        |error: nvrtc::result::NvrtcError| Error::Device { op: "NVRTC".to_owned(), message: error.to_string() };
    let (mut major, mut minor, mut count) = (0, 0, 0);
    // SAFETY: both write numbers.
    unsafe { nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().map_err(broken)?;
    // SAFETY: as above.
    unsafe { nvrtc::sys::nvrtcGetNumSupportedArchs(&raw mut count) }.result().map_err(broken)?;
    let mut archs = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: writes as many numbers as it said that there are.
    unsafe { nvrtc::sys::nvrtcGetSupportedArchs(archs.as_mut_ptr()) }.result().map_err(broken)?;
    archs.sort_unstable();
    Ok(Nvrtc { version: (major, minor), archs })
}
