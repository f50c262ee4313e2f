//! Several tensors as one, and back.

use super::place;
use crate::{Error, Mem, TensorMut};
use candle_core::{DType, Device, Result, Tensor};
use nsa_core::ShapeError;

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

/// This crate's error as candle's.
pub(super) fn wrap(error: impl Into<Error>) -> candle_core::Error {
    candle_core::Error::wrap(error.into())
}

/// A tensor with its name and the shape that it must have.
pub(super) type Part<'a> = (&'static str, &'a Tensor, Vec<usize>);

/// Checks shapes, dtypes and devices, then joins all elements in order. Gradients flow through.
pub(super) fn pack(op: &'static str, parts: &[Part<'_>]) -> Result<Tensor> {
    let (dtype, device) =
        parts.first().map_or((DType::F32, &Device::Cpu), |(_, tensor, _)| (tensor.dtype(), tensor.device()));
    let mut flat = Vec::with_capacity(parts.len());
    for (name, tensor, shape) in parts {
        ShapeError::check(op, name, shape, tensor.dims()).map_err(wrap)?;
        if tensor.dtype() != dtype {
            candle_core::bail!("{op}: `{name}` has dtype {:?}, expected {dtype:?}", tensor.dtype());
        }
        if !tensor.device().same_device(device) {
            let (expected, got) = (place::name(device), place::name(tensor.device()));
            return Err(wrap(Error::Memory { op, arg: (*name).to_owned(), expected, got }));
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
pub(super) fn unpack<'a, T>(data: Mem<'a, T>, sizes: impl Iterator<Item = usize>) -> impl Iterator<Item = Mem<'a, T>> {
    let mut from = 0;
    sizes.map(move |size| {
        let part = data.slice(from..from + size).expect("packed with these sizes");
        from += size;
        part
    })
}

/// Splits packed elements to be written.
pub(super) fn unpack_mut<'a, T>(
    data: TensorMut<'a, T, 1>,
    sizes: impl Iterator<Item = usize>,
) -> impl Iterator<Item = TensorMut<'a, T, 1>> {
    let mut rest = Some(data);
    sizes.map(move |size| {
        let (part, after) = rest.take().and_then(|rest| rest.split_at(size).ok()).expect("packed with these sizes");
        rest = Some(after);
        part
    })
}
