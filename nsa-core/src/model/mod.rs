//! The shape of a whole model: configuration, tensors, parameter counts, memory plan and rotary frequencies.
//!
//! [`ModelConfig`] is what `config.json` of a checkpoint holds; [`manifest`] lists its tensors in the order of every
//! flat buffer. Training and decoding read the same two.

mod config;
mod files;
mod memory;
mod params;
mod presets;
mod rope;

pub use config::{AttentionKind, ModelConfig, ModelFields, Moe, NsaFields, RopeKind, RopeScaling, TokenizerKind};
pub use files::{CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_INDEX_FILE, weight_files};
pub use memory::{MemoryPlan, kv_cache_bytes, memory_plan};
pub use params::{Init, ParamCounts, ParamKind, ParamSpec, manifest, param_counts};
pub use presets::PRESETS;
pub use rope::{RopeTable, rope_frequencies};
