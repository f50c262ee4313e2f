//! `cargo xtask bench NAME`: the criterion benchmarks of `nsa-kernels`.

use crate::dtype::Dtype;
use crate::machine::Machine;
use anyhow::{Context, Result, bail, ensure};
use nsa_kernels::Backend;
use std::process::Command;

/// The criterion benchmarks of one operation, after the quick check.
pub(super) fn run(op: &str) -> Result<()> {
    let known = benchmarks()?;
    ensure!(known.iter().any(|name| name == op), "`{op}` has no benchmark: there are {}", known.join(", "));
    let (backend, _) = Backend::pick(None)?;
    ensure!(
        backend.computes_in_host_memory(),
        "`{op}` is measured on the CPU, and NSA_BACKEND asks for {}",
        backend.name()
    );
    crate::check::quick(&backend, [Dtype::F32, Dtype::Bf16])?;
    println!("{}", Machine::here().line());
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::files::root()).args(["bench", "--package", "nsa-kernels", "--bench", op]);
    let status = command.status()?;
    if !status.success() {
        bail!("cargo bench --bench {op} failed ({status})");
    }
    Ok(())
}

/// Names of the criterion benchmarks that there are.
fn benchmarks() -> Result<Vec<String>> {
    let folder = crate::files::root().join("nsa-kernels/benches");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let files =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.extension() == Some("rs".as_ref()));
    let mut names: Vec<String> = files.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn benchmarks_are_files_that_have_a_target() {
        let names = benchmarks().expect("a folder");
        assert!(names.contains(&"slc".to_owned()) && !names.contains(&"operands".to_owned()), "{names:?}");
        let error = run("operands").expect_err("no benchmark").to_string();
        assert!(error.contains("`operands` has no benchmark: there are") && error.contains("slc"), "{error}");
    }
}
