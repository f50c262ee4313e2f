//! Devices, contexts, errors.

use super::{CONTEXT, CURRENT, Outcome, STATE, bytes_mut, call, current, put, ready, started, state};
use crate::driver::error::CuError;
use crate::driver::state::{Setup, State};
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, MutexGuard};

/// The handle of the one memory pool.
const POOL: usize = 0x5000_0020;

exports! {
    /// Starts the driver.
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return Err(CuError::INVALID_VALUE);
        }
        STATE.get_or_init(|| Mutex::new(State::new(Setup::from_environment())));
        Ok(())
    }

    /// The version of the API.
    fn cuDriverGetVersion(version: *mut c_int) { put(version, 13000) }

    /// Number of devices.
    fn cuDeviceGetCount(count: *mut c_int) { ready()?; put(count, 1) }

    /// A device by number.
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        ready()?;
        if ordinal != 0 { Err(CuError::INVALID_DEVICE) } else { put(device, 0) }
    }

    /// A device's name.
    fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int) {
        let state = device_state(device)?;
        let full = state.setup.device.name.as_bytes();
        let out = bytes_mut(name.cast(), usize::try_from(length).map_err(|_| CuError::INVALID_VALUE)?)?;
        let Some(room) = out.len().checked_sub(1) else { return Err(CuError::INVALID_VALUE) };
        let count = full.len().min(room);
        out[..count].copy_from_slice(&full[..count]);
        out[count] = 0;
        Ok(())
    }

    /// A device's identifier.
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) {
        check_device(device)?;
        put(uuid, *b"cuda-sim-device0")
    }

    /// A device's memory.
    fn cuDeviceTotalMem_v2(total: *mut usize, device: c_int) {
        put(total, device_state(device)?.memory.total as usize)
    }

    /// A device's attribute.
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) {
        let state = device_state(device)?;
        put(value, state.setup.device.attribute(attribute).ok_or(CuError::INVALID_VALUE)?)
    }

    /// The memory pool that asynchronous allocations come from.
    fn cuDeviceGetDefaultMemPool(pool: *mut usize, device: c_int) { check_device(device)?; put(pool, POOL) }

    /// The memory pool that asynchronous allocations come from.
    fn cuDeviceGetMemPool(pool: *mut usize, device: c_int) { check_device(device)?; put(pool, POOL) }

    /// A pool's settings change nothing here.
    fn cuMemPoolSetAttribute(pool: usize, attribute: c_int, value: *mut c_void) {
        if pool != POOL || value.is_null() || !(1..=8).contains(&attribute) { Err(CuError::INVALID_VALUE) } else { Ok(()) }
    }

    /// A pool keeps nothing to give back.
    fn cuMemPoolTrimTo(pool: usize, _keep: usize) { if pool == POOL { Ok(()) } else { Err(CuError::INVALID_VALUE) } }

    /// Holds the primary context.
    fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) {
        let mut state = device_state(device)?;
        put(context, CONTEXT)?;
        state.retained += 1;
        Ok(())
    }

    /// Lets the primary context go; the last one ends it.
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        let mut state = device_state(device)?;
        match state.retained {
            0 => return Err(CuError::INVALID_CONTEXT),
            1 => state.reset(),
            _ => {}
        }
        state.retained -= 1;
        Ok(())
    }

    /// Ends the primary context.
    fn cuDevicePrimaryCtxReset_v2(device: c_int) { device_state(device)?.reset(); Ok(()) }

    /// The primary context's flags.
    fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut c_uint, active: *mut c_int) {
        let state = device_state(device)?;
        put(flags, 0)?;
        put(active, c_int::from(state.retained > 0))
    }

    /// Flags change nothing here.
    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, _flags: c_uint) { check_device(device) }

    /// The thread's context.
    fn cuCtxGetCurrent(context: *mut usize) { ready()?; put(context, CURRENT.get()) }

    /// Sets the thread's context.
    fn cuCtxSetCurrent(context: usize) {
        ready()?;
        if context != 0 && context != CONTEXT {
            return Err(CuError::INVALID_CONTEXT);
        }
        CURRENT.set(context);
        Ok(())
    }

    /// The thread's device.
    fn cuCtxGetDevice(device: *mut c_int) { current()?; put(device, 0) }

    /// Waits for everything, which is complete already.
    fn cuCtxSynchronize() { state()?.wait_all() }

    /// Priorities of streams.
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        current()?;
        put(least, 0)?;
        put(greatest, -5)
    }

    /// An error's name.
    fn cuGetErrorName(error: u32, name: *mut *const c_char) {
        match CuError(error).texts() {
            Some((found, _)) => put(name, found.as_ptr()),
            None => put(name, std::ptr::null()).and(Err(CuError::INVALID_VALUE)),
        }
    }

    /// An error's description.
    fn cuGetErrorString(error: u32, description: *mut *const c_char) {
        match CuError(error).texts() {
            Some((_, found)) => put(description, found.as_ptr()),
            None => put(description, std::ptr::null()).and(Err(CuError::INVALID_VALUE)),
        }
    }
}

fn device_state(device: c_int) -> Result<MutexGuard<'static, State>, CuError> {
    let state = started()?;
    if device == 0 { Ok(state) } else { Err(CuError::INVALID_DEVICE) }
}

fn check_device(device: c_int) -> Outcome {
    device_state(device).map(drop)
}
