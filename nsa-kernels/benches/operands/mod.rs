//! Operands of the attention benchmarks: one sequence, the paper's block sizes, random elements; throughput counts the
//! FLOP of the products as elements.

use criterion::{Criterion, Throughput};
use nsa_core::{CuSeqlens, NsaConfig, Packing};
use nsa_kernels::{Backend, Tensor, TensorMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Heads, KV heads and dims of a benchmark.
type Shape = (usize, usize, usize);

/// A group of query heads on one KV head, as NSA wants them; and heads of their own, as small dense models have.
pub const SHAPES: [Shape; 2] = [(16, 1, 128), (4, 4, 64)];

/// Tensors of one call in f32.
pub struct Operands {
    pub backend: Backend,
    pub config: NsaConfig,
    pub packing: Packing,
    /// Offsets of `k` and `v`.
    pub offsets: CuSeqlens,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub o: Vec<f32>,
    pub lse: Vec<f32>,
    pub d_o: Vec<f32>,
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
}

impl Operands {
    /// Operands for one sequence whose rows of keys `offsets` gives.
    pub fn new((heads, kv_heads, dim): Shape, len: usize, offsets: fn(&NsaConfig, &Packing) -> CuSeqlens) -> Self {
        let config = NsaConfig::builder(heads, kv_heads, dim, dim).compress_hidden(dim).build().expect("a legal shape");
        let packing = Packing::new(CuSeqlens::single(len).expect("a short sequence"));
        let offsets = offsets(&config, &packing);
        let (queries, keys) = (len * heads * dim, offsets.total() * kv_heads * dim);
        Self {
            backend: Backend::pick(None).expect("a backend").0,
            q: random(1, queries),
            k: random(2, keys),
            v: random(3, keys),
            o: vec![0.0; queries],
            lse: vec![0.0; len * heads],
            d_o: random(4, queries),
            dq: vec![0.0; queries],
            dk: vec![0.0; keys],
            dv: vec![0.0; keys],
            config,
            packing,
            offsets,
        }
    }

    /// `[N, Hq, D]`.
    pub fn queries(&self) -> [usize; 3] {
        [self.packing.num_tokens(), self.config.num_heads(), self.config.head_dim_qk()]
    }

    /// `[rows, G, D]`.
    pub fn keys(&self) -> [usize; 3] {
        [self.offsets.total(), self.config.num_kv_heads(), self.config.head_dim_qk()]
    }

    /// `[N, Hq]`.
    pub fn rows(&self) -> [usize; 2] {
        [self.packing.num_tokens(), self.config.num_heads()]
    }

    /// Runs forward (two products a pair of query row and key) and backward (five), of which query t has `pairs(t)`.
    pub fn measure(
        &mut self,
        criterion: &mut Criterion,
        op: &str,
        pairs: impl Fn(&Self, usize) -> usize,
        directions: [&dyn Fn(&mut Self); 2],
    ) {
        let [len, heads, dim] = self.queries();
        let pairs = (0..len).map(|t| pairs(self, t)).sum::<usize>() * heads;
        let mut group = criterion.benchmark_group(op);
        group.sample_size(10);
        for (name, products, run) in [("forward", 2, directions[0]), ("backward", 5, directions[1])] {
            group.throughput(Throughput::Elements((products * 2 * pairs * dim) as u64));
            let id = format!("{name}/T={len},Hq={heads},G={},D={dim}", self.config.num_kv_heads());
            group.bench_function(id, |b| b.iter(|| run(self)));
        }
        group.finish();
    }
}

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// As a tensor of an operation.
pub fn tensor<T, const N: usize>(data: &[T], shape: [usize; N]) -> Tensor<'_, T, N> {
    Tensor::host(data, shape).expect("shape of the data")
}

/// As a writable tensor of an operation.
pub fn tensor_mut<T, const N: usize>(data: &mut [T], shape: [usize; N]) -> TensorMut<'_, T, N> {
    TensorMut::host(data, shape).expect("shape of the data")
}
