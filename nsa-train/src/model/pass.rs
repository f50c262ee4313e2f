//! What every step of a forward or backward pass needs, and the layer operations over it.

use super::Dims;
use super::profile::{Phase, Profile};
use super::slots::{Carver, Slot, Weights};
use super::workspace::Inputs;
use crate::Result;
use nsa_core::Element;
use nsa_kernels::layer::rope::{self, RopeCache, RotateInPlace};
use nsa_kernels::layer::{add, linear, rmsnorm};
use nsa_kernels::{Backend, Buffer};

/// The surroundings of one pass.
pub(crate) struct Pass<'a, T: Element> {
    pub(crate) backend: &'a Backend,
    pub(crate) dims: &'a Dims,
    /// Weights of the whole model.
    pub(crate) weights: Weights<'a, T>,
    pub(crate) inputs: &'a Inputs,
    pub(crate) rope: &'a RopeCache<T::Acc>,
    pub(crate) profile: &'a mut Profile,
}

impl<T: Element> Pass<'_, T> {
    /// Runs an operation, whose time belongs to `phase`.
    pub(crate) fn run(
        &mut self,
        phase: Phase,
        operation: impl FnOnce(&Backend) -> nsa_kernels::Result<()>,
    ) -> Result<()> {
        let backend = self.backend;
        Ok(self.profile.time(phase, || operation(backend))?)
    }

    /// y = RMSNorm(x) for `[rows, width]`.
    pub(crate) fn norm(
        &mut self,
        weight: &Slot,
        [rows, width]: [usize; 2],
        x: &Buffer<T>,
        y: &mut Buffer<T>,
        rstd: &mut Buffer<T::Acc>,
    ) -> Result<()> {
        let args = rmsnorm::Forward {
            x: x.tensor([rows, width])?,
            weight: self.weights.master(weight)?,
            eps: self.dims.eps,
            y: y.tensor_mut([rows, width])?,
            rstd: Some(rstd.tensor_mut([rows])?),
        };
        self.run(Phase::Norm, |backend| rmsnorm::forward(backend, args))
    }

    /// Gradients of [`Pass::norm`]; dx is written, or added to if `accumulate`.
    pub(crate) fn norm_backward(
        &mut self,
        weight: &Slot,
        [rows, width]: [usize; 2],
        (x, rstd): (&Buffer<T>, &Buffer<T::Acc>),
        dy: &Buffer<T::Acc>,
        (dx, accumulate): (&mut Buffer<T::Acc>, bool),
        grads: &mut Buffer<T::Acc>,
    ) -> Result<()> {
        let args = rmsnorm::Backward {
            x: x.tensor([rows, width])?,
            weight: self.weights.master(weight)?,
            rstd: rstd.tensor([rows])?,
            dy: dy.tensor([rows, width])?,
            dx: dx.tensor_mut([rows, width])?,
            accumulate,
            dw: weight.tensor_mut(grads)?,
        };
        self.run(Phase::Norm, |backend| rmsnorm::backward(backend, args))
    }

    /// y = x·Wᵀ, y `[N, outputs]`.
    pub(crate) fn linear(&mut self, phase: Phase, weight: &Slot, x: &Buffer<T>, y: &mut Buffer<T>) -> Result<()> {
        self.linear_with_bias(phase, weight, None, x, y)
    }

    /// y = x·Wᵀ + b, y `[N, outputs]`.
    pub(crate) fn linear_with_bias(
        &mut self,
        phase: Phase,
        weight: &Slot,
        bias: Option<&Slot>,
        x: &Buffer<T>,
        y: &mut Buffer<T>,
    ) -> Result<()> {
        let rows = self.inputs.rows();
        let weight = self.weights.tensor(weight)?;
        let [outputs, inputs] = weight.shape();
        let args = linear::Forward {
            x: x.tensor([rows, inputs])?,
            weight,
            bias: bias.map(|bias| self.weights.tensor(bias)).transpose()?,
            y: y.tensor_mut([rows, outputs])?,
            accumulate: false,
        };
        self.run(phase, |backend| linear::forward(backend, args))
    }

    /// Gradients of [`Pass::linear_with_bias`]: dx is written, or added to if `accumulate`; those of the weights are added
    /// to.
    pub(crate) fn linear_backward<G: Element<Acc = T::Acc>, D: Element<Acc = T::Acc>>(
        &mut self,
        phase: Phase,
        (weight, bias): (&Slot, Option<&Slot>),
        (x, dy): (&Buffer<T>, &Buffer<G>),
        (dx, accumulate): (&mut Buffer<D>, bool),
        grads: &mut Buffer<T::Acc>,
    ) -> Result<()> {
        let rows = self.inputs.rows();
        let matrix = self.weights.tensor(weight)?;
        let [outputs, inputs] = matrix.shape();
        let dy = dy.tensor([rows, outputs])?;
        let args = linear::BackwardInput { dy, weight: matrix, dx: dx.tensor_mut([rows, inputs])?, accumulate };
        self.run(phase, |backend| linear::backward_input(backend, args))?;
        let (dw, carver) = Carver::new(grads)?.take(weight)?;
        let db = bias.map(|bias| carver.take(bias)).transpose()?.map(|(db, _)| db);
        let args = linear::BackwardWeight { x: x.tensor([rows, inputs])?, dy, dw, db };
        self.run(phase, |backend| linear::backward_weight(backend, args))
    }

    /// y += x for `[N, C]`.
    pub(crate) fn add_residual(&mut self, x: &Buffer<T>, y: &mut Buffer<T>) -> Result<()> {
        let shape = [self.inputs.rows(), self.dims.hidden];
        let args = add::Accumulate { x: x.tensor(shape)?, y: y.tensor_mut(shape)? };
        self.run(Phase::Norm, |backend| add::accumulate(backend, args))
    }

    /// Rotates `[rows, heads, Dk]` by the positions of the tokens or of the blocks, or passes a gradient back.
    pub(crate) fn rotate<E: Element<Acc = T::Acc>>(
        &mut self,
        rows: Rows,
        heads: usize,
        x: &mut Buffer<E>,
        backward: bool,
    ) -> Result<()> {
        let (count, positions) = match rows {
            Rows::Tokens => (self.inputs.rows(), &self.inputs.positions),
            Rows::Blocks => (self.inputs.block_rows(), &self.inputs.block_positions),
        };
        let args = RotateInPlace {
            cache: self.rope,
            positions: positions.tensor([count])?,
            x: vec![x.tensor_mut([count, heads, self.dims.head_dim])?],
        };
        let operation = if backward { rope::backward_in_place } else { rope::forward_in_place };
        self.run(Phase::Rope, |backend| operation(backend, args))
    }

    /// Number of rows.
    pub(crate) fn count(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.inputs.rows(),
            Rows::Blocks => self.inputs.block_rows(),
        }
    }
}

/// What the rows of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// One a token.
    Tokens,
    /// One a compression block.
    Blocks,
}
