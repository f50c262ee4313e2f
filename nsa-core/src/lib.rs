//! What every crate of Native Sparse Attention (NSA, arXiv 2502.11089) agrees on. It knows no device, starts no thread
//! and has no unsafe code.
//!
//! NSA replaces full causal attention by three cheaper views of the past, each with its own keys and values, joined by
//! learned gates:
//!
//! - **compression** (`cmp`): blocks of l tokens, one every d, shrunk to one key and one value by φ;
//! - **selection** (`slc`): the n blocks of l' tokens that compression scores highest, token by token;
//! - **window** (`win`): the last w tokens.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | [`NsaConfig`]: heads, dims, block sizes, φ, scale; every rule checked once, JSON or builder |
//! | [`layout`] | [`CuSeqlens`], [`Packing`]: packed sequences, with the contexts that they continue |
//! | [`index`] | visible blocks, candidates, importance weights, windows, rows read by a decoding step |
//! | [`select`] | the selection policy: forced blocks, order, ties, padding |
//! | [`dtype`] | [`Element`] (f32, f64, bf16, f16) and the type it accumulates in, [`Real`] |
//! | [`object`] | [`Object`](object::Object): structs from JSON objects, never from lists |
//! | [`view`] | [`View`], [`ViewMut`]: shape and strides over memory, checked |
//! | [`model`] | whole models: `config.json`, tensors and their order, counts, memory plan, rotary frequencies |
//! | [`units`] | bytes and counts as people read them |
//! | `tokenizer` | text to tokens and back, streaming (feature `text`) |
//! | [`error`] | typed errors; each names the field or argument, its value and the rule |
//!
//! # Example
//! Which tokens does the last query of an 8k context attend to?
//!
//! ```
//! use nsa_core::{NsaConfig, index, select};
//!
//! let config = NsaConfig::paper(); // 64 heads on 4 KV heads, l/d/l' = 32/16/64, n = 16, w = 512
//! let t = 8191;
//! assert_eq!(index::visible_blocks(&config, t), 511);
//! assert_eq!(index::window_tokens(&config, t), 7680..8192);
//!
//! // Say that compression likes block 40 best, then 41, 42, …; block 0 and the last two are forced.
//! let scores: Vec<f32> = (0..index::num_candidates(&config, t)).map(|j| -((j + 88) as f32 % 128.0)).collect();
//! let mut blocks = vec![0; config.select_count()];
//! select::select_blocks(&config, t, &scores, &mut select::SelectScratch::default(), &mut blocks);
//! assert_eq!(blocks, [0, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 126, 127]);
//!
//! // Compression, selection and window together read a quarter of what full attention reads.
//! assert_eq!(index::decode_rows(&config, 8192), 511 + 16 * 64 + 512);
//! ```
//!
//! # Numerics
//! Tensors are stored in f32, bf16, f16 (or f64, the reference's) and accumulated in [`Element::Acc`]; lse is the
//! natural logarithm. Sequences have at most 2³¹ − 1 tokens, memory offsets are 64-bit.
//!
//! # Features
//! `text` (off by default): the module `tokenizer`, with the crate tokenizers.
#![forbid(unsafe_code)]

pub mod config;
pub mod dtype;
pub mod error;
pub mod index;
pub mod layout;
pub mod model;
pub mod object;
pub mod select;
#[cfg(feature = "text")]
pub mod tokenizer;
pub mod units;
pub mod view;

pub use config::{CompressKind, NsaConfig, NsaConfigBuilder, read_json};
pub use dtype::{DType, Element, Precision, Real};
pub use error::{ConfigError, FileError, LayoutError, ShapeError};
pub use layout::{CuSeqlens, Packing, Seq};
pub use view::{View, ViewMut};
