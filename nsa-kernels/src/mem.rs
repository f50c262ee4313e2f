//! Tensors in the memory that a backend computes on: the host's or a CUDA device's.

use crate::cuda::Cuda;
use crate::cuda::memory::{DeviceBuffer, DeviceMem, DeviceMemMut};
use crate::{Error, Result};
use bytemuck::Pod;
use nsa_core::view::Strided;
use nsa_core::{CuSeqlens, Element, Packing, ShapeError, View, ViewMut};
use std::ops::{Range, RangeInclusive};

/// Read-only memory of some backend.
#[derive(Debug)]
#[non_exhaustive]
pub enum Mem<'a, T> {
    /// The host's.
    Host(&'a [T]),
    /// A CUDA device's.
    Device(DeviceMem<'a, T>),
}

/// Writable memory of some backend.
#[derive(Debug)]
#[non_exhaustive]
pub enum MemMut<'a, T> {
    /// The host's.
    Host(&'a mut [T]),
    /// A CUDA device's.
    Device(DeviceMemMut<'a, T>),
}

// Derived, they would ask for elements that can be copied.
impl<T> Clone for Mem<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Mem<'_, T> {}

impl<'a, T> Mem<'a, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(data) => data.len(),
            Self::Device(mem) => mem.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements `range`.
    ///
    /// # Errors
    /// If there are fewer.
    pub fn slice(self, range: Range<usize>) -> Result<Self> {
        let end = range.end.max(range.start);
        ShapeError::check("Mem::slice", "range", &[end.min(self.len())], &[end])?;
        Ok(match self {
            Self::Host(data) => Self::Host(&data[range.start..end]),
            Self::Device(mem) => Self::Device(mem.slice(range.start..end)),
        })
    }

    /// The host's elements, for argument `arg` of `op`.
    ///
    /// # Errors
    /// If the memory is a device's.
    pub(crate) fn on_host(self, op: &'static str, arg: &str) -> Result<&'a [T]> {
        match self {
            Self::Host(data) => Ok(data),
            Self::Device(mem) => Err(elsewhere(op, arg, HOST.to_owned(), mem.place())),
        }
    }

    /// The device's elements, for argument `arg` of `op`.
    ///
    /// # Errors
    /// If they are not in the memory of this device and stream.
    pub(crate) fn on_device(self, op: &'static str, arg: &str, cuda: &Cuda) -> Result<DeviceMem<'a, T>> {
        match self {
            Self::Host(_) => Err(elsewhere(op, arg, cuda.name(), HOST.to_owned())),
            Self::Device(mem) => mem.check(cuda, op, arg).map(|()| mem),
        }
    }
}

impl<T> MemMut<'_, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(data) => data.len(),
            Self::Device(mem) => mem.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The host's memory, in errors.
pub(crate) const HOST: &str = "the host";

fn elsewhere(op: &'static str, arg: &str, expected: String, got: String) -> Error {
    Error::Memory { op, arg: arg.to_owned(), expected, got }
}

/// A read-only strided tensor, innermost dimension contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a, T, const N: usize> {
    mem: Mem<'a, T>,
    layout: Strided<N>,
}

impl<'a, T, const N: usize> Tensor<'a, T, N> {
    /// Host memory as a row-major tensor.
    ///
    /// # Errors
    /// If `data` is shorter than the shape asks for.
    pub fn host(data: &'a [T], shape: [usize; N]) -> Result<Self> {
        Ok(View::new(data, shape)?.into())
    }

    /// Any memory as a row-major tensor.
    ///
    /// # Errors
    /// If there is less memory than the shape asks for.
    pub fn packed(mem: Mem<'a, T>, shape: [usize; N]) -> Result<Self> {
        Self::new(mem, Strided::contiguous(shape)?)
    }

    /// Any memory through any legal layout.
    ///
    /// # Errors
    /// If the layout reaches beyond the memory.
    pub fn new(mem: Mem<'a, T>, layout: Strided<N>) -> Result<Self> {
        layout.check_len(mem.len())?;
        Ok(Self { mem, layout })
    }

    /// Sizes, outermost first.
    pub const fn shape(&self) -> [usize; N] {
        self.layout.shape()
    }

    /// As a view of host memory.
    ///
    /// # Errors
    /// If the memory is a device's.
    pub fn to_host(&self) -> Result<View<'a, T, N>> {
        Ok(View::with_layout(self.mem.on_host("Tensor::to_host", "tensor")?, self.layout)?)
    }

    /// Shape and strides.
    pub(crate) const fn layout(&self) -> Strided<N> {
        self.layout
    }

    /// The memory, which may reach beyond the elements.
    pub(crate) const fn mem(&self) -> Mem<'a, T> {
        self.mem
    }

    /// Checks the shape, for argument `arg` of `op`.
    ///
    /// # Errors
    /// If it is another one.
    pub fn check(&self, op: &'static str, arg: &str, expected: [usize; N]) -> Result<()> {
        Ok(ShapeError::check(op, arg, &expected, &self.shape())?)
    }
}

impl<'a, T: Element, const N: usize> Tensor<'a, T, N> {
    /// The same tensor under another name of its element type; `None` if that is another type.
    pub fn same_type<U: Element>(self) -> Option<Tensor<'a, U, N>> {
        let mem = |mem| match mem {
            Mem::Host(data) => Mem::Host(bytemuck::cast_slice(data)),
            Mem::Device(mem) => Mem::Device(mem.renamed()),
        };
        (T::DTYPE == U::DTYPE).then(|| Tensor { mem: mem(self.mem), layout: self.layout })
    }
}

impl<'a, T, const N: usize> From<View<'a, T, N>> for Tensor<'a, T, N> {
    fn from(view: View<'a, T, N>) -> Self {
        Self { mem: Mem::Host(view.data()), layout: view.layout() }
    }
}

/// A writable tensor, row-major without gaps.
#[derive(Debug)]
pub struct TensorMut<'a, T, const N: usize> {
    mem: MemMut<'a, T>,
    shape: [usize; N],
}

impl<'a, T, const N: usize> TensorMut<'a, T, N> {
    /// Host memory as a row-major tensor.
    ///
    /// # Errors
    /// If `data` is shorter than the shape asks for.
    pub fn host(data: &'a mut [T], shape: [usize; N]) -> Result<Self> {
        Ok(ViewMut::new(data, shape)?.into())
    }

    /// Any memory as a row-major tensor.
    ///
    /// # Errors
    /// If there is less memory than the shape asks for.
    pub fn packed(mem: MemMut<'a, T>, shape: [usize; N]) -> Result<Self> {
        Strided::contiguous(shape)?.check_len(mem.len())?;
        Ok(Self { mem, shape })
    }

    /// Sizes, outermost first.
    pub const fn shape(&self) -> [usize; N] {
        self.shape
    }

    /// As a view of host memory.
    ///
    /// # Errors
    /// If the memory is a device's.
    pub fn into_host(self) -> Result<ViewMut<'a, T, N>> {
        match self.mem {
            MemMut::Host(data) => Ok(ViewMut::new(data, self.shape)?),
            MemMut::Device(mem) => Err(elsewhere("TensorMut::into_host", "tensor", HOST.to_owned(), mem.place())),
        }
    }

    /// The first element's address, for argument `arg` of `op`.
    ///
    /// # Errors
    /// If it is not in the memory of this device and stream.
    pub(crate) fn device_address(&mut self, op: &'static str, arg: &str, cuda: &Cuda) -> Result<u64> {
        match &self.mem {
            MemMut::Host(_) => Err(elsewhere(op, arg, cuda.name(), HOST.to_owned())),
            MemMut::Device(mem) => mem.check(cuda, op, arg).map(|()| mem.address()),
        }
    }

    /// A shorter borrow of the same tensor.
    pub fn reborrow(&mut self) -> TensorMut<'_, T, N> {
        let mem = match &mut self.mem {
            MemMut::Host(data) => MemMut::Host(data),
            MemMut::Device(mem) => MemMut::Device(mem.reborrow()),
        };
        TensorMut { mem, shape: self.shape }
    }

    /// A read-only borrow of the same tensor.
    pub fn as_tensor(&self) -> Tensor<'_, T, N> {
        let layout = Strided::contiguous(self.shape).expect("checked when made");
        let mem = match &self.mem {
            MemMut::Host(data) => Mem::Host(data),
            MemMut::Device(mem) => Mem::Device(mem.as_mem()),
        };
        Tensor { mem, layout }
    }

    /// Checks the shape, for argument `arg` of `op`.
    ///
    /// # Errors
    /// If it is another one.
    pub fn check(&self, op: &'static str, arg: &str, expected: [usize; N]) -> Result<()> {
        Ok(ShapeError::check(op, arg, &expected, &self.shape)?)
    }
}

impl<'a, T: Pod, const N: usize> TensorMut<'a, T, N> {
    /// Sets every element to `value`.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn fill(&mut self, value: T) -> Result<()> {
        let size = self.shape.iter().product();
        match &mut self.mem {
            MemMut::Host(data) => data[..size].fill(value),
            MemMut::Device(mem) => mem.fill("TensorMut::fill", size, value)?,
        }
        Ok(())
    }

    /// The same elements in another shape.
    ///
    /// # Errors
    /// If the shape has another number of elements.
    pub fn reshape<const M: usize>(self, shape: [usize; M]) -> Result<TensorMut<'a, T, M>> {
        let size: usize = self.shape.iter().product();
        ShapeError::check("TensorMut::reshape", "elements", &[size], &[Strided::contiguous(shape)?.size()])?;
        Ok(TensorMut { mem: self.mem, shape })
    }
}

impl<'a, T> TensorMut<'a, T, 1> {
    /// The first `count` elements, and those after them.
    ///
    /// # Errors
    /// If there are fewer.
    pub fn split_at(self, count: usize) -> Result<(Self, Self)> {
        let [size] = self.shape;
        ShapeError::check("TensorMut::split_at", "count", &[count.min(size)], &[count])?;
        match self.mem {
            MemMut::Host(data) => {
                let (first, rest) = data.split_at_mut(count);
                Ok((Self::host(first, [count])?, Self::host(rest, [size - count])?))
            }
            MemMut::Device(mem) => {
                let (first, rest) = mem.split_at(count);
                let part = |mem, len| Self { mem: MemMut::Device(mem), shape: [len] };
                Ok((part(first, count), part(rest, size - count)))
            }
        }
    }
}

impl<'a, T, const N: usize> From<ViewMut<'a, T, N>> for TensorMut<'a, T, N> {
    fn from(view: ViewMut<'a, T, N>) -> Self {
        let shape = view.shape();
        Self { mem: MemMut::Host(view.into_data()), shape }
    }
}

/// Memory that a caller owns and hands to operations as tensors. Made by `Backend::alloc`. If a device had no memory for it,
/// every use as a tensor and every copy is that error.
#[derive(Debug)]
pub struct Buffer<T>(Owned<T>);

#[derive(Debug)]
enum Owned<T> {
    Host(Vec<T>),
    Device(DeviceBuffer<T>),
    /// What the device said.
    Failed(Error),
}

impl<T: Pod> Buffer<T> {
    pub(crate) fn from_host(data: Vec<T>) -> Self {
        Self(Owned::Host(data))
    }

    pub(crate) fn from_device(made: Result<DeviceBuffer<T>>) -> Self {
        Self(made.map_or_else(Owned::Failed, Owned::Device))
    }

    /// The buffer itself, if it was made.
    ///
    /// # Errors
    /// If a device had no memory for it.
    pub fn made(self) -> Result<Self> {
        match self.0 {
            Owned::Failed(error) => Err(error),
            owned => Ok(Self(owned)),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match &self.0 {
            Owned::Host(data) => data.len(),
            Owned::Device(buffer) => buffer.len(),
            Owned::Failed(_) => 0,
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory; no element if the device had none for it.
    pub fn mem(&self) -> Mem<'_, T> {
        self.mem_at(0).unwrap_or(Mem::Host(&[]))
    }

    /// The memory from element `offset` on; no element if that is beyond the end.
    ///
    /// # Errors
    /// If a device had no memory for the buffer.
    pub fn mem_at(&self, offset: usize) -> Result<Mem<'_, T>> {
        let range = offset.min(self.len())..self.len();
        match &self.0 {
            Owned::Host(data) => Ok(Mem::Host(&data[range])),
            Owned::Device(buffer) => Ok(Mem::Device(buffer.mem(range))),
            Owned::Failed(error) => Err(error.clone()),
        }
    }

    /// The first elements as a row-major tensor.
    ///
    /// # Errors
    /// If the buffer is shorter than the shape asks for.
    pub fn tensor<const N: usize>(&self, shape: [usize; N]) -> Result<Tensor<'_, T, N>> {
        self.tensor_at(0, shape)
    }

    /// The elements from `offset` on as a row-major tensor.
    ///
    /// # Errors
    /// If the buffer is shorter than offset and shape ask for.
    pub fn tensor_at<const N: usize>(&self, offset: usize, shape: [usize; N]) -> Result<Tensor<'_, T, N>> {
        Tensor::packed(self.mem_at(offset)?, shape)
    }

    /// The first elements as a writable row-major tensor.
    ///
    /// # Errors
    /// If the buffer is shorter than the shape asks for.
    pub fn tensor_mut<const N: usize>(&mut self, shape: [usize; N]) -> Result<TensorMut<'_, T, N>> {
        self.tensor_mut_at(0, shape)
    }

    /// The elements from `offset` on as a writable row-major tensor.
    ///
    /// # Errors
    /// If the buffer is shorter than offset and shape ask for.
    pub fn tensor_mut_at<const N: usize>(&mut self, offset: usize, shape: [usize; N]) -> Result<TensorMut<'_, T, N>> {
        let range = offset.min(self.len())..self.len();
        match &mut self.0 {
            Owned::Host(data) => TensorMut::host(&mut data[range], shape),
            Owned::Device(buffer) => TensorMut::packed(MemMut::Device(buffer.mem_mut(range)), shape),
            Owned::Failed(error) => Err(error.clone()),
        }
    }

    /// Copies elements from the host to the front.
    ///
    /// # Errors
    /// If `source` is longer than the buffer.
    pub fn write(&mut self, source: &[T]) -> Result<()> {
        const OP: &str = "Buffer::write";
        if let Owned::Failed(error) = &self.0 {
            return Err(error.clone());
        }
        ShapeError::check(OP, "source", &[source.len().min(self.len())], &[source.len()])?;
        match &mut self.0 {
            Owned::Host(data) => data[..source.len()].copy_from_slice(source),
            Owned::Device(buffer) => buffer.write(OP, source)?,
            Owned::Failed(error) => return Err(error.clone()),
        }
        Ok(())
    }

    /// Copies elements `range` of another buffer in the same memory to `offset` on.
    ///
    /// # Errors
    /// If either buffer is too short, or they are in different memories.
    pub fn copy_from(&mut self, offset: usize, source: &Self, range: Range<usize>) -> Result<()> {
        const OP: &str = "Buffer::copy_from";
        if let (Owned::Failed(error), _) | (_, Owned::Failed(error)) = (&self.0, &source.0) {
            return Err(error.clone());
        }
        let end = offset.saturating_add(range.len());
        ShapeError::check(OP, "source", &[range.end.max(range.start)], &[range.end.min(source.len())])?;
        ShapeError::check(OP, "target", &[end], &[end.min(self.len())])?;
        match (&mut self.0, &source.0) {
            (Owned::Host(target), Owned::Host(source)) => target[offset..end].copy_from_slice(&source[range]),
            (Owned::Device(target), Owned::Device(source)) => target.copy_from(OP, offset, source, range)?,
            (target, source) => return Err(elsewhere(OP, "source", target.place(), source.place())),
        }
        Ok(())
    }

    /// Copies elements from the front to the host. Of a device's memory: waits until it has done all work before.
    ///
    /// # Errors
    /// If `target` is longer than the buffer, or what went wrong in the device's work before.
    pub fn read(&self, target: &mut [T]) -> Result<()> {
        const OP: &str = "Buffer::read";
        if let Owned::Failed(error) = &self.0 {
            return Err(error.clone());
        }
        ShapeError::check(OP, "target", &[target.len().min(self.len())], &[target.len()])?;
        match &self.0 {
            Owned::Host(data) => target.copy_from_slice(&data[..target.len()]),
            Owned::Device(buffer) => buffer.read(OP, target)?,
            Owned::Failed(error) => return Err(error.clone()),
        }
        Ok(())
    }
}

impl<T: Pod> Owned<T> {
    /// The memory's name, for errors.
    fn place(&self) -> String {
        match self {
            Self::Device(buffer) => buffer.mem(0..0).place(),
            Self::Host(_) | Self::Failed(_) => HOST.to_owned(),
        }
    }
}

/// Keys or values of all sequences of a call, `[rows, G, D]` per sequence.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a, T> {
    /// One packed tensor `[total, G, D]` and the offsets of its sequences.
    Packed {
        /// `[total, G, D]`.
        tensor: Tensor<'a, T, 3>,
        /// `[S + 1]`.
        offsets: &'a CuSeqlens,
    },
    /// One page table a sequence, as caches hold them.
    Paged(&'a [Pages<'a, T>]),
}

impl<'a, T> Rows<'a, T> {
    /// One packed tensor `[total, G, D]` and the offsets of its sequences.
    pub fn packed(tensor: Tensor<'a, T, 3>, offsets: &'a CuSeqlens) -> Self {
        Self::Packed { tensor, offsets }
    }

    /// Checks for argument `arg` of `op` that there is one sequence of rows `row_shape` for each of `packing`, sequence
    /// s with a number of rows in `lens(s)`. Returns those numbers.
    pub(crate) fn check(
        &self,
        op: &'static str,
        arg: &str,
        row_shape: [usize; 2],
        packing: &Packing,
        lens: impl Fn(usize) -> RangeInclusive<usize>,
    ) -> Result<Vec<usize>> {
        let [heads, dim] = row_shape;
        let got: Vec<usize> = match self {
            Self::Packed { tensor, offsets } => {
                tensor.check(op, arg, [offsets.total(), heads, dim])?;
                (0..offsets.num_seqs()).map(|s| offsets.range(s).len()).collect()
            }
            Self::Paged(tables) => {
                for (s, pages) in tables.iter().enumerate() {
                    pages.check(op, &format!("{arg} of sequence {s}"), row_shape)?;
                }
                tables.iter().map(|pages| pages.len).collect()
            }
        };
        ShapeError::check(op, &format!("sequences of {arg}"), &[packing.num_seqs()], &[got.len()])?;
        for (s, &len) in got.iter().enumerate() {
            let allowed = lens(s);
            let nearest = len.clamp(*allowed.start(), *allowed.end());
            ShapeError::check(op, &format!("{arg} of sequence {s}"), &[nearest, heads, dim], &[len, heads, dim])?;
        }
        Ok(got)
    }
}

/// The pages of one sequence: row r lies in page r / `page_rows` at row r mod `page_rows`, as `[G, D]`.
#[derive(Clone, Debug)]
pub struct Pages<'a, T> {
    /// Pages in order, each `[page_rows, G, D]`.
    pub pages: Vec<Mem<'a, T>>,
    /// Rows of a page.
    pub page_rows: usize,
    /// Rows in use.
    pub len: usize,
    /// G and D.
    pub row_shape: [usize; 2],
}

impl<T> Pages<'_, T> {
    /// Checks that rows have shape `row_shape` and that whole pages hold all of them.
    pub(crate) fn check(&self, op: &'static str, arg: &str, row_shape: [usize; 2]) -> Result<()> {
        let [heads, dim] = row_shape;
        ShapeError::check(op, arg, &[self.len, heads, dim], &[self.len, self.row_shape[0], self.row_shape[1]])?;
        let capacity = self.pages.len().saturating_mul(self.page_rows);
        ShapeError::check(op, &format!("pages of {arg}"), &[self.len.max(capacity)], &[capacity])?;
        let size = self.page_rows.saturating_mul(heads).saturating_mul(dim);
        // A decoding step has thousands of pages: the error is made of one of them.
        let shortest = self.pages.iter().map(Mem::len).min().unwrap_or(size);
        Ok(ShapeError::check(op, &format!("page of {arg}"), &[size], &[shortest.min(size)])?)
    }
}
