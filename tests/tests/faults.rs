//! Planted faults: the comparison must notice each of them in every operation that it applies to, or it proves nothing.

use nsa_core::DType;
use nsa_kernels::Backend;
use nsa_tests::Case;
use nsa_tests::case;
use nsa_tests::check::{Op, check, check_faulty};
use nsa_tests::fault::Fault;

/// Cases of the table that are long enough for a fault in their middle, and quick.
fn cases() -> Vec<Case> {
    case::cases().into_iter().filter(|case| (32..=160).contains(&case.tokens())).collect()
}

/// Whether some case notices the fault; `None` if it applies to none. A refusal is no comparison.
fn is_caught(op: Op, fault: Fault, dtype: DType, backend: &Backend, cases: &[Case]) -> Option<bool> {
    let mut verdicts = cases.iter().filter_map(|case| {
        let report = check_faulty(op, case, dtype, backend, fault).ok()??;
        Some(!report.failures().is_empty() && check(op, case, dtype, backend).failures().is_empty())
    });
    let first = verdicts.next()?;
    Some(first || verdicts.any(|caught| caught))
}

fn every_fault_is_caught_in(dtype: DType) {
    let (backend, _) = Backend::pick(None).unwrap();
    let cases = cases();
    let (mut missed, mut homeless) = (Vec::new(), Vec::new());
    for fault in Fault::ALL {
        let verdicts = Op::ALL.map(|op| (op, is_caught(op, fault, dtype, &backend, &cases)));
        missed.extend(verdicts.iter().filter(|(_, caught)| *caught == Some(false)).map(|(op, _)| (fault, *op)));
        if verdicts.iter().all(|(_, caught)| caught.is_none()) {
            homeless.push(fault);
        }
    }
    assert!(missed.is_empty(), "not caught in {dtype}: {missed:?}");
    assert!(homeless.is_empty(), "in no operation in {dtype}: {homeless:?}");
}

#[test]
fn every_operation_notices_every_fault_in_f32() {
    every_fault_is_caught_in(DType::F32);
}

#[test]
fn every_operation_notices_every_fault_in_bf16() {
    every_fault_is_caught_in(DType::Bf16);
}

#[test]
fn every_operation_notices_every_fault_in_f16() {
    every_fault_is_caught_in(DType::F16);
}
