//! The linear layer, by cuBLAS.

use super::matmul::{Bias, add_outer, matrix, matrix_mut, times, times_transposed};
use crate::Result;
use crate::cuda::Cuda;
use crate::cuda::launch::Call;
use crate::cuda::params::{Grad, Weight};
use crate::cuda::reduce::add_column_sums;
use crate::layer::linear::{BackwardInput, BackwardWeight, Forward};
use nsa_core::Element;

pub(crate) fn forward<T, W>(cuda: &Cuda, op: &'static str, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let call = Call::new::<T>(cuda, op)?.with_type::<W, Weight>()?;
    let Forward { x, weight, bias, mut y, accumulate } = args;
    let bias = bias.map(|bias| Ok::<_, crate::Error>(Bias { address: call.address("bias", &bias)?, dtype: W::DTYPE }));
    let (bias, y) = (bias.transpose()?, matrix_mut(&call, "y", &mut y)?);
    times_transposed(&call, [matrix(&call, "x", &x)?, matrix(&call, "weight", &weight)?, y], bias, accumulate)
}

pub(crate) fn backward_input<W, G, D>(cuda: &Cuda, op: &'static str, args: BackwardInput<'_, W, G, D>) -> Result<()>
where
    W: Element,
    G: Element<Acc = W::Acc>,
    D: Element<Acc = W::Acc>,
{
    let call = Call::new::<D>(cuda, op)?.with_type::<W, Weight>()?.with_type::<G, Grad>()?;
    let BackwardInput { dy, weight, mut dx, accumulate } = args;
    let dx = matrix_mut(&call, "dx", &mut dx)?;
    times(&call, [matrix(&call, "dy", &dy)?, matrix(&call, "weight", &weight)?, dx], accumulate)
}

pub(crate) fn backward_weight<T, G>(cuda: &Cuda, op: &'static str, args: BackwardWeight<'_, T, G>) -> Result<()>
where
    T: Element,
    G: Element<Acc = T::Acc>,
{
    // `Element` is what is summed over rows for the bias: the gradient.
    let call = Call::new::<G>(cuda, op)?.with_type::<T, Weight>()?;
    let BackwardWeight { x, dy, mut dw, db } = args;
    let dw = matrix_mut(&call, "dw", &mut dw)?;
    add_outer(&call, [matrix(&call, "dy", &dy)?, matrix(&call, "x", &x)?, dw])?;
    match db {
        None => Ok(()),
        Some(mut db) => add_column_sums(&call, call.input("dy", &dy)?, dy.shape(), call.output("db", &mut db)?),
    }
}
