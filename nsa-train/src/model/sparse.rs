//! Native Sparse Attention between the projections of queries and output: three branches with keys and values of their
//! own, φ, gates.

use super::Dims;
use super::heads::Heads;
use super::pass::{Pass, Rows};
use super::profile::Phase;
use super::slots::{SideSlots, SparseSlots};
use super::workspace::Sizes;
use crate::Result;
use nsa_core::Real;
use nsa_kernels::layer::sigmoid;
use nsa_kernels::op::{compress, nsa};
use nsa_kernels::{Backend, Buffer, Element, Tensor};

/// What the forward pass leaves for the backward pass. Branches in the order cmp, slc, win.
#[derive(Debug)]
pub(crate) struct SparseActs<T: Element> {
    /// Raw keys `[N, G, Dk]` and values `[N, G, Dv]` of the compressed branch.
    k_cmp: Buffer<T>,
    v_cmp: Buffer<T>,
    /// k̃, k^slc, k^win.
    k: [Heads<T>; 3],
    /// ṽ `[M, G, Dv]`, v^slc, v^win `[N, G, Dv]`.
    v: [Buffer<T>; 3],
    /// Before and after the sigmoid `[N, Hq, 3]`.
    gate_logits: Buffer<T>,
    gates: Buffer<T>,
    /// Outputs of the branches, each `[N, Hq, Dv]`.
    o: [Buffer<T>; 3],
    /// Their lse, each `[N, Hq]`.
    lse: [Buffer<T::Acc>; 3],
    /// `[N, G, n]`.
    block_indices: Buffer<i32>,
}

impl<T: Element> SparseActs<T> {
    pub(crate) fn new(backend: &Backend, dims: &Dims, sizes: Sizes) -> Self {
        let Sizes { tokens, blocks } = sizes;
        let heads = |rows| Heads::new(backend, dims, rows, dims.groups, sizes);
        let each = |rows: usize, dim: usize| backend.alloc(rows * dims.groups * dim);
        Self {
            k_cmp: each(tokens, dims.head_dim),
            v_cmp: each(tokens, dims.v_head_dim),
            k: [Rows::Blocks, Rows::Tokens, Rows::Tokens].map(heads),
            v: [blocks, tokens, tokens].map(|rows| each(rows, dims.v_head_dim)),
            gate_logits: backend.alloc(tokens * dims.heads * 3),
            gates: backend.alloc(tokens * dims.heads * 3),
            o: std::array::from_fn(|_| backend.alloc(tokens * dims.heads * dims.v_head_dim)),
            lse: std::array::from_fn(|_| backend.alloc(tokens * dims.heads)),
            block_indices: backend.upload(&vec![0; tokens * dims.groups * dims.operator.select_count()]),
        }
    }

    /// The selection `[rows, G, n]`.
    pub(crate) fn selected_blocks(&self, dims: &Dims, rows: usize) -> Result<Vec<i32>> {
        let mut blocks = vec![0; rows * dims.groups * dims.operator.select_count()];
        self.block_indices.read(&mut blocks)?;
        Ok(blocks)
    }
}

/// Gradients of what [`SparseActs`] holds.
#[derive(Debug)]
pub(crate) struct SparseGrads<R: Real> {
    k_cmp: Buffer<R>,
    v_cmp: Buffer<R>,
    k: [Buffer<R>; 3],
    v: [Buffer<R>; 3],
    gate_logits: Buffer<R>,
    gates: Buffer<R>,
}

impl<R: Real> SparseGrads<R> {
    pub(crate) fn new(backend: &Backend, dims: &Dims, sizes: Sizes) -> Self {
        let Sizes { tokens, blocks } = sizes;
        let each = |rows: usize, dim: usize| backend.alloc(rows * dims.groups * dim);
        Self {
            k_cmp: each(tokens, dims.head_dim),
            v_cmp: each(tokens, dims.v_head_dim),
            k: [blocks, tokens, tokens].map(|rows| each(rows, dims.head_dim)),
            v: [blocks, tokens, tokens].map(|rows| each(rows, dims.v_head_dim)),
            gate_logits: backend.alloc(tokens * dims.heads * 3),
            gates: backend.alloc(tokens * dims.heads * 3),
        }
    }
}

/// `o` = NSA(q, φ(k_cmp), φ(v_cmp), k_slc, v_slc, k_win, v_win, gates), all but q projected from `normed`.
pub(crate) fn forward<T: Element>(
    pass: &mut Pass<'_, T>,
    slots: &SparseSlots,
    acts: &mut SparseActs<T>,
    (normed, q): (&Buffer<T>, &Heads<T>),
    o: &mut Buffer<T>,
) -> Result<()> {
    let dims = pass.dims;
    let [_, k_slc, k_win] = &mut acts.k;
    let [_, v_slc, v_win] = &mut acts.v;
    let targets = [(&mut acts.k_cmp, &mut acts.v_cmp), (k_slc.input(), v_slc), (k_win.input(), v_win)];
    for (branch, (k, v)) in slots.branches.iter().zip(targets) {
        pass.linear(Phase::Projection, &branch.k, normed, k)?;
        pass.linear(Phase::Projection, &branch.v, normed, v)?;
    }
    compress_side(pass, &slots.key_side, &acts.k_cmp, acts.k[0].input(), dims.head_dim)?;
    compress_side(pass, &slots.value_side, &acts.v_cmp, &mut acts.v[0], dims.v_head_dim)?;
    for (branch, keys) in slots.branches.iter().zip(&mut acts.k) {
        keys.finish(pass, branch.k_norm.as_ref())?;
    }
    let bias = Some(&slots.gate_bias);
    pass.linear_with_bias(Phase::Projection, &slots.gate_weight, bias, normed, &mut acts.gate_logits)?;
    let shape = [pass.inputs.rows(), 3 * dims.heads];
    let args = sigmoid::Forward { x: acts.gate_logits.tensor(shape)?, y: acts.gates.tensor_mut(shape)? };
    pass.run(Phase::Projection, |backend| sigmoid::forward(backend, args))?;
    attend(pass, acts, q, o)
}

fn compress_side<T: Element>(
    pass: &mut Pass<'_, T>,
    slots: &SideSlots,
    x: &Buffer<T>,
    blocks: &mut Buffer<T>,
    dim: usize,
) -> Result<()> {
    let (inputs, groups) = (pass.inputs, pass.dims.groups);
    let args = compress::Forward {
        config: &pass.dims.operator,
        packing: &inputs.packing,
        x: x.tensor([inputs.rows(), groups, dim])?,
        position: slots.position.as_ref().map(|slot| pass.weights.tensor(slot)).transpose()?,
        phi: slots.phi.phi(pass.weights)?,
        blocks: blocks.tensor_mut([inputs.block_rows(), groups, dim])?,
    };
    pass.run(Phase::Compression, |backend| compress::forward(backend, args))
}

fn attend<T: Element>(pass: &mut Pass<'_, T>, acts: &mut SparseActs<T>, q: &Heads<T>, o: &mut Buffer<T>) -> Result<()> {
    let (inputs, dims) = (pass.inputs, pass.dims);
    let (n, m) = (inputs.rows(), inputs.block_rows());
    let (blocks, tokens) = (&inputs.blocks, inputs.packing.cu_seqlens());
    let [k_cmp, k_slc, k_win] = &acts.k;
    let [v_cmp, v_slc, v_win] = &acts.v;
    let [o_cmp, o_slc, o_win] = &mut acts.o;
    let [lse_cmp, lse_slc, lse_win] = &mut acts.lse;
    let (o_shape, lse_shape) = (dims.o_shape(n), [n, dims.heads]);
    let selection = [n, dims.groups, dims.operator.select_count()];
    let args = nsa::Forward {
        config: &dims.operator,
        packing: &inputs.packing,
        q: q.out.tensor(dims.q_shape(n))?,
        k: [
            nsa_kernels::Rows::packed(k_cmp.out.tensor(dims.k_shape(m))?, blocks),
            nsa_kernels::Rows::packed(k_slc.out.tensor(dims.k_shape(n))?, tokens),
            nsa_kernels::Rows::packed(k_win.out.tensor(dims.k_shape(n))?, tokens),
        ],
        v: [
            nsa_kernels::Rows::packed(v_cmp.tensor(dims.v_shape(m))?, blocks),
            nsa_kernels::Rows::packed(v_slc.tensor(dims.v_shape(n))?, tokens),
            nsa_kernels::Rows::packed(v_win.tensor(dims.v_shape(n))?, tokens),
        ],
        gates: acts.gates.tensor([n, dims.heads, 3])?,
        selection: nsa::Selection::Compute(acts.block_indices.tensor_mut(selection)?),
        saved: nsa::Saved {
            o: [o_cmp.tensor_mut(o_shape)?, o_slc.tensor_mut(o_shape)?, o_win.tensor_mut(o_shape)?],
            lse: [lse_cmp.tensor_mut(lse_shape)?, lse_slc.tensor_mut(lse_shape)?, lse_win.tensor_mut(lse_shape)?],
        },
        o: o.tensor_mut(o_shape)?,
    };
    pass.run(Phase::Attention, |backend| nsa::forward(backend, args))
}

/// Writes the gradients of the operator's inputs; `d_q` becomes that of the rotated queries.
pub(crate) fn backward<T: Element>(
    pass: &mut Pass<'_, T>,
    (acts, q): (&SparseActs<T>, &Heads<T>),
    d: &mut SparseGrads<T::Acc>,
    (d_o, d_q): (Tensor<'_, T, 3>, &mut Buffer<T::Acc>),
) -> Result<()> {
    let (inputs, dims) = (pass.inputs, pass.dims);
    let (n, m) = (inputs.rows(), inputs.block_rows());
    let [k_cmp, k_slc, k_win] = &acts.k;
    let [v_cmp, v_slc, v_win] = &acts.v;
    let [o_cmp, o_slc, o_win] = &acts.o;
    let [lse_cmp, lse_slc, lse_win] = &acts.lse;
    let [dk_cmp, dk_slc, dk_win] = &mut d.k;
    let [dv_cmp, dv_slc, dv_win] = &mut d.v;
    let (k_shape, v_shape, o_shape, lse_shape) = (dims.k_shape(n), dims.v_shape(n), dims.o_shape(n), [n, dims.heads]);
    let args = nsa::Backward {
        config: &dims.operator,
        packing: &inputs.packing,
        q: q.out.tensor(dims.q_shape(n))?,
        k: [k_cmp.out.tensor(dims.k_shape(m))?, k_slc.out.tensor(k_shape)?, k_win.out.tensor(k_shape)?],
        v: [v_cmp.tensor(dims.v_shape(m))?, v_slc.tensor(v_shape)?, v_win.tensor(v_shape)?],
        gates: acts.gates.tensor([n, dims.heads, 3])?,
        block_indices: acts.block_indices.tensor([n, dims.groups, dims.operator.select_count()])?,
        branches: [o_cmp.tensor(o_shape)?, o_slc.tensor(o_shape)?, o_win.tensor(o_shape)?],
        lse: [lse_cmp.tensor(lse_shape)?, lse_slc.tensor(lse_shape)?, lse_win.tensor(lse_shape)?],
        d_o,
        dq: d_q.tensor_mut(dims.q_shape(n))?,
        dk: [dk_cmp.tensor_mut(dims.k_shape(m))?, dk_slc.tensor_mut(k_shape)?, dk_win.tensor_mut(k_shape)?],
        dv: [dv_cmp.tensor_mut(dims.v_shape(m))?, dv_slc.tensor_mut(v_shape)?, dv_win.tensor_mut(v_shape)?],
        d_gates: d.gates.tensor_mut([n, dims.heads, 3])?,
    };
    pass.run(Phase::AttentionBackward, |backend| nsa::backward(backend, args))
}

/// Passes the gradients of keys, values and gates on to `d_normed`, which is added to; `spare` is free for use.
pub(crate) fn backward_inputs<T: Element>(
    pass: &mut Pass<'_, T>,
    slots: &SparseSlots,
    acts: &SparseActs<T>,
    d: &mut SparseGrads<T::Acc>,
    (normed, d_normed, spare): (&Buffer<T>, &mut Buffer<T::Acc>, &mut Buffer<T::Acc>),
    grads: &mut Buffer<T::Acc>,
) -> Result<()> {
    let (dims, projection) = (pass.dims, Phase::Projection);
    let [cmp, slc, win] = &slots.branches;
    let [d_blocks, dk_slc, dk_win] = &mut d.k;
    let [dv_blocks, dv_slc, dv_win] = &d.v;

    let d_blocks = acts.k[0].backward(pass, cmp.k_norm.as_ref(), (d_blocks, spare), grads)?;
    compress_side_backward(pass, &slots.key_side, (&acts.k_cmp, d_blocks), &mut d.k_cmp, dims.head_dim, grads)?;
    compress_side_backward(pass, &slots.value_side, (&acts.v_cmp, dv_blocks), &mut d.v_cmp, dims.v_head_dim, grads)?;
    pass.linear_backward(projection, (&cmp.k, None), (normed, &d.k_cmp), (d_normed, true), grads)?;
    pass.linear_backward(projection, (&cmp.v, None), (normed, &d.v_cmp), (d_normed, true), grads)?;

    let others = [(slc, &acts.k[1], dk_slc, dv_slc), (win, &acts.k[2], dk_win, dv_win)];
    for (branch, keys, dk, dv) in others {
        let dk = keys.backward(pass, branch.k_norm.as_ref(), (dk, spare), grads)?;
        pass.linear_backward(projection, (&branch.k, None), (normed, dk), (d_normed, true), grads)?;
        pass.linear_backward(projection, (&branch.v, None), (normed, dv), (d_normed, true), grads)?;
    }

    let shape = [pass.inputs.rows(), 3 * dims.heads];
    let (y, dy) = (acts.gates.tensor(shape)?, d.gates.tensor(shape)?);
    let args = sigmoid::Backward { y, dy, dx: d.gate_logits.tensor_mut(shape)? };
    pass.run(projection, |backend| sigmoid::backward(backend, args))?;
    let weights = (&slots.gate_weight, Some(&slots.gate_bias));
    pass.linear_backward(projection, weights, (normed, &d.gate_logits), (d_normed, true), grads)
}

fn compress_side_backward<T: Element>(
    pass: &mut Pass<'_, T>,
    slots: &SideSlots,
    (x, d_blocks): (&Buffer<T>, &Buffer<T::Acc>),
    dx: &mut Buffer<T::Acc>,
    dim: usize,
    grads: &mut Buffer<T::Acc>,
) -> Result<()> {
    let (inputs, groups) = (pass.inputs, pass.dims.groups);
    let shape = [inputs.rows(), groups, dim];
    let (d_phi, d_position) = slots.phi.grads(slots.position.as_ref(), grads)?;
    let args = compress::Backward {
        config: &pass.dims.operator,
        packing: &inputs.packing,
        x: x.tensor(shape)?,
        position: slots.position.as_ref().map(|slot| pass.weights.tensor(slot)).transpose()?,
        phi: slots.phi.phi(pass.weights)?,
        d_blocks: d_blocks.tensor([inputs.block_rows(), groups, dim])?,
        dx: dx.tensor_mut(shape)?,
        d_position,
        d_phi,
    };
    pass.run(Phase::Compression, |backend| compress::backward(backend, args))
}
