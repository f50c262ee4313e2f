//! What a driver knows: devices, modules, streams, events. No unsafe code; handles are numbers.

use super::capture::{Captures, Mark};
use super::device::{Profile, SHARED_DEFAULT};
use super::error::CuError;
use super::graph::{Executable, Work};
use super::occupancy::{active_ctas, registers_suffice};
use super::resources::{Assembled, Taken};
use crate::code::Kernel;
use crate::exec::{Launch, Options};
use crate::memory::DeviceMemory;
use crate::module::Module;
use std::collections::HashMap;
use std::sync::Arc;

/// The first handle of modules, functions, streams and events.
const FIRST_HANDLE: usize = 0x5100_0000;
/// The newest PTX that the driver of CUDA 13.0 reads.
const PTX_VERSION: (u32, u32) = (9, 0);
/// The most threads of a CTA.
const MAX_THREADS: u32 = 1024;

/// The most registers of a thread.
const MOST_REGISTERS: u32 = 255;

/// How a simulated driver is set up; from the environment in the shim.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The device that it pretends to be.
    pub device: Profile,
    /// How kernels run.
    pub options: Options,
}

impl Setup {
    /// `CUDA_SIM_DEVICE` (`a100`, `h100`), `CUDA_SIM_MEMORY` (bytes), `CUDA_SIM_CHECK` (`0` for none),
    /// `CUDA_SIM_COUNT` (`1` prints a table of counters after each launch, `json` a line of JSON), `CUDA_SIM_SEED`,
    /// `CUDA_SIM_BUDGET`.
    pub fn from_environment() -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let name = std::env::var("CUDA_SIM_DEVICE").unwrap_or_else(|_| "h100".to_owned());
        let mut device = Profile::named(&name).unwrap_or_else(|| {
            eprintln!("cuda-sim: CUDA_SIM_DEVICE={name}: `a100` and `h100` are known; `h100` is taken");
            Profile::named("h100").unwrap_or_else(|| unreachable!("a known name"))
        });
        device.memory_bytes = number("CUDA_SIM_MEMORY").unwrap_or(device.memory_bytes);
        let mut options = Options { multiprocessors: device.multiprocessors, ..Options::default() };
        options.check = number("CUDA_SIM_CHECK") != Some(0);
        options.count = std::env::var_os("CUDA_SIM_COUNT").is_some();
        options.seed = number("CUDA_SIM_SEED");
        options.budget = number("CUDA_SIM_BUDGET").unwrap_or(options.budget);
        Self { device, options }
    }
}

/// A function of a module.
#[derive(Clone, Debug)]
struct Function {
    module: usize,
    name: String,
    dynamic_limit: u32,
    carveout: i32,
}

/// A module and what its kernels take.
struct Loaded {
    module: Arc<Module>,
    assembled: Assembled,
}

/// A stream.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// It does not wait for the legacy stream.
    pub non_blocking: bool,
}

/// A kernel and how it is to run, ready for a launch without the state's lock.
#[derive(Clone)]
pub struct Ready {
    /// The module that holds the kernel.
    pub module: Arc<Module>,
    /// The kernel's name.
    pub name: String,
    /// Grid and block.
    pub shape: ([u32; 3], [u32; 3]),
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// The driver's state.
pub struct State {
    /// Setup.
    pub setup: Setup,
    /// Device memory.
    pub memory: Arc<DeviceMemory>,
    modules: HashMap<usize, Loaded>,
    functions: HashMap<usize, Function>,
    /// Streams besides the default ones.
    pub streams: HashMap<usize, Stream>,
    /// Events.
    pub events: HashMap<usize, Mark>,
    /// Captures of streams.
    pub captures: Captures,
    /// Graphs.
    pub graphs: HashMap<usize, Arc<Vec<Work>>>,
    /// Graphs made ready to run.
    pub executables: HashMap<usize, Executable>,
    /// Contexts of cuBLAS and the streams that they are on.
    products: HashMap<usize, usize>,
    next: usize,
    /// The error that ended the context.
    failed: Option<CuError>,
    /// Times that the primary context is held.
    pub retained: u32,
}

impl State {
    /// A driver at its start.
    pub fn new(setup: Setup) -> Self {
        let memory = Arc::new(DeviceMemory::new(setup.device.memory_bytes));
        Self {
            setup,
            memory,
            modules: HashMap::new(),
            functions: HashMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            captures: Captures::default(),
            graphs: HashMap::new(),
            executables: HashMap::new(),
            products: HashMap::new(),
            next: FIRST_HANDLE,
            failed: None,
            retained: 0,
        }
    }

    /// A handle that nobody has.
    pub fn handle(&mut self) -> usize {
        self.next += 16;
        self.next
    }

    /// The error of an earlier launch: the context is of no more use.
    pub fn alive(&self) -> Result<(), CuError> {
        self.failed.map_or(Ok(()), Err)
    }

    /// Notes the error of a launch.
    pub fn fail(&mut self, error: CuError) {
        self.failed.get_or_insert(error);
    }

    /// Forgets everything that belongs to the context.
    pub fn reset(&mut self) {
        self.memory = Arc::new(DeviceMemory::new(self.setup.device.memory_bytes));
        self.modules.clear();
        self.functions.clear();
        self.streams.clear();
        self.events.clear();
        self.captures = Captures::default();
        self.graphs.clear();
        self.executables.clear();
        self.products.clear();
        self.failed = None;
    }

    /// Loads PTX text.
    pub fn load(&mut self, source: &str) -> Result<usize, (CuError, String)> {
        self.alive().map_err(|error| (error, String::new()))?;
        let module = Module::load(source, &self.memory).map_err(|error| {
            let code = match &error {
                crate::LoadError::Ptx(_) if !source.trim_start().starts_with(['.', '/']) => CuError::INVALID_IMAGE,
                crate::LoadError::Ptx(error) if error.is_version() => CuError::UNSUPPORTED_PTX_VERSION,
                crate::LoadError::Ptx(_) => CuError::INVALID_PTX,
                crate::LoadError::Memory(error) => error.clone().into(),
            };
            (code, error.to_string())
        })?;
        if let Err(refused) = self.accepts(&module) {
            module.unload(&self.memory);
            return Err(refused);
        }
        let assembled = Assembled::new(source, &module.target, self.setup.device.capability);
        let handle = self.handle();
        self.modules.insert(handle, Loaded { module: Arc::new(module), assembled });
        Ok(handle)
    }

    /// Whether a driver for the device takes a module of this version and target.
    fn accepts(&self, module: &Module) -> Result<(), (CuError, String)> {
        if module.version > PTX_VERSION {
            let ((major, minor), (most, least)) = (module.version, PTX_VERSION);
            let what = format!(".version {major}.{minor} on a driver that reads PTX up to {most}.{least}");
            return Err((CuError::UNSUPPORTED_PTX_VERSION, what));
        }
        let (major, minor) = self.setup.device.capability;
        match target_needs(&module.target).filter(|needed| !needed.met_by(major * 10 + minor)) {
            None => Ok(()),
            Some(needed) => {
                let what = format!(".target {} on a device of capability {major}.{minor}", needed.name);
                Err((CuError::INVALID_PTX, what))
            }
        }
    }

    /// Unloads a module.
    pub fn unload(&mut self, handle: usize) -> Result<(), CuError> {
        self.alive()?;
        let loaded = self.modules.remove(&handle).ok_or(CuError::INVALID_HANDLE)?;
        self.functions.retain(|_, function| function.module != handle);
        loaded.module.unload(&self.memory);
        Ok(())
    }

    /// Checks that the module of a kernel is there still. What a real driver does with one that is not is not defined.
    ///
    /// # Errors
    /// If it was unloaded.
    pub fn check_loaded(&self, ready: &Ready) -> Result<(), CuError> {
        if self.modules.values().any(|loaded| Arc::ptr_eq(&loaded.module, &ready.module)) {
            return Ok(());
        }
        eprintln!("cuda-sim: {} is of a module that was unloaded", ready.name);
        Err(CuError::INVALID_HANDLE)
    }

    /// A function of a module.
    pub fn function(&mut self, module: usize, name: &str) -> Result<usize, CuError> {
        self.alive()?;
        let found = &self.modules.get(&module).ok_or(CuError::INVALID_HANDLE)?.module;
        if !found.kernels.contains_key(name) {
            return Err(CuError::NOT_FOUND);
        }
        let known =
            self.functions.iter().find(|(_, f)| f.module == module && f.name == name).map(|(handle, _)| *handle);
        if let Some(handle) = known {
            return Ok(handle);
        }
        let fixed = found.kernels[name].shared_bytes;
        let dynamic_limit = SHARED_DEFAULT.saturating_sub(fixed);
        let handle = self.handle();
        self.functions.insert(handle, Function { module, name: name.to_owned(), dynamic_limit, carveout: -1 });
        Ok(handle)
    }

    /// A variable of a module: address and bytes.
    pub fn variable(&self, module: usize, name: &str) -> Result<(u64, u64), CuError> {
        let module = &self.modules.get(&module).ok_or(CuError::INVALID_HANDLE)?.module;
        module.variables.get(name).copied().ok_or(CuError::NOT_FOUND)
    }

    fn kernel(&self, handle: usize) -> Result<(&Function, &Kernel), CuError> {
        let function = self.functions.get(&handle).ok_or(CuError::INVALID_HANDLE)?;
        let module = &self.modules.get(&function.module).ok_or(CuError::INVALID_HANDLE)?.module;
        module.kernels.get(&function.name).map(|kernel| (function, kernel)).ok_or(CuError::INVALID_HANDLE)
    }

    /// What a kernel takes of the device.
    fn taken(&self, handle: usize) -> Result<Taken, CuError> {
        let (function, kernel) = self.kernel(handle)?;
        let loaded = self.modules.get(&function.module).ok_or(CuError::INVALID_HANDLE)?;
        Ok(loaded.assembled.taken(kernel))
    }

    /// Bytes of a kernel's parameters, one after the other, with their offsets.
    pub fn parameters(&self, handle: usize) -> Result<(Vec<(u32, u32)>, u32), CuError> {
        let (_, kernel) = self.kernel(handle)?;
        Ok((kernel.params.clone(), kernel.param_bytes))
    }

    /// `CUfunction_attribute`
    pub fn function_attribute(&self, handle: usize, attribute: i32) -> Result<i32, CuError> {
        let (function, kernel) = self.kernel(handle)?;
        let (major, minor) = self.setup.device.capability;
        Ok(match attribute {
            0 => (kernel.max_threads.unwrap_or(MAX_THREADS)).min(MAX_THREADS) as i32,
            1 => kernel.shared_bytes as i32,
            2 => 0,
            3 => self.taken(handle)?.local_bytes as i32,
            4 => self.taken(handle)?.registers as i32,
            5 => self.target(function)? as i32,
            6 => (major * 10 + minor) as i32,
            7 => 0,
            8 => function.dynamic_limit as i32,
            9 => function.carveout,
            10..=15 => 0,
            _ => return Err(CuError::INVALID_VALUE),
        })
    }

    /// The capability that a function's module was compiled for.
    fn target(&self, function: &Function) -> Result<u32, CuError> {
        let module = &self.modules.get(&function.module).ok_or(CuError::INVALID_HANDLE)?.module;
        Ok(target_needs(&module.target).map_or(0, |needed| needed.capability))
    }

    /// Sets the limit of dynamic shared memory, or the preferred share of it.
    pub fn set_function_attribute(&mut self, handle: usize, attribute: i32, value: i32) -> Result<(), CuError> {
        let most =
            self.setup.device.shared_optin - self.kernel(handle)?.1.shared_bytes.min(self.setup.device.shared_optin);
        let function = self.functions.get_mut(&handle).ok_or(CuError::INVALID_HANDLE)?;
        match attribute {
            8 => match u32::try_from(value) {
                Ok(bytes) if bytes <= most => function.dynamic_limit = bytes,
                _ => return Err(CuError::INVALID_VALUE),
            },
            9 if (-1..=100).contains(&value) => function.carveout = value,
            _ => return Err(CuError::INVALID_VALUE),
        }
        Ok(())
    }

    /// CTAs of a kernel that a multiprocessor holds.
    pub fn occupancy(&self, handle: usize, threads: i32, dynamic: u64) -> Result<i32, CuError> {
        let (_, kernel) = self.kernel(handle)?;
        let threads = u32::try_from(threads).ok().filter(|threads| *threads > 0).ok_or(CuError::INVALID_VALUE)?;
        let shared = u32::try_from(dynamic).map_err(|_| CuError::INVALID_VALUE)?.saturating_add(kernel.shared_bytes);
        if shared > self.setup.device.shared_optin {
            return Ok(0);
        }
        Ok(active_ctas(&self.setup.device, threads, self.taken(handle)?.registers, shared) as i32)
    }

    /// Checks a launch.
    pub fn prepare(&self, handle: usize, grid: [u32; 3], block: [u32; 3], dynamic: u32) -> Result<Ready, CuError> {
        self.alive()?;
        let (function, kernel) = self.kernel(handle)?;
        let threads = block.iter().map(|size| u64::from(*size)).product::<u64>();
        let sizes = [grid[0] as u64 > i32::MAX as u64, grid[1] > 65535, grid[2] > 65535, block[2] > 64];
        if threads == 0 || threads > u64::from(MAX_THREADS) || grid.contains(&0) || sizes.contains(&true) {
            return Err(CuError::INVALID_VALUE);
        }
        if kernel.required_threads.is_some_and(|required| required != block)
            || kernel.max_threads.is_some_and(|most| threads > u64::from(most))
        {
            return Err(CuError::INVALID_VALUE);
        }
        if dynamic > function.dynamic_limit {
            return Err(CuError::INVALID_VALUE);
        }
        let loaded = self.modules.get(&function.module).ok_or(CuError::INVALID_HANDLE)?;
        // ptxas keeps to launch bounds, and fewer threads have room for whatever it takes: the others are worth asking it.
        let bounded = kernel.required_threads.is_some() || kernel.max_threads.is_some();
        if !bounded && !registers_suffice(threads as u32, MOST_REGISTERS) {
            let known = loaded.assembled.known(kernel);
            if known.is_some_and(|taken| !registers_suffice(threads as u32, taken.registers)) {
                return Err(CuError::LAUNCH_OUT_OF_RESOURCES);
            }
        }
        let module = loaded.module.clone();
        Ok(Ready { module, name: function.name.clone(), shape: (grid, block), shared: dynamic })
    }

    /// A new stream.
    pub fn new_stream(&mut self, non_blocking: bool) -> usize {
        let handle = self.handle();
        self.streams.insert(handle, Stream { non_blocking });
        handle
    }

    /// Whether a stream is one of ours; 0, 1 and 2 are the default streams.
    pub fn check_stream(&self, handle: usize) -> Result<(), CuError> {
        if handle <= 2 || self.streams.contains_key(&handle) { Ok(()) } else { Err(CuError::INVALID_HANDLE) }
    }

    /// Ends a stream.
    pub fn end_stream(&mut self, handle: usize) -> Result<(), CuError> {
        self.captures.end_stream(handle);
        self.streams.remove(&handle).map(|_| ()).ok_or(CuError::INVALID_HANDLE)
    }

    /// A new event.
    pub fn new_event(&mut self) -> usize {
        let handle = self.handle();
        self.events.insert(handle, Mark::Never);
        handle
    }

    /// What an event marks.
    pub fn mark(&self, handle: usize) -> Result<Mark, CuError> {
        self.events.get(&handle).cloned().ok_or(CuError::INVALID_HANDLE)
    }

    /// Milliseconds between two events.
    pub fn elapsed(&self, start: usize, end: usize) -> Result<f32, CuError> {
        let time = |handle| match self.events.get(&handle) {
            Some(Mark::At(time)) => Ok(*time),
            _ => Err(CuError::INVALID_HANDLE),
        };
        let (start, end) = (time(start)?, time(end)?);
        let span = end
            .checked_duration_since(start)
            .map_or_else(|| -start.duration_since(end).as_secs_f64(), |span| span.as_secs_f64());
        Ok((span * 1e3) as f32)
    }

    /// Ends an event.
    pub fn end_event(&mut self, handle: usize) -> Result<(), CuError> {
        self.alive()?;
        self.events.remove(&handle).map(|_| ()).ok_or(CuError::INVALID_HANDLE)
    }

    /// A new context of cuBLAS, on the default stream.
    pub fn new_products(&mut self) -> usize {
        let handle = self.handle();
        self.products.insert(handle, 0);
        handle
    }

    /// The stream of a context of cuBLAS.
    pub fn products(&mut self, handle: usize) -> Option<&mut usize> {
        self.products.get_mut(&handle)
    }

    /// Ends a context of cuBLAS.
    pub fn end_products(&mut self, handle: usize) -> Option<()> {
        self.products.remove(&handle).map(|_| ())
    }
}

impl Ready {
    /// Runs the kernel.
    pub fn run(&self, params: &[u8], memory: &DeviceMemory, options: &Options) -> Result<(), CuError> {
        let kernel = self.module.kernels.get(&self.name).ok_or(CuError::INVALID_HANDLE)?;
        let launch = Launch::new(kernel, self.shape, self.shared, params, memory.snapshot(), options);
        match launch.run() {
            Ok(summary) => {
                if let Some(counts) = summary.counts {
                    match std::env::var("CUDA_SIM_COUNT").as_deref() {
                        Ok("json") => eprintln!("{}", counts.json(&self.name)),
                        _ => eprintln!("cuda-sim: {}\n{counts}", self.name),
                    }
                }
                Ok(())
            }
            Err(fault) => {
                eprintln!("cuda-sim: {fault}");
                Err((&*fault).into())
            }
        }
    }
}

/// The capability that a target needs.
struct Needed<'t> {
    name: &'t str,
    capability: u32,
    exactly: bool,
}

impl Needed<'_> {
    fn met_by(&self, capability: u32) -> bool {
        if self.exactly { capability == self.capability } else { capability >= self.capability }
    }
}

fn target_needs(target: &str) -> Option<Needed<'_>> {
    let digits = target.strip_prefix("sm_")?;
    let exactly = digits.ends_with('a');
    let capability = digits.trim_end_matches(['a', 'f']).parse().ok()?;
    Some(Needed { name: target, capability, exactly })
}
