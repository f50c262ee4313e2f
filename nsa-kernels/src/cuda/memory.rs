//! Memory of a device. An address is used on one stream only, that of the memory, so that all uses are in order.

use super::graph::{check_not_recording, target};
use super::{Cuda, failed, words};
use crate::{Error, Result};
use bytemuck::Pod;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError, result, sys};
use nsa_core::units::Bytes;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// A stream of the context, whose memory keeps no events: they would order uses on several streams, and there are none.
pub(super) fn own_stream(context: &Arc<CudaContext>) -> std::result::Result<Arc<CudaStream>, DriverError> {
    // SAFETY: the context is ours alone, and memory made from here on is used on the stream that it is made on, which
    // `Call` checks.
    unsafe { context.disable_event_tracking() };
    keep_freed_memory(context)?;
    context.new_stream()
}

/// Memory that is given back stays with the process for the next calls. Else the driver gives it back to the system whenever
/// the device is waited for, which training does every step, and making it anew takes longer than what it is used for.
fn keep_freed_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut most = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is the context's; the attribute takes the address of a 64-bit number, which is read at once.
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device())?;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut most).cast()).result()
    }
}

/// Elements in a device's memory that a caller owns.
#[derive(Debug)]
pub(crate) struct DeviceBuffer<T> {
    bytes: CudaSlice<u8>,
    len: usize,
    of: PhantomData<T>,
}

/// Elements in a device's memory, to read.
#[derive(Debug)]
pub struct DeviceMem<'a, T> {
    stream: &'a Arc<CudaStream>,
    address: u64,
    len: usize,
    of: PhantomData<&'a [T]>,
}

impl<T> Clone for DeviceMem<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceMem<'_, T> {}

/// Elements in a device's memory, to write.
#[derive(Debug)]
pub struct DeviceMemMut<'a, T> {
    stream: &'a Arc<CudaStream>,
    address: u64,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

impl<T: Pod> DeviceBuffer<T> {
    /// Zeros.
    pub(crate) fn zeros(cuda: &Cuda, len: usize) -> Result<Self> {
        let mut buffer = Self::unwritten(cuda, len)?;
        let zeroed = cuda.stream().memset_zeros(&mut buffer.bytes);
        zeroed.map_err(|error| failed("Backend::alloc", &error))?;
        Ok(buffer)
    }

    /// A copy of the host's elements.
    pub(crate) fn upload(cuda: &Cuda, data: &[T]) -> Result<Self> {
        let mut buffer = Self::unwritten(cuda, data.len())?;
        buffer.write("Backend::upload", data)?;
        Ok(buffer)
    }

    /// What was there before.
    pub(crate) fn unwritten(cuda: &Cuda, len: usize) -> Result<Self> {
        const OP: &str = "Backend::alloc";
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| isize::try_from(bytes).is_ok());
        let Some(bytes) = bytes else {
            return Err(Error::Device {
                op: OP.to_owned(),
                message: format!("{len} elements overflow the address space"),
            });
        };
        check_not_recording(cuda.stream(), || format!("{OP} of {bytes} bytes cannot be recorded: make memory before"))?;
        // SAFETY: every byte is a legal u8; who reads elements has written them or `zeros` did.
        let memory = unsafe { cuda.stream().alloc::<u8>(bytes.max(1)) };
        let memory = memory.map_err(|error| not_made(cuda, OP, bytes, &error))?;
        Ok(Self { bytes: memory, len, of: PhantomData })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Elements `range`.
    pub(crate) fn mem(&self, range: Range<usize>) -> DeviceMem<'_, T> {
        assert!(range.start <= range.end && range.end <= self.len, "checked before");
        let stream = self.bytes.stream();
        let (address, _) = self.bytes.device_ptr(stream);
        DeviceMem { stream, address: address + bytes(range.start, size_of::<T>()), len: range.len(), of: PhantomData }
    }

    /// Elements `range`, to write.
    pub(crate) fn mem_mut(&mut self, range: Range<usize>) -> DeviceMemMut<'_, T> {
        assert!(range.start <= range.end && range.end <= self.len, "checked before");
        let (address, _) = self.bytes.device_ptr(self.bytes.stream());
        let address = address + bytes(range.start, size_of::<T>());
        DeviceMemMut { stream: self.bytes.stream(), address, len: range.len(), of: PhantomData }
    }

    /// Copies the host's elements to the front.
    pub(crate) fn write(&mut self, op: &str, source: &[T]) -> Result<()> {
        self.mem_mut(0..source.len()).write(op, source)
    }

    /// Copies elements from the front to the host, and waits for them.
    pub(crate) fn read(&self, op: &str, target: &mut [T]) -> Result<()> {
        self.mem(0..self.len).read(op, target)
    }

    /// Copies elements `range` of another buffer to `offset` on.
    pub(crate) fn copy_from(
        &mut self,
        op: &'static str,
        offset: usize,
        source: &Self,
        range: Range<usize>,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let stream = self.bytes.stream().clone();
        if stream != *source.bytes.stream() {
            return Err(Error::Memory {
                op,
                arg: "source".to_owned(),
                expected: place(&stream),
                got: place(source.bytes.stream()),
            });
        }
        let (from, to) = (source.mem(range.clone()), self.mem_mut(offset..offset + range.len()));
        stream.context().bind_to_thread().map_err(|error| failed(op, &error))?;
        let size = size_of::<T>() * range.len();
        // SAFETY: both are borrowed, the target mutably, and hold so many bytes; their stream, or what records its work, orders
        // the copy among other uses.
        let copied = unsafe { result::memcpy_dtod_async(to.address, from.address, size, target(&stream).cu_stream()) };
        copied.map_err(|error| failed(op, &error))
    }
}

/// Elements that the host writes, and the device's copy of them.
#[derive(Debug)]
pub(crate) struct Mirror<T> {
    host: Vec<T>,
    device: DeviceBuffer<T>,
    /// What the device has others of.
    stale: Range<usize>,
}

impl<T: Pod + PartialEq> Mirror<T> {
    /// Zeros.
    pub(crate) fn zeros(cuda: &Cuda, len: usize) -> Result<Self> {
        Ok(Self { host: vec![T::zeroed(); len], device: DeviceBuffer::zeros(cuda, len)?, stale: 0..0 })
    }

    /// The host's elements.
    pub(crate) fn host(&self) -> &[T] {
        &self.host
    }

    /// Writes the host's elements from `start` on.
    pub(crate) fn set(&mut self, start: usize, new: &[T]) {
        let (range, stale) = (start..start + new.len(), &self.stale);
        let there = &mut self.host[range.clone()];
        if there == new {
            return;
        }
        there.copy_from_slice(new);
        let only = stale.start == stale.end;
        self.stale = if only { range } else { stale.start.min(range.start)..stale.end.max(range.end) };
    }

    /// Copies what the device has others of, in the order of its work.
    pub(crate) fn send(&mut self, op: &str) -> Result<()> {
        self.device.mem_mut(self.stale.clone()).write(op, &self.host[self.stale.clone()])?;
        self.stale = 0..0;
        Ok(())
    }

    /// The address of the device's elements from `start` on.
    pub(crate) fn address(&self, start: usize) -> u64 {
        self.device.mem(start..self.host.len()).address()
    }
}

/// The error for memory that the driver did not give.
fn not_made(cuda: &Cuda, op: &str, bytes: usize, error: &DriverError) -> Error {
    let left = cuda.stream().context().mem_get_info();
    let left = left.map_or_else(
        |_| String::new(),
        |(free, all)| format!("; {} of the {} of {} are free", Bytes(free as u64), Bytes(all as u64), cuda.name()),
    );
    Error::Device { op: op.to_owned(), message: format!("{} asked for: {}{left}", Bytes(bytes as u64), words(error)) }
}

fn bytes(elements: usize, size: usize) -> u64 {
    (elements * size) as u64
}

/// The name of a stream's memory, for errors.
fn place(stream: &CudaStream) -> String {
    format!("cuda:{}, stream {:#x}", stream.context().ordinal(), stream.cu_stream() as usize)
}

impl<'a, T> DeviceMem<'a, T> {
    /// Memory that cudarc holds, such as another library's tensor on the same device. Work on its stream is in order; the
    /// events by which cudarc orders several streams are recorded when an address is asked for, so whoever lets other streams
    /// use the memory asks for one again after the work (`CudaSlice::device_ptr`).
    pub fn from_slice(slice: &'a CudaSlice<T>) -> Self {
        let (address, _) = slice.device_ptr(slice.stream());
        Self { stream: slice.stream(), address, len: slice.len(), of: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first element's address.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Elements `range`.
    pub(crate) fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "checked before");
        Self { address: self.address + bytes(range.start, size_of::<T>()), len: range.len(), ..self }
    }

    /// The same elements under another name of their type, which must be as large.
    pub(crate) fn renamed<U>(self) -> DeviceMem<'a, U> {
        assert_eq!(size_of::<T>(), size_of::<U>(), "another type");
        DeviceMem { stream: self.stream, address: self.address, len: self.len, of: PhantomData }
    }

    pub(crate) fn check(&self, cuda: &Cuda, op: &'static str, arg: &str) -> Result<()> {
        check_stream(self.stream, cuda, op, arg)
    }

    pub(crate) fn place(&self) -> String {
        place(self.stream)
    }
}

impl<T: Pod> DeviceMem<'_, T> {
    /// Copies elements from the front to the host, and waits for them.
    pub(crate) fn read(&self, op: &str, target: &mut [T]) -> Result<()> {
        assert!(target.len() <= self.len, "checked before");
        if target.is_empty() {
            return Ok(());
        }
        check_not_recording(self.stream, || format!("{op} to the host cannot be recorded: read what is launched"))?;
        self.stream.context().bind_to_thread().map_err(|error| failed(op, &error))?;
        let target = bytemuck::cast_slice_mut::<T, u8>(target);
        // SAFETY: the memory is borrowed and holds as many bytes; the target is borrowed until the copy is complete.
        let copied = unsafe { result::memcpy_dtoh_async(target, self.address, self.stream.cu_stream()) };
        copied.map_err(|error| failed(op, &error))?;
        self.stream.synchronize().map_err(|error| failed(op, &error))
    }
}

impl<'a, T> DeviceMemMut<'a, T> {
    /// Memory that cudarc holds, such as another library's tensor on the same device. Other streams as in
    /// [`DeviceMem::from_slice`], by `CudaSlice::device_ptr_mut`.
    pub fn from_slice(slice: &'a mut CudaSlice<T>) -> Self {
        let stream = slice.stream().clone();
        let (address, _) = slice.device_ptr_mut(&stream);
        Self { address, len: slice.len(), stream: slice.stream(), of: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first element's address.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn check(&self, cuda: &Cuda, op: &'static str, arg: &str) -> Result<()> {
        check_stream(self.stream, cuda, op, arg)
    }

    pub(crate) fn place(&self) -> String {
        place(self.stream)
    }

    /// A shorter borrow.
    pub(crate) fn reborrow(&mut self) -> DeviceMemMut<'_, T> {
        DeviceMemMut { stream: self.stream, address: self.address, len: self.len, of: PhantomData }
    }

    /// A borrow to read.
    pub(crate) fn as_mem(&self) -> DeviceMem<'_, T> {
        DeviceMem { stream: self.stream, address: self.address, len: self.len, of: PhantomData }
    }

    /// The first `count` elements, and those after them.
    pub(crate) fn split_at(self, count: usize) -> (Self, Self) {
        assert!(count <= self.len, "checked before");
        let rest = self.address + bytes(count, size_of::<T>());
        let rest = Self { stream: self.stream, address: rest, len: self.len - count, of: PhantomData };
        (Self { len: count, ..self }, rest)
    }
}

impl<T: Pod> DeviceMemMut<'_, T> {
    /// Copies the host's elements to the front.
    pub(crate) fn write(&mut self, op: &str, source: &[T]) -> Result<()> {
        assert!(source.len() <= self.len, "checked before");
        if source.is_empty() {
            return Ok(());
        }
        check_not_recording(self.stream, || format!("{op} from the host cannot be recorded: copy before"))?;
        self.stream.context().bind_to_thread().map_err(|error| failed(op, &error))?;
        let source = bytemuck::cast_slice::<T, u8>(source);
        // SAFETY: the memory is borrowed mutably and as long as the source, whose bytes the driver has when this returns: it takes
        // them aside at once, or the copy is waited for.
        let copied = unsafe { result::memcpy_htod_async(self.address, source, self.stream.cu_stream()) };
        copied.map_err(|error| failed(op, &error))?;
        if is_read_in_place(self.stream.context(), source) {
            self.stream.synchronize().map_err(|error| failed(op, &error))?;
        }
        Ok(())
    }

    /// Sets the first `count` elements to `value`.
    pub(crate) fn fill(&mut self, op: &str, count: usize, value: T) -> Result<()> {
        assert!(count <= self.len, "checked before");
        let pattern = bytemuck::bytes_of(&value);
        let uniform = pattern.iter().all(|&byte| Some(&byte) == pattern.first());
        if count == 0 || size_of::<T>() == 0 {
            return Ok(());
        }
        if !uniform {
            return self.write(op, &vec![value; count]);
        }
        self.stream.context().bind_to_thread().map_err(|error| failed(op, &error))?;
        let (address, count, stream) = (self.address, size_of::<T>() * count, target(self.stream));
        // SAFETY: the memory is borrowed mutably and holds so many bytes.
        let set = unsafe { result::memset_d8_async(address, pattern[0], count, stream.cu_stream()) };
        set.map_err(|error| failed(op, &error))
    }
}

/// Whether copies to the device may read the host's bytes where they lie, after the call: where the driver knows them (pinned memory),
/// or the device reads all of the host's memory by the host's own page tables.
fn is_read_in_place(context: &CudaContext, source: &[u8]) -> bool {
    let by_page_tables = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES;
    if context.attribute(by_page_tables).is_ok_and(|uses| uses != 0) {
        return true;
    }
    let (kind, mut found) = (sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, 0u32);
    // SAFETY: the attribute is a 32-bit number, which is written at once; any address may be asked about.
    let known = unsafe { sys::cuPointerGetAttribute((&raw mut found).cast(), kind, source.as_ptr() as u64) };
    known.result().is_ok()
}

fn check_stream(stream: &Arc<CudaStream>, cuda: &Cuda, op: &'static str, arg: &str) -> Result<()> {
    if stream == cuda.stream() {
        return Ok(());
    }
    Err(Error::Memory { op, arg: arg.to_owned(), expected: place(cuda.stream()), got: place(stream) })
}
