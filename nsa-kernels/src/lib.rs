//! Kernels of Native Sparse Attention: one public function per operation, forward and backward, on backends chosen at
//! run time.
//!
//! - [`op`]: the operator's parts: `compress` (φ), `cmp`, `slc`, `win`, `gate`, `nsa` (whole), `decode`, `dense` (the baseline).
//! - [`layer`]: what a transformer needs around it: linear, RMSNorm, RoPE, SwiGLU, embedding, cross-entropy, AdamW.
//! - [`backend`]: which machine code runs them, and why.
//! - [`cuda`]: NVIDIA GPUs: the device, compiled kernels.
//! - `candle` (feature; on GPUs `candle-cuda`): φ and the whole operator as candle ops with gradients.
//! - [`record`]: work that a device is given as one piece.
//! - [`mem`]: tensors and buffers in the memory that a backend computes on.
#![deny(unsafe_code)]

pub mod backend;
#[cfg(feature = "candle")]
pub mod candle;
mod cpu;
pub mod cuda;
mod element;
pub mod error;
pub mod layer;
pub mod mem;
pub mod op;
pub mod record;

pub use backend::{Backend, Why};
pub use cpu::isa::Isa;
pub use cuda::Cuda;
pub use element::Element;
pub use error::{Error, Result};
pub use mem::{Buffer, Mem, Pages, Rows, Tensor, TensorMut};
