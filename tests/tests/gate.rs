//! `gate` on every case, forward and backward, against the error model.

use nsa_core::DType;
use nsa_tests::assert_cases;
use nsa_tests::check::Op;

#[test]
fn f32() {
    assert_cases(Op::Gate, DType::F32);
}

#[test]
fn bf16() {
    assert_cases(Op::Gate, DType::Bf16);
}

#[test]
fn f16() {
    assert_cases(Op::Gate, DType::F16);
}

#[test]
fn f64() {
    assert_cases(Op::Gate, DType::F64);
}
