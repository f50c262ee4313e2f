//! The files of a model's folder, named as Hugging Face's libraries name them.

use crate::{FileError, read_json};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The configuration.
pub const CONFIG_FILE: &str = "config.json";
/// All weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Which file has which weight, where there are several files.
pub const WEIGHTS_INDEX_FILE: &str = "model.safetensors.index.json";

/// The files that hold the weights of the model in `folder`, each once: `model.safetensors`, or those that
/// `model.safetensors.index.json` names, in the order of their names.
///
/// # Errors
/// If the index cannot be read, names no file, or one that is not in the folder itself. Whether the files are there is not looked at.
pub fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, FileError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let (single, index) = (folder.join(WEIGHTS_FILE), folder.join(WEIGHTS_INDEX_FILE));
    if single.exists() || !index.exists() {
        return Ok(vec![single]);
    }
    let Index { weight_map } = read_json(&index)?;
    let mut files = Vec::new();
    for (name, file) in weight_map {
        if Path::new(&file).file_name() != Some(file.as_ref()) {
            let message = format!("`{name}` = `{file}`: must be the name of a file in the same folder");
            return Err(FileError::Content { path: index, message });
        }
        files.push(folder.join(file));
    }
    files.sort();
    files.dedup();
    match files.is_empty() {
        false => Ok(files),
        true => Err(FileError::Content { path: index, message: "`weight_map` names no file".to_owned() }),
    }
}
