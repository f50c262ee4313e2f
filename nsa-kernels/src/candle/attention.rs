//! The three branches, selection and gate as an operation of candle.

use super::custom::{Custom, Operation};
use super::pack::{Part, for_dtype, pack, sizes, unpack, unpack_mut, wrap};
use super::place::Scalar;
use crate::op::nsa as op;
use crate::{Backend, Buffer, Element, Error, Mem, Rows, TensorMut};
use candle_core::{Result, Tensor};
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
/// If a shape, dtype or device does not fit, or the device has no kernels for them.
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
    pack(OP, &parts)?.apply_op1(Custom(op))
}

struct Nsa<T: Element> {
    config: NsaConfig,
    packing: Packing,
    cu_blocks: CuSeqlens,
    /// What the forward pass leaves for the backward pass.
    saved: OnceLock<Saved<T>>,
}

struct Saved<T: Element> {
    branches: [Buffer<T>; 3],
    lse: [Buffer<T::Acc>; 3],
    block_indices: Buffer<i32>,
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

    fn lse_shape(&self) -> [usize; 2] {
        [self.packing.num_tokens(), self.config.num_heads()]
    }

    fn lists_shape(&self) -> [usize; 3] {
        [self.packing.num_tokens(), self.config.num_kv_heads(), self.config.select_count()]
    }

    /// The packed tensors.
    fn inputs<'a>(&self, data: Mem<'a, T>) -> crate::Result<[crate::Tensor<'a, T, 3>; 8]> {
        let shapes = self.shapes();
        let mut tensors = Vec::with_capacity(shapes.len());
        for (part, shape) in unpack(data, sizes(&shapes)).zip(shapes) {
            tensors.push(crate::Tensor::packed(part, shape)?);
        }
        Ok(std::array::from_fn(|i| tensors[i]))
    }

    /// Memory for what the backward pass needs.
    fn new_saved(&self, backend: &Backend) -> Saved<T> {
        let output = || backend.alloc(self.output_shape().iter().product());
        let lse = || backend.alloc(self.lse_shape().iter().product());
        Saved {
            branches: [output(), output(), output()],
            lse: [lse(), lse(), lse()],
            block_indices: backend.alloc(self.lists_shape().iter().product()),
        }
    }
}

impl<T: Scalar> Operation for Nsa<T> {
    const NAME: &'static str = OP;

    type Element = T;
    type Gradient = T;

    fn output_shape(&self) -> [usize; 3] {
        [self.packing.num_tokens(), self.config.num_heads(), self.config.head_dim_v()]
    }

    fn forward(&self, backend: &Backend, packed: Mem<'_, T>, o: TensorMut<'_, T, 3>) -> crate::Result<()> {
        let mut saved = self.new_saved(backend);
        let [q, gates, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win] = self.inputs(packed)?;
        let (blocks, tokens) = (&self.cu_blocks, self.packing.cu_seqlens());
        let rows = |cmp, slc, win| [Rows::packed(cmp, blocks), Rows::packed(slc, tokens), Rows::packed(win, tokens)];
        let [o_cmp, o_slc, o_win] = saved.branches.each_mut().map(|data| data.tensor_mut(self.output_shape()));
        let [lse_cmp, lse_slc, lse_win] = saved.lse.each_mut().map(|data| data.tensor_mut(self.lse_shape()));
        let args = op::Forward {
            config: &self.config,
            packing: &self.packing,
            q,
            k: rows(k_cmp, k_slc, k_win),
            v: rows(v_cmp, v_slc, v_win),
            gates,
            selection: op::Selection::Compute(saved.block_indices.tensor_mut(self.lists_shape())?),
            saved: op::Saved { o: [o_cmp?, o_slc?, o_win?], lse: [lse_cmp?, lse_slc?, lse_win?] },
            o,
        };
        op::forward(backend, args)?;
        // An operation runs once; were it run again, it would leave the same.
        self.saved.get_or_init(|| saved);
        Ok(())
    }

    fn backward(
        &self,
        backend: &Backend,
        packed: Mem<'_, T>,
        d_o: Mem<'_, T>,
        gradients: TensorMut<'_, T::Acc, 1>,
    ) -> crate::Result<()> {
        let saved = self.saved.get().ok_or_else(|| Error::Value {
            op: OP,
            arg: "result",
            value: "none".to_owned(),
            rule: "a backward pass follows a forward pass",
        })?;
        let shapes = self.shapes();
        let mut targets = Vec::with_capacity(shapes.len());
        for (part, shape) in unpack_mut(gradients, sizes(&shapes)).zip(shapes) {
            targets.push(part.reshape(shape)?);
        }
        let mut targets = targets.into_iter();
        let mut next = || targets.next().expect("packed in this order");
        let [q, gates, k_cmp, k_slc, k_win, v_cmp, v_slc, v_win] = self.inputs(packed)?;
        let output = |c: usize| saved.branches[c].tensor(self.output_shape());
        let lse = |c: usize| saved.lse[c].tensor(self.lse_shape());
        let args = op::Backward {
            config: &self.config,
            packing: &self.packing,
            q,
            k: [k_cmp, k_slc, k_win],
            v: [v_cmp, v_slc, v_win],
            gates,
            block_indices: saved.block_indices.tensor(self.lists_shape())?,
            branches: [output(0)?, output(1)?, output(2)?],
            lse: [lse(0)?, lse(1)?, lse(2)?],
            d_o: crate::Tensor::packed(d_o, self.output_shape())?,
            dq: next(),
            d_gates: next(),
            dk: [next(), next(), next()],
            dv: [next(), next(), next()],
        };
        op::backward(backend, args)
    }
}
