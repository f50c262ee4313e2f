//! φ on the simulator.

use super::{assert_cases, assert_op};
use half::bf16;
use nsa_core::{CompressKind, CuSeqlens, DType, NsaConfig, NsaConfigBuilder, Packing, index};
use nsa_kernels::op::compress::{Backward, Phi, PhiGrad, backward};
use nsa_kernels::{Backend, Buffer};
use nsa_tests::check::{Op, compress_inputs};
use nsa_tests::generate::Side;
use nsa_tests::sim::on_an_a100;
use nsa_tests::{Case, Kind};

#[test]
fn cases() {
    on_an_a100("compress::cases", || assert_op(Op::Compress));
}

fn config(kv_heads: usize, [l, d]: [usize; 2], kind: CompressKind) -> NsaConfigBuilder {
    let builder = NsaConfig::builder(2 * kv_heads, kv_heads, 16, 6).compress_kind(kind).compress_hidden(9);
    builder.compress_block(l).compress_stride(d).select_block(2 * l)
}

/// Few blocks or none, sequences with no block between others, chunks that lie where they are multiplied (one head, no
/// token between) and chunks that do not.
fn odd_cases() -> Vec<Case> {
    let kinds = [("linear", CompressKind::Linear), ("mlp", CompressKind::Mlp)];
    let of_kind = |(name, kind)| {
        let case = |what: &str, kv_heads, sizes, lengths: &[usize]| {
            Case::new(format!("{name}-{what}"), config(kv_heads, sizes, kind), lengths)
        };
        [
            case("one-block", 3, [8, 4], &[8]),
            case("no-block", 2, [8, 4], &[7, 0, 3]),
            case("short-between", 2, [12, 4], &[11, 30, 1, 0, 12, 5, 25, 7]),
            case("one-head", 1, [8, 4], &[3, 37]),
            case("one-head-whole-chunks", 1, [8, 4], &[16, 8, 23]),
            case("one-head-between", 1, [8, 4], &[18, 9]),
            case("five-heads", 5, [8, 8], &[40, 17]),
            case("chunks-of-one", 2, [3, 1], &[20, 2, 3]),
        ]
    };
    // So many hidden units that they are most of what a call takes, in f32 where chunks lie where they are multiplied.
    let wide = Case::new("mlp-wide", config(1, [8, 4], CompressKind::Mlp).compress_hidden(200), [16, 24]);
    kinds.into_iter().flat_map(of_kind).chain([wide]).collect()
}

#[test]
fn odd_shapes() {
    on_an_a100("compress::odd_shapes", || assert_cases(Op::Compress, &odd_cases(), &[DType::F32, DType::Bf16]));
}

/// Tokens behind the last block of a sequence are NaN, and nothing shows it.
#[test]
fn tokens_of_no_block_are_not_read() {
    fn check<T: Kind<Acc = f32>>(backend: &Backend, case: &Case) {
        let inputs = compress_inputs::<T>(case, Side::Key);
        let mut planted = inputs.clone();
        let row = inputs.x.len() / case.tokens();
        for seq in inputs.packing.seqs() {
            let blocks = index::num_blocks(&case.config, seq.rows.len());
            let covered = blocks.checked_sub(1).map_or(0, |last| index::block_tokens(&case.config, last).end);
            planted.x[(seq.rows.start + covered) * row..seq.rows.end * row].fill(T::from_f64(f64::NAN));
        }
        let d_blocks = vec![0.25; case.blocks() * row];
        assert_eq!(planted.forward(backend), inputs.forward(backend), "{}", case.name);
        let [planted, grads] = [planted, inputs].map(|inputs| inputs.backward(backend, &d_blocks).expect("gradients"));
        assert_eq!((planted.x, planted.position), (grads.x, grads.position), "{}", case.name);
        assert_eq!(planted.weights, grads.weights, "{}", case.name);
    }
    on_an_a100("compress::tokens_of_no_block_are_not_read", || {
        let backend = Backend::cuda(0).expect("the simulator");
        for case in odd_cases() {
            check::<f32>(&backend, &case);
            check::<bf16>(&backend, &case);
        }
    });
}

/// Gradients of weights and embedding are added to what is there.
#[test]
fn gradients_are_added() {
    const SIZES: [usize; 5] = [8 * 2 * 16, 2 * 8 * 16 * 9, 2 * 9, 2 * 9 * 16, 2 * 16];

    fn numbers(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * step + 7) % 193) as f32 / 97.0 - 1.0).collect()
    }

    /// Of e, W1, b1, W2, b2, each number of which is `before` first.
    fn grads(backend: &Backend, before: f32) -> Vec<Vec<f32>> {
        let config = config(2, [8, 4], CompressKind::Mlp).build().expect("a configuration");
        let packing = Packing::new(CuSeqlens::from_lengths([21, 13]).expect("short"));
        let x = backend.upload(&numbers(34 * 2 * 16, 31));
        let d_blocks = backend.upload(&numbers(6 * 2 * 16, 43));
        let mut dx = backend.alloc::<f32>(x.len());
        let weights: [Buffer<f32>; 5] = std::array::from_fn(|i| backend.upload(&numbers(SIZES[i], 2 * i + 11)));
        let mut targets: [Buffer<f32>; 5] = std::array::from_fn(|i| backend.upload(&vec![before; SIZES[i]]));
        let [e, w1, b1, w2, b2] = &weights;
        let [de, dw1, db1, dw2, db2] = &mut targets;
        let args = Backward {
            config: &config,
            packing: &packing,
            x: x.tensor([34, 2, 16]).expect("x"),
            position: Some(e.tensor([8, 2, 16]).expect("e")),
            phi: Phi::Mlp {
                weight1: w1.tensor([2, 128, 9]).expect("W1"),
                bias1: Some(b1.tensor([2, 9]).expect("b1")),
                weight2: w2.tensor([2, 9, 16]).expect("W2"),
                bias2: Some(b2.tensor([2, 16]).expect("b2")),
            },
            d_blocks: d_blocks.tensor([6, 2, 16]).expect("dy"),
            dx: dx.tensor_mut([34, 2, 16]).expect("dx"),
            d_position: Some(de.tensor_mut([8, 2, 16]).expect("de")),
            d_phi: PhiGrad::Mlp {
                weight1: dw1.tensor_mut([2, 128, 9]).expect("dW1"),
                bias1: Some(db1.tensor_mut([2, 9]).expect("db1")),
                weight2: dw2.tensor_mut([2, 9, 16]).expect("dW2"),
                bias2: Some(db2.tensor_mut([2, 16]).expect("db2")),
            },
        };
        backward(backend, args).expect("gradients");
        let read = |buffer: &Buffer<f32>| {
            let mut values = vec![0.0; buffer.len()];
            buffer.read(&mut values).expect("the device's work");
            values
        };
        targets.iter().map(read).collect()
    }

    on_an_a100("compress::gradients_are_added", || {
        let backend = Backend::cuda(0).expect("the simulator");
        let (alone, added) = (grads(&backend, 0.0), grads(&backend, 0.5));
        for (i, (alone, added)) in alone.iter().flatten().zip(added.iter().flatten()).enumerate() {
            // Two or three roundings of the sum.
            let bound = 3.0 * f32::EPSILON * (1.0 + alone.abs());
            assert!((added - alone - 0.5).abs() <= bound, "number {i}: {added} from {alone}");
        }
        assert!(alone.iter().all(|grads| grads.iter().any(|x| x.abs() > 1e-3)), "gradients that are not 0");
    });
}
