//! Files of the repository.

use std::path::Path;

/// The repository: commands run from anywhere below it.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository")
}
