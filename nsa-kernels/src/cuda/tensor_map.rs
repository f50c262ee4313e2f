//! Tensor maps: what copies that hardware makes by itself know of a tensor (compute capability 9.0).

use super::params::Field;
use super::{Cuda, failed};
use crate::{Error, Result};
use cudarc::driver::sys::{self, CUtensorMap, CUtensorMapDataType_enum as DataType};
use std::ffi::c_void;
use std::mem::MaybeUninit;

/// Columns of a box: 128 bytes, whose chunks are swapped as products expect it (`kernels/wgmma.cuh`).
const BOX_COLUMNS: usize = 64;

/// The oldest CUDA whose drivers describe tensors.
const OLDEST_DRIVER: (i32, i32) = (12, 0);

/// Rows of a tensor that one copy takes, `[tokens, heads]`, 64 columns each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Boxes {
    /// Tokens that follow each other.
    pub(crate) tokens: usize,
    /// Heads of each.
    pub(crate) heads: usize,
}

/// A tensor of 16-bit elements in boxes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct TensorMap([u64; 16]);

impl Field for TensorMap {
    fn cpp() -> String {
        "TensorMap".to_owned()
    }
}

impl TensorMap {
    /// Of no tensor: kernels whose threads copy do not look at it.
    pub(crate) fn none() -> Self {
        Self([0; 16])
    }

    /// The tensor `[tokens, heads, dim]` at this address of the device's memory. None where there are no boxes, it is empty, or it lies
    /// so that copies cannot take them.
    ///
    /// # Errors
    /// If the driver is too old for that or refuses it.
    pub(crate) fn new(
        cuda: &Cuda,
        address: u64,
        [tokens, heads, dim]: [usize; 3],
        boxes: Option<Boxes>,
    ) -> Result<Self> {
        let fits = |_: &Boxes| tokens > 0 && address.is_multiple_of(16) && dim.is_multiple_of(BOX_COLUMNS);
        let Some(boxes) = boxes.filter(fits) else { return Ok(Self::none()) };
        check_driver(&cuda.name(), cuda.device().driver)?;
        // The innermost dimension first.
        let sizes = [dim, heads, tokens].map(|size| size as u64);
        let strides = [2 * sizes[0], 2 * sizes[0] * sizes[1]];
        let tile = [BOX_COLUMNS, boxes.heads, boxes.tokens].map(|size| size as u32);
        let mut map = MaybeUninit::<CUtensorMap>::uninit();
        // SAFETY: the driver reads three sizes, two strides, three sides and three steps, and writes the map, whose type is
        // aligned as it asks; it does not read what lies at the address.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                // Bits are copied: f16 too.
                DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                3,
                address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                [1; 3].as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        encoded.result().map_err(|error| failed(&format!("{}: a tensor map", cuda.name()), &error))?;
        // SAFETY: the driver has written it.
        Ok(Self(unsafe { map.assume_init() }.opaque))
    }
}

/// Older drivers do not have the function that is called here.
fn check_driver(name: &str, driver: (i32, i32)) -> Result<()> {
    if driver >= OLDEST_DRIVER {
        return Ok(());
    }
    let (major, minor) = driver;
    let missing = format!("the driver supports CUDA {major}.{minor}, kernels for compute capability 9.0 need 12.0");
    Err(Error::Backend { requested: name.to_owned(), missing, advice: "update the driver".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::check_driver;

    #[test]
    fn drivers_that_cannot_describe_tensors_are_too_old() {
        let error = check_driver("cuda:1", (11, 8)).unwrap_err().to_string();
        assert!(error.contains("cuda:1") && error.contains("CUDA 11.8") && error.contains("12.0"), "{error}");
        assert!(check_driver("cuda:1", (12, 0)).is_ok() && check_driver("cuda:1", (13, 1)).is_ok());
    }
}
