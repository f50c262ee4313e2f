//! Checkpoints: a folder `step-NNNNNNNN` with everything that training needs to go on bit for bit.
//!
//! `config.json`, `model.safetensors` (and `tokenizer.json`, if any) are the model, as decoding opens it;
//! `optimizer.safetensors` and `state.json` are the training's. A folder is written under another name and renamed when
//! complete, so one that is there is whole.

use crate::data::{Split, TextOptions};
use crate::files::{hash_file, write_atomic, write_folder_atomic};
use crate::mapped::map;
use crate::{Error, Result, TrainOptions};
use bytemuck::cast_slice;
use nsa_core::model::{CONFIG_FILE, ModelConfig, ParamSpec, WEIGHTS_FILE, manifest, weight_files};
use nsa_core::object::{self, Object};
use nsa_core::tokenizer::TOKENIZER_FILE;
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// AdamW's moments, `m.<name>` and `v.<name>`.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Step, position in the data, options.
pub const STATE_FILE: &str = "state.json";

const FORMAT: u32 = 1;
const PREFIX: &str = "step-";

/// Where training stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Version of this file's format.
    pub format: u32,
    /// Steps done.
    pub step: u64,
    /// Position in the data: sequences drawn. With the seed it fixes every random choice to come.
    pub sequences: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Mean loss of the last step, if there was one.
    pub train_loss: Option<f64>,
    /// Loss of the last validation, if there was one.
    pub validation_loss: Option<f64>,
    /// Options of the run.
    #[serde(deserialize_with = "object::required")]
    pub options: TrainOptions,
    /// The text.
    #[serde(deserialize_with = "object::required")]
    pub data: DataState,
    /// SHA-256 of the tensor files.
    pub files: BTreeMap<String, String>,
}

/// Which text a run trains on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataState {
    /// Training files.
    pub files: Vec<PathBuf>,
    /// Validation files, if they are given apart.
    pub validation_files: Vec<PathBuf>,
    /// How files become documents.
    #[serde(deserialize_with = "object::required")]
    pub text: TextOptions,
    /// How validation text is taken out of the training files.
    pub split: Split,
    /// How much of it.
    pub val_fraction: f64,
    /// Hash of the training text with its tokenizer, see [`crate::data::Corpus::hash`].
    pub hash: String,
}

impl State {
    /// The state before the first step.
    pub fn start(options: TrainOptions, data: DataState) -> Self {
        Self {
            format: FORMAT,
            step: 0,
            sequences: 0,
            tokens: 0,
            train_loss: None,
            validation_loss: None,
            options,
            data,
            files: BTreeMap::new(),
        }
    }
}

/// What a checkpoint is made of.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// The model's configuration.
    pub config: &'a ModelConfig,
    /// Its `tokenizer.json`, if any.
    pub tokenizer: Option<&'a Path>,
    /// Parameters, flat.
    pub params: &'a [f32],
    /// AdamW's moments, flat.
    pub moments: [&'a [f32]; 2],
    /// The rest; its `files` are filled in.
    pub state: &'a State,
}

/// Name of the checkpoint of `step`.
pub fn folder_name(step: u64) -> String {
    format!("{PREFIX}{step:08}")
}

/// Writes a checkpoint below `run`, then removes all but the `keep` newest (0 keeps all). Returns its folder.
///
/// # Errors
/// If a file cannot be written.
pub fn save(run: &Path, parts: Parts<'_>, keep: usize) -> Result<PathBuf> {
    let folder = run.join(folder_name(parts.state.step));
    write_folder_atomic(&folder, |unfinished| fill(unfinished, parts))?;
    if keep > 0 {
        let all = list(run)?;
        for (_, old) in all.iter().rev().skip(keep).filter(|(step, _)| *step < parts.state.step) {
            fs::remove_dir_all(old).map_err(Error::write(old))?;
        }
    }
    Ok(folder)
}

fn fill(folder: &Path, parts: Parts<'_>) -> Result<()> {
    let config_path = folder.join(CONFIG_FILE);
    write_json(&config_path, parts.config)?;
    if let Some(tokenizer) = parts.tokenizer {
        let target = folder.join(TOKENIZER_FILE);
        fs::copy(tokenizer, &target).map_err(Error::write(&target))?;
    }
    let specs = manifest(parts.config);
    let [m, v] = parts.moments;
    let tensors = views(&specs, "", parts.params).chain(views(&specs, "m.", m)).chain(views(&specs, "v.", v));
    let (model, optimizer): (Vec<_>, Vec<_>) = tensors.enumerate().partition(|(i, _)| *i < specs.len());
    let mut state = parts.state.clone();
    for (name, tensors) in [(WEIGHTS_FILE, model), (OPTIMIZER_FILE, optimizer)] {
        let path = folder.join(name);
        let tensors = tensors.into_iter().map(|(_, tensor)| tensor);
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        safetensors::serialize_to_file(tensors, Some(metadata), &path)
            .map_err(|error| Error::Write { path: path.clone(), source: io_error(error) })?;
        // The library makes files that only their owner reads; they are to be as open as the others.
        let permissions = fs::metadata(&config_path).map_err(Error::read(&config_path))?.permissions();
        fs::set_permissions(&path, permissions).map_err(Error::write(&path))?;
        state.files.insert(name.to_owned(), hash_file(&path)?);
    }
    write_json(&folder.join(STATE_FILE), &state)
}

/// The system's error itself, not one that quotes it.
fn io_error(error: SafeTensorError) -> io::Error {
    match error {
        SafeTensorError::IoError(error) => error,
        other => io::Error::other(other),
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut json = serde_json::to_string_pretty(value).expect("plain data is JSON");
    json.push('\n');
    fs::write(path, json).map_err(Error::write(path))
}

/// A flat buffer as named tensors.
fn views<'a>(
    specs: &'a [ParamSpec],
    prefix: &'a str,
    flat: &'a [f32],
) -> impl Iterator<Item = (String, TensorView<'a>)> {
    let mut offset = 0;
    specs.iter().map(move |spec| {
        let data = &flat[offset..offset + spec.numel()];
        offset += spec.numel();
        let view = TensorView::new(Dtype::F32, spec.shape.clone(), cast_slice(data)).expect("shape and data agree");
        (format!("{prefix}{}", spec.name), view)
    })
}

/// The checkpoints below a run's folder, oldest first; anything else there is passed over.
///
/// # Errors
/// If the folder cannot be read.
pub fn list(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(run).map_err(Error::read(run))? {
        let entry = entry.map_err(Error::read(run))?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|digits| digits.parse().ok());
        if let Some(step) = step
            && name.to_str() == Some(&folder_name(step))
            && entry.path().is_dir()
        {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// The checkpoint that `path` names: itself, or the newest below it.
///
/// # Errors
/// If there is none.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    if path.join(CONFIG_FILE).is_file() {
        return Ok(path.to_owned());
    }
    match list(path)?.pop() {
        Some((_, newest)) => Ok(newest),
        None => Err(Error::content(path, format!("holds neither a checkpoint ({CONFIG_FILE}) nor folders {PREFIX}*"))),
    }
}

/// Copies a tokenizer to a run's folder, whole or not at all. One that is the same already stays, wherever it came from.
///
/// # Errors
/// If another tokenizer is there, or a file cannot be read or written.
pub fn keep_tokenizer(source: &Path, run: &Path) -> Result<()> {
    let (content, copy) = (fs::read(source).map_err(Error::read(source))?, run.join(TOKENIZER_FILE));
    match fs::read(&copy) {
        Ok(there) if there == content => Ok(()),
        Ok(_) => {
            let message =
                format!("is another tokenizer than {}: remove it, or choose another folder", source.display());
            Err(Error::content(&copy, message))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => write_atomic(&copy, &content),
        Err(error) => Err(Error::read(&copy)(error)),
    }
}

/// The model's configuration in a checkpoint.
///
/// # Errors
/// If the file cannot be read or breaks a rule.
pub fn load_config(folder: &Path) -> Result<ModelConfig> {
    Ok(nsa_core::read_json(folder.join(CONFIG_FILE))?)
}

/// The parameters in a checkpoint, of one file or several with an index, flat, in f32 whatever they are stored in.
///
/// # Errors
/// If a file cannot be read or is damaged or a tensor is missing, unknown or not of the configuration's shape.
pub fn load_params(folder: &Path, config: &ModelConfig) -> Result<Vec<f32>> {
    let mut params = Vec::new();
    load_tensors(&weight_files(folder)?, &manifest(config), &[""], &mut [&mut params])?;
    Ok(params)
}

/// A checkpoint to go on from.
#[derive(Debug)]
pub struct Loaded {
    /// Its folder.
    pub folder: PathBuf,
    /// The model's configuration.
    pub config: ModelConfig,
    /// Parameters, flat.
    pub params: Vec<f32>,
    /// AdamW's moments, flat.
    pub moments: [Vec<f32>; 2],
    /// The rest.
    pub state: State,
}

impl Loaded {
    /// Checks the options to go on with, which may not be those that the checkpoint was written with.
    ///
    /// # Errors
    /// If the checkpoint has taken more steps than they ask for, or they break a rule of [`TrainOptions::check`].
    pub fn check_options(&self) -> Result<()> {
        let State { step, options, .. } = &self.state;
        if options.steps < *step {
            let rule = format!("must be at least {step}, the step of {}", self.folder.display());
            return Err(Error::value("steps", options.steps, rule));
        }
        options.check()
    }
}

/// Reads a checkpoint.
///
/// # Errors
/// If a file is missing or damaged, or a tensor is missing, unknown or not of the configuration's shape.
pub fn load(folder: &Path) -> Result<Loaded> {
    let config = load_config(folder)?;
    let state_path = folder.join(STATE_FILE);
    let Object(state): Object<State> = nsa_core::read_json(&state_path)?;
    if state.format != FORMAT {
        return Err(Error::content(&state_path, format!("format {}, expected {FORMAT}", state.format)));
    }
    let params = load_params(folder, &config)?;
    let (mut m, mut v) = (Vec::new(), Vec::new());
    load_tensors(&[folder.join(OPTIMIZER_FILE)], &manifest(&config), &["m.", "v."], &mut [&mut m, &mut v])?;
    for name in [WEIGHTS_FILE, OPTIMIZER_FILE] {
        let path = folder.join(name);
        let (expected, found) = (state.files.get(name), hash_file(&path)?);
        if expected != Some(&found) {
            let expected = expected.map_or("none", String::as_str);
            let message = format!("damaged: its SHA-256 is {found}, {STATE_FILE} says {expected}");
            return Err(Error::content(&path, message));
        }
    }
    Ok(Loaded { folder: folder.to_owned(), config, params, moments: [m, v], state })
}

/// Reads the tensors of `specs` from files, once under each prefix, into flat vectors.
fn load_tensors(paths: &[PathBuf], specs: &[ParamSpec], prefixes: &[&str], out: &mut [&mut Vec<f32>]) -> Result<()> {
    let maps = paths.iter().map(|path| map(path)).collect::<Result<Vec<_>>>()?;
    let mut found = BTreeMap::new();
    for (path, map) in paths.iter().zip(&maps) {
        let file = SafeTensors::deserialize(map).map_err(|error| Error::content(path, format!("damaged: {error}")))?;
        for (name, tensor) in file.tensors() {
            if found.insert(name.clone(), (path, tensor)).is_some() {
                return Err(Error::tensor(path, name, "is in another file, too"));
            }
        }
    }
    for (prefix, out) in prefixes.iter().zip(out) {
        out.reserve_exact(specs.iter().map(ParamSpec::numel).sum());
        for spec in specs {
            let name = format!("{prefix}{}", spec.name);
            let Some((path, tensor)) = found.remove(&name) else {
                let path = if let [path] = paths { path } else { paths[0].parent().expect("a file is in a folder") };
                return Err(Error::tensor(path, name, "missing"));
            };
            if tensor.shape() != spec.shape {
                let message = format!("shape {:?}, expected {:?}", tensor.shape(), spec.shape);
                return Err(Error::tensor(path, name, message));
            }
            append_f32(&tensor, out).ok_or_else(|| {
                Error::tensor(path, name, format!("dtype {:?}, expected F32, BF16 or F16", tensor.dtype()))
            })?;
        }
    }
    match found.pop_first() {
        None => Ok(()),
        Some((name, (path, _))) => Err(Error::tensor(path, name, "unknown: the configuration has no such tensor")),
    }
}

/// Appends the elements of a floating-point tensor; the file's bytes may lie at any address.
fn append_f32(tensor: &TensorView<'_>, out: &mut Vec<f32>) -> Option<()> {
    let bytes = tensor.data();
    let from_f16 = |bytes: &[u8; 2]| half::f16::from_le_bytes(*bytes).to_f32();
    let from_bf16 = |bytes: &[u8; 2]| half::bf16::from_le_bytes(*bytes).to_f32();
    match tensor.dtype() {
        Dtype::F32 => out.extend(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes))),
        Dtype::F16 => out.extend(bytes.as_chunks().0.iter().map(from_f16)),
        Dtype::BF16 => out.extend(bytes.as_chunks().0.iter().map(from_bf16)),
        _ => return None,
    }
    Some(())
}
