//! The test kit: named cases, inputs that differ in every index, comparison against an error model, planted faults.
//! The tests of this crate and `cargo xtask check` run the same functions.
#![forbid(unsafe_code)]

pub mod case;
pub mod compare;
pub mod generate;

pub use case::Case;

/// An element type that the kit runs.
pub trait Kind: nsa_core::Element<Acc: generate::Poison> + generate::Poison {}

impl<T: nsa_core::Element<Acc: generate::Poison> + generate::Poison> Kind for T {}
