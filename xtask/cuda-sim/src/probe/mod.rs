//! What a device does on single instructions: cases that run on a real GPU and on the simulator alike, and the files that
//! hold what a GPU answered.

mod arithmetic;
mod collective;
mod convert;
mod element;
mod fixture;
mod hopper;
mod shared;
mod tensor;
mod values;

pub use element::Width;
pub use fixture::{Answer, Fixture, FixtureError};
pub use values::random;

/// A kernel with its input. The kernel is `k(in, out)` with two addresses, or `k(in, out, map)` with a tensor map.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// PTX of a module with the entry `k`.
    pub ptx: String,
    /// CTAs.
    pub grid: u32,
    /// Threads of a CTA.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Input.
    pub input: Vec<u8>,
    /// Bytes of output, filled with 0xa5 before.
    pub output: usize,
    /// A tensor map over the input, for kernels that copy by it.
    pub map: Option<TensorMap>,
}

/// A tensor in the input, as `cuTensorMapEncodeTiled` takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// `CUtensorMapDataType`
    pub data_type: u32,
    /// Sizes, the innermost first.
    pub sizes: Vec<u64>,
    /// Bytes between neighbours in all but the innermost dimension.
    pub strides: Vec<u64>,
    /// The box that one copy moves.
    pub tile: Vec<u32>,
    /// Steps of elements.
    pub steps: Vec<u32>,
    /// `CUtensorMapInterleave`
    pub interleave: u32,
    /// `CUtensorMapSwizzle`
    pub swizzle: u32,
    /// `CUtensorMapFloatOOBfill`
    pub fill: u32,
    /// The tensor lies in the output.
    pub of_output: bool,
}

/// All cases for a device of a compute capability (major · 10 + minor).
pub fn cases(capability: u32) -> Vec<Case> {
    let mut all = arithmetic::cases();
    all.extend(convert::cases());
    all.extend(collective::cases());
    all.extend(tensor::cases());
    all.extend(shared::cases());
    if capability == 90 {
        all.extend(hopper::cases());
    }
    all
}
