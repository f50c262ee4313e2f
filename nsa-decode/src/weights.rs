//! The tensors of a checkpoint: used where they lie in the mapped file, or copied to the device that computes.

use crate::error::WeightsError;
use bytemuck::Pod;
use half::{bf16, f16};
use memmap2::Mmap;
use nsa_core::model::{ParamSpec, weight_files};
use nsa_core::{DType, Element, FileError, Precision};
use nsa_kernels::{Backend, Buffer, Mem, Tensor};
use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensors};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of the header's length at the start of a safetensors file.
const LENGTH_BYTES: usize = 8;

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian and used in place");

type Result<T> = std::result::Result<T, WeightsError>;

/// One tensor in the memory that its backend computes on: in the mapped file, or a copy where that is not possible.
#[derive(Clone, Debug)]
pub struct Weight {
    shape: Vec<usize>,
    storage: Storage,
}

#[derive(Clone, Debug)]
enum Storage {
    /// In the file, which aligns it.
    Mapped(Arc<Stored>),
    F32(Arc<Buffer<f32>>),
    Bf16(Arc<Buffer<bf16>>),
    F16(Arc<Buffer<f16>>),
}

/// The elements of a [`Weight`].
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// IEEE single.
    F32(Mem<'a, f32>),
    /// bfloat16.
    Bf16(Mem<'a, bf16>),
    /// IEEE half.
    F16(Mem<'a, f16>),
}

impl Weight {
    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements.
    pub fn values(&self) -> Values<'_> {
        match &self.storage {
            Storage::Mapped(stored) => match stored.dtype {
                DType::Bf16 => Values::Bf16(Mem::Host(stored.in_place())),
                DType::F16 => Values::F16(Mem::Host(stored.in_place())),
                DType::F32 | DType::F64 => Values::F32(Mem::Host(stored.in_place())),
            },
            Storage::F32(data) => Values::F32(data.mem()),
            Storage::Bf16(data) => Values::Bf16(data.mem()),
            Storage::F16(data) => Values::F16(data.mem()),
        }
    }
}

/// A weight whose numbers are in type `T`: the small tensors, which operations take in a type of their own.
#[derive(Clone, Debug)]
pub struct Numbers<T: Pod> {
    shape: Vec<usize>,
    storage: NumbersStorage<T>,
}

/// A weight in f32.
pub type F32Weight = Numbers<f32>;

#[derive(Clone, Debug)]
enum NumbersStorage<T: Pod> {
    /// In the file, which aligns it and has it in that type.
    Mapped(Arc<Stored>),
    Copied(Arc<Buffer<T>>),
}

impl<T: Element> Numbers<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.values().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn values(&self) -> Mem<'_, T> {
        match &self.storage {
            NumbersStorage::Mapped(stored) => Mem::Host(stored.in_place()),
            NumbersStorage::Copied(data) => data.mem(),
        }
    }

    /// The elements as a tensor of the weight's own shape, which has `N` dimensions.
    ///
    /// # Errors
    /// If it has another number of dimensions.
    pub fn tensor<const N: usize>(&self) -> nsa_kernels::Result<Tensor<'_, T, N>> {
        let mut dims = [0; N];
        nsa_core::ShapeError::check("Numbers::tensor", "dimensions", &[N], &[self.shape.len()])?;
        dims.copy_from_slice(&self.shape);
        Tensor::packed(self.values(), dims)
    }
}

/// A tensor in a mapped file.
#[derive(Clone, Debug)]
pub struct Stored {
    map: Arc<Mmap>,
    range: Range<usize>,
    dtype: DType,
    shape: Vec<usize>,
}

impl Stored {
    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> usize {
        self.range.len()
    }

    /// Whether it lies on a multiple of its elements' size.
    fn is_aligned(&self) -> bool {
        let address = self.map[self.range.clone()].as_ptr() as usize;
        address.is_multiple_of(self.dtype.size_bytes())
    }

    /// The elements in the file, which aligns them and has them in type `T`.
    fn in_place<T: Element>(&self) -> &[T] {
        bytemuck::cast_slice(&self.map[self.range.clone()])
    }

    /// The elements, in place if the file aligns them, else copied.
    fn read<T: Element>(&self) -> Cow<'_, [T]> {
        if self.is_aligned() {
            return Cow::Borrowed(self.in_place());
        }
        let mut data = vec![T::default(); self.bytes() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut data).copy_from_slice(&self.map[self.range.clone()]);
        Cow::Owned(data)
    }

    /// The elements, in type `T`.
    fn numbers<T: Element<Acc = f32>>(&self) -> Vec<T> {
        fn of<S: Element<Acc = f32>, T: Element<Acc = f32>>(stored: &Stored) -> Vec<T> {
            stored.read::<S>().iter().map(|x| T::from_acc(x.to_acc())).collect()
        }
        match self.dtype {
            DType::Bf16 => of::<bf16, T>(self),
            DType::F16 => of::<f16, T>(self),
            DType::F32 | DType::F64 => of::<f32, T>(self),
        }
    }
}

/// The tensors of a checkpoint, checked against what the configuration asks for, and what is to compute with them.
#[derive(Debug)]
pub struct Weights {
    tensors: BTreeMap<String, Stored>,
    file_bytes: u64,
    backend: Backend,
    precision: Precision,
    /// Bytes in the files of what was taken and is used in place.
    mapped_bytes: u64,
    /// The same of what was copied.
    copied_bytes: u64,
}

impl Weights {
    /// Maps the weights in `folder`: `model.safetensors`, or the files that `model.safetensors.index.json` names.
    ///
    /// The files must not be changed while the model is in use: write new ones and rename them, as training does.
    ///
    /// # Errors
    /// If a file cannot be read, is cut off or no safetensors file; if a tensor of `manifest` is missing or has another
    /// shape or an element type other than F32, BF16 and F16; if there is a tensor that `manifest` does not have.
    pub fn open(folder: &Path, manifest: &[ParamSpec], backend: &Backend, precision: Precision) -> Result<Self> {
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
            None => {
                let backend = backend.clone();
                Ok(Self { tensors, file_bytes, backend, precision, mapped_bytes: 0, copied_bytes: 0 })
            }
            Some((name, tensor)) => Err(WeightsError::Unknown { path: tensor.path, name, count: found.len() + 1 }),
        }
    }

    /// Takes a matrix of the manifest out, to where the backend computes. For a model that computes in bf16, numbers in f32 are
    /// rounded to bf16; else they stay in the type that the file has them in.
    ///
    /// # Errors
    /// If a device has no memory for it.
    ///
    /// # Panics
    /// If the manifest has no such tensor, or it was taken before.
    pub fn take(&mut self, name: &str) -> nsa_kernels::Result<Weight> {
        let stored = self.remove(name);
        if self.precision == Precision::Bf16 && stored.dtype == DType::F32 {
            self.copied_bytes += stored.bytes() as u64;
            let storage = Storage::Bf16(self.copy(&stored.numbers::<bf16>())?);
            return Ok(Weight { shape: stored.shape, storage });
        }
        if self.backend.computes_in_host_memory() && !stored.is_aligned() {
            tracing::warn!(tensor = name, bytes = stored.bytes(), "tensor is not aligned in the file: copied");
        }
        let shape = stored.shape.clone();
        let in_place = self.takes_in_place(&stored, stored.dtype);
        let storage = match stored.dtype {
            _ if in_place => Storage::Mapped(Arc::new(stored)),
            DType::Bf16 => Storage::Bf16(self.copy(&stored.read())?),
            DType::F16 => Storage::F16(self.copy(&stored.read())?),
            DType::F32 | DType::F64 => Storage::F32(self.copy(&stored.read())?),
        };
        Ok(Weight { shape, storage })
    }

    /// Takes a tensor of the manifest out with its numbers in type `T`: where they lie if they are in that type, else widened or
    /// rounded.
    ///
    /// # Errors
    /// If a device has no memory for it.
    ///
    /// # Panics
    /// If the manifest has no such tensor, or it was taken before.
    pub fn take_numbers<T: Element<Acc = f32>>(&mut self, name: &str) -> nsa_kernels::Result<Numbers<T>> {
        let stored = self.remove(name);
        let shape = stored.shape.clone();
        let storage = match self.takes_in_place(&stored, T::DTYPE) {
            true => NumbersStorage::Mapped(Arc::new(stored)),
            false => NumbersStorage::Copied(self.copy(&stored.numbers::<T>())?),
        };
        Ok(Numbers { shape, storage })
    }

    /// Whether a tensor that is taken in a type is used where it lies, which is then counted.
    fn takes_in_place(&mut self, stored: &Stored, dtype: DType) -> bool {
        let in_place = stored.dtype == dtype && stored.is_aligned() && self.backend.computes_in_host_memory();
        *(if in_place { &mut self.mapped_bytes } else { &mut self.copied_bytes }) += stored.bytes() as u64;
        in_place
    }

    fn remove(&mut self, name: &str) -> Stored {
        self.tensors.remove(name).unwrap_or_else(|| panic!("the manifest has no `{name}`, or it was taken before"))
    }

    /// A copy in the backend's memory.
    fn copy<T: Element>(&self, data: &[T]) -> nsa_kernels::Result<Arc<Buffer<T>>> {
        self.backend.upload(data).made().map(Arc::new)
    }

    /// Bytes of the files.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Bytes in the files of the tensors that were taken: of those used in place, and of those copied, in whatever type.
    pub fn taken_bytes(&self) -> [u64; 2] {
        [self.mapped_bytes, self.copied_bytes]
    }

    /// The tensors that were not taken.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Stored)> {
        self.tensors.iter().map(|(name, stored)| (name.as_str(), stored))
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
    fn check(self, spec: &ParamSpec) -> Result<Stored> {
        let name = &spec.name;
        if self.shape != spec.shape {
            let (path, name, expected, got) = (self.path, name.clone(), spec.shape.clone(), self.shape);
            return Err(WeightsError::Shape { path, name, expected, got });
        }
        let dtype = match self.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            other => {
                return Err(WeightsError::Dtype { path: self.path, name: name.clone(), got: format!("{other:?}") });
            }
        };
        Ok(Stored { map: self.map, range: self.range, dtype, shape: self.shape })
    }
}

#[expect(unsafe_code, reason = "a file is mapped; nothing else here is unsafe")]
fn map_file(path: &Path) -> Result<Mmap> {
    let error = |source| FileError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(error)?;
    // SAFETY: the map is read-only. Its bytes are undefined only if someone changes the file in place meanwhile; training
    // never does (new files are renamed over old ones, which leaves the mapped file as it is), and `Weights::open` asks
    // the same of everyone else.
    Ok(unsafe { Mmap::map(&file) }.map_err(error)?)
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
