//! RMSNorm.

use crate::Result;
use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::geometry::{Geometry, vector};
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Params, Stored, Weight, params};
use crate::cuda::program::{Constants, Program};
use crate::cuda::reduce::{Parts, add_partials};
use crate::layer::rmsnorm::{Backward, Forward};
use nsa_core::Element;

/// The kernels.
pub(crate) static PROGRAM: Program = Program {
    file: "rmsnorm.cu",
    text: include_str!("../kernels/rmsnorm.cu"),
    params: &[RmsNormForward::declaration, RmsNormBackward::declaration, RmsNormWeight::declaration],
};

/// Threads of a block.
const THREADS: u32 = 256;

params! {
    /// Arguments of `rmsnorm_forward`.
    struct RmsNormForward {
        /// `[rows, CHANNELS]`.
        x: In<Stored>,
        /// `[CHANNELS]`.
        weight: In<Weight>,
        /// `[rows, CHANNELS]`.
        y: Out<Stored>,
        /// `[rows]`, or none.
        rstd: Out<f32>,
        /// Rows.
        rows: i64,
        /// Added to the mean square.
        eps: f32,
    }

    /// Arguments of `rmsnorm_backward`.
    struct RmsNormBackward {
        /// `[rows, CHANNELS]`.
        x: In<Stored>,
        /// `[CHANNELS]`.
        weight: In<Weight>,
        /// `[rows]`.
        rstd: In<f32>,
        /// `[rows, CHANNELS]`.
        dy: In<f32>,
        /// `[rows, CHANNELS]`.
        dx: Out<f32>,
        /// Rows.
        rows: i64,
    }

    /// Arguments of `rmsnorm_weight`.
    struct RmsNormWeight {
        /// `[rows, CHANNELS]`.
        x: In<Stored>,
        /// `[rows]`.
        rstd: In<f32>,
        /// `[rows, CHANNELS]`.
        dy: In<f32>,
        /// `[parts, CHANNELS]`.
        partial: Out<f32>,
        /// Rows.
        rows: i64,
        /// Rows of a part.
        part_rows: i64,
    }
}

/// What the operation runs on rows of so many channels.
pub(super) fn build(given: Constants, channels: usize, width: usize) -> Build {
    let kernels = ["rmsnorm_forward", "rmsnorm_backward", "rmsnorm_weight"].map(|name| (name, THREADS));
    Build::new(&PROGRAM, constants(given, channels, width, true), &kernels)
}

/// Threads that take a row: about 8 elements each.
fn row_threads(channels: usize) -> u32 {
    let threads = channels.div_ceil(8).next_power_of_two().clamp(32, THREADS as usize);
    u32::try_from(threads).expect("at most a block")
}

/// A row takes `row_threads` threads.
fn geometry(rows: usize, row_threads: u32) -> Geometry {
    Geometry::linear(rows as u64 * u64::from(row_threads), THREADS)
}

pub(crate) fn forward<T, W>(cuda: &Cuda, op: &'static str, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let call = Call::new::<T>(cuda, op)?.with_type::<W, Weight>()?;
    let Forward { x, weight, eps, mut y, mut rstd } = args;
    let [rows, channels] = x.shape();
    let params = RmsNormForward {
        x: call.input("x", &x)?,
        weight: call.input("weight", &weight)?,
        y: call.output("y", &mut y)?,
        rstd: call.optional_output("rstd", rstd.as_mut())?,
        rows: rows as i64,
        eps: eps as f32,
    };
    let size = size_of::<T>().min(size_of::<W>());
    let width = vector(channels, size, &[params.x.0, params.weight.0, params.y.0]);
    let call = call.constants(|given| constants(given, channels, width, false));
    call.launch(&PROGRAM, "rmsnorm_forward", geometry(rows, row_threads(channels)), params)
}

pub(crate) fn backward<T, W>(cuda: &Cuda, op: &'static str, args: Backward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let call = Call::new::<T>(cuda, op)?.with_type::<W, Weight>()?;
    let Backward { x, weight, rstd, dy, mut dx, accumulate, mut dw } = args;
    let [rows, channels] = x.shape();
    let (x, rstd, dy) = (call.input("x", &x)?, call.input("rstd", &rstd)?, call.input("dy", &dy)?);
    let dw = call.output("dw", &mut dw)?;
    let params = RmsNormBackward {
        x,
        weight: call.input("weight", &weight)?,
        rstd,
        dy,
        dx: call.output("dx", &mut dx)?,
        rows: rows as i64,
    };
    let size = size_of::<T>().min(size_of::<W>());
    let width = vector(channels, size, &[x.0, params.weight.0, dy.0, params.dx.0]);
    let call = call.constants(|given| constants(given, channels, width, accumulate));
    call.launch(&PROGRAM, "rmsnorm_backward", geometry(rows, row_threads(channels)), params)?;
    let parts = Parts::of(rows);
    let mut partial = call.workspace::<f32>(parts.count * channels)?;
    let part_rows = parts.rows as i64;
    let params = RmsNormWeight { x, rstd, dy, partial: partial.written_by(), rows: rows as i64, part_rows };
    call.launch(&PROGRAM, "rmsnorm_weight", parts.geometry(channels), params)?;
    add_partials(&call, &partial, parts, channels, dw)
}

fn constants(given: Constants, channels: usize, width: usize, accumulate: bool) -> Constants {
    given
        .with("CHANNELS", channels)
        .with("VECTOR", width)
        .with("ROW_THREADS", row_threads(channels) as usize)
        .with("ACCUMULATE", usize::from(accumulate))
}

#[cfg(test)]
mod tests {
    use super::row_threads;

    #[test]
    fn rows_are_shared_by_whole_warps() {
        assert_eq!([1, 128, 256, 257, 1024, 2560, 1 << 20].map(row_threads), [32, 32, 32, 64, 128, 256, 256]);
    }
}
