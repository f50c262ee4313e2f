//! Fetching peers: a Python environment with pinned packages, made once below `target/peers`, whole or not at all.

use super::{Peer, PeerError};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Least version of Python that the packages support.
const MIN_PYTHON: (u32, u32) = (3, 10);
pub(super) const MIN_PYTHON_NAME: &str = "3.10 or later";
/// Characters of a program's last words that an error quotes.
const TAIL: usize = 600;

/// Where the scripts and the lists of packages lie.
pub fn scripts() -> PathBuf {
    crate::files::root().join("xtask/peers")
}

/// A list of packages to install, and what proves that they are there.
struct Packages {
    list: &'static str,
    module: &'static str,
}

const TORCH: Packages = Packages { list: "torch.txt", module: "torch" };
const FLA: Packages = Packages { list: "fla.txt", module: "fla" };
const LUCIDRAINS: Packages = Packages { list: "lucidrains.txt", module: "native_sparse_attention_pytorch" };

impl Packages {
    /// The first pinned package: what the folder is called after.
    fn name(&self) -> Result<String, PeerError> {
        let path = scripts().join(self.list);
        let text = std::fs::read_to_string(&path)
            .map_err(|source| PeerError::Io { action: format!("cannot read {}", path.display()), source })?;
        Ok(text.lines().find(|line| line.contains("==")).unwrap_or(self.module).replace("==", "-"))
    }
}

/// The interpreter of a peer, and a folder of packages to add to its own. `given` has them all already.
pub fn prepare(peer: Peer, given: Option<&Path>) -> Result<(PathBuf, Option<PathBuf>), PeerError> {
    let needed = match peer {
        Peer::Torch => &TORCH,
        Peer::Fla => &FLA,
        Peer::Lucidrains => &LUCIDRAINS,
    };
    if let Some(python) = given {
        version(python)?;
        import(python, needed.module, None)?;
        return Ok((python.to_owned(), None));
    }
    let peers = crate::files::root().join("target/peers");
    std::fs::create_dir_all(&peers)
        .map_err(|source| PeerError::Io { action: format!("cannot make {}", peers.display()), source })?;
    let venv = once(&peers, &TORCH, environment)?;
    let python = interpreter(&venv);
    if peer == Peer::Torch {
        import(&python, TORCH.module, None)?;
        return Ok((python, None));
    }
    let packages = once(&peers, needed, |folder, packages| add(&python, folder, packages))?;
    import(&python, needed.module, Some(&packages))?;
    Ok((python, Some(packages)))
}

fn interpreter(venv: &Path) -> PathBuf {
    venv.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" })
}

/// The folder of some packages; `make` fills one under a temporary name if it is not there.
fn once(
    peers: &Path,
    packages: &Packages,
    make: impl FnOnce(&Path, &Packages) -> Result<(), PeerError>,
) -> Result<PathBuf, PeerError> {
    let name = packages.name()?;
    let target = peers.join(&name);
    if target.exists() {
        return Ok(target);
    }
    println!("installing {name} into {} (once, minutes)", target.display());
    let partial = tempfile::Builder::new()
        .prefix(".partial-")
        .tempdir_in(peers)
        .map_err(|source| PeerError::Io { action: format!("cannot make a folder in {}", peers.display()), source })?;
    // The folder to rename lies in one that vanishes, whatever happens.
    let made = partial.path().join(&name);
    make(&made, packages)?;
    match std::fs::rename(&made, &target) {
        // Another run was faster.
        Err(_) if target.exists() => Ok(target),
        Err(source) => Err(PeerError::Io { action: format!("cannot make {}", target.display()), source }),
        Ok(()) => Ok(target),
    }
}

/// A fresh environment with the packages. It is started by its interpreter alone, so that it may be renamed.
fn environment(folder: &Path, packages: &Packages) -> Result<(), PeerError> {
    let system = Path::new("python3");
    version(system)?;
    if !output(system, Command::new(system).args(["-m", "venv"]).arg(folder))?.status.success() {
        return Err(PeerError::NoVenv);
    }
    let python = interpreter(folder);
    let mut command = Command::new(&python);
    command.args(["-m", "pip", "install", "--quiet", "--requirement"]);
    pip(&python, command.arg(scripts().join(packages.list)), folder, packages)
}

/// The packages alone, in a folder that PYTHONPATH names.
fn add(python: &Path, folder: &Path, packages: &Packages) -> Result<(), PeerError> {
    let mut command = Command::new(python);
    command.args(["-m", "pip", "install", "--quiet", "--no-deps", "--target"]).arg(folder);
    pip(python, command.arg("--requirement").arg(scripts().join(packages.list)), folder, packages)
}

fn pip(python: &Path, command: &mut Command, folder: &Path, packages: &Packages) -> Result<(), PeerError> {
    let output = output(python, command)?;
    match output.status.success() {
        true => Ok(()),
        false => Err(explain(&String::from_utf8_lossy(&output.stderr), &packages.name()?, folder)),
    }
}

/// What pip's words mean.
fn explain(stderr: &str, packages: &str, folder: &Path) -> PeerError {
    let packages = packages.to_owned();
    let says = |words: &[&str]| words.iter().any(|word| stderr.contains(word));
    // Without a connection pip ends with "no matching distribution" as well: the first question comes first.
    if says(&["NewConnectionError", "NameResolutionError", "Max retries exceeded", "Connection refused", "ProxyError"])
        || says(&["ConnectTimeoutError", "ReadTimeoutError", "Network is unreachable", "Name or service not known"])
    {
        PeerError::Unreachable { packages }
    } else if says(&["No space left on device", "Errno 28"]) {
        PeerError::DiskFull { packages, folder: folder.to_owned() }
    } else if says(&["No matching distribution found", "Could not find a version", "requires a different Python"]) {
        let line = stderr.lines().find(|line| line.contains("ERROR")).unwrap_or_default();
        PeerError::NoSuchVersion { packages, reason: clipped(line.trim_start_matches("ERROR:").trim()) }
    } else if says(&["No module named pip"]) {
        PeerError::NoVenv
    } else {
        PeerError::Install { packages, reason: tail(stderr) }
    }
}

/// Checks the interpreter's version.
fn version(python: &Path) -> Result<(), PeerError> {
    let script = "import sys; print('%d.%d' % sys.version_info[:2])";
    let output = output(python, Command::new(python).args(["-c", script]))?;
    let found = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match is_recent(&found) {
        true => Ok(()),
        false => Err(PeerError::OldPython { python: python.to_owned(), found }),
    }
}

fn is_recent(version: &str) -> bool {
    let parts = version.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    parts.is_some_and(|parts: (u32, u32)| parts >= MIN_PYTHON)
}

/// Checks that the interpreter has the module.
fn import(python: &Path, module: &'static str, packages: Option<&Path>) -> Result<(), PeerError> {
    let mut command = Command::new(python);
    command.args(["-c", &format!("import {module}")]).env("PYTHONDONTWRITEBYTECODE", "1");
    if let Some(packages) = packages {
        command.env("PYTHONPATH", packages);
    }
    let output = output(python, &mut command)?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let reason = tail(&String::from_utf8_lossy(&output.stderr));
            Err(PeerError::NotImportable { python: python.to_owned(), module, reason })
        }
    }
}

fn output(python: &Path, command: &mut Command) -> Result<Output, PeerError> {
    command.output().map_err(|error| PeerError::NoPython { python: python.to_owned(), reason: error.to_string() })
}

/// The end of what a program said.
pub fn tail(text: &str) -> String {
    let text = text.trim();
    let start = text.char_indices().rev().nth(TAIL).map_or(0, |(at, _)| at);
    text[start..].trim().to_owned()
}

fn clipped(line: &str) -> String {
    line.chars().take(TAIL / 4).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pip_says_is_explained() {
        let explain = |stderr: &str| explain(stderr, "torch-2.15.0", Path::new("/target"));
        let offline = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'\n\
                       ERROR: Could not find a version that satisfies the requirement torch==2.15.0";
        assert!(matches!(explain(offline), PeerError::Unreachable { packages } if packages == "torch-2.15.0"));
        let missing = "ERROR: Could not find a version that satisfies the requirement torch==2.15.0 (from versions: 2.4)\n\
                       ERROR: No matching distribution found for torch==2.15.0";
        let error = explain(missing);
        assert!(matches!(&error, PeerError::NoSuchVersion { reason, .. } if reason.starts_with("Could not find")));
        assert!(error.to_string().contains("--peer-python"), "{error}");
        let full = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device";
        assert!(matches!(explain(full), PeerError::DiskFull { .. }));
        assert!(matches!(explain("/usr/bin/python3: No module named pip"), PeerError::NoVenv));
        assert!(matches!(explain("ERROR: broken"), PeerError::Install { reason, .. } if reason == "ERROR: broken"));
    }

    #[test]
    fn versions_of_python() {
        for (version, recent) in
            [("3.10", true), ("3.9", false), ("2.7", false), ("4.0", true), ("", false), ("x.y", false)]
        {
            assert_eq!(is_recent(version), recent, "{version}");
        }
    }

    #[test]
    fn an_interpreter_without_the_packages_is_named() {
        let missing = Path::new("/nowhere/python");
        assert!(matches!(prepare(Peer::Torch, Some(missing)), Err(PeerError::NoPython { .. })));
    }

    #[test]
    fn a_folder_is_made_once_and_whole() {
        let peers = tempfile::tempdir().expect("a temporary folder");
        let fail = |folder: &Path, _: &Packages| {
            std::fs::create_dir(folder).expect("room");
            Err(PeerError::NoVenv)
        };
        assert!(matches!(once(peers.path(), &TORCH, fail), Err(PeerError::NoVenv)));
        assert_eq!(std::fs::read_dir(peers.path()).expect("it exists").count(), 0, "nothing is left of a failure");
        let make = |folder: &Path, _: &Packages| {
            std::fs::create_dir(folder).expect("room");
            Ok(())
        };
        let made = once(peers.path(), &TORCH, make).expect("it is made");
        assert!(made.is_dir() && made.file_name().is_some_and(|name| name.to_string_lossy().starts_with("torch-2.")));
        let again = once(peers.path(), &TORCH, |_, _| panic!("it is there")).expect("it is there");
        assert_eq!(made, again);
    }

    #[test]
    fn tails_are_short() {
        assert_eq!(tail("  short \n"), "short");
        let long = "é".repeat(2000);
        assert_eq!(tail(&long).chars().count(), TAIL + 1);
    }
}
