//! Execution: a launch's CTAs over all cores, each CTA's warps in turns, 32 lanes an operation.

pub mod access;
mod atomic;
mod barrier;
mod bulk;
pub mod checks;
mod cta;
mod fault;
pub mod lanes;
mod late;
mod matrix;
mod mbarrier;
pub mod mma;
mod product;
pub mod regs;
mod swizzle;
mod system;
pub mod warp;
mod wgmma;
pub mod window;

pub use fault::{Fault, FaultKind, Finding, Party};

use crate::check::{Checker, GlobalShadow};
use crate::code::{Kernel, Order};
use crate::count::{Counter, Counts};
use crate::memory::Allocation;
use crate::ptx::Space;
use checks::{Checks, Unchecked};
use cta::Cta;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Locks for atomics of 64 bits.
const LOCKS: usize = 64;

/// How a launch is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Run the checker.
    pub check: bool,
    /// Count.
    pub count: bool,
    /// Order of CTAs and warps, and which warps' asynchronous copies land late; ascending and at once without one.
    pub seed: Option<u64>,
    /// Operations that a CTA may take.
    pub budget: u64,
    /// What shared memory holds at a CTA's start.
    pub shared_fill: u32,
    /// Multiprocessors of the device, for `%smid`.
    pub multiprocessors: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { check: true, count: false, seed: None, budget: 1 << 33, shared_fill: 0xffff_ffff, multiprocessors: 1 }
    }
}

/// What a launch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Operations of warps.
    pub operations: u64,
    /// Counters, where they were asked for.
    pub counts: Option<Counts>,
}

/// A kernel with its grid and arguments.
pub struct Launch<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// CTAs.
    pub grid: [u32; 3],
    /// Threads of a CTA.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: u32,
    /// Parameters as they lie in memory.
    pub params: &'a [u8],
    /// Allocations in the order of their addresses.
    pub memory: Vec<Arc<Allocation>>,
    /// How to run.
    pub options: &'a Options,
    /// What the checker knows of global memory.
    pub shadow: Arc<GlobalShadow>,
    /// Locks for atomics of 64 bits.
    wide_atomics: [Mutex<()>; LOCKS],
    /// Held where memory and what the checker knows of a place change together.
    strong: Mutex<()>,
    printed: Mutex<String>,
}

impl<'a> Launch<'a> {
    /// A launch of a kernel.
    pub fn new(
        kernel: &'a Kernel,
        (grid, block): ([u32; 3], [u32; 3]),
        dynamic_shared: u32,
        params: &'a [u8],
        memory: Vec<Arc<Allocation>>,
        options: &'a Options,
    ) -> Self {
        let wide_atomics = std::array::from_fn(|_| Mutex::new(()));
        let (strong, printed) = (Mutex::new(()), Mutex::new(String::new()));
        let shadow = Arc::new(GlobalShadow::new(kernel.narrowest.global));
        Self { kernel, grid, block, dynamic_shared, params, memory, options, shadow, wide_atomics, strong, printed }
    }

    /// Keeps other CTAs from strong accesses to global memory while one is checked and done: what a CTA reads at a place and
    /// what it learns there come from the same writer.
    fn alone<C: Checks>(&self, space: Space, order: Order) -> Option<MutexGuard<'_, ()>> {
        let strong = C::ON && order != Order::Weak && matches!(space, Space::Global | Space::Generic);
        strong.then(|| self.strong.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs all CTAs.
    ///
    /// # Errors
    /// The first fault that was found.
    pub fn run(&self) -> Result<Summary, Box<Fault>> {
        let result = match (self.options.check, self.options.count) {
            (false, false) => self.run_with::<Unchecked>(),
            (true, false) => self.run_with::<Checker>(),
            (false, true) => self.run_with::<Counter>(),
            (true, true) => self.run_with::<(Checker, Counter)>(),
        };
        let printed = self.printed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stdout = std::io::stdout().lock();
        // A closed standard output loses what kernels print, as on a device.
        let _ = stdout.write_all(printed.as_bytes()).and_then(|()| stdout.flush());
        result
    }

    fn run_with<C: Checks>(&self) -> Result<Summary, Box<Fault>> {
        let count = self.grid.iter().map(|size| u64::from(*size)).product::<u64>();
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let mut order: Vec<u32> = (0..count).collect();
        if let Some(seed) = self.options.seed {
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        }
        let failed = AtomicBool::new(false);
        let summary = Mutex::new(Summary::default());
        let fault = order.par_iter().with_max_len(1).find_map_any(|linear| {
            if failed.load(Relaxed) {
                return None;
            }
            match Cta::<C>::new(self, *linear).run() {
                Ok((checks, ran)) => {
                    let counts = checks.counts();
                    let mut summary = summary.lock().unwrap_or_else(PoisonError::into_inner);
                    summary.operations += ran;
                    if let Some(counts) = counts {
                        summary.counts.get_or_insert_default().add(&counts);
                    }
                    None
                }
                Err(fault) => {
                    failed.store(true, Relaxed);
                    Some(fault)
                }
            }
        });
        let summary = summary.into_inner().unwrap_or_else(PoisonError::into_inner);
        fault.map_or(Ok(summary), Err)
    }

    /// Keeps what a kernel prints until the launch is over.
    fn print(&self, text: &str) {
        self.printed.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
    }
}
