//! How fast kernels run: lane operations a second and tensor cores' FLOP a second, with and without the checker, on one
//! thread and on all. Names of kernels as arguments pick some; matrices are random.

use cuda_sim::Module;
use cuda_sim::exec::{Launch, Options, Summary};
use cuda_sim::memory::DeviceMemory;
use cuda_sim::probe::random;
use half::bf16;
use rand::RngExt;
use std::time::Instant;

/// Rows and columns of matrices, and rows of attention.
const SIZE: usize = 512;
/// Seconds that a measurement takes at least.
const LEAST: f64 = 0.5;

/// Arithmetic without memory: a chain of fma, integer operations and a loop.
const ARITHMETIC: &str = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c)\n{\n\
    .reg .f32 f<8>;\n.reg .b32 r<4>;\n.reg .pred p;\nmov.u32 r0, 0;\nmov.u32 r1, %tid.x;\ncvt.rn.f32.u32 f0, r1;\nmov.f32 f1, 0f3F800001;\nmov.f32 f2, 0f3F000000;\nmov.f32 f3, f0;\n\
    L:\nfma.rn.f32 f0, f0, f1, f2;\nfma.rn.f32 f3, f3, f1, f2;\nadd.f32 f4, f0, f3;\nmul.f32 f5, f4, f2;\nadd.u32 r2, r1, r0;\nxor.b32 r3, r2, r1;\nand.b32 r2, r3, 255;\n\
    add.u32 r0, r0, 1;\nsetp.lt.u32 p, r0, 20000;\n@p bra L;\nret;\n}\n";

/// Tensor cores alone: products of numbers that the lanes have.
fn products() -> String {
    let one = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {f0, f1, f2, f3}, {r4, r5, r6, r7}, {r8, r9}, {f0, f1, f2, f3};\n";
    let mut text = String::from(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c)\n{\n\
         .reg .f32 f<4>;\n.reg .b32 r<12>;\n.reg .pred p;\nmov.u32 r0, 0;\nmov.u32 r1, %tid.x;\nmov.f32 f0, 0f00000000;\nmov.f32 f1, f0;\nmov.f32 f2, f0;\nmov.f32 f3, f0;\n",
    );
    for register in 4..10 {
        text += &format!(
            "mad.lo.u32 r{register}, r1, 9973, {register};\nand.b32 r{register}, r{register}, 0x807f807f;\nor.b32 r{register}, r{register}, 0x3f003e80;\n"
        );
    }
    text + "L:\n" + &one.repeat(16) + "add.u32 r0, r0, 1;\nsetp.lt.u32 p, r0, 500;\n@p bra L;\nret;\n}\n"
}

/// A kernel, what it runs on and how.
struct Case {
    name: String,
    ptx: String,
    kernel: &'static str,
    grid: [u32; 3],
    block: u32,
    shared: u32,
}

impl Case {
    /// A kernel of `fixtures/triton`, with the dynamic shared memory that its first line names.
    fn triton(file: &str, kernel: &'static str, grid: [u32; 3]) -> Self {
        let path = format!("{}/fixtures/triton/{file}.ptx", env!("CARGO_MANIFEST_DIR"));
        let ptx = std::fs::read_to_string(path).unwrap();
        let shared = ptx.strip_prefix("// shared ").and_then(|rest| rest.split(',').next()?.parse().ok()).unwrap();
        Self { name: file.to_owned(), ptx, kernel, grid, block: 128, shared }
    }

    fn run(&self) {
        let memory = DeviceMemory::new(1 << 30);
        let module = Module::load(&self.ptx, &memory).unwrap_or_else(|error| panic!("{error}"));
        let kernel = &module.kernels[self.kernel];
        let matrices: Vec<u64> = (0..4).map(|_| matrix(&memory, self.name.contains("fp32"))).collect();
        let size = SIZE as u64;
        let scale = u64::from(0.125f32.to_bits());
        let arguments = match self.kernel {
            "attention" => [&matrices[..], &[size, scale, 0, 0]].concat(),
            _ => [&matrices[..3], &[size; 6], &[0, 0]].concat(),
        };
        let mut params = vec![0; kernel.param_bytes as usize];
        for ((offset, bytes), value) in kernel.params.iter().zip(arguments) {
            params[*offset as usize..(offset + bytes) as usize]
                .copy_from_slice(&value.to_le_bytes()[..*bytes as usize]);
        }
        let launch = |options: &Options| -> Summary {
            let shape = (self.grid, [self.block, 1, 1]);
            let launch = Launch::new(kernel, shape, self.shared, &params, memory.snapshot(), options);
            launch.run().unwrap_or_else(|fault| panic!("{fault}"))
        };
        let counted = launch(&Options { count: true, check: false, ..Options::default() });
        let flop = counted.counts.map_or(0, |counts| counts.tensor_flop);
        for threads in [1, rayon::current_num_threads()] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for check in [false, true] {
                let options = Options { check, ..Options::default() };
                let (start, used, mut launches, mut operations) = (Instant::now(), processor_seconds(), 0, 0);
                while start.elapsed().as_secs_f64() < LEAST {
                    operations += pool.install(|| launch(&options)).operations;
                    launches += 1;
                }
                let (seconds, used) = (start.elapsed().as_secs_f64(), processor_seconds() - used);
                let per = |count: u64, seconds: f64| count as f64 / seconds / 1e9;
                let (lanes, flop) = (32 * operations, flop * launches);
                println!(
                    "{:26} threads {threads} checker {check:5}: {:5.2} G lane operations/s, tensor cores {:6.2} GFLOP/s; \
                     a second of a processor {:5.2} G, {:6.2} GFLOP",
                    self.name,
                    per(lanes, seconds),
                    per(flop, seconds),
                    per(lanes, used),
                    per(flop, used)
                );
            }
        }
    }
}

/// Seconds of processors that this process has taken: what a busy machine does not change. NaN where Linux does not say.
fn processor_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = text.rsplit(')').next().unwrap_or("").split_whitespace();
    let ticks: Vec<f64> = fields.skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
    // A tick is a hundredth of a second.
    if ticks.len() == 2 { (ticks[0] + ticks[1]) / 100.0 } else { f64::NAN }
}

/// A square matrix of bf16, or of f32.
fn matrix(memory: &DeviceMemory, single: bool) -> u64 {
    let mut random = random("speed");
    let mut bytes = Vec::new();
    for _ in 0..SIZE * SIZE {
        let value: f32 = random.random_range(-1.0..1.0);
        match single {
            true => bytes.extend(value.to_le_bytes()),
            false => bytes.extend(bf16::from_f32(value).to_le_bytes()),
        }
    }
    let address = memory.allocate((SIZE * SIZE * 4) as u64, false).unwrap();
    memory.copy_in(address, &bytes).unwrap();
    address
}

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    let blocks = (SIZE / 64) as u32;
    let square = [blocks, blocks, 1];
    let alone = |name: &str, ptx: String, block: u32| Case {
        name: name.to_owned(),
        ptx,
        kernel: "k",
        grid: [8, 1, 1],
        block,
        shared: 0,
    };
    let mut cases = vec![alone("arithmetic", ARITHMETIC.to_owned(), 256), alone("products", products(), 64)];
    for name in
        ["matmul_bf16_aligned_sm80", "matmul_fp16_masked_sm80", "matmul_fp32_masked_sm80", "matmul_bf16_aligned_sm90"]
    {
        cases.push(Case::triton(name, "matmul", square));
    }
    cases.push(Case::triton("attention_sm80", "attention", [blocks, 1, 1]));
    for case in cases.iter().filter(|case| chosen.is_empty() || chosen.iter().any(|name| case.name.contains(name))) {
        case.run();
    }
}
