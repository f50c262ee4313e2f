//! The layer operations on the device.

pub(crate) mod adamw;
pub(crate) mod add;
pub(crate) mod cross_entropy;
pub(crate) mod embedding;
pub(crate) mod linear;
pub(crate) mod matmul;
pub(crate) mod rmsnorm;
pub(crate) mod rope;
pub(crate) mod round;
pub(crate) mod sigmoid;
pub(crate) mod swiglu;

use super::geometry::{Geometry, vector};
use super::launch::Call;
use super::params::Params;
use super::program::Program;
use crate::Result;

/// The kernels that take each element by itself.
pub(crate) static ELEMENTWISE: Program = Program {
    file: "elementwise.cu",
    text: include_str!("../kernels/elementwise.cu"),
    params: &[
        add::Add::declaration,
        sigmoid::SigmoidForward::declaration,
        sigmoid::SigmoidBackward::declaration,
        swiglu::SwigluForward::declaration,
        swiglu::SwigluBackward::declaration,
        round::Round::declaration,
    ],
};

/// Threads of a block of those kernels.
const THREADS: u32 = 256;

/// Launches one of them on `count` elements, the smallest of which have `size` bytes.
fn launch_elementwise<P: Params>(
    call: Call<'_>,
    kernel: &'static str,
    (count, size): (usize, usize),
    addresses: &[u64],
    params: P,
) -> Result<()> {
    let width = vector(0, size, addresses);
    let geometry = Geometry::linear(count.div_ceil(width) as u64, THREADS);
    call.constants(|constants| constants.with("VECTOR", width)).launch(&ELEMENTWISE, kernel, geometry, params)
}
