//! The test kit: named cases, inputs that differ in every index, comparison against an error model, planted faults.
//! The tests of this crate and `cargo xtask check` run the same functions.
#![forbid(unsafe_code)]

pub mod case;
pub mod check;
pub mod compare;
pub mod decode;
pub mod fault;
pub mod gate;
pub mod generate;
pub mod kernels;
pub mod memory;
pub mod operator;
pub mod reference;
pub mod select;

pub use case::Case;

/// The code blocks of README.md, compiled and run as documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;

/// An element type that the kit runs.
pub trait Kind: nsa_core::Element<Acc: generate::Poison> + generate::Poison {}

impl<T: nsa_core::Element<Acc: generate::Poison> + generate::Poison> Kind for T {}

/// Runs an operation on every case in one dtype, on the best backend there is.
///
/// # Panics
/// Lists every case that is red: how the test fails.
pub fn assert_cases(op: check::Op, dtype: nsa_core::DType) {
    let (backend, why) = nsa_kernels::Backend::pick(None).expect("a backend");
    let mut red = Vec::new();
    for case in case::cases() {
        let report = check::check(op, &case, dtype, &backend);
        let seed = generate::seed(&case.name, "q");
        red.extend(
            report.failures().into_iter().map(|f| format!("{op} {} {dtype} (seed of q {seed:#x}): {f}", case.name)),
        );
    }
    assert!(red.is_empty(), "{} ({why}), {} red:\n{}", backend.name(), red.len(), red.join("\n"));
}
