//! Device and host memory, copies.

use super::{Outcome, bytes, bytes_mut, call, current, host, put, state};
use crate::driver::error::CuError;
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
        let state = state()?;
        state.alive()?;
        if count == 0 {
            return Err(CuError::INVALID_VALUE);
        }
        put(address, state.memory.allocate(count as u64, false)?)
    }

    /// Frees device memory.
    fn cuMemFree_v2(address: u64) {
        let state = state()?;
        state.alive()?;
        if address == 0 { Ok(()) } else { Ok(state.memory.free(address)?) }
    }

    /// Allocates device memory in a stream's order.
    fn cuMemAllocAsync(address: *mut u64, count: usize, stream: usize) {
        let state = state()?;
        state.alive()?;
        state.check_stream(stream)?;
        if count == 0 {
            return put(address, 0);
        }
        put(address, state.memory.allocate(count as u64, false)?)
    }

    /// Frees device memory in a stream's order.
    fn cuMemFreeAsync(address: u64, stream: usize) {
        let state = state()?;
        state.alive()?;
        state.check_stream(stream)?;
        if address == 0 { Ok(()) } else { Ok(state.memory.free(address)?) }
    }

    /// Host memory for copies.
    fn cuMemHostAlloc(pointer: *mut *mut c_void, count: usize, _flags: c_uint) {
        state()?.alive()?;
        let mut memory = vec![0u64; count.div_ceil(8).max(1)].into_boxed_slice();
        let start = memory.as_mut_ptr();
        put(pointer, start.cast())?;
        host().pinned.insert(start as usize, memory);
        Ok(())
    }

    /// Frees host memory.
    fn cuMemFreeHost(pointer: *mut c_void) {
        current()?;
        host().pinned.remove(&(pointer as usize)).map(|_| ()).ok_or(CuError::INVALID_VALUE)
    }

    /// The device's address of host memory: kernels cannot reach the host's memory here.
    fn cuMemHostGetDevicePointer_v2(_device: *mut u64, _host: *mut c_void, _flags: c_uint) { Err(CuError::NOT_SUPPORTED) }

    /// Copies to the device.
    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, count: usize) { copy_in(to, from, count, 0) }

    /// Copies to the device.
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, count: usize, stream: usize) { copy_in(to, from, count, stream) }

    /// Copies to the host.
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, count: usize) { copy_out(to, from, count, 0) }

    /// Copies to the host.
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, count: usize, stream: usize) { copy_out(to, from, count, stream) }

    /// Copies on the device.
    fn cuMemcpyDtoD_v2(to: u64, from: u64, count: usize) { copy_within(to, from, count, 0) }

    /// Copies on the device.
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, count: usize, stream: usize) { copy_within(to, from, count, stream) }

    /// Fills with bytes.
    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) { fill(to, &[value], count, 0) }

    /// Fills with bytes.
    fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: usize) { fill(to, &[value], count, stream) }

    /// Fills with numbers of two bytes.
    fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: usize) { fill(to, &value.to_le_bytes(), count, stream) }

    /// Fills with numbers of four bytes.
    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) { fill(to, &value.to_le_bytes(), count, 0) }

    /// Fills with numbers of four bytes.
    fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: usize) { fill(to, &value.to_le_bytes(), count, stream) }
}

fn copy_in(to: u64, from: *const c_void, count: usize, stream: usize) -> Outcome {
    let state = state()?;
    state.alive()?;
    state.check_stream(stream)?;
    if count == 0 {
        return Ok(());
    }
    Ok(state.memory.copy_in(to, bytes(from, count)?)?)
}

fn copy_out(to: *mut c_void, from: u64, count: usize, stream: usize) -> Outcome {
    let state = state()?;
    state.alive()?;
    state.check_stream(stream)?;
    if count == 0 {
        return Ok(());
    }
    Ok(state.memory.copy_out(from, bytes_mut(to, count)?)?)
}

fn copy_within(to: u64, from: u64, count: usize, stream: usize) -> Outcome {
    let state = state()?;
    state.alive()?;
    state.check_stream(stream)?;
    Ok(state.memory.copy(to, from, count as u64)?)
}

fn fill(to: u64, pattern: &[u8], count: usize, stream: usize) -> Outcome {
    let state = state()?;
    state.alive()?;
    state.check_stream(stream)?;
    if !to.is_multiple_of(pattern.len() as u64) {
        return Err(CuError::INVALID_VALUE);
    }
    Ok(state.memory.copy_in(to, &pattern.repeat(count))?)
}
