//! φ at the paper's block sizes (32/16), one KV head, D = 128, H = 128, T = 8,192. Throughput counts FLOP as elements.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};
use nsa_kernels::op::compress::{Backward, Forward, Phi, PhiGrad, backward, forward};
use nsa_kernels::{Backend, Tensor, TensorMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Duration;

const TOKENS: usize = 8192;
const DIM: usize = 128;
const HIDDEN: usize = 128;
const BLOCK: usize = 32;

fn random(len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(len as u64);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn tensor<const N: usize>(data: &[f32], shape: [usize; N]) -> Tensor<'_, f32, N> {
    Tensor::host(data, shape).expect("shape of the data")
}

fn tensor_mut<const N: usize>(data: &mut [f32], shape: [usize; N]) -> TensorMut<'_, f32, N> {
    TensorMut::host(data, shape).expect("shape of the data")
}

fn mlp(criterion: &mut Criterion) {
    let backend = Backend::pick(None).expect("a backend").0;
    let config = NsaConfig::builder(16, 1, DIM, DIM).compress_kind(CompressKind::Mlp).compress_hidden(HIDDEN);
    let config = &config.build().expect("a valid configuration");
    let packing = &Packing::new(CuSeqlens::single(TOKENS).expect("short"));
    let blocks = packing.cu_blocks(config).expect("short").total();
    let (x, e, d_blocks) = (random(TOKENS * DIM), random(BLOCK * DIM), random(blocks * DIM));
    let (w1, w2) = (random(BLOCK * DIM * HIDDEN), random(HIDDEN * DIM));
    let (mut y, mut dx, mut de) = (d_blocks.clone(), x.clone(), e.clone());
    let (mut dw1, mut dw2) = (w1.clone(), w2.clone());
    let phi = Phi::Mlp {
        weight1: tensor(&w1, [1, BLOCK * DIM, HIDDEN]),
        bias1: None,
        weight2: tensor(&w2, [1, HIDDEN, DIM]),
        bias2: None,
    };
    let (x, position) = (tensor(&x, [TOKENS, 1, DIM]), Some(tensor(&e, [BLOCK, 1, DIM])));
    let flops = (2 * blocks * HIDDEN * (BLOCK * DIM + DIM)) as u64;
    let mut group = criterion.benchmark_group("compress");
    group.throughput(Throughput::Elements(flops));
    group.bench_function("mlp/forward", |b| {
        b.iter(|| {
            let blocks = tensor_mut(&mut y, [blocks, 1, DIM]);
            forward(&backend, Forward { config, packing, x, position, phi, blocks })
        });
    });
    // The forward again up to the hidden layer, then two products for each of its own.
    group.throughput(Throughput::Elements(3 * flops));
    group.bench_function("mlp/backward", |b| {
        b.iter(|| {
            let d_phi = PhiGrad::Mlp {
                weight1: tensor_mut(&mut dw1, [1, BLOCK * DIM, HIDDEN]),
                bias1: None,
                weight2: tensor_mut(&mut dw2, [1, HIDDEN, DIM]),
                bias2: None,
            };
            let d_blocks = tensor(&d_blocks, [blocks, 1, DIM]);
            let (dx, d_position) = (tensor_mut(&mut dx, [TOKENS, 1, DIM]), tensor_mut(&mut de, [BLOCK, 1, DIM]));
            let d_position = Some(d_position);
            backward(&backend, Backward { config, packing, x, position, phi, d_blocks, dx, d_position, d_phi })
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(2));
    targets = mlp
}
criterion_main!(benches);
