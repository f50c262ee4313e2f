//! The layer operations on the device.

pub(crate) mod adamw;
pub(crate) mod add;
pub(crate) mod copy;
pub(crate) mod cross_entropy;
pub(crate) mod embedding;
pub(crate) mod linear;
pub(crate) mod matmul;
pub(crate) mod rmsnorm;
pub(crate) mod rope;
pub(crate) mod round;
pub(crate) mod sigmoid;
pub(crate) mod swiglu;

use super::ahead::Build;
use super::geometry::{Geometry, vector};
use super::launch::Call;
use super::params::{Cpp, Grad, Params, Weight};
use super::program::{Constants, Program};
use crate::Result;
use nsa_core::{DType, NsaConfig};

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

/// What the layer operations run on rows as wide as all heads, with weights and gradients of the same type.
pub(crate) fn builds(config: &NsaConfig, dtype: DType) -> Vec<Build> {
    let constants = Constants::new(dtype).with_type(Weight::NAME, dtype).with_type(Grad::NAME, dtype);
    let vector = vector(0, dtype.size_bytes(), &[]);
    let with_vector = constants.clone().with("VECTOR", vector);
    let channels = config.num_heads() * config.head_dim_qk();
    let elementwise =
        ["add_forward", "sigmoid_forward", "sigmoid_backward", "swiglu_forward", "swiglu_backward", "round_forward"];
    vec![
        Build::new(&ELEMENTWISE, with_vector.clone(), &elementwise.map(|name| (name, THREADS))),
        adamw::build(),
        copy::build(),
        cross_entropy::build(),
        embedding::build(with_vector),
        linear::build(constants.clone(), vector),
        matmul::build(constants.clone()),
        rmsnorm::build(constants.clone(), channels, vector),
        rope::build(constants, config.head_dim_qk() / 2, vector),
    ]
}

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
