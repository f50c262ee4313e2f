//! Copies in another type.

use super::launch_elementwise;
use crate::Result;
use crate::cuda::Cuda;
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Stored, Weight, params};
use crate::layer::round::{Round as Args, Widen};
use nsa_core::{DType, Element};

params! {
    /// Arguments of `round_forward`, which changes the type of elements.
    struct Round {
        /// `[count]`.
        x: In<Weight>,
        /// `[count]`.
        y: Out<Stored>,
        /// Number of elements.
        count: i64,
    }
}

pub(crate) fn round<T: Element>(cuda: &Cuda, op: &'static str, args: Args<'_, T>) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?.with_type::<T::Acc, Weight>()?;
    let Args { x, mut y } = args;
    let [count] = x.shape();
    let (x, y) = (call.input("x", &x)?, call.output("y", &mut y)?);
    convert(call, [T::Acc::DTYPE, T::DTYPE], x, y, count)
}

pub(crate) fn widen<T: Element>(cuda: &Cuda, op: &'static str, args: Widen<'_, T>) -> Result<()> {
    let call = Call::new::<T::Acc>(cuda, op)?.with_type::<T, Weight>()?;
    let Widen { x, mut y } = args;
    let [count] = x.shape();
    let (x, y) = (call.input("x", &x)?, call.output("y", &mut y)?);
    convert(call, [T::DTYPE, T::Acc::DTYPE], x, y, count)
}

/// Changes the type of `count` elements: from the `Weight` of the call to its `Element`.
pub(super) fn convert(
    call: Call<'_>,
    [from, to]: [DType; 2],
    x: In<Weight>,
    y: Out<Stored>,
    count: usize,
) -> Result<()> {
    let size = from.size_bytes().min(to.size_bytes());
    let params = Round { x, y, count: count as i64 };
    launch_elementwise(call, "round_forward", (count, size), &[x.0, y.0], params)
}
