//! Full attention against the reference.

mod case;

use case::{Branch, Call, Grads, Saved, backend, tensor, tensor_mut};
use nsa_kernels::{Element, Result, Rows, TensorMut, op::dense};
use nsa_ref::branch::{Gradients, Output, Upstream};

struct Dense;

impl Branch for Dense {
    const GATE: Option<usize> = None;

    fn forward<T: Element>(
        call: &Call<T>,
        [k, v]: [Rows<'_, T>; 2],
        o: TensorMut<'_, T, 3>,
        lse: TensorMut<'_, T::Acc, 2>,
    ) -> Result<()> {
        let args = dense::Forward {
            config: &call.config,
            packing: &call.packing,
            q: tensor(&call.q, call.shapes().q),
            k,
            v,
            o,
            lse,
        };
        dense::forward(&backend(), args)
    }

    fn backward<T: Element>(call: &Call<T>, saved: &Saved<T>, grads: &mut Grads<T::Acc>) -> Result<()> {
        let shapes = call.shapes();
        let args = dense::Backward {
            config: &call.config,
            packing: &call.packing,
            q: tensor(&call.q, shapes.q),
            k: tensor(&call.k, shapes.k),
            v: tensor(&call.v, shapes.v),
            o: tensor(&saved.o, shapes.o),
            lse: tensor(&saved.lse, shapes.lse),
            d_o: tensor(&saved.d_o, shapes.o),
            dq: tensor_mut(&mut grads.dq, shapes.q),
            accumulate: true,
            dk: tensor_mut(&mut grads.dk, shapes.k),
            dv: tensor_mut(&mut grads.dv, shapes.v),
        };
        dense::backward(&backend(), args)
    }

    fn truth(call: &Call<f64>) -> Output {
        call.with_truth(|exact, inputs, _| {
            nsa_ref::dense::forward(exact, &call.config, &call.packing, inputs).expect("a legal call")
        })
    }

    fn truth_grads(call: &Call<f64>, upstream: &Upstream<'_>) -> Gradients {
        call.with_truth(|exact, inputs, _| {
            nsa_ref::dense::backward(exact, &call.config, &call.packing, inputs, upstream).expect("a legal call")
        })
    }
}

branch_tests!(Dense);
