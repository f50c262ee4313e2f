//! Compressed attention and selection against the reference.

mod case;

use case::{Branch, Call, Grads, Saved, backend, tensor, tensor_mut};
use nsa_core::{CuSeqlens, NsaConfig, Packing};
use nsa_kernels::{Element, Result, Rows, TensorMut, op::cmp};
use nsa_ref::branch::{Gradients, Output, Upstream};

struct Cmp;

impl Branch for Cmp {
    const GATE: Option<usize> = Some(0);

    fn rows(config: &NsaConfig, packing: &Packing) -> CuSeqlens {
        packing.cu_blocks(config).expect("short sequences")
    }

    fn forward<T: Element>(
        call: &Call<T>,
        [k, v]: [Rows<'_, T>; 2],
        o: TensorMut<'_, T, 3>,
        lse: TensorMut<'_, T::Acc, 2>,
    ) -> Result<()> {
        let args = cmp::Forward {
            config: &call.config,
            packing: &call.packing,
            q: tensor(&call.q, call.shapes().q),
            k_blocks: k,
            v_blocks: v,
            o,
            lse,
            block_indices: None,
        };
        cmp::forward(&backend(), args)
    }

    fn backward<T: Element>(call: &Call<T>, saved: &Saved<T>, grads: &mut Grads<T::Acc>) -> Result<()> {
        let shapes = call.shapes();
        let args = cmp::Backward {
            config: &call.config,
            packing: &call.packing,
            q: tensor(&call.q, shapes.q),
            k_blocks: tensor(&call.k, shapes.k),
            v_blocks: tensor(&call.v, shapes.v),
            o: tensor(&saved.o, shapes.o),
            lse: tensor(&saved.lse, shapes.lse),
            d_o: tensor(&saved.d_o, shapes.o),
            gates: saved.gates.as_ref().map(|gates| tensor(gates, shapes.gates)),
            d_gates: None,
            dq: tensor_mut(&mut grads.dq, shapes.q),
            accumulate: true,
            dk_blocks: tensor_mut(&mut grads.dk, shapes.k),
            dv_blocks: tensor_mut(&mut grads.dv, shapes.v),
        };
        cmp::backward(&backend(), args)
    }

    fn truth(call: &Call<f64>) -> Output {
        call.with_truth(|exact, inputs, _| {
            nsa_ref::cmp::forward(exact, &call.config, &call.packing, inputs).expect("a legal call").output
        })
    }

    fn truth_grads(call: &Call<f64>, upstream: &Upstream<'_>) -> Gradients {
        call.with_truth(|exact, inputs, _| {
            nsa_ref::cmp::backward(exact, &call.config, &call.packing, inputs, upstream).expect("a legal call")
        })
    }
}

branch_tests!(Cmp);

/// Forward with selection: output, lse and block lists.
fn select<T: Element>(call: &Call<T>) -> (Vec<T>, Vec<i32>) {
    let shapes = call.shapes();
    let mut o = vec![T::default(); shapes.o.iter().product()];
    let mut lse = vec![T::Acc::default(); shapes.lse.iter().product()];
    let mut lists = vec![-7; shapes.lists.iter().product()];
    let args = cmp::Forward {
        config: &call.config,
        packing: &call.packing,
        q: tensor(&call.q, shapes.q),
        k_blocks: Rows::packed(tensor(&call.k, shapes.k), &call.offsets),
        v_blocks: Rows::packed(tensor(&call.v, shapes.v), &call.offsets),
        o: tensor_mut(&mut o, shapes.o),
        lse: tensor_mut(&mut lse, shapes.lse),
        block_indices: Some(tensor_mut(&mut lists, shapes.lists)),
    };
    cmp::forward(&backend(), args).expect("a legal call");
    (o, lists)
}

/// The reference's lists; another block may stand in for one whose score is equal up to rounding.
fn check_selection<T: Element>(config: &NsaConfig, lengths: &[usize], contexts: &[usize], rounding: f64) {
    let call = Call::<T>::new::<Cmp>(config, case::packing(lengths, contexts));
    let (o, lists) = select(&call);
    assert_eq!(o, call.forward::<Cmp>().expect("a legal call").0, "selecting changes no output");
    let exact = call.exact();
    let truth = exact.with_truth(|exact, inputs, _| {
        nsa_ref::cmp::forward(exact, &call.config, &call.packing, inputs).expect("a legal call")
    });
    let expected = truth.block_indices.data.chunks_exact(config.select_count());
    for ((list, expected), scores) in lists.chunks_exact(config.select_count()).zip(expected).zip(&truth.scores) {
        let count = |list: &[i32]| list.iter().filter(|&&j| j >= 0).count();
        assert_eq!(count(list), count(expected), "{list:?}, expected {expected:?}");
        assert!(list.windows(2).all(|pair| pair[0] < pair[1] || pair[1] == -1), "{list:?}");
        let only = |a: &[i32], b: &[i32]| -> Vec<f64> {
            a.iter().filter(|j| !b.contains(j)).map(|&j| scores[j as usize]).collect()
        };
        let worst = only(expected, list).into_iter().fold(0.0, f64::max);
        for score in only(list, expected) {
            assert!((score - worst).abs() <= rounding, "{list:?}, expected {expected:?}, scores {scores:?}");
        }
    }
}

#[test]
fn selection_equals_the_reference() {
    for config in case::configs() {
        check_selection::<f32>(&config, &[1, 0, 7, 211, 64], &[0; 5], 1e-5);
        check_selection::<f64>(&config, &[3, 70], &[130, 61], 0.0);
    }
    check_selection::<half::bf16>(&case::config(4, 2, 16, 16), &[300], &[0], 1e-5);
}

#[test]
fn equal_scores_go_to_the_lower_block() {
    // Equal keys everywhere: all scores inside are equal, the free places go to blocks 1, 2, … .
    let config = case::config(4, 2, 16, 16);
    let mut call = Call::<f32>::new::<Cmp>(&config, case::packing(&[200], &[0]));
    let key = call.k[..32].to_vec();
    call.k.chunks_exact_mut(32).for_each(|row| row.copy_from_slice(&key));
    let lists = select(&call).1;
    assert_eq!(lists[199 * 8..199 * 8 + 4], [0, 1, 11, 12]);
    assert_eq!(lists[8 * 20..8 * 20 + 4], [0, 1, -1, -1]);
}
