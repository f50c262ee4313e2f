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
pub mod sim;
pub mod ties;

pub use case::Case;
use nsa_kernels::Isa;

/// The code blocks of README.md, compiled and run as documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;

/// An element type that the kit runs.
pub trait Kind: nsa_kernels::Element<Acc: generate::Poison> + generate::Poison {}

impl<T: nsa_kernels::Element<Acc: generate::Poison> + generate::Poison> Kind for T {}

/// Runs an operation on every case in one dtype, on every instruction set that this machine has, and prints which.
///
/// # Panics
/// Lists every case that is red: how the test fails.
pub fn assert_cases(op: check::Op, dtype: nsa_core::DType) {
    let mut red = Vec::new();
    for backend in backends(dtype) {
        println!("{op} {dtype} on {}", backend.name());
        for case in case::cases() {
            let report = check::check(op, &case, dtype, &backend);
            let seed = generate::seed(&case.name, "q");
            red.extend(
                report
                    .failures()
                    .into_iter()
                    .map(|f| format!("{op} {} {dtype} on {} (seed of q {seed:#x}): {f}", case.name, backend.name())),
            );
        }
    }
    assert!(red.is_empty(), "{} red:\n{}", red.len(), red.join("\n"));
}

/// A backend of every instruction set of this machine that has a path of its own for tensors of this type.
pub fn backends(dtype: nsa_core::DType) -> Vec<nsa_kernels::Backend> {
    let own = |isa: &Isa| match dtype {
        nsa_core::DType::F64 => *isa == Isa::Portable,
        nsa_core::DType::Bf16 => true,
        nsa_core::DType::F32 | nsa_core::DType::F16 => *isa != Isa::Avx512Bf16,
    };
    Isa::available().filter(own).map(|isa| nsa_kernels::Backend::with_isa(isa).expect("it is available")).collect()
}
