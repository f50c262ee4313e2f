//! The three branches, selection and gate as an operation of candle.

use super::pack::{
    Part, Scalar, backend, elements, for_dtype, gradient, pack, sizes, unpack, unpack_mut, with_elements, wrap, zeros,
};
use crate::op::nsa as op;
use crate::{Element, Rows, TensorMut};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use nsa_core::{CuSeqlens, NsaConfig, Packing};
use std::sync::OnceLock;

const OP: &str = "candle::nsa_attention";

/// Inputs of [`nsa_attention`]. The same tensor may be passed for several branches.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Queries `[N, Hq, Dk]`.
    pub q: &'a Tensor,
    /// Keys: k̃ `[M, G, Dk]` from [`compress`](super::compress()), k^slc and k^win `[N, G, Dk]`.
    pub k: [&'a Tensor; 3],
    /// Values: ṽ `[M, G, Dv]`, v^slc and v^win `[N, G, Dv]`.
    pub v: [&'a Tensor; 3],
    /// Gates after the sigmoid, `[N, Hq, 3]`; order cmp, slc, win.
    pub gates: &'a Tensor,
}

/// Native Sparse Attention after φ, `[N, Hq, Dv]`: o_t,h = Σ_c g^c_t,h · o^c_t,h over compressed, selected and window
/// attention. Blocks are selected by the compressed branch; selection passes no gradient.
///
/// **Shapes**: on the fields of [`Attention`], with the sequences of `cu_seqlens`, each from position 0.
///
/// **Numerics**: those of [`op::nsa::forward`](crate::op::nsa::forward). Gradients reach every tensor of [`Attention`].
///
/// **Source**: SPEC 2, 3.
///
/// # Errors
/// If a shape or dtype does not fit, or a tensor is not on the CPU.
pub fn nsa_attention(config: &NsaConfig, cu_seqlens: &CuSeqlens, inputs: Attention<'_>) -> Result<Tensor> {
    for_dtype!(OP, inputs.q, apply(config, cu_seqlens, inputs))
}

fn apply<T: Scalar>(config: &NsaConfig, cu_seqlens: &CuSeqlens, inputs: Attention<'_>) -> Result<Tensor> {
    let packing = Packing::new(cu_seqlens.clone());
    let offsets = packing.cu_blocks(config).map_err(wrap)?;
    let op = Nsa::<T> { config: config.clone(), packing, cu_blocks: offsets, saved: OnceLock::new() };
    let names = ["q", "gates", "k_cmp", "k_slc", "k_win", "v_cmp", "v_slc", "v_win"];
    let Attention { q, k: [k_cmp, k_slc, k_win], v: [v_cmp, v_slc, v_win], gates } = inputs;
    let tensors = [q, gates, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win];
    let shapes = op.shapes().map(|shape| shape.to_vec());
    let parts: Vec<Part<'_>> =
        names.into_iter().zip(tensors).zip(shapes).map(|((name, tensor), shape)| (name, tensor, shape)).collect();
    pack(OP, &parts)?.apply_op1(op)
}

struct Nsa<T: Element> {
    config: NsaConfig,
    packing: Packing,
    cu_blocks: CuSeqlens,
    /// What the forward pass leaves for the backward pass.
    saved: OnceLock<Saved<T>>,
}

struct Saved<T: Element> {
    branches: [Vec<T>; 3],
    lse: [Vec<T::Acc>; 3],
    block_indices: Vec<i32>,
}

impl<T: Scalar> Nsa<T> {
    /// Shapes of the packed tensors: q, gates, keys and values of cmp, slc, win.
    fn shapes(&self) -> [[usize; 3]; 8] {
        let (n, m) = (self.packing.num_tokens(), self.cu_blocks.total());
        let (heads, groups) = (self.config.num_heads(), self.config.num_kv_heads());
        let (dk, dv) = (self.config.head_dim_qk(), self.config.head_dim_v());
        let (keys, values) = ([n, groups, dk], [n, groups, dv]);
        [[n, heads, dk], [n, heads, 3], [m, groups, dk], keys, keys, [m, groups, dv], values, values]
    }

    fn output_shape(&self) -> [usize; 3] {
        [self.packing.num_tokens(), self.config.num_heads(), self.config.head_dim_v()]
    }

    fn lse_shape(&self) -> [usize; 2] {
        [self.packing.num_tokens(), self.config.num_heads()]
    }

    fn lists_shape(&self) -> [usize; 3] {
        [self.packing.num_tokens(), self.config.num_kv_heads(), self.config.select_count()]
    }

    /// The packed tensors.
    fn inputs<'a>(&self, data: &'a [T]) -> crate::Result<[crate::Tensor<'a, T, 3>; 8]> {
        let shapes = self.shapes();
        let mut tensors = Vec::with_capacity(shapes.len());
        for (part, shape) in unpack(data, sizes(&shapes)).zip(shapes) {
            tensors.push(crate::Tensor::host(part, shape)?);
        }
        Ok(std::array::from_fn(|i| tensors[i]))
    }

    /// Runs the operator; returns o and what the backward pass needs.
    fn forward(&self, data: &[T]) -> crate::Result<(Vec<T>, Saved<T>)> {
        let output = || vec![T::default(); self.output_shape().iter().product()];
        let lse = || zeros::<T::Acc>(self.lse_shape().iter().product());
        let mut o = output();
        let mut saved = Saved {
            branches: [output(), output(), output()],
            lse: [lse(), lse(), lse()],
            block_indices: vec![0; self.lists_shape().iter().product()],
        };
        let [q, gates, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win] = self.inputs(data)?;
        let (blocks, tokens) = (&self.cu_blocks, self.packing.cu_seqlens());
        let rows = |cmp, slc, win| [Rows::packed(cmp, blocks), Rows::packed(slc, tokens), Rows::packed(win, tokens)];
        let [o_cmp, o_slc, o_win] = &mut saved.branches;
        let [lse_cmp, lse_slc, lse_win] = &mut saved.lse;
        let output = |data| TensorMut::host(data, self.output_shape());
        let lse = |data| TensorMut::host(data, self.lse_shape());
        let args = op::Forward {
            config: &self.config,
            packing: &self.packing,
            q,
            k: rows(k_cmp, k_slc, k_win),
            v: rows(v_cmp, v_slc, v_win),
            gates,
            selection: op::Selection::Compute(TensorMut::host(&mut saved.block_indices, self.lists_shape())?),
            saved: op::Saved {
                o: [output(o_cmp)?, output(o_slc)?, output(o_win)?],
                lse: [lse(lse_cmp)?, lse(lse_slc)?, lse(lse_win)?],
            },
            o: output(&mut o)?,
        };
        op::forward(backend()?, args)?;
        Ok((o, saved))
    }

    /// Gradients of the packed tensors, written in their order.
    fn backward(&self, data: &[T], d_o: &[T], saved: &Saved<T>, gradients: &mut [T::Acc]) -> crate::Result<()> {
        let shapes = self.shapes();
        let mut targets = Vec::with_capacity(shapes.len());
        for (part, shape) in unpack_mut(gradients, sizes(&shapes)).zip(shapes) {
            targets.push(TensorMut::host(part, shape)?);
        }
        let mut targets = targets.into_iter();
        let mut next = || targets.next().expect("packed in this order");
        let [q, gates, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win] = self.inputs(data)?;
        let output = |c: usize| crate::Tensor::host(&saved.branches[c], self.output_shape());
        let lse = |c: usize| crate::Tensor::host(&saved.lse[c], self.lse_shape());
        let args = op::Backward {
            config: &self.config,
            packing: &self.packing,
            q,
            k: [k_cmp, k_slc, k_win],
            v: [v_cmp, v_slc, v_win],
            gates,
            block_indices: crate::Tensor::host(&saved.block_indices, self.lists_shape())?,
            branches: [output(0)?, output(1)?, output(2)?],
            lse: [lse(0)?, lse(1)?, lse(2)?],
            d_o: crate::Tensor::host(d_o, self.output_shape())?,
            dq: next(),
            d_gates: next(),
            dk: [next(), next(), next()],
            dv: [next(), next(), next()],
        };
        op::backward(backend()?, args)
    }
}

impl<T: Scalar> CustomOp1 for Nsa<T> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (o, saved) = self.forward(elements(storage, layout)?).map_err(wrap)?;
        // An operation runs once; were it run again, it would leave the same.
        self.saved.get_or_init(|| saved);
        Ok((T::to_cpu_storage_owned(o), Shape::from(self.output_shape().as_slice())))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad_res: &Tensor) -> Result<Option<Tensor>> {
        let Some(saved) = self.saved.get() else { candle_core::bail!("{OP}: backward without a forward") };
        let mut gradients = zeros::<T::Acc>(arg.elem_count());
        with_elements(arg, |data| {
            with_elements(grad_res, |d_o| self.backward(data, d_o, saved, &mut gradients).map_err(wrap))
        })?;
        Ok(Some(gradient::<T>(&gradients, arg)?))
    }
}
