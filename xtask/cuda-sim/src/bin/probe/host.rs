//! What the driver answers to its host: attributes, occupancy, errors, and misuse. Each group runs in a process of its own.

use crate::device::{Api, Device};
use cuda_sim::probe::{Answer, Fixture};
use std::fmt::Write;
use std::path::Path;
use std::ptr::{null, null_mut};

type Group = fn(&mut String) -> Result<(), String>;

/// The groups by name.
pub const GROUPS: [(&str, Group); 12] = [
    ("without a start", without_start),
    ("device attributes", attributes),
    ("error names", error_names),
    ("memory misuse", memory),
    ("module misuse", modules),
    ("launch misuse", launches),
    ("events and streams", events),
    ("occupancy", occupancy),
    ("illegal address", |out| fault(out, "mov.u64 a, 64;\nld.global.u32 r, [a];\nst.global.u32 [a], r;")),
    ("misaligned address", |out| fault(out, "ld.param.u64 a, [p];\nld.global.u32 r, [a+2];\nst.global.u32 [a], r;")),
    ("trap", |out| fault(out, "trap;")),
    ("shared out of bounds", |out| fault(out, "mov.u32 r, 1000000;\nst.shared.u32 [r], r;")),
];

/// Runs the group of a number and writes its answer.
pub fn run(number: usize, path: &Path) -> Result<(), String> {
    let (name, group) = GROUPS.get(number).ok_or("no such group")?;
    let mut lines = String::new();
    group(&mut lines)?;
    let answer = Answer::new(&format!("host: {name}"), 0, 0, lines.into_bytes());
    Fixture { device: String::new(), answers: vec![answer] }.write(path).map_err(|error| error.to_string())
}

fn line(out: &mut String, what: &str, code: u32) {
    let _ = writeln!(out, "{what}: {code}");
}

fn without_start(out: &mut String) -> Result<(), String> {
    let api = Api::load()?;
    let (mut device, mut count, mut context) = (0, 0, 0);
    line(out, "cuDeviceGet before cuInit", api.cuDeviceGet(&mut device, 0));
    line(out, "cuInit(1)", api.cuInit(1));
    line(out, "cuInit(0)", api.cuInit(0));
    line(out, "cuDeviceGet(99)", api.cuDeviceGet(&mut device, 99));
    line(out, "cuDeviceGet(-1)", api.cuDeviceGet(&mut device, -1));
    line(out, "cuDeviceGetAttribute(0)", api.cuDeviceGetAttribute(&mut count, 0, 0));
    line(out, "cuDeviceGetAttribute(100000)", api.cuDeviceGetAttribute(&mut count, 100_000, 0));
    line(out, "cuCtxGetCurrent", api.cuCtxGetCurrent(&mut context));
    let _ = writeln!(out, "context is null: {}", context == 0);
    let mut address = 0;
    line(out, "cuMemAlloc without a context", api.cuMemAlloc_v2(&mut address, 16));
    line(out, "cuCtxSynchronize without a context", api.cuCtxSynchronize());
    line(out, "cuDevicePrimaryCtxRelease without retain", api.cuDevicePrimaryCtxRelease_v2(0));
    Ok(())
}

fn attributes(out: &mut String) -> Result<(), String> {
    let device = Device::open()?;
    for attribute in 1..150 {
        let mut value = 0;
        let code = device.api.cuDeviceGetAttribute(&mut value, attribute, 0);
        let _ = writeln!(out, "{attribute}: {code} {value}");
    }
    let (mut free, mut total, mut bytes) = (0, 0, 0);
    line(out, "cuMemGetInfo", device.api.cuMemGetInfo_v2(&mut free, &mut total));
    line(out, "cuDeviceTotalMem", device.api.cuDeviceTotalMem_v2(&mut bytes, 0));
    let _ = writeln!(out, "total {total} of device {bytes}");
    let mut address = 0;
    device.api.cuMemAlloc_v2(&mut address, 1 << 20);
    let mut after = 0;
    device.api.cuMemGetInfo_v2(&mut after, &mut total);
    let _ = writeln!(out, "1 MiB takes {}", free.saturating_sub(after));
    let (_, function) = device.load(&kernel("", "ret;"), "k").map_err(|code| code.to_string())?;
    for attribute in -1..18 {
        let mut value = 0;
        let code = device.api.cuFuncGetAttribute(&mut value, attribute, function);
        let _ = writeln!(out, "function {attribute}: {code} {value}");
    }
    Ok(())
}

fn error_names(out: &mut String) -> Result<(), String> {
    let api = Api::load()?;
    for code in 0..1000 {
        let name = api.error_name(code);
        if !name.is_empty() {
            let _ = writeln!(out, "{code}: {name}");
        }
    }
    Ok(())
}

fn memory(out: &mut String) -> Result<(), String> {
    let device = Device::open()?;
    let api = &device.api;
    let (mut a, mut b) = (0, 0);
    let mut data = [0u8; 64];
    line(out, "cuMemAlloc(0)", api.cuMemAlloc_v2(&mut a, 0));
    line(out, "cuMemAlloc to null", api.cuMemAlloc_v2(null_mut(), 16));
    line(out, "cuMemAlloc(1 << 60)", api.cuMemAlloc_v2(&mut a, 1 << 60));
    line(out, "cuMemAlloc(4096)", api.cuMemAlloc_v2(&mut a, 4096));
    let _ = writeln!(out, "multiple of 512: {}", a % 512 == 0);
    line(out, "cuMemAlloc(100)", api.cuMemAlloc_v2(&mut b, 100));
    let _ = writeln!(out, "multiple of 512: {}", b % 512 == 0);
    line(out, "cuMemFree(0)", api.cuMemFree_v2(0));
    line(out, "cuMemFree of the inside", api.cuMemFree_v2(a + 16));
    line(out, "cuMemFree of the host", api.cuMemFree_v2(data.as_ptr() as u64));
    line(out, "cuMemFree", api.cuMemFree_v2(b));
    line(out, "cuMemFree twice", api.cuMemFree_v2(b));
    line(out, "cuMemcpyHtoD to null", api.cuMemcpyHtoD_v2(0, data.as_ptr().cast(), 16));
    line(out, "cuMemcpyHtoD of nothing", api.cuMemcpyHtoD_v2(0, null(), 0));
    line(out, "cuMemcpyHtoD from null", api.cuMemcpyHtoD_v2(a, null(), 16));
    line(out, "cuMemcpyHtoD behind the end", api.cuMemcpyHtoD_v2(a + 4096 - 8, data.as_ptr().cast(), 16));
    line(out, "cuMemcpyDtoH far behind the end", api.cuMemcpyDtoH_v2(data.as_mut_ptr().cast(), a + (1 << 30), 16));
    line(out, "cuMemcpyDtoH after free", api.cuMemcpyDtoH_v2(data.as_mut_ptr().cast(), b, 16));
    line(out, "cuMemcpyDtoD to itself", api.cuMemcpyDtoD_v2(a, a + 8, 64));
    line(out, "cuMemsetD32 off by two", api.cuMemsetD32_v2(a + 2, 1, 4));
    line(out, "cuMemsetD8 of nothing", api.cuMemsetD8_v2(a, 1, 0));
    line(out, "cuMemsetD8 behind the end", api.cuMemsetD8_v2(a + 4000, 1, 1 << 30));
    line(out, "cuMemFreeHost of a foreign pointer", api.cuMemFreeHost(data.as_mut_ptr().cast()));
    line(out, "cuMemAllocAsync(0)", api.cuMemAllocAsync(&mut b, 0, 0));
    line(out, "cuMemAllocAsync(256)", api.cuMemAllocAsync(&mut b, 256, 0));
    line(out, "cuMemFreeAsync", api.cuMemFreeAsync(b, 0));
    line(out, "cuMemFreeAsync twice", api.cuMemFreeAsync(b, 0));
    line(out, "cuMemFreeAsync of cuMemAlloc", api.cuMemFreeAsync(a, 0));
    line(out, "cuCtxSynchronize", api.cuCtxSynchronize());
    Ok(())
}

/// A kernel `k` with one parameter of 8 bytes.
fn kernel(attributes: &str, body: &str) -> String {
    format!(
        ".version 7.8\n.target sm_80\n.address_size 64\n.global .align 4 .b8 table[12] = {{1, 2, 3}};\n\
         .visible .entry k(.param .u64 p)\n{attributes}\n{{\n.reg .b64 a;\n.reg .b32 r;\n{body}\nret;\n}}\n"
    )
}

fn modules(out: &mut String) -> Result<(), String> {
    let device = Device::open()?;
    let good = kernel("", "");
    for (what, text) in [
        ("nonsense", "this is no PTX".to_owned()),
        ("an empty text", String::new()),
        ("a wrong opcode", kernel("", "nonsense.u32 r, r;")),
        ("a wrong modifier", kernel("", "add.full.u32 r, r, r;")),
        ("a wrong width", kernel("", "add.u64 r, r, r;")),
        ("an unknown register", kernel("", "add.u32 r, r, none;")),
        ("version 9.9", good.replace(".version 7.8", ".version 9.9")),
        ("target sm_100", good.replace(".version 7.8\n.target sm_80", ".version 8.7\n.target sm_100")),
        ("target sm_80 with wgmma", kernel("", "wgmma.fence.sync.aligned;")),
        ("a good text", good.clone()),
    ] {
        let code = device.load(&text, "k").err().unwrap_or(0);
        line(out, &format!("loading {what}"), code);
    }
    line(out, "a missing kernel", device.load(&good, "none").err().unwrap_or(0));
    let (module, _) = device.load(&good, "k").map_err(|code| code.to_string())?;
    let (mut address, mut bytes) = (0, 0);
    line(
        out,
        "cuModuleGetGlobal",
        device.api.cuModuleGetGlobal_v2(&mut address, &mut bytes, module, c"table".as_ptr()),
    );
    let _ = writeln!(out, "bytes: {bytes}");
    line(
        out,
        "a missing variable",
        device.api.cuModuleGetGlobal_v2(&mut address, &mut bytes, module, c"none".as_ptr()),
    );
    line(out, "cuMemFree of a variable", device.api.cuMemFree_v2(address));
    Ok(())
}

fn launches(out: &mut String) -> Result<(), String> {
    let device = Device::open()?;
    let load = |text: String| device.load(&text, "k").map(|found| found.1).map_err(|code| code.to_string());
    let plain = load(kernel("", ""))?;
    let most = load(kernel(".maxntid 128, 1, 1", ""))?;
    let exact = load(kernel(".reqntid 64, 1, 1", ""))?;
    let fixed = load(kernel("", ".shared .b8 s[1024];\nmov.u32 r, s;\nst.shared.u32 [r], r;"))?;
    let launch = |function: usize, grid: [u32; 3], block: [u32; 3], shared: u32, with: bool| {
        let mut value = 0u64;
        let mut params = [(&raw mut value).cast()];
        let params = if with { params.as_mut_ptr() } else { null_mut() };
        let [gx, gy, gz] = grid;
        let [bx, by, bz] = block;
        device.api.cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, 0, params, null_mut())
    };
    let one = [1, 1, 1];
    for (what, grid, block) in [
        ("one thread", one, one),
        ("grid 0", [0, 1, 1], one),
        ("block 0", one, [0, 1, 1]),
        ("block 1024", one, [1024, 1, 1]),
        ("block 1025", one, [1025, 1, 1]),
        ("block 32 x 33", one, [32, 33, 1]),
        ("block z 64", one, [1, 1, 64]),
        ("block z 65", one, [1, 1, 65]),
        ("grid y 65535", [1, 65535, 1], one),
        ("grid y 65536", [1, 65536, 1], one),
        ("grid x 2^31", [1 << 31, 1, 1], one),
    ] {
        line(out, what, launch(plain, grid, block, 0, true));
    }
    line(out, "shared 48 KiB", launch(plain, one, one, 49152, true));
    line(out, "shared 48 KiB + 1", launch(plain, one, one, 49153, true));
    line(out, "without parameters", launch(plain, one, one, 0, false));
    line(out, "maxntid 128, block 128", launch(most, one, [128, 1, 1], 0, true));
    line(out, "maxntid 128, block 129", launch(most, one, [129, 1, 1], 0, true));
    line(out, "reqntid 64, block 64", launch(exact, one, [64, 1, 1], 0, true));
    line(out, "reqntid 64, block 32", launch(exact, one, [32, 1, 1], 0, true));
    for bytes in [0, 49152, 50000, 100_000, 232_448, 232_449, -1] {
        line(out, &format!("dynamic limit {bytes}"), device.api.cuFuncSetAttribute(plain, 8, bytes));
    }
    line(out, "shared 232448", launch(plain, one, one, 232_448, true));
    line(out, "static 1 KiB, shared 47 KiB", launch(fixed, one, one, 48128, true));
    line(out, "static 1 KiB, shared 48 KiB", launch(fixed, one, one, 49152, true));
    line(out, "static 1 KiB, dynamic limit 232448", device.api.cuFuncSetAttribute(fixed, 8, 232_448));
    line(out, "static 1 KiB, dynamic limit 231424", device.api.cuFuncSetAttribute(fixed, 8, 231_424));
    for (attribute, value) in [(9, 50), (9, 101), (9, -1), (9, -2), (4, 1), (99, 1)] {
        line(
            out,
            &format!("function attribute {attribute} = {value}"),
            device.api.cuFuncSetAttribute(plain, attribute, value),
        );
    }
    line(out, "cuCtxSynchronize", device.api.cuCtxSynchronize());
    Ok(())
}

fn events(out: &mut String) -> Result<(), String> {
    let device = Device::open()?;
    let api = &device.api;
    let (mut a, mut b, mut stream) = (0, 0, 0);
    let mut time = 0.0;
    line(out, "cuStreamCreate", api.cuStreamCreate(&mut stream, 1));
    line(out, "cuEventCreate", api.cuEventCreate(&mut a, 0));
    line(out, "cuEventCreate", api.cuEventCreate(&mut b, 0));
    line(out, "cuEventQuery of one never recorded", api.cuEventQuery(a));
    line(out, "cuEventElapsedTime, none recorded", api.cuEventElapsedTime(&mut time, a, b));
    line(out, "cuEventRecord", api.cuEventRecord(a, stream));
    line(out, "cuEventElapsedTime, one recorded", api.cuEventElapsedTime(&mut time, a, b));
    line(out, "cuEventRecord", api.cuEventRecord(b, stream));
    line(out, "cuStreamSynchronize", api.cuStreamSynchronize(stream));
    line(out, "cuEventElapsedTime", api.cuEventElapsedTime(&mut time, a, b));
    line(out, "cuEventDestroy", api.cuEventDestroy_v2(a));
    line(out, "cuEventDestroy(null)", api.cuEventDestroy_v2(0));
    line(out, "cuStreamDestroy", api.cuStreamDestroy_v2(stream));
    line(out, "cuStreamDestroy(null)", api.cuStreamDestroy_v2(0));
    line(out, "cuStreamSynchronize(null)", api.cuStreamSynchronize(0));
    Ok(())
}

fn occupancy(out: &mut String) -> Result<(), String> {
    let device = Device::open()?;
    for live in [4, 24, 40, 56, 72, 96, 120, 160, 200, 240] {
        // Values that all live at once take a register each.
        let mut body = format!(".reg .b32 v<{live}>;\nld.param.u64 a, [p];\n");
        (0..live).for_each(|at| _ = writeln!(body, "ld.volatile.global.u32 v{at}, [a+{}];", 4 * at));
        (0..live).for_each(|at| _ = writeln!(body, "st.volatile.global.u32 [a+{}], v{};", 4 * at, live - 1 - at));
        let (module, function) = device.load(&kernel("", &body), "k").map_err(|code| code.to_string())?;
        let mut registers = 0;
        device.api.cuFuncGetAttribute(&mut registers, 4, function);
        line(out, "limit", device.api.cuFuncSetAttribute(function, 8, 232_448));
        for threads in [0, 1, 32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1025] {
            for shared in [0, 1024, 5000, 16384, 40000, 65536, 100_000, 166_912, 232_448, 240_000] {
                let mut count = -1;
                let code =
                    device.api.cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut count, function, threads, shared);
                let _ = writeln!(out, "registers {registers} threads {threads} shared {shared}: {code} {count}");
            }
        }
        device.api.cuModuleUnload(module);
    }
    Ok(())
}

/// What every function answers after a kernel has failed.
fn fault(out: &mut String, body: &str) -> Result<(), String> {
    let device = Device::open()?;
    let api = &device.api;
    let (module, function) = device.load(&kernel("", body), "k").map_err(|code| code.to_string())?;
    let (mut address, mut other, mut stream, mut event, mut found) = (0u64, 0, 0, 0, 0);
    api.cuMemAlloc_v2(&mut address, 256);
    api.cuEventCreate(&mut event, 0);
    let mut params = [(&raw mut address).cast()];
    let launch = |params: &mut [*mut std::ffi::c_void; 1]| {
        api.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, 0, params.as_mut_ptr(), null_mut())
    };
    line(out, "cuLaunchKernel", launch(&mut params));
    line(out, "cuCtxSynchronize", api.cuCtxSynchronize());
    line(out, "cuCtxSynchronize again", api.cuCtxSynchronize());
    line(out, "cuLaunchKernel again", launch(&mut params));
    line(out, "cuMemAlloc", api.cuMemAlloc_v2(&mut other, 16));
    line(out, "cuMemFree", api.cuMemFree_v2(address));
    line(out, "cuStreamCreate", api.cuStreamCreate(&mut stream, 0));
    line(out, "cuEventQuery", api.cuEventQuery(event));
    line(out, "cuEventDestroy", api.cuEventDestroy_v2(event));
    line(out, "cuModuleGetFunction", api.cuModuleGetFunction(&mut found, module, c"k".as_ptr()));
    line(out, "cuModuleUnload", api.cuModuleUnload(module));
    line(out, "cuDevicePrimaryCtxRelease", api.cuDevicePrimaryCtxRelease_v2(0));
    Ok(())
}
