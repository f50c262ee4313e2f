//! Rotary position embedding.

use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::geometry::{Geometry, vector};
use crate::cuda::launch::Call;
use crate::cuda::params::{Array, In, Out, Params, Stored, params};
use crate::cuda::program::{Constants, Program};
use crate::layer::rope::{Direction, RopeCache, Rotate, RotateInPlace};
use crate::{Result, Tensor};
use nsa_core::Element;
use std::marker::PhantomData;

/// The kernel.
pub(crate) static PROGRAM: Program = Program {
    file: "rope.cu",
    text: include_str!("../kernels/rope.cu"),
    params: &[RopeHeads::declaration, Rope::declaration],
};

/// Threads of a block.
const THREADS: u32 = 256;
/// Tensors of a launch, at most.
const TENSORS: usize = 4;

params! {
    /// One of the tensors of `rope`; `y` may be `x`.
    struct RopeHeads {
        /// `[rows, heads, 2 PAIRS]`.
        x: In<Stored>,
        /// `[rows, heads, 2 PAIRS]`.
        y: Out<Stored>,
        /// Heads of a token.
        heads: i64,
        /// Blocks before the next tensor's.
        end: i64,
    }

    /// Arguments of `rope`.
    struct Rope {
        tensors: Array<RopeHeads, TENSORS>,
        /// `[rows]`.
        positions: In<i32>,
        /// `[table_rows, PAIRS]`.
        cos: In<f32>,
        /// `[table_rows, PAIRS]`.
        sin: In<f32>,
        /// Tokens.
        rows: i64,
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
    let heads = [(call.input("x", &x)?, call.output("y", &mut y)?, y.shape()[1])];
    launch::<T>(call, &heads, cache, &positions, direction)
}

pub(crate) fn rotate_in_place<T: Element>(
    cuda: &Cuda,
    op: &'static str,
    args: RotateInPlace<'_, T>,
    direction: Direction,
) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?;
    let RotateInPlace { cache, positions, mut x } = args;
    for some in x.chunks_mut(TENSORS) {
        let heads = some.iter_mut().map(|x| {
            let y = call.output::<_, Stored, 3>("x", x)?;
            Ok((y.to_input(), y, x.shape()[1]))
        });
        launch::<T>(call.clone(), &heads.collect::<Result<Vec<_>>>()?, cache, &positions, direction)?;
    }
    Ok(())
}

/// Launches the rotation of up to `TENSORS` tensors: each with its number of heads.
fn launch<T: Element>(
    call: Call<'_>,
    heads: &[(In<Stored>, Out<Stored>, usize)],
    cache: &RopeCache<T::Acc>,
    positions: &Tensor<'_, i32, 1>,
    direction: Direction,
) -> Result<()> {
    let ([rows], pairs) = (positions.shape(), cache.head_dim() / 2);
    let (cos, sin) = (call.input("cache", &cache.cos()?)?, call.input("cache", &cache.sin()?)?);
    let addresses: Vec<u64> = heads.iter().flat_map(|(x, y, _)| [x.0, y.0]).chain([cos.0, sin.0]).collect();
    let width = vector(pairs, size_of::<T>(), &addresses);
    let none = RopeHeads { x: In::none(), y: Out(0, PhantomData), heads: 0, end: i64::MAX };
    let (mut tensors, mut blocks) = ([none; TENSORS], 0);
    for (tensor, &(x, y, heads)) in tensors.iter_mut().zip(heads) {
        blocks += (rows * heads * (pairs / width)).div_ceil(THREADS as usize);
        *tensor = RopeHeads { x, y, heads: heads as i64, end: blocks as i64 };
    }
    let positions = call.input("positions", positions)?;
    let (rows, table_rows) = (rows as i64, cache.positions() as i64);
    let params = Rope { tensors: Array(tensors), positions, cos, sin, rows, table_rows };
    let geometry = Geometry { grid: [blocks as u64, 1, 1], threads: THREADS, shared_bytes: 0 };
    let sign = if direction == Direction::Backward { -1 } else { 1 };
    call.constants(|given| constants(given, pairs, width, sign)).launch(&PROGRAM, "rope", geometry, params)
}
