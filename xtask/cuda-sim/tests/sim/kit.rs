//! Runs PTX on memory of its own.

use cuda_sim::Module;
use cuda_sim::code::Kernel;
use cuda_sim::count::Counts;
use cuda_sim::exec::{Fault, Launch, Options, Summary};
use cuda_sim::memory::DeviceMemory;
use cuda_sim::probe::Case;
use cuda_sim::tensor_map::TensorMap;
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Opcodes with their modifiers.
#[derive(Default)]
pub struct Coverage {
    /// Those that kernels hold.
    pub written: BTreeSet<String>,
    /// Those that ran.
    pub ran: BTreeSet<String>,
}

thread_local! {
    static COVERAGE: RefCell<Option<Coverage>> = const { RefCell::new(None) };
}

/// Which opcodes the kernels hold that a function loads, and which of them run.
pub fn coverage(body: impl FnOnce()) -> Coverage {
    COVERAGE.set(Some(Coverage::default()));
    body();
    COVERAGE.take().unwrap()
}

/// Notes a kernel's opcodes on some lines.
fn note(kernel: &Kernel, into: fn(&mut Coverage) -> &mut BTreeSet<String>, on: impl Fn(u32) -> bool) {
    COVERAGE.with_borrow_mut(|coverage| {
        let Some(coverage) = coverage else { return };
        let sites = kernel.sites.iter().filter(|site| !site.opcode.is_empty() && on(site.line));
        into(coverage).extend(sites.map(|site| site.opcode.to_string()));
    });
}

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
        module.kernels.values().for_each(|kernel| note(kernel, |coverage| &mut coverage.written, |_| true));
        let options = Options { count: COVERAGE.with_borrow(Option::is_some), ..Options::default() };
        Self { memory, module, options, shared: 0 }
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

    pub fn launch(&self, kernel: &str, grid: u32, block: u32, arguments: &[u64]) -> Result<Summary, Box<Fault>> {
        self.launch_grid(kernel, [grid, 1, 1], block, arguments)
    }

    pub fn launch_grid(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: u32,
        arguments: &[u64],
    ) -> Result<Summary, Box<Fault>> {
        let kernel = &self.module.kernels[kernel];
        let mut params = vec![0; kernel.param_bytes as usize];
        for ((offset, bytes), value) in kernel.params.iter().zip(arguments) {
            params[*offset as usize..(offset + bytes) as usize]
                .copy_from_slice(&value.to_le_bytes()[..*bytes as usize]);
        }
        let shape = (grid, [block, 1, 1]);
        let summary = Launch::new(kernel, shape, self.shared, &params, self.memory.snapshot(), &self.options).run()?;
        if let Some(counts) = &summary.counts {
            note(kernel, |coverage| &mut coverage.ran, |line| counts.lines.get(line as usize) == Some(&true));
        }
        Ok(summary)
    }
}

/// Runs a case of the probe, without the checker: its output as words, or the driver's error where its tensor map is
/// none.
pub fn run_case(case: &Case) -> Result<Vec<u32>, u32> {
    launch_case(case, false).map(|(output, _)| output)
}

/// Counters of a case, likewise.
pub fn count_case(case: &Case) -> Counts {
    launch_case(case, true).unwrap().1.counts.unwrap()
}

fn launch_case(case: &Case, count: bool) -> Result<(Vec<u32>, Summary), u32> {
    let mut sim = Sim::new(&case.ptx);
    (sim.options.check, sim.options.count) = (false, count);
    let input: Vec<u32> = case.input.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    let (from, to) = (sim.words(&input), sim.words(&vec![0xa5a5_a5a5; case.output.div_ceil(4)]));
    let mut params = [from.to_le_bytes(), to.to_le_bytes()].concat();
    let kernel = &sim.module.kernels["k"];
    if let Some(map) = &case.map {
        let encoded = TensorMap {
            data_type: map.data_type,
            address: if map.of_output { to } else { from },
            sizes: map.sizes.clone(),
            strides: map.strides.clone(),
            tile: map.tile.clone(),
            steps: map.steps.clone(),
            swizzle: map.swizzle,
            nan_fill: map.fill == 1,
        };
        if !encoded.is_valid() {
            return Err(1);
        }
        params.resize(kernel.params[2].0 as usize, 0);
        params.extend(encoded.encode());
    }
    let shape = ([case.grid, 1, 1], [case.block, 1, 1]);
    let launch = Launch::new(kernel, shape, case.shared, &params, sim.memory.snapshot(), &sim.options);
    let summary = launch.run().unwrap_or_else(|fault| panic!("{}: {fault}", case.name));
    Ok((sim.read(to, case.output / 4), summary))
}
