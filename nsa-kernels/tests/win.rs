//! Sliding-window attention against the reference.

mod case;

use case::{Branch, Call, Grads, Saved, backend, tensor, tensor_mut};
use nsa_core::Element;
use nsa_kernels::{Result, TensorMut, op::win};
use nsa_ref::branch::{Gradients, Output, Upstream};

struct Win;

impl Branch for Win {
    const GATE: Option<usize> = Some(2);

    fn forward<T: Element>(call: &Call<T>, o: TensorMut<'_, T, 3>, lse: TensorMut<'_, T::Acc, 2>) -> Result<()> {
        let args = win::Forward {
            config: &call.config,
            packing: &call.packing,
            q: tensor(&call.q, call.shapes().q),
            k: call.keys(),
            v: call.values(),
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
            dq: tensor_mut(&mut grads.dq, shapes.q),
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
