//! Candle's CUDA tensors (feature `candle-cuda`): their memory is used where it lies, on candle's stream.

use super::pack::wrap;
use super::place::Number;
use crate::cuda::memory::{DeviceMem, DeviceMemMut};
use crate::mem::MemMut;
use crate::{Backend, Cuda, Mem};
use candle_core::cuda::CudaDType;
use candle_core::{CudaDevice, CudaStorage, Layout, Result};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits};
use std::sync::{Arc, Mutex, PoisonError};

/// Elements that candle keeps in a device's memory.
pub(super) trait Stored: CudaDType + DeviceRepr + ValidAsZeroBits {}

impl<T: CudaDType + DeviceRepr + ValidAsZeroBits> Stored for T {}

/// The backend on a stream of candle's, made once with the kernels that it has loaded. Devices of candle that share a stream
/// share it; it keeps the stream, so that no other stream gets its name.
fn backend(stream: Arc<CudaStream>) -> crate::Result<Backend> {
    static BACKENDS: Mutex<Vec<Cuda>> = Mutex::new(Vec::new());
    let mut backends = BACKENDS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(cuda) = backends.iter().find(|cuda| *cuda.stream() == stream) {
        return Ok(Backend::Cuda(cuda.clone()));
    }
    let cuda = Cuda::on_stream(stream)?;
    backends.push(cuda.clone());
    Ok(Backend::Cuda(cuda))
}

/// Calls `read` with the elements of a tensor.
pub(super) fn with_elements<T: Number, R>(
    storage: &CudaStorage,
    layout: &Layout,
    read: impl FnOnce(Mem<'_, T>) -> Result<R>,
) -> Result<R> {
    let Some((start, end)) = layout.contiguous_offsets() else { candle_core::bail!("a packed tensor has gaps") };
    let data = storage.as_cuda_slice::<T>()?;
    let result = read(Mem::Device(DeviceMem::from_slice(data)).slice(start..end).map_err(wrap)?);
    // Candle may copy from one stream to another, in the order that cudarc's events give: they get to know that the elements
    // were read up to here.
    drop(data.device_ptr(data.stream()));
    result
}

/// Elements in candle's memory that `write` writes over zeros.
pub(super) fn written<T: Number>(
    device: &CudaDevice,
    len: usize,
    write: impl FnOnce(&Backend, MemMut<'_, T>) -> Result<()>,
) -> Result<CudaStorage> {
    let stream = device.cuda_stream();
    let mut data = device.alloc_zeros::<T>(len)?;
    write(&backend(stream.clone()).map_err(wrap)?, MemMut::Device(DeviceMemMut::from_slice(&mut data)))?;
    // As above: written up to here.
    drop(data.device_ptr_mut(&stream));
    Ok(CudaStorage::wrap_cuda_slice(data, device.clone()))
}
