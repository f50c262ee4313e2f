//! Queries and keys between projection and attention: QK-norm and rotation.

use super::Dims;
use super::pass::{Pass, Rows};
use super::slots::Slot;
use super::workspace::Sizes;
use crate::Result;
use nsa_core::Element;
use nsa_kernels::{Backend, Buffer};

/// Queries or keys as attention takes them: normalised if the model has QK-norm, then rotated.
#[derive(Debug)]
pub(crate) struct Heads<T: Element> {
    rows: Rows,
    heads: usize,
    /// `[rows, heads, Dk]`.
    pub(crate) out: Buffer<T>,
    /// With QK-norm, the values before it and 1/rms `[rows·heads]`.
    raw: Option<(Buffer<T>, Buffer<T::Acc>)>,
}

impl<T: Element> Heads<T> {
    pub(crate) fn new(backend: &Backend, dims: &Dims, rows: Rows, heads: usize, sizes: Sizes) -> Self {
        let count = match rows {
            Rows::Tokens => sizes.tokens,
            Rows::Blocks => sizes.blocks,
        };
        let size = count * heads * dims.head_dim;
        let raw = dims.qk_norm.then(|| (backend.alloc(size), backend.alloc(count * heads)));
        Self { rows, heads, out: backend.alloc(size), raw }
    }

    /// Where the projection or φ writes.
    pub(crate) fn input(&mut self) -> &mut Buffer<T> {
        self.raw.as_mut().map_or(&mut self.out, |(raw, _)| raw)
    }

    /// Normalises and rotates what [`Heads::input`] holds.
    pub(crate) fn finish(&mut self, pass: &mut Pass<'_, T>, norm: Option<&Slot>) -> Result<()> {
        if let (Some((raw, rstd)), Some(norm)) = (&mut self.raw, norm) {
            let shape = [pass.count(self.rows) * self.heads, pass.dims.head_dim];
            pass.norm(norm, shape, raw, &mut self.out, rstd)?;
        }
        pass.rotate(self.rows, self.heads, &mut self.out, false)
    }

    /// Turns the gradient `d` of the output into that of the input: in `d` itself, or with QK-norm in `spare`.
    pub(crate) fn backward<'b>(
        &self,
        pass: &mut Pass<'_, T>,
        norm: Option<&Slot>,
        (d, spare): (&'b mut Buffer<T::Acc>, &'b mut Buffer<T::Acc>),
        grads: &mut Buffer<T::Acc>,
    ) -> Result<&'b Buffer<T::Acc>> {
        pass.rotate(self.rows, self.heads, d, true)?;
        let (Some((raw, rstd)), Some(norm)) = (&self.raw, norm) else { return Ok(d) };
        let shape = [pass.count(self.rows) * self.heads, pass.dims.head_dim];
        pass.norm_backward(norm, shape, (raw, rstd), d, (spare, false), grads)?;
        Ok(spare)
    }
}
