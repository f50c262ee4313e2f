//! What this machine is: printed with every figure.

use crate::files;
use std::process::Command;

/// A machine and a state of the repository.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Threads that operations use.
    pub threads: usize,
    /// Bytes of memory, if the system tells.
    pub memory_bytes: Option<u64>,
    /// Bytes of it that are free for use.
    pub available_bytes: Option<u64>,
    /// The commit, `+` behind it if files differ from it.
    pub commit: String,
}

impl Machine {
    /// This machine, this repository.
    pub fn here() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            cpu: cpu.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned()),
            threads: rayon::current_num_threads(),
            memory_bytes: meminfo("MemTotal:"),
            available_bytes: meminfo("MemAvailable:"),
            commit: commit(),
        }
    }

    /// One line: processor, threads, commit.
    pub fn line(&self) -> String {
        format!("{}, {} threads, commit {}", self.cpu, self.threads, self.commit)
    }
}

fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).current_dir(files::root()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|list| !list.is_empty());
    if changed { format!("{head}+") } else { head }
}

/// Instruction sets that matter to kernels, with whether the processor has them.
pub fn features() -> Vec<(&'static str, bool)> {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    macro_rules! detect {
        ($detected:ident: $($name:tt),*) => { vec![$(($name, std::arch::$detected!($name))),*] };
    }
    #[cfg(target_arch = "x86_64")]
    return detect!(
        is_x86_feature_detected:
        "sse4.2", "avx", "f16c", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16"
    );
    #[cfg(target_arch = "aarch64")]
    return detect!(is_aarch64_feature_detected: "neon", "fp16", "dotprod", "bf16", "i8mm", "sve", "sve2");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}
