//! Decoding steps on the simulator.

use super::{assert_few_bytes, assert_large_op, counted, paper};
use half::bf16;
use nsa_core::{DType, NsaConfigBuilder, index};
use nsa_kernels::cuda::decode::{Capacity, Workspace};
use nsa_kernels::cuda::graph::Graph;
use nsa_kernels::{Backend, Pages, op};
use nsa_tests::check::{self, Op};
use nsa_tests::operator::{self, Inputs};
use nsa_tests::sim::{BITS, on_an_a100, on_simulator};
use nsa_tests::{Case, decode};

#[test]
fn cases() {
    on_an_a100("decode::cases", || assert_large_op(Op::Decode));
}

/// Batches of contexts from one token to thousands, from pages as long as selection blocks and longer.
#[test]
fn long_contexts() {
    on_simulator("decode::long_contexts", || {
        let backend = Backend::cuda(0).expect("the simulator");
        for (name, config, length, dtype, page_rows) in [
            ("long-group-16", paper(16, 1, 128, 128), 4500, DType::Bf16, 64),
            ("long-group-4", paper(8, 2, 64, 64), 1700, DType::F16, 128),
            ("long-group-20", paper(20, 1, 64, 32), 1700, DType::Bf16, 64),
            ("long-group-70", paper(70, 1, 16, 16), 1700, DType::Bf16, 64),
            ("long-192-128", paper(16, 1, 192, 128), 1700, DType::Bf16, 192),
            ("long-256", paper(3, 1, 256, 256), 1700, DType::F32, 64),
        ] {
            let case = Case::new(name, config, [length]);
            let report = check::check_pages(&case, dtype, &backend, page_rows);
            println!("{BITS}{name}: {:016x}", report.bits());
            assert!(report.failures().is_empty(), "{name} {dtype}: {:?}", report.failures());
        }
    });
}

/// One query a sequence, at `contexts`, of a case of that name.
fn steps(name: &str, config: NsaConfigBuilder, contexts: &[usize]) -> Inputs<bf16> {
    let case = Case::new(name, config, contexts);
    let whole = Inputs::<bf16>::generate(&case);
    let (cpu, _) = Backend::pick(Some("cpu")).expect("the CPU");
    let blocks = operator::blocks(&cpu, &whole).expect("blocks");
    let chunks: Vec<_> = contexts.iter().enumerate().map(|(s, &context)| (s, context - 1, context)).collect();
    decode::take(&whole, &blocks, &chunks).expect("steps")
}

/// A graph of one step, captured once, serves batches of other caches, contexts and sizes.
#[test]
fn a_graph_serves_every_batch() {
    on_simulator("decode::a_graph_serves_every_batch", || {
        let backend = Backend::cuda(0).expect("the simulator");
        let Backend::Cuda(cuda) = &backend else { panic!("a CUDA device") };
        let config = || paper(8, 2, 32, 16).select_count(5).window(100);
        let built = config().build().expect("a configuration");
        let capacity = Capacity { layers: 1, sequences: 4, context: 3000, block_page_rows: 64, token_page_rows: 64 };
        let mut workspace = Workspace::<bf16>::new(cuda, &built, capacity).expect("a workspace");
        let mut q = backend.alloc::<bf16>(4 * 8 * 32);
        let mut gates = backend.alloc::<bf16>(4 * 8 * 3);
        let mut o = backend.alloc::<bf16>(4 * 8 * 16);
        let mut lists = backend.alloc::<i32>(4 * 2 * 5);
        let mut graph: Option<Graph> = None;
        for (name, contexts) in [
            ("graph-first", vec![3000, 1, 700, 33]),
            ("graph-second", vec![31, 2999, 640, 1025]),
            ("graph-fewer", vec![64, 2100]),
            ("graph-again", vec![65, 2101, 32]),
        ] {
            let inputs = steps(name, config(), &contexts);
            q.write(&inputs.q).expect("q");
            gates.write(&inputs.gates).expect("gates");
            o.write(&[bf16::NEG_ONE; 4 * 8 * 16]).expect("o");
            lists.write(&[77; 4 * 2 * 5]).expect("lists");
            let outputs = decode::with_caches(&backend, &inputs, 64, |caches| {
                let mut ready = workspace.upload(0, caches).expect("caches");
                let mut launch = || {
                    let (q, gates) = (q.tensor([4, 8, 32]).expect("q"), gates.tensor([4, 8, 3]).expect("gates"));
                    let (o, lists) =
                        (o.tensor_mut([4, 8, 16]).expect("o"), lists.tensor_mut([4, 2, 5]).expect("lists"));
                    ready.launch(q, gates, o, lists)
                };
                match &graph {
                    Some(graph) => graph.launch().expect("the graph"),
                    None => {
                        launch().expect("a launch");
                        let recorded = graph.insert(cuda.record(launch).expect("a graph"));
                        recorded.launch().expect("the graph");
                    }
                }
                let (mut values, mut blocks) = (vec![bf16::ZERO; o.len()], vec![0; lists.len()]);
                o.read(&mut values).expect("o");
                lists.read(&mut blocks).expect("lists");
                Ok((values, blocks))
            })
            .expect("caches");
            let expected = decode::step(&backend, &inputs, 64).expect("a step");
            assert_eq!(outputs.0[..expected.o.len()], expected.o, "{name}");
            assert_eq!(outputs.1[..expected.block_indices.len()], expected.block_indices, "{name}");
            assert!(
                outputs.0[expected.o.len()..].iter().all(|x| *x == bf16::NEG_ONE),
                "{name}: o of an absent sequence"
            );
            assert!(outputs.1[expected.block_indices.len()..].iter().all(|j| *j == 77), "{name}: a list of one");
        }
        assert!(graph.is_some(), "captured");
    });
}

/// Caches that were placed and have other contexts since are where they were; what they are not is said, and nothing is launched.
#[test]
fn caches_are_placed_again() {
    on_an_a100("decode::caches_are_placed_again", || {
        let backend = Backend::cuda(0).expect("the simulator");
        let inputs = steps("placed", paper(8, 2, 32, 16).select_count(5).window(100), &[700, 130]);
        let (q, gates) = (backend.upload(&inputs.q), backend.upload(&inputs.gates));
        decode::with_caches(&backend, &inputs, 64, |caches| {
            let config = &inputs.config;
            let of = |contexts: [usize; 2]| {
                let mut all = Vec::new();
                for (cache, context) in caches.iter().zip(contexts) {
                    let blocks = index::num_blocks(config, context);
                    all.push(op::decode::Cache {
                        context,
                        k_cmp: Pages { len: blocks, ..cache.k_cmp.clone() },
                        v_cmp: Pages { len: blocks, ..cache.v_cmp.clone() },
                        k_slc: Pages { len: context, ..cache.k_slc.clone() },
                        v_slc: Pages { len: context, ..cache.v_slc.clone() },
                        k_win: cache.k_win,
                        v_win: cache.v_win,
                    });
                }
                all
            };
            let launch = |workspace: &mut op::decode::Workspace<bf16>| {
                let (mut o, mut lists) = (backend.alloc::<bf16>(2 * 8 * 16), backend.alloc::<i32>(2 * 2 * 5));
                workspace.send().expect("sent");
                let (q, gates) = (q.tensor([2, 8, 32]).expect("q"), gates.tensor([2, 8, 3]).expect("gates"));
                let (o_out, lists_out) =
                    (o.tensor_mut([2, 8, 16]).expect("o"), lists.tensor_mut([2, 2, 5]).expect("lists"));
                workspace.launch(1, q, gates, o_out, lists_out).expect("a launch");
                let (mut values, mut blocks) = (vec![bf16::ZERO; o.len()], vec![0; lists.len()]);
                o.read(&mut values).expect("o");
                lists.read(&mut blocks).expect("lists");
                (values, blocks)
            };
            let mut workspace = op::decode::Workspace::<bf16>::new(2);
            assert_eq!(workspace.place_again(1, &[5, 6]), Ok(None), "nothing was placed");
            let first = workspace.place(&backend, config, 1, &of([640, 65])).expect("placed");
            assert!(first.anew);
            assert_eq!(workspace.place_again(0, &[640, 65]), Ok(None), "not in this layer");
            for contexts in [[640, 65], [639, 127], [577, 128], [1, 1]] {
                let again = workspace.place_again(1, &contexts).expect("a layer").expect("there");
                let got = launch(&mut workspace);
                let mut other = op::decode::Workspace::<bf16>::new(2);
                let placed = other.place(&backend, config, 1, &of(contexts)).expect("placed");
                assert_eq!((got, again), (launch(&mut other), placed.rows_read), "{contexts:?}");
            }
            // Pages that were not placed, sequences that were not, no token, more than memory is for.
            for contexts in [&[641, 65][..], &[640, 129], &[640], &[640, 65, 3], &[0, 65], &[2000, 65]] {
                assert_eq!(workspace.place_again(1, contexts), Ok(None), "{contexts:?}");
            }
            assert!(workspace.place_again(2, &[5, 6]).is_err());
            let cpu = Backend::pick(Some("cpu")).expect("the CPU").0;
            let error = workspace.place(&cpu, config, 1, &of([640, 65])).expect_err("on the CPU").to_string();
            assert!(error.contains("call `step_with`"), "{error}");
            Ok(())
        })
        .expect("caches");
    });
}

/// One workspace grows as it must, and serves batches of any size in turns, of layers with caches of their own.
#[test]
fn a_workspace_serves_what_comes() {
    on_simulator("decode::a_workspace_serves_what_comes", || {
        let backend = Backend::cuda(0).expect("the simulator");
        let config = || paper(8, 2, 32, 16).select_count(5).window(100);
        let mut workspace = op::decode::Workspace::<bf16>::new(2);
        let batches = [vec![5], vec![700, 1, 33], vec![1500], vec![5, 64], vec![1025, 6]];
        for (number, contexts) in batches.iter().enumerate() {
            for layer in 0..2 {
                let inputs = steps(&format!("grown-{number}-{layer}"), config(), contexts);
                let (q, gates, seqs) = (backend.upload(&inputs.q), backend.upload(&inputs.gates), contexts.len());
                let (mut o, mut lists) = (backend.alloc::<bf16>(seqs * 8 * 16), backend.alloc::<i32>(seqs * 2 * 5));
                let rows_read = decode::with_caches(&backend, &inputs, 64, |caches| {
                    let args = op::decode::Step {
                        config: &inputs.config,
                        caches,
                        q: q.tensor([seqs, 8, 32]).expect("q"),
                        gates: gates.tensor([seqs, 8, 3]).expect("gates"),
                        o: o.tensor_mut([seqs, 8, 16]).expect("o"),
                        block_indices: lists.tensor_mut([seqs, 2, 5]).expect("lists"),
                    };
                    op::decode::step_with(&backend, &mut workspace, layer, args).map_err(|error| error.to_string())
                });
                assert_eq!(rows_read.expect("a step").len(), seqs);
                let (mut values, mut blocks) = (vec![bf16::ZERO; o.len()], vec![0; lists.len()]);
                o.read(&mut values).expect("o");
                lists.read(&mut blocks).expect("lists");
                let expected = decode::step(&backend, &inputs, 64).expect("a step");
                assert_eq!((values, blocks), (expected.o, expected.block_indices), "{contexts:?}, layer {layer}");
            }
        }
    });
}

/// What a step moves besides the rows of k and v that it must read, in bf16.
#[test]
fn bytes() {
    const SIZES: [(usize, usize); 3] = [(16, 2048), (4, 2048), (16, 8192)];
    let config = |group| paper(group, 1, 128, 128);
    let launches = counted("decode::bytes", || {
        let backend = Backend::cuda(0).expect("the simulator");
        for (group, context) in SIZES {
            decode::step(&backend, &steps("bytes", config(group), &[context]), 64).expect("a step");
        }
    });
    let Some(launches) = launches else { return };
    assert_eq!(launches.len(), 2 * SIZES.len());
    for ((group, context), launches) in SIZES.into_iter().zip(launches.chunks(2)) {
        let built = config(group).build().expect("a configuration");
        let least = index::decode_rows(&built, context) as f64 * (128.0 + 128.0) * 2.0;
        assert_few_bytes(&format!("R = {group}, {context} tokens"), launches, least);
    }
}
