//! Layer operations at the shapes of a training step (4 layers, C = 256, F = 768, 4 × 1024 tokens, byte vocabulary) and
//! of a decoding step. Throughput counts FLOP as elements for products, and bytes that must move for the rest.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nsa_core::Element;
use nsa_kernels::layer::{adamw, add, cross_entropy, embedding, linear, rmsnorm, rope, sigmoid, swiglu};
use nsa_kernels::{Backend, Tensor, TensorMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Duration;

const ROWS: usize = 4096;
const CHANNELS: usize = 256;
const HIDDEN: usize = 768;
const VOCABULARY: usize = 256;

fn random<T: Element>(len: usize) -> Vec<T> {
    let mut rng = ChaCha8Rng::seed_from_u64(len as u64);
    (0..len).map(|_| T::from_f64(rng.random_range(-1.0..1.0))).collect()
}

fn tensor<T, const N: usize>(data: &[T], shape: [usize; N]) -> Tensor<'_, T, N> {
    Tensor::host(data, shape).expect("shape of the data")
}

fn tensor_mut<T, const N: usize>(data: &mut [T], shape: [usize; N]) -> TensorMut<'_, T, N> {
    TensorMut::host(data, shape).expect("shape of the data")
}

fn backend() -> Backend {
    Backend::pick(None).expect("a backend").0
}

/// The products of a linear layer; `cpu:portable` is the library's GEMM.
fn products<T: Element<Acc = f32>>(criterion: &mut Criterion, backend: &str) {
    let backend = Backend::pick(Some(backend)).expect("a backend").0;
    let mut group = criterion.benchmark_group(format!("linear/{}/{}", backend.name(), T::DTYPE));
    for (i, o) in [(CHANNELS, CHANNELS), (CHANNELS, HIDDEN), (HIDDEN, CHANNELS), (4 * CHANNELS, 4 * CHANNELS)] {
        let (x, weight, dy) = (random::<T>(ROWS * i), random::<T>(o * i), random::<f32>(ROWS * o));
        let (mut y, mut dx, mut dw) = (random::<T>(ROWS * o), vec![0f32; ROWS * i], vec![0f32; o * i]);
        group.throughput(Throughput::Elements(2 * (ROWS * i * o) as u64));
        group.bench_function(format!("forward/{ROWS}x{i}x{o}"), |b| {
            b.iter(|| {
                let (x, weight, y) = (tensor(&x, [ROWS, i]), tensor(&weight, [o, i]), tensor_mut(&mut y, [ROWS, o]));
                linear::forward(&backend, linear::Forward { x, weight, bias: None, y, accumulate: false })
            });
        });
        group.bench_function(format!("backward_input/{ROWS}x{i}x{o}"), |b| {
            b.iter(|| {
                let (weight, dx) = (tensor(&weight, [o, i]), tensor_mut(&mut dx, [ROWS, i]));
                let dy = tensor(&dy, [ROWS, o]);
                linear::backward_input(&backend, linear::BackwardInput { dy, weight, dx, accumulate: false })
            });
        });
        group.bench_function(format!("backward_weight/{ROWS}x{i}x{o}"), |b| {
            b.iter(|| {
                let (x, dy, dw) = (tensor(&x, [ROWS, i]), tensor(&dy, [ROWS, o]), tensor_mut(&mut dw, [o, i]));
                linear::backward_weight(&backend, linear::BackwardWeight { x, dy, dw, db: None })
            });
        });
    }
    group.finish();
}

fn all_products(criterion: &mut Criterion) {
    products::<f32>(criterion, "cpu:portable");
    products::<f32>(criterion, "cpu");
    products::<half::bf16>(criterion, "cpu");
}

/// Few rows times a weight that no cache holds: bytes of the weight a second.
fn few_rows<W: Element<Acc = f32>>(criterion: &mut Criterion) {
    let backend = backend();
    let (i, o) = (2048, 8192);
    let weight = random::<W>(o * i);
    let mut group = criterion.benchmark_group(format!("linear_few_rows/{}", W::DTYPE));
    group.throughput(Throughput::Bytes((o * i * size_of::<W>()) as u64));
    for rows in [1, 2, 4, 8, 16, 64] {
        let (x, mut y) = (random::<f32>(rows * i), vec![0f32; rows * o]);
        group.bench_function(format!("{rows}x{i}x{o}"), |b| {
            b.iter(|| {
                let (x, weight, y) = (tensor(&x, [rows, i]), tensor(&weight, [o, i]), tensor_mut(&mut y, [rows, o]));
                linear::forward(&backend, linear::Forward { x, weight, bias: None, y, accumulate: false })
            });
        });
    }
    group.finish();
}

fn norms(criterion: &mut Criterion) {
    let backend = backend();
    let mut group = criterion.benchmark_group("rmsnorm");
    for (n, c) in [(ROWS, CHANNELS), (ROWS * 4, CHANNELS / 4)] {
        let (x, weight, dy) = (random::<f32>(n * c), random::<f32>(c), random::<f32>(n * c));
        let (mut y, mut rstd, mut dw) = (vec![0f32; n * c], vec![0f32; n], vec![0f32; c]);
        group.throughput(Throughput::Bytes((2 * n * c * 4) as u64));
        group.bench_function(format!("forward/{n}x{c}"), |b| {
            b.iter(|| {
                let (x, weight, eps) = (tensor(&x, [n, c]), tensor(&weight, [c]), 1e-5);
                let (y, rstd) = (tensor_mut(&mut y, [n, c]), Some(tensor_mut(&mut rstd, [n])));
                rmsnorm::forward(&backend, rmsnorm::Forward { x, weight, eps, y, rstd })
            });
        });
        group.throughput(Throughput::Bytes((4 * n * c * 4) as u64));
        group.bench_function(format!("backward_accumulate/{n}x{c}"), |b| {
            b.iter(|| {
                let (x, weight, rstd) = (tensor(&x, [n, c]), tensor(&weight, [c]), tensor(&rstd, [n]));
                let (dy, dx, dw) = (tensor(&dy, [n, c]), tensor_mut(&mut y, [n, c]), tensor_mut(&mut dw, [c]));
                rmsnorm::backward(&backend, rmsnorm::Backward { x, weight, rstd, dy, dx, accumulate: true, dw })
            });
        });
    }
    group.finish();
}

fn elementwise(criterion: &mut Criterion) {
    let backend = backend();
    let shape = [ROWS, HIDDEN];
    let len = ROWS * HIDDEN;
    let (a, b, c) = (random::<f32>(len), random::<f32>(len), random::<f32>(len));
    let (mut y, mut z) = (vec![0f32; len], vec![0f32; len]);
    let mut group = criterion.benchmark_group("elementwise");
    group.throughput(Throughput::Bytes((3 * len * 4) as u64));
    group.bench_function("swiglu/forward", |bench| {
        bench.iter(|| {
            let (gate, up, y) = (tensor(&a, shape), tensor(&b, shape), tensor_mut(&mut y, shape));
            swiglu::forward(&backend, swiglu::Forward { gate, up, y })
        });
    });
    group.throughput(Throughput::Bytes((5 * len * 4) as u64));
    group.bench_function("swiglu/backward", |bench| {
        bench.iter(|| {
            let (gate, up, dy) = (tensor(&a, shape), tensor(&b, shape), tensor(&c, shape));
            let (d_gate, d_up) = (tensor_mut(&mut y, shape), tensor_mut(&mut z, shape));
            swiglu::backward(&backend, swiglu::Backward { gate, up, dy, d_gate, d_up })
        });
    });
    group.throughput(Throughput::Bytes((2 * len * 4) as u64));
    group.bench_function("sigmoid/forward", |bench| {
        bench.iter(|| {
            let (x, y) = (tensor(&a, shape), tensor_mut(&mut y, shape));
            sigmoid::forward(&backend, sigmoid::Forward { x, y })
        });
    });
    group.throughput(Throughput::Bytes((3 * len * 4) as u64));
    group.bench_function("add/accumulate", |bench| {
        bench.iter(|| {
            let (x, y) = (tensor(&a, shape), tensor_mut(&mut y, shape));
            add::accumulate(&backend, add::Accumulate { x, y })
        });
    });
    group.finish();
}

fn rotations(criterion: &mut Criterion) {
    let backend = backend();
    let (heads, dim) = (4, CHANNELS / 4);
    let inv_freq: Vec<f64> = (0..dim / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / dim as f64)).collect();
    let cache = rope::RopeCache::<f32>::new(&backend, &inv_freq, 1.0, ROWS / 4);
    let positions: Vec<i32> = (0..ROWS).map(|n| (n % (ROWS / 4)) as i32).collect();
    let mut x = random::<f32>(ROWS * CHANNELS);
    let mut group = criterion.benchmark_group("rope");
    group.throughput(Throughput::Bytes((2 * ROWS * CHANNELS * 4) as u64));
    group.bench_function("forward_in_place", |b| {
        b.iter(|| {
            let (positions, x) = (tensor(&positions, [ROWS]), tensor_mut(&mut x, [ROWS, heads, dim]));
            rope::forward_in_place(&backend, rope::RotateInPlace { cache: &cache, positions, x: vec![x] })
        });
    });
    group.finish();
}

fn tables(criterion: &mut Criterion) {
    let backend = backend();
    let tokens: Vec<u32> = (0..ROWS).map(|n| (n * n % VOCABULARY) as u32).collect();
    let (weight, hidden) = (random::<f32>(VOCABULARY * CHANNELS), random::<f32>(ROWS * CHANNELS));
    let (mut y, mut dw) = (vec![0f32; ROWS * CHANNELS], vec![0f32; VOCABULARY * CHANNELS]);
    let mut group = criterion.benchmark_group("tables");
    group.throughput(Throughput::Bytes((2 * ROWS * CHANNELS * 4) as u64));
    group.bench_function("embedding/forward", |b| {
        b.iter(|| {
            let (tokens, weight) = (tensor(&tokens, [ROWS]), tensor(&weight, [VOCABULARY, CHANNELS]));
            embedding::forward(&backend, embedding::Forward { tokens, weight, y: tensor_mut(&mut y, [ROWS, CHANNELS]) })
        });
    });
    group.bench_function("embedding/backward", |b| {
        b.iter(|| {
            let (tokens, dy) = (tensor(&tokens, [ROWS]), tensor(&hidden, [ROWS, CHANNELS]));
            let dw = tensor_mut(&mut dw, [VOCABULARY, CHANNELS]);
            embedding::backward(&backend, embedding::Backward { tokens, dy, dw })
        });
    });
    group.throughput(Throughput::Elements(6 * (ROWS * CHANNELS * VOCABULARY) as u64));
    group.bench_function("cross_entropy/forward_backward", |b| {
        b.iter(|| {
            let hidden = tensor(&hidden, [ROWS, CHANNELS]);
            let (weight, targets) = (tensor(&weight, [VOCABULARY, CHANNELS]), tensor(&tokens, [ROWS]));
            let d_hidden = tensor_mut(&mut y, [ROWS, CHANNELS]);
            let d_weight = Some(tensor_mut(&mut dw, [VOCABULARY, CHANNELS]));
            let args = cross_entropy::ForwardBackward { hidden, weight, targets, scale: 1e-4, d_hidden, d_weight };
            cross_entropy::forward_backward(&backend, args)
        });
    });
    group.finish();
}

fn optimizer(criterion: &mut Criterion) {
    let backend = backend();
    let len = 3_500_000;
    let (grads, mut params) = (random::<f32>(len), random::<f32>(len));
    let (mut m, mut v) = (vec![0f32; len], vec![0f32; len]);
    let config = adamw::AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let mut group = criterion.benchmark_group("adamw");
    group.throughput(Throughput::Bytes((7 * len * 4) as u64));
    group.bench_function("step", |b| {
        b.iter(|| {
            let (grads, params) = (tensor(&grads, [len]), tensor_mut(&mut params, [len]));
            let (m, v) = (tensor_mut(&mut m, [len]), tensor_mut(&mut v, [len]));
            adamw::step(&backend, adamw::Step { config, step: 10, grad_scale: 0.5, grads, params, m, v })
        });
    });
    group.throughput(Throughput::Bytes((len * 4) as u64));
    group.bench_function("sum_of_squares", |b| b.iter(|| adamw::sum_of_squares(&backend, tensor(&grads, [len]))));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600));
    targets = all_products, few_rows::<f32>, few_rows::<half::bf16>, few_rows::<half::f16>, norms, elementwise, rotations,
        tables, optimizer
}
criterion_main!(benches);
