//! Which opcodes compilers write, and which of them the tests run.

use crate::kit::{Coverage, coverage};
use crate::{nvcc, triton};
use std::collections::BTreeSet;

/// Opcodes without their modifiers.
fn bases(opcodes: &BTreeSet<String>) -> BTreeSet<&str> {
    opcodes.iter().map(|opcode| opcode.split('.').next().unwrap_or(opcode)).collect()
}

/// Every opcode of the fixtures of Triton and nvcc is read, or their modules would not load; this counts how many run.
#[test]
fn opcodes_of_compilers_run() {
    let Coverage { written, ran } = coverage(|| {
        triton::matrix_products_of_ampere();
        triton::other_kernels_of_ampere();
        triton::kernels_of_hopper();
        nvcc::block_primitives_of_cub();
        nvcc::functions_local_memory_and_a_switch();
        nvcc::an_assertion_names_its_source();
    });
    let (all, base) = (written.len(), bases(&written).len());
    println!("{base} opcodes, {} ran; with modifiers {all}, {} ran", bases(&ran).len(), ran.len());
    let missing: Vec<&String> = written.difference(&ran).collect();
    assert!(bases(&ran).len() == base && missing.len() * 10 <= all, "{all} opcodes, not run: {missing:?}");
}
