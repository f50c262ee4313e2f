//! Full attention between the projections of queries and output.

use super::Dims;
use super::heads::Heads;
use super::pass::{Pass, Rows};
use super::profile::Phase;
use super::slots::BranchSlots;
use super::workspace::Sizes;
use crate::Result;
use nsa_core::Real;
use nsa_kernels::op::dense;
use nsa_kernels::{Backend, Buffer, Element, Tensor};

/// What the forward pass leaves for the backward pass.
#[derive(Debug)]
pub(crate) struct DenseActs<T: Element> {
    k: Heads<T>,
    /// `[N, G, Dv]`.
    v: Buffer<T>,
    /// `[N, Hq]`.
    lse: Buffer<T::Acc>,
}

impl<T: Element> DenseActs<T> {
    pub(crate) fn new(backend: &Backend, dims: &Dims, sizes: Sizes) -> Self {
        Self {
            k: Heads::new(backend, dims, Rows::Tokens, dims.groups, sizes),
            v: backend.alloc(sizes.tokens * dims.groups * dims.v_head_dim),
            lse: backend.alloc(sizes.tokens * dims.heads),
        }
    }
}

/// Gradients of keys and values.
#[derive(Debug)]
pub(crate) struct DenseGrads<R: Real> {
    /// `[N, G, Dk]`.
    k: Buffer<R>,
    /// `[N, G, Dv]`.
    v: Buffer<R>,
}

impl<R: Real> DenseGrads<R> {
    pub(crate) fn new(backend: &Backend, dims: &Dims, sizes: Sizes) -> Self {
        let each = |dim: usize| backend.alloc(sizes.tokens * dims.groups * dim);
        Self { k: each(dims.head_dim), v: each(dims.v_head_dim) }
    }
}

/// `o` = attention(q, k(normed), v(normed)).
pub(crate) fn forward<T: Element>(
    pass: &mut Pass<'_, T>,
    slots: &BranchSlots,
    acts: &mut DenseActs<T>,
    (normed, q): (&Buffer<T>, &Heads<T>),
    o: &mut Buffer<T>,
) -> Result<()> {
    pass.linear(Phase::Projection, &slots.k, normed, acts.k.input())?;
    pass.linear(Phase::Projection, &slots.v, normed, &mut acts.v)?;
    acts.k.finish(pass, slots.k_norm.as_ref())?;
    let (inputs, dims) = (pass.inputs, pass.dims);
    let (n, offsets) = (inputs.rows(), inputs.packing.cu_seqlens());
    let args = dense::Forward {
        config: &dims.operator,
        packing: &inputs.packing,
        q: q.out.tensor(dims.q_shape(n))?,
        k: nsa_kernels::Rows::packed(acts.k.out.tensor(dims.k_shape(n))?, offsets),
        v: nsa_kernels::Rows::packed(acts.v.tensor(dims.v_shape(n))?, offsets),
        o: o.tensor_mut(dims.o_shape(n))?,
        lse: acts.lse.tensor_mut([n, dims.heads])?,
    };
    pass.run(Phase::Attention, |backend| dense::forward(backend, args))
}

/// Writes the gradients of keys and values; `d_q` becomes that of the rotated queries.
pub(crate) fn backward<T: Element>(
    pass: &mut Pass<'_, T>,
    (acts, q, o): (&DenseActs<T>, &Heads<T>, &Buffer<T>),
    d: &mut DenseGrads<T::Acc>,
    (d_o, d_q): (Tensor<'_, T, 3>, &mut Buffer<T::Acc>),
) -> Result<()> {
    let (inputs, dims) = (pass.inputs, pass.dims);
    let n = inputs.rows();
    let args = dense::Backward {
        config: &dims.operator,
        packing: &inputs.packing,
        q: q.out.tensor(dims.q_shape(n))?,
        k: acts.k.out.tensor(dims.k_shape(n))?,
        v: acts.v.tensor(dims.v_shape(n))?,
        o: o.tensor(dims.o_shape(n))?,
        lse: acts.lse.tensor([n, dims.heads])?,
        d_o,
        dq: d_q.tensor_mut(dims.q_shape(n))?,
        accumulate: false,
        dk: d.k.tensor_mut(dims.k_shape(n))?,
        dv: d.v.tensor_mut(dims.v_shape(n))?,
    };
    pass.run(Phase::AttentionBackward, |backend| dense::backward(backend, args))
}

/// Passes the gradients of keys and values on to `d_normed`, which is added to; `spare` is free for use.
pub(crate) fn backward_inputs<T: Element>(
    pass: &mut Pass<'_, T>,
    slots: &BranchSlots,
    acts: &DenseActs<T>,
    d: &mut DenseGrads<T::Acc>,
    (normed, d_normed, spare): (&Buffer<T>, &mut Buffer<T::Acc>, &mut Buffer<T::Acc>),
    grads: &mut Buffer<T::Acc>,
) -> Result<()> {
    let dk = acts.k.backward(pass, slots.k_norm.as_ref(), (&mut d.k, spare), grads)?;
    pass.linear_backward(Phase::Projection, (&slots.k, None), (normed, dk), (d_normed, true), grads)?;
    pass.linear_backward(Phase::Projection, (&slots.v, None), (normed, &d.v), (d_normed, true), grads)
}
