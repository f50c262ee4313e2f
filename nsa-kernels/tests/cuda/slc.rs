//! Selected attention whose queries walk over blocks: warps alone, and those of a block of threads together.

use super::pages::numbers;
use super::{BITS, counted, field};
use half::bf16;
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};
use nsa_kernels::cuda::Cuda;
use nsa_kernels::cuda::workspace::Workspace;
use nsa_kernels::op::slc;
use nsa_kernels::{Backend, Rows};
use nsa_tests::sim::{self, on_simulator};
use nsa_tests::{Case, generate};

/// What [`Cuda::limit_shares`] is at first.
pub const UNLIMITED: usize = 260 << 20;

pub fn device() -> (Backend, Cuda) {
    let backend = Backend::cuda(0).expect("the simulator");
    let Backend::Cuda(cuda) = backend.clone() else { panic!("a CUDA device") };
    (backend, cuda)
}

/// The bits of o and lse of so many queries behind so long contexts, with these lists, and bytes of the workspace. A query is the same
/// one behind any context, a key the same one of any sequence.
pub fn forward(config: &NsaConfig, sequences: &[(usize, usize)], lists: &[i32], limit: usize) -> (Vec<u32>, usize) {
    let (backend, cuda) = device();
    cuda.limit_shares(limit);
    let lengths = CuSeqlens::from_lengths(sequences.iter().map(|&(queries, _)| queries)).expect("short");
    let contexts = sequences.iter().map(|&(_, context)| context).collect();
    let packing = Packing::with_contexts(lengths, contexts).expect("short");
    let offsets = packing.cu_keys().expect("short");
    let (n, heads, groups) = (packing.num_tokens(), config.num_heads(), config.num_kv_heads());
    let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
    let upload = |count: usize, step| backend.upload(&numbers::<bf16>(count, step));
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
    let (mut rows, mut sums) = (vec![bf16::ZERO; o.len()], vec![0.0; lse.len()]);
    o.read(&mut rows).expect("there");
    lse.read(&mut sums).expect("there");
    let bits = rows.iter().map(|x| u32::from(x.to_bits())).chain(sums.iter().map(|x: &f32| x.to_bits())).collect();
    (bits, workspace.bytes())
}

/// One KV head, four blocks a query.
fn config(heads: usize, dim: usize, block: usize) -> NsaConfig {
    let builder = NsaConfig::builder(heads, 1, dim, dim).compress_kind(CompressKind::Mean).compress_block(8);
    builder.compress_stride(4).select_block(block).select_count(4).window(33).build().expect("valid")
}

/// Lists of `tokens` queries of one KV head: blocks `of(query, place)`, less those that are no candidates.
fn lists(config: &NsaConfig, tokens: usize, of: impl Fn(usize, usize) -> usize) -> Vec<i32> {
    let (count, block) = (config.select_count(), config.select_block());
    let list = |query: usize| {
        let mut list: Vec<_> =
            (0..count).map(|i| of(query, i)).filter(|&at| at <= query / block).map(|at| at as i32).collect();
        list.resize(count, -1);
        list
    };
    (0..tokens).flat_map(list).collect()
}

/// Queries get the bits that each has as a sequence of its own, whose warp walks alone, whatever their lists have in common: with
/// one query a warp, with two, with two warps a query, with a warp of an unfinished tile, and with warps that have none; blocks are one
/// step, two, and four.
#[test]
fn company_changes_no_bit() {
    on_simulator("slc::company_changes_no_bit", || {
        // An H100's queries walk over unions.
        let many = [(16, 64, 16), (9, 128, 64), (8, 64, 16), (5, 64, 32), (20, 64, 16), (33, 64, 16)];
        for &(heads, dim, block) in &many[..if sim::again() { 2 } else { 6 }] {
            let (config, tokens) = (config(heads, dim, block), 9 * block + 6);
            let case = Case::new("company", config.to_builder(), [tokens]);
            let alone: Vec<_> = (0..tokens).map(|context| (1, context)).collect();
            let of = [
                lists(&config, tokens, |_, i| 2 * i),
                lists(&config, tokens, |query, i| if i == 3 { 3 + query % 4 } else { i }),
                lists(&config, tokens, |query, i| if i == 0 { query % 3 } else { 1 + 2 * i + query / 2 % 2 }),
                generate::selection(&case),
            ];
            for (at, lists) in of.iter().enumerate() {
                let (together, _) = forward(&config, &[(tokens, 0)], lists, UNLIMITED);
                let hash = generate::hash(together.iter().flat_map(|x| x.to_le_bytes()));
                println!("{BITS}{heads} heads, lists {at}: {hash:016x}");
                let (apart, _) = forward(&config, &alone, lists, UNLIMITED);
                assert!(together == apart, "{heads} heads, lists {at}");
            }
        }
    });
}

/// A block that several warps have selected is copied once for all of them, where that saves a fourth of the copies: sectors of
/// memory that are asked for beside those of empty lists. Warps multiply with their own queries' blocks alone.
#[test]
fn blocks_in_common_are_copied_once() {
    const QUERIES: usize = 64;
    const CONTEXT: usize = 512;
    let config = config(16, 64, 16);
    let alike = |_: usize, i: usize| 2 * i;
    let in_pairs = |query: usize, i: usize| query / 2 % 2 * 10 + if i < 2 { i } else { query % 2 * 2 + i };
    let but_for_one = |query: usize, i: usize| if i == 0 { 0 } else { query % 4 * 3 + i };
    let launches = counted("slc::blocks_in_common_are_copied_once", || {
        let lists = |of: &dyn Fn(usize, usize) -> usize| lists(&config, CONTEXT + QUERIES, of)[4 * CONTEXT..].to_vec();
        let none = vec![-1; 4 * QUERIES];
        for lists in [none, lists(&alike), lists(&in_pairs), lists(&but_for_one)] {
            forward(&config, &[(QUERIES, CONTEXT)], &lists, UNLIMITED);
        }
    });
    let Some(launches) = launches else { return };
    let sectors: Vec<_> = launches.iter().map(|line| field(line, "global_sectors")).collect();
    let of_block = (config.select_block() * 2 * 64 * 2 / 32) as f64;
    let copied: Vec<_> = sectors.iter().map(|count| (count - sectors[0]) / of_block / (QUERIES / 4) as f64).collect();
    // Of four queries with four blocks each.
    assert_eq!(copied, [0.0, 4.0, 12.0, 16.0]);
    let flop: Vec<_> = launches.iter().map(|line| field(line, "tensor_flop")).collect();
    assert!(flop[1] > 0.0 && flop[1..].iter().all(|&of_lists| of_lists == flop[1]), "{flop:?}");
}

/// The bits of dq of one sequence's queries with these lists. What a forward would leave is made up.
fn query_gradients(config: &NsaConfig, tokens: usize, lists: &[i32]) -> Vec<u32> {
    let (backend, _) = device();
    let packing = Packing::new(CuSeqlens::single(tokens).expect("short"));
    let (heads, groups) = (config.num_heads(), config.num_kv_heads());
    let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
    let upload = |len: usize, step| backend.upload(&numbers::<bf16>(tokens * len, step));
    let (q, k, v) = (upload(heads * dim_k, 31), upload(groups * dim_k, 17), upload(groups * dim_v, 23));
    let (o, d_o, lse) = (upload(heads * dim_v, 3), upload(heads * dim_v, 7), backend.alloc::<f32>(tokens * heads));
    let block_indices = backend.upload(lists);
    let alloc = |len: usize| backend.alloc::<f32>(tokens * len);
    let (mut dq, mut dk, mut dv) = (alloc(heads * dim_k), alloc(groups * dim_k), alloc(groups * dim_v));
    let args = slc::Backward {
        config,
        packing: &packing,
        q: q.tensor([tokens, heads, dim_k]).expect("sizes"),
        k: k.tensor([tokens, groups, dim_k]).expect("sizes"),
        v: v.tensor([tokens, groups, dim_v]).expect("sizes"),
        block_indices: block_indices.tensor([tokens, groups, config.select_count()]).expect("sizes"),
        o: o.tensor([tokens, heads, dim_v]).expect("sizes"),
        lse: lse.tensor([tokens, heads]).expect("sizes"),
        d_o: d_o.tensor([tokens, heads, dim_v]).expect("sizes"),
        gates: None,
        d_gates: None,
        dq: dq.tensor_mut([tokens, heads, dim_k]).expect("sizes"),
        accumulate: false,
        dk: dk.tensor_mut([tokens, groups, dim_k]).expect("sizes"),
        dv: dv.tensor_mut([tokens, groups, dim_v]).expect("sizes"),
    };
    slc::backward(&backend, args).expect("runs");
    let mut rows = vec![0.0; dq.len()];
    dq.read(&mut rows).expect("there");
    rows.iter().map(|x: &f32| x.to_bits()).collect()
}

/// A query's gradient has the same bits among queries with its own list, whose warps walk jointly, and among others with blocks of
/// their own, whose warps walk alone: with one query a warp, and with three; blocks are one step, and two.
#[test]
fn company_changes_no_gradient() {
    on_simulator("slc::company_changes_no_gradient", || {
        const APART: usize = 12;
        for (heads, dim, block) in [(16, 64, 8), (5, 32, 32)] {
            let config = config(heads, dim, block);
            // From here on all blocks that are named are candidates.
            let first = block * (4 * APART + 4);
            let tokens = first + 2 * APART;
            // The block that a query is in comes last.
            let with_own = |query: usize, i| if i == 3 { query / block } else { i };
            let alike = query_gradients(&config, tokens, &lists(&config, tokens, with_own));
            let row = heads * config.head_dim_qk();
            for kept in [2, 8] {
                let of = |query: usize, i| match query % APART {
                    at if at == kept => with_own(query, i),
                    at => 4 + at * 4 + i,
                };
                let apart = query_gradients(&config, tokens, &lists(&config, tokens, of));
                for query in (first..tokens).filter(|query| query % APART == kept) {
                    let of_query = |dq: &[u32]| dq[query * row..][..row].to_vec();
                    assert!(of_query(&alike) == of_query(&apart), "{heads} heads, query {query}");
                }
            }
        }
    });
}
