//! `cargo xtask kernels`: every CUDA kernel compiled ahead, to PTX by NVRTC, which devices then find in the cache, and to machine code
//! by ptxas, and what it takes against what its header comment allows.

mod sass;

use crate::dtype::Dtype;
use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use comfy_table::{Table, presets};
use cuda_sim::toolchain::{Resources, Toolchain};
use indicatif::ParallelProgressIterator;
use nsa_core::{CompressKind, DType, NsaConfig};
use nsa_kernels::cuda::ahead::{Budget, Build, Launched, builds};
use nsa_kernels::cuda::compile::{CACHE_VARIABLE, Compiler};
use nsa_tests::sim;
use rayon::prelude::*;
use sass::Counts;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Options of `cargo xtask kernels`.
#[derive(Args, Debug)]
pub struct Options {
    /// Architectures to compile for
    #[arg(long, value_delimiter = ',', default_value = "sm_80,sm_86,sm_89,sm_90a,sm_100")]
    arch: Vec<Arch>,
    /// Configuration, JSON, in place of 16 query heads on 1 KV head, dims 128, the paper's blocks; budgets of shared memory
    /// are the default's
    #[arg(long)]
    config: Option<PathBuf>,
    /// Only these dtypes
    #[arg(long, value_enum, value_delimiter = ',', default_value = "bf16")]
    dtype: Vec<Dtype>,
    /// Only the kernels whose names contain one of these
    #[arg(long, value_delimiter = ',')]
    kernel: Vec<String>,
    /// Keep PTX and machine code in this folder
    #[arg(long)]
    keep: Option<PathBuf>,
}

/// An architecture, and what a multiprocessor of it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Arch {
    name: &'static str,
    capability: (i32, i32),
    threads: u32,
    blocks: u32,
    shared_bytes: u32,
    /// The most that a block may have.
    block_shared_bytes: u32,
}

const ARCHS: [Arch; 5] = [
    Arch {
        name: "sm_80",
        capability: (8, 0),
        threads: 2048,
        blocks: 32,
        shared_bytes: 164 << 10,
        block_shared_bytes: 163 << 10,
    },
    Arch {
        name: "sm_86",
        capability: (8, 6),
        threads: 1536,
        blocks: 16,
        shared_bytes: 100 << 10,
        block_shared_bytes: 99 << 10,
    },
    Arch {
        name: "sm_89",
        capability: (8, 9),
        threads: 1536,
        blocks: 24,
        shared_bytes: 100 << 10,
        block_shared_bytes: 99 << 10,
    },
    Arch {
        name: "sm_90a",
        capability: (9, 0),
        threads: 2048,
        blocks: 32,
        shared_bytes: 228 << 10,
        block_shared_bytes: 227 << 10,
    },
    Arch {
        name: "sm_100",
        capability: (10, 0),
        threads: 2048,
        blocks: 32,
        shared_bytes: 228 << 10,
        block_shared_bytes: 227 << 10,
    },
];

/// Registers of a multiprocessor, and how many a warp takes at a time.
const REGISTERS: (u32, u32) = (64 << 10, 256);
/// Shared memory that a block takes beside its own.
const RESERVED_BYTES: u32 = 1 << 10;

impl FromStr for Arch {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = ARCHS.into_iter().find(|arch| arch.name == name);
        found.ok_or_else(|| format!("there are {}", ARCHS.map(|arch| arch.name).join(", ")))
    }
}

impl Arch {
    /// Threads of a multiprocessor that run at once, of those that it has room for.
    fn occupancy(&self, registers: u32, threads: u32, shared_bytes: u32) -> f64 {
        let warps = threads.div_ceil(32);
        let of_warp = (registers.max(1) * 32).next_multiple_of(REGISTERS.1);
        let by_registers = REGISTERS.0 / of_warp / warps;
        let by_shared = self.shared_bytes / (shared_bytes + RESERVED_BYTES);
        let blocks = by_registers.min(by_shared).min(self.blocks).min(self.threads / (warps * 32));
        f64::from(blocks * warps * 32) / f64::from(self.threads)
    }
}

/// Runs the command.
///
/// # Errors
/// If a kernel does not compile, or takes more than its budget.
pub fn run(options: &Options) -> Result<()> {
    // NVRTC is found where the simulator's processes find it.
    if !sim::inside() {
        let mut command = sim::this_program().map_err(|message| anyhow!(message))?;
        // What is compiled here is for the machine's devices, not for simulated ones alone.
        match std::env::var_os(CACHE_VARIABLE) {
            Some(folder) => command.env(CACHE_VARIABLE, folder),
            None => command.env_remove(CACHE_VARIABLE),
        };
        let status = command.args(std::env::args_os().skip(1)).status()?;
        ensure!(status.success(), "the kernels failed, as said above");
        return Ok(());
    }
    let config = match &options.config {
        Some(file) => nsa_core::read_json(file)?,
        None => NsaConfig::builder(16, 1, 128, 128).compress_kind(CompressKind::Mean).build()?,
    };
    let own = tempfile::tempdir()?;
    let folder = options.keep.as_deref().unwrap_or(own.path());
    std::fs::create_dir_all(folder).with_context(|| format!("--keep: {} cannot be made", folder.display()))?;
    let toolchain = sim::toolchain().map_err(|message| anyhow!(message))?;
    let bench = Bench { toolchain, folder, shared: options.config.is_none(), filters: &options.kernel };
    let compiler = Compiler::new(ARCHS[0].capability);
    let mut works = Vec::new();
    for &dtype in &options.dtype {
        for &arch in &options.arch {
            works.extend(bench.works(&config, dtype.into(), arch));
        }
    }
    works.sort_by(|one, other| one.name.cmp(&other.name));
    // One after the other, as architectures share PTX.
    let of_archs: Vec<_> = works.chunk_by(|one, other| one.name == other.name).collect();
    let compile = |works: &&[Work]| works.iter().map(|work| bench.compile(work)).collect::<Result<Vec<_>>>();
    let lines = of_archs.par_iter().progress().map(compile).collect::<Result<Vec<_>>>()?.concat().concat();
    ensure!(!lines.is_empty(), "no kernel has {} in its name", options.kernel.join(" or "));
    println!("{}", table(&lines));
    let (major, minor) = compiler.version()?;
    match compiler.cache_folder() {
        Some(folder) if tempfile::tempfile_in(folder).is_err() => {
            println!("PTX is not kept: {} cannot be written", folder.display());
        }
        Some(folder) => println!("PTX of NVRTC {major}.{minor} is kept in {}, for devices too", folder.display()),
        None => println!("PTX is not kept: neither {CACHE_VARIABLE} nor a user's cache folder is set"),
    }
    let breaches: Vec<String> = lines.iter().flat_map(Line::breaches).collect();
    if !breaches.is_empty() {
        bail!("{} over their budgets:\n{}", breaches.len(), breaches.join("\n"));
    }
    println!("all within their budgets");
    Ok(())
}

/// What compiles.
struct Bench<'a> {
    toolchain: Toolchain,
    folder: &'a Path,
    /// Whether budgets of shared memory are for this configuration.
    shared: bool,
    filters: &'a [String],
}

/// A program to be compiled for an architecture.
struct Work {
    build: Build,
    dtype: DType,
    arch: Arch,
    /// The program's, its constants' and the type's; of all architectures.
    name: String,
}

/// A kernel on an architecture.
#[derive(Clone)]
struct Line {
    kernel: Launched,
    arch: Arch,
    dtype: DType,
    resources: Resources,
    counts: Counts,
    budget: Budget,
    /// Whether the budget of shared memory is for this configuration.
    shared: bool,
}

impl Bench<'_> {
    fn wants(&self, kernel: &Launched) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| kernel.name.contains(filter))
    }

    /// The programs with kernels that are wanted; those with several sets of constants have files of their own.
    fn works(&self, config: &NsaConfig, dtype: DType, arch: Arch) -> Vec<Work> {
        let mut works: Vec<Work> = Vec::new();
        for build in builds(config, dtype, arch.capability) {
            if !build.kernels.iter().any(|kernel| self.wants(kernel)) {
                continue;
            }
            let file = build.program.file;
            let more = match works.iter().filter(|work| work.build.program.file == file).count() {
                0 => String::new(),
                before => format!("-{}", before + 1),
            };
            let name = format!("{}{more}.{dtype}", file.trim_end_matches(".cu"));
            works.push(Work { build, dtype, arch, name });
        }
        works
    }

    fn compile(&self, Work { build, dtype, arch, name }: &Work) -> Result<Vec<Line>> {
        let budgets = build.program.budgets().map_err(|message| anyhow!(message))?;
        let ptx = Compiler::new(arch.capability).ptx(build.program, &build.constants)?;
        let stem = format!("{name}.{}", arch.name);
        let (file, binary) = (self.folder.join(format!("{stem}.ptx")), self.folder.join(format!("{stem}.cubin")));
        std::fs::write(&file, ptx).with_context(|| format!("{} cannot be written", file.display()))?;
        let found = self.toolchain.assemble(&file, arch.name, &binary)?;
        let counts = sass::counts(&self.toolchain, &binary)?;
        let kernels = build.kernels.iter().filter(|kernel| self.wants(kernel));
        let line = |kernel: &Launched| {
            let missing = |what: &str| format!("{}: no {what} of kernel {}", build.program.file, kernel.name);
            let resources = found.iter().find(|resources| resources.kernel == kernel.name);
            let budget = Budget::of(&budgets, kernel.name, arch.name);
            Ok(Line {
                kernel: kernel.clone(),
                arch: *arch,
                dtype: *dtype,
                resources: resources.with_context(|| missing("resources"))?.clone(),
                counts: counts.get(kernel.name).copied().unwrap_or_default(),
                budget: budget.with_context(|| missing("budget"))?.clone(),
                shared: self.shared,
            })
        };
        kernels.map(line).collect()
    }
}

impl Line {
    fn shared_bytes(&self) -> u32 {
        self.resources.shared_bytes + self.kernel.shared_bytes
    }

    /// What is over the budget.
    fn breaches(&self) -> Vec<String> {
        let (spills, Budget { registers, spill_bytes, shared_bytes, .. }) = (self.resources.spills, &self.budget);
        let of_budget = if self.shared { *shared_bytes } else { self.arch.block_shared_bytes };
        [
            ("registers", self.resources.registers, *registers),
            ("bytes of spills", spills.0.max(spills.1), *spill_bytes),
            ("bytes of shared memory", self.shared_bytes(), of_budget.min(self.arch.block_shared_bytes)),
        ]
        .into_iter()
        .filter(|(_, takes, allowed)| takes > allowed)
        .map(|(what, takes, allowed)| {
            format!("{} on {} in {}: {takes} {what}, {allowed} allowed", self.kernel.name, self.arch.name, self.dtype)
        })
        .collect()
    }
}

fn table(lines: &[Line]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "kernel",
        "arch",
        "dtype",
        "threads",
        "registers",
        "spills",
        "shared",
        "occupancy",
        "MMA",
        "LDSM",
        "LDGSTS",
        "bulk",
        "instructions",
    ]);
    for line in lines {
        let Line { kernel, arch, resources, counts, budget, .. } = line;
        table.add_row([
            kernel.name.to_owned(),
            arch.name.to_owned(),
            line.dtype.to_string(),
            kernel.threads.to_string(),
            format!("{} of {}", resources.registers, budget.registers),
            resources.spills.0.max(resources.spills.1).to_string(),
            format!("{} of {}", line.shared_bytes(), budget.shared_bytes),
            format!("{:.0} %", 100.0 * arch.occupancy(resources.registers, kernel.threads, line.shared_bytes())),
            counts.mma.to_string(),
            counts.matrix_loads.to_string(),
            counts.copies.to_string(),
            counts.bulk_copies.to_string(),
            counts.instructions.to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn occupancy_is_that_of_the_scarcest() {
        let a100: Arch = "sm_80".parse().unwrap();
        // Threads, registers, shared memory, blocks.
        assert_eq!(a100.occupancy(32, 256, 0), 1.0);
        assert_eq!(a100.occupancy(128, 256, 0), 0.25);
        assert_eq!(a100.occupancy(255, 128, 0), 0.125);
        assert_eq!(a100.occupancy(32, 256, 80 << 10), 0.25);
        assert_eq!(a100.occupancy(16, 32, 0), 0.5);
        assert!("sm_75".parse::<Arch>().is_err());
    }
}
