//! The operations against the specification's sums written once more, with masks instead of lists of keys.

mod common;

use common::{Random, packing};
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing, index};
use nsa_ref::nsa::{Compressed, Inputs, forward};
use nsa_ref::{Exact, Tensor, dense, select};
use rand::{RngExt, SeedableRng};

fn config() -> NsaConfig {
    NsaConfig::builder(6, 2, 5, 3)
        .compress_block(6)
        .compress_stride(3)
        .select_block(9)
        .select_count(3)
        .window(7)
        .compress_kind(CompressKind::Mean)
        .build()
        .unwrap()
}

/// o, ln Σ exp and probabilities of head `h` of query `row` over the keys from `start` of which `sees` is true.
fn attend(
    config: &NsaConfig,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    (row, h): (usize, usize),
    start: usize,
    sees: &[bool],
) -> (Vec<f64>, f64, Vec<f64>) {
    let g = h / config.group_size();
    let weight = |s: usize| {
        let product: f64 = q.row(&[row, h]).iter().zip(k.row(&[start + s, g])).map(|(x, y)| x * y).sum();
        if sees[s] { (product / 5f64.sqrt()).exp() } else { 0.0 }
    };
    let weights: Vec<f64> = (0..sees.len()).map(weight).collect();
    let sum: f64 = weights.iter().sum();
    let p: Vec<f64> = weights.iter().map(|w| if sum > 0.0 { w / sum } else { 0.0 }).collect();
    let o = (0..config.head_dim_v()).map(|c| p.iter().enumerate().map(|(s, p)| p * v.row(&[start + s, g])[c]).sum());
    (o.collect(), sum.ln(), p)
}

fn assert_near(got: &[f64], expected: &[f64], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (x, y) in got.iter().zip(expected) {
        assert!(x == y || (x - y).abs() < 1e-12, "{what}: {x}, expected {y}");
    }
}

#[test]
fn masks_give_the_same_outputs_scores_and_blocks() {
    let config = config();
    let lengths = [5, 0, 41, 6];
    let packing = packing(&lengths);
    let inputs = Random::new(11).inputs(&config, 52, false);
    let got = forward(&Exact, &config, &packing, &inputs).unwrap();
    let keys = |c: usize| match c {
        0 => (&inputs.q, &got.k_blocks, &got.v_blocks),
        1 => (&inputs.q, &inputs.k_slc, &inputs.v_slc),
        _ => (&inputs.q, &inputs.k_win, &inputs.v_win),
    };
    let (mut start, mut first_block) = (0, 0);
    for len in lengths {
        let blocks = (0..len).filter(|s| s % 3 == 0 && s + 6 <= len).count();
        for t in 0..len {
            let row = start + t;
            let visible: Vec<bool> = (0..blocks).map(|i| 3 * i + 5 <= t).collect();
            for g in 0..2 {
                let mut importance = vec![0.0; blocks];
                let list = got.block_indices.list(row, g);
                let masks = [
                    visible.clone(),
                    (0..len).map(|s| s <= t && list.contains(&((s / 9) as i32))).collect(),
                    (0..len).map(|s| s <= t && s + 7 > t).collect(),
                ];
                for h in 3 * g..3 * g + 3 {
                    let mut o = vec![0.0; 3];
                    for (c, mask) in masks.iter().enumerate() {
                        let from = if c == 0 { first_block } else { start };
                        let (o_c, lse, p) = attend(&config, keys(c), (row, h), from, mask);
                        assert_near(got.branches[c].o.row(&[row, h]), &o_c, "o of a branch");
                        assert_near(&[got.branches[c].lse.row(&[row])[h]], &[lse], "lse");
                        let gate = inputs.gates.row(&[row, h])[c];
                        o.iter_mut().zip(o_c).for_each(|(o, x)| *o += gate * x);
                        if c == 0 {
                            importance.iter_mut().zip(p).for_each(|(sum, p)| *sum += p);
                        }
                    }
                    assert_near(got.o.row(&[row, h]), &o, "o");
                }
                let weighed = |i: usize, j: usize| index::importance_weight(&config, i, j) as f64 * importance[i];
                let scores: Vec<f64> = (0..=t / 9).map(|j| (0..blocks).map(|i| weighed(i, j)).sum()).collect();
                assert_near(&got.scores[2 * row + g], &scores, "scores");
            }
        }
        start += len;
        first_block += blocks;
    }
}

#[test]
fn mean_compression_is_the_average_of_each_block() {
    let config = config();
    let packing = packing(&[4, 13]);
    let mut random = Random::new(12);
    let inputs = random.inputs(&config, 17, true);
    let Compressed::Tokens { kv } = &inputs.cmp else { unreachable!() };
    let got = forward(&Exact, &config, &packing, &inputs).unwrap();
    let e = kv[0].position.as_ref().unwrap();
    assert_eq!(got.k_blocks.shape, [3, 2, 5]);
    for (block, first) in [4, 7, 10].into_iter().enumerate() {
        for g in 0..2 {
            let token = |p: usize, c: usize| kv[0].x.row(&[first + p, g])[c] + e.row(&[p, g])[c];
            let mean: Vec<f64> = (0..5).map(|c| (0..6).map(|p| token(p, c)).sum::<f64>() / 6.0).collect();
            assert_near(got.k_blocks.row(&[block, g]), &mean, "a block");
        }
    }
}

#[test]
fn selection_agrees_with_the_shared_policy() {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(13);
    for (count, initial, local) in [(3, 1, 2), (4, 1, 2), (6, 0, 1), (5, 2, 3), (9, 1, 1)] {
        let config = config().to_builder().select_count(count).select_initial(initial).select_local(local);
        let config = config.build().unwrap();
        for candidates in 1..14 {
            // Few values: ties everywhere.
            let scores: Vec<f64> = (0..candidates).map(|_| f64::from(random.random_range(0..4u8))).collect();
            let mut shared = vec![0; count];
            let t = candidates * 9 - 1;
            nsa_core::select::select_blocks(&config, t, &scores, &mut Default::default(), &mut shared);
            assert_eq!(select::choose(&config, &scores), shared, "{scores:?}");
        }
    }
}

#[test]
fn nothing_outside_the_patterns_is_read() {
    let config = config();
    let mut inputs = Random::new(14).inputs(&config, 60, false);
    let chunk = Packing::with_contexts(CuSeqlens::single(2).unwrap(), vec![58]).unwrap();
    let two = |t: &Tensor| Tensor::new(&[2, t.shape[1], t.shape[2]], t.data[58 * t.shape[1] * t.shape[2]..].to_vec());
    (inputs.q, inputs.gates) = (two(&inputs.q), two(&inputs.gates));
    let clean = forward(&Exact, &config, &chunk, &inputs).unwrap();
    // Both queries attend to blocks 0, 5 and 6 alone: n = n0 + nl.
    assert_eq!(clean.block_indices.list(0, 0), [0, 5, 6]);
    let poison = |t: &mut Tensor, rows: std::ops::Range<usize>| {
        rows.for_each(|s| (0..2).for_each(|g| t.row_mut(&[s, g]).fill(f64::NAN)));
    };
    let mut poisoned = inputs.clone();
    poison(&mut poisoned.k_slc, 9..45);
    poison(&mut poisoned.v_slc, 9..45);
    poison(&mut poisoned.k_win, 0..52);
    poison(&mut poisoned.v_win, 0..52);
    assert_eq!(forward(&Exact, &config, &chunk, &poisoned).unwrap().o, clean.o);
    type Pick = fn(&mut Inputs) -> &mut Tensor;
    let outermost: [(Pick, usize); 4] =
        [(|i| &mut i.v_slc, 8), (|i| &mut i.v_slc, 45), (|i| &mut i.v_win, 52), (|i| &mut i.k_win, 59)];
    for (pick, row) in outermost {
        let mut poisoned = inputs.clone();
        poison(pick(&mut poisoned), row..row + 1);
        let o = forward(&Exact, &config, &chunk, &poisoned).unwrap().o;
        assert!(o.data.iter().any(|x| x.is_nan()), "row {row} must be read");
    }
}

#[test]
fn nothing_to_do_is_legal() {
    let config = config();
    for lengths in [&[][..], &[0], &[0, 0]] {
        let packing = packing(lengths);
        let inputs = Random::new(15).inputs(&config, 0, true);
        let outputs = forward(&Exact, &config, &packing, &inputs).unwrap();
        assert_eq!(outputs.o.shape, [0, 6, 3]);
        let grads = nsa_ref::nsa::backward(&Exact, &config, &packing, &inputs, &outputs, &outputs.o).unwrap();
        assert_eq!(grads.dq.shape, [0, 6, 5]);
        let dense_inputs = nsa_ref::branch::Inputs { q: &inputs.q, k: &inputs.k_slc, v: &inputs.v_slc };
        assert_eq!(dense::forward(&Exact, &config, &packing, &dense_inputs).unwrap().lse.shape, [0, 6]);
    }
}
