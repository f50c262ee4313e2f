//! Device and host memory, copies.

use super::stream::{now, submit};
use super::{Outcome, call, host, put, state};
use crate::driver::error::CuError;
use crate::driver::graph::Work;
use std::ffi::{c_uint, c_void};

exports! {
    /// Free and total memory.
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let state = state()?;
        state.alive()?;
        put(free, state.memory.free_bytes() as usize)?;
        put(total, state.memory.total as usize)
    }

    /// Allocates device memory.
    fn cuMemAlloc_v2(address: *mut u64, count: usize) {
        let mut state = state()?;
        state.unsafe_call()?;
        if count == 0 {
            return Err(CuError::INVALID_VALUE);
        }
        put(address, state.memory.allocate(count as u64, false)?)
    }

    /// Frees device memory.
    fn cuMemFree_v2(address: u64) {
        let mut state = state()?;
        state.unsafe_call()?;
        if address == 0 { Ok(()) } else { Ok(state.memory.free(address)?) }
    }

    /// Allocates device memory in a stream's order.
    fn cuMemAllocAsync(address: *mut u64, count: usize, stream: usize) {
        let mut state = state()?;
        if count == 0 {
            state.alive()?;
            state.check_stream(stream)?;
            return put(address, 0);
        }
        put(address, state.allocate_ordered(count as u64, stream)?)
    }

    /// Frees device memory in a stream's order.
    fn cuMemFreeAsync(address: u64, stream: usize) {
        if address != 0 {
            return submit(stream, Work::Free { address });
        }
        let state = state()?;
        state.alive()?;
        state.check_stream(stream)
    }

    /// What memory an address is of, if it is one that the driver knows; no other attribute.
    fn cuPointerGetAttribute(data: *mut c_void, attribute: c_uint, pointer: u64) {
        const MEMORY_TYPE: c_uint = 2;
        const HOST: c_uint = 1;
        const DEVICE: c_uint = 2;
        let state = state()?;
        state.alive()?;
        if attribute != MEMORY_TYPE {
            return Err(CuError::NOT_SUPPORTED);
        }
        if state.memory.find(pointer, 1).is_ok() {
            return put(data.cast(), DEVICE);
        }
        let (asked, host) = (pointer as usize, host());
        let mut pinned = host.pinned.iter().map(|(start, memory)| *start..*start + size_of_val(&**memory));
        if pinned.any(|range| range.contains(&asked)) { put(data.cast(), HOST) } else { Err(CuError::INVALID_VALUE) }
    }

    /// Host memory for copies.
    fn cuMemHostAlloc(pointer: *mut *mut c_void, count: usize, _flags: c_uint) {
        state()?.unsafe_call()?;
        let mut memory = vec![0u64; count.div_ceil(8).max(1)].into_boxed_slice();
        let start = memory.as_mut_ptr();
        put(pointer, start.cast())?;
        host().pinned.insert(start as usize, memory);
        Ok(())
    }

    /// Frees host memory.
    fn cuMemFreeHost(pointer: *mut c_void) {
        state()?.unsafe_call()?;
        host().pinned.remove(&(pointer as usize)).map(|_| ()).ok_or(CuError::INVALID_VALUE)
    }

    /// The device's address of host memory: kernels cannot reach the host's memory here.
    fn cuMemHostGetDevicePointer_v2(_device: *mut u64, _host: *mut c_void, _flags: c_uint) { Err(CuError::NOT_SUPPORTED) }

    /// Copies to the device.
    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, count: usize) { now(copy_in(to, from, count)?) }

    /// Copies to the device.
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, count: usize, stream: usize) {
        submit(stream, copy_in(to, from, count)?)
    }

    /// Copies to the host.
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, count: usize) { now(copy_out(to, from, count)?) }

    /// Copies to the host.
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, count: usize, stream: usize) {
        submit(stream, copy_out(to, from, count)?)
    }

    /// Copies on the device.
    fn cuMemcpyDtoD_v2(to: u64, from: u64, count: usize) { now(Work::Copy { to, from, bytes: count }) }

    /// Copies on the device.
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, count: usize, stream: usize) {
        submit(stream, Work::Copy { to, from, bytes: count })
    }

    /// Fills with bytes.
    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) { now(fill(to, &[value], count)?) }

    /// Fills with bytes.
    fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: usize) { submit(stream, fill(to, &[value], count)?) }

    /// Fills with numbers of two bytes.
    fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: usize) {
        submit(stream, fill(to, &value.to_le_bytes(), count)?)
    }

    /// Fills with numbers of four bytes.
    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) { now(fill(to, &value.to_le_bytes(), count)?) }

    /// Fills with numbers of four bytes.
    fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: usize) {
        submit(stream, fill(to, &value.to_le_bytes(), count)?)
    }
}

fn copy_in(to: u64, from: *const c_void, bytes: usize) -> Result<Work, CuError> {
    if bytes > 0 && from.is_null() {
        return Err(CuError::INVALID_VALUE);
    }
    Ok(Work::CopyIn { to, from: from as usize, bytes })
}

fn copy_out(to: *mut c_void, from: u64, bytes: usize) -> Result<Work, CuError> {
    if bytes > 0 && to.is_null() {
        return Err(CuError::INVALID_VALUE);
    }
    Ok(Work::CopyOut { to: to as usize, from, bytes })
}

fn fill(to: u64, pattern: &[u8], count: usize) -> Result<Work, CuError> {
    if !to.is_multiple_of(pattern.len() as u64) {
        return Err(CuError::INVALID_VALUE);
    }
    Ok(Work::Fill { to, pattern: pattern.to_vec(), count })
}
