//! What every crate of Native Sparse Attention (arXiv 2502.11089) agrees on: the configuration, the packed layout,
//! the index arithmetic, the selection policy, element types and views over memory. Knows no device.
#![forbid(unsafe_code)]

pub mod config;
pub mod dtype;
pub mod error;
pub mod index;
pub mod layout;
pub mod model;
pub mod select;
#[cfg(feature = "text")]
pub mod tokenizer;
pub mod view;

pub use config::{CompressKind, NsaConfig, NsaConfigBuilder, read_json};
pub use dtype::{DType, Element, Real};
pub use error::{ConfigError, FileError, LayoutError, ShapeError};
pub use layout::{CuSeqlens, Packing, Seq};
pub use view::{View, ViewMut};
