//! The linear layer: by cuBLAS, and for few rows by a kernel that reads the weight once, in its own type.

use super::matmul::{Bias, add_outer, matrix, matrix_mut, times, times_transposed};
use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::geometry::{Geometry, vector};
use crate::cuda::launch::Call;
use crate::cuda::params::{Array, Grad, In, Out, Params, Stored, Weight, params};
use crate::cuda::program::{Constants, Program};
use crate::cuda::reduce::add_column_sums;
use crate::layer::linear::{BackwardInput, BackwardWeight, Forward, Product};
use crate::{Result, Tensor};
use nsa_core::{DType, Element};
use std::marker::PhantomData;

/// The kernel.
pub(crate) static PROGRAM: Program = Program {
    file: "linear.cu",
    text: include_str!("../kernels/linear.cu"),
    params: &[LinearProduct::declaration, LinearFewRows::declaration],
};

/// Threads of a block.
const THREADS: u32 = 256;
/// Warps of a block.
const WARPS: usize = THREADS as usize / 32;
/// Rows that count as few: with more, products are worth a copy of the weight in another type.
const FEW_ROWS: usize = 16;
/// Rows that share a read of the weight, at most.
const SHARED_ROWS: usize = 8;
/// Outputs of a warp, at most.
const OUTPUTS: usize = 2;
/// Products of a launch, at most.
const PRODUCTS: usize = 8;

params! {
    /// One of the products of `linear_few_rows`.
    struct LinearProduct {
        /// `[outputs, inputs]`.
        weight: In<Weight>,
        /// `[outputs]`, or none.
        bias: In<Weight>,
        /// `[rows, outputs]`.
        y: Out<Stored>,
        outputs: i64,
        /// Blocks along x before the next product's.
        end: i64,
    }

    /// Arguments of `linear_few_rows`.
    struct LinearFewRows {
        /// `[rows, inputs]`.
        x: In<Stored>,
        rows: i64,
        inputs: i64,
        products: Array<LinearProduct, PRODUCTS>,
    }
}

/// What few rows run: `SHARED_ROWS` or more of them.
pub(super) fn build(given: Constants, width: usize) -> Build {
    Build::new(&PROGRAM, constants(given, [SHARED_ROWS, OUTPUTS, width], true), &[("linear_few_rows", THREADS)])
}

fn constants(given: Constants, [rows, outputs, width]: [usize; 3], accumulate: bool) -> Constants {
    given.with("ROWS", rows).with("OUTPUTS", outputs).with("VECTOR", width).with("ACCUMULATE", usize::from(accumulate))
}

pub(crate) fn forward<T, W>(cuda: &Cuda, op: &'static str, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let call = Call::new::<T>(cuda, op)?.with_type::<W, Weight>()?;
    if has_few_rows(args.x.shape()[0], [T::DTYPE, W::DTYPE], args.bias.is_some()) {
        let Forward { x, weight, bias, y, accumulate } = args;
        return few_rows(call, &x, vec![(Product { weight, y }, bias)], accumulate);
    }
    let Forward { x, weight, bias, mut y, accumulate } = args;
    let bias = bias.map(|bias| Ok::<_, crate::Error>(Bias { address: call.address("bias", &bias)?, dtype: W::DTYPE }));
    let (bias, y) = (bias.transpose()?, matrix_mut(&call, "y", &mut y)?);
    times_transposed(&call, [matrix(&call, "x", &x)?, matrix(&call, "weight", &weight)?, y], bias, accumulate)
}

/// Whether rows of x and the weight, of these types, are the kernel's: the library takes factors of one type and no bias.
pub(in crate::cuda) fn has_few_rows(rows: usize, [x, weight]: [DType; 2], bias: bool) -> bool {
    rows <= FEW_ROWS && (x != weight || bias)
}

pub(crate) fn forward_all<T, W>(
    cuda: &Cuda,
    op: &'static str,
    x: Tensor<'_, T, 2>,
    products: Vec<Product<'_, T, W>>,
) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    // A product alone is the library's if it can be.
    if x.shape()[0] > FEW_ROWS || products.len() == 1 {
        let one = |Product { weight, y }| forward(cuda, op, Forward { x, weight, bias: None, y, accumulate: false });
        return products.into_iter().try_for_each(one);
    }
    let call = Call::new::<T>(cuda, op)?.with_type::<W, Weight>()?;
    let mut rest = products.into_iter().map(|product| (product, None)).peekable();
    while rest.peek().is_some() {
        few_rows(call.clone(), &x, rest.by_ref().take(PRODUCTS).collect(), false)?;
    }
    Ok(())
}

/// A product and its bias.
type Layer<'a, T, W> = (Product<'a, T, W>, Option<Tensor<'a, W, 1>>);

/// Launches up to `PRODUCTS` products.
fn few_rows<T: Element, W: Element>(
    call: Call<'_>,
    x: &Tensor<'_, T, 2>,
    layers: Vec<Layer<'_, T, W>>,
    accumulate: bool,
) -> Result<()> {
    let [rows, inputs] = x.shape();
    let shared = rows.next_power_of_two().min(SHARED_ROWS);
    let outputs: usize = layers.iter().map(|(product, _)| product.weight.shape()[0]).sum();
    // Several outputs share the reads of x, if there are warps enough for the device.
    let enough = WARPS * call.cuda().device().multiprocessors;
    let each = if outputs >= OUTPUTS * enough { OUTPUTS } else { 1 };
    let none =
        LinearProduct { weight: In::none(), bias: In::none(), y: Out(0, PhantomData), outputs: 0, end: i64::MAX };
    let (mut products, mut blocks) = ([none; PRODUCTS], 0);
    for (place, (Product { weight, mut y }, bias)) in products.iter_mut().zip(layers) {
        let outputs = weight.shape()[0];
        blocks += outputs.div_ceil(each * WARPS);
        *place = LinearProduct {
            weight: call.input("weight", &weight)?,
            bias: call.optional_input("bias", bias.as_ref())?,
            y: call.output("y", &mut y)?,
            outputs: outputs as i64,
            end: blocks as i64,
        };
    }
    let params =
        LinearFewRows { x: call.input("x", x)?, rows: rows as i64, inputs: inputs as i64, products: Array(products) };
    let addresses: Vec<u64> = products.iter().map(|product| product.weight.0).chain([params.x.0]).collect();
    let width = vector(inputs, size_of::<T>().min(size_of::<W>()), &addresses);
    let geometry =
        Geometry { grid: [blocks as u64, rows.div_ceil(shared) as u64, 1], threads: THREADS, shared_bytes: 0 };
    let call = call.constants(|given| constants(given, [shared, each, width], accumulate));
    call.launch(&PROGRAM, "linear_few_rows", geometry, params)
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
