//! Files: hashed, written whole or not at all.

use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Start of the names of folders and files that are not complete yet.
pub(crate) const UNFINISHED: &str = ".unfinished-";

/// SHA-256 of a file, in hexadecimal.
pub(crate) fn hash_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::read(path))?;
    let mut hasher = HashWriter(Sha256::new());
    io::copy(&mut file, &mut hasher).map_err(Error::read(path))?;
    Ok(hex(hasher.0))
}

/// The digest in hexadecimal.
pub(crate) fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String takes everything");
        text
    })
}

struct HashWriter(Sha256);

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a file whole: under another name, then renamed.
///
/// # Errors
/// If it cannot be written; one of that name is as it was then.
pub fn write_atomic(path: &Path, content: &[u8]) -> Result<()> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let unfinished = path.with_file_name(format!("{UNFINISHED}{}-{name}", std::process::id()));
    let write = || {
        let mut file = File::create(&unfinished)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    write().map_err(|error| {
        // The error that matters is the first.
        let _ = fs::remove_file(&unfinished);
        Error::write(path)(error)
    })
}

/// Makes the folder `path` whole: `fill` writes its files into a folder of another name, which is then renamed. A folder
/// that was there is replaced. If anything fails, nothing is left behind.
pub(crate) fn write_folder_atomic(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let unfinished = parent.join(format!("{UNFINISHED}{}-{name}", std::process::id()));
    let result = replace_folder(path, parent, &unfinished, fill);
    if result.is_err() {
        // The error that matters is the first; what remains bears a name that nothing reads.
        let _ = fs::remove_dir_all(&unfinished);
    }
    result
}

fn replace_folder(path: &Path, parent: &Path, unfinished: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if unfinished.exists() {
        fs::remove_dir_all(unfinished).map_err(Error::write(unfinished))?;
    }
    fs::create_dir_all(unfinished).map_err(Error::write(unfinished))?;
    fill(unfinished)?;
    for entry in fs::read_dir(unfinished).map_err(Error::read(unfinished))? {
        let file = entry.map_err(Error::read(unfinished))?.path();
        File::open(&file).and_then(|file| file.sync_all()).map_err(Error::write(&file))?;
    }
    let old = parent.join(format!("{UNFINISHED}{}-old", std::process::id()));
    let replaced = path.exists();
    if replaced {
        // Of a process that had the same number and was killed.
        if old.exists() {
            fs::remove_dir_all(&old).map_err(Error::write(&old))?;
        }
        fs::rename(path, &old).map_err(Error::write(path))?;
    }
    if let Err(error) = fs::rename(unfinished, path) {
        if replaced {
            let _ = fs::rename(&old, path);
        }
        return Err(Error::write(path)(error));
    }
    if replaced {
        fs::remove_dir_all(&old).map_err(Error::write(&old))?;
    }
    // The renames are in the parent folder.
    File::open(parent).and_then(|folder| folder.sync_all()).map_err(Error::write(parent))
}

/// The file or folder with its place from the root of the file system, so that it is found from anywhere.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(Error::read(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = entries.collect();
        names.sort();
        names
    }

    /// What a process that had the same number left when it was killed is in nobody's way.
    #[test]
    fn leftovers_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made");
        for name in
            [format!("{UNFINISHED}{}-old", std::process::id()), format!("{UNFINISHED}{}-made", std::process::id())]
        {
            fs::create_dir(folder.path().join(&name)).unwrap();
            fs::write(folder.path().join(name).join("file"), "left over").unwrap();
        }
        for content in ["first", "second"] {
            let fill = |unfinished: &Path| write_atomic(&unfinished.join("file"), content.as_bytes());
            write_folder_atomic(&path, fill).unwrap();
            assert_eq!(fs::read_to_string(path.join("file")).unwrap(), content);
        }
        assert_eq!(names(folder.path()), ["made"]);
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        // A file cannot take the place of a folder that holds something.
        let path = folder.path().join("taken");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("file"), "there").unwrap();
        assert!(write_atomic(&path, b"content").is_err());
        assert_eq!(names(folder.path()), ["taken"]);
    }
}
