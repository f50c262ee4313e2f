//! Random valid configurations and packings against the error model: the operator forward and backward, its parts,
//! decoding steps and the baseline.

use nsa_core::{CompressKind, DType, NsaConfig};
use nsa_kernels::Backend;
use nsa_tests::Case;
use nsa_tests::check::{Op, check};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

prop_compose! {
    /// Any valid configuration with small sizes, on up to four sequences, some of them empty.
    fn cases()(
        (groups, group_size, head_dim_qk, head_dim_v) in (1usize..4, 1usize..6, 1usize..24, 1usize..24),
        // d, l/d, l'/d − l/d: every valid triple has this form.
        (stride, span, more) in (1usize..6, 1usize..5, 0usize..4),
        (initial, local, free) in (0usize..3, 1usize..4, 0usize..5),
        window in 1usize..60,
        (kind, hidden) in (0usize..4, 1usize..9),
        scale in prop::option::of(0.05f64..0.8),
        sharpness in prop::sample::select(vec![0.25, 1.0, 1.0, 6.0]),
        lengths in prop::collection::vec(prop_oneof![0usize..12, 0usize..80], 0..4),
        name in "[a-z]{8}",
    ) -> Case {
        let kind = [CompressKind::Mean, CompressKind::Weighted, CompressKind::Linear, CompressKind::Mlp][kind];
        let builder = NsaConfig::builder(groups * group_size, groups, head_dim_qk, head_dim_v)
            .compress_stride(stride)
            .compress_block(stride * span)
            .select_block(stride * (span + more))
            .select_initial(initial)
            .select_local(local)
            .select_count(initial + local + free)
            .window(window)
            .compress_kind(kind)
            .compress_hidden(hidden);
        let builder = match scale {
            Some(scale) => builder.scale(scale),
            None => builder,
        };
        Case { sharpness, ..Case::new(name, builder, lengths) }
    }
}

fn config(cases: u32) -> ProptestConfig {
    // A fixed seed: every run makes the same cases, and a failure prints the smallest that fails.
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(2502), failure_persistence: None, ..Default::default() }
}

/// Random cases find the tails of rounding errors that the table's limits are not made for (three standard errors); a
/// mistake is larger by orders.
const TAILS: f64 = 4.0;

fn green(op: Op, case: &Case, dtype: DType) -> Result<(), TestCaseError> {
    let (backend, _) = Backend::pick(None).unwrap();
    let failures = check(op, case, dtype, &backend).failures_beyond(TAILS);
    prop_assert!(failures.is_empty(), "{op} {dtype}: {failures:#?}");
    Ok(())
}

fn dtypes() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::F32, DType::F32, DType::Bf16, DType::F16, DType::F64])
}

proptest! {
    #![proptest_config(config(256))]

    #[test]
    fn the_whole_operator(case in cases(), dtype in dtypes()) {
        green(Op::Nsa, &case, dtype)?;
    }

    #[test]
    fn its_parts(case in cases(), dtype in dtypes()) {
        for op in [Op::Compress, Op::Cmp, Op::Slc, Op::Win, Op::Gate] {
            green(op, &case, dtype)?;
        }
    }

    #[test]
    fn decoding_steps(case in cases(), dtype in dtypes()) {
        green(Op::Decode, &case, dtype)?;
    }

    #[test]
    fn the_baseline(case in cases(), dtype in dtypes()) {
        green(Op::Dense, &case, dtype)?;
    }
}
