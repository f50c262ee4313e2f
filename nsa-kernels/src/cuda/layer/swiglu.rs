//! The gated activation of the MLP.

use super::launch_elementwise;
use crate::Result;
use crate::cuda::Cuda;
use crate::cuda::launch::Call;
use crate::cuda::params::{Grad, In, Out, Stored, params};
use crate::layer::swiglu::{Backward, Forward};
use nsa_core::Element;

params! {
    /// Arguments of `swiglu_forward`.
    struct SwigluForward {
        /// `[count]`.
        gate: In<Stored>,
        /// `[count]`.
        up: In<Stored>,
        /// `[count]`.
        y: Out<Stored>,
        /// N·F.
        count: i64,
    }

    /// Arguments of `swiglu_backward`.
    struct SwigluBackward {
        /// `[count]`.
        gate: In<Stored>,
        /// `[count]`.
        up: In<Stored>,
        /// `[count]`.
        dy: In<f32>,
        /// `[count]`.
        d_gate: Out<Grad>,
        /// `[count]`.
        d_up: Out<Grad>,
        /// N·F.
        count: i64,
    }
}

pub(crate) fn forward<T: Element>(cuda: &Cuda, op: &'static str, args: Forward<'_, T>) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?;
    let Forward { gate, up, mut y } = args;
    let count = gate.shape().iter().product::<usize>();
    let params = SwigluForward {
        gate: call.input("gate", &gate)?,
        up: call.input("up", &up)?,
        y: call.output("y", &mut y)?,
        count: count as i64,
    };
    let addresses = [params.gate.0, params.up.0, params.y.0];
    launch_elementwise(call, "swiglu_forward", (count, size_of::<T>()), &addresses, params)
}

pub(crate) fn backward<T, G>(cuda: &Cuda, op: &'static str, args: Backward<'_, T, G>) -> Result<()>
where
    T: Element,
    G: Element<Acc = T::Acc>,
{
    let call = Call::new::<T>(cuda, op)?.with_type::<G, Grad>()?;
    let Backward { gate, up, dy, mut d_gate, mut d_up } = args;
    let count = gate.shape().iter().product::<usize>();
    let params = SwigluBackward {
        gate: call.input("gate", &gate)?,
        up: call.input("up", &up)?,
        dy: call.input("dy", &dy)?,
        d_gate: call.output("d_gate", &mut d_gate)?,
        d_up: call.output("d_up", &mut d_up)?,
        count: count as i64,
    };
    let addresses = [params.gate.0, params.up.0, params.dy.0, params.d_gate.0, params.d_up.0];
    let size = size_of::<T>().min(size_of::<G>());
    launch_elementwise(call, "swiglu_backward", (count, size), &addresses, params)
}
