//! Trains transformers with Native Sparse Attention or full attention: explicit forward and backward per layer over the
//! operations of `nsa-kernels`, memory reused from step to step, checkpoints that resume bit for bit.
//!
//! - [`data`]: text files to a mapped token file, documents kept, split and batched;
//! - [`model`]: parameters, activations, forward and backward;
//! - [`optim`], [`schedule`]: AdamW and its learning rate;
//! - [`trainer`]: steps, validation, checkpoints; [`run`]: the loop around them;
//! - [`checkpoint`], [`metrics`], [`plot`], [`eval`]: what a run leaves behind, and what it is worth; [`files`] writes it.
//!
//! ```
//! use nsa_core::model::ModelConfig;
//! use nsa_kernels::Backend;
//! use nsa_train::model::{Batch, Capacity, Model, Workspace};
//! # fn main() -> nsa_train::Result<()> {
//! let (backend, _) = Backend::pick(Some("cpu"))?;
//! let model = Model::<f32>::new(&backend, ModelConfig::preset("tiny-1m")?, 7)?;
//! let mut workspace = Workspace::for_inference(&model, Capacity { tokens: 64, longest: 64 })?;
//! let text: Vec<u32> = "To be, or not to be".bytes().map(u32::from).collect();
//! let loss = model.loss(&mut workspace, &Batch::next_token(&[&text])?)?;
//! assert_eq!(loss.count, text.len() - 1);
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]

pub mod checkpoint;
pub mod data;
pub mod error;
pub mod eval;
pub mod files;
mod mapped;
pub mod metrics;
pub mod model;
pub mod network;
pub mod optim;
pub mod options;
pub mod plot;
pub mod progress;
mod random;
pub mod run;
pub mod schedule;
pub mod trainer;

pub use error::{Error, Result};
pub use nsa_core::Precision;
pub use options::TrainOptions;
