//! Sliding-window attention against the reference.

mod case;

use case::{Branch, Call, Grads, Saved, backend, tensor, tensor_mut};
use nsa_core::CuSeqlens;
use nsa_kernels::{Element, Result, Rows, TensorMut, op::win};
use nsa_ref::branch::{Gradients, Output, Upstream};

struct Win;

impl Branch for Win {
    const GATE: Option<usize> = Some(2);

    fn forward<T: Element>(
        call: &Call<T>,
        [k, v]: [Rows<'_, T>; 2],
        o: TensorMut<'_, T, 3>,
        lse: TensorMut<'_, T::Acc, 2>,
    ) -> Result<()> {
        let args = win::Forward {
            config: &call.config,
            packing: &call.packing,
            q: tensor(&call.q, call.shapes().q),
            k,
            v,
            o,
            lse,
        };
        win::forward(&backend(), args)
    }

    fn backward<T: Element>(call: &Call<T>, saved: &Saved<T>, grads: &mut Grads<T::Acc>) -> Result<()> {
        let shapes = call.shapes();
        let args = win::Backward {
            config: &call.config,
            packing: &call.packing,
            q: tensor(&call.q, shapes.q),
            k: tensor(&call.k, shapes.k),
            v: tensor(&call.v, shapes.v),
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
        win::backward(&backend(), args)
    }

    fn truth(call: &Call<f64>) -> Output {
        call.with_truth(|exact, inputs, _| {
            nsa_ref::win::forward(exact, &call.config, &call.packing, inputs).expect("a legal call")
        })
    }

    fn truth_grads(call: &Call<f64>, upstream: &Upstream<'_>) -> Gradients {
        call.with_truth(|exact, inputs, _| {
            nsa_ref::win::backward(exact, &call.config, &call.packing, inputs, upstream).expect("a legal call")
        })
    }
}

branch_tests!(Win);

#[test]
fn rows_before_the_window_may_be_missing() {
    for config in case::configs() {
        let call = Call::<f32>::new::<Win>(&config, case::packing(&[30, 5, 0, 1], &[150, 3, 70, 40]));
        let whole = call.forward::<Win>().expect("a legal call");
        let kept = |s: usize, spare: usize| {
            let seq = call.packing.seq(s);
            seq.rows.len() + (config.window() - 1 + spare).min(seq.context)
        };
        for spare in [0, 4] {
            let mut short = call.clone();
            short.offsets = CuSeqlens::from_lengths((0..4).map(|s| kept(s, spare))).expect("short sequences");
            let tail = |data: &[f32]| -> Vec<f32> {
                let row = data.len() / call.offsets.total();
                let part =
                    |s| &data[(call.offsets.range(s).end - kept(s, spare)) * row..call.offsets.range(s).end * row];
                (0..4).flat_map(part).copied().collect()
            };
            (short.k, short.v) = (tail(&call.k), tail(&call.v));
            assert_eq!(short.forward::<Win>().expect("a legal call"), whole);
        }
        let mut short = call.clone();
        short.offsets = CuSeqlens::from_lengths([kept(0, 0) - 1, 8, 70, 41]).expect("short sequences");
        let message = short.forward::<Win>().expect_err("a row too few").to_string();
        assert!(message.contains("k of sequence 0"), "{message}");
    }
}
