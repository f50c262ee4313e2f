//! The exported functions. Each one turns raw pointers into checked values, calls the state and gives a code.
//!
//! # Safety
//! As in the CUDA driver API: pointers must be valid for what the function reads and writes. Null pointers and handles
//! that the driver never gave are errors, not undefined behaviour.

use super::error::CuError;
use super::state::State;
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

type Outcome = Result<(), CuError>;

/// The handle of the one primary context.
const CONTEXT: usize = 0x5000_0010;

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Host memory that the driver gave.
struct Host {
    pinned: HashMap<usize, Box<[u64]>>,
}

static STATE: OnceLock<Mutex<State>> = OnceLock::new();
static HOST: OnceLock<Mutex<Host>> = OnceLock::new();

fn started() -> Result<MutexGuard<'static, State>, CuError> {
    let state = STATE.get().ok_or(CuError::NOT_INITIALIZED)?;
    Ok(state.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The state, where the thread has a context.
fn state() -> Result<MutexGuard<'static, State>, CuError> {
    let state = started()?;
    if CURRENT.get() == 0 { Err(CuError::INVALID_CONTEXT) } else { Ok(state) }
}

fn ready() -> Outcome {
    started().map(drop)
}

fn current() -> Outcome {
    state().map(drop)
}

fn host() -> MutexGuard<'static, Host> {
    let host = HOST.get_or_init(|| Mutex::new(Host { pinned: HashMap::new() }));
    host.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call's code; a panic must not cross the C ABI.
fn call(body: impl FnOnce() -> Outcome + std::panic::UnwindSafe) -> u32 {
    match std::panic::catch_unwind(body) {
        Ok(Ok(())) => CuError::SUCCESS.0,
        Ok(Err(error)) => error.0,
        Err(_) => CuError::UNKNOWN.0,
    }
}

fn put<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(CuError::INVALID_VALUE);
    }
    // SAFETY: not null, and the API asks for a pointer that may be written.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

fn text<'t>(from: *const c_char) -> Result<&'t CStr, CuError> {
    if from.is_null() {
        return Err(CuError::INVALID_VALUE);
    }
    // SAFETY: not null, and the API asks for a text that ends with NUL.
    Ok(unsafe { CStr::from_ptr(from) })
}

fn bytes<'b>(from: *const c_void, count: usize) -> Result<&'b [u8], CuError> {
    if count == 0 {
        return Ok(&[]);
    }
    if from.is_null() {
        return Err(CuError::INVALID_VALUE);
    }
    // SAFETY: not null, and the API asks for so many readable bytes.
    Ok(unsafe { std::slice::from_raw_parts(from.cast(), count) })
}

fn bytes_mut<'b>(to: *mut c_void, count: usize) -> Result<&'b mut [u8], CuError> {
    if count == 0 {
        return Ok(&mut []);
    }
    if to.is_null() {
        return Err(CuError::INVALID_VALUE);
    }
    // SAFETY: not null, and the API asks for so many writable bytes that nobody else uses.
    Ok(unsafe { std::slice::from_raw_parts_mut(to.cast(), count) })
}

/// Exports functions whose bodies give an [`Outcome`].
macro_rules! exports {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {
        $($(#[$doc])*
        ///
        /// # Safety
        /// As this module says.
        // SAFETY: the name is the driver API's, and nothing else in the library has it.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> u32 {
            call(std::panic::AssertUnwindSafe(move || -> Outcome { $body }))
        })*
    };
}

mod blas;
mod device;
mod launch;
mod memory;
mod stream;
