//! The CUDA backend on the simulator, against the error model; the simulator's checker must not report anything.

mod compress;
mod decode;
mod layer;
mod pages;

use nsa_core::DType;
use nsa_kernels::Backend;
use nsa_tests::check::{self, Op};
use nsa_tests::sim::{BITS, on_simulator};
use nsa_tests::{Case, case};

/// Every case of an operation, in the three types that GPUs compute.
fn assert_op(op: Op) {
    assert_cases(op, case::cases());
}

fn assert_cases(op: Op, cases: Vec<Case>) {
    let backend = Backend::cuda(0).expect("the simulator");
    let mut red = Vec::new();
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        for case in &cases {
            let report = check::check(op, case, dtype, &backend);
            println!("{BITS}{op} {} {dtype}: {:016x}", case.name, report.bits());
            red.extend(report.failures().into_iter().map(|failure| format!("{op} {} {dtype}: {failure}", case.name)));
        }
    }
    assert!(red.is_empty(), "{} red:\n{}", red.len(), red.join("\n"));
}

#[test]
fn gate() {
    on_simulator("gate", || assert_op(Op::Gate));
}

#[test]
fn cmp() {
    on_simulator("cmp", || assert_op(Op::Cmp));
}

#[test]
fn slc() {
    on_simulator("slc", || assert_op(Op::Slc));
}

#[test]
fn win() {
    on_simulator("win", || assert_op(Op::Win));
}

#[test]
fn dense() {
    on_simulator("dense", || assert_op(Op::Dense));
}

#[test]
fn nsa() {
    on_simulator("nsa", || assert_op(Op::Nsa));
}
