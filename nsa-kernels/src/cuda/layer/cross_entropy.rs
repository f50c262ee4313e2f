//! The output head and the loss.

use super::matmul::{add_outer, matrix, matrix_mut, times, times_transposed};
use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::blas::Matrix;
use crate::cuda::geometry::Geometry;
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Params, Weight, params};
use crate::cuda::program::{Constants, Program};
use crate::layer::cross_entropy::{Forward, ForwardBackward, Loss};
use crate::layer::embedding::token_error;
use crate::{Result, Tensor};
use nsa_core::{DType, Element};
use std::marker::PhantomData;

/// The kernel.
pub(crate) static PROGRAM: Program = Program {
    file: "cross_entropy.cu",
    text: include_str!("../kernels/cross_entropy.cu"),
    params: &[CrossEntropy::declaration, CrossEntropyTotal::declaration],
};

/// Threads of a block.
const THREADS: u32 = 256;
/// Logits that exist at a time, as far as [`MIN_ROWS`] allows: 256 MiB.
const CHUNK_ELEMENTS: usize = 1 << 26;
/// Rows of a chunk at least: with fewer, reading the head costs more than the products.
const MIN_ROWS: usize = 256;
/// Numbers that losses sum to: their sum and count, and a target that is none with its row.
pub(in crate::cuda) const TOTALS: usize = 4;

params! {
    /// Arguments of `cross_entropy`.
    struct CrossEntropy {
        /// `[rows, vocabulary]`; become their gradients, if these are wanted.
        logits: Out<f32>,
        /// `[rows]`.
        targets: In<u32>,
        /// `[rows]`.
        losses: Out<f32>,
        /// Logits of a row.
        vocabulary: i64,
        /// Of the gradients.
        scale: f32,
    }

    /// Arguments of `cross_entropy_total`.
    struct CrossEntropyTotal {
        /// `[rows]`.
        losses: In<f32>,
        /// `[rows]`.
        targets: In<u32>,
        /// The sum, its number of terms, the first target that is not in the vocabulary and its row, or else −1.
        total: Out<f64>,
        rows: i64,
        vocabulary: i64,
    }
}

/// What the operation runs, gradients included.
pub(super) fn build() -> Build {
    let constants = Constants::new(DType::F32).with("GRADIENTS", 1);
    Build::new(&PROGRAM, constants, &[("cross_entropy", THREADS), ("cross_entropy_total", THREADS)])
}

/// The operands of either direction.
struct Head<'c> {
    call: Call<'c>,
    hidden: Matrix,
    weight: Matrix,
    targets: In<u32>,
}

impl<'c> Head<'c> {
    fn new<T, W>(
        cuda: &'c Cuda,
        op: &'static str,
        hidden: &Tensor<'_, T, 2>,
        weight: &Tensor<'_, W, 2>,
        targets: &Tensor<'_, u32, 1>,
    ) -> Result<Self>
    where
        T: Element,
        W: Element<Acc = T::Acc>,
    {
        let call = Call::new::<T>(cuda, op)?.with_type::<W, Weight>()?;
        let (hidden, weight) = (matrix(&call, "hidden", hidden)?, matrix(&call, "weight", weight)?);
        Ok(Self { hidden, weight, targets: call.input("targets", targets)?, call })
    }

    /// Writes the losses of all rows `[N]`. Calls `f` with each chunk's first row and its logits, which are their gradients
    /// if there is a scale.
    fn for_chunks(
        &self,
        losses: Out<f32>,
        scale: Option<f64>,
        mut f: impl FnMut(usize, Matrix) -> Result<()>,
    ) -> Result<()> {
        let ([n, _], [vocabulary, _]) = (self.hidden.shape, self.weight.shape);
        let chunk = chunk_rows(n, vocabulary);
        let mut logits = self.call.workspace::<f32>(chunk * vocabulary)?;
        let logits: Out<f32> = logits.written_by();
        let gradients = usize::from(scale.is_some());
        let call = self.call.of_type(DType::F32).constants(|constants| constants.with("GRADIENTS", gradients));
        for start in (0..n).step_by(chunk.max(1)) {
            let rows = chunk.min(n - start);
            let z = Matrix::packed(logits.0, DType::F32, [rows, vocabulary]);
            times_transposed(&self.call, [self.rows(start, rows), self.weight, z], None, false)?;
            let at = 4 * start as u64;
            let params = CrossEntropy {
                logits,
                targets: In(self.targets.0 + at, PhantomData),
                losses: Out(losses.0 + at, PhantomData),
                vocabulary: vocabulary as i64,
                scale: scale.unwrap_or(0.0) as f32,
            };
            let geometry = Geometry { grid: [rows as u64, 1, 1], threads: THREADS, shared_bytes: 0 };
            call.launch(&PROGRAM, "cross_entropy", geometry, params)?;
            f(start, z)?;
        }
        Ok(())
    }

    /// Rows of the input of the head.
    fn rows(&self, start: usize, rows: usize) -> Matrix {
        rows_of(self.hidden, start, rows)
    }

    /// The sum of the losses `[N]`, after a look at the targets: waits for four numbers of the device.
    fn finish(&self, losses: In<f32>) -> Result<Loss> {
        let ([rows, _], [vocabulary, _]) = (self.hidden.shape, self.weight.shape);
        let call = self.call.of_type(DType::F32).constants(|constants| constants.with("GRADIENTS", 0));
        let mut total = call.workspace::<f64>(TOTALS)?;
        let params = CrossEntropyTotal {
            losses,
            targets: self.targets,
            total: total.written_by(),
            rows: rows as i64,
            vocabulary: vocabulary as i64,
        };
        let geometry = Geometry { grid: [1, 1, 1], threads: THREADS, shared_bytes: 0 };
        call.launch(&PROGRAM, "cross_entropy_total", geometry, params)?;
        let mut numbers = [0.0; TOTALS];
        total.read(call.op(), &mut numbers)?;
        let [sum, count, target, row] = numbers;
        if row >= 0.0 {
            return Err(token_error(call.op(), "targets", row as usize, target as u32));
        }
        Ok(Loss { sum, count: count as usize })
    }
}

/// Of so many rows, those whose logits exist at a time.
pub(in crate::cuda) fn chunk_rows(rows: usize, vocabulary: usize) -> usize {
    (CHUNK_ELEMENTS / vocabulary.max(1)).max(MIN_ROWS).min(rows)
}

fn rows_of(matrix: Matrix, start: usize, rows: usize) -> Matrix {
    let columns = matrix.shape[1];
    let offset = start * columns * matrix.dtype.size_bytes();
    Matrix { address: matrix.address + offset as u64, shape: [rows, columns], ..matrix }
}

pub(crate) fn forward<T, W>(cuda: &Cuda, op: &'static str, args: Forward<'_, T, W>) -> Result<Loss>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let Forward { hidden, weight, targets, losses } = args;
    let head = Head::new(cuda, op, &hidden, &weight, &targets)?;
    let [n] = targets.shape();
    let mut own = head.call.workspace::<f32>(if losses.is_some() { 0 } else { n })?;
    let mut losses = losses;
    let address = match &mut losses {
        Some(losses) => Out(head.call.address_mut("losses", losses)?, PhantomData),
        None => own.written_by(),
    };
    head.for_chunks(address, None, |_, _| Ok(()))?;
    head.finish(address.to_input())
}

pub(crate) fn forward_backward<T, W>(cuda: &Cuda, op: &'static str, args: ForwardBackward<'_, T, W>) -> Result<Loss>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let ForwardBackward { hidden, weight, targets, scale, mut d_hidden, d_weight } = args;
    let head = Head::new(cuda, op, &hidden, &weight, &targets)?;
    let (call, [n]) = (&head.call, targets.shape());
    let d_hidden = matrix_mut(call, "d_hidden", &mut d_hidden)?;
    let mut d_weight = d_weight;
    let d_weight = d_weight.as_mut().map(|d_weight| matrix_mut(call, "d_weight", d_weight)).transpose()?;
    let mut losses = call.workspace::<f32>(n)?;
    head.for_chunks(losses.written_by(), Some(scale), |start, dz| {
        let rows = dz.shape[0];
        times(call, [dz, head.weight, rows_of(d_hidden, start, rows)], false)?;
        match d_weight {
            Some(d_weight) => add_outer(call, [dz, head.rows(start, rows), d_weight]),
            None => Ok(()),
        }
    })?;
    head.finish(losses.read_by())
}
