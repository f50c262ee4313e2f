//! What must hold between the operations, and small cases worked out by hand.

mod common;

use common::{Random, packing};
use nsa_core::{CompressKind, CuSeqlens, DType, NsaConfig, Packing};
use nsa_ref::compress::Phi;
use nsa_ref::decode::{Cache, Compressor, Token};
use nsa_ref::nsa::{Compressed, Gradients, Inputs, backward, forward};
use nsa_ref::{Exact, Rounded, Tensor, branch, dense, quantize, select, slc, win};

/// Tokens `range` of a tensor whose outermost dimension is tokens.
fn slice(tensor: &Tensor, range: std::ops::Range<usize>) -> Tensor {
    let row: usize = tensor.shape[1..].iter().product();
    let mut shape = tensor.shape.clone();
    shape[0] = range.len();
    Tensor::new(&shape, tensor.data[range.start * row..range.end * row].to_vec())
}

fn assert_close(got: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(got.shape, expected.shape, "{what}");
    for (i, (x, y)) in got.data.iter().zip(&expected.data).enumerate() {
        let same = x == y || (x - y).abs() <= tolerance * (1.0 + y.abs());
        assert!(same, "{what}: element {i} is {x}, expected {y}");
    }
}

fn config(heads: usize, groups: usize) -> nsa_core::NsaConfigBuilder {
    NsaConfig::builder(heads, groups, 5, 3)
        .compress_block(4)
        .compress_stride(2)
        .select_block(8)
        .select_count(4)
        .window(6)
        .compress_kind(CompressKind::Mlp)
        .compress_hidden(7)
}

#[test]
fn all_blocks_selected_is_dense_attention_and_so_is_a_wide_window() {
    let config = config(4, 2).select_count(9).window(40).build().unwrap();
    let packing = packing(&[40, 0, 23]);
    let inputs = Random::new(1).inputs(&config, 63, true);
    let outputs = forward(&Exact, &config, &packing, &inputs).unwrap();
    let run = |k, v| dense::forward(&Exact, &config, &packing, &branch::Inputs { q: &inputs.q, k, v }).unwrap();
    assert_eq!(outputs.branches[1], run(&inputs.k_slc, &inputs.v_slc));
    assert_eq!(outputs.branches[2], run(&inputs.k_win, &inputs.v_win));
}

#[test]
fn a_query_without_a_visible_block_gets_zero() {
    let config = config(4, 2).build().unwrap();
    let inputs = Random::new(2).inputs(&config, 9, true);
    let outputs = forward(&Exact, &config, &packing(&[9]), &inputs).unwrap();
    let cmp = &outputs.branches[0];
    for t in 0..9 {
        for h in 0..4 {
            let empty = t < 3;
            assert_eq!(cmp.o.row(&[t, h]).iter().all(|&x| x == 0.0), empty);
            assert_eq!(cmp.lse.row(&[t])[h] == f64::NEG_INFINITY, empty);
        }
    }
    assert!(outputs.o.data.iter().all(|x| x.is_finite()));
}

/// Queries `start..end` of one sequence, with the keys of the tokens before `end`.
fn chunk(inputs: &Inputs, start: usize, end: usize) -> (Packing, Inputs) {
    let packing = Packing::with_contexts(CuSeqlens::single(end - start).unwrap(), vec![start]).unwrap();
    let upto = |t: &Tensor| slice(t, 0..end);
    let Compressed::Tokens { mut kv } = inputs.cmp.clone() else { unreachable!() };
    kv.iter_mut().for_each(|side| side.x = upto(&side.x));
    let part = Inputs {
        q: slice(&inputs.q, start..end),
        gates: slice(&inputs.gates, start..end),
        cmp: Compressed::Tokens { kv },
        k_slc: upto(&inputs.k_slc),
        v_slc: upto(&inputs.v_slc),
        k_win: upto(&inputs.k_win),
        v_win: upto(&inputs.v_win),
        block_indices: None,
    };
    (packing, part)
}

#[test]
fn chunks_that_continue_a_context_are_the_whole() {
    let config = config(6, 2).build().unwrap();
    let inputs = Random::new(3).inputs(&config, 37, true);
    let whole = forward(&Exact, &config, &packing(&[37]), &inputs).unwrap();
    for (start, end) in [(0, 1), (0, 13), (13, 14), (14, 37), (36, 37)] {
        let (packing, part) = chunk(&inputs, start, end);
        let got = forward(&Exact, &config, &packing, &part).unwrap();
        assert_eq!(got.o, slice(&whole.o, start..end), "{start}..{end}");
    }
}

#[test]
fn gradients_of_chunks_add_up_to_the_whole() {
    let config = config(6, 2).build().unwrap();
    let mut random = Random::new(9);
    let inputs = random.inputs(&config, 37, true);
    let d_o = random.tensor(&[37, 6, 3], 1.0);
    let run = |packing: &Packing, inputs: &Inputs, d_o: &Tensor| {
        let outputs = forward(&Exact, &config, packing, inputs).unwrap();
        backward(&Exact, &config, packing, inputs, &outputs, d_o).unwrap()
    };
    /// What every chunk passes back to the tokens before it.
    fn shared(grads: &Gradients) -> Vec<&Tensor> {
        let [k, v] = &**grads.d_cmp.as_ref().unwrap();
        let Phi::Mlp { weight1, .. } = &k.d_phi else { unreachable!() };
        let tokens = [&k.dx, &v.dx, &grads.dk_slc, &grads.dv_slc, &grads.dk_win, &grads.dv_win];
        tokens.into_iter().chain([weight1, v.d_position.as_ref().unwrap()]).collect()
    }
    let whole = run(&packing(&[37]), &inputs, &d_o);
    let mut sums: Vec<Tensor> = shared(&whole).iter().map(|t| Tensor::zeros(&t.shape)).collect();
    for (start, end) in [(0, 13), (13, 14), (14, 37)] {
        let (packing, part) = chunk(&inputs, start, end);
        let grads = run(&packing, &part, &slice(&d_o, start..end));
        assert_close(&grads.dq, &slice(&whole.dq, start..end), 1e-12, "dq");
        for (sum, grad) in sums.iter_mut().zip(shared(&grads)) {
            sum.data.iter_mut().zip(&grad.data).for_each(|(sum, g)| *sum += g);
        }
    }
    for (i, (sum, grad)) in sums.iter().zip(shared(&whole)).enumerate() {
        assert_close(sum, grad, 1e-11, &format!("gradient {i}"));
    }
}

#[test]
fn decoding_step_by_step_is_the_forward_pass() {
    for (heads, groups) in [(1, 1), (4, 2), (7, 1)] {
        let config = config(heads, groups).build().unwrap();
        let tokens = 90;
        let inputs = Random::new(4).inputs(&config, tokens, true);
        let whole = forward(&Exact, &config, &packing(&[tokens]), &inputs).unwrap();
        let Compressed::Tokens { kv } = &inputs.cmp else { unreachable!() };
        let compressor = |c: usize| Compressor { position: kv[c].position.clone(), phi: kv[c].phi.clone() };
        let row = |x: &Tensor, t: usize| Tensor::new(&x.shape[1..], slice(x, t..t + 1).data);
        let token = |t: usize| Token {
            q: row(&inputs.q, t),
            k: [&kv[0].x, &inputs.k_slc, &inputs.k_win].map(|x| row(x, t)),
            v: [&kv[1].x, &inputs.v_slc, &inputs.v_win].map(|x| row(x, t)),
            gates: row(&inputs.gates, t),
        };
        let mut cache = Cache::new(config.clone(), [compressor(0), compressor(1)]).unwrap();
        let mut prefilled = cache.clone();
        for t in 0..tokens {
            let step = cache.step(&Exact, &token(t)).unwrap();
            // The ring's order differs from the forward's: sums in another order.
            assert_close(&step.o, &row(&whole.o, t), 1e-12, &format!("token {t}"));
            for (g, list) in step.block_indices.iter().enumerate() {
                assert_eq!(list, whole.block_indices.list(t, g), "token {t}, group {g}");
            }
            // The last selected block is full where the token ends it; before that it is not, and fewer rows are read.
            let most = nsa_core::index::decode_rows(&config, t + 1);
            let full = (t + 1) % config.select_block() == 0 || t < config.select_count() * config.select_block();
            assert!(if full { step.rows_read == most } else { step.rows_read < most }, "token {t}: {}", step.rows_read);
            if t < 53 {
                prefilled.append(&Exact, &token(t)).unwrap();
            } else {
                assert_eq!(prefilled.step(&Exact, &token(t)).unwrap(), step, "token {t} after a prefill");
            }
        }
        let blocks = nsa_core::index::num_blocks(&config, tokens);
        assert_eq!(cache.rows(), (tokens, blocks, config.compress_block(), config.window()));
    }
}

#[test]
fn scores_weigh_compression_blocks_by_the_chunks_they_cover() {
    let config = NsaConfig::builder(1, 1, 4, 4).compress_hidden(1).build().unwrap();
    // 32/16/64: compression block i covers the chunks i and i + 1, four chunks a selection block, so the weights of
    // blocks 4j − 1 … 4j + 3 in block j are 1 2 2 2 1.
    for (i, expected) in [(0, [2.0, 0.0, 0.0]), (3, [1.0, 1.0, 0.0]), (4, [0.0, 2.0, 0.0]), (7, [0.0, 1.0, 1.0])] {
        let mut importance = vec![0.0; 11];
        importance[i] = 1.0;
        assert_eq!(select::scores(&Exact, &config, 2 * 64, &importance), expected, "block {i}");
    }
}

#[test]
fn ties_go_to_the_lower_block_and_forced_blocks_come_first() {
    let config = config(1, 1).build().unwrap();
    // n = 4: block 0 and the last two are forced, one place is left.
    assert_eq!(select::choose(&config, &[0.0, 0.5, 0.9, 0.9, 0.1, 0.0, 0.0]), [0, 2, 5, 6]);
    assert_eq!(select::choose(&config, &[0.0; 7]), [0, 1, 5, 6]);
    assert_eq!(select::choose(&config, &[0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), [0, 1, 5, 6]);
    assert_eq!(select::choose(&config, &[0.3, 0.1]), [0, 1, -1, -1]);
    assert_eq!(select::choose(&config, &[0.3, 0.1, 7.0, 0.0, 0.0]), [0, 2, 3, 4]);
}

#[test]
fn two_keys_by_hand() {
    let config = NsaConfig::builder(1, 1, 1, 1).scale(1.0).compress_hidden(1).window(2).build().unwrap();
    let one = |data: &[f64]| Tensor::new(&[data.len(), 1, 1], data.to_vec());
    let (q, k, v) = (one(&[1.0, 2.0]), one(&[0.0, 3f64.ln() / 2.0]), one(&[10.0, 20.0]));
    let inputs = branch::Inputs { q: &q, k: &k, v: &v };
    let got = win::forward(&Exact, &config, &packing(&[2]), &inputs).unwrap();
    // Scores 0 and ln 3: weights 1/4 and 3/4.
    assert_close(&got.o, &one(&[10.0, 17.5]), 1e-15, "o");
    assert_close(&got.lse, &Tensor::new(&[2, 1], vec![0.0, 4f64.ln()]), 1e-15, "lse");
}

#[test]
fn rounding_is_small_and_there() {
    let config = config(4, 2).build().unwrap();
    let mut inputs = Random::new(5).inputs(&config, 40, false);
    inputs.q = quantize(&inputs.q, DType::Bf16);
    let exact = forward(&Exact, &config, &packing(&[40]), &inputs).unwrap();
    inputs.block_indices = Some(exact.block_indices.clone());
    for (dtype, bound) in [(DType::F64, 0.0), (DType::F32, 1e-6), (DType::F16, 2e-3), (DType::Bf16, 2e-2)] {
        let rounded = forward(&Rounded::wide(dtype), &config, &packing(&[40]), &inputs).unwrap();
        let worst = exact.o.data.iter().zip(&rounded.o.data).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        assert!(worst <= bound, "{dtype}: {worst}");
        assert_eq!(worst > 0.0, bound > 0.0, "{dtype}");
    }
    let rounding = Rounded::wide(DType::Bf16);
    let outputs = forward(&rounding, &config, &packing(&[40]), &inputs).unwrap();
    assert_eq!(outputs.o, quantize(&outputs.o, DType::Bf16));
    // Gradients stay in the accumulator.
    let grads = backward(&rounding, &config, &packing(&[40]), &inputs, &outputs, &outputs.o).unwrap();
    for grad in [&grads.dq, &grads.dk_slc, &grads.d_gates, &grads.d_cmp.as_ref().unwrap()[0].dx] {
        assert_eq!(*grad, quantize(grad, DType::F32));
        assert_ne!(*grad, quantize(grad, DType::Bf16));
    }
}

#[test]
fn gates_of_one_add_the_branches() {
    let config = config(2, 1).build().unwrap();
    let mut inputs = Random::new(8).inputs(&config, 12, true);
    inputs.gates = inputs.gates.map(|_| 1.0);
    let outputs = forward(&Exact, &config, &packing(&[12]), &inputs).unwrap();
    for (i, &o) in outputs.o.data.iter().enumerate() {
        assert_eq!(o, outputs.branches.iter().map(|branch| branch.o.data[i]).sum::<f64>());
    }
    let indices = &outputs.block_indices;
    let slc_inputs = branch::Inputs { q: &inputs.q, k: &inputs.k_slc, v: &inputs.v_slc };
    let slc = slc::forward(&Exact, &config, &packing(&[12]), &slc_inputs, indices).unwrap();
    assert_eq!(slc, outputs.branches[1]);
}
