//! Full attention on the simulator: whole sequences, and single queries, whose keys are cut into chunks.

use super::{IN_EVERY_TYPE, IN_F32, assert_cases, assert_few_bytes, counted, paper, table};
use half::{bf16, f16};
use nsa_core::{DType, NsaConfigBuilder};
use nsa_kernels::Backend;
use nsa_tests::check::{self, Op};
use nsa_tests::decode::take_dense;
use nsa_tests::sim::{BITS, on_an_a100, on_simulator};
use nsa_tests::{Case, Kind};
use std::collections::HashMap;

#[test]
fn cases() {
    on_simulator("dense::cases", || {
        // Full attention has no blocks: of the same heads and dims, cases with the first one's suffice.
        let mut blocks = HashMap::new();
        let mut cases = table(None);
        cases.retain(|Case { config, .. }| {
            let dims = [config.group_size(), config.head_dim_qk(), config.head_dim_v()];
            let of_case = [config.compress_stride(), config.select_block(), config.select_count(), config.window()];
            *blocks.entry(dims).or_insert(of_case) == of_case
        });
        assert_cases(Op::Dense, &cases, &[DType::Bf16]);
        assert_cases(Op::Dense, &table(Some(&IN_EVERY_TYPE)), &[DType::F16, DType::F32]);
        assert_cases(Op::Dense, &table(Some(&IN_F32)), &[DType::F32]);
    });
}

/// Queries `from..to` of sequence `s` for each `(s, from, to)`.
type Chunks<'a> = &'a [(usize, usize, usize)];

fn assert_steps<T: Kind>(name: &str, config: NsaConfigBuilder, lengths: &[usize], chunks: Chunks<'_>) {
    let backend = Backend::cuda(0).expect("the simulator");
    let case = Case::new(name, config, lengths);
    let report = check::check_dense(&take_dense::<T>(&case, chunks).expect("queries"), &backend);
    println!("{BITS}{name} {}: {:016x}", T::DTYPE, report.bits());
    assert!(report.failures().is_empty(), "{name} {}: {:?}", T::DTYPE, report.failures());
}

/// Groups from one head to more than a block of threads takes, all dims, contexts around chunks and around how many of
/// them are joined at once.
#[test]
fn single_queries() {
    on_simulator("dense::single_queries", || {
        let long: Chunks<'_> = &[(0, 4499, 4500), (0, 4095, 4096), (1, 299, 300)];
        assert_steps::<bf16>("lone-group-16", paper(16, 1, 128, 128), &[4500, 300], long);
        // Chunks of 64 keys, 265 of them: joined three times.
        assert_steps::<bf16>("lone-group-1", paper(2, 2, 16, 16), &[16_901], &[(0, 16_900, 16_901), (0, 1023, 1024)]);
        let odd: Chunks<'_> = &[(0, 1699, 1700), (0, 0, 1), (0, 16, 16), (1, 63, 64), (1, 64, 65), (0, 255, 257)];
        assert_steps::<f16>("lone-group-4", paper(8, 2, 64, 64), &[1700, 65], odd);
        assert_steps::<bf16>("lone-group-20", paper(20, 1, 64, 32), &[1700, 65], odd);
        assert_steps::<bf16>("lone-group-128", paper(128, 1, 16, 16), &[1700, 65], odd);
        assert_steps::<bf16>("lone-192-128", paper(16, 1, 192, 128), &[1700, 65], odd);
        assert_steps::<f32>("lone-96", paper(14, 2, 96, 96), &[1700, 65], odd);
        assert_steps::<f32>("lone-256", paper(3, 1, 256, 256), &[1700, 65], odd);
        assert_steps::<f16>("lone-odd-dims", paper(7, 1, 5, 3), &[1700, 65], odd);
        // More heads a KV head than tiles of queries take.
        assert_steps::<bf16>("lone-group-150", paper(150, 1, 16, 16), &[700], &[(0, 699, 700), (0, 5, 5)]);
    });
}

/// The bits of a query's o and lse depend on no other sequence.
#[test]
fn single_queries_beside_others() {
    on_an_a100("dense::single_queries_beside_others", || {
        let backend = Backend::cuda(0).expect("the simulator");
        let case = Case::new("lone-beside", paper(8, 2, 32, 16), [1700, 300]);
        let forward = |chunks: Chunks<'_>| {
            let inputs = take_dense::<bf16>(&case, chunks).expect("queries");
            inputs.forward(&backend).expect("runs")
        };
        let lone: Chunks<'_> = &[(0, 1699, 1700), (1, 99, 100)];
        let (alone, beside) = (forward(lone), forward(&[(1, 20, 40), lone[0], (1, 7, 7), lone[1], (0, 3, 9)]));
        for (row, place) in [(0, 20), (1, 21)] {
            assert_eq!(alone.o[row * 8 * 16..][..8 * 16], beside.o[place * 8 * 16..][..8 * 16]);
            assert_eq!(alone.lse[row * 8..][..8], beside.lse[place * 8..][..8]);
        }
        let all = forward(&[(0, 0, 1700)]);
        assert!(all.lse[1699 * 8..].iter().zip(&alone.lse).all(|(all, alone)| (all - alone).abs() < 1e-5));
    });
}

/// What a single query moves besides its rows of k and v, in bf16.
#[test]
fn bytes() {
    const SIZES: [(usize, usize); 3] = [(16, 8192), (4, 8192), (16, 16_384)];
    let launches = counted("dense::bytes", || {
        let backend = Backend::cuda(0).expect("the simulator");
        for (group, context) in SIZES {
            let case = Case::new("lone-bytes", paper(group, 1, 128, 128), [context]);
            let inputs = take_dense::<bf16>(&case, &[(0, context - 1, context)]).expect("queries");
            inputs.forward(&backend).expect("runs");
        }
    });
    let Some(launches) = launches else { return };
    assert_eq!(launches.len(), SIZES.len());
    for ((group, context), launch) in SIZES.into_iter().zip(launches.chunks(1)) {
        let least = context as f64 * (128.0 + 128.0) * 2.0;
        assert_few_bytes(&format!("R = {group}, {context} tokens"), launch, least);
    }
}
