//! AdamW.

use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::geometry::{Geometry, vector};
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Params, params};
use crate::cuda::program::{Constants, Program};
use crate::layer::adamw::{Factors, Step};
use crate::{Result, Tensor};
use nsa_core::{DType, Real};

/// The kernels.
pub(crate) static PROGRAM: Program = Program {
    file: "adamw.cu",
    text: include_str!("../kernels/adamw.cu"),
    params: &[AdamW::declaration, SumOfSquares::declaration],
};

/// Threads of a block.
const THREADS: u32 = 256;
/// Elements of one partial sum of squares.
const PART: usize = 1 << 14;

params! {
    /// Arguments of `adamw_step`.
    struct AdamW {
        /// `[count]`.
        grads: In<f32>,
        /// `[count]`.
        params: Out<f32>,
        /// `[count]`.
        m: Out<f32>,
        /// `[count]`.
        v: Out<f32>,
        /// Parameters.
        count: i64,
        /// Of the gradient.
        scale: f32,
        /// Of the mean.
        old_mean: f32,
        /// Of the gradient in the mean.
        new_mean: f32,
        /// Of the mean square.
        old_square: f32,
        /// Of the gradient in the mean square.
        new_square: f32,
        /// Of the parameter.
        keep: f32,
        /// Of the mean in the update.
        rate: f32,
        /// Of the root of the mean square.
        root: f32,
        /// Added to that root.
        eps: f32,
    }

    /// Arguments of `sum_of_squares`.
    struct SumOfSquares {
        /// `[count]`.
        grads: In<f32>,
        /// `[count / PART]`, rounded up.
        partial: Out<f64>,
        /// Elements.
        count: i64,
    }
}

/// What the operation runs.
pub(super) fn build() -> Build {
    let kernels = [("adamw_step", THREADS), ("sum_of_squares", THREADS)];
    Build::new(&PROGRAM, constants(Constants::new(DType::F32), 4), &kernels)
}

fn constants(constants: Constants, width: usize) -> Constants {
    constants.with("VECTOR", width).with("PART", PART)
}

pub(crate) fn step<R: Real>(cuda: &Cuda, op: &'static str, args: Step<'_, R>) -> Result<()> {
    let call = Call::new::<R>(cuda, op)?;
    let Factors { rate, root, keep, eps, scale, old, new } = Factors::<f32>::new(&args);
    let Step { grads, mut params, mut m, mut v, .. } = args;
    let [count] = grads.shape();
    let params = AdamW {
        grads: call.input("grads", &grads)?,
        params: call.output("params", &mut params)?,
        m: call.output("m", &mut m)?,
        v: call.output("v", &mut v)?,
        count: count as i64,
        scale,
        old_mean: old[0],
        new_mean: new[0],
        old_square: old[1],
        new_square: new[1],
        keep,
        rate,
        root,
        eps,
    };
    let width = vector(0, size_of::<f32>(), &[params.grads.0, params.params.0, params.m.0, params.v.0]);
    let geometry = Geometry::linear(count.div_ceil(width) as u64, THREADS);
    let call = call.constants(|given| constants(given, width));
    call.launch(&PROGRAM, "adamw_step", geometry, params)
}

/// Partial sums of so many gradients.
pub(in crate::cuda) fn parts(count: usize) -> usize {
    count.div_ceil(PART)
}

pub(crate) fn sum_of_squares<R: Real>(cuda: &Cuda, op: &'static str, grads: Tensor<'_, R, 1>) -> Result<f64> {
    let call = Call::new::<R>(cuda, op)?.constants(|given| constants(given, 4));
    let [count] = grads.shape();
    let parts = parts(count);
    let mut partial = call.workspace::<f64>(parts)?;
    let params =
        SumOfSquares { grads: call.input("grads", &grads)?, partial: partial.written_by(), count: count as i64 };
    let geometry = Geometry { grid: [parts as u64, 1, 1], threads: THREADS, shared_bytes: 0 };
    call.launch(&PROGRAM, "sum_of_squares", geometry, params)?;
    let mut sums = vec![0.0; parts];
    partial.read(op, &mut sums)?;
    Ok(sums.iter().sum())
}
