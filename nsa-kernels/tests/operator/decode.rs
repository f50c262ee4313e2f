//! One decoding step from caches.

use crate::kit::{assert_close, backend, packing, rounded, scaled, typed, values, with_threads};
use crate::nsa::{Call, config};
use half::{bf16, f16};
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing, index};
use nsa_kernels::op::compress::{self, Phi};
use nsa_kernels::op::decode::{Cache, Step, step};
use nsa_kernels::{Element, Mem, Pages, Tensor, TensorMut};
use nsa_ref::Exact;

/// Memory of one side (keys or values) of the caches of one sequence. Whatever must not be read is NaN.
struct Side<T> {
    /// Pages of the compressed and the selected branch.
    pages: [Vec<Vec<T>>; 2],
    lens: [usize; 2],
    ring: Vec<T>,
    row_shape: [usize; 2],
}

const PAGE_ROWS: [usize; 2] = [3, 7];

fn nan<T: Element>(len: usize) -> Vec<T> {
    vec![T::from_f64(f64::NAN); len]
}

impl<T: Element> Side<T> {
    /// From all rows of one sequence, `[rows, G, D]` for cmp, slc, win; a ring of `ring_rows` rows.
    fn new(rows: [&[T]; 3], row_shape: [usize; 2], window: usize, ring_rows: usize) -> Self {
        let row = row_shape[0] * row_shape[1];
        let pages = [0, 1].map(|c| {
            let size = PAGE_ROWS[c] * row;
            let page = |rows: &[T]| [rows, &nan(size - rows.len())].concat();
            rows[c].chunks(size).map(page).chain([nan(size)]).collect::<Vec<_>>()
        });
        let mut ring = nan(ring_rows * row);
        let tokens = rows[2].len() / row;
        for s in tokens.saturating_sub(window)..tokens {
            ring[index::ring_row(window, s) * row..][..row].copy_from_slice(&rows[2][s * row..][..row]);
        }
        Self { pages, lens: [rows[0].len() / row, rows[1].len() / row], ring, row_shape }
    }

    fn pages(&self, c: usize) -> Pages<'_, T> {
        let pages = self.pages[c].iter().map(|page| Mem::Host(page)).collect();
        Pages { pages, page_rows: PAGE_ROWS[c], len: self.lens[c], row_shape: self.row_shape }
    }

    fn ring(&self) -> Tensor<'_, T, 3> {
        let [heads, dim] = self.row_shape;
        Tensor::host(&self.ring, [self.ring.len() / (heads * dim), heads, dim]).unwrap()
    }
}

fn cache<'a, T: Element>(context: usize, [k, v]: &'a [Side<T>; 2]) -> Cache<'a, T> {
    let (k_cmp, v_cmp, k_slc, v_slc) = (k.pages(0), v.pages(0), k.pages(1), v.pages(1));
    Cache { context, k_cmp, v_cmp, k_slc, v_slc, k_win: k.ring(), v_win: v.ring() }
}

/// Runs a step; returns o, block indices and rows read.
fn run<T: Element>(
    config: &NsaConfig,
    caches: &[Cache<'_, T>],
    q: &[T],
    gates: &[T],
) -> (Vec<T>, Vec<i32>, Vec<usize>) {
    let (s, heads) = (caches.len(), config.num_heads());
    let lists_shape = [s, config.num_kv_heads(), config.select_count()];
    let (mut o, mut lists) = (nan::<T>(s * heads * config.head_dim_v()), vec![i32::MIN; lists_shape.iter().product()]);
    let args = Step {
        config,
        caches,
        q: Tensor::host(q, [s, heads, config.head_dim_qk()]).unwrap(),
        gates: Tensor::host(gates, [s, heads, 3]).unwrap(),
        o: TensorMut::host(&mut o, [s, heads, config.head_dim_v()]).unwrap(),
        block_indices: TensorMut::host(&mut lists, lists_shape).unwrap(),
    };
    let rows = step(&backend(), args).unwrap();
    (o, lists, rows)
}

/// The caches of every sequence of a call whose sequences have one query each.
fn sides<T: Element>(call: &Call) -> Vec<[Side<T>; 2]> {
    let config = &call.config;
    let keys = call.packing.cu_keys().unwrap();
    let offsets = [call.packing.cu_blocks(config).unwrap(), keys.clone(), keys];
    let data = call.kv().map(|side| side.map(typed::<T>));
    (0..call.packing.num_seqs())
        .map(|s| {
            let side = |side: usize, dim: usize| {
                let row = config.num_kv_heads() * dim;
                let rows = [0, 1, 2].map(|c| {
                    let range = offsets[c].range(s);
                    &data[side][c][range.start * row..range.end * row]
                });
                // The ring of every other sequence has only the rows that it needs.
                let needed = config.window().min(call.packing.seq(s).end());
                let ring_rows = if s % 2 == 0 { config.window() } else { needed };
                Side::new(rows, [config.num_kv_heads(), dim], config.window(), ring_rows)
            };
            [side(0, config.head_dim_qk()), side(1, config.head_dim_v())]
        })
        .collect()
}

/// One step of a batch of sequences with these contexts (the current token included).
fn check<T: Element>(config: &NsaConfig, contexts: &[usize]) {
    let offsets = CuSeqlens::from_lengths(contexts.iter().map(|_| 1)).unwrap();
    let before = contexts.iter().map(|context| context - 1).collect();
    let call = Call::new::<T>(config.clone(), Packing::with_contexts(offsets, before).unwrap());
    let sides = sides::<T>(&call);
    let caches: Vec<_> = contexts.iter().zip(&sides).map(|(&context, sides)| cache(context, sides)).collect();
    let (q, gates) = (typed::<T>(&call.inputs.q), typed::<T>(&call.inputs.gates));
    let (o, lists, rows) = with_threads(2, || run(config, &caches, &q, &gates));
    let truth = nsa_ref::nsa::forward(&Exact, config, &call.packing, &call.inputs).unwrap();
    assert_eq!(lists, truth.block_indices.data);
    assert_close("o", &o, &truth.o, &call.reference(&rounded::<T>(), &lists).o);
    for (rows, &context) in rows.iter().zip(contexts) {
        assert!(*rows <= index::decode_rows(config, context), "{rows} rows read at {context}");
    }
    assert!((o, lists, rows) == with_threads(1, || run(config, &caches, &q, &gates)), "bits depend on the threads");
}

#[test]
fn batches_of_contexts_in_every_type() {
    let contexts = [1, 2, 7, 8, 9, 31, 32, 33, 64, 100, 129, 200];
    for config in [
        config([4, 2], [16, 12], [8, 4, 16], 4, 32),
        config([7, 1], [5, 9], [6, 3, 9], 3, 7),
        config([3, 3], [8, 8], [4, 4, 4], 9, 100),
        config([18, 1], [12, 16], [16, 2, 32], 3, 500),
    ] {
        check::<f64>(&config, &contexts);
        check::<f32>(&config, &contexts);
        check::<bf16>(&config, &contexts);
        check::<f16>(&config, &contexts);
    }
}

#[test]
fn no_sequence() {
    assert_eq!(run::<f32>(&config([4, 2], [8, 8], [8, 4, 16], 4, 32), &[], &[], &[]).2, [0usize; 0]);
}

/// Token by token with its own compression, as a model decodes, against the reference's caches.
#[test]
fn every_prefix_of_a_sequence() {
    const TOKENS: usize = 75;
    const HIDDEN: usize = 5;
    let config = config([4, 2], [6, 4], [8, 4, 16], 4, 20).to_builder().compress_kind(CompressKind::Mlp);
    let config = config.compress_hidden(HIDDEN).build().unwrap();
    let whole = Call::new::<f64>(config.clone(), packing(&[TOKENS]));
    let dims = [config.head_dim_qk(), config.head_dim_v()];
    let raw = [0, 1].map(|side| values::<f64>(&format!("raw {side}"), &[TOKENS, 2, dims[side]]));
    let weights = [0, 1].map(|side| {
        let weight = |name: &str, shape: &[usize]| scaled::<f64>(0.3, &values::<f64>(&format!("{name} {side}"), shape));
        [weight("w1", &[2, 8 * dims[side], HIDDEN]), weight("w2", &[2, HIDDEN, dims[side]])]
    });
    let compressors = [0, 1].map(|side| {
        let [weight1, weight2] = weights[side].clone();
        let phi = nsa_ref::compress::Phi::Mlp { weight1, bias1: None, weight2, bias2: None };
        nsa_ref::decode::Compressor { position: None, phi }
    });
    let mut reference = nsa_ref::decode::Cache::new(config.clone(), compressors).unwrap();
    let mut blocks = [Vec::new(), Vec::new()];
    let [k, v] = whole.kv();
    let inputs = &whole.inputs;
    for t in 0..TOKENS {
        let token = nsa_ref::decode::Token {
            q: at(&inputs.q, t),
            gates: at(&inputs.gates, t),
            k: [at(&raw[0], t), at(k[1], t), at(k[2], t)],
            v: [at(&raw[1], t), at(v[1], t), at(v[2], t)],
        };
        let expected = reference.step(&Exact, &token).unwrap();
        if index::completes_block(&config, t) {
            for side in 0..2 {
                blocks[side].extend(compressed(&config, &raw[side], t, &weights[side]));
            }
        }
        let side = |side: usize, rows: [&nsa_ref::Tensor; 3]| {
            let end = (t + 1) * 2 * dims[side];
            let rows = [blocks[side].as_slice(), &rows[1].data[..end], &rows[2].data[..end]];
            Side::new(rows, [2, dims[side]], config.window(), config.window())
        };
        let sides = [side(0, k), side(1, v)];
        let (o, lists, rows) = run(&config, &[cache(t + 1, &sides)], &token.q.data, &token.gates.data);
        assert_close("o", &o, &expected.o, &expected.o);
        assert_eq!(lists, expected.block_indices.concat(), "token {t}");
        assert_eq!(rows, [expected.rows_read], "token {t}");
    }
}

/// Token `t` of a packed tensor.
fn at(tensor: &nsa_ref::Tensor, t: usize) -> nsa_ref::Tensor {
    let row: usize = tensor.shape[1..].iter().product();
    nsa_ref::Tensor::new(&tensor.shape[1..], tensor.data[t * row..][..row].to_vec())
}

/// The block that token `t` completes, from the last l tokens.
fn compressed(config: &NsaConfig, raw: &nsa_ref::Tensor, t: usize, weights: &[nsa_ref::Tensor; 2]) -> Vec<f64> {
    let (l, dim, hidden) = (config.compress_block(), raw.shape[2], weights[1].shape[1]);
    let mut block = vec![f64::NAN; 2 * dim];
    let args = compress::Forward {
        config,
        packing: &packing(&[l]),
        x: Tensor::host(&raw.data[(t + 1 - l) * 2 * dim..], [l, 2, dim]).unwrap(),
        position: None,
        phi: Phi::Mlp {
            weight1: Tensor::host(&weights[0].data, [2, l * dim, hidden]).unwrap(),
            bias1: None,
            weight2: Tensor::host(&weights[1].data, [2, hidden, dim]).unwrap(),
            bias2: None,
        },
        blocks: TensorMut::host(&mut block, [1, 2, dim]).unwrap(),
    };
    compress::forward(&backend(), args).unwrap();
    block
}

/// Runs a step on a cache of 50 tokens that was changed.
fn attempt<'a>(
    call: &Call,
    sides: &'a [Side<f32>; 2],
    change: impl FnOnce(&mut Cache<'a, f32>),
) -> Result<Vec<usize>, String> {
    let mut cache = cache(50, sides);
    change(&mut cache);
    let (q, gates) = (typed::<f32>(&call.inputs.q), typed::<f32>(&call.inputs.gates));
    let (mut o, mut lists) = ([0.0; 24], [0; 8]);
    let args = Step {
        config: &call.config,
        caches: &[cache],
        q: Tensor::host(&q, [1, 4, 8]).unwrap(),
        gates: Tensor::host(&gates, [1, 4, 3]).unwrap(),
        o: TensorMut::host(&mut o, [1, 4, 6]).unwrap(),
        block_indices: TensorMut::host(&mut lists, [1, 2, 4]).unwrap(),
    };
    step(&backend(), args).map_err(|error| error.to_string())
}

#[test]
fn caches_that_do_not_fit_are_named() {
    let config = config([4, 2], [8, 6], [8, 4, 16], 4, 32);
    let offsets = CuSeqlens::single(1).unwrap();
    let call = Call::new::<f32>(config, Packing::with_contexts(offsets, vec![49]).unwrap());
    let sides = &sides::<f32>(&call)[0];
    assert_eq!(attempt(&call, sides, |_| ()), Ok(vec![11 + 50 + 32]));
    let short = [0.0; 31 * 2 * 6];
    let named = |expected: &str, result: Result<Vec<usize>, String>| {
        let message = result.unwrap_err();
        assert!(message.contains(expected), "{message}");
    };
    named("`context` = 0 of sequence 0", attempt(&call, sides, |cache| cache.context = 0));
    let expected = "`caches[0].k_slc` has shape [50, 2, 8], expected [51, 2, 8]";
    named(expected, attempt(&call, sides, |cache| cache.context = 51));
    let expected = "`caches[0].k_cmp` has shape [10, 2, 8], expected [11, 2, 8]";
    named(expected, attempt(&call, sides, |cache| cache.k_cmp.len = 10));
    named("`caches[0].v_cmp`", attempt(&call, sides, |cache| cache.v_cmp.row_shape = [6, 2]));
    named("`pages of caches[0].v_slc`", attempt(&call, sides, |cache| cache.v_slc.pages.truncate(1)));
    let expected = "`caches[0].v_win` has shape [31, 2, 6], expected [32, 2, 6]";
    named(expected, attempt(&call, sides, |cache| cache.v_win = Tensor::host(&short, [31, 2, 6]).unwrap()));
}
