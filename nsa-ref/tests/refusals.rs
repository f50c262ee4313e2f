//! Arguments that do not fit are errors that name them, never panics.

mod common;

use common::{Random, packing};
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};
use nsa_ref::compress::{self, Phi};
use nsa_ref::decode::{Cache, Compressor, Token};
use nsa_ref::nsa::{Compressed, Inputs, backward, forward};
use nsa_ref::{BlockIndices, Exact, Tensor, branch, dense, gate};

fn config() -> NsaConfig {
    NsaConfig::builder(4, 2, 5, 3)
        .compress_block(4)
        .compress_stride(2)
        .select_block(4)
        .select_count(4)
        .window(6)
        .compress_kind(CompressKind::Mlp)
        .compress_hidden(7)
        .build()
        .unwrap()
}

/// The message of the forward pass over 10 tokens after `change`.
fn refusal(change: impl FnOnce(&mut Inputs)) -> String {
    let mut inputs = Random::new(21).inputs(&config(), 10, true);
    change(&mut inputs);
    forward(&Exact, &config(), &packing(&[10]), &inputs).unwrap_err().to_string()
}

#[test]
fn the_operator_names_the_tensor() {
    let message = refusal(|i| i.v_win = Tensor::zeros(&[10, 2, 4]));
    assert_eq!(message, "nsa: `v_win` has shape [10, 2, 4], expected [10, 2, 3]");
    let message = refusal(|i| i.q = Tensor::zeros(&[40]));
    assert_eq!(message, "nsa: `q` has shape [40], expected [10, 4, 5]");
    let message = refusal(|i| i.gates = Tensor::default());
    assert!(message.starts_with("nsa: `gates` "), "{message}");
    let message = refusal(|i| i.k_slc.data.truncate(99));
    assert_eq!(message, "nsa: `k_slc (its elements)` has shape [99], expected [100]");
    let message = refusal(|i| {
        let Compressed::Tokens { kv } = &mut i.cmp else { unreachable!() };
        kv[1].position = Some(Tensor::zeros(&[4, 2, 5]));
    });
    assert_eq!(message, "nsa: `pe_v` has shape [4, 2, 5], expected [4, 2, 3]");
    let message = refusal(|i| {
        let Compressed::Tokens { kv } = &mut i.cmp else { unreachable!() };
        let Phi::Mlp { weight2, .. } = &mut kv[0].phi else { unreachable!() };
        *weight2 = Tensor::zeros(&[2, 6, 5]);
    });
    assert_eq!(message, "nsa: `phi_k.2.weight` has shape [2, 6, 5], expected [2, 7, 5]");
    let message = refusal(|i| {
        let Compressed::Tokens { kv } = &mut i.cmp else { unreachable!() };
        kv[1].phi = Phi::Mean;
    });
    assert_eq!(message, "nsa: `phi_v` = mean: must be of the configuration's compress_kind");
    let blocks = |k, v| Compressed::Blocks { k: Tensor::zeros(&[k, 2, 5]), v: Tensor::zeros(&[v, 2, 3]) };
    let message = refusal(|i| i.cmp = blocks(4, 5));
    assert_eq!(message, "nsa: `v_cmp_blocks` has shape [5, 2, 3], expected [4, 2, 3]");
}

#[test]
fn block_lists_are_strictly_ascending_candidates() {
    // All lists but the last (query 9 and group 1 of 10 and 2, candidates 0, 1, 2) are empty.
    let message = |last: [i32; 4]| {
        let mut data = vec![-1; 10 * 2 * 4];
        data[76..].copy_from_slice(&last);
        let block_indices = Some(BlockIndices { shape: [10, 2, 4], data });
        let mut inputs = Random::new(22).inputs(&config(), 10, true);
        inputs.block_indices = block_indices;
        forward(&Exact, &config(), &packing(&[10]), &inputs).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(message([0, 1, 2, -1]), Ok(()));
    assert_eq!(message([-1; 4]), Ok(()));
    let refused = |last: [i32; 4], rule: &str| {
        assert_eq!(message(last), Err(format!("nsa: `block_indices[9, 1]` = {last:?}: {rule}")));
    };
    refused([0, 1, 3, -1], "every block must be one of the query's candidates");
    refused([-2, 0, 1, -1], "every block must be one of the query's candidates");
    refused([0, 2, 2, -1], "blocks must ascend strictly");
    refused([2, 1, -1, -1], "blocks must ascend strictly");
    refused([0, -1, 1, -1], "after the first -1 there must be nothing else");
    let short = BlockIndices { shape: [10, 2, 4], data: vec![-1; 79] };
    let message = refusal(|i| i.block_indices = Some(short));
    assert_eq!(message, "nsa: `block_indices (its elements)` has shape [79], expected [80]");
}

#[test]
fn single_operations_name_their_arguments() {
    let (config, packing) = (config(), packing(&[10]));
    let inputs = Random::new(23).inputs(&config, 10, true);
    let outputs = forward(&Exact, &config, &packing, &inputs).unwrap();
    let d_o = Tensor::zeros(&[10, 4, 5]);
    let error = backward(&Exact, &config, &packing, &inputs, &outputs, &d_o).unwrap_err();
    assert_eq!(error.to_string(), "gate: `do` has shape [10, 4, 5], expected [10, 4, 3]");
    let dense_inputs = branch::Inputs { q: &inputs.q, k: &inputs.k_slc, v: &inputs.v_slc };
    let upstream = branch::Upstream { output: &outputs.branches[1], d_o: &d_o };
    let error = dense::backward(&Exact, &config, &packing, &dense_inputs, &upstream).unwrap_err();
    assert_eq!(error.to_string(), "dense: `do` has shape [10, 4, 5], expected [10, 4, 3]");
    let flat = Tensor::zeros(&[120]);
    let error = gate::forward(&Exact, &inputs.gates, [&flat; 3]).unwrap_err();
    assert_eq!(error.to_string(), "gate: `o_cmp` has shape [120], expected [10, 4, 0]");
    let Compressed::Tokens { kv } = &inputs.cmp else { unreachable!() };
    let context = Packing::with_contexts(CuSeqlens::single(10).unwrap(), vec![3]).unwrap();
    let error = compress::forward(&Exact, &config, &context, &kv[0].x, None, &kv[0].phi).unwrap_err().to_string();
    assert!(error.ends_with("every sequence must start at position 0"), "{error}");
    let mean = config.to_builder().compress_kind(CompressKind::Mean).build().unwrap();
    let empty_rows = Tensor::zeros(&[10, 2, 0]);
    let error = compress::forward(&Exact, &mean, &packing, &empty_rows, None, &Phi::Mean).unwrap_err();
    assert_eq!(error.to_string(), "compress: `x` has shape [10, 2, 0], expected [10, 2, 1]");
}

#[test]
fn decoding_names_its_arguments_and_keeps_its_caches() {
    let config = config();
    let inputs = Random::new(24).inputs(&config, 1, true);
    let Compressed::Tokens { kv } = &inputs.cmp else { unreachable!() };
    let compressor = |c: usize| Compressor { position: kv[c].position.clone(), phi: kv[c].phi.clone() };
    let error = Cache::new(config.clone(), [compressor(1), compressor(0)]).unwrap_err();
    assert_eq!(error.to_string(), "decode: `pe_k` has shape [4, 2, 3], expected [4, 2, 5]");
    let mut cache = Cache::new(config, [compressor(0), compressor(1)]).unwrap();
    let (k, v) = (Tensor::zeros(&[2, 5]), Tensor::zeros(&[2, 3]));
    let token = Token {
        q: Tensor::zeros(&[4, 5]),
        k: [k.clone(), k.clone(), k.clone()],
        v: [v.clone(), v.clone(), k.clone()],
        gates: Tensor::zeros(&[4, 3]),
    };
    let error = cache.step(&Exact, &token).unwrap_err();
    assert_eq!(error.to_string(), "decode: `v_win` has shape [2, 5], expected [2, 3]");
    assert!(cache.is_empty() && cache.rows() == (0, 0, 0, 0));
}
