//! Modules, kernels, launches, tensor maps.

use super::stream::submit;
use super::{Outcome, bytes, call, put, state, text};
use crate::driver::error::CuError;
use crate::driver::graph::Work;
use crate::tensor_map::{BYTES, MAX_RANK, TensorMap};
use std::ffi::{c_char, c_int, c_uint, c_void};

exports! {
    /// Loads a module from a file of PTX.
    fn cuModuleLoad(module: *mut usize, path: *const c_char) {
        let path = text(path)?.to_string_lossy().into_owned();
        let source = std::fs::read_to_string(path).map_err(|_| CuError::FILE_NOT_FOUND)?;
        load(module, &source)
    }

    /// Loads a module from PTX text.
    fn cuModuleLoadData(module: *mut usize, image: *const c_void) { load(module, image_text(image)?) }

    /// Loads a module from PTX text; options change nothing here.
    fn cuModuleLoadDataEx(
        module: *mut usize, image: *const c_void, _count: c_uint, _options: *mut c_int, _values: *mut *mut c_void,
    ) {
        load(module, image_text(image)?)
    }

    /// Unloads a module.
    fn cuModuleUnload(module: usize) { state()?.unload(module) }

    /// A kernel of a module.
    fn cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) {
        let name = text(name)?.to_str().map_err(|_| CuError::NOT_FOUND)?;
        put(function, state()?.function(module, name)?)
    }

    /// A variable of a module.
    fn cuModuleGetGlobal_v2(address: *mut u64, count: *mut usize, module: usize, name: *const c_char) {
        let name = text(name)?.to_str().map_err(|_| CuError::NOT_FOUND)?;
        let (at, size) = state()?.variable(module, name)?;
        if !count.is_null() {
            put(count, size as usize)?;
        }
        if address.is_null() { Ok(()) } else { put(address, at) }
    }

    /// A kernel's attribute.
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: usize) {
        put(value, state()?.function_attribute(function, attribute)?)
    }

    /// Sets a kernel's attribute.
    fn cuFuncSetAttribute(function: usize, attribute: c_int, value: c_int) {
        state()?.set_function_attribute(function, attribute, value)
    }

    /// A preference that changes nothing here.
    fn cuFuncSetCacheConfig(function: usize, _config: c_int) { state()?.parameters(function).map(|_| ()) }

    /// CTAs that a multiprocessor holds.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(count: *mut c_int, function: usize, threads: c_int, dynamic: usize) {
        put(count, state()?.occupancy(function, threads, dynamic as u64)?)
    }

    /// CTAs that a multiprocessor holds.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        count: *mut c_int, function: usize, threads: c_int, dynamic: usize, _flags: c_uint,
    ) {
        put(count, state()?.occupancy(function, threads, dynamic as u64)?)
    }

    /// Runs a kernel.
    fn cuLaunchKernel(
        function: usize, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint, shared: c_uint,
        stream: usize, params: *mut *mut c_void, extra: *mut *mut c_void,
    ) {
        launch(function, [gx, gy, gz], [bx, by, bz], shared, stream, params, extra)
    }

    /// Runs a kernel; attributes beyond a cluster of one CTA are not supported.
    fn cuLaunchKernelEx(config: *const LaunchConfig, function: usize, params: *mut *mut c_void, extra: *mut *mut c_void) {
        if config.is_null() {
            return Err(CuError::INVALID_VALUE);
        }
        // SAFETY: not null, and the API asks for a readable configuration.
        let config = unsafe { &*config };
        let [gx, gy, gz, bx, by, bz, shared] = config.sizes;
        launch(function, [gx, gy, gz], [bx, by, bz], shared, config.stream, params, extra)
    }
}

exports! {
    /// Describes a tensor for bulk copies.
    fn cuTensorMapEncodeTiled(
        map: *mut [u8; BYTES], data_type: c_uint, rank: c_uint, address: u64, sizes: *const u64, strides: *const u64,
        tile: *const c_uint, steps: *const c_uint, interleave: c_uint, swizzle: c_uint, _promotion: c_uint, fill: c_uint,
    ) {
        let rank = rank as usize;
        if !(1..=MAX_RANK).contains(&rank) || fill > 1 || !(map as usize).is_multiple_of(64) {
            return Err(CuError::INVALID_VALUE);
        }
        if interleave != 0 {
            return Err(CuError::NOT_SUPPORTED);
        }
        let encoded = TensorMap {
            data_type,
            address,
            sizes: values(sizes, rank)?,
            strides: values(strides, rank - 1)?,
            tile: values(tile, rank)?,
            steps: values(steps, rank)?,
            swizzle,
            nan_fill: fill == 1,
        };
        if encoded.is_valid() { put(map, encoded.encode()) } else { Err(CuError::INVALID_VALUE) }
    }
}

fn values<T: Copy>(from: *const T, count: usize) -> Result<Vec<T>, CuError> {
    if count == 0 {
        return Ok(Vec::new());
    }
    if from.is_null() {
        return Err(CuError::INVALID_VALUE);
    }
    // SAFETY: not null, and the API asks for so many readable values.
    Ok((0..count).map(|at| unsafe { from.add(at).read_unaligned() }).collect())
}

/// `CUlaunchConfig`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LaunchConfig {
    /// Grid, block, bytes of dynamic shared memory.
    pub sizes: [c_uint; 7],
    /// The stream.
    pub stream: usize,
    /// Attributes.
    pub attributes: *const c_void,
    /// Their number.
    pub count: c_uint,
}

/// PTX text behind a pointer; binaries are told by how they begin.
fn image_text<'t>(image: *const c_void) -> Result<&'t str, CuError> {
    let start = text(image.cast())?;
    let begins = |magic: &[u8]| start.to_bytes().starts_with(magic);
    if begins(b"\x7fELF") || begins(&[0x50, 0xed, 0x55, 0xba]) {
        eprintln!("cuda-sim: the image is a binary; PTX text is needed");
        return Err(CuError::NO_BINARY_FOR_GPU);
    }
    start.to_str().map_err(|_| CuError::INVALID_IMAGE)
}

fn load(module: *mut usize, source: &str) -> Outcome {
    state()?.unsafe_call()?;
    let handle = state()?.load(source).map_err(|(error, what)| {
        eprintln!("cuda-sim: {what}");
        error
    })?;
    put(module, handle)
}

fn launch(
    function: usize,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: usize,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Outcome {
    let work = {
        let state = state()?;
        state.check_stream(stream)?;
        let ready = state.prepare(function, grid, block, shared)?;
        let (places, size) = state.parameters(function)?;
        Work::Launch(ready, arguments(&places, size, params, extra)?)
    };
    submit(stream, work)
}

/// A kernel's parameters from pointers to each, or from one buffer.
fn arguments(
    places: &[(u32, u32)],
    size: u32,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Result<Vec<u8>, CuError> {
    let mut out = vec![0; size as usize];
    if places.is_empty() {
        return Ok(out);
    }
    if !extra.is_null() {
        return packed_arguments(size, extra);
    }
    if params.is_null() {
        return Err(CuError::INVALID_VALUE);
    }
    for (number, (offset, count)) in places.iter().enumerate() {
        // SAFETY: not null, and the API asks for a pointer for each of the kernel's parameters.
        let pointer = unsafe { params.add(number).read() };
        out[*offset as usize..(*offset + *count) as usize].copy_from_slice(bytes(pointer, *count as usize)?);
    }
    Ok(out)
}

/// `CU_LAUNCH_PARAM_BUFFER_POINTER`, `_SIZE`, `_END`
fn packed_arguments(size: u32, extra: *mut *mut c_void) -> Result<Vec<u8>, CuError> {
    let (mut buffer, mut count) = (std::ptr::null_mut(), None);
    for pair in 0..3 {
        // SAFETY: the API asks for pairs of a key and a value that end with a null key.
        let key = unsafe { extra.add(2 * pair).read() } as usize;
        if key == 0 {
            break;
        }
        // SAFETY: as above: a key that is not null is followed by its value.
        let value = unsafe { extra.add(2 * pair + 1).read() };
        match key {
            1 => buffer = value,
            // SAFETY: the value of this key points to a size.
            2 if !value.is_null() => count = Some(unsafe { value.cast::<usize>().read_unaligned() }),
            _ => return Err(CuError::INVALID_VALUE),
        }
    }
    match count {
        Some(count) if count >= size as usize => Ok(bytes(buffer, count)?[..size as usize].to_vec()),
        _ => Err(CuError::INVALID_VALUE),
    }
}
