//! NVIDIA's compilers: those of the machine, or pinned ones that pip fetches once into a folder.

use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use thiserror::Error;

/// What is fetched, with checksums.
const PACKAGES: &str = include_str!("../toolchain.txt");
/// Where the packages put everything.
const INSIDE: &str = "nvidia/cu13";
/// The folder's name changes with what is in it.
const NAME: &str = "cuda-13.0.88";

/// Why there is no compiler.
#[derive(Debug, Error)]
pub enum ToolchainError {
    /// A folder or file cannot be made.
    #[error("toolchain: {0}")]
    Io(#[from] std::io::Error),
    /// pip does not start or does not succeed.
    #[error("toolchain: pip cannot fetch it (Debian: apt install python3-pip; or set CUDA_HOME to a toolkit): {0}")]
    Fetch(String),
    /// A program of the toolchain failed.
    #[error("{program} failed: {message}")]
    Failed {
        /// The program.
        program: String,
        /// What it said.
        message: String,
    },
}

/// A CUDA toolkit: nvcc, ptxas, nvdisasm, NVRTC and the headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    root: PathBuf,
}

/// What an assembler says of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// The kernel.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of spill stores and spill loads.
    pub spills: (u32, u32),
    /// Bytes of static shared memory.
    pub shared_bytes: u32,
    /// Bytes of the stack frame: local memory of a thread.
    pub stack_bytes: u32,
}

impl Toolchain {
    /// The machine's toolkit (`CUDA_HOME`, `CUDA_PATH`, `/usr/local/cuda`), else the pinned one below `folder`, fetched if
    /// it is not there yet.
    ///
    /// # Errors
    /// It is not there and cannot be fetched.
    pub fn find_or_fetch(folder: &Path) -> Result<Self, ToolchainError> {
        Self::find(folder).map_or_else(|| Self::fetch(folder), Ok)
    }

    /// The machine's toolkit, or the pinned one below `folder` if it was fetched.
    pub fn find(folder: &Path) -> Option<Self> {
        let given = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
        let places = given.chain([PathBuf::from("/usr/local/cuda"), folder.join(NAME).join(INSIDE)]);
        places.into_iter().find(|root| root.join("bin/nvcc").exists()).map(|root| Self { root })
    }

    /// The pinned toolkit below `folder`. It is made whole under another name first: two may try at once.
    fn fetch(folder: &Path) -> Result<Self, ToolchainError> {
        let target = folder.join(NAME);
        let root = target.join(INSIDE);
        std::fs::create_dir_all(folder)?;
        let partial = folder.join(format!(".partial-{}", std::process::id()));
        std::fs::create_dir_all(&partial)?;
        let result = install(&partial);
        if let Err(error) = result {
            std::fs::remove_dir_all(&partial)?;
            return Err(error);
        }
        if let Err(error) = std::fs::rename(&partial, &target) {
            std::fs::remove_dir_all(&partial)?;
            // Another run may have been faster.
            if !root.exists() {
                return Err(error.into());
            }
        }
        Ok(Self { root })
    }

    /// A program: `nvcc`, `ptxas`, `nvdisasm`, `cuobjdump`.
    pub fn program(&self, name: &str) -> PathBuf {
        self.root.join("bin").join(name)
    }

    /// The folder of the headers; CCCL's lie below it in `cccl`.
    pub fn include(&self) -> PathBuf {
        self.root.join("include")
    }

    /// The folder of NVRTC's library.
    pub fn libraries(&self) -> PathBuf {
        let lib = self.root.join("lib");
        if lib.exists() { lib } else { self.root.join("lib64") }
    }

    /// Compiles a CUDA source to PTX text, with lines of the source.
    ///
    /// # Errors
    /// nvcc's messages.
    pub fn compile(&self, source: &Path, arch: &str, options: &[&str]) -> Result<String, ToolchainError> {
        let out = source.with_extension(format!("{arch}.ptx"));
        let mut command = Command::new(self.program("nvcc"));
        command.arg("-ptx").arg(format!("-arch={arch}")).args(["-lineinfo", "-std=c++17"]).args(options);
        command
            .arg("-I")
            .arg(self.include())
            .arg("-I")
            .arg(self.include().join("cccl"))
            .arg("-o")
            .arg(&out)
            .arg(source);
        run(&mut command)?;
        Ok(std::fs::read_to_string(out)?)
    }

    /// Assembles PTX and tells what its kernels take.
    ///
    /// # Errors
    /// ptxas's messages.
    pub fn assemble(&self, ptx: &Path, arch: &str, out: &Path) -> Result<Vec<Resources>, ToolchainError> {
        Ok(resources(&self.assembled(ptx, arch, out)?))
    }

    /// What ptxas says while it assembles.
    fn assembled(&self, ptx: &Path, arch: &str, out: &Path) -> Result<String, ToolchainError> {
        let mut command = Command::new(self.program("ptxas"));
        command.args(["-v", &format!("-arch={arch}"), "-o"]).arg(out).arg(ptx);
        let output = run(&mut command)?;
        Ok(String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout))
    }

    /// What kernels of PTX text take, as the assembler says: asked once for each text and architecture, then read from
    /// `folder`.
    ///
    /// # Errors
    /// ptxas's messages, or files that cannot be written.
    pub fn resources(&self, ptx: &str, arch: &str, folder: &Path) -> Result<Vec<Resources>, ToolchainError> {
        let mut hash = Sha256::new();
        for part in [&self.root.to_string_lossy(), arch, ptx] {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let kept = folder.join("resources").join(name);
        if let Ok(text) = std::fs::read_to_string(&kept) {
            return Ok(resources(&text));
        }
        let partial = folder.join(format!(".resources-{}", std::process::id()));
        std::fs::create_dir_all(&partial)?;
        let source = partial.join("module.ptx");
        std::fs::write(&source, ptx)?;
        let found = self.assembled(&source, arch, &partial.join("module.cubin"));
        std::fs::remove_dir_all(&partial)?;
        let text = found?;
        std::fs::create_dir_all(folder.join("resources"))?;
        let whole = kept.with_extension(std::process::id().to_string());
        std::fs::write(&whole, &text)?;
        std::fs::rename(&whole, &kept)?;
        Ok(resources(&text))
    }
}

fn install(folder: &Path) -> Result<(), ToolchainError> {
    let requirements = folder.join("toolchain.txt");
    std::fs::write(&requirements, PACKAGES)?;
    let mut command = Command::new("python3");
    command.args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--require-hashes", "--target"]);
    let output = command.arg(folder).arg("--requirement").arg(&requirements).output();
    let output = output.map_err(|error| ToolchainError::Fetch(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(ToolchainError::Fetch(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

fn run(command: &mut Command) -> Result<Output, ToolchainError> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(output);
    }
    let program = command.get_program().to_string_lossy().into_owned();
    let message = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    Err(ToolchainError::Failed { program, message })
}

/// Reads what `ptxas -v` says.
fn resources(text: &str) -> Vec<Resources> {
    let mut found: Vec<Resources> = Vec::new();
    for line in text.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or("").to_owned();
            found.push(Resources { kernel, registers: 0, spills: (0, 0), shared_bytes: 0, stack_bytes: 0 });
        }
        let Some(last) = found.last_mut() else { continue };
        let before = |what: &str| -> Option<u32> {
            let (head, _) = line.split_once(what)?;
            head.split_whitespace().last()?.parse().ok()
        };
        if let (Some(stores), Some(loads)) = (before(" bytes spill stores"), before(" bytes spill loads")) {
            last.spills = (stores, loads);
        }
        last.stack_bytes = before(" bytes stack frame").unwrap_or(last.stack_bytes);
        last.registers = before(" registers").unwrap_or(last.registers);
        last.shared_bytes = before(" bytes smem").unwrap_or(last.shared_bytes);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{Resources, resources};

    #[test]
    fn an_assemblers_words_are_read() {
        let text = "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function 'k' for 'sm_80'\n\
                    ptxas info    : Function properties for k\n    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
                    ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 372 bytes cmem[0]\n";
        let expected =
            Resources { kernel: "k".into(), registers: 40, spills: (4, 12), shared_bytes: 1024, stack_bytes: 8 };
        assert_eq!(resources(text), [expected]);
    }
}
