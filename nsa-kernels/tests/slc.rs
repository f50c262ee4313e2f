//! Attention over selected blocks against the reference.

mod case;

use case::{Branch, Call, Grads, Saved, backend, tensor, tensor_mut};
use nsa_kernels::{Element, Result, Rows, TensorMut, op::slc};
use nsa_ref::branch::{Gradients, Output, Upstream};

struct Slc;

impl Branch for Slc {
    const GATE: Option<usize> = Some(1);
    const LISTS: bool = true;

    fn forward<T: Element>(
        call: &Call<T>,
        [k, v]: [Rows<'_, T>; 2],
        o: TensorMut<'_, T, 3>,
        lse: TensorMut<'_, T::Acc, 2>,
    ) -> Result<()> {
        let args = slc::Forward {
            config: &call.config,
            packing: &call.packing,
            q: tensor(&call.q, call.shapes().q),
            k,
            v,
            block_indices: tensor(&call.lists, call.shapes().lists),
            o,
            lse,
        };
        slc::forward(&backend(), args)
    }

    fn backward<T: Element>(call: &Call<T>, saved: &Saved<T>, grads: &mut Grads<T::Acc>) -> Result<()> {
        let shapes = call.shapes();
        let args = slc::Backward {
            config: &call.config,
            packing: &call.packing,
            q: tensor(&call.q, shapes.q),
            k: tensor(&call.k, shapes.k),
            v: tensor(&call.v, shapes.v),
            block_indices: tensor(&call.lists, call.shapes().lists),
            o: tensor(&saved.o, shapes.o),
            lse: tensor(&saved.lse, shapes.lse),
            d_o: tensor(&saved.d_o, shapes.o),
            gates: saved.gates.as_ref().map(|gates| tensor(gates, shapes.gates)),
            d_gates: None,
            dq: tensor_mut(&mut grads.dq, shapes.q),
            accumulate: true,
            dk: tensor_mut(&mut grads.dk, shapes.k),
            dv: tensor_mut(&mut grads.dv, shapes.v),
        };
        slc::backward(&backend(), args)
    }

    fn truth(call: &Call<f64>) -> Output {
        call.with_truth(|exact, inputs, lists| {
            nsa_ref::slc::forward(exact, &call.config, &call.packing, inputs, lists).expect("a legal call")
        })
    }

    fn truth_grads(call: &Call<f64>, upstream: &Upstream<'_>) -> Gradients {
        call.with_truth(|exact, inputs, lists| {
            nsa_ref::slc::backward(exact, &call.config, &call.packing, inputs, lists, upstream).expect("a legal call")
        })
    }
}

branch_tests!(Slc);

#[test]
fn bad_block_lists_are_refused() {
    // Two KV heads, lists of 4; row 69 has position 49 and with it candidates 0 to 3.
    let config = case::config(4, 2, 16, 16);
    let call = Call::<f32>::new::<Slc>(&config, case::packing(&[20, 50], &[0, 0]));
    let saved = call.saved::<Slc>(false);
    let cases = [
        ([0, 1, 3, 4], "4 at [69, 1, 3], of the query at position 49: blocks must be candidates"),
        ([0, 2, 2, 3], "2 at [69, 1, 2], of the query at position 49: blocks must ascend"),
        ([2, 1, -1, -1], "1 at [69, 1, 1], of the query at position 49: blocks must ascend"),
        ([0, -1, 3, -1], "3 at [69, 1, 2], of the query at position 49: behind -1"),
        ([-2, -1, -1, -1], "-2 at [69, 1, 0], of the query at position 49: blocks must be candidates"),
    ];
    for (list, expected) in cases {
        let mut bad = call.clone();
        bad.lists[(69 * 2 + 1) * 4..][..4].copy_from_slice(&list);
        for message in [
            bad.forward::<Slc>().expect_err("a bad list").to_string(),
            bad.backward::<Slc>(&saved, 0.0).err().expect("a bad list").to_string(),
        ] {
            assert!(message.contains("`block_indices`") && message.contains(expected), "{message}");
        }
    }
}

#[test]
fn all_blocks_selected_is_full_attention() {
    let config = case::config(4, 2, 16, 16);
    let mut call = Call::<f32>::new::<Slc>(&config, case::packing(&[64], &[0]));
    let all = |t: i32| (0..4).map(move |j| if j <= t / 16 { j } else { -1 });
    call.lists = (0..64).flat_map(|t| all(t).chain(all(t))).collect();
    let (o, _) = call.forward::<Slc>().expect("a legal call");
    let dense = call.exact().with_truth(|exact, inputs, _| {
        nsa_ref::dense::forward(exact, &call.config, &call.packing, inputs).expect("a legal call")
    });
    case::compare("o", &o, &dense.o);
}
