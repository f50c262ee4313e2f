//! What the tree itself must keep: sizes of files, where unsafe is, no leftovers, links that lead somewhere.

use std::path::{Path, PathBuf};

/// Files with unsafe code; ARCHITECTURE.md says why.
const UNSAFE: [&str; 20] = [
    "nsa-decode/src/weights.rs",
    "nsa-kernels/src/cpu/gemm.rs",
    "nsa-kernels/src/cpu/inner.rs",
    "nsa-kernels/src/cpu/simd/avx2.rs",
    "nsa-kernels/src/cpu/simd/avx512.rs",
    "nsa-kernels/src/cpu/simd/mod.rs",
    "nsa-kernels/src/cpu/simd/neon.rs",
    "nsa-kernels/src/cpu/simd/portable.rs",
    "nsa-kernels/src/cuda/blas.rs",
    "nsa-kernels/src/cuda/graph.rs",
    "nsa-kernels/src/cuda/launch.rs",
    "nsa-kernels/src/cuda/library.rs",
    "nsa-kernels/src/cuda/memory.rs",
    "nsa-kernels/src/cuda/tensor_map.rs",
    "nsa-train/src/mapped.rs",
    "xtask/cuda-sim/src/bin/probe/device.rs",
    "xtask/cuda-sim/src/driver/ffi/blas.rs",
    "xtask/cuda-sim/src/driver/ffi/launch.rs",
    "xtask/cuda-sim/src/driver/ffi/mod.rs",
    "xtask/cuda-sim/tests/cudarc.rs",
];
const MAX_LINES: usize = 600;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository")
}

/// Files of the repository with this extension, without build and run outputs.
fn files(extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                if !name.starts_with('.') && !["target", "out"].contains(&name) {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no .{extension} file below {}", root().display());
    found
}

fn name(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/")
}

/// Numbered lines without their comments.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line.split("//").next().unwrap_or("")))
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_')
}

#[test]
fn files_are_short() {
    let lines = |path: &PathBuf| (name(path), std::fs::read_to_string(path).unwrap().lines().count());
    let long: Vec<_> = files("rs").iter().map(lines).filter(|(_, lines)| *lines > MAX_LINES).collect();
    assert!(long.is_empty(), "over {MAX_LINES} lines: {long:#?}");
}

#[test]
fn unsafe_code_is_where_it_is_listed() {
    let mut wrong = Vec::new();
    for path in files("rs") {
        let (name, text) = (name(&path), std::fs::read_to_string(&path).unwrap());
        let found = code(&text).find(|(_, line)| words(line).any(|word| word == concat!("un", "safe")));
        match found {
            Some((at, line)) if !UNSAFE.contains(&name.as_str()) => wrong.push(format!("{name}:{at}: {}", line.trim())),
            None if UNSAFE.contains(&name.as_str()) => wrong.push(format!("{name}: listed, but has none")),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn nothing_is_left_over() {
    // In two parts each, so that this file is clean too.
    let leftovers = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("to", "do!"),
        concat!("unim", "plemented!"),
        concat!("db", "g!"),
        concat!("#[al", "low("),
        concat!("#![al", "low("),
        concat!("#[ig", "nore"),
    ];
    let mut found = Vec::new();
    for path in files("rs").into_iter().chain(files("md")).chain(files("toml")) {
        let text = std::fs::read_to_string(&path).unwrap();
        for (at, line) in text.lines().enumerate() {
            if leftovers.iter().any(|leftover| line.contains(leftover)) {
                found.push(format!("{}:{}: {}", name(&path), at + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn links_of_the_documents_lead_somewhere() {
    let mut broken = Vec::new();
    for path in files("md") {
        let text = std::fs::read_to_string(&path).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next()) {
            let file = link.split('#').next().unwrap();
            if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
                continue;
            }
            if !path.parent().unwrap().join(file).exists() {
                broken.push(format!("{}: {link}", name(&path)));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
