//! The whole operator after φ: three branches, selection and gate (SPEC 2, 3).

use super::{Shapes, cmp, gate, slc, win};
use crate::{Backend, Element, Result, Rows, Tensor, TensorMut, cuda};
use nsa_core::{NsaConfig, Packing};

/// Where the selected blocks come from.
#[derive(Debug)]
pub enum Selection<'a> {
    /// Selected here and written: `[N, G, n]`, ascending, padded with −1.
    Compute(TensorMut<'a, i32, 3>),
    /// Given: `[N, G, n]`, ascending, padded with −1.
    Given(Tensor<'a, i32, 3>),
}

/// What each branch leaves for the backward pass.
#[derive(Debug)]
pub struct Saved<'a, T: Element> {
    /// Written: the branches' outputs, each `[N, Hq, Dv]`; order cmp, slc, win.
    pub o: [TensorMut<'a, T, 3>; 3],
    /// Written: their lse, each `[N, Hq]`.
    pub lse: [TensorMut<'a, T::Acc, 2>; 3],
}

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Everything.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// Keys of the branches cmp (that is k̃), slc, win; rows as the branches' own operations take them.
    pub k: [Rows<'a, T>; 3],
    /// Values of the branches cmp (that is ṽ), slc, win.
    pub v: [Rows<'a, T>; 3],
    /// After the sigmoid, `[N, Hq, 3]`.
    pub gates: Tensor<'a, T, 3>,
    /// Selected blocks.
    pub selection: Selection<'a>,
    /// Written: per-branch outputs and lse.
    pub saved: Saved<'a, T>,
    /// Written: `[N, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
}

/// Arguments of [`backward`]; every sequence starts at position 0.
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Everything.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// k̃ `[M, G, Dk]`, k^slc, k^win `[N, G, Dk]`.
    pub k: [Tensor<'a, T, 3>; 3],
    /// ṽ `[M, G, Dv]`, v^slc, v^win `[N, G, Dv]`.
    pub v: [Tensor<'a, T, 3>; 3],
    /// After the sigmoid, `[N, Hq, 3]`.
    pub gates: Tensor<'a, T, 3>,
    /// The forward's `[N, G, n]`.
    pub block_indices: Tensor<'a, i32, 3>,
    /// The forward's per-branch outputs, each `[N, Hq, Dv]`.
    pub branches: [Tensor<'a, T, 3>; 3],
    /// The forward's per-branch lse, each `[N, Hq]`.
    pub lse: [Tensor<'a, T::Acc, 2>; 3],
    /// `[N, Hq, Dv]`.
    pub d_o: Tensor<'a, T, 3>,
    /// Written: `[N, Hq, Dk]`, the sum over the branches.
    pub dq: TensorMut<'a, T::Acc, 3>,
    /// Written: gradients of `k`.
    pub dk: [TensorMut<'a, T::Acc, 3>; 3],
    /// Written: gradients of `v`.
    pub dv: [TensorMut<'a, T::Acc, 3>; 3],
    /// Written: `[N, Hq, 3]`.
    pub d_gates: TensorMut<'a, T::Acc, 3>,
}

/// Native Sparse Attention after φ: o_t,h = Σ_c g^c_t,h · o^c_t,h over compressed, selected and window attention.
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: those of [`cmp::forward`], [`slc::forward`], [`win::forward`] and [`gate::forward`], in this order;
/// branch outputs are rounded to `T` before the gate.
///
/// **Source**: SPEC 2, the paper's equations 5 to 12; reference twin `nsa_ref::nsa`.
///
/// # Errors
/// If a shape does not fit, or a given block list is not strictly ascending candidates followed by −1.
pub fn forward<T: Element>(backend: &Backend, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "nsa::forward";
    let Forward { config, packing, q, k, v, gates, selection, saved, o } = args;
    let shapes = Shapes::new(OP, config, packing);
    gates.check(OP, "gates", [packing.num_tokens(), config.num_heads(), 3])?;
    o.check(OP, "o", shapes.outputs())?;
    let ([k_blocks, k_slc, k_win], [v_blocks, v_slc, v_win]) = (k, v);
    let Saved { o: [mut o_cmp, mut o_slc, mut o_win], lse: [lse_cmp, lse_slc, lse_win] } = saved;
    let (mut selected, given) = match selection {
        Selection::Compute(indices) => (Some(indices), None),
        Selection::Given(indices) => (None, Some(indices)),
    };
    let block_indices = selected.as_mut().map(|indices| indices.reborrow());
    let (o_branch, lse) = (o_cmp.reborrow(), lse_cmp);
    cmp::forward(backend, cmp::Forward { config, packing, q, k_blocks, v_blocks, o: o_branch, lse, block_indices })?;
    let block_indices = given.or_else(|| selected.as_ref().map(|indices| indices.as_tensor()));
    let block_indices = block_indices.expect("selected or given");
    let (o_branch, lse) = (o_slc.reborrow(), lse_slc);
    slc::forward(backend, slc::Forward { config, packing, q, k: k_slc, v: v_slc, block_indices, o: o_branch, lse })?;
    let window = win::Forward { config, packing, q, k: k_win, v: v_win, o: o_win.reborrow(), lse: lse_win };
    let [cmp, slc] = [o_cmp.as_tensor(), o_slc.as_tensor()];
    if let Backend::Cuda(cuda) = backend {
        window.check()?;
        return cuda::win::forward_gated(cuda, window, gates, [cmp, slc], o);
    }
    win::forward(backend, window)?;
    gate::forward(backend, gate::Forward { gates, branches: [cmp, slc, o_win.as_tensor()], o })
}

/// Gradients of [`forward`]: each branch's with do^c = g^c·do, dq their sum, and those of the gates.
///
/// **Shapes**: on the fields of [`Backward`].
///
/// **Numerics**: in A; dq adds up cmp, slc, win in this order. The same bits on any number of threads.
///
/// **Source**: SPEC 3; reference twin `nsa_ref::nsa`.
///
/// # Errors
/// If a shape does not fit, a sequence has a context, or a block list is not strictly ascending candidates followed
/// by −1.
pub fn backward<T: Element>(backend: &Backend, args: Backward<'_, T>) -> Result<()> {
    let Backward { config, packing, q, k, v, gates, block_indices, branches, lse, d_o, mut dq, dk, dv, mut d_gates } =
        args;
    let shapes = Shapes::new("nsa::backward", config, packing);
    shapes.whole_sequences()?;
    gates.check("nsa::backward", "gates", [packing.num_tokens(), config.num_heads(), 3])?;
    gate::backward(backend, gate::Backward { branches, d_o, d_gates: d_gates.reborrow() })?;
    let ([k_blocks, k_slc, k_win], [v_blocks, v_slc, v_win]) = (k, v);
    let ([dk_blocks, dk_slc, dk_win], [dv_blocks, dv_slc, dv_win]) = (dk, dv);
    let ([o_cmp, o_slc, o_win], [lse_cmp, lse_slc, lse_win]) = (branches, lse);
    let (gates, d_gates) = (Some(gates), Some(d_gates.as_tensor()));
    let args = cmp::Backward {
        config,
        packing,
        q,
        k_blocks,
        v_blocks,
        o: o_cmp,
        lse: lse_cmp,
        d_o,
        gates,
        d_gates,
        dq: dq.reborrow(),
        accumulate: false,
        dk_blocks,
        dv_blocks,
    };
    cmp::backward(backend, args)?;
    let args = slc::Backward {
        config,
        packing,
        q,
        k: k_slc,
        v: v_slc,
        block_indices,
        o: o_slc,
        lse: lse_slc,
        d_o,
        gates,
        d_gates,
        dq: dq.reborrow(),
        accumulate: true,
        dk: dk_slc,
        dv: dv_slc,
    };
    slc::backward(backend, args)?;
    let args = win::Backward {
        config,
        packing,
        q,
        k: k_win,
        v: v_win,
        o: o_win,
        lse: lse_win,
        d_o,
        gates,
        d_gates,
        dq,
        accumulate: true,
        dk: dk_win,
        dv: dv_win,
    };
    win::backward(backend, args)
}
