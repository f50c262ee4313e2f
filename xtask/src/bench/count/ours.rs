//! Our kernels of the operations that a peer has too, in the counting process; what they read and wrote goes into a file.

use super::process;
use crate::bench::work::Pass;
use anyhow::Result;
use half::bf16;
use nsa_core::{CuSeqlens, NsaConfig, Packing};
use nsa_kernels::op::{cmp, slc};
use nsa_kernels::{Backend, Buffer, Rows};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// An operation that both have.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// Attention to compressed blocks, importance and selection.
    #[serde(rename = "cmp forward")]
    CmpForward,
    #[serde(rename = "slc forward")]
    SlcForward,
    #[serde(rename = "cmp backward")]
    CmpBackward,
    /// With the inverse of the lists of blocks.
    #[serde(rename = "slc backward")]
    SlcBackward,
}

impl Op {
    /// As tables and lines of the counting process name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CmpForward => "cmp forward",
            Self::SlcForward => "slc forward",
            Self::CmpBackward => "cmp backward",
            Self::SlcBackward => "slc backward",
        }
    }

    /// Those of some passes; a backward pass needs the forward pass before it.
    pub fn of(passes: &[Pass]) -> &'static [Self] {
        const ALL: [Op; 4] = [Op::CmpForward, Op::SlcForward, Op::CmpBackward, Op::SlcBackward];
        if passes.contains(&Pass::Backward) { &ALL } else { &ALL[..2] }
    }
}

/// The file of a length in a folder.
pub fn file(folder: &Path, tokens: usize) -> PathBuf {
    folder.join(format!("{tokens}.safetensors"))
}

/// Counts the operations at a length, and writes their tensors into `folder`: inputs q, k, v, k_cmp, v_cmp, do; block_indices;
/// o_cmp, o_slc; with a backward pass dq, dk, dv of both in f32.
pub fn count(backend: &Backend, config: &NsaConfig, tokens: usize, ops: &[Op], folder: &Path) -> Result<()> {
    let mut attention = Attention::new(backend, config, tokens)?;
    for op in ops {
        match op {
            Op::CmpForward => attention.cmp_forward()?,
            Op::SlcForward => attention.slc_forward()?,
            Op::CmpBackward => attention.cmp_backward()?,
            Op::SlcBackward => attention.slc_backward()?,
        }
        process::done(backend, op.name(), tokens)?;
    }
    attention.write(&file(folder, tokens))
}

/// Tensors of a branch.
struct Branch {
    k: Buffer<bf16>,
    v: Buffer<bf16>,
    rows: CuSeqlens,
    o: Buffer<bf16>,
    lse: Buffer<f32>,
    dq: Buffer<f32>,
    dk: Buffer<f32>,
    dv: Buffer<f32>,
}

/// One random sequence.
struct Attention<'a> {
    backend: &'a Backend,
    config: &'a NsaConfig,
    packing: Packing,
    q: Buffer<bf16>,
    d_o: Buffer<bf16>,
    block_indices: Buffer<i32>,
    cmp: Branch,
    slc: Branch,
}

impl<'a> Attention<'a> {
    fn new(backend: &'a Backend, config: &'a NsaConfig, tokens: usize) -> Result<Self> {
        let packing = Packing::new(CuSeqlens::single(tokens)?);
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (dim_qk, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut random = |len: usize| {
            let values: Vec<bf16> = (0..len).map(|_| bf16::from_f64(rng.random_range(-1.7..1.7))).collect();
            backend.upload(&values)
        };
        let (q, d_o) = (random(tokens * heads * dim_qk), random(tokens * heads * dim_v));
        let mut branch = |rows: &CuSeqlens| Branch {
            k: random(rows.total() * groups * dim_qk),
            v: random(rows.total() * groups * dim_v),
            rows: rows.clone(),
            o: backend.alloc(tokens * heads * dim_v),
            lse: backend.alloc(tokens * heads),
            dq: backend.alloc(tokens * heads * dim_qk),
            dk: backend.alloc(rows.total() * groups * dim_qk),
            dv: backend.alloc(rows.total() * groups * dim_v),
        };
        let (cmp, slc) = (branch(&packing.cu_blocks(config)?), branch(packing.cu_seqlens()));
        let block_indices = backend.alloc(tokens * groups * config.select_count());
        Ok(Self { backend, config, packing, q, d_o, block_indices, cmp, slc })
    }

    /// Shapes of q, o, lse and the lists of blocks.
    fn shapes(&self) -> ([usize; 3], [usize; 3], [usize; 2], [usize; 3]) {
        let (n, heads, config) = (self.packing.num_tokens(), self.config.num_heads(), self.config);
        let lists = [n, config.num_kv_heads(), config.select_count()];
        ([n, heads, config.head_dim_qk()], [n, heads, config.head_dim_v()], [n, heads], lists)
    }

    fn cmp_forward(&mut self) -> Result<()> {
        let (q, o, lse, lists) = self.shapes();
        let (k_shape, v_shape) = self.cmp.shapes(self.config);
        let Branch { k, v, rows, o: out, lse: sums, .. } = &mut self.cmp;
        let args = cmp::Forward {
            config: self.config,
            packing: &self.packing,
            q: self.q.tensor(q)?,
            k_blocks: Rows::packed(k.tensor(k_shape)?, rows),
            v_blocks: Rows::packed(v.tensor(v_shape)?, rows),
            o: out.tensor_mut(o)?,
            lse: sums.tensor_mut(lse)?,
            block_indices: Some(self.block_indices.tensor_mut(lists)?),
        };
        Ok(cmp::forward(self.backend, args)?)
    }

    fn slc_forward(&mut self) -> Result<()> {
        let (q, o, lse, lists) = self.shapes();
        let (k_shape, v_shape) = self.slc.shapes(self.config);
        let Branch { k, v, rows, o: out, lse: sums, .. } = &mut self.slc;
        let args = slc::Forward {
            config: self.config,
            packing: &self.packing,
            q: self.q.tensor(q)?,
            k: Rows::packed(k.tensor(k_shape)?, rows),
            v: Rows::packed(v.tensor(v_shape)?, rows),
            block_indices: self.block_indices.tensor(lists)?,
            o: out.tensor_mut(o)?,
            lse: sums.tensor_mut(lse)?,
        };
        Ok(slc::forward(self.backend, args)?)
    }

    fn cmp_backward(&mut self) -> Result<()> {
        let (q, o, lse, _) = self.shapes();
        let (k_shape, v_shape) = self.cmp.shapes(self.config);
        let branch = &mut self.cmp;
        let args = cmp::Backward {
            config: self.config,
            packing: &self.packing,
            q: self.q.tensor(q)?,
            k_blocks: branch.k.tensor(k_shape)?,
            v_blocks: branch.v.tensor(v_shape)?,
            o: branch.o.tensor(o)?,
            lse: branch.lse.tensor(lse)?,
            d_o: self.d_o.tensor(o)?,
            gates: None,
            d_gates: None,
            dq: branch.dq.tensor_mut(q)?,
            accumulate: false,
            dk_blocks: branch.dk.tensor_mut(k_shape)?,
            dv_blocks: branch.dv.tensor_mut(v_shape)?,
        };
        Ok(cmp::backward(self.backend, args)?)
    }

    fn slc_backward(&mut self) -> Result<()> {
        let (q, o, lse, lists) = self.shapes();
        let (k_shape, v_shape) = self.slc.shapes(self.config);
        let branch = &mut self.slc;
        let args = slc::Backward {
            config: self.config,
            packing: &self.packing,
            q: self.q.tensor(q)?,
            k: branch.k.tensor(k_shape)?,
            v: branch.v.tensor(v_shape)?,
            block_indices: self.block_indices.tensor(lists)?,
            o: branch.o.tensor(o)?,
            lse: branch.lse.tensor(lse)?,
            d_o: self.d_o.tensor(o)?,
            gates: None,
            d_gates: None,
            dq: branch.dq.tensor_mut(q)?,
            accumulate: false,
            dk: branch.dk.tensor_mut(k_shape)?,
            dv: branch.dv.tensor_mut(v_shape)?,
        };
        Ok(slc::backward(self.backend, args)?)
    }

    fn write(&self, path: &Path) -> Result<()> {
        let brain = |name, buffer: &Buffer<bf16>| bytes(name, Dtype::BF16, buffer);
        let single = |name, buffer: &Buffer<f32>| bytes(name, Dtype::F32, buffer);
        let (cmp, slc) = (&self.cmp, &self.slc);
        let tensors = [
            brain("q", &self.q)?,
            brain("do", &self.d_o)?,
            brain("k_cmp", &cmp.k)?,
            brain("v_cmp", &cmp.v)?,
            brain("k", &slc.k)?,
            brain("v", &slc.v)?,
            bytes("block_indices", Dtype::I32, &self.block_indices)?,
            brain("o_cmp", &cmp.o)?,
            brain("o_slc", &slc.o)?,
            single("dq_cmp", &cmp.dq)?,
            single("dk_cmp", &cmp.dk)?,
            single("dv_cmp", &cmp.dv)?,
            single("dq_slc", &slc.dq)?,
            single("dk_slc", &slc.dk)?,
            single("dv_slc", &slc.dv)?,
        ];
        let views = tensors
            .iter()
            .map(|(name, dtype, len, bytes)| TensorView::new(*dtype, vec![*len], bytes).map(|view| (*name, view)));
        let views = views.collect::<Result<Vec<_>, _>>()?;
        Ok(safetensors::serialize_to_file(views, None, path)?)
    }
}

impl Branch {
    /// Of keys and of values.
    fn shapes(&self, config: &NsaConfig) -> ([usize; 3], [usize; 3]) {
        let (rows, groups) = (self.rows.total(), config.num_kv_heads());
        ([rows, groups, config.head_dim_qk()], [rows, groups, config.head_dim_v()])
    }
}

/// A buffer with its name, as bytes of the host.
fn bytes<T: bytemuck::Pod>(
    name: &'static str,
    dtype: Dtype,
    buffer: &Buffer<T>,
) -> Result<(&'static str, Dtype, usize, Vec<u8>)> {
    let mut values = vec![T::zeroed(); buffer.len()];
    buffer.read(&mut values)?;
    Ok((name, dtype, values.len(), bytemuck::cast_slice(&values).to_vec()))
}
