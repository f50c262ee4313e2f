//! How fast kernels run: lane operations a second, with and without the checker, on one thread and on all.

use cuda_sim::Module;
use cuda_sim::exec::{Launch, Options};
use cuda_sim::memory::DeviceMemory;
use std::time::Instant;

const SIZE: usize = 256;

/// Arithmetic without memory: a chain of fma, integer operations and a loop.
const ARITHMETIC: &str = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c)\n{\n\
    .reg .f32 f<8>;\n.reg .b32 r<4>;\n.reg .pred p;\nmov.u32 r0, 0;\nmov.u32 r1, %tid.x;\ncvt.rn.f32.u32 f0, r1;\nmov.f32 f1, 0f3F800001;\nmov.f32 f2, 0f3F000000;\nmov.f32 f3, f0;\n\
    L:\nfma.rn.f32 f0, f0, f1, f2;\nfma.rn.f32 f3, f3, f1, f2;\nadd.f32 f4, f0, f3;\nmul.f32 f5, f4, f2;\nadd.u32 r2, r1, r0;\nxor.b32 r3, r2, r1;\nand.b32 r2, r3, 255;\n\
    add.u32 r0, r0, 1;\nsetp.lt.u32 p, r0, 20000;\n@p bra L;\nret;\n}\n";

fn run(name: &str, ptx: &str, kernel: &str, grid: [u32; 3], block: u32, shared: u32) {
    let memory = DeviceMemory::new(1 << 30);
    let module = Module::load(ptx, &memory).unwrap_or_else(|error| panic!("{error}"));
    let kernel = &module.kernels[kernel];
    let matrices: Vec<u64> = (0..4).map(|_| memory.allocate((SIZE * SIZE * 4) as u64, false).unwrap()).collect();
    for address in &matrices {
        memory.copy_in(*address, &vec![0; SIZE * SIZE * 4]).unwrap();
    }
    let size = SIZE as u64;
    let one = u64::from(1f32.to_bits());
    let arguments = match kernel.name.as_str() {
        "attention" => [&matrices[..], &[size, one, 0, 0]].concat(),
        _ => [&matrices[..3], &[size; 6], &[0, 0]].concat(),
    };
    let mut params = vec![0; kernel.param_bytes as usize];
    for ((offset, bytes), value) in kernel.params.iter().zip(arguments) {
        params[*offset as usize..(offset + bytes) as usize].copy_from_slice(&value.to_le_bytes()[..*bytes as usize]);
    }
    for threads in [1, rayon::current_num_threads()] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for check in [false, true] {
            let options = Options { check, ..Options::default() };
            let start = Instant::now();
            let launch = Launch::new(kernel, (grid, [block, 1, 1]), shared, &params, memory.snapshot(), &options);
            let summary = pool.install(|| launch.run()).unwrap_or_else(|fault| panic!("{fault}"));
            let seconds = start.elapsed().as_secs_f64();
            let speed = summary.operations as f64 * 32.0 / seconds / 1e9;
            println!("{name:12} threads {threads} checker {check:5}: {speed:6.2} G lane operations/s ({seconds:.3} s)");
        }
    }
}

fn main() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/triton");
    run("arithmetic", ARITHMETIC, "k", [8, 1, 1], 256, 0);
    for name in ["matmul_bf16_aligned_sm80", "matmul_fp32_masked_sm80", "attention_sm80"] {
        let ptx = std::fs::read_to_string(format!("{folder}/{name}.ptx")).unwrap();
        let shared = ptx.strip_prefix("// shared ").and_then(|rest| rest.split(',').next()?.parse().ok()).unwrap();
        let blocks = (SIZE / 64) as u32;
        match name.starts_with("matmul") {
            true => run(&name[7..18], &ptx, "matmul", [blocks, blocks, 1], 128, shared),
            false => run("attention", &ptx, "attention", [blocks, 1, 1], 128, shared),
        }
    }
}
