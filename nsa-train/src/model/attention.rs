//! The first half of a layer: x + o_proj(attention(h)) with h = RMSNorm(x); NSA or full attention.

use super::Dims;
use super::dense::{self, DenseActs, DenseGrads};
use super::heads::Heads;
use super::pass::{Pass, Rows};
use super::profile::Phase;
use super::slots::{AttentionSlots, CoreSlots};
use super::sparse::{self, SparseActs, SparseGrads};
use super::workspace::Sizes;
use crate::Result;
use nsa_kernels::{Backend, Buffer, Element};

/// What differs between the kinds of attention; slots, activations and gradients of a model are of one kind.
#[derive(Debug)]
enum Core<S, D> {
    Sparse(Box<S>),
    Dense(D),
}

const ONE_KIND: &str = "slots, activations and gradients come from one configuration";

/// What the forward pass leaves for the backward pass.
#[derive(Debug)]
pub(crate) struct AttentionActs<T: Element> {
    /// RMSNorm(x) `[N, C]`, and 1/rms `[N]`.
    normed: Buffer<T>,
    rstd: Buffer<T::Acc>,
    q: Heads<T>,
    core: Core<SparseActs<T>, DenseActs<T>>,
    /// `[N, Hq, Dv]`.
    o: Buffer<T>,
}

impl<T: Element> AttentionActs<T> {
    pub(crate) fn new(backend: &Backend, dims: &Dims, sizes: Sizes) -> Self {
        let core = match dims.sparse {
            true => Core::Sparse(Box::new(SparseActs::new(backend, dims, sizes))),
            false => Core::Dense(DenseActs::new(backend, dims, sizes)),
        };
        Self {
            normed: backend.alloc(sizes.tokens * dims.hidden),
            rstd: backend.alloc(sizes.tokens),
            q: Heads::new(backend, dims, Rows::Tokens, dims.heads, sizes),
            core,
            o: backend.alloc(sizes.tokens * dims.heads * dims.v_head_dim),
        }
    }

    /// The selection `[rows, G, n]`, if there is one.
    pub(crate) fn selected_blocks(&self, dims: &Dims, rows: usize) -> Result<Option<Vec<i32>>> {
        match &self.core {
            Core::Sparse(sparse) => sparse.selected_blocks(dims, rows).map(Some),
            Core::Dense(_) => Ok(None),
        }
    }
}

/// Gradients of the activations.
#[derive(Debug)]
pub(crate) struct AttentionGrads<T: Element> {
    /// `[N, Hq, Dv]`, as attention takes it.
    o: Buffer<T>,
    /// `[N, Hq, Dk]`.
    q: Buffer<T::Acc>,
    core: Core<SparseGrads<T::Acc>, DenseGrads<T::Acc>>,
    /// With QK-norm, a gradient before it: of queries, the largest heads, or of keys.
    spare: Buffer<T::Acc>,
}

impl<T: Element> AttentionGrads<T> {
    pub(crate) fn new(backend: &Backend, dims: &Dims, sizes: Sizes) -> Self {
        let core = match dims.sparse {
            true => Core::Sparse(Box::new(SparseGrads::new(backend, dims, sizes))),
            false => Core::Dense(DenseGrads::new(backend, dims, sizes)),
        };
        let queries = sizes.tokens * dims.heads * dims.head_dim;
        Self {
            o: backend.alloc(sizes.tokens * dims.heads * dims.v_head_dim),
            q: backend.alloc(queries),
            core,
            spare: backend.alloc(if dims.qk_norm { queries } else { 0 }),
        }
    }
}

/// `y` = x + o_proj(attention(RMSNorm(x))).
pub(crate) fn forward<T: Element>(
    pass: &mut Pass<'_, T>,
    slots: &AttentionSlots,
    acts: &mut AttentionActs<T>,
    x: &Buffer<T>,
    y: &mut Buffer<T>,
) -> Result<()> {
    let shape = [pass.inputs.rows(), pass.dims.hidden];
    pass.norm(&slots.norm, shape, x, &mut acts.normed, &mut acts.rstd)?;
    pass.linear(Phase::Projection, &slots.q, &acts.normed, acts.q.input())?;
    acts.q.finish(pass, slots.q_norm.as_ref())?;
    let inputs = (&acts.normed, &acts.q);
    match (&slots.core, &mut acts.core) {
        (CoreSlots::Sparse(slots), Core::Sparse(core)) => sparse::forward(pass, slots, core, inputs, &mut acts.o)?,
        (CoreSlots::Dense(slots), Core::Dense(core)) => dense::forward(pass, slots, core, inputs, &mut acts.o)?,
        _ => unreachable!("{ONE_KIND}"),
    }
    pass.linear(Phase::Projection, &slots.o, &acts.o, y)?;
    pass.add_residual(x, y)
}

/// Turns the gradient of the output, `residual`, into that of the input; `normed` is free for use.
pub(crate) fn backward<T: Element>(
    pass: &mut Pass<'_, T>,
    slots: &AttentionSlots,
    (acts, x): (&AttentionActs<T>, &Buffer<T>),
    d: &mut AttentionGrads<T>,
    (residual, normed): (&mut Buffer<T::Acc>, &mut Buffer<T::Acc>),
    grads: &mut Buffer<T::Acc>,
) -> Result<()> {
    pass.linear_backward(Phase::Projection, (&slots.o, None), (&acts.o, residual), (&mut d.o, false), grads)?;
    let d_o = d.o.tensor(pass.dims.o_shape(pass.inputs.rows()))?;
    match (&acts.core, &mut d.core) {
        (Core::Sparse(core), Core::Sparse(dc)) => sparse::backward(pass, (core, &acts.q), dc, (d_o, &mut d.q))?,
        (Core::Dense(core), Core::Dense(dc)) => {
            dense::backward(pass, (core, &acts.q, &acts.o), dc, (d_o, &mut d.q))?;
        }
        _ => unreachable!("{ONE_KIND}"),
    }
    let dq = acts.q.backward(pass, slots.q_norm.as_ref(), (&mut d.q, &mut d.spare), grads)?;
    pass.linear_backward(Phase::Projection, (&slots.q, None), (&acts.normed, dq), (normed, false), grads)?;
    let through = (&acts.normed, &mut *normed, &mut d.spare);
    match (&slots.core, &acts.core, &mut d.core) {
        (CoreSlots::Sparse(slots), Core::Sparse(core), Core::Sparse(d)) => {
            sparse::backward_inputs(pass, slots, core, d, through, grads)?;
        }
        (CoreSlots::Dense(slots), Core::Dense(core), Core::Dense(d)) => {
            dense::backward_inputs(pass, slots, core, d, through, grads)?;
        }
        _ => unreachable!("{ONE_KIND}"),
    }
    let shape = [pass.inputs.rows(), pass.dims.hidden];
    pass.norm_backward(&slots.norm, shape, (x, &acts.rstd), normed, (residual, true), grads)
}
