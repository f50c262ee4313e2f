//! Files: read with their names in the errors, written under a temporary name and renamed.

use anyhow::{Context, Result};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The bytes of a file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a file whole or not at all.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let write = || -> Result<()> {
        let mut temporary = tempfile::Builder::new();
        // Else its owner alone could read it.
        #[cfg(unix)]
        temporary.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = temporary.prefix(".partial-").tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// The repository: commands run from anywhere below it.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository")
}

/// The folder that was asked for, or `out/NAME` in the repository: made if it is not there, and such that files can be made in it.
///
/// # Errors
/// If it is not: commands ask before they measure what they could not keep.
pub fn out(asked: Option<&Path>, name: &str) -> Result<PathBuf> {
    let folder = asked.map_or_else(|| root().join("out").join(name), Path::to_path_buf);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    tempfile::tempfile_in(&folder).with_context(|| format!("cannot write to the folder {}", folder.display()))?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn what_is_written_is_as_open_as_other_files() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("room");
        let [atomic, plain] = ["atomic", "plain"].map(|name| folder.path().join(name));
        write_atomic(&atomic, b"content").expect("room");
        std::fs::write(&plain, b"content").expect("room");
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode();
        assert_eq!(mode(&atomic), mode(&plain));
    }

    #[test]
    fn a_folder_that_keeps_nothing_is_named() {
        let folder = tempfile::tempdir().expect("room");
        let (file, below) = (folder.path().join("file"), folder.path().join("a/b"));
        std::fs::write(&file, "").expect("room");
        assert_eq!(out(Some(&below), "unused").expect("can be made"), below);
        assert!(below.is_dir() && std::fs::read_dir(&below).expect("there").next().is_none());
        let error = out(Some(&file), "unused").expect_err("a file");
        assert!(error.to_string().contains(&file.display().to_string()), "{error:#}");
        // Nobody can make a file there, whatever they may do elsewhere.
        #[cfg(target_os = "linux")]
        {
            let error = out(Some(Path::new("/proc")), "unused").expect_err("not a disk");
            assert!(error.to_string().starts_with("cannot write to the folder /proc"), "{error:#}");
        }
    }
}
