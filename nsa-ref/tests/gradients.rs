//! Every gradient against central differences in f64. The blocks are held fixed: selection passes no gradient.

mod common;

use common::{Random, packing};
use nsa_core::{CompressKind, NsaConfig, Packing};
use nsa_ref::compress::Phi;
use nsa_ref::nsa::{Compressed, Inputs, backward, forward};
use nsa_ref::{Exact, Tensor, branch, dense};

const STEP: f64 = 1e-5;

fn config(heads: usize, groups: usize, kind: CompressKind, l: usize, d: usize, select: usize) -> NsaConfig {
    NsaConfig::builder(heads, groups, 3, 2)
        .compress_block(l)
        .compress_stride(d)
        .select_block(select)
        .select_count(3)
        .window(5)
        .compress_kind(kind)
        .compress_hidden(4)
        .build()
        .unwrap()
}

/// Every tensor of the inputs with its name and its gradient.
fn parameters(inputs: &mut Inputs) -> Vec<(&'static str, &mut Tensor)> {
    let mut list = vec![
        ("q", &mut inputs.q),
        ("gates", &mut inputs.gates),
        ("k_slc", &mut inputs.k_slc),
        ("v_slc", &mut inputs.v_slc),
        ("k_win", &mut inputs.k_win),
        ("v_win", &mut inputs.v_win),
    ];
    match &mut inputs.cmp {
        Compressed::Blocks { k, v } => list.extend([("k_blocks", k), ("v_blocks", v)]),
        Compressed::Tokens { kv } => {
            for side in kv.iter_mut() {
                list.push(("x", &mut side.x));
                list.extend(side.position.as_mut().map(|e| ("position", e)));
                list.extend(weights(&mut side.phi));
            }
        }
    }
    list
}

fn weights(phi: &mut Phi) -> Vec<(&'static str, &mut Tensor)> {
    match phi {
        Phi::Mean => vec![],
        Phi::Weighted { weight } | Phi::Linear { weight } => vec![("weight", weight)],
        Phi::Mlp { weight1, bias1, weight2, bias2 } => {
            let mut list = vec![("weight1", weight1), ("weight2", weight2)];
            list.extend(bias1.as_mut().map(|b| ("bias1", b)));
            list.extend(bias2.as_mut().map(|b| ("bias2", b)));
            list
        }
    }
}

/// The gradients in the order of [`parameters`].
fn gradients(config: &NsaConfig, packing: &Packing, inputs: &Inputs, d_o: &Tensor) -> Vec<Tensor> {
    let outputs = forward(&Exact, config, packing, inputs).unwrap();
    let grads = backward(&Exact, config, packing, inputs, &outputs, d_o).unwrap();
    let mut list = vec![grads.dq, grads.d_gates, grads.dk_slc, grads.dv_slc, grads.dk_win, grads.dv_win];
    match grads.d_cmp {
        None => list.extend([grads.dk_blocks, grads.dv_blocks]),
        Some(sides) => {
            for mut side in *sides {
                list.push(side.dx);
                list.extend(side.d_position);
                list.extend(weights(&mut side.d_phi).into_iter().map(|(_, t)| t.clone()));
            }
        }
    }
    list
}

fn loss(config: &NsaConfig, packing: &Packing, inputs: &Inputs, d_o: &Tensor) -> f64 {
    let o = forward(&Exact, config, packing, inputs).unwrap().o;
    o.data.iter().zip(&d_o.data).map(|(x, y)| x * y).sum()
}

/// Compares up to 40 entries of every gradient, spread over the tensor.
fn check(config: &NsaConfig, lengths: &[usize], biases: bool, given_blocks: bool, seed: u64) {
    let packing = packing(lengths);
    let mut random = Random::new(seed);
    let mut inputs = random.inputs(config, packing.num_tokens(), biases);
    let d_o = random.tensor(&[packing.num_tokens(), config.num_heads(), config.head_dim_v()], 1.0);
    let outputs = forward(&Exact, config, &packing, &inputs).unwrap();
    inputs.block_indices = Some(outputs.block_indices);
    if given_blocks {
        inputs.cmp = Compressed::Blocks { k: outputs.k_blocks, v: outputs.v_blocks };
    }
    let grads = gradients(config, &packing, &inputs, &d_o);
    let names: Vec<&str> = parameters(&mut inputs).iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), grads.len());
    for (p, name) in names.iter().enumerate() {
        let len = grads[p].data.len();
        assert!(grads[p].data.iter().any(|&g| g != 0.0), "the gradient of {name} is all zero");
        for i in (0..len).step_by((len / 40).max(1)) {
            let mut at = |shift: f64| {
                parameters(&mut inputs)[p].1.data[i] += shift;
                let value = loss(config, &packing, &inputs, &d_o);
                parameters(&mut inputs)[p].1.data[i] -= shift;
                value
            };
            let difference = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let got = grads[p].data[i];
            assert!((got - difference).abs() < 1e-7 * (1.0 + got.abs()), "d{name}[{i}] is {got}, not {difference}");
        }
    }
}

#[test]
fn mean_compression() {
    check(&config(2, 2, CompressKind::Mean, 2, 2, 4), &[13], false, false, 1);
}

#[test]
fn weighted_compression_with_embedding_and_ragged_sequences() {
    check(&config(4, 2, CompressKind::Weighted, 4, 2, 4), &[9, 0, 3, 14], true, false, 2);
}

#[test]
fn linear_compression_with_four_overlapping_blocks() {
    check(&config(3, 1, CompressKind::Linear, 4, 1, 4), &[11, 6], true, false, 3);
}

#[test]
fn mlp_compression_with_biases() {
    check(&config(6, 2, CompressKind::Mlp, 4, 2, 8), &[17], true, false, 4);
}

#[test]
fn mlp_compression_without_biases() {
    check(&config(2, 1, CompressKind::Mlp, 4, 4, 4), &[12, 5], false, false, 5);
}

#[test]
fn odd_head_counts_with_no_forced_first_block() {
    let config = config(3, 3, CompressKind::Linear, 4, 2, 4).to_builder().select_initial(0).scale(0.9).build().unwrap();
    check(&config, &[0, 19], true, false, 8);
}

#[test]
fn given_blocks() {
    check(&config(4, 2, CompressKind::Mean, 4, 2, 4), &[15], false, true, 6);
}

#[test]
fn dense_attention() {
    let config = config(4, 2, CompressKind::Mean, 4, 2, 4);
    let packing = packing(&[7, 0, 5]);
    let mut random = Random::new(7);
    let mut tensors =
        [random.tensor(&[12, 4, 3], 1.5), random.tensor(&[12, 2, 3], 1.5), random.tensor(&[12, 2, 2], 1.5)];
    let d_o = random.tensor(&[12, 4, 2], 1.0);
    let run = |[q, k, v]: &[Tensor; 3]| dense::forward(&Exact, &config, &packing, &branch::Inputs { q, k, v }).unwrap();
    let output = run(&tensors);
    let [q, k, v] = &tensors;
    let upstream = branch::Upstream { output: &output, d_o: &d_o };
    let grads = dense::backward(&Exact, &config, &packing, &branch::Inputs { q, k, v }, &upstream).unwrap();
    for (p, grad) in [grads.dq, grads.dk, grads.dv].iter().enumerate() {
        for i in 0..grad.data.len() {
            let mut at = |shift: f64| {
                tensors[p].data[i] += shift;
                let value: f64 = run(&tensors).o.data.iter().zip(&d_o.data).map(|(x, y)| x * y).sum();
                tensors[p].data[i] -= shift;
                value
            };
            let difference = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            assert!((grad.data[i] - difference).abs() < 1e-7, "tensor {p}, element {i}");
        }
    }
}
