//! Laws between the operations, on the kernels themselves: what must hold whatever the numbers are.

use nsa_core::{CuSeqlens, NsaConfig, Packing};
use nsa_kernels::Backend;
use nsa_tests::check::attention_inputs;
use nsa_tests::compare::{difference, unit_roundoff};
use nsa_tests::generate::{self, Guarded};
use nsa_tests::kernels::{Attention, Pattern};
use nsa_tests::operator::{self, Inputs};
use nsa_tests::{Case, case, decode, ties};

fn backend() -> Backend {
    Backend::pick(None).unwrap().0
}

fn find(name: &str) -> Case {
    case::find(name).unwrap()
}

fn dense(inputs: &Attention<f32>) -> Attention<f32> {
    Attention { pattern: Pattern::Dense, gates: None, ..inputs.clone() }
}

/// Rounding of sums in another order: some ulps of the largest value.
#[track_caller]
fn close(name: &str, a: &[f32], b: &[f32]) {
    let bound = 32.0 * unit_roundoff(nsa_core::DType::F32) as f32;
    let worst = difference(a, b);
    assert!(worst <= bound, "{name}: {worst:e} above {bound:e}");
}

/// Forward and backward of two operations that must agree.
fn same(a: &Attention<f32>, b: &Attention<f32>) {
    let (fa, fb) = (a.forward(&backend()).unwrap(), b.forward(&backend()).unwrap());
    close("o", &fa.o, &fb.o);
    close("lse", &fa.lse, &fb.lse);
    let (ga, gb) = (a.backward(&backend(), &fa).unwrap(), b.backward(&backend(), &fb).unwrap());
    close("dq", &ga.q, &gb.q);
    close("dk", &ga.k, &gb.k);
    close("dv", &ga.v, &gb.v);
}

/// Every candidate of every query.
fn all_blocks(case: &Case) -> Vec<i32> {
    let (groups, count) = (case.config.num_kv_heads(), case.config.select_count());
    let mut lists = Vec::new();
    for t in case.lengths.iter().flat_map(|&length| 0..length) {
        let candidates = nsa_core::index::num_candidates(&case.config, t);
        assert!(candidates <= count, "the case must have room for every block");
        for _ in 0..groups {
            lists.extend((0..count as i32).map(|j| if (j as usize) < candidates { j } else { -1 }));
        }
    }
    lists
}

#[test]
fn all_blocks_selected_is_full_attention() {
    let case = find("all-blocks");
    let selected = Attention { block_indices: all_blocks(&case), gates: None, ..attention_inputs(&case, Pattern::Slc) };
    same(&selected, &dense(&selected));
}

#[test]
fn a_window_over_everything_is_full_attention() {
    let window = Attention { gates: None, ..attention_inputs(&find("all-window"), Pattern::Win) };
    same(&window, &dense(&window));
}

#[test]
fn blocks_of_one_token_compressed_by_their_mean_are_full_attention() {
    let case = find("blocks-of-one");
    let compressed = Attention { gates: None, ..attention_inputs(&case, Pattern::Cmp) };
    assert_eq!(case.blocks(), case.tokens());
    same(&compressed, &dense(&compressed));
}

#[test]
fn with_room_for_every_block_every_block_is_selected() {
    let case = find("all-blocks");
    let compressed: Attention<f32> = attention_inputs(&case, Pattern::Cmp);
    assert_eq!(compressed.forward(&backend()).unwrap().block_indices, all_blocks(&case));
}

#[test]
fn exact_ties_go_to_the_lower_block() {
    let few = NsaConfig::small().to_builder().select_initial(0).select_local(1).select_count(3);
    ties::assert_lower_blocks::<f32>(&backend(), few, &[200, 77]);
    ties::assert_lower_blocks::<f32>(&backend(), NsaConfig::small().to_builder(), &[111]);
}

/// Chunks of a prefill, each continuing the tokens before it, give the rows of the whole.
#[test]
fn chunks_are_the_whole() {
    for name in ["ragged", "stride-quarter", "odd-sizes", "111-group-7"] {
        let case = find(name);
        let whole = Inputs::<f32> { d_o: None, ..Inputs::generate(&case) };
        let outputs = operator::run(&backend(), &whole).unwrap();
        for size in [1, 13, 32] {
            let pieces = |(s, &length): (usize, &usize)| {
                (0..length).step_by(size).map(move |from| (s, from, (from + size).min(length)))
            };
            // Their order in the call is not their order in the sequences.
            let mut chunks: Vec<_> = case.lengths.iter().enumerate().flat_map(pieces).collect();
            chunks.reverse();
            let got = operator::run(&backend(), &decode::take(&whole, &outputs.blocks, &chunks).unwrap()).unwrap();
            let (width, lists) = (case.config.num_heads() * case.config.head_dim_v(), outputs.block_indices.len());
            let list = lists / case.tokens();
            let mut row = 0;
            for (s, from, to) in chunks {
                let start = whole.packing.seq(s).rows.start;
                let name = format!("{name}, sequence {s}, queries {from}..{to}");
                let expected = &outputs.o[(start + from) * width..(start + to) * width];
                close(&name, &got.o[row * width..][..expected.len()], expected);
                let expected = &outputs.block_indices[(start + from) * list..(start + to) * list];
                assert_eq!(&got.block_indices[row * list..][..expected.len()], expected, "{name}");
                row += to - from;
            }
        }
    }
}

/// The backward adds to dq if it is asked to, and writes dk and dv, whatever was there.
#[test]
fn the_backward_adds_to_dq_alone() {
    for pattern in [Pattern::Cmp, Pattern::Slc, Pattern::Win, Pattern::Dense] {
        let inputs: Attention<f32> = attention_inputs(&find("ragged"), pattern);
        let forward = inputs.forward(&backend()).unwrap();
        let once = inputs.backward(&backend(), &forward).unwrap();
        let mut dq = Guarded::filled(inputs.q.len(), 0.0);
        let mut dk = Guarded::filled(inputs.k.len(), 3.0);
        let mut dv = Guarded::filled(inputs.v.len(), f32::INFINITY);
        for _ in 0..2 {
            inputs.backward_into(&backend(), &forward, [&mut dq, &mut dk, &mut dv], true).unwrap();
        }
        let twice: Vec<f32> = once.q.iter().map(|x| x + x).collect();
        close(&format!("{pattern:?} dq"), dq.get(), &twice);
        assert_eq!((dk.get(), dv.get()), (&once.k[..], &once.v[..]), "{pattern:?}");
    }
}

/// A query without keys gives zero and −∞ and passes no gradient.
#[test]
fn queries_without_keys_give_nothing() {
    let case = Case::new("below", NsaConfig::small().to_builder(), [7, 3]);
    let inputs: Attention<f32> = attention_inputs(&case, Pattern::Cmp);
    let forward = inputs.forward(&backend()).unwrap();
    assert!(forward.o.iter().all(|&x| x == 0.0));
    assert!(forward.lse.iter().all(|&x| x == f32::NEG_INFINITY));
    assert!(inputs.backward(&backend(), &forward).unwrap().q.iter().all(|&x| x == 0.0));

    let case = find("ragged");
    let mut inputs: Attention<f32> = attention_inputs(&case, Pattern::Slc);
    inputs.block_indices.fill(-1);
    let forward = inputs.forward(&backend()).unwrap();
    assert!(forward.o.iter().all(|&x| x == 0.0));
    assert!(forward.lse.iter().all(|&x| x == f32::NEG_INFINITY));
    let grads = inputs.backward(&backend(), &forward).unwrap();
    assert!([grads.q, grads.k, grads.v].iter().flatten().all(|&x| x == 0.0));
}

/// The gate's gradient is the derivative of the gated sum: o is linear in each gate.
#[test]
fn gates_weigh_the_branches() {
    let case = find("ragged");
    let mut inputs = Inputs::<f32>::generate(&case);
    for column in 0..3 {
        inputs.gates = vec![0.0; inputs.gates.len()];
        inputs.gates.iter_mut().skip(column).step_by(3).for_each(|gate| *gate = 1.0);
        let outputs = operator::run(&backend(), &inputs).unwrap();
        assert_eq!(outputs.o, outputs.branches[column], "column {column}");
        let grads = outputs.grads.unwrap();
        let branch = |c: usize| match c {
            0 => inputs_of(&grads.k.cmp),
            1 => grads.k.slc.clone(),
            _ => grads.k.win.clone(),
        };
        for other in (0..3).filter(|&c| c != column) {
            assert!(branch(other).iter().all(|&x| x == 0.0), "a closed gate passes no gradient");
        }
        assert!(branch(column).iter().any(|&x| x != 0.0));
    }
}

fn inputs_of(cmp: &operator::Compressed<f32>) -> Vec<f32> {
    match cmp {
        operator::Compressed::Tokens { x, .. } => x.clone(),
        operator::Compressed::Blocks(blocks) => blocks.clone(),
    }
}

/// A packed batch is its sequences, each alone, to the bit.
#[test]
fn a_batch_is_its_sequences() {
    let case = find("ragged");
    for pattern in [Pattern::Cmp, Pattern::Slc, Pattern::Win, Pattern::Dense] {
        let batch: Attention<f32> = attention_inputs(&case, pattern);
        let outputs = batch.forward(&backend()).unwrap();
        let rows = batch.rows().unwrap();
        let (config, count) = (&case.config, case.config.num_kv_heads() * case.config.select_count());
        let (q, o) = (config.num_heads() * config.head_dim_qk(), config.num_heads() * config.head_dim_v());
        let (k, v) = (config.num_kv_heads() * config.head_dim_qk(), config.num_kv_heads() * config.head_dim_v());
        for (s, seq) in batch.packing.seqs().enumerate() {
            let (queries, keys) = (seq.rows, rows.range(s));
            let part = |data: &[f32], range: &std::ops::Range<usize>, width| {
                data[range.start * width..range.end * width].to_vec()
            };
            let alone = Attention {
                packing: Packing::new(CuSeqlens::single(queries.len()).unwrap()),
                q: part(&batch.q, &queries, q),
                k: part(&batch.k, &keys, k),
                v: part(&batch.v, &keys, v),
                block_indices: match pattern {
                    Pattern::Slc => batch.block_indices[queries.start * count..queries.end * count].to_vec(),
                    _ => Vec::new(),
                },
                d_o: part(&batch.d_o, &queries, o),
                gates: None,
                ..batch.clone()
            };
            let got = alone.forward(&backend()).unwrap();
            assert_eq!(got.o, part(&outputs.o, &queries, o), "{pattern:?}, sequence {s}");
        }
    }
}

/// A page of memory that outputs never touch stays as it was: the kit's own promise.
#[test]
fn guards_stand_around_every_output() {
    let output = Guarded::<f32>::unwritten(5);
    assert!(output.get().iter().all(|x| x.is_nan()));
    let seeds: Vec<u64> = case::cases().iter().map(|case| generate::seed(&case.name, "q")).collect();
    assert!((1..seeds.len()).all(|i| !seeds[..i].contains(&seeds[i])), "every case has inputs of its own");
}
