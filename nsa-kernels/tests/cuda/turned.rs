//! Selected attention of small groups, whose blocks of keys gather their queries: in runs of queries, behind contexts, with lists
//! that are none.

use super::slc::{UNLIMITED, device};
use super::{BITS, assert_cases_on, counted, slc};
use nsa_core::{CompressKind, DType, NsaConfig};
use nsa_tests::check::{self, Op};
use nsa_tests::sim::on_an_a100;
use nsa_tests::{Case, case, generate};

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// Blocks so small that 250 tokens have many more than a query selects; a group of one head makes do with fewer.
fn config(heads: usize, groups: usize) -> NsaConfig {
    let block = if heads == groups { 8 } else { 4 };
    let builder = NsaConfig::builder(heads, groups, 40, 24).compress_kind(CompressKind::Mean).compress_block(block);
    builder.compress_stride(block / 2).select_block(block).select_count(3).window(33).build().expect("valid")
}

/// Bytes of the shares of so many queries.
fn share_bytes(config: &NsaConfig, queries: usize) -> usize {
    queries * config.num_heads() * config.select_count() * 4 * (config.head_dim_v().next_multiple_of(16) + 2)
}

/// Legal lists of one sequence. Most name the first block: its queries are several works, where they are not cut into runs.
fn lists(config: &NsaConfig, tokens: usize) -> Vec<i32> {
    let mut lists = generate::selection(&Case::new("turned", config.to_builder(), [tokens]));
    lists.chunks_exact_mut(config.select_count()).filter(|list| list[0] > 0).for_each(|list| list[0] = 0);
    lists
}

/// As [`slc::forward`], of what is turned round: queries that walk over blocks need no memory.
fn forward(config: &NsaConfig, sequences: &[(usize, usize)], lists: &[i32], limit: usize) -> (Vec<u32>, usize) {
    let (bits, bytes) = slc::forward(config, sequences, lists, limit);
    assert!(bytes > 0, "queries walk");
    (bits, bytes)
}

/// One, two and four heads a KV head.
fn cases() -> Vec<Case> {
    let case = |heads, groups| {
        Case::new(format!("runs-{heads}-{groups}"), config(heads, groups).to_builder(), [3, 250, 0, 70])
    };
    vec![case(3, 3), case(4, 2), case(4, 1)]
}

/// That the cases of this operation, those of the table among them, are such that queries do not walk.
#[test]
fn cases_are_turned() {
    let launches = counted("turned::cases_are_turned", || {
        let (backend, _) = device();
        let far = case::cases().into_iter().filter(|case| case.name.starts_with("far-group"));
        far.chain(cases()).for_each(|case| drop(check::check(Op::Slc, &case, DType::Bf16, &backend)));
    });
    let Some(launches) = launches else { return };
    let of = |name: &str| launches.iter().filter(|line| line.contains(&format!("\"{name}\""))).count();
    assert_eq!((of("slc_forward"), of("slc_query_gradients")), (0, 0));
    assert!(of("slc_turned") >= 6 && of("slc_turned_gradients") >= 6, "each of six cases");
}

/// In the types of the error model, in runs that end within sequences; and as a branch of the whole operator, whose gradients of
/// queries are sums.
#[test]
fn runs_of_queries() {
    on_an_a100("turned::runs_of_queries", || {
        let (backend, cuda) = device();
        for case in cases() {
            cuda.limit_shares(share_bytes(&case.config, 192));
            assert_cases_on(&backend, Op::Slc, &[case], &DTYPES);
        }
        let case = Case::new("runs-of-branch", config(4, 2).to_builder(), [170]);
        assert_cases_on(&backend, Op::Nsa, &[case], &DTYPES);
    });
}

/// Runs change no bit, and take no more memory than they may.
#[test]
fn runs_change_no_bit() {
    on_an_a100("turned::runs_change_no_bit", || {
        for config in [config(2, 2), config(4, 2), config(8, 2)] {
            let lists = lists(&config, 250);
            let (all, _) = forward(&config, &[(250, 0)], &lists, UNLIMITED);
            let hash = generate::hash(all.iter().flat_map(|x| x.to_le_bytes()));
            println!("{BITS}{} heads: {hash:016x}", config.num_heads());
            for queries in [224, 192] {
                let limit = share_bytes(&config, queries);
                let (bits, bytes) = forward(&config, &[(250, 0)], &lists, limit);
                // What makes an index is small beside them.
                assert!((limit..limit + (64 << 10)).contains(&bytes), "{queries}: {bytes} bytes, not about {limit}");
                assert!(bits == all, "{queries} queries a run");
            }
        }
    });
}

/// A sequence's queries behind a context get the bits that they have as part of the whole sequence, beside another one too.
#[test]
fn contexts_change_no_bit() {
    on_an_a100("turned::contexts_change_no_bit", || {
        let config = config(8, 2);
        let of_query = config.num_kv_heads() * config.select_count();
        let lists = lists(&config, 250);
        let (all, _) = forward(&config, &[(250, 0)], &lists, UNLIMITED);
        let behind = [lists[..30 * of_query].to_vec(), lists[90 * of_query..].to_vec()].concat();
        let (bits, _) = forward(&config, &[(30, 0), (0, 50), (160, 90)], &behind, share_bytes(&config, 96));
        let of = |bits: &[u32], query: usize| {
            let (o, lse) = bits.split_at(bits.len() / (config.head_dim_v() + 1) * config.head_dim_v());
            let (row, heads) = (config.num_heads() * config.head_dim_v(), config.num_heads());
            [o[query * row..][..row].to_vec(), lse[query * heads..][..heads].to_vec()]
        };
        for (at, query) in (0..30).chain(90..250).enumerate() {
            assert_eq!(of(&bits, at), of(&all, query), "query {query}");
        }
    });
}

/// What is no list ends where it stops being one: a block twice, one of the past, of the future, of no sequence, negative ones.
#[test]
fn lists_end_where_they_are_none() {
    on_an_a100("turned::lists_end_where_they_are_none", || {
        let config = config(4, 2);
        let legal = lists(&config, 250);
        let (mut broken, mut cut) = (legal.clone(), legal);
        let count = config.select_count();
        for (at, (broken, cut)) in broken.chunks_exact_mut(count).zip(cut.chunks_exact_mut(count)).enumerate() {
            let place = at % (count + 1);
            if place == count {
                continue;
            }
            let before = if place == 0 { 0 } else { cut[place - 1] };
            broken[place] = match at % 7 {
                0 if place > 0 => before,
                1 if place > 0 => before - 1,
                2 => (at / config.num_kv_heads() / config.select_block()) as i32 + 1,
                3 => i32::MAX,
                4 => i32::MIN,
                _ => -1,
            };
            cut[place..].fill(-1);
        }
        let run = |lists: &[i32]| forward(&config, &[(250, 0)], lists, share_bytes(&config, 200)).0;
        assert!(run(&broken) == run(&cut));
    });
}
