//! What the tests of the branches share: calls with random operands, the comparison with the reference, and the
//! properties that every branch has.

use nsa_core::{CuSeqlens, DType, NsaConfig, Packing, Real};
use nsa_kernels::{Backend, Element, Mem, Pages, Result, Rows, Tensor, TensorMut};
use nsa_ref::Tensor as Truth;
use nsa_ref::branch::{Gradients, Inputs, Output, Upstream};
use nsa_ref::{BlockIndices, Exact};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// One branch: its own operation and the reference's.
pub trait Branch {
    /// Column of the gates, if the branch has one.
    const GATE: Option<usize>;
    /// Whether it takes block lists.
    const LISTS: bool = false;

    /// Offsets of the rows of keys.
    fn rows(config: &NsaConfig, packing: &Packing) -> CuSeqlens {
        let _ = config;
        packing.cu_keys().expect("short sequences")
    }
    /// The operation, with keys and values packed or paged.
    fn forward<T: Element>(
        call: &Call<T>,
        keys_values: [Rows<'_, T>; 2],
        o: TensorMut<'_, T, 3>,
        lse: TensorMut<'_, T::Acc, 2>,
    ) -> Result<()>;
    /// Its gradients.
    fn backward<T: Element>(call: &Call<T>, saved: &Saved<T>, grads: &mut Grads<T::Acc>) -> Result<()>;
    /// The reference.
    fn truth(call: &Call<f64>) -> Output;
    /// Its gradients.
    fn truth_grads(call: &Call<f64>, upstream: &Upstream<'_>) -> Gradients;
}

/// Operands of one call.
#[derive(Clone)]
pub struct Call<T> {
    pub config: NsaConfig,
    pub packing: Packing,
    /// Offsets of the rows of k and v.
    pub offsets: CuSeqlens,
    /// `[N, Hq, Dk]`.
    pub q: Vec<T>,
    /// `[rows, G, Dk]`.
    pub k: Vec<T>,
    /// `[rows, G, Dv]`.
    pub v: Vec<T>,
    /// `[N, G, n]`.
    pub lists: Vec<i32>,
}

/// What the backward pass takes besides the operands.
#[derive(Clone)]
pub struct Saved<T: Element> {
    /// `[N, Hq, Dv]`.
    pub o: Vec<T>,
    /// `[N, Hq]`.
    pub lse: Vec<T::Acc>,
    /// `[N, Hq, Dv]`.
    pub d_o: Vec<T>,
    /// `[N, Hq, 3]`.
    pub gates: Option<Vec<T>>,
}

/// Gradients of q, k and v.
pub struct Grads<A> {
    pub dq: Vec<A>,
    pub dk: Vec<A>,
    pub dv: Vec<A>,
}

/// Shapes of a call's tensors.
pub struct Shapes {
    pub q: [usize; 3],
    pub k: [usize; 3],
    pub v: [usize; 3],
    pub o: [usize; 3],
    pub lse: [usize; 2],
    pub lists: [usize; 3],
    pub gates: [usize; 3],
}

impl<T: Element> Call<T> {
    /// A call with random operands.
    pub fn new<B: Branch>(config: &NsaConfig, packing: Packing) -> Self {
        let offsets = B::rows(config, &packing);
        let mut call =
            Self { config: config.clone(), packing, offsets, q: vec![], k: vec![], v: vec![], lists: vec![] };
        let shapes = call.shapes();
        call.q = random(1, &shapes.q);
        call.k = random(2, &shapes.k);
        call.v = random(3, &shapes.v);
        call.lists = if B::LISTS { random_lists(config, &call.packing) } else { vec![] };
        call
    }

    pub fn shapes(&self) -> Shapes {
        let (n, rows) = (self.packing.num_tokens(), self.offsets.total());
        let (h, g) = (self.config.num_heads(), self.config.num_kv_heads());
        let (dk, dv) = (self.config.head_dim_qk(), self.config.head_dim_v());
        Shapes {
            q: [n, h, dk],
            k: [rows, g, dk],
            v: [rows, g, dv],
            o: [n, h, dv],
            lse: [n, h],
            lists: [n, g, self.config.select_count()],
            gates: [n, h, 3],
        }
    }

    /// Output and lse.
    pub fn forward<B: Branch>(&self) -> Result<(Vec<T>, Vec<T::Acc>)> {
        let shapes = self.shapes();
        let packed = [(&self.k, shapes.k), (&self.v, shapes.v)];
        self.forward_with::<B>(packed.map(|(data, shape)| Rows::packed(tensor(data, shape), &self.offsets)))
    }

    /// Output and lse, with other keys and values.
    pub fn forward_with<B: Branch>(&self, keys_values: [Rows<'_, T>; 2]) -> Result<(Vec<T>, Vec<T::Acc>)> {
        let shapes = self.shapes();
        let mut o = vec![T::from_f64(f64::NAN); shapes.o.iter().product()];
        let mut lse = vec![T::Acc::of(f64::NAN); shapes.lse.iter().product()];
        B::forward(self, keys_values, tensor_mut(&mut o, shapes.o), tensor_mut(&mut lse, shapes.lse))?;
        Ok((o, lse))
    }

    /// Gradients; dq starts as given, dk and dv as NaN.
    pub fn backward<B: Branch>(&self, saved: &Saved<T>, dq: f64) -> Result<Grads<T::Acc>> {
        let nan = |like: &[T]| vec![T::Acc::of(f64::NAN); like.len()];
        let mut grads = Grads { dq: vec![T::Acc::of(dq); self.q.len()], dk: nan(&self.k), dv: nan(&self.v) };
        B::backward(self, saved, &mut grads)?;
        Ok(grads)
    }

    /// What the reference saves for a random upstream gradient, rounded to `T`.
    pub fn saved<B: Branch>(&self, gated: bool) -> Saved<T> {
        let output = B::truth(&self.exact());
        Saved {
            o: output.o.data.iter().map(|&x| T::from_f64(x)).collect(),
            lse: output.lse.data.iter().map(|&x| T::Acc::of(x)).collect(),
            d_o: random(4, &self.shapes().o),
            gates: gated.then(|| random(5, &self.shapes().gates)),
        }
    }

    /// The same operands in f64.
    pub fn exact(&self) -> Call<f64> {
        Call {
            config: self.config.clone(),
            packing: self.packing.clone(),
            offsets: self.offsets.clone(),
            q: widen(&self.q),
            k: widen(&self.k),
            v: widen(&self.v),
            lists: self.lists.clone(),
        }
    }

    /// The reference's gradients.
    pub fn truth_grads<B: Branch>(&self, saved: &Saved<T>) -> Gradients {
        let shapes = self.shapes();
        let mut d_o = truth(&saved.d_o, shapes.o);
        if let (Some(gates), Some(column)) = (&saved.gates, B::GATE) {
            for (row, gates) in d_o.data.chunks_exact_mut(shapes.o[2]).zip(gates.chunks_exact(3)) {
                row.iter_mut().for_each(|x| *x *= gates[column].to_f64());
            }
        }
        let output = Output { o: truth(&saved.o, shapes.o), lse: truth(&saved.lse, shapes.lse) };
        B::truth_grads(&self.exact(), &Upstream { output: &output, d_o: &d_o })
    }
}

impl Call<f64> {
    /// Calls `f` with the reference's tensors.
    pub fn with_truth<R>(&self, f: impl FnOnce(&Exact, &Inputs<'_>, &BlockIndices) -> R) -> R {
        let shapes = self.shapes();
        let (q, k, v) = (truth(&self.q, shapes.q), truth(&self.k, shapes.k), truth(&self.v, shapes.v));
        let lists = BlockIndices { shape: shapes.lists, data: self.lists.clone() };
        f(&Exact, &Inputs { q: &q, k: &k, v: &v }, &lists)
    }
}

/// A configuration with the block sizes l/d/l' = 8/4/16, n = 4, w = 13.
pub fn config(heads: usize, kv_heads: usize, dim_qk: usize, dim_v: usize) -> NsaConfig {
    let builder = NsaConfig::small().to_builder().num_heads(heads).num_kv_heads(kv_heads);
    builder.head_dim_qk(dim_qk).head_dim_v(dim_v).window(13).build().expect("a valid configuration")
}

/// Configurations with odd groups, dims and blocks: R = 1, 2, 3, 7, 16.
pub fn configs() -> Vec<NsaConfig> {
    let blocks = |l, d, select, n, initial, local| {
        let builder = config(4, 4, 6, 11).to_builder().compress_block(l).compress_stride(d).select_block(select);
        let builder = builder.select_count(n).select_initial(initial).select_local(local);
        builder.window(100).build().expect("a valid configuration")
    };
    let mut configs = vec![blocks(5, 5, 5, 7, 0, 1), blocks(6, 2, 150, 2, 0, 2), blocks(4, 1, 7, 3, 1, 1)];
    let shapes = [(3, 3, 8, 8), (4, 2, 16, 16), (3, 1, 5, 9), (14, 2, 12, 33), (16, 1, 24, 16)];
    configs.extend(shapes.into_iter().map(|(heads, kv_heads, dk, dv)| config(heads, kv_heads, dk, dv)));
    configs
}

/// Sequences of these lengths that continue these contexts.
pub fn packing(lengths: &[usize], contexts: &[usize]) -> Packing {
    let offsets = CuSeqlens::from_lengths(lengths.iter().copied()).expect("short sequences");
    Packing::with_contexts(offsets, contexts.to_vec()).expect("a context a sequence")
}

/// The best backend that this machine has.
pub fn backend() -> Backend {
    Backend::pick(Some("cpu")).expect("the CPU is always there").0
}

/// Random elements in (−2, 2), rounded to `T`; other seeds, other elements.
pub fn random<T: nsa_core::Element>(seed: u64, shape: &[usize]) -> Vec<T> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..shape.iter().product()).map(|_| T::from_f64(rng.random_range(-2.0..2.0))).collect()
}

/// Block lists of 0 to n candidates.
fn random_lists(config: &NsaConfig, packing: &Packing) -> Vec<i32> {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let mut lists = Vec::new();
    for seq in packing.seqs() {
        for t in seq.context..seq.end() {
            for _ in 0..config.num_kv_heads() {
                let mut candidates: Vec<i32> = (0..=(t / config.select_block()) as i32).collect();
                let count = rng.random_range(0..=config.select_count());
                while candidates.len() > count {
                    candidates.swap_remove(rng.random_range(0..candidates.len()));
                }
                candidates.sort_unstable();
                candidates.resize(config.select_count(), -1);
                lists.extend(candidates);
            }
        }
    }
    lists
}

/// As a tensor of the operation.
pub fn tensor<T, const N: usize>(data: &[T], shape: [usize; N]) -> Tensor<'_, T, N> {
    Tensor::host(data, shape).expect("as many elements as the shape asks for")
}

/// As a writable tensor of the operation.
pub fn tensor_mut<T, const N: usize>(data: &mut [T], shape: [usize; N]) -> TensorMut<'_, T, N> {
    TensorMut::host(data, shape).expect("as many elements as the shape asks for")
}

/// As a tensor of the reference.
fn truth<T: nsa_core::Element, const N: usize>(data: &[T], shape: [usize; N]) -> Truth {
    Truth::from_elements(&shape, data)
}

fn widen<T: nsa_core::Element>(data: &[T]) -> Vec<f64> {
    data.iter().map(|x| x.to_f64()).collect()
}

/// Largest error allowed, relative to the size of the truth, of values stored as `dtype` and computed in f32 (f64 for
/// f64).
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 8e-3,
        DType::F16 => 1e-3,
        DType::F32 => 1e-5,
        DType::F64 => 1e-13,
    }
}

/// Compares with the truth: NaN where it is NaN, infinite where it is infinite.
pub fn compare<T: nsa_core::Element>(what: &str, got: &[T], truth: &Truth) {
    assert_eq!(got.len(), truth.data.len(), "{what}: elements");
    let finite: Vec<f64> = truth.data.iter().copied().filter(|x| x.is_finite()).collect();
    let rms = (finite.iter().map(|x| x * x).sum::<f64>() / finite.len().max(1) as f64).sqrt();
    for (i, (got, &truth)) in got.iter().map(|x| x.to_f64()).zip(&truth.data).enumerate() {
        let close = got == truth || (got - truth).abs() <= tolerance(T::DTYPE) * (rms + truth.abs());
        assert!(close || (got.is_nan() && truth.is_nan()), "{what}[{i}]: {got}, expected {truth} (rms {rms})");
    }
}

/// Compares all bits.
fn assert_same<T: nsa_core::Element>(what: &str, a: &[T], b: &[T]) {
    assert!(bytemuck::cast_slice::<T, u8>(a) == bytemuck::cast_slice::<T, u8>(b), "{what}: bits differ");
}

fn check_forward<B: Branch, T: Element>(call: &Call<T>) {
    let (o, lse) = call.forward::<B>().expect("a legal call");
    let truth = B::truth(&call.exact());
    compare("o", &o, &truth.o);
    compare("lse", &lse, &truth.lse);
}

fn check_backward<B: Branch, T: Element>(call: &Call<T>, gated: bool) {
    let saved = call.saved::<B>(gated);
    let mut grads = call.backward::<B>(&saved, 1.0).expect("a legal call");
    let truth = call.truth_grads::<B>(&saved);
    grads.dq.iter_mut().for_each(|x| *x -= T::Acc::of(1.0));
    compare("dq", &grads.dq, &truth.dq);
    compare("dk", &grads.dk, &truth.dk);
    compare("dv", &grads.dv, &truth.dv);
}

/// Output and lse equal the reference's, for odd shapes, contexts and all types.
pub fn forward_equals_the_reference<B: Branch>() {
    for config in configs() {
        check_forward::<B, f32>(&Call::new::<B>(&config, packing(&[1, 0, 111, 64], &[0; 4])));
        check_forward::<B, f32>(&Call::new::<B>(&config, packing(&[3, 70], &[130, 61])));
        check_forward::<B, f32>(&Call::new::<B>(&config, packing(&[1, 1, 1], &[700, 255, 256])));
    }
    let config = config(4, 2, 16, 16);
    check_forward::<B, f64>(&Call::new::<B>(&config, packing(&[5, 140], &[0, 0])));
    check_forward::<B, half::bf16>(&Call::new::<B>(&config, packing(&[5, 140], &[0, 0])));
    check_forward::<B, half::f16>(&Call::new::<B>(&config, packing(&[5, 140], &[7, 0])));
    check_forward::<B, f64>(&Call::new::<B>(&config, packing(&[1], &[600])));
    check_forward::<B, half::bf16>(&Call::new::<B>(&config, packing(&[1], &[600])));
    check_forward::<B, half::f16>(&Call::new::<B>(&config, packing(&[1], &[600])));
    check_forward::<B, f32>(&Call::new::<B>(&config, packing(&[], &[])));
    check_forward::<B, f32>(&Call::new::<B>(&config, packing(&[0, 0], &[0, 5])));
}

/// Gradients equal the reference's, for odd shapes and all types, with and without gates.
pub fn backward_equals_the_reference<B: Branch>() {
    for (i, config) in configs().iter().enumerate() {
        let gated = i % 2 == 0 && B::GATE.is_some();
        check_backward::<B, f32>(&Call::new::<B>(config, packing(&[1, 0, 111, 64], &[0; 4])), gated);
        check_backward::<B, f32>(&Call::new::<B>(config, packing(&[300], &[0])), !gated && B::GATE.is_some());
    }
    let config = config(4, 2, 16, 16);
    check_backward::<B, f64>(&Call::new::<B>(&config, packing(&[5, 140], &[0, 0])), false);
    // In bf16 p and dS may be rounded before they are multiplied: what error that makes is the test kit's to say.
    check_backward::<B, half::f16>(&Call::new::<B>(&config, packing(&[5, 140], &[0, 0])), false);
    check_backward::<B, f32>(&Call::new::<B>(&config, packing(&[0, 0], &[0, 0])), false);
    let error = Call::<f32>::new::<B>(&config, packing(&[3], &[1]));
    let saved = error.saved::<B>(false);
    let message = error.backward::<B>(&saved, 0.0).err().expect("a context").to_string();
    assert!(message.contains("`packing`") && message.contains("context of 1"), "{message}");
}

/// Neither the number of threads nor the company in the batch nor cutting a sequence into chunks changes a bit.
pub fn bits_depend_on_the_sequence_alone<B: Branch>() {
    for config in configs() {
        let [first, second] = [130, 71];
        let call = Call::<f32>::new::<B>(&config, packing(&[first, second], &[0, 0]));
        let saved = call.saved::<B>(B::GATE.is_some());
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a few threads");
            pool.install(|| (call.forward::<B>().expect("legal"), call.backward::<B>(&saved, 0.5).expect("legal")))
        };
        let ((o, lse), grads) = run(1);
        let ((o2, lse2), grads2) = run(3);
        assert_same("o by threads", &o, &o2);
        assert_same("lse by threads", &lse, &lse2);
        for (a, b) in [(&grads.dq, &grads2.dq), (&grads.dk, &grads2.dk), (&grads.dv, &grads2.dv)] {
            assert_same("gradients by threads", a, b);
        }
        // The second sequence alone.
        let (part, saved) = (slice(&call, first..first + second, 1, 0), slice_saved(&call, &saved, first));
        let (o2, lse2) = part.forward::<B>().expect("legal");
        assert_same("o alone", &o[first * o.len() / (first + second)..], &o2);
        assert_same("lse alone", &lse[first * lse.len() / (first + second)..], &lse2);
        let grads2 = part.backward::<B>(&saved, 0.5).expect("legal");
        assert_same("dq alone", &grads.dq[grads.dq.len() - grads2.dq.len()..], &grads2.dq);
        assert_same("dk alone", &grads.dk[grads.dk.len() - grads2.dk.len()..], &grads2.dk);
        assert_same("dv alone", &grads.dv[grads.dv.len() - grads2.dv.len()..], &grads2.dv);
        chunks_equal_the_whole::<B>(&part, &o2, &lse2);
        single_queries_are_independent::<B>(&config);
    }
}

/// Neither the number of threads nor another sequence changes a bit of a single query after a long context.
fn single_queries_are_independent<B: Branch>(config: &NsaConfig) {
    let call = Call::<f32>::new::<B>(config, packing(&[1, 1], &[700, 300]));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a few threads");
        pool.install(|| call.forward::<B>().expect("legal"))
    };
    let ((o, lse), (o2, lse2)) = (run(1), run(3));
    assert_same("o of single queries by threads", &o, &o2);
    assert_same("lse of single queries by threads", &lse, &lse2);
    let (o2, lse2) = slice(&call, 1..2, 1, 300).forward::<B>().expect("legal");
    assert_same("o of a single query alone", &o[o.len() / 2..], &o2);
    assert_same("lse of a single query alone", &lse[lse.len() / 2..], &lse2);
}

/// Queries `rows` of sequence `s`, with the keys that it has once they are done.
fn slice<T: Element>(call: &Call<T>, rows: std::ops::Range<usize>, s: usize, context: usize) -> Call<T> {
    let part = |data: &[T], range: std::ops::Range<usize>, total: usize| {
        let row = data.len() / total.max(1);
        data[range.start * row..range.end * row].to_vec()
    };
    let keys = call.offsets.range(s);
    let (n, total) = (call.packing.num_tokens(), call.offsets.total());
    let list = call.lists.len() / n;
    Call {
        config: call.config.clone(),
        packing: packing(&[rows.len()], &[context]),
        offsets: CuSeqlens::single(keys.len()).expect("short"),
        q: part(&call.q, rows.clone(), n),
        k: part(&call.k, keys.clone(), total),
        v: part(&call.v, keys, total),
        lists: call.lists[rows.start * list..rows.end * list].to_vec(),
    }
}

/// What is saved for the tokens from `first` on.
fn slice_saved<T: Element>(call: &Call<T>, saved: &Saved<T>, first: usize) -> Saved<T> {
    let n = call.packing.num_tokens();
    Saved {
        o: saved.o[first * saved.o.len() / n..].to_vec(),
        lse: saved.lse[first * saved.lse.len() / n..].to_vec(),
        d_o: saved.d_o[first * saved.d_o.len() / n..].to_vec(),
        gates: saved.gates.as_ref().map(|gates| gates[first * gates.len() / n..].to_vec()),
    }
}

/// One sequence in chunks gives the bits of the whole.
fn chunks_equal_the_whole<B: Branch>(call: &Call<f32>, o: &[f32], lse: &[f32]) {
    let n = call.packing.num_tokens();
    let (mut chunked_o, mut chunked_lse) = (Vec::new(), Vec::new());
    for (start, end) in [(0, 1), (1, 40), (40, 41), (41, n)] {
        let mut chunk = slice(call, start..end, 0, start);
        chunk.offsets = B::rows(&call.config, &chunk.packing);
        let rows = chunk.offsets.total();
        let total = call.offsets.total().max(1);
        chunk.k.truncate(rows * call.k.len() / total);
        chunk.v.truncate(rows * call.v.len() / total);
        let (o, lse) = chunk.forward::<B>().expect("legal");
        chunked_o.extend(o);
        chunked_lse.extend(lse);
    }
    assert_same("o in chunks", o, &chunked_o);
    assert_same("lse in chunks", lse, &chunked_lse);
}

/// NaN in rows of q, k and v reaches what the reference says and nothing else.
pub fn nan_stays_where_it_belongs<B: Branch>() {
    for config in configs() {
        for row in [0, 17, 66, 90] {
            let mut call = Call::<f32>::new::<B>(&config, packing(&[20, 101], &[0, 0]));
            let saved = call.saved::<B>(false);
            let poison = |data: &mut [f32], total: usize| {
                let len = data.len() / total;
                data[row.min(total - 1) * len..][..len].fill(f32::NAN);
            };
            poison(&mut call.k, call.offsets.total());
            poison(&mut call.v, call.offsets.total());
            check_forward::<B, f32>(&call);
            let grads = call.backward::<B>(&saved, 0.0).expect("legal");
            let truth = call.truth_grads::<B>(&saved);
            compare("dq", &grads.dq, &truth.dq);
            compare("dk", &grads.dk, &truth.dk);
            compare("dv", &grads.dv, &truth.dv);
        }
    }
}

/// Keys and values in pages with NaN behind the last row give the bits of packed ones.
pub fn pages_equal_packed_rows<B: Branch>() {
    const PAGE: usize = 6;
    for config in configs() {
        let call = Call::<f32>::new::<B>(&config, packing(&[9, 0, 130], &[40, 3, 0]));
        let packed = call.forward::<B>().expect("legal");
        let dims = [config.head_dim_qk(), config.head_dim_v()];
        // Per tensor and sequence: its rows, filled up to whole pages.
        let padded = [(&call.k, dims[0]), (&call.v, dims[1])].map(|(data, dim)| {
            let row = config.num_kv_heads() * dim;
            let seq = |s| {
                let range = call.offsets.range(s);
                let mut rows = data[range.start * row..range.end * row].to_vec();
                rows.resize(range.len().next_multiple_of(PAGE) * row, f32::NAN);
                rows
            };
            (0..3).map(seq).collect::<Vec<_>>()
        });
        let tables: Vec<Vec<Pages<'_, f32>>> = std::iter::zip(&padded, dims)
            .map(|(seqs, dim)| {
                let row_shape = [config.num_kv_heads(), dim];
                let table = |s: usize| {
                    let pages = seqs[s].chunks(PAGE * row_shape[0] * dim).map(Mem::Host).collect();
                    Pages { pages, page_rows: PAGE, len: call.offsets.range(s).len(), row_shape }
                };
                (0..3).map(table).collect()
            })
            .collect();
        let (o, lse) = call.forward_with::<B>([Rows::Paged(&tables[0]), Rows::Paged(&tables[1])]).expect("legal");
        assert_same("o of pages", &packed.0, &o);
        assert_same("lse of pages", &packed.1, &lse);
    }
}

/// Arguments that do not fit are refused by name.
pub fn misfits_are_refused<B: Branch>() {
    let config = config(4, 2, 16, 16);
    let call = Call::<f32>::new::<B>(&config, packing(&[40, 30], &[0, 0]));
    let message = |call: &Call<f32>| call.forward::<B>().expect_err("a misfit").to_string();
    let mut other = call.clone();
    other.offsets = CuSeqlens::from_lengths([call.offsets.total()]).expect("short");
    assert!(message(&other).contains("sequences of k"), "{}", message(&other));
    let longer = B::rows(&config, &packing(&[40, 45], &[0, 0]));
    other.k.resize(longer.total() * 32, 0.0);
    other.v.resize(longer.total() * 32, 0.0);
    other.offsets = longer;
    assert!(message(&other).contains("of sequence 1"), "{}", message(&other));
    let shapes = call.shapes();
    let (mut o, mut lse) = (vec![0.0; shapes.o.iter().product()], vec![0.0; shapes.lse.iter().product()]);
    let rows = || [&call.k, &call.v].map(|data| Rows::packed(tensor(data, shapes.k), &call.offsets));
    let error = B::forward(&call, rows(), tensor_mut(&mut o, [70, 2, 16]), tensor_mut(&mut lse, shapes.lse));
    let message = error.expect_err("another shape").to_string();
    assert!(message.contains("`o` has shape [70, 2, 16], expected [70, 4, 16]"), "{message}");
    let error = B::forward(&call, rows(), tensor_mut(&mut o, shapes.o), tensor_mut(&mut lse, [70, 3]));
    assert!(error.expect_err("another shape").to_string().contains("`lse`"));
}

/// The tests that every branch has.
#[macro_export]
macro_rules! branch_tests {
    ($branch:ty) => {
        #[test]
        fn forward_equals_the_reference() {
            case::forward_equals_the_reference::<$branch>();
        }
        #[test]
        fn backward_equals_the_reference() {
            case::backward_equals_the_reference::<$branch>();
        }
        #[test]
        fn bits_depend_on_the_sequence_alone() {
            case::bits_depend_on_the_sequence_alone::<$branch>();
        }
        #[test]
        fn nan_stays_where_it_belongs() {
            case::nan_stays_where_it_belongs::<$branch>();
        }
        #[test]
        fn pages_equal_packed_rows() {
            case::pages_equal_packed_rows::<$branch>();
        }
        #[test]
        fn misfits_are_refused() {
            case::misfits_are_refused::<$branch>();
        }
    };
}
