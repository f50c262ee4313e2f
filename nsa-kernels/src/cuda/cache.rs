//! Texts on disk under the hash of what they were made from.

use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Environment variable with the folder of compiled kernels.
pub const CACHE_VARIABLE: &str = "NSA_CUDA_CACHE";

/// A folder of texts, or none.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// The folder that the environment names.
    pub(super) fn of_environment() -> Self {
        let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let user = || {
            let cache = path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
            Some(cache.or_else(|| path("LOCALAPPDATA"))?.join("nsa").join("cuda"))
        };
        Self { folder: path(CACHE_VARIABLE).or_else(user) }
    }

    #[cfg(test)]
    fn at(folder: &Path) -> Self {
        Self { folder: Some(folder.to_owned()) }
    }

    pub(super) fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The text made from these parts, if it is there and whole.
    pub(super) fn get(&self, parts: &[&str]) -> Option<String> {
        let content = std::fs::read_to_string(self.file(parts)?).ok()?;
        let (checksum, text) = content.split_once('\n')?;
        (checksum == hash(&[text])).then(|| text.to_owned())
    }

    /// Keeps a text. Not to be able to is no error: it is made again the next time.
    pub(super) fn put(&self, parts: &[&str], text: &str) {
        let Some(file) = self.file(parts) else { return };
        if let Err(error) = write(&file, text) {
            tracing::warn!(file = %file.display(), %error, "a compiled kernel cannot be kept");
        }
    }

    fn file(&self, parts: &[&str]) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(hash(parts)).with_extension("ptx"))
    }
}

fn write(file: &Path, text: &str) -> std::io::Result<()> {
    let folder = file.parent().expect("a file in the folder");
    std::fs::create_dir_all(folder)?;
    let mut options = tempfile::Builder::new();
    // Else processes of other users could not read what was compiled for them, too.
    #[cfg(unix)]
    options.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut temporary = options.tempfile_in(folder)?;
    write!(temporary, "{}\n{text}", hash(&[text]))?;
    temporary.persist(file)?;
    Ok(())
}

/// SHA-256 over the parts and where each ends.
fn hash(parts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_by_all_parts_that_it_was_made_from() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(&folder.path().join("new"));
        assert_eq!(cache.get(&["a", "b"]), None);
        cache.put(&["a", "b"], "text\nof two lines\n");
        assert_eq!(cache.get(&["a", "b"]).as_deref(), Some("text\nof two lines\n"));
        assert_eq!(cache.get(&["ab", ""]), None);
    }

    #[cfg(unix)]
    #[test]
    fn a_text_is_for_other_users_too() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (cache, plain) = (Cache::at(folder.path()), folder.path().join("plain"));
        cache.put(&["key"], "some text");
        std::fs::write(&plain, "").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&cache.file(&["key"]).unwrap()), mode(&plain));
    }

    #[test]
    fn what_is_not_whole_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        cache.put(&["key"], "some text");
        let file = cache.file(&["key"]).unwrap();
        let whole = std::fs::read(&file).unwrap();
        for broken in [&whole[..whole.len() - 1], &whole[..10], b"", b"\xff\xfe"] {
            std::fs::write(&file, broken).unwrap();
            assert_eq!(cache.get(&["key"]), None);
        }
        cache.put(&["key"], "some text");
        assert_eq!(cache.get(&["key"]).as_deref(), Some("some text"));
    }

    #[test]
    fn many_may_write_the_same_text() {
        let folder = tempfile::tempdir().unwrap();
        let text = "x".repeat(1 << 16);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let cache = Cache::at(folder.path());
                    for _ in 0..8 {
                        cache.put(&["key"], &text);
                        assert_eq!(cache.get(&["key"]).as_deref(), Some(text.as_str()));
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_is_no_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = Cache::at(&file.path().join("below-a-file"));
        cache.put(&["key"], "text");
        assert_eq!(cache.get(&["key"]), None);
    }
}
