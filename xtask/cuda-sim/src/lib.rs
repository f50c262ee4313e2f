//! A CUDA driver on the CPU: runs PTX kernels without a GPU and checks what a GPU hides.

#![deny(unsafe_code)]

pub mod check;
pub mod code;
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
