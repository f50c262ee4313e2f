//! Selected attention of small groups, whose blocks of keys gather their queries: in runs of queries, behind contexts, with lists
//! that are none.

use super::pages::numbers;
use super::{BITS, assert_cases_on};
use half::bf16;
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};
use nsa_kernels::cuda::Cuda;
use nsa_kernels::cuda::workspace::Workspace;
use nsa_kernels::op::slc;
use nsa_kernels::{Backend, Rows};
use nsa_tests::check::Op;
use nsa_tests::sim::on_simulator;
use nsa_tests::{Case, generate};

/// What [`Cuda::limit_shares`] is at first.
const UNLIMITED: usize = 260 << 20;

fn device() -> (Backend, Cuda) {
    let backend = Backend::cuda(0).expect("the simulator");
    let Backend::Cuda(cuda) = backend.clone() else { panic!("a CUDA device") };
    (backend, cuda)
}

fn config(heads: usize, groups: usize) -> NsaConfig {
    let builder = NsaConfig::builder(heads, groups, 40, 24).compress_kind(CompressKind::Mean);
    builder.compress_block(8).compress_stride(4).select_block(8).select_count(3).window(33).build().expect("valid")
}

/// Bytes of the shares of so many queries.
fn share_bytes(config: &NsaConfig, queries: usize) -> usize {
    queries * config.num_heads() * config.select_count() * 4 * (config.head_dim_v().next_multiple_of(16) + 2)
}

/// The bits of o and lse with these lists, and bytes of the workspace.
fn forward(config: &NsaConfig, sequences: &[(usize, usize)], lists: &[i32], limit: usize) -> (Vec<u32>, usize) {
    let (backend, cuda) = device();
    cuda.limit_shares(limit);
    let lengths = CuSeqlens::from_lengths(sequences.iter().map(|&(queries, _)| queries)).expect("short");
    let contexts = sequences.iter().map(|&(_, context)| context).collect();
    let packing = Packing::with_contexts(lengths, contexts).expect("short");
    let offsets = packing.cu_keys().expect("short");
    let (n, heads, groups) = (packing.num_tokens(), config.num_heads(), config.num_kv_heads());
    let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
    let upload = |count: usize, step| backend.upload(&numbers::<bf16>(count, step));
    // A query is the same one behind any context, a key the same one of any sequence.
    let of_position = |row: usize, step| numbers::<bf16>(1000 * row, step);
    let q_rows = of_position(heads * dim_k, 31);
    let positions = packing.seqs().flat_map(|seq| seq.context..seq.end());
    let q: Vec<bf16> = positions.flat_map(|t| q_rows[t * heads * dim_k..][..heads * dim_k].to_vec()).collect();
    let q = backend.upload(&q);
    let [k, v] = [(dim_k, 17), (dim_v, 23)].map(|(dim, step)| {
        let rows = of_position(groups * dim, step);
        let all: Vec<bf16> = packing.seqs().flat_map(|seq| rows[..seq.end() * groups * dim].to_vec()).collect();
        backend.upload(&all)
    });
    let block_indices = backend.upload(lists);
    let (mut o, mut lse) = (upload(n * heads * dim_v, 3), backend.alloc::<f32>(n * heads));
    let mut workspace = Workspace::new(&cuda);
    let args = slc::Forward {
        config,
        packing: &packing,
        q: q.tensor([n, heads, dim_k]).expect("sizes"),
        k: Rows::packed(k.tensor([offsets.total(), groups, dim_k]).expect("sizes"), &offsets),
        v: Rows::packed(v.tensor([offsets.total(), groups, dim_v]).expect("sizes"), &offsets),
        block_indices: block_indices.tensor([n, groups, config.select_count()]).expect("sizes"),
        o: o.tensor_mut([n, heads, dim_v]).expect("sizes"),
        lse: lse.tensor_mut([n, heads]).expect("sizes"),
    };
    cuda.with_workspace(&mut workspace, || slc::forward(&backend, args)).expect("runs");
    assert!(workspace.bytes() > 0, "queries that walk over blocks need no memory");
    let (mut rows, mut sums) = (vec![bf16::ZERO; o.len()], vec![0.0; lse.len()]);
    o.read(&mut rows).expect("there");
    lse.read(&mut sums).expect("there");
    let bits = rows.iter().map(|x| u32::from(x.to_bits())).chain(sums.iter().map(|x: &f32| x.to_bits())).collect();
    (bits, workspace.bytes())
}

/// Legal lists of one sequence. Most name the first block: its queries are several works, where they are not cut into runs.
fn lists(config: &NsaConfig, tokens: usize) -> Vec<i32> {
    let mut lists = generate::selection(&Case::new("turned", config.to_builder(), [tokens]));
    lists.chunks_exact_mut(config.select_count()).filter(|list| list[0] > 0).for_each(|list| list[0] = 0);
    lists
}

/// One, two and four heads a KV head in the types and cases of the error model, in runs that end within sequences; and as a branch
/// of the whole operator, whose gradients of queries are sums.
#[test]
fn runs_of_queries() {
    on_simulator("turned::runs_of_queries", || {
        let (backend, cuda) = device();
        for (heads, groups) in [(3, 3), (4, 2), (4, 1)] {
            let config = config(heads, groups);
            cuda.limit_shares(share_bytes(&config, 160));
            let case = Case::new(format!("runs-{heads}-{groups}"), config.to_builder(), [3, 150, 0, 70]);
            assert_cases_on(&backend, Op::Slc, &[case]);
        }
        let case = Case::new("runs-of-branch", config(4, 2).to_builder(), [150]);
        assert_cases_on(&backend, Op::Nsa, &[case]);
    });
}

/// Runs change no bit, and take no more memory than they may.
#[test]
fn runs_change_no_bit() {
    on_simulator("turned::runs_change_no_bit", || {
        for config in [config(2, 2), config(4, 2), config(8, 2)] {
            let lists = lists(&config, 150);
            let (all, _) = forward(&config, &[(150, 0)], &lists, UNLIMITED);
            let hash = generate::hash(all.iter().flat_map(|x| x.to_le_bytes()));
            println!("{BITS}{} heads: {hash:016x}", config.num_heads());
            for queries in [128, 96] {
                let limit = share_bytes(&config, queries);
                let (bits, bytes) = forward(&config, &[(150, 0)], &lists, limit);
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
    on_simulator("turned::contexts_change_no_bit", || {
        let config = config(8, 2);
        let of_query = config.num_kv_heads() * config.select_count();
        let lists = lists(&config, 200);
        let (all, _) = forward(&config, &[(200, 0)], &lists, UNLIMITED);
        let behind = [lists[..30 * of_query].to_vec(), lists[90 * of_query..].to_vec()].concat();
        let (bits, _) = forward(&config, &[(30, 0), (0, 50), (110, 90)], &behind, share_bytes(&config, 77));
        let of = |bits: &[u32], query: usize| {
            let (o, lse) = bits.split_at(bits.len() / (config.head_dim_v() + 1) * config.head_dim_v());
            let (row, heads) = (config.num_heads() * config.head_dim_v(), config.num_heads());
            [o[query * row..][..row].to_vec(), lse[query * heads..][..heads].to_vec()]
        };
        for (at, query) in (0..30).chain(90..200).enumerate() {
            assert_eq!(of(&bits, at), of(&all, query), "query {query}");
        }
    });
}

/// What is no list ends where it stops being one: a block twice, one of the past, of the future, of no sequence, negative ones.
#[test]
fn lists_end_where_they_are_none() {
    on_simulator("turned::lists_end_where_they_are_none", || {
        let config = config(4, 2);
        let legal = lists(&config, 200);
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
        let run = |lists: &[i32]| forward(&config, &[(200, 0)], lists, share_bytes(&config, 101)).0;
        assert!(run(&broken) == run(&cut));
    });
}
