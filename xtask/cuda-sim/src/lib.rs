//! A CUDA driver on the CPU: runs PTX kernels without a GPU and checks what a GPU hides.
//!
//! A [`Module`] is loaded from PTX text into a [`memory::DeviceMemory`]; an [`exec::Launch`] runs one of its kernels and gives
//! a summary, or a fault that says what went wrong and where. Built as a shared library, the same is a `libcuda.so`.

#![deny(unsafe_code)]

pub mod check;
pub mod code;
pub mod count;
pub mod driver;
mod error;
pub mod exec;
mod lower;
pub mod memory;
mod module;
mod number;
pub mod probe;
pub mod ptx;
pub mod tensor_map;
pub mod toolchain;

pub use error::PtxError;
pub use module::{LoadError, Module};
