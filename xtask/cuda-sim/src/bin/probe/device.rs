//! The device behind libcuda, loaded by name as programs do.

use cuda_sim::probe::{Case, TensorMap};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};

/// What output holds before a kernel runs.
const FILL: u8 = 0xa5;
/// Bytes of `CUtensorMap`.
const MAP_BYTES: usize = 128;

/// Functions of the driver API; each one answers a `CUresult`.
macro_rules! api {
    ($($name:ident($($arg:ident: $ty:ty),*);)*) => {
        /// The driver API's functions that the probe calls.
        #[expect(non_snake_case, reason = "the driver API's names")]
        pub struct Api {
            _library: libloading::Library,
            $($name: unsafe extern "C" fn($($ty),*) -> u32,)*
        }

        impl Api {
            /// Loads libcuda.
            pub fn load() -> Result<Self, String> {
                // SAFETY: libcuda's initialisers run as in any CUDA program.
                let library = unsafe { libloading::Library::new("libcuda.so").or_else(|_| libloading::Library::new("libcuda.so.1")) };
                let library = library.map_err(|error| error.to_string())?;
                Ok(Self {
                    $($name: {
                        // SAFETY: the types are those of the driver API.
                        let symbol = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) };
                        *symbol.map_err(|error: libloading::Error| error.to_string())?
                    },)*
                    _library: library,
                })
            }

            $(
                #[expect(non_snake_case, reason = "the driver API's names")]
                #[doc = "Calls the driver."]
                pub fn $name(&self, $($arg: $ty),*) -> u32 {
                    // SAFETY: callers hand over pointers to live values of the sizes that the driver API asks for.
                    unsafe { (self.$name)($($arg),*) }
                }
            )*
        }
    };
}

api! {
    cuInit(flags: c_uint);
    cuDriverGetVersion(version: *mut c_int);
    cuDeviceGet(device: *mut c_int, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int);
    cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int);
    cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int);
    cuDevicePrimaryCtxRelease_v2(device: c_int);
    cuCtxSetCurrent(context: usize);
    cuCtxGetCurrent(context: *mut usize);
    cuCtxSynchronize();
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuMemAlloc_v2(address: *mut u64, bytes: usize);
    cuMemFree_v2(address: u64);
    cuMemAllocAsync(address: *mut u64, bytes: usize, stream: usize);
    cuMemFreeAsync(address: u64, stream: usize);
    cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize);
    cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize);
    cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize);
    cuMemsetD8_v2(to: u64, value: u8, bytes: usize);
    cuMemsetD32_v2(to: u64, value: u32, count: usize);
    cuMemFreeHost(pointer: *mut c_void);
    cuModuleLoadData(module: *mut usize, image: *const c_void);
    cuModuleUnload(module: usize);
    cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char);
    cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, module: usize, name: *const c_char);
    cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: usize);
    cuFuncSetAttribute(function: usize, attribute: c_int, value: c_int);
    cuOccupancyMaxActiveBlocksPerMultiprocessor(count: *mut c_int, function: usize, threads: c_int, dynamic: usize);
    cuLaunchKernel(
        function: usize, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint, shared: c_uint,
        stream: usize, params: *mut *mut c_void, extra: *mut *mut c_void
    );
    cuStreamCreate(stream: *mut usize, flags: c_uint);
    cuStreamDestroy_v2(stream: usize);
    cuStreamSynchronize(stream: usize);
    cuEventCreate(event: *mut usize, flags: c_uint);
    cuEventRecord(event: usize, stream: usize);
    cuEventQuery(event: usize);
    cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize);
    cuEventDestroy_v2(event: usize);
    cuGetErrorName(error: u32, name: *mut *const c_char);
    cuTensorMapEncodeTiled(
        map: *mut c_void, data_type: c_uint, rank: c_uint, address: u64, sizes: *const u64, strides: *const u64,
        tile: *const c_uint, steps: *const c_uint, interleave: c_uint, swizzle: c_uint, promotion: c_uint, fill: c_uint
    );
}

impl Api {
    /// An error's name.
    pub fn error_name(&self, code: u32) -> String {
        let mut name = std::ptr::null();
        if self.cuGetErrorName(code, &mut name) != 0 || name.is_null() {
            return String::new();
        }
        // SAFETY: the driver gave a static text.
        unsafe { std::ffi::CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }
}

/// A device with a context.
pub struct Device {
    /// The driver.
    pub api: Api,
    /// major · 10 + minor
    pub capability: u32,
    /// Device, capability, driver as lines of text.
    pub description: String,
}

/// A kernel launch's parameters: pointers to values.
fn pointers(values: &mut [Vec<u8>]) -> Vec<*mut c_void> {
    values.iter_mut().map(|value| value.as_mut_ptr().cast()).collect()
}

impl Device {
    /// Opens the first device and makes its context current.
    pub fn open() -> Result<Self, String> {
        let api = Api::load()?;
        let check = |what: &str, code: u32| if code == 0 { Ok(()) } else { Err(format!("{what}: code {code}")) };
        check("cuInit", api.cuInit(0))?;
        let (mut device, mut version, mut context) = (0, 0, 0);
        check("cuDeviceGet", api.cuDeviceGet(&mut device, 0))?;
        check("cuDriverGetVersion", api.cuDriverGetVersion(&mut version))?;
        let mut name = [0u8; 128];
        check("cuDeviceGetName", api.cuDeviceGetName(name.as_mut_ptr().cast(), 128, device))?;
        let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned();
        let (mut major, mut minor) = (0, 0);
        check("capability", api.cuDeviceGetAttribute(&mut major, 75, device))?;
        check("capability", api.cuDeviceGetAttribute(&mut minor, 76, device))?;
        check("cuDevicePrimaryCtxRetain", api.cuDevicePrimaryCtxRetain(&mut context, device))?;
        check("cuCtxSetCurrent", api.cuCtxSetCurrent(context))?;
        let description = format!("device {name}\ncapability {major}.{minor}\ndriver API {version}\n");
        Ok(Self { api, capability: (major * 10 + minor) as u32, description })
    }

    /// Runs a case: the first code that is not 0, and what was written.
    pub fn run(&self, case: &Case) -> (u32, Vec<u8>) {
        let mut output = Vec::new();
        let code = self.try_run(case, &mut output).err().unwrap_or(0);
        (code, output)
    }

    fn try_run(&self, case: &Case, output: &mut Vec<u8>) -> Result<(), u32> {
        let api = &self.api;
        let check = |code: u32| if code == 0 { Ok(()) } else { Err(code) };
        let (mut module, mut function) = (0, 0);
        let source = CString::new(case.ptx.as_str()).map_err(|_| 1u32)?;
        check(api.cuModuleLoadData(&mut module, source.as_ptr().cast()))?;
        check(api.cuModuleGetFunction(&mut function, module, c"k".as_ptr()))?;
        let (mut from, mut to) = (0, 0);
        check(api.cuMemAlloc_v2(&mut from, case.input.len().max(16)))?;
        check(api.cuMemAlloc_v2(&mut to, case.output.max(16)))?;
        check(api.cuMemcpyHtoD_v2(from, case.input.as_ptr().cast(), case.input.len()))?;
        check(api.cuMemsetD8_v2(to, FILL, case.output))?;
        let mut values = vec![from.to_le_bytes().to_vec(), to.to_le_bytes().to_vec()];
        if let Some(map) = &case.map {
            values.push(self.encode(map, if map.of_output { to } else { from })?);
        }
        let mut params = pointers(&mut values);
        let nothing = std::ptr::null_mut();
        let (grid, block) = (case.grid, case.block);
        check(api.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, case.shared, 0, params.as_mut_ptr(), nothing))?;
        check(api.cuCtxSynchronize())?;
        output.resize(case.output, 0);
        check(api.cuMemcpyDtoH_v2(output.as_mut_ptr().cast(), to, case.output))?;
        check(api.cuMemFree_v2(from))?;
        check(api.cuMemFree_v2(to))?;
        check(api.cuModuleUnload(module))
    }

    fn encode(&self, map: &TensorMap, address: u64) -> Result<Vec<u8>, u32> {
        // The driver wants 64-byte alignment.
        let mut storage = [0u8; MAP_BYTES + 64];
        let skip = storage.as_ptr().align_offset(64);
        let target = storage[skip..].as_mut_ptr().cast();
        let code = self.api.cuTensorMapEncodeTiled(
            target,
            map.data_type,
            map.sizes.len() as u32,
            address,
            map.sizes.as_ptr(),
            map.strides.as_ptr(),
            map.tile.as_ptr(),
            map.steps.as_ptr(),
            map.interleave,
            map.swizzle,
            0,
            map.fill,
        );
        if code != 0 { Err(code) } else { Ok(storage[skip..skip + MAP_BYTES].to_vec()) }
    }

    /// Loads a module's kernel.
    pub fn load(&self, ptx: &str, name: &str) -> Result<(usize, usize), u32> {
        let (source, name) = (CString::new(ptx).map_err(|_| 1u32)?, CString::new(name).map_err(|_| 1u32)?);
        let (mut module, mut function) = (0, 0);
        match self.api.cuModuleLoadData(&mut module, source.as_ptr().cast()) {
            0 => {}
            code => return Err(code),
        }
        match self.api.cuModuleGetFunction(&mut function, module, name.as_ptr()) {
            0 => Ok((module, function)),
            code => Err(code),
        }
    }
}
