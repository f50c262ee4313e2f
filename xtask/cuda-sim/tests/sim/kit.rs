//! Runs PTX on memory of its own.

use cuda_sim::Module;
use cuda_sim::exec::{Fault, Launch, Options};
use cuda_sim::memory::DeviceMemory;
use cuda_sim::probe::Case;

/// A device with a loaded module.
pub struct Sim {
    pub memory: DeviceMemory,
    pub module: Module,
    pub options: Options,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Sim {
    pub fn new(ptx: &str) -> Self {
        let memory = DeviceMemory::new(1 << 32);
        let module = Module::load(ptx, &memory).unwrap_or_else(|error| panic!("{error}"));
        Self { memory, module, options: Options::default(), shared: 0 }
    }

    /// Memory that holds bytes.
    pub fn bytes(&self, bytes: &[u8]) -> u64 {
        let address = self.memory.allocate(bytes.len() as u64, false).unwrap();
        self.memory.copy_in(address, bytes).unwrap();
        address
    }

    /// Memory that holds words.
    pub fn words(&self, words: &[u32]) -> u64 {
        self.bytes(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Memory that holds f32.
    pub fn floats(&self, values: &[f32]) -> u64 {
        self.bytes(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Memory that nobody wrote.
    pub fn blank(&self, bytes: u64) -> u64 {
        self.memory.allocate(bytes, false).unwrap()
    }

    pub fn read(&self, address: u64, count: usize) -> Vec<u32> {
        let mut bytes = vec![0; count * 4];
        self.memory.copy_out(address, &mut bytes).unwrap();
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    pub fn launch(&self, kernel: &str, grid: u32, block: u32, arguments: &[u64]) -> Result<u64, Box<Fault>> {
        self.launch_grid(kernel, [grid, 1, 1], block, arguments)
    }

    pub fn launch_grid(&self, kernel: &str, grid: [u32; 3], block: u32, arguments: &[u64]) -> Result<u64, Box<Fault>> {
        let kernel = &self.module.kernels[kernel];
        let mut params = vec![0; kernel.param_bytes as usize];
        for ((offset, bytes), value) in kernel.params.iter().zip(arguments) {
            params[*offset as usize..(offset + bytes) as usize]
                .copy_from_slice(&value.to_le_bytes()[..*bytes as usize]);
        }
        let shape = (grid, [block, 1, 1]);
        Launch::new(kernel, shape, self.shared, &params, self.memory.snapshot(), &self.options).run()
    }
}

/// Runs a case of the probe: its output as words.
pub fn run_case(case: &Case) -> Vec<u32> {
    let sim = Sim::new(&case.ptx);
    let input: Vec<u32> = case.input.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    let (from, to) = (sim.words(&input), sim.words(&vec![0xa5a5_a5a5; case.output.div_ceil(4)]));
    sim.launch("k", case.grid, case.block, &[from, to]).unwrap_or_else(|fault| panic!("{}: {fault}", case.name));
    sim.read(to, case.output / 4)
}
