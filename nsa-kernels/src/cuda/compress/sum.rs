//! φ of the kinds `mean` and `weighted`.

use super::chunks::starts;
use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::geometry::{Geometry, vector};
use crate::cuda::launch::Call;
use crate::cuda::params::{In, Out, Params, Stored, params};
use crate::cuda::program::{Constants, Program};
use crate::cuda::reduce::{Parts, column_totals, take_column_totals, totals_of_parts};
use crate::cuda::workspace::{Needs, PhiParts, Places, Scratch};
use crate::op::compress::{Backward, Forward, PhiGrad};
use crate::{Element, Result, Tensor};
use nsa_core::{CompressKind, DType, NsaConfig, Packing};

/// The kernels.
pub(crate) static PROGRAM: Program = Program {
    file: "compress_sum.cu",
    text: include_str!("../kernels/compress_sum.cu"),
    params: &[
        CompressConstants::declaration,
        CompressForward::declaration,
        CompressTokens::declaration,
        CompressPosition::declaration,
        CompressWeightSums::declaration,
        CompressWeight::declaration,
    ],
};

/// Threads of a block.
const THREADS: u32 = 256;

params! {
    /// Arguments of `compress_constants`.
    struct CompressConstants {
        /// `[l, G]`, if there are weights.
        weight: In<Stored>,
        /// `[l, G, D]`.
        position: In<Stored>,
        /// `[G, D]`.
        constants: Out<f32>,
    }

    /// Arguments of `compress_forward`.
    struct CompressForward {
        /// `[N, G, D]`.
        x: In<Stored>,
        /// `[l, G]`, if there are weights.
        weight: In<Stored>,
        /// `[G, D]`, or none.
        constants: In<f32>,
        /// `[M]`.
        starts: In<i32>,
        /// `[M, G, D]`.
        blocks: Out<Stored>,
        /// M.
        count: i64,
    }

    /// Arguments of `compress_tokens`.
    struct CompressTokens {
        /// `[M, G, D]`.
        d_blocks: In<f32>,
        /// `[l, G]`, if there are weights.
        weight: In<Stored>,
        /// `[M]`.
        starts: In<i32>,
        /// `[N, G, D]`.
        dx: Out<f32>,
        /// M.
        count: i64,
        /// N.
        rows: i64,
    }

    /// Arguments of `compress_position`.
    struct CompressPosition {
        /// `[l, G]`, if there are weights.
        weight: In<Stored>,
        /// `[G, D]`.
        totals: In<f64>,
        /// `[l, G, D]`.
        d_position: Out<f32>,
    }

    /// Arguments of `compress_weight_sums`.
    struct CompressWeightSums {
        /// `[N, G, D]`.
        x: In<Stored>,
        /// `[M, G, D]`.
        d_blocks: In<f32>,
        /// `[M]`.
        starts: In<i32>,
        /// `[parts, l, G]`.
        partial: Out<f64>,
        /// M.
        count: i64,
        /// Blocks of a part.
        part_rows: i64,
    }

    /// Arguments of `compress_weight`.
    struct CompressWeight {
        /// `[l, G]`.
        sums: In<f64>,
        /// `[l, G, D]`, or none.
        position: In<Stored>,
        /// `[G, D]`, if there is a position.
        totals: In<f64>,
        /// `[l, G]`.
        d_weight: Out<f32>,
    }
}

/// What φ of these kinds runs, with weights.
pub(super) fn build(config: &NsaConfig, dtype: DType) -> Build {
    let dim = config.head_dim_qk();
    let kernels = [
        "compress_constants",
        "compress_forward",
        "compress_tokens",
        "compress_position",
        "compress_weight_sums",
        "compress_weight",
    ];
    let constants =
        constants(Constants::new(dtype), config, dim, true).with("VECTOR", vector(dim, dtype.size_bytes(), &[]));
    Build::new(&PROGRAM, constants, &kernels.map(|name| (name, THREADS)))
}

fn constants(constants: Constants, config: &NsaConfig, dim: usize, weighted: bool) -> Constants {
    constants
        .with("KV_HEADS", config.num_kv_heads())
        .with("DIM", dim)
        .with("COMPRESS_BLOCK", config.compress_block())
        .with("WEIGHTED", usize::from(weighted))
}

/// What both directions share.
struct Operands<'c> {
    call: Call<'c>,
    weight: In<Stored>,
    starts: Scratch<i32>,
    count: usize,
    /// G·D.
    row: usize,
}

impl<'c> Operands<'c> {
    fn new<T: Element>(
        cuda: &'c Cuda,
        op: &'static str,
        (config, packing): (&NsaConfig, &Packing),
        weight: Option<&Tensor<'_, T, 2>>,
        dim: usize,
    ) -> Result<Self> {
        let call = Call::new::<T>(cuda, op)?.constants(|given| constants(given, config, dim, weight.is_some()));
        let starts: Vec<i32> = starts(config, packing).flatten().collect();
        Ok(Self {
            weight: call.optional_input("phi.weight", weight)?,
            count: starts.len(),
            starts: call.upload(&starts)?,
            row: config.num_kv_heads() * dim,
            call,
        })
    }

    /// A call with this many elements a thread.
    fn with_vector(&self, width: usize) -> Call<'c> {
        self.call.again(|constants| constants.with("VECTOR", width))
    }

    /// A thread for each of `width` elements of `rows` rows.
    fn geometry(&self, rows: usize, width: usize) -> Geometry {
        Geometry::linear((rows * (self.row / width)) as u64, THREADS)
    }
}

/// What [`forward`] takes of a workspace.
pub(super) fn forward_places(needs: &Needs<'_>, dim: usize) -> Places {
    let mut places = Places::default();
    places.take_of::<f32>(needs.config.num_kv_heads() * dim);
    places
}

/// What [`backward`] takes of a workspace.
pub(super) fn backward_places(needs: &Needs<'_>, dim: usize, given: PhiParts) -> Places {
    let Needs { config, packing, .. } = needs;
    let (l, heads, mut places) = (config.compress_block(), config.num_kv_heads(), Places::default());
    let weighted = config.compress_kind() == CompressKind::Weighted;
    let count = starts(config, packing).flatten().count();
    if given.position || weighted {
        take_column_totals(&mut places, [count, heads * dim]);
    }
    if weighted {
        places.take_of::<f64>(Parts::of(count).count * l * heads);
        places.take_of::<f64>(l * heads);
    }
    places
}

/// `weight`: that of `weighted`.
pub(super) fn forward<T: Element>(
    cuda: &Cuda,
    op: &'static str,
    args: Forward<'_, T>,
    weight: Option<&Tensor<'_, T, 2>>,
) -> Result<()> {
    let Forward { config, packing, x, position, mut blocks, .. } = args;
    let [_, _, dim] = x.shape();
    let operands = Operands::new(cuda, op, (config, packing), weight, dim)?;
    let call = operands.with_vector(1);
    let mut constants = call.workspace::<f32>(operands.row)?;
    if let Some(position) = &position {
        let params = CompressConstants {
            weight: operands.weight,
            position: call.input("position", position)?,
            constants: constants.written_by(),
        };
        call.launch(&PROGRAM, "compress_constants", operands.geometry(1, 1), params)?;
    }
    let params = CompressForward {
        x: call.input("x", &x)?,
        weight: operands.weight,
        constants: if position.is_some() { constants.read_by() } else { In::none() },
        starts: operands.starts.read_by(),
        blocks: call.output("blocks", &mut blocks)?,
        count: operands.count as i64,
    };
    let width = vector(dim, size_of::<T>(), &[params.x.0, params.blocks.0]);
    let geometry = operands.geometry(operands.count, width);
    operands.with_vector(width).launch(&PROGRAM, "compress_forward", geometry, params)
}

/// `weight`: that of `weighted`.
pub(super) fn backward<T: Element>(
    cuda: &Cuda,
    op: &'static str,
    args: Backward<'_, T>,
    weight: Option<&Tensor<'_, T, 2>>,
) -> Result<()> {
    let Backward { config, packing, x, position, d_blocks, mut dx, mut d_position, d_phi, .. } = args;
    let [rows, _, dim] = x.shape();
    let operands = Operands::new(cuda, op, (config, packing), weight, dim)?;
    let call = operands.with_vector(1);
    let (d_blocks, count) = (call.input("d_blocks", &d_blocks)?, operands.count as i64);
    let params = CompressTokens {
        d_blocks,
        weight: operands.weight,
        starts: operands.starts.read_by(),
        dx: call.output("dx", &mut dx)?,
        count,
        rows: rows as i64,
    };
    let width = vector(dim, size_of::<f32>(), &[d_blocks.0, params.dx.0]);
    let geometry = operands.geometry(rows, width);
    operands.with_vector(width).launch(&PROGRAM, "compress_tokens", geometry, params)?;
    let mut d_weight = match d_phi {
        PhiGrad::Weighted { weight } => Some(weight),
        _ => None,
    };
    if d_position.is_none() && d_weight.is_none() {
        return Ok(());
    }
    let totals = column_totals(&call, d_blocks, [operands.count, operands.row])?;
    if let Some(d_position) = &mut d_position {
        let d_position = call.output("d_position", d_position)?;
        let params = CompressPosition { weight: operands.weight, totals: totals.read_by(), d_position };
        call.launch(&PROGRAM, "compress_position", operands.geometry(config.compress_block(), 1), params)?;
    }
    match &mut d_weight {
        None => Ok(()),
        Some(d_weight) => {
            let d_weight = call.output("d_phi.weight", d_weight)?;
            add_d_weight(&operands, &call, (&x, d_blocks), (position.as_ref(), &totals), config, d_weight)
        }
    }
}

/// da_p += Σ_i dy_i · (x_(start + p) + e_p).
fn add_d_weight<T: Element>(
    operands: &Operands<'_>,
    call: &Call<'_>,
    (x, d_blocks): (&Tensor<'_, T, 3>, In<f32>),
    (position, totals): (Option<&Tensor<'_, T, 3>>, &Scratch<f64>),
    config: &NsaConfig,
    d_weight: Out<f32>,
) -> Result<()> {
    let (parts, l, heads) = (Parts::of(operands.count), config.compress_block(), config.num_kv_heads());
    let mut partial = call.workspace::<f64>(parts.count * l * heads)?;
    let params = CompressWeightSums {
        x: call.input("x", x)?,
        d_blocks,
        starts: operands.starts.read_by(),
        partial: partial.written_by(),
        count: operands.count as i64,
        part_rows: parts.rows as i64,
    };
    let geometry = Geometry { grid: [parts.count as u64, l as u64, heads as u64], threads: THREADS, shared_bytes: 0 };
    call.launch(&PROGRAM, "compress_weight_sums", geometry, params)?;
    let sums = totals_of_parts(call, &partial, [parts.count, l * heads])?;
    let position = call.optional_input("position", position)?;
    let params = CompressWeight { sums: sums.read_by(), position, totals: totals.read_by(), d_weight };
    call.launch(&PROGRAM, "compress_weight", Geometry::linear((l * heads) as u64, THREADS), params)
}
