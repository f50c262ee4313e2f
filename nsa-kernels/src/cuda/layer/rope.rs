//! Rotary position embedding.

use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::geometry::{Geometry, vector};
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Params, Stored, params};
use crate::cuda::program::{Constants, Program};
use crate::layer::rope::{Direction, RopeCache, Rotate, RotateInPlace};
use crate::{Result, Tensor};
use nsa_core::Element;

/// The kernel.
pub(crate) static PROGRAM: Program =
    Program { file: "rope.cu", text: include_str!("../kernels/rope.cu"), params: &[Rope::declaration] };

/// Threads of a block.
const THREADS: u32 = 256;

params! {
    /// Arguments of `rope`; `y` may be `x`.
    struct Rope {
        /// `[rows, heads, 2 PAIRS]`.
        x: In<Stored>,
        /// `[rows, heads, 2 PAIRS]`.
        y: Out<Stored>,
        /// `[rows]`.
        positions: In<i32>,
        /// `[table_rows, PAIRS]`.
        cos: In<f32>,
        /// `[table_rows, PAIRS]`.
        sin: In<f32>,
        /// Tokens.
        rows: i64,
        /// Heads of a token.
        heads: i64,
        /// Positions of the table.
        table_rows: i64,
    }
}

/// What the operation runs on heads of so many pairs.
pub(super) fn build(given: Constants, pairs: usize, width: usize) -> Build {
    Build::new(&PROGRAM, constants(given, pairs, width, 1), &[("rope", THREADS)])
}

fn constants(given: Constants, pairs: usize, width: usize, sign: i64) -> Constants {
    given.with("PAIRS", pairs).with("VECTOR", width).with_signed("SIGN", sign)
}

pub(crate) fn rotate<T: Element>(
    cuda: &Cuda,
    op: &'static str,
    args: Rotate<'_, T>,
    direction: Direction,
) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?;
    let Rotate { cache, positions, x, mut y } = args;
    let (shape, x, y) = (y.shape(), call.input("x", &x)?, call.output("y", &mut y)?);
    launch::<T>(call, (x, y, shape), cache, &positions, direction)
}

pub(crate) fn rotate_in_place<T: Element>(
    cuda: &Cuda,
    op: &'static str,
    args: RotateInPlace<'_, T>,
    direction: Direction,
) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?;
    let RotateInPlace { cache, positions, mut x } = args;
    let (shape, y) = (x.shape(), call.output::<_, Stored, 3>("x", &mut x)?);
    launch::<T>(call, (y.to_input(), y, shape), cache, &positions, direction)
}

fn launch<T: Element>(
    call: Call<'_>,
    (x, y, [rows, heads, dim]): (In<Stored>, Out<Stored>, [usize; 3]),
    cache: &RopeCache<T::Acc>,
    positions: &Tensor<'_, i32, 1>,
    direction: Direction,
) -> Result<()> {
    let params = Rope {
        x,
        y,
        positions: call.input("positions", positions)?,
        cos: call.input("cache", &cache.cos()?)?,
        sin: call.input("cache", &cache.sin()?)?,
        rows: rows as i64,
        heads: heads as i64,
        table_rows: cache.positions() as i64,
    };
    let pairs = dim / 2;
    let width = vector(pairs, size_of::<T>(), &[x.0, y.0, params.cos.0, params.sin.0]);
    let geometry = Geometry::linear((rows * heads * (pairs / width)) as u64, THREADS);
    let sign = if direction == Direction::Backward { -1 } else { 1 };
    call.constants(|given| constants(given, pairs, width, sign)).launch(&PROGRAM, "rope", geometry, params)
}
