//! The same bits from run to run, on any number of threads and in any order of the batch.

use half::bf16;
use nsa_core::{CompressKind, Element, NsaConfig};
use nsa_kernels::Backend;
use nsa_tests::case;
use nsa_tests::decode;
use nsa_tests::operator::{self, Branches, Compressed, Grads, Inputs, Outputs};
use nsa_tests::{Case, Kind};

/// Cases with more than one task to share.
const CASES: [&str; 4] = ["ragged", "odd-sizes", "111-group-7", "1025"];

/// Widening is exact, so equal bits of the wide values are equal bits.
fn bits<T: Element>(values: &[T]) -> Vec<u64> {
    values.iter().map(|x| x.to_f64().to_bits()).collect()
}

fn side<A: Element>(branches: &Branches<A>) -> Vec<u64> {
    let mut all = [bits(&branches.slc), bits(&branches.win)].concat();
    match &branches.cmp {
        Compressed::Blocks(blocks) => all.extend(bits(blocks)),
        Compressed::Tokens { x, position, phi } => {
            all.extend(bits(x));
            all.extend(position.iter().flat_map(|e| bits(e)));
            // Printed: shortest digits that give the same bits back.
            all.extend(format!("{phi:?}").bytes().map(u64::from));
        }
    }
    all
}

fn everything<T: Element>(outputs: &Outputs<T, T::Acc>) -> Vec<u64> {
    let mut all = bits(&outputs.o);
    outputs.branches.iter().chain(&outputs.blocks).for_each(|x| all.extend(bits(x)));
    outputs.lse.iter().for_each(|x| all.extend(bits(x)));
    all.extend(outputs.block_indices.iter().map(|&j| j as u64));
    if let Some(Grads { q, k, v, gates }) = &outputs.grads {
        all.extend([bits(q), bits(gates), side(k), side(v)].concat());
    }
    all
}

fn run<T: Kind>(inputs: &Inputs<T>, threads: usize) -> Vec<u64> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (backend, _) = Backend::pick(None).unwrap();
    pool.install(|| everything(&operator::run(&backend, inputs).unwrap()))
}

#[test]
fn runs_and_numbers_of_threads_change_no_bit() {
    threads_change_no_bit::<f32>();
    threads_change_no_bit::<bf16>();
}

fn threads_change_no_bit<T: Kind>() {
    for name in CASES {
        let inputs = Inputs::<T>::generate(&case::find(name).unwrap());
        let first = run(&inputs, 1);
        for threads in [1, 2, 3, 7] {
            assert!(first == run(&inputs, threads), "{name} on {threads} threads");
        }
    }
}

/// A sequence of several tiles of blocks, alone and beside a long one.
#[test]
fn other_sequences_change_no_bit() {
    other_sequences_change_no_bit_of::<f32>();
    other_sequences_change_no_bit_of::<bf16>();
}

fn other_sequences_change_no_bit_of<T: Kind>() {
    let builder = NsaConfig::builder(1, 1, 16, 16).compress_kind(CompressKind::Mean);
    let builder = builder.compress_block(1).compress_stride(1).select_block(16).select_count(4).window(32);
    let case = Case::new("beside-a-long-one", builder, [200, 4096]);
    for backend in nsa_tests::backends(T::DTYPE) {
        let whole = Inputs::<T> { d_o: None, ..Inputs::generate(&case) };
        let blocks = operator::blocks(&backend, &whole).unwrap();
        let run = |chunks: &[(usize, usize, usize)]| {
            operator::run(&backend, &decode::take(&whole, &blocks, chunks).unwrap()).unwrap()
        };
        let (alone, beside) = (run(&[(0, 0, 200)]), run(&[(0, 0, 200), (1, 0, 4096)]));
        for (alone, beside) in alone.branches.iter().zip(&beside.branches).chain([(&alone.o, &beside.o)]) {
            assert!(bits(alone) == bits(&beside[..alone.len()]), "{} on {}", T::DTYPE, backend.name());
        }
    }
}

#[test]
fn the_order_of_a_batch_changes_no_bit() {
    let case = case::find("ragged").unwrap();
    let (backend, _) = Backend::pick(None).unwrap();
    let whole = Inputs::<f32> { d_o: None, ..Inputs::generate(&case) };
    let blocks = operator::blocks(&backend, &whole).unwrap();
    let run = |order: &[usize]| {
        let chunks: Vec<_> = order.iter().map(|&s| (s, 0, case.lengths[s])).collect();
        operator::run(&backend, &decode::take(&whole, &blocks, &chunks).unwrap()).unwrap().o
    };
    let order: Vec<usize> = (0..case.lengths.len()).collect();
    let reversed: Vec<usize> = order.iter().rev().copied().collect();
    let (forwards, backwards) = (run(&order), run(&reversed));
    let width = case.config.num_heads() * case.config.head_dim_v();
    let mut end = backwards.len();
    for s in order {
        let (start, length) = (whole.packing.seq(s).rows.start * width, case.lengths[s] * width);
        assert_eq!(bits(&forwards[start..start + length]), bits(&backwards[end - length..end]), "sequence {s}");
        end -= length;
    }
}
