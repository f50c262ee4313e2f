//! The tensors of a checkpoint, used where they lie in the mapped file.

use crate::error::WeightsError;
use half::{bf16, f16};
use memmap2::Mmap;
use nsa_core::model::ParamSpec;
use nsa_core::{DType, Element};
use nsa_kernels::Tensor;
use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of the file with all weights in a checkpoint's folder.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Name of the file that says in which file each weight is, when there are several.
pub const WEIGHTS_INDEX_FILE: &str = "model.safetensors.index.json";

/// Bytes of the header's length at the start of a safetensors file.
const LENGTH_BYTES: usize = 8;

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian and used in place");

type Result<T> = std::result::Result<T, WeightsError>;

/// One tensor: in the mapped file, or copied where that was not possible.
#[derive(Clone, Debug)]
pub struct Weight {
    shape: Vec<usize>,
    storage: Storage,
}

#[derive(Clone, Debug)]
enum Storage {
    Mapped { map: Arc<Mmap>, range: Range<usize>, dtype: DType },
    F32(Arc<[f32]>),
    Bf16(Arc<[bf16]>),
    F16(Arc<[f16]>),
}

/// The elements of a [`Weight`].
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// IEEE single.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE half.
    F16(&'a [f16]),
}

impl Weight {
    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match &self.storage {
            Storage::Mapped { dtype, .. } => *dtype,
            Storage::F32(_) => DType::F32,
            Storage::Bf16(_) => DType::Bf16,
            Storage::F16(_) => DType::F16,
        }
    }

    /// Whether the elements are those of the file, not a copy.
    pub fn is_mapped(&self) -> bool {
        matches!(self.storage, Storage::Mapped { .. })
    }

    /// The elements.
    pub fn values(&self) -> Values<'_> {
        match &self.storage {
            // The casts cannot fail: alignment and size were checked when the tensor was mapped.
            Storage::Mapped { map, range, dtype } => match dtype {
                DType::Bf16 => Values::Bf16(bytemuck::cast_slice(&map[range.clone()])),
                DType::F16 => Values::F16(bytemuck::cast_slice(&map[range.clone()])),
                DType::F32 | DType::F64 => Values::F32(bytemuck::cast_slice(&map[range.clone()])),
            },
            Storage::F32(data) => Values::F32(data),
            Storage::Bf16(data) => Values::Bf16(data),
            Storage::F16(data) => Values::F16(data),
        }
    }

    /// The same numbers in f32; no copy if they are in f32 already.
    pub fn to_f32(&self) -> F32Weight {
        fn widen<T: Element<Acc = f32>>(data: &[T]) -> Storage {
            Storage::F32(data.iter().map(|x| x.to_acc()).collect())
        }
        let storage = match self.values() {
            Values::F32(_) => self.storage.clone(),
            Values::Bf16(data) => widen(data),
            Values::F16(data) => widen(data),
        };
        F32Weight(Self { shape: self.shape.clone(), storage })
    }

    /// Maps a tensor of element type `T`, or copies it if it does not lie on a multiple of the element's size.
    fn map<T: Element>(
        name: &str,
        map: &Arc<Mmap>,
        range: Range<usize>,
        shape: Vec<usize>,
        own: fn(Arc<[T]>) -> Storage,
    ) -> Self {
        let bytes = &map[range.clone()];
        if bytemuck::try_cast_slice::<u8, T>(bytes).is_ok() {
            return Self { shape, storage: Storage::Mapped { map: Arc::clone(map), range, dtype: T::DTYPE } };
        }
        tracing::warn!(tensor = name, bytes = bytes.len(), "tensor is not aligned in the file: copied");
        let mut data = vec![T::default(); bytes.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut data).copy_from_slice(bytes);
        Self { shape, storage: own(data.into()) }
    }
}

/// A weight in f32: the small tensors, which operations take in the type of the activations.
#[derive(Clone, Debug)]
pub struct F32Weight(Weight);

impl F32Weight {
    /// The elements.
    pub fn values(&self) -> &[f32] {
        match self.0.values() {
            Values::F32(data) => data,
            Values::Bf16(_) | Values::F16(_) => unreachable!("made by `Weight::to_f32` only"),
        }
    }

    /// The weight, as one of any type.
    pub fn into_weight(self) -> Weight {
        self.0
    }

    /// The elements as a tensor of the weight's own shape, which has `N` dimensions.
    ///
    /// # Errors
    /// If it has another number of dimensions.
    pub fn tensor<const N: usize>(&self) -> nsa_kernels::Result<Tensor<'_, f32, N>> {
        let shape = self.0.shape();
        let mut dims = [0; N];
        nsa_core::ShapeError::check("F32Weight::tensor", "dimensions", &[N], &[shape.len()])?;
        dims.copy_from_slice(shape);
        Tensor::host(self.values(), dims)
    }
}

/// The tensors of a checkpoint, checked against what the configuration asks for.
#[derive(Debug)]
pub struct Weights {
    tensors: BTreeMap<String, Weight>,
    file_bytes: u64,
}

impl Weights {
    /// Maps the weights in `folder`: `model.safetensors`, or the files that `model.safetensors.index.json` names.
    ///
    /// The files must not be changed while the model is in use: write new ones and rename them, as training does.
    ///
    /// # Errors
    /// If a file cannot be read, is cut off or no safetensors file; if a tensor of `manifest` is missing or has another
    /// shape or an element type other than F32, BF16 and F16; if there is a tensor that `manifest` does not have.
    pub fn open(folder: &Path, manifest: &[ParamSpec]) -> Result<Self> {
        let mut found = BTreeMap::new();
        let mut file_bytes = 0;
        for path in weight_files(folder)? {
            let map = Arc::new(map_file(&path)?);
            file_bytes += map.len() as u64;
            read_file(&path, &map, &mut found)?;
        }
        let mut tensors = BTreeMap::new();
        for spec in manifest {
            let Some(tensor) = found.remove(&spec.name) else {
                let (path, name) = (folder.to_owned(), spec.name.clone());
                return Err(WeightsError::Missing { path, name, expected: spec.shape.clone() });
            };
            tensors.insert(spec.name.clone(), tensor.check(spec)?);
        }
        match found.pop_first() {
            None => Ok(Self { tensors, file_bytes }),
            Some((name, tensor)) => Err(WeightsError::Unknown { path: tensor.path, name, count: found.len() + 1 }),
        }
    }

    /// Takes a tensor of the manifest out.
    ///
    /// # Panics
    /// If the manifest has no such tensor, or it was taken before.
    pub fn take(&mut self, name: &str) -> Weight {
        self.tensors.remove(name).unwrap_or_else(|| panic!("the manifest has no `{name}`, or it was taken before"))
    }

    /// Bytes of the files.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The tensors that nobody has taken, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.tensors.iter().map(|(name, weight)| (name.as_str(), weight))
    }
}

/// A tensor of a file before it is checked.
struct Found {
    path: PathBuf,
    map: Arc<Mmap>,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Found {
    fn check(self, spec: &ParamSpec) -> Result<Weight> {
        let name = &spec.name;
        if self.shape != spec.shape {
            let (path, name, expected, got) = (self.path, name.clone(), spec.shape.clone(), self.shape);
            return Err(WeightsError::Shape { path, name, expected, got });
        }
        match self.dtype {
            Dtype::F32 => Ok(Weight::map(name, &self.map, self.range, self.shape, Storage::F32)),
            Dtype::BF16 => Ok(Weight::map(name, &self.map, self.range, self.shape, Storage::Bf16)),
            Dtype::F16 => Ok(Weight::map(name, &self.map, self.range, self.shape, Storage::F16)),
            other => Err(WeightsError::Dtype { path: self.path, name: name.clone(), got: format!("{other:?}") }),
        }
    }
}

/// The files that hold the weights, each once.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let (single, index_path) = (folder.join(WEIGHTS_FILE), folder.join(WEIGHTS_INDEX_FILE));
    if single.exists() || !index_path.exists() {
        return Ok(vec![single]);
    }
    let bytes = std::fs::read(&index_path).map_err(|error| read_error(&index_path, &error))?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|error| WeightsError::Read { path: index_path.clone(), reason: error.to_string() })?;
    let mut files: Vec<PathBuf> = Vec::new();
    for (name, value) in index.weight_map {
        if Path::new(&value).file_name() != Some(value.as_ref()) {
            let rule = "must be the name of a file in the same folder";
            return Err(WeightsError::Index { path: index_path, name, value, rule });
        }
        files.push(folder.join(value));
    }
    files.sort();
    files.dedup();
    Ok(files)
}

fn read_error(path: &Path, error: &std::io::Error) -> WeightsError {
    WeightsError::Read { path: path.to_owned(), reason: error.to_string() }
}

#[expect(unsafe_code, reason = "a file is mapped; nothing else here is unsafe")]
fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|error| read_error(path, &error))?;
    // SAFETY: the map is read-only. Its bytes are undefined only if someone changes the file in place meanwhile; training
    // never does (new files are renamed over old ones, which leaves the mapped file as it is), and `Weights::open` asks
    // the same of everyone else.
    unsafe { Mmap::map(&file) }.map_err(|error| read_error(path, &error))
}

/// Adds the tensors of one file to `found`.
fn read_file(path: &Path, map: &Arc<Mmap>, found: &mut BTreeMap<String, Found>) -> Result<()> {
    let (header, metadata) = SafeTensors::read_metadata(map)
        .map_err(|error| WeightsError::Format { path: path.to_owned(), reason: error.to_string() })?;
    let data = LENGTH_BYTES + header;
    for (name, info) in metadata.tensors() {
        let &TensorInfo { dtype, ref shape, data_offsets: (start, end) } = info;
        let (shape, range) = (shape.clone(), data + start..data + end);
        let tensor = Found { path: path.to_owned(), map: Arc::clone(map), dtype, shape, range };
        if found.insert(name.clone(), tensor).is_some() {
            return Err(WeightsError::Duplicate { path: path.to_owned(), name });
        }
    }
    Ok(())
}
