//! The gated sum of the branches: bound by memory, one pass over each tensor.

use super::Cuda;
use super::ahead::Build;
use super::geometry::{Geometry, vector};
use super::launch::Call;
use super::params::{In, Out, Params, Stored, params};
use super::program::{Constants, Program};
use crate::op::gate::{Backward, Forward};
use crate::{Element, Result};
use nsa_core::{DType, NsaConfig};

/// The kernels.
pub(crate) static PROGRAM: Program = Program {
    file: "gate.cu",
    text: include_str!("kernels/gate.cu"),
    params: &[GateForward::declaration, GateBackward::declaration],
};

/// Threads of a block.
const THREADS: u32 = 256;

params! {
    /// Arguments of `gate_forward`.
    struct GateForward {
        /// `[rows, 3]`.
        gates: In<Stored>,
        /// `[rows, DIM]`.
        cmp: In<Stored>,
        /// `[rows, DIM]`.
        slc: In<Stored>,
        /// `[rows, DIM]`.
        win: In<Stored>,
        /// `[rows, DIM]`.
        o: Out<Stored>,
        /// N·Hq.
        rows: i64,
    }

    /// Arguments of `gate_backward`.
    struct GateBackward {
        /// `[rows, DIM]`.
        cmp: In<Stored>,
        /// `[rows, DIM]`.
        slc: In<Stored>,
        /// `[rows, DIM]`.
        win: In<Stored>,
        /// `[rows, DIM]`.
        d_o: In<Stored>,
        /// `[rows, 3]`.
        d_gates: Out<f32>,
        /// N·Hq.
        rows: i64,
    }
}

/// What the operation runs for a configuration.
pub(crate) fn builds(config: &NsaConfig, dtype: DType) -> Vec<Build> {
    let dim = config.head_dim_v();
    let constants = constants(Constants::new(dtype), dim, vector(dim, dtype.size_bytes(), &[]));
    vec![Build::new(&PROGRAM, constants, &[("gate_forward", THREADS), ("gate_backward", THREADS)])]
}

fn constants(constants: Constants, dim: usize, width: usize) -> Constants {
    constants.with("DIM", dim).with("VECTOR", width)
}

pub(crate) fn forward<T: Element>(cuda: &Cuda, args: Forward<'_, T>) -> Result<()> {
    let call = Call::new::<T>(cuda, "gate::forward")?;
    let Forward { gates, branches: [cmp, slc, win], mut o } = args;
    let [tokens, heads, dim] = o.shape();
    let rows = tokens * heads;
    let params = GateForward {
        gates: call.input("gates", &gates)?,
        cmp: call.input("branches[0]", &cmp)?,
        slc: call.input("branches[1]", &slc)?,
        win: call.input("branches[2]", &win)?,
        o: call.output("o", &mut o)?,
        rows: rows as i64,
    };
    let width = vector(dim, size_of::<T>(), &[params.cmp.0, params.slc.0, params.win.0, params.o.0]);
    let geometry = Geometry::linear((rows * (dim / width)) as u64, THREADS);
    let call = call.constants(|given| constants(given, dim, width));
    call.launch(&PROGRAM, "gate_forward", geometry, params)
}

pub(crate) fn backward<T: Element>(cuda: &Cuda, args: Backward<'_, T>) -> Result<()> {
    let call = Call::new::<T>(cuda, "gate::backward")?;
    let Backward { branches: [cmp, slc, win], d_o, mut d_gates } = args;
    let [tokens, heads, dim] = d_o.shape();
    let rows = tokens * heads;
    let params = GateBackward {
        cmp: call.input("branches[0]", &cmp)?,
        slc: call.input("branches[1]", &slc)?,
        win: call.input("branches[2]", &win)?,
        d_o: call.input("d_o", &d_o)?,
        d_gates: call.output("d_gates", &mut d_gates)?,
        rows: rows as i64,
    };
    let width = vector(dim, size_of::<T>(), &[params.cmp.0, params.slc.0, params.win.0, params.d_o.0]);
    // A warp a row.
    let geometry = Geometry::linear(32 * rows as u64, THREADS);
    let call = call.constants(|given| constants(given, dim, width));
    call.launch(&PROGRAM, "gate_backward", geometry, params)
}
