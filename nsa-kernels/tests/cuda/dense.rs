//! Full attention on the simulator: whole sequences, and single queries, whose keys are cut into chunks.

use super::pages::numbers;
use super::{IN_EVERY_TYPE, IN_F32, assert_cases, assert_few_bytes, counted, paper, table};
use half::{bf16, f16};
use nsa_core::{CuSeqlens, DType, NsaConfig, NsaConfigBuilder, Packing};
use nsa_kernels::cuda::Cuda;
use nsa_kernels::op::dense;
use nsa_kernels::{Backend, Buffer, Pages, Rows, Tensor, TensorMut};
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
        // 48 KiB of dynamic shared memory beside what is static.
        assert_steps::<bf16>("lone-256-64", paper(3, 1, 256, 64), &[1700, 65], odd);
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

/// Rows of pages.
const PAGE_ROWS: usize = 64;

/// A query at the end of each context.
fn steps(contexts: &[usize]) -> Packing {
    let offsets = CuSeqlens::from_lengths(contexts.iter().map(|_| 1)).expect("short");
    Packing::with_contexts(offsets, contexts.iter().map(|context| context - 1).collect()).expect("short")
}

/// The first rows in pages of two KV heads.
fn rows(pages: &[Buffer<bf16>], len: usize, dim: usize) -> Pages<'_, bf16> {
    let pages = pages[..len.div_ceil(PAGE_ROWS)].iter().map(|page| page.mem()).collect();
    Pages { pages, page_rows: PAGE_ROWS, len, row_shape: [2, dim] }
}

/// Keys and values of two sequences in pages, more rows than any context has, and two queries.
struct Placed {
    backend: Backend,
    config: NsaConfig,
    pages: [[Vec<Buffer<bf16>>; 2]; 2],
    q: Buffer<bf16>,
}

impl Placed {
    fn new(length: usize) -> Self {
        let backend = Backend::cuda(0).expect("the simulator");
        let config = paper(8, 2, 32, 16).build().expect("valid");
        let pages = |seed: usize, rows: usize, dim: usize| {
            let page = |at| backend.upload(&numbers::<bf16>(PAGE_ROWS * 2 * dim, 17 + seed + 2 * at));
            (0..rows.div_ceil(PAGE_ROWS)).map(page).collect::<Vec<_>>()
        };
        let pages = [0, 1].map(|s| [pages(100 * s, length, 32), pages(100 * s + 51, length, 16)]);
        let q = backend.upload(&numbers::<bf16>(2 * 8 * 32, 31));
        Self { backend, config, pages, q }
    }

    fn cuda(&self) -> &Cuda {
        let Backend::Cuda(cuda) = &self.backend else { panic!("a CUDA device") };
        cuda
    }

    /// The caches with such contexts, of which pages begin at sequence `first`.
    fn caches(&self, first: usize, contexts: &[usize]) -> Vec<dense::Cache<'_, bf16>> {
        let cache = |(s, &context): (usize, &usize)| {
            let [k, v] = &self.pages[(first + s) % 2];
            dense::Cache { k: rows(k, context, 32), v: rows(v, context, 16) }
        };
        contexts.iter().enumerate().map(cache).collect()
    }

    /// The bits of o and lse that `work` writes for so many sequences.
    fn bits(
        &self,
        count: usize,
        work: impl FnOnce(Tensor<'_, bf16, 3>, TensorMut<'_, bf16, 3>, TensorMut<'_, f32, 2>),
    ) -> Vec<u32> {
        let (mut o, mut lse) = (self.backend.alloc::<bf16>(count * 8 * 16), self.backend.alloc::<f32>(count * 8));
        let (o_out, lse_out) = (o.tensor_mut([count, 8, 16]).expect("o"), lse.tensor_mut([count, 8]).expect("lse"));
        work(self.q.tensor([count, 8, 32]).expect("q"), o_out, lse_out);
        let (mut rows, mut sums) = (vec![bf16::ZERO; o.len()], vec![0.0f32; lse.len()]);
        o.read(&mut rows).expect("o");
        lse.read(&mut sums).expect("lse");
        rows.iter().map(|x| u32::from(x.to_bits())).chain(sums.iter().map(|x| x.to_bits())).collect()
    }

    /// Those of the operation that is told of caches when it is called.
    fn forward(&self, first: usize, contexts: &[usize]) -> Vec<u32> {
        let (keys, values): (Vec<_>, Vec<_>) =
            self.caches(first, contexts).into_iter().map(|cache| (cache.k, cache.v)).unzip();
        let packing = steps(contexts);
        self.bits(contexts.len(), |q, o, lse| {
            let (k, v) = (Rows::Paged(&keys), Rows::Paged(&values));
            let args = dense::Forward { config: &self.config, packing: &packing, q, k, v, o, lse };
            dense::forward(&self.backend, args).expect("runs");
        })
    }

    /// Those of a step of a layer whose caches were placed.
    fn launched(&self, workspace: &mut dense::Workspace<bf16>, layer: usize, count: usize) -> Vec<u32> {
        workspace.send().expect("sent");
        self.bits(count, |q, o, lse| workspace.launch(layer, q, o, lse).expect("a launch"))
    }
}

/// Steps whose caches were placed have the bits of those that are told of them when they are called: of one chunk and of as many as
/// are joined twice, in a workspace that grows, whatever layers and batches come, and where contexts alone are other ones.
#[test]
fn placed_steps_are_the_steps() {
    on_an_a100("dense::placed_steps_are_the_steps", || {
        let placed = Placed::new(1700);
        let mut workspace = dense::Workspace::<bf16>::new(2);
        let place = |workspace: &mut dense::Workspace<bf16>, layer, first, contexts: &[usize]| {
            workspace.place(&placed.backend, &placed.config, layer, &placed.caches(first, contexts)).expect("placed")
        };
        assert_eq!(workspace.place_again(1, &[5, 6]), Ok(None), "nothing was placed");
        assert!(workspace.place(&placed.backend, &placed.config, 2, &[]).is_err(), "two layers");
        for (number, contexts) in [&[1024][..], &[130, 1], &[700, 65], &[1700, 130]].into_iter().enumerate() {
            let of_layers = [0, 1].map(|layer| place(&mut workspace, layer, layer, &contexts[..1]).anew);
            assert_eq!(of_layers, [[true, false], [false; 2], [false; 2], [true, false]][number]);
            let both = place(&mut workspace, 1, 0, contexts);
            assert_eq!((both.rows_read, both.anew), (contexts.to_vec(), number == 1));
            place(&mut workspace, 0, 1, &contexts[contexts.len() - 1..]);
            let other = placed.forward(1, &contexts[contexts.len() - 1..]);
            assert_eq!(placed.launched(&mut workspace, 0, 1), other, "{contexts:?}");
            let expected = placed.forward(0, contexts);
            assert_eq!(placed.launched(&mut workspace, 1, contexts.len()), expected, "{contexts:?}");
        }
        for contexts in [[1700, 65], [1699, 128], [64, 1], [1025, 130]] {
            assert_eq!(workspace.place_again(1, &contexts), Ok(Some(contexts.to_vec())));
            assert_eq!(placed.launched(&mut workspace, 1, 2), placed.forward(0, &contexts), "{contexts:?}");
        }
        // Sequences that were not placed are not looked at, nor do they hide others.
        place(&mut workspace, 1, 0, &[1700]);
        let (both, expected) = (placed.launched(&mut workspace, 1, 2), placed.forward(0, &[1700]));
        assert_eq!([&both[..8 * 16], &both[2 * 8 * 16..][..8]].concat(), expected);
        assert!(both[8 * 16..2 * 8 * 16].iter().chain(&both[2 * 8 * 16 + 8..]).all(|bits| *bits == 0), "not written");
        place(&mut workspace, 1, 0, &[1700, 130]);
        // Pages that were not placed, sequences that were not, no token, more than memory is for.
        for contexts in [&[1729, 65][..], &[1700, 193], &[1700], &[1700, 65, 3], &[0, 65], &[5000, 65]] {
            assert_eq!(workspace.place_again(1, contexts), Ok(None), "{contexts:?}");
        }
        assert!(workspace.place_again(2, &[5, 6]).is_err());
        let cpu = Backend::pick(Some("cpu")).expect("the CPU").0;
        let error =
            workspace.place(&cpu, &placed.config, 1, &placed.caches(0, &[9])).expect_err("on the CPU").to_string();
        assert!(error.contains("call `dense::forward`"), "{error}");
        let [mut other, mut short, mut empty] = [9; 3].map(|context| placed.caches(0, &[context]));
        other[0].v.page_rows = 32;
        short[0].v.len = 8;
        empty[0].k.len = 0;
        for (caches, rule) in [(other, "page rows"), (short, "caches[0].v"), (empty, "current token")] {
            let error = workspace.place(&placed.backend, &placed.config, 1, &caches).expect_err(rule).to_string();
            assert!(error.contains(rule), "{error}");
        }
        for contexts in [&[9, 1700, 64][..], &[3], &[]] {
            let mut first = dense::Workspace::<bf16>::new(3);
            assert_eq!(first.bytes(), 0);
            first.place(&placed.backend, &placed.config, 2, &placed.caches(0, contexts)).expect("placed");
            let packing = steps(contexts);
            let needs = placed.cuda().needs(&placed.config, &packing, DType::Bf16).expect("short");
            // Without a cache there is no size of pages either.
            assert_eq!(first.bytes(), needs.dense_step(3, if contexts.is_empty() { 1 } else { PAGE_ROWS }));
        }
        // Pages of another size are for other memory.
        let mut cut = placed.caches(0, &[9]);
        (cut[0].k.page_rows, cut[0].v.page_rows) = (32, 32);
        assert!(workspace.place(&placed.backend, &placed.config, 1, &cut).expect("placed").anew);
        assert_eq!(placed.launched(&mut workspace, 1, 1), placed.forward(0, &[9]));
        // Rows that cannot be copied 16 bytes at a time.
        cut[0].v.pages[0] = placed.pages[0][1][0].mem_at(1).expect("within the page");
        let error = workspace.place(&placed.backend, &placed.config, 1, &cut).expect_err("two bytes on").to_string();
        assert!(error.contains("no multiple of 16"), "{error}");
        let mut unplaced = dense::Workspace::<bf16>::new(1);
        placed.bits(1, |q, o, lse| {
            let error = unplaced.launch(0, q, o, lse).expect_err("nothing was placed").to_string();
            assert!(error.contains("must be placed"), "{error}");
        });
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
