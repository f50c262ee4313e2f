//! The driver, loaded by name as programs do: in a process of its own with the simulator as its libcuda.

use cuda_sim::probe::Fixture;
use cuda_sim::toolchain::Toolchain;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder in which the simulator is `libcuda.so`.
fn library() -> tempfile::TempDir {
    let program = std::env::current_exe().unwrap();
    let built: PathBuf = program.parent().unwrap().join("libcuda_sim.so");
    assert!(built.exists(), "{} was not built", built.display());
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(&built, folder.path().join("libcuda.so")).unwrap();
    folder
}

/// Runs a group of calls: its name, its answer here and on an H100, and what was said on standard error.
fn group(library: &Path, number: usize, toolchain: &Path) -> (String, String, String, String) {
    let answer = library.join("answer");
    let output = Command::new(env!("CARGO_BIN_EXE_cuda-probe"))
        .args(["--host", &number.to_string()])
        .arg(&answer)
        .env("LD_LIBRARY_PATH", library)
        .env("CUDA_SIM_DEVICE", "h100")
        .env("CUDA_SIM_TOOLCHAIN", toolchain)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let here = Fixture::read(&answer).unwrap().answers.remove(0);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/h100.fixture");
    let there = Fixture::read(Path::new(path)).unwrap().answers.into_iter().find(|answer| answer.name == here.name);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (here.name, text(here.output), text(there.unwrap().output), said)
}

/// Where the tests' compilers lie.
fn toolchain() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/toolchain")
}

/// Misuse gets the real driver's codes: double frees, foreign pointers, grids too large, faults that end a context.
#[test]
fn calls_answer_as_the_hardwares_driver() {
    let library = library();
    for number in [0, 3, 4, 5, 6, 8, 9, 10, 11] {
        let (name, here, there, _) = group(library.path(), number, &toolchain());
        assert_eq!(here.lines().count(), there.lines().count(), "{name}");
        for (here, there) in here.lines().zip(there.lines()) {
            assert!(here == there, "{name}: here `{here}`, on hardware `{there}`");
        }
    }
}

/// Registers are those of ptxas, and so occupancy and attributes of kernels are those of the hardware's driver.
#[test]
fn occupancy_follows_the_assembler() {
    Toolchain::find_or_fetch(&toolchain()).unwrap_or_else(|error| panic!("{error}"));
    let library = library();
    let (_, here, there, said) = group(library.path(), 7, &toolchain());
    assert!(here == there && said.is_empty(), "{said}");
    let (_, here, there, _) = group(library.path(), 1, &toolchain());
    let functions = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with("function")).map(str::to_owned).collect()
    };
    assert_eq!(functions(&here), functions(&there));
}

/// Without an assembler that is said, and a bound is taken.
#[test]
fn a_missing_assembler_is_named() {
    if Toolchain::find(Path::new("/nowhere")).is_some() {
        return;
    }
    let (_, here, _, said) = group(library().path(), 7, Path::new("/nowhere"));
    assert!(said.contains("no ptxas") && said.contains("bounds"), "{said}");
    assert!(here.contains("registers 243 threads 256 shared 0: 0 1"), "{here}");
}
