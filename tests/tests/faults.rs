//! Planted faults: the comparison must notice each of them, or it proves nothing.

use nsa_core::DType;
use nsa_kernels::Backend;
use nsa_tests::case;
use nsa_tests::check::{Op, check, check_faulty};
use nsa_tests::fault::Fault;

/// The operations that faults are planted in.
const OPS: [Op; 6] = [Op::Compress, Op::Cmp, Op::Slc, Op::Win, Op::Gate, Op::Dense];

fn is_caught(fault: Fault, dtype: DType, backend: &Backend) -> bool {
    let small = |case: &nsa_tests::Case| (32..=160).contains(&case.tokens());
    case::cases().iter().filter(|case| small(case)).any(|case| {
        OPS.into_iter().any(|op| {
            !check_faulty(op, case, dtype, backend, Some(fault)).failures().is_empty()
                && check(op, case, dtype, backend).failures().is_empty()
        })
    })
}

#[test]
fn every_fault_is_caught() {
    let (backend, _) = Backend::pick(None).unwrap();
    let missed: Vec<String> = [DType::F32, DType::Bf16]
        .into_iter()
        .flat_map(|dtype| Fault::ALL.map(|fault| (fault, dtype)))
        .filter(|&(fault, dtype)| !is_caught(fault, dtype, &backend))
        .map(|(fault, dtype)| format!("{fault:?} in {dtype}"))
        .collect();
    assert!(missed.is_empty(), "not caught: {}", missed.join(", "));
}
