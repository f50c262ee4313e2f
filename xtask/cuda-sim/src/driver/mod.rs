//! The driver API: what `libcuda.so` exports, over a state without unsafe code.

pub mod blas;
pub mod capture;
pub mod device;
pub mod error;
#[expect(unsafe_code, reason = "the C ABI of libcuda: callers hand over raw pointers")]
mod ffi;
pub mod graph;
pub mod occupancy;
mod resources;
pub mod state;
