//! What tools need to compile kernels before anyone runs them: which programs there are for a configuration, with which
//! constants, how they are launched, and what their header comments allow them.

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

/// What a kernel may take, from a line `// budget: kernel=NAME threads=… registers=… spills=… shared=…` of its program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    /// The kernel.
    pub kernel: String,
    /// Threads of a block.
    pub threads: u32,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of registers that are kept in memory.
    pub spill_bytes: u32,
    /// Bytes of shared memory of a block, static and dynamic.
    pub shared_bytes: u32,
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
        threads: number("threads")?,
        registers: number("registers")?,
        spill_bytes: number("spills")?,
        shared_bytes: number("shared")?,
    })
}

/// The programs that operations on tensors of a type run for a configuration; layers as wide as all heads.
pub fn builds(config: &NsaConfig, dtype: DType) -> Vec<Build> {
    [
        attention::builds(config, dtype),
        compress::builds(config, dtype),
        decode::builds(config, dtype),
        gate::builds(config, dtype),
        gradients::builds(config, dtype),
        layer::builds(config, dtype),
        reduce::builds(dtype),
        slc::builds(config, dtype),
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
        for build in builds(&config, DType::Bf16) {
            for budget in build.program.budgets().unwrap() {
                let kernel = build.kernels.iter().find(|kernel| kernel.name == budget.kernel);
                assert!(kernel.is_none_or(|kernel| kernel.threads == budget.threads), "{budget:?}");
                allowed.push(budget.kernel);
            }
            for kernel in build.kernels {
                let declared = format!("{}(const __grid_constant__", kernel.name);
                assert!(build.program.text.contains(&declared), "{}", kernel.name);
                launched.push(kernel.name.to_owned());
            }
        }
        for list in [&mut allowed, &mut launched] {
            list.sort();
            list.dedup();
        }
        assert_eq!(allowed, launched);
    }

    #[test]
    fn a_budget_is_read_from_its_line() {
        let read = budget(" kernel=k threads=256 registers=40 spills=0 shared=32").unwrap();
        assert_eq!(read, Budget { kernel: "k".into(), threads: 256, registers: 40, spill_bytes: 0, shared_bytes: 32 });
        assert_eq!(budget(" kernel=k threads=256 registers=many spills=0 shared=32"), None);
    }
}
