//! Inference with Native Sparse Attention models: mapped weights, paged caches, prefill in chunks, batched decoding,
//! sampling.
//!
//! - [`Model::open`] opens the folder that training writes; weights are used where they lie in the mapped file.
//! - [`Session`] is a sequence with its caches: append tokens, read logits, fork, truncate.
//! - [`Model::generate`] is an iterator over tokens and text; [`Batch`] does it for many sequences together.
//! - [`Sampling`] and [`StopMatcher`] work without a model, too.
#![deny(unsafe_code)]

mod cache;
pub mod error;
pub mod generate;
pub mod model;
pub mod sample;
pub mod session;
pub mod stop;
pub mod weights;

pub use error::{Error, Result, SamplingError, WeightsError};
pub use generate::{Batch, Finish, Generate, GenerateOptions, Piece};
pub use model::{Model, ModelOptions, WeightsInfo};
pub use nsa_core::Precision;
pub use nsa_kernels::Backend;
pub use sample::{Candidate, Sampler, Sampling};
pub use session::{Reads, Session, SessionOptions, advance};
pub use stop::{Released, StopMatcher};
