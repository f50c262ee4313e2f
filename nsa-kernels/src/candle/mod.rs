//! Native Sparse Attention as [candle](candle_core) operations with gradients (features `candle`, `candle-cuda`).
//!
//! [`compress`] is φ, [`nsa_attention`] the three branches with selection and gate. Between them, and around them, a
//! model is candle's own: projections, RoPE on q, on k^slc and k^win, and on k̃ at positions i·d (SPEC 5).
//!
//! Both return tensors that are connected to candle's graph: `backward()` reaches every input tensor. All inputs of a call
//! are of one type and on one device:
//!
//! - on the CPU f32, f64, bf16 and f16, with sums in f32 or f64. The backend is
//!   [`Backend::pick`](crate::Backend::pick)'s, made once.
//! - with the feature `candle-cuda` on candle's CUDA devices, from compute capability 8.0 on, in f32, bf16 and f16, with sums
//!   in f32. Kernels run on candle's stream, in the order of its own, on the memory of its tensors; a
//!   [`Cuda`](crate::Cuda) is made once a stream. What holds for candle's operations holds for these: by default a device of
//!   candle is the stream of the thread that calls, so that threads which share a tensor wait for one another
//!   (`Device::synchronize`), or use `Device::new_cuda_with_stream`.
//!
//! With that feature candle compiles its kernels, for which `nvcc` of CUDA 13 is needed, and programs are linked to the
//! toolkit's libraries; nothing is then loaded when asked for. `cargo test -p nsa-kernels --features candle-cuda --test candle`
//! compares both places, on a GPU.
//!
//! A candle operation has at most three inputs, so each call concatenates its inputs into one tensor, through which
//! gradients flow back: inputs are copied once, and an operation's gradients come in the inputs' type. What the
//! backward pass needs (branch outputs, lse, selected blocks) lives as long as the result's graph.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use nsa_core::{CuSeqlens, NsaConfig};
//! use nsa_kernels::candle::{Attention, Phi, compress, nsa_attention};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = NsaConfig::small(); // 4 heads on 2 KV heads, dims 16, φ = mean
//! let cu_seqlens = CuSeqlens::from_lengths([40, 24])?; // two sequences, packed
//! let random = |shape: (usize, usize, usize)| Var::randn(0f32, 1.0, shape, &Device::Cpu);
//! let (q, gates) = (random((64, 4, 16))?, random((64, 4, 3))?);
//! let (k_raw, k_slc, k_win) = (random((64, 2, 16))?, random((64, 2, 16))?, random((64, 2, 16))?);
//! let (v_raw, v_slc, v_win) = (random((64, 2, 16))?, random((64, 2, 16))?, random((64, 2, 16))?);
//!
//! let k_cmp = compress(&config, &cu_seqlens, &k_raw, None, &Phi::Mean)?;
//! let v_cmp = compress(&config, &cu_seqlens, &v_raw, None, &Phi::Mean)?;
//! let gates = (gates.neg()?.exp()? + 1.0)?.recip()?; // sigmoid
//! let inputs = Attention { q: &q, k: [&k_cmp, &k_slc, &k_win], v: [&v_cmp, &v_slc, &v_win], gates: &gates };
//! let o: Tensor = nsa_attention(&config, &cu_seqlens, inputs)?;
//! assert_eq!(o.dims(), [64, 4, 16]);
//!
//! let gradients = o.sqr()?.sum_all()?.backward()?;
//! assert_eq!(gradients.get(&k_raw).unwrap().dims(), [64, 2, 16]);
//! # Ok(())
//! # }
//! ```

mod attention;
mod compress;
mod custom;
#[cfg(feature = "candle-cuda")]
mod device;
mod pack;
mod place;

pub use attention::{Attention, nsa_attention};
pub use compress::{Phi, compress};
