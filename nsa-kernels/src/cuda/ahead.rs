//! What tools need to compile kernels before anyone runs them: which programs there are for a configuration, with which
//! constants, how they are launched, and what their header comments allow them.

use super::geometry::Unit;
use super::program::{Constants, Program};
use super::{attention, compress, decode, gate, gradients, layer, reduce, slc};
use nsa_core::{DType, NsaConfig};

/// A program with its constants, and kernels of it.
#[derive(Clone, Debug)]
pub struct Build {
    /// The program.
    pub program: &'static Program,
    /// What is baked in.
    pub constants: Constants,
    /// Those that are launched with these constants.
    pub kernels: Vec<Launched>,
}

/// How a kernel is launched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// The kernel.
    pub name: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// What a kernel may take, from a line `// budget: kernel=NAME threads=… registers=… spills=… shared=…` of its program; with
/// `arch=sm_…` for that architecture alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// The kernel.
    pub kernel: String,
    /// The architecture, if it has a budget of its own.
    pub arch: Option<String>,
    /// Threads of a block.
    pub threads: u32,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of registers that are kept in memory.
    pub spill_bytes: u32,
    /// Bytes of shared memory of a block, static and dynamic.
    pub shared_bytes: u32,
}

impl Budget {
    /// That of a kernel on an architecture.
    pub fn of<'b>(budgets: &'b [Self], kernel: &str, arch: &str) -> Option<&'b Self> {
        let of_kernel = || budgets.iter().filter(|budget| budget.kernel == kernel);
        let own = of_kernel().find(|budget| budget.arch.as_deref() == Some(arch));
        own.or_else(|| of_kernel().find(|budget| budget.arch.is_none()))
    }
}

impl Build {
    /// Of kernels without dynamic shared memory.
    pub(crate) fn new(program: &'static Program, constants: Constants, kernels: &[(&'static str, u32)]) -> Self {
        let launched = |&(name, threads)| Launched { name, threads, shared_bytes: 0 };
        Self { program, constants, kernels: kernels.iter().map(launched).collect() }
    }
}

impl Program {
    /// What its header comment allows its kernels.
    ///
    /// # Errors
    /// The line that cannot be read.
    pub fn budgets(&self) -> Result<Vec<Budget>, String> {
        let lines = self.text.lines().filter_map(|line| line.trim().strip_prefix("// budget:"));
        lines.map(|line| budget(line).ok_or_else(|| format!("{}: budget:{line}", self.file))).collect()
    }
}

fn budget(line: &str) -> Option<Budget> {
    let field = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let number = |name: &str| field(name)?.parse().ok();
    Some(Budget {
        kernel: field("kernel")?.to_owned(),
        arch: field("arch").map(str::to_owned),
        threads: number("threads")?,
        registers: number("registers")?,
        spill_bytes: number("spills")?,
        shared_bytes: number("shared")?,
    })
}

/// The programs that operations on tensors of a type run for a configuration on a device of a compute capability; layers as
/// wide as all heads.
pub fn builds(config: &NsaConfig, dtype: DType, capability: (i32, i32)) -> Vec<Build> {
    let unit = Unit::of(capability);
    [
        attention::builds(config, dtype, unit),
        compress::builds(config, dtype),
        decode::builds(config, dtype),
        gate::builds(config, dtype),
        gradients::builds(config, dtype, unit),
        layer::builds(config, dtype),
        reduce::builds(dtype),
        slc::builds(config, dtype, unit),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::CompressKind;

    #[test]
    fn every_kernel_has_a_budget_and_every_budget_a_kernel() {
        let config = NsaConfig::builder(16, 1, 128, 128).compress_kind(CompressKind::Mean).build().unwrap();
        let mut allowed = Vec::new();
        let mut launched = Vec::new();
        for (arch, capability) in [("sm_80", (8, 0)), ("sm_90a", (9, 0))] {
            for build in builds(&config, DType::Bf16, capability) {
                let budgets = build.program.budgets().unwrap();
                for kernel in &build.kernels {
                    let declared = format!("{}(const __grid_constant__", kernel.name);
                    assert!(build.program.text.contains(&declared), "{}", kernel.name);
                    let budget = Budget::of(&budgets, kernel.name, arch).unwrap();
                    assert_eq!(kernel.threads, budget.threads, "{arch} {budget:?}");
                    launched.push(kernel.name.to_owned());
                }
                allowed.extend(budgets.into_iter().map(|budget| budget.kernel));
            }
        }
        for list in [&mut allowed, &mut launched] {
            list.sort();
            list.dedup();
        }
        assert_eq!(allowed, launched);
    }

    #[test]
    fn devices_from_8_0_to_9_0_differ_by_kernels_whose_warps_multiply_together() {
        for (dims, dtype) in [(128, DType::Bf16), (128, DType::F32), (96, DType::F16)] {
            let config = NsaConfig::builder(16, 1, dims, dims).compress_kind(CompressKind::Mean).build().unwrap();
            let source = |build: &Build| build.program.source(&build.constants);
            let old = builds(&config, dtype, (8, 0));
            assert!(old.iter().all(|build| !build.constants.warpgroups()));
            let old: Vec<_> = old.iter().map(source).collect();
            let mut other = builds(&config, dtype, (9, 0));
            other.retain(|build| !old.contains(&source(build)));
            assert!(other.iter().all(|build| build.constants.warpgroups()), "{dims} {dtype}");
            assert_eq!(other.is_empty(), (dims, dtype) != (128, DType::Bf16));
        }
    }

    #[test]
    fn a_budget_is_read_from_its_line() {
        let read = budget(" kernel=k threads=256 registers=40 spills=0 shared=32").unwrap();
        let (kernel, arch) = ("k".to_owned(), None);
        let expected = Budget { kernel, arch, threads: 256, registers: 40, spill_bytes: 0, shared_bytes: 32 };
        assert_eq!(read, expected);
        let own = budget("kernel=k arch=sm_90a threads=128 registers=40 spills=0 shared=32").unwrap();
        let budgets = [read, own.clone()];
        assert_eq!(Budget::of(&budgets, "k", "sm_90a"), Some(&own));
        assert_eq!(Budget::of(&budgets, "k", "sm_80"), Some(&expected));
        assert_eq!(Budget::of(&budgets, "other", "sm_80"), None);
        assert_eq!(budget(" kernel=k threads=256 registers=many spills=0 shared=32"), None);
    }
}
