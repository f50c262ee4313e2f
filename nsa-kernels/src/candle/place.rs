//! Where candle's tensors lie, as this crate's memory and backends.

#[cfg(feature = "candle-cuda")]
use super::device;
use super::pack::wrap;
use crate::mem::{HOST, MemMut};
use crate::{Backend, Error, Mem};
use candle_core::{CpuStorage, Device, Layout, Result, Storage, Tensor, WithDType};
use std::sync::LazyLock;

#[cfg(not(feature = "candle-cuda"))]
mod device {
    /// Elements that lie where this build computes: any.
    pub trait Stored {}

    impl<T> Stored for T {}
}

/// An element type that both sides know.
pub(super) trait Scalar: crate::Element<Acc: Number> + Number {}

impl<T: crate::Element<Acc: Number> + Number> Scalar for T {}

/// What candle can hold wherever operations compute.
pub(super) trait Number: WithDType + bytemuck::Pod + device::Stored {}

impl<T: WithDType + bytemuck::Pod + device::Stored> Number for T {}

/// The backend of operations in the host's memory, with its scratch memory.
fn host() -> crate::Result<&'static Backend> {
    static BACKEND: LazyLock<crate::Result<Backend>> = LazyLock::new(|| Ok(Backend::pick(None)?.0));
    BACKEND.as_ref().map_err(Error::clone)
}

/// The place, in errors.
pub(super) fn name(device: &Device) -> String {
    match device {
        Device::Cpu => HOST.to_owned(),
        // With the number that tells one use of a GPU from another.
        device => format!("{device:?}"),
    }
}

/// The error for tensors where nothing computes.
pub(super) fn nowhere(op: &'static str, device: &Device) -> candle_core::Error {
    let advice = "move the tensors to the CPU, or to an NVIDIA GPU with the feature `candle-cuda`";
    wrap(Error::Unsupported { op, backend: name(device), what: "candle's tensors there".to_owned(), advice })
}

/// The elements of a tensor, as an operation's forward gets them.
pub(super) fn host_elements<'a, T: Number>(storage: &'a CpuStorage, layout: &Layout) -> Result<Mem<'a, T>> {
    let data = storage.as_slice::<T>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(Mem::Host(&data[start..end])),
        None => candle_core::bail!("a packed tensor has gaps"),
    }
}

/// Calls `read` with the elements of a tensor.
pub(super) fn with_elements<T: Number, R>(
    op: &'static str,
    tensor: &Tensor,
    read: impl FnOnce(Mem<'_, T>) -> Result<R>,
) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => read(host_elements(storage, layout)?),
        #[cfg(feature = "candle-cuda")]
        Storage::Cuda(storage) => device::with_elements(storage, layout, read),
        _ => Err(nowhere(op, tensor.device())),
    }
}

/// Elements in the host's memory that `write` writes over zeros.
pub(super) fn on_host<T: Number>(
    len: usize,
    write: impl FnOnce(&Backend, MemMut<'_, T>) -> Result<()>,
) -> Result<CpuStorage> {
    let mut data = vec![T::zeroed(); len];
    write(host().map_err(wrap)?, MemMut::Host(&mut data))?;
    Ok(T::to_cpu_storage_owned(data))
}

/// A tensor `[len]` beside others on a device, whose elements `write` writes over zeros.
pub(super) fn written<T: Number>(
    op: &'static str,
    device: &Device,
    len: usize,
    write: impl FnOnce(&Backend, MemMut<'_, T>) -> Result<()>,
) -> Result<Tensor> {
    let storage = match device {
        Device::Cpu => Storage::Cpu(on_host(len, write)?),
        #[cfg(feature = "candle-cuda")]
        Device::Cuda(device) => Storage::Cuda(device::written(device, len, write)?),
        device => return Err(nowhere(op, device)),
    };
    Ok(Tensor::from_storage(storage, len, candle_core::op::BackpropOp::none(), false))
}
