//! NaN in every row of K and V that no kernel may read: excluded by a mask, a list or a length. One read would show.

use half::bf16;
use nsa_core::{CuSeqlens, DType, Packing, index};
use nsa_kernels::Backend;
use nsa_tests::check::attention_inputs;
use nsa_tests::kernels::{Attention, Compress, Pattern};
use nsa_tests::{Case, Kind, backends, case, check, generate};

fn backend() -> Backend {
    Backend::pick(None).unwrap().0
}

/// Runs a test in f32 and bf16, on every instruction set that this machine has.
macro_rules! on_every_isa {
    ($test:ident) => {
        for backend in backends(DType::F32) {
            $test::<f32>(&backend);
        }
        for backend in backends(DType::Bf16) {
            $test::<bf16>(&backend);
        }
    };
}

fn find(name: &str) -> Case {
    case::find(name).unwrap()
}

/// Fills rows of k and v with NaN.
fn poison<T: Kind>(inputs: &mut Attention<T>, rows: impl Iterator<Item = usize>) {
    let (k, v) = (inputs.k.len(), inputs.v.len());
    let total = inputs.rows().unwrap().total();
    for row in rows {
        inputs.k[row * k / total..(row + 1) * k / total].fill(T::from_f64(f64::NAN));
        inputs.v[row * v / total..(row + 1) * v / total].fill(T::from_f64(f64::NAN));
    }
}

/// The queries `from..` of the one sequence of a case, as a chunk that continues its context.
fn chunk<T: Kind>(inputs: &Attention<T>, from: usize) -> Attention<T> {
    let (n, config) = (inputs.packing.num_tokens(), &inputs.config);
    let (q, o) = (config.num_heads() * config.head_dim_qk(), config.num_heads() * config.head_dim_v());
    let list = config.num_kv_heads() * config.select_count();
    let offsets = CuSeqlens::single(n - from).unwrap();
    Attention {
        packing: Packing::with_contexts(offsets, vec![from]).unwrap(),
        q: inputs.q[from * q..].to_vec(),
        d_o: inputs.d_o[from * o..].to_vec(),
        block_indices: inputs.block_indices.get(from * list..).unwrap_or_default().to_vec(),
        gates: None,
        ..inputs.clone()
    }
}

#[test]
fn rows_before_the_window_are_not_read() {
    on_every_isa!(before_the_window);
}

fn before_the_window<T: Kind>(backend: &Backend) {
    let case = Case { lengths: vec![130], ..find("stride-quarter") };
    let inputs: Attention<T> = attention_inputs(&case, Pattern::Win);
    for from in [30, 64, 129] {
        let clean = chunk(&inputs, from);
        let mut poisoned = clean.clone();
        poison(&mut poisoned, 0..index::window_tokens(&case.config, from).start);
        let (clean, poisoned) = (clean.forward(backend).unwrap(), poisoned.forward(backend).unwrap());
        assert_eq!((clean.o, clean.lse), (poisoned.o, poisoned.lse), "from {from}");
    }
}

#[test]
fn blocks_that_no_query_selects_are_not_read() {
    on_every_isa!(unselected_blocks);
}

fn unselected_blocks<T: Kind>(backend: &Backend) {
    let case = Case { lengths: vec![130], ..find("block-is-select-block") };
    let mut inputs: Attention<T> = attention_inputs(&case, Pattern::Slc);
    let lost = [1, 4];
    for list in inputs.block_indices.chunks_mut(case.config.select_count()) {
        let mut kept: Vec<i32> = list.iter().copied().filter(|j| !lost.contains(j)).collect();
        kept.resize(list.len(), -1);
        kept.sort_by_key(|&j| if j < 0 { i32::MAX } else { j });
        list.copy_from_slice(&kept);
    }
    let mut poisoned = inputs.clone();
    let tokens = |j: i32| index::select_tokens(&case.config, j as usize, 129);
    poison(&mut poisoned, lost.into_iter().flat_map(tokens));
    let (clean, dirty) = (inputs.forward(backend).unwrap(), poisoned.forward(backend).unwrap());
    assert_eq!((&clean.o, &clean.lse), (&dirty.o, &dirty.lse));
    let grads = poisoned.backward(backend, &dirty).unwrap();
    let expected = inputs.backward(backend, &clean).unwrap();
    assert_eq!(grads.q, expected.q);
    assert_eq!((grads.k, grads.v), (expected.k, expected.v), "rows that no query selects get a gradient of 0");
}

/// Poison in the last rows must leave the queries before them alone: the causal mask of every operation.
#[test]
fn tokens_after_a_query_are_not_read() {
    on_every_isa!(after_a_query);
}

fn after_a_query<T: Kind>(backend: &Backend) {
    for pattern in [Pattern::Cmp, Pattern::Slc, Pattern::Win, Pattern::Dense] {
        let case = Case { lengths: vec![130], ..find("no-initial") };
        let inputs: Attention<T> = attention_inputs(&case, pattern);
        let total = inputs.rows().unwrap().total();
        let first = total - total / 4;
        // The first query that sees row `first`.
        let sees = match pattern {
            Pattern::Cmp => first * case.config.compress_stride() + case.config.compress_block() - 1,
            Pattern::Slc | Pattern::Win | Pattern::Dense => first,
        };
        let mut poisoned = inputs.clone();
        poison(&mut poisoned, first..total);
        let (clean, dirty) = (inputs.forward(backend).unwrap(), poisoned.forward(backend).unwrap());
        let width = case.config.num_heads() * case.config.head_dim_v();
        assert_eq!(clean.o[..sees * width], dirty.o[..sees * width], "{pattern:?}");
        let last = &dirty.o[dirty.o.len() - width..];
        assert!(pattern == Pattern::Slc || last.iter().all(|x| x.to_f64().is_nan()), "{pattern:?}: the poison works");
    }
}

/// The tokens behind a sequence's last whole block belong to no block.
#[test]
fn tokens_in_no_block_are_not_compressed() {
    for name in ["ragged", "63-group-1", "stride-whole", "odd-sizes", "given-scale"] {
        let case = find(name);
        for side in [generate::Side::Key, generate::Side::Value] {
            let clean: Compress<f32> = check::compress_inputs(&case, side);
            let mut poisoned = clean.clone();
            let width = case.config.num_kv_heads() * side.dim(&case.config);
            for seq in clean.packing.seqs() {
                let blocks = index::num_blocks(&case.config, seq.rows.len());
                let used = blocks.checked_sub(1).map_or(0, |last| index::block_tokens(&case.config, last).end);
                poisoned.x[(seq.rows.start + used) * width..seq.rows.end * width].fill(f32::NAN);
            }
            assert_eq!(clean.forward(&backend()).unwrap(), poisoned.forward(&backend()).unwrap(), "{name}");
            let shape = [case.blocks(), case.config.num_kv_heads(), side.dim(&case.config)];
            let d_blocks: Vec<f32> = generate::tensor(&case, "d_blocks", &shape, 1.0);
            let grads = [&clean, &poisoned].map(|inputs| inputs.backward(&backend(), &d_blocks).unwrap());
            assert_eq!(grads[0].weights, grads[1].weights, "{name}");
            assert_eq!(grads[0].x, grads[1].x, "{name}: such tokens get a gradient of 0");
        }
    }
}
