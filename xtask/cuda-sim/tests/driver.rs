//! The driver, loaded by name as programs do: in a process of its own with the simulator as its libcuda.

use cuda_sim::probe::Fixture;
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

/// What the driver answers to a group of calls, here and on an H100.
fn group(library: &Path, number: usize) -> (String, String, String) {
    let answer = library.join("answer");
    let status = Command::new(env!("CARGO_BIN_EXE_cuda-probe"))
        .args(["--host", &number.to_string()])
        .arg(&answer)
        .env("LD_LIBRARY_PATH", library)
        .env("CUDA_SIM_DEVICE", "h100")
        .status()
        .unwrap();
    assert!(status.success());
    let here = Fixture::read(&answer).unwrap().answers.remove(0);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/h100.fixture");
    let there = Fixture::read(Path::new(path)).unwrap().answers.into_iter().find(|answer| answer.name == here.name);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (here.name, text(here.output), text(there.unwrap().output))
}

/// Misuse gets the real driver's codes: double frees, foreign pointers, grids too large, faults that end a context.
#[test]
fn calls_answer_as_the_hardwares_driver() {
    let library = library();
    // PTX newer than the driver is read here, and names of errors that nothing returns are not known.
    let known = ["loading version 9.9", "loading target sm_80 with wgmma"];
    for number in [0, 3, 4, 5, 6, 8, 9, 10, 11] {
        let (name, here, there) = group(library.path(), number);
        assert_eq!(here.lines().count(), there.lines().count(), "{name}");
        for (here, there) in here.lines().zip(there.lines()) {
            let expected = known.iter().any(|known| there.starts_with(known));
            assert!(expected || here == there, "{name}: here `{here}`, on hardware `{there}`");
        }
    }
}
