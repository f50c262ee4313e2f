//! One decoding step at the paper's block sizes (n = 16 of 64 tokens, w = 512), 16 query heads on one KV head, D = 128,
//! beside full attention over the same pages. Throughput counts the bytes of the K and V rows that a step reads.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nsa_core::{CuSeqlens, NsaConfig, Packing, index};
use nsa_kernels::op::{decode, dense};
use nsa_kernels::{Backend, Mem, Pages, Rows, Tensor, TensorMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Duration;

const HEADS: usize = 16;
const DIM: usize = 128;
const PAGE_ROWS: usize = 64;
const CONTEXTS: [usize; 4] = [8192, 16_384, 32_768, 65_536];

fn random(len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(len as u64);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// The first `rows` rows of a cache.
fn pages(data: &[f32], rows: usize) -> Pages<'_, f32> {
    let pages = data.chunks_exact(PAGE_ROWS * DIM).take(rows.div_ceil(PAGE_ROWS)).map(Mem::Host).collect();
    Pages { pages, page_rows: PAGE_ROWS, len: rows, row_shape: [1, DIM] }
}

fn steps(criterion: &mut Criterion) {
    let backend = Backend::pick(None).expect("a backend").0;
    let config = &NsaConfig::builder(HEADS, 1, DIM, DIM).compress_hidden(DIM).build().expect("a valid configuration");
    let (keys, values) = (random(CONTEXTS[3] * DIM), random((CONTEXTS[3] + PAGE_ROWS) * DIM));
    let (q, gates) = (random(HEADS * DIM), random(HEADS * 3));
    let q = Tensor::host(&q, [1, HEADS, DIM]).expect("shape of the data");
    let (mut o, mut lse, mut lists) = (vec![0f32; HEADS * DIM], vec![0f32; HEADS], vec![0i32; 16]);
    let row_bytes = (2 * DIM * size_of::<f32>()) as u64;
    let mut group = criterion.benchmark_group("decode");
    for context in CONTEXTS {
        let blocks = index::num_blocks(config, context);
        let ring = |data| Tensor::host(data, [config.window(), 1, DIM]).expect("shape of the data");
        let caches = [decode::Cache {
            context,
            k_cmp: pages(&keys, blocks),
            v_cmp: pages(&values, blocks),
            k_slc: pages(&keys, context),
            v_slc: pages(&values, context),
            k_win: ring(&keys),
            v_win: ring(&values),
        }];
        group.throughput(Throughput::Bytes(row_bytes * index::decode_rows(config, context) as u64));
        group.bench_function(BenchmarkId::new("nsa", context), |b| {
            b.iter(|| {
                let args = decode::Step {
                    config,
                    caches: &caches,
                    q,
                    gates: Tensor::host(&gates, [1, HEADS, 3]).expect("shape of the data"),
                    o: TensorMut::host(&mut o, [1, HEADS, DIM]).expect("shape of the data"),
                    block_indices: TensorMut::host(&mut lists, [1, 1, 16]).expect("shape of the data"),
                };
                decode::step(&backend, args)
            });
        });
        let one = CuSeqlens::single(1).expect("short");
        let packing = Packing::with_contexts(one, vec![context - 1]).expect("short");
        let (k, v) = ([pages(&keys, context)], [pages(&values, context)]);
        group.throughput(Throughput::Bytes(row_bytes * context as u64));
        group.bench_function(BenchmarkId::new("dense", context), |b| {
            b.iter(|| {
                let args = dense::Forward {
                    config,
                    packing: &packing,
                    q,
                    k: Rows::Paged(&k),
                    v: Rows::Paged(&v),
                    o: TensorMut::host(&mut o, [1, HEADS, DIM]).expect("shape of the data"),
                    lse: TensorMut::host(&mut lse, [1, HEADS]).expect("shape of the data"),
                };
                dense::forward(&backend, args)
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(1));
    targets = steps
}
criterion_main!(benches);
