//! Decoding steps on the simulator.

use super::assert_op;
use nsa_core::{CompressKind, DType, NsaConfig, NsaConfigBuilder};
use nsa_kernels::Backend;
use nsa_tests::Case;
use nsa_tests::check::{self, Op};
use nsa_tests::sim::{BITS, on_simulator};

#[test]
fn cases() {
    on_simulator("decode::cases", || assert_op(Op::Decode));
}

/// The paper's blocks.
fn paper(heads: usize, kv_heads: usize, dim_k: usize, dim_v: usize) -> NsaConfigBuilder {
    let builder = NsaConfig::builder(heads, kv_heads, dim_k, dim_v).compress_block(32).compress_stride(16);
    builder.select_block(64).select_count(16).window(512).compress_kind(CompressKind::Mean)
}

/// Batches of contexts from one token to thousands, from pages as long as selection blocks and longer.
#[test]
fn long_contexts() {
    on_simulator("decode::long_contexts", || {
        let backend = Backend::cuda(0).expect("the simulator");
        for (name, config, dtype, page_rows) in [
            ("long-group-16", paper(16, 1, 128, 128), DType::Bf16, 64),
            ("long-group-4", paper(8, 2, 64, 64), DType::F16, 128),
            ("long-group-20", paper(20, 1, 64, 32), DType::Bf16, 64),
            ("long-group-70", paper(70, 1, 16, 16), DType::Bf16, 64),
            ("long-192-128", paper(2, 1, 192, 128), DType::Bf16, 192),
            ("long-256", paper(3, 1, 256, 256), DType::F32, 64),
        ] {
            let case = Case::new(name, config, [4500, 1700]);
            let report = check::check_pages(&case, dtype, &backend, page_rows);
            println!("{BITS}{name}: {:016x}", report.bits());
            assert!(report.failures().is_empty(), "{name} {dtype}: {:?}", report.failures());
        }
    });
}
