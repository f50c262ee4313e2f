//! The same bits from run to run, on any number of threads and in any order of the batch.

use nsa_kernels::Backend;
use nsa_tests::case;
use nsa_tests::decode;
use nsa_tests::operator::{self, Branches, Compressed, Grads, Inputs, Outputs};

/// Cases with more than one task to share.
const CASES: [&str; 4] = ["ragged", "odd-sizes", "111-group-7", "1025"];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn side(branches: &Branches<f32>) -> Vec<u32> {
    let mut all = [bits(&branches.slc), bits(&branches.win)].concat();
    match &branches.cmp {
        Compressed::Blocks(blocks) => all.extend(bits(blocks)),
        Compressed::Tokens { x, position, phi } => {
            all.extend(bits(x));
            all.extend(position.iter().flat_map(|e| bits(e)));
            // Printed: shortest digits that give the same bits back.
            all.extend(format!("{phi:?}").bytes().map(u32::from));
        }
    }
    all
}

fn everything(outputs: &Outputs<f32, f32>) -> Vec<u32> {
    let mut all = bits(&outputs.o);
    outputs.branches.iter().chain(&outputs.lse).chain(&outputs.blocks).for_each(|x| all.extend(bits(x)));
    all.extend(outputs.block_indices.iter().map(|&j| j as u32));
    if let Some(Grads { q, k, v, gates }) = &outputs.grads {
        all.extend([bits(q), bits(gates), side(k), side(v)].concat());
    }
    all
}

fn run(inputs: &Inputs<f32>, threads: usize) -> Vec<u32> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (backend, _) = Backend::pick(None).unwrap();
    pool.install(|| everything(&operator::run(&backend, inputs).unwrap()))
}

#[test]
fn runs_and_numbers_of_threads_change_no_bit() {
    for name in CASES {
        let inputs = Inputs::<f32>::generate(&case::find(name).unwrap());
        let first = run(&inputs, 1);
        for threads in [1, 2, 3, 7] {
            assert!(first == run(&inputs, threads), "{name} on {threads} threads");
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
