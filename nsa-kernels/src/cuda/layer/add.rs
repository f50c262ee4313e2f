//! Sums of tensors.

use super::launch_elementwise;
use crate::Result;
use crate::cuda::Cuda;
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Stored, params};
use crate::layer::add::{Accumulate, Forward};
use nsa_core::Element;

params! {
    /// Arguments of `add_forward`; `y` may be `a` or `b`.
    struct Add {
        /// `[count]`.
        a: In<Stored>,
        /// `[count]`.
        b: In<Stored>,
        /// `[count]`.
        y: Out<Stored>,
        /// N·C.
        count: i64,
    }
}

pub(crate) fn forward<T: Element>(cuda: &Cuda, op: &'static str, args: Forward<'_, T>) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?;
    let Forward { a, b, mut y } = args;
    let count = y.shape().iter().product::<usize>();
    let y = call.output("y", &mut y)?;
    launch::<T>(call, |call| Ok(Add { a: call.input("a", &a)?, b: call.input("b", &b)?, y, count: count as i64 }))
}

pub(crate) fn accumulate<T: Element>(cuda: &Cuda, op: &'static str, args: Accumulate<'_, T>) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?;
    let Accumulate { x, mut y } = args;
    let count = y.shape().iter().product::<usize>();
    let y: Out<Stored> = call.output("y", &mut y)?;
    launch::<T>(call, |call| Ok(Add { a: y.to_input(), b: call.input("x", &x)?, y, count: count as i64 }))
}

fn launch<T: Element>(call: Call<'_>, params: impl FnOnce(&Call<'_>) -> Result<Add>) -> Result<()> {
    let params = params(&call)?;
    let addresses = [params.a.0, params.b.0, params.y.0];
    launch_elementwise(call, "add_forward", (params.count as usize, size_of::<T>()), &addresses, params)
}
