//! The logistic function.

use super::launch_elementwise;
use crate::Result;
use crate::cuda::Cuda;
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Stored, params};
use crate::layer::sigmoid::{Backward, Forward};
use nsa_core::Element;

params! {
    /// Arguments of `sigmoid_forward`.
    struct SigmoidForward {
        /// `[count]`.
        x: In<Stored>,
        /// `[count]`.
        y: Out<Stored>,
        /// N·F.
        count: i64,
    }

    /// Arguments of `sigmoid_backward`.
    struct SigmoidBackward {
        /// `[count]`.
        y: In<Stored>,
        /// `[count]`.
        dy: In<f32>,
        /// `[count]`.
        dx: Out<f32>,
        /// N·F.
        count: i64,
    }
}

pub(crate) fn forward<T: Element>(cuda: &Cuda, op: &'static str, args: Forward<'_, T>) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?;
    let Forward { x, mut y } = args;
    let count = x.shape().iter().product::<usize>();
    let params = SigmoidForward { x: call.input("x", &x)?, y: call.output("y", &mut y)?, count: count as i64 };
    let addresses = [params.x.0, params.y.0];
    launch_elementwise(call, "sigmoid_forward", (count, size_of::<T>()), &addresses, params)
}

pub(crate) fn backward<T: Element>(cuda: &Cuda, op: &'static str, args: Backward<'_, T>) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?;
    let Backward { y, dy, mut dx } = args;
    let count = y.shape().iter().product::<usize>();
    let params = SigmoidBackward {
        y: call.input("y", &y)?,
        dy: call.input("dy", &dy)?,
        dx: call.output("dx", &mut dx)?,
        count: count as i64,
    };
    let addresses = [params.y.0, params.dy.0, params.dx.0];
    launch_elementwise(call, "sigmoid_backward", (count, size_of::<T>()), &addresses, params)
}
