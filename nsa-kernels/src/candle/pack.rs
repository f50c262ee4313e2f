//! Several tensors as one, and back.

use crate::{Backend, Error};
use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, WithDType};
use nsa_core::{Real, ShapeError};
use std::sync::LazyLock;

/// An element type that both sides know.
pub(super) trait Scalar: crate::Element + WithDType {}

impl<T: crate::Element + WithDType> Scalar for T {}

/// Calls `$function::<T>` for the element type of a tensor.
macro_rules! for_dtype {
    ($op:expr, $tensor:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $tensor.dtype() {
            candle_core::DType::F32 => $function::<f32>($($argument),*),
            candle_core::DType::F64 => $function::<f64>($($argument),*),
            candle_core::DType::BF16 => $function::<half::bf16>($($argument),*),
            candle_core::DType::F16 => $function::<half::f16>($($argument),*),
            dtype => candle_core::bail!("{}: dtype {dtype:?} is none of f32, f64, bf16, f16", $op),
        }
    };
}
pub(super) use for_dtype;

/// The backend of all operations, with its scratch memory.
pub(super) fn backend() -> crate::Result<&'static Backend> {
    static BACKEND: LazyLock<crate::Result<Backend>> = LazyLock::new(|| Ok(Backend::pick(None)?.0));
    BACKEND.as_ref().map_err(Error::clone)
}

/// This crate's error as candle's.
pub(super) fn wrap(error: impl Into<Error>) -> candle_core::Error {
    candle_core::Error::wrap(error.into())
}

/// A tensor with its name and the shape that it must have.
pub(super) type Part<'a> = (&'static str, &'a Tensor, Vec<usize>);

/// Checks shapes and dtypes, then joins all elements in order. Gradients flow through.
pub(super) fn pack(op: &'static str, parts: &[Part<'_>]) -> Result<Tensor> {
    let dtype = parts.first().map_or(DType::F32, |(_, tensor, _)| tensor.dtype());
    let mut flat = Vec::with_capacity(parts.len());
    for (name, tensor, shape) in parts {
        ShapeError::check(op, name, shape, tensor.dims()).map_err(wrap)?;
        if tensor.dtype() != dtype {
            candle_core::bail!("{op}: `{name}` has dtype {:?}, expected {dtype:?}", tensor.dtype());
        }
        flat.push(tensor.flatten_all()?);
    }
    Tensor::cat(&flat, 0)
}

/// Elements of each of some shapes.
pub(super) fn sizes<S: AsRef<[usize]>>(shapes: &[S]) -> impl Iterator<Item = usize> {
    shapes.iter().map(|shape| shape.as_ref().iter().product())
}

/// Splits packed elements again.
pub(super) fn unpack<T>(mut data: &[T], sizes: impl Iterator<Item = usize>) -> impl Iterator<Item = &[T]> {
    sizes.map(move |size| data.split_off(..size).expect("packed with these sizes"))
}

/// Splits packed elements to be written.
pub(super) fn unpack_mut<T>(mut data: &mut [T], sizes: impl Iterator<Item = usize>) -> impl Iterator<Item = &mut [T]> {
    sizes.map(move |size| data.split_off_mut(..size).expect("packed with these sizes"))
}

/// The elements of a packed tensor, as an operation's forward gets them.
pub(super) fn elements<'a, T: Scalar>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let data = storage.as_slice::<T>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => candle_core::bail!("a packed tensor has gaps"),
    }
}

/// Calls `f` with the elements of a tensor.
pub(super) fn with_elements<T: Scalar, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(elements(storage, layout)?),
        _ => candle_core::bail!("the tensor is not in the CPU's memory"),
    }
}

/// Gradients, gathered in the type of sums, as a tensor like the packed inputs.
pub(super) fn gradient<T: Scalar>(data: &[T::Acc], like: &Tensor) -> Result<Tensor> {
    let data: Vec<T> = data.iter().map(|&x| T::from_acc(x)).collect();
    Tensor::from_vec(data, like.shape(), like.device())
}

/// Zeros to gather gradients in.
pub(super) fn zeros<A: Real>(len: usize) -> Vec<A> {
    vec![A::zero(); len]
}
