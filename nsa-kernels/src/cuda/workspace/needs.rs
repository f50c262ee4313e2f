//! What operations take of a workspace, before any has run.

use super::Places;
use crate::Result;
use crate::cuda::geometry::Unit;
use crate::cuda::{Cuda, Device, SHARE_BYTES, cmp, compress, dense, gradients, slc};
use nsa_core::{CuSeqlens, DType, NsaConfig, Packing};

/// Bytes that operations take of a [`Workspace`](super::Workspace), by shapes and device alone, so that they are known before
/// anything is allocated, and without a GPU. Calls in one workspace take what the largest of them does. Tables of sequences and
/// pages are not counted, as in [`Workspace::bytes`](super::Workspace::bytes); `win` and `gate` forward take nothing; a decoding step has
/// [its own](crate::cuda::decode::workspace_bytes), layers have [theirs](super::layer).
///
/// ```
/// use nsa_core::{CompressKind, CuSeqlens, DType, NsaConfig, Packing};
/// use nsa_kernels::cuda::{Device, workspace::Needs};
///
/// let config = NsaConfig::builder(16, 1, 128, 128).compress_kind(CompressKind::Mean).build()?;
/// let packing = Packing::new(CuSeqlens::single(65_536)?);
/// let device = Device::a100();
/// let needs = Needs::new(&device, &config, &packing, DType::Bf16)?;
/// println!("{} MiB", needs.nsa_forward().max(needs.nsa_backward()) >> 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Needs<'a> {
    pub(in crate::cuda) device: &'a Device,
    pub(in crate::cuda) config: &'a NsaConfig,
    pub(in crate::cuda) packing: &'a Packing,
    pub(in crate::cuda) dtype: DType,
    pub(in crate::cuda) share_bytes: usize,
    blocks: CuSeqlens,
}

/// Which parts φ has of those that it may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhiParts {
    /// The embedding of positions.
    pub position: bool,
    /// The bias of the hidden units (`mlp`).
    pub bias1: bool,
    /// The bias of the outputs (`mlp`).
    pub bias2: bool,
}

impl Cuda {
    /// What operations on these sequences take of a workspace on this device.
    ///
    /// # Errors
    /// If sequences have more compression blocks than an i32 counts.
    pub fn needs<'a>(&'a self, config: &'a NsaConfig, packing: &'a Packing, dtype: DType) -> Result<Needs<'a>> {
        Ok(Needs::new(self.device(), config, packing, dtype)?.limit_shares(self.share_bytes()))
    }
}

impl<'a> Needs<'a> {
    /// Of operations on these sequences, of tensors of f32, bf16 or f16, on a device.
    ///
    /// # Errors
    /// If sequences have more compression blocks than an i32 counts.
    pub fn new(device: &'a Device, config: &'a NsaConfig, packing: &'a Packing, dtype: DType) -> Result<Self> {
        let blocks = packing.cu_blocks(config)?;
        Ok(Self { device, config, packing, dtype, share_bytes: SHARE_BYTES, blocks })
    }

    /// With a limit as [`Cuda::limit_shares`] sets it.
    pub fn limit_shares(self, bytes: usize) -> Self {
        Self { share_bytes: bytes, ..self }
    }

    /// Bytes of an element.
    pub(in crate::cuda) fn size(&self) -> usize {
        self.dtype.size_bytes()
    }

    /// Who makes products of matrices.
    pub(in crate::cuda) fn unit(&self) -> Unit {
        Unit::of(self.device.capability)
    }

    /// [`op::compress::forward`](crate::op::compress::forward) of rows of `dim` elements.
    pub fn compress_forward(&self, dim: usize, given: PhiParts) -> usize {
        compress::forward_places(self, dim, given).most()
    }

    /// [`op::compress::backward`](crate::op::compress::backward) of rows of `dim` elements, with gradients of all that is given.
    pub fn compress_backward(&self, dim: usize, given: PhiParts) -> usize {
        compress::backward_places(self, dim, given).most()
    }

    /// [`op::cmp::forward`](crate::op::cmp::forward): scores of long sequences.
    pub fn cmp_forward(&self) -> usize {
        cmp::forward_places(self).most()
    }

    /// [`op::cmp::backward`](crate::op::cmp::backward): facts of rows, and parts of gradients of keys.
    pub fn cmp_backward(&self) -> usize {
        gradients::places(self, gradients::Span::Visible, &self.blocks).most()
    }

    /// [`op::slc::forward`](crate::op::slc::forward): shares of outputs of small groups.
    pub fn slc_forward(&self) -> usize {
        slc::forward_places(self).most()
    }

    /// [`op::slc::backward`](crate::op::slc::backward): facts of rows, the inverse of the lists, and parts of gradients of keys.
    pub fn slc_backward(&self) -> usize {
        slc::backward_places(self).most()
    }

    /// [`op::win::backward`](crate::op::win::backward).
    pub fn win_backward(&self) -> usize {
        gradients::places(self, gradients::Span::Window, self.packing.cu_seqlens()).most()
    }

    /// [`op::nsa::forward`](crate::op::nsa::forward).
    pub fn nsa_forward(&self) -> usize {
        self.cmp_forward().max(self.slc_forward())
    }

    /// [`op::nsa::backward`](crate::op::nsa::backward).
    pub fn nsa_backward(&self) -> usize {
        self.cmp_backward().max(self.slc_backward()).max(self.win_backward())
    }

    /// [`op::dense::forward`](crate::op::dense::forward): shares of single queries' outputs.
    pub fn dense_forward(&self) -> usize {
        dense::forward_places(self).most()
    }

    /// The memory of an [`op::dense::Workspace`](crate::op::dense::Workspace) whose first batch are these sequences, in so many layers
    /// and pages of so many rows: shares of outputs, and where the caches lie. It has room for the next power of two of sequences and
    /// tokens.
    pub fn dense_step(&self, layers: usize, page_rows: usize) -> usize {
        dense::step::workspace_bytes(self, layers, page_rows)
    }

    /// [`op::dense::backward`](crate::op::dense::backward).
    pub fn dense_backward(&self) -> usize {
        gradients::places(self, gradients::Span::Dense, self.packing.cu_seqlens()).most()
    }
}

impl Places {
    /// Takes so many elements: the place's number.
    pub(in crate::cuda) fn take_of<T>(&mut self, len: usize) -> usize {
        self.take(super::bytes_of::<T>(len)).0
    }

    /// Bytes that were taken at once, at most.
    pub(in crate::cuda) fn most(&self) -> usize {
        self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::CompressKind;

    #[test]
    fn what_is_needed_is_known_without_a_device() {
        let of = |heads, tokens| {
            let config = NsaConfig::builder(heads, 1, 128, 128).compress_kind(CompressKind::Mean).build().unwrap();
            (config, Packing::new(CuSeqlens::single(tokens).unwrap()))
        };
        let (a100, h100) = (Device::a100(), Device::h100());
        let (config, packing) = of(16, 65_536);
        for device in [&a100, &h100] {
            let needs = Needs::new(device, &config, &packing, DType::Bf16).unwrap();
            // Two blocks a multiprocessor keep scores; queries of 16 heads walk.
            assert!(needs.cmp_forward() > 2 * device.multiprocessors * 4095 && needs.slc_forward() == 0);
            assert_eq!(needs.nsa_forward(), needs.cmp_forward());
            // Facts of rows, and less than the gradients of all keys of a few parts.
            let (facts, keys) = (65_536 * 16 * 16, 65_536 * 256 * 4);
            assert!((facts..facts + 2 * keys).contains(&needs.nsa_backward()), "{}", needs.nsa_backward());
            assert!(needs.dense_backward() >= facts && needs.dense_forward() == 0);
        }
        let (config, packing) = of(2, 32_768);
        let needs = Needs::new(&a100, &config, &packing, DType::Bf16).unwrap();
        let less = needs.clone().limit_shares(1 << 20);
        assert!((SHARE_BYTES / 2..2 * SHARE_BYTES).contains(&needs.slc_forward()), "{}", needs.slc_forward());
        assert!(less.slc_forward() < needs.slc_forward() / 10);
    }

    #[test]
    fn what_no_kernel_takes_needs_some_number() {
        let none = Device { multiprocessors: 0, shared_bytes: 0, ..Device::a100() };
        for device in [&none, &Device::h100()] {
            for (heads, dim) in [(1, 1), (1000, 256), (7, 5000)] {
                for kind in [CompressKind::Weighted, CompressKind::Mlp] {
                    let config = NsaConfig::builder(heads, 1, dim, dim).compress_kind(kind).compress_hidden(dim);
                    let config = config.build().unwrap();
                    for lengths in [vec![], vec![0, 0], vec![1, 40_000]] {
                        let packing = Packing::new(CuSeqlens::from_lengths(lengths).unwrap());
                        for dtype in [DType::F32, DType::Bf16] {
                            let needs = Needs::new(device, &config, &packing, dtype).unwrap();
                            let given = PhiParts { position: true, bias1: true, bias2: true };
                            let of_phi = needs.compress_forward(dim, given).max(needs.compress_backward(dim, given));
                            let of_nsa = needs.nsa_forward().max(needs.nsa_backward());
                            let all = of_phi.max(of_nsa).max(needs.dense_forward()).max(needs.dense_backward());
                            assert!(all < 1 << 40, "{heads} heads of {dim}: {all}");
                        }
                    }
                }
            }
        }
    }
}
