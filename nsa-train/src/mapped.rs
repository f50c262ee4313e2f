//! Files mapped into memory: the one place here that is not checked by the compiler.

use crate::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::path::Path;

/// Maps a file into memory.
#[expect(unsafe_code, reason = "another process may change a mapped file")]
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::read(path))?;
    // SAFETY: the mapping is read-only and private to this process' view; the files mapped here are written under another
    // name and renamed when complete, and no code of this crate writes to one afterwards. As with every mapping, a foreign
    // process that truncates the file while it is mapped ends this one with a bus error, not with wrong memory accesses.
    unsafe { Mmap::map(&file) }.map_err(Error::read(path))
}
