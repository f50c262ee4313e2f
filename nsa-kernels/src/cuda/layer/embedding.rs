//! The embedding.

use crate::Result;
use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::geometry::{Geometry, vector};
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Params, Stored, Weight, params};
use crate::cuda::program::{Constants, Program};
use crate::layer::embedding::{Backward, Forward};
use nsa_core::{Element, Real};

/// The kernels.
pub(crate) static PROGRAM: Program = Program {
    file: "embedding.cu",
    text: include_str!("../kernels/embedding.cu"),
    params: &[EmbeddingForward::declaration, EmbeddingBackward::declaration],
};

/// Threads of a block, forward and backward.
const THREADS: [u32; 2] = [256, 128];

params! {
    /// Arguments of `embedding_forward`.
    struct EmbeddingForward {
        /// `[rows]`.
        tokens: In<u32>,
        /// `[vocabulary, channels]`.
        weight: In<Weight>,
        /// `[rows, channels]`.
        y: Out<Stored>,
        /// Tokens.
        rows: i64,
        /// Elements of a row.
        channels: i64,
        /// Rows of the table.
        vocabulary: i64,
    }

    /// Arguments of `embedding_backward`.
    struct EmbeddingBackward {
        /// `[rows]`.
        tokens: In<u32>,
        /// `[rows, channels]`.
        dy: In<f32>,
        /// `[vocabulary, channels]`.
        dw: Out<f32>,
        /// Tokens.
        rows: i64,
        /// Elements of a row.
        channels: i64,
        /// Rows of the table.
        vocabulary: i64,
    }
}

/// What the operation runs, with constants that have VECTOR.
pub(super) fn build(constants: Constants) -> Build {
    let kernels = [("embedding_forward", THREADS[0]), ("embedding_backward", THREADS[1])];
    Build::new(&PROGRAM, constants, &kernels)
}

pub(crate) fn forward<T, W>(cuda: &Cuda, op: &'static str, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let call = Call::new::<T>(cuda, op)?.with_type::<W, Weight>()?;
    let Forward { tokens, weight, mut y } = args;
    let ([rows, channels], [vocabulary, _]) = (y.shape(), weight.shape());
    let params = EmbeddingForward {
        tokens: call.input("tokens", &tokens)?,
        weight: call.input("weight", &weight)?,
        y: call.output("y", &mut y)?,
        rows: rows as i64,
        channels: channels as i64,
        vocabulary: vocabulary as i64,
    };
    let width = vector(channels, size_of::<T>().min(size_of::<W>()), &[params.weight.0, params.y.0]);
    let geometry = Geometry::linear((rows * (channels / width)) as u64, THREADS[0]);
    call.constants(|constants| constants.with("VECTOR", width)).launch(&PROGRAM, "embedding_forward", geometry, params)
}

pub(crate) fn backward<A: Real>(cuda: &Cuda, op: &'static str, args: Backward<'_, A>) -> Result<()> {
    let call = Call::new::<A>(cuda, op)?;
    let Backward { tokens, dy, mut dw } = args;
    let ([rows, channels], [vocabulary, _]) = (dy.shape(), dw.shape());
    let params = EmbeddingBackward {
        tokens: call.input("tokens", &tokens)?,
        dy: call.input("dy", &dy)?,
        dw: call.output("dw", &mut dw)?,
        rows: rows as i64,
        channels: channels as i64,
        vocabulary: vocabulary as i64,
    };
    let width = vector(channels, size_of::<f32>(), &[params.dy.0, params.dw.0]);
    let slices = (channels / width).div_ceil(THREADS[1] as usize);
    let geometry = Geometry { grid: [rows as u64, slices as u64, 1], threads: THREADS[1], shared_bytes: 0 };
    call.constants(|constants| constants.with("VECTOR", width)).launch(&PROGRAM, "embedding_backward", geometry, params)
}
