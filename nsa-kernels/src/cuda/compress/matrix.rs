//! φ of the kinds `linear` and `mlp`: products by cuBLAS, slice by slice of the first weight, kernels around them.
//!
//! All sequences and heads are one batch of products, see `kernels/compress_matrix.cu`. The first product multiplies tokens
//! and weights in their own type. Hidden units and gradients are f32 and stay so, since nothing may round them before the
//! result: what they are multiplied with is widened.

mod backward;
mod places;

pub(super) use backward::backward;
pub(super) use places::{backward_places, forward_places};

use super::chunks::Chunks;
use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::blas::{Matrix, multiply_batch};
use crate::cuda::geometry::{Geometry, vector};
use crate::cuda::launch::Call;
use crate::cuda::layer::matmul::Operand;
use crate::cuda::params::{In, Out, Params, Stored, params};
use crate::cuda::program::{Constants, Program};
use crate::cuda::reduce::totals_of_parts;
use crate::cuda::workspace::Scratch;
use crate::op::compress::{Forward, Phi};
use crate::{Element, Result, Tensor};
use nsa_core::{DType, NsaConfig, Packing};

/// The kernels.
pub(crate) static PROGRAM: Program = Program {
    file: "compress_matrix.cu",
    text: include_str!("../kernels/compress_matrix.cu"),
    params: &[
        CompressGather::declaration,
        CompressScatter::declaration,
        CompressEmbedded::declaration,
        CompressAdded::declaration,
        CompressFinish::declaration,
        CompressGelu::declaration,
        CompressSpread::declaration,
        CompressGeluBackward::declaration,
        CompressBias::declaration,
        CompressEmbeddingBackward::declaration,
    ],
};

/// Threads of a block.
const THREADS: u32 = 256;

params! {
    /// Arguments of `compress_gather`.
    struct CompressGather {
        /// `[N, G, D]`.
        x: In<Stored>,
        /// `[C]`.
        tokens: In<i32>,
        /// `[C, G, d, D]`.
        gathered: Out<Stored>,
        /// C.
        chunks: i64,
    }

    /// Arguments of `compress_scatter`.
    struct CompressScatter {
        /// `[C, G, d, D]`.
        gathered: In<f32>,
        /// `[C]`.
        tokens: In<i32>,
        /// `[N, G, D]`.
        dx: Out<f32>,
        /// C.
        chunks: i64,
    }

    /// Arguments of `compress_embedded`.
    struct CompressEmbedded {
        /// `[l, G, D]`.
        position: In<Stored>,
        /// `[G, l·D, H]`.
        weight: In<Stored>,
        /// `[l, G, H]`.
        partial: Out<f64>,
    }

    /// Arguments of `compress_added`.
    struct CompressAdded {
        /// `[columns]`, or none.
        bias: In<Stored>,
        /// `[columns]`, or none.
        embedded: In<f64>,
        /// `[columns]`.
        added: Out<f32>,
        /// Columns.
        columns: i64,
    }

    /// Arguments of `compress_finish`.
    struct CompressFinish {
        /// `[rows, G, D]`.
        sums: In<f32>,
        /// `[G, D]`, or none.
        added: In<f32>,
        /// `[rows]`.
        blocks: In<i32>,
        /// `[M, G, D]`.
        y: Out<Stored>,
        /// Rows.
        rows: i64,
    }

    /// Arguments of `compress_gelu`.
    struct CompressGelu {
        /// `[rows, G, H]`.
        z: Out<f32>,
        /// `[G, H]`, or none.
        added: In<f32>,
        /// Rows.
        rows: i64,
    }

    /// Arguments of `compress_spread`.
    struct CompressSpread {
        /// `[M, G, D]`.
        d_blocks: In<f32>,
        /// `[rows]`.
        blocks: In<i32>,
        /// `[rows, G, D]`.
        dy: Out<f32>,
        /// Rows.
        rows: i64,
    }

    /// Arguments of `compress_gelu_backward`.
    struct CompressGeluBackward {
        /// `[rows, G, H]`.
        z: Out<f32>,
        /// `[rows, G, H]`.
        gradient: Out<f32>,
        /// `[G, H]`, or none.
        added: In<f32>,
        /// `[rows]`.
        blocks: In<i32>,
        /// Rows.
        rows: i64,
    }

    /// Arguments of `compress_bias`.
    struct CompressBias {
        /// `[columns]`.
        totals: In<f64>,
        /// `[columns]`.
        d_bias: Out<f32>,
        /// Columns.
        columns: i64,
    }

    /// Arguments of `compress_embedding_backward`.
    struct CompressEmbeddingBackward {
        /// `[l, G, D]`.
        position: In<Stored>,
        /// `[G, l·D, H]`.
        weight: In<Stored>,
        /// `[G, H]`.
        totals: In<f64>,
        /// `[l, G, D]`, or none.
        d_position: Out<f32>,
        /// `[G, l·D, H]`.
        d_weight: Out<f32>,
    }
}

/// What φ of these kinds runs.
pub(super) fn build(config: &NsaConfig, dtype: DType) -> Build {
    let dim = config.head_dim_qk();
    let sizes = Sizes::new(config, dim, config.compress_hidden().unwrap_or(dim));
    let kernels = [
        "compress_gather",
        "compress_scatter",
        "compress_embedded",
        "compress_added",
        "compress_finish",
        "compress_gelu",
        "compress_spread",
        "compress_gelu_backward",
        "compress_bias",
        "compress_embedding_backward",
    ];
    let constants = sizes.constants(Constants::new(dtype), vector(sizes.dim, dtype.size_bytes(), &[]));
    Build::new(&PROGRAM, constants, &kernels.map(|name| (name, THREADS)))
}

#[derive(Clone, Copy)]
struct Sizes {
    /// G.
    heads: usize,
    /// D.
    dim: usize,
    /// H; D of `linear`.
    hidden: usize,
    /// l.
    block: usize,
    /// d.
    stride: usize,
}

impl Sizes {
    fn new(config: &NsaConfig, dim: usize, hidden: usize) -> Self {
        Self {
            heads: config.num_kv_heads(),
            dim,
            hidden,
            block: config.compress_block(),
            stride: config.compress_stride(),
        }
    }

    fn constants(&self, constants: Constants, vector: usize) -> Constants {
        constants
            .with("KV_HEADS", self.heads)
            .with("DIM", self.dim)
            .with("HIDDEN", self.hidden)
            .with("COMPRESS_BLOCK", self.block)
            .with("COMPRESS_STRIDE", self.stride)
            .with("VECTOR", vector)
    }

    /// The first token, if chunks lie in `[N, G, D]` as they do in `[C, G, d, D]`.
    fn in_place(&self, chunks: &Chunks) -> Option<usize> {
        let first = chunks.tokens.first().map(|&first| first as usize);
        first.filter(|_| self.heads == 1 && chunks.have_no_gaps(self.stride))
    }

    /// Elements of a chunk of one head: d·D.
    fn chunk(&self) -> usize {
        self.stride * self.dim
    }
}

/// The network as a call has it, and where the chunks are. Rows are the chunks up to the last block.
struct Network<'c> {
    call: Call<'c>,
    dtype: DType,
    sizes: Sizes,
    rows: usize,
    chunks: usize,
    /// `[C]`.
    tokens: Scratch<i32>,
    /// `[rows]`.
    blocks: Scratch<i32>,
    /// The first token, if chunks lie in `[N, G, D]` as they do in `[C, G, d, D]`.
    in_place: Option<usize>,
    /// `[l, G, D]`, or none.
    position: In<Stored>,
    /// `[G, l·D, H]`.
    weight1: In<Stored>,
    /// What the first layer adds to every row, `[G, H]`.
    added1: Option<Scratch<f32>>,
    second: Option<Second>,
}

/// The second layer.
struct Second {
    /// `[G, H, D]` in f32.
    weight: Operand,
    /// `[G, D]`.
    added: Option<Scratch<f32>>,
}

fn address_or_none(buffer: Option<&Scratch<f32>>) -> In<f32> {
    buffer.map_or(In::none(), Scratch::read_by)
}

impl<'c> Network<'c> {
    /// `width`: elements that kernels move at once.
    fn new<T: Element>(
        call: &Call<'c>,
        (config, packing): (&NsaConfig, &Packing),
        (phi, position): (&Phi<'_, T>, Option<&Tensor<'_, T, 3>>),
        (dim, width): (usize, usize),
    ) -> Result<Self> {
        let (weight1, bias1, second) = match phi {
            Phi::Linear { weight } => (weight, None, None),
            Phi::Mlp { weight1, bias1, weight2, bias2 } => (weight1, bias1.as_ref(), Some((weight2, bias2.as_ref()))),
            Phi::Mean | Phi::Weighted { .. } => unreachable!("these kinds have no matrices"),
        };
        let sizes = Sizes::new(config, dim, weight1.shape()[2]);
        let call = call.again(|constants| sizes.constants(constants, width));
        let weight1 = call.input(if second.is_some() { "phi.weight1" } else { "phi.weight" }, weight1)?;
        let (bias1, chunks) = (call.optional_input("phi.bias1", bias1)?, Chunks::new(config, packing));
        let mut network = Self {
            dtype: T::DTYPE,
            sizes,
            rows: chunks.blocks.len(),
            chunks: chunks.tokens.len(),
            in_place: sizes.in_place(&chunks),
            tokens: call.upload(&chunks.tokens)?,
            blocks: call.upload(&chunks.blocks)?,
            position: call.optional_input("position", position)?,
            weight1,
            added1: None,
            second: None,
            call,
        };
        network.added1 = network.added1(bias1)?;
        if let Some((weight, bias)) = second {
            let bias = network.call.optional_input("phi.bias2", bias)?;
            let shape = [sizes.heads * sizes.hidden, sizes.dim];
            let weight = Matrix::packed(network.call.address("phi.weight2", weight)?, T::DTYPE, shape);
            let weight = Operand::of_type(&network.call, weight, DType::F32)?;
            network.second = Some(Second { weight, added: network.added(bias, None, sizes.heads * dim)? });
        }
        Ok(network)
    }

    fn launch<P: Params>(&self, kernel: &'static str, threads: usize, params: P) -> Result<()> {
        self.call.launch(&PROGRAM, kernel, Geometry::linear(threads as u64, THREADS), params)
    }

    /// b1 + vec(e)·W1, `[G, H]`.
    fn added1(&self, bias: In<Stored>) -> Result<Option<Scratch<f32>>> {
        let Sizes { heads, hidden, block, .. } = self.sizes;
        let columns = heads * hidden;
        if self.position.0 == 0 {
            return self.added(bias, None, columns);
        }
        let mut partial = self.call.workspace::<f64>(block * columns)?;
        let params = CompressEmbedded { position: self.position, weight: self.weight1, partial: partial.written_by() };
        let mut geometry = Geometry::linear(columns as u64, THREADS);
        geometry.grid[1] = block as u64;
        self.call.launch(&PROGRAM, "compress_embedded", geometry, params)?;
        self.added(bias, Some(&totals_of_parts(&self.call, &partial, [block, columns])?), columns)
    }

    /// The sum of what there is of both.
    fn added(&self, bias: In<Stored>, embedded: Option<&Scratch<f64>>, columns: usize) -> Result<Option<Scratch<f32>>> {
        if bias.0 == 0 && embedded.is_none() {
            return Ok(None);
        }
        let mut added = self.call.workspace::<f32>(columns)?;
        let params = CompressAdded {
            bias,
            embedded: embedded.map_or(In::none(), Scratch::read_by),
            added: added.written_by(),
            columns: columns as i64,
        };
        self.launch("compress_added", columns, params)?;
        Ok(Some(added))
    }

    /// The chunks `[C, G, d, D]` of x, as `[C, G·d·D]`.
    fn gathered(&self, x: In<Stored>) -> Result<Operand> {
        let Sizes { heads, dim, .. } = self.sizes;
        let packed = |address| Matrix::packed(address, self.dtype, [self.chunks, heads * self.sizes.chunk()]);
        if let Some(first) = self.in_place {
            return Ok(Operand::There(packed(x.0).after(first * dim)));
        }
        let count = self.chunks * heads * self.sizes.chunk();
        let mut memory = self.call.workspace::<u16>(count * self.dtype.size_bytes() / 2)?;
        let gathered: Out<Stored> = memory.written_by();
        let params = CompressGather { x, tokens: self.tokens.read_by(), gathered, chunks: self.chunks as i64 };
        self.launch("compress_gather", count, params)?;
        Ok(Operand::Copy(packed(gathered.0), memory))
    }

    /// Of the chunks that `gathered` has, those from `slice` on, a row for each row; a matrix a head.
    fn chunks_from(&self, gathered: Matrix, slice: usize) -> Matrix {
        let chunk = self.sizes.chunk();
        let (shape, leading) = ([self.rows, chunk], self.sizes.heads * chunk);
        Matrix { shape, leading, stride: chunk, ..gathered.after(slice * leading) }
    }

    /// The rows of W1 for tokens s·d .. s·d + d of a block, or of its gradient; a matrix a head.
    fn slice_of(&self, weight: Matrix, slice: usize) -> Matrix {
        let Sizes { dim, hidden, block, .. } = self.sizes;
        let shape = [self.sizes.chunk(), hidden];
        Matrix { shape, leading: hidden, stride: block * dim * hidden, ..weight.after(slice * shape[0] * hidden) }
    }

    /// `[rows, G, width]` in f32, a matrix a head.
    fn units(&self, address: u64, width: usize) -> Matrix {
        let packed = Matrix::packed(address, DType::F32, [self.rows, width]);
        Matrix { leading: self.sizes.heads * width, stride: width, ..packed }
    }

    /// `[G, H, D]` in f32, a matrix a head.
    fn weight2(&self, address: u64) -> Matrix {
        Matrix::packed(address, DType::F32, [self.sizes.hidden, self.sizes.dim])
    }

    fn slices(&self) -> std::ops::Range<usize> {
        0..self.sizes.block / self.sizes.stride
    }

    fn weight1(&self) -> Matrix {
        let Sizes { heads, dim, hidden, block, .. } = self.sizes;
        Matrix::packed(self.weight1.0, self.dtype, [heads * block * dim, hidden])
    }

    /// The first product, `[rows, G, H]`.
    fn first(&self, gathered: &Operand) -> Result<Scratch<f32>> {
        let Sizes { heads, hidden, .. } = self.sizes;
        let mut z = self.call.workspace::<f32>(self.rows * heads * hidden)?;
        let address: Out<f32> = z.written_by();
        for slice in self.slices() {
            let x = self.chunks_from(gathered.matrix(), slice).plain();
            let w = self.slice_of(self.weight1(), slice).plain();
            multiply_batch(&self.call, heads, [x, w], self.units(address.0, hidden), slice > 0)?;
        }
        Ok(z)
    }
}

pub(super) fn forward<T: Element>(cuda: &Cuda, op: &'static str, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, x, position, phi, mut blocks } = args;
    let ([_, heads, dim], call) = (x.shape(), Call::new::<T>(cuda, op)?);
    let (x, y) = (call.input("x", &x)?, call.output("blocks", &mut blocks)?);
    let width = vector(dim, size_of::<T>(), &[x.0]);
    let network = Network::new(&call, (config, packing), (&phi, position.as_ref()), (dim, width))?;
    if network.rows == 0 {
        return Ok(());
    }
    let (rows, hidden) = (network.rows, network.sizes.hidden);
    let gathered = network.gathered(x)?;
    let mut sums = network.first(&gathered)?;
    let mut added = network.added1.as_ref();
    if let Some(second) = &network.second {
        let z: Out<f32> = sums.written_by();
        let params = CompressGelu { z, added: address_or_none(added), rows: rows as i64 };
        network.launch("compress_gelu", rows * heads * hidden, params)?;
        let mut products = call.workspace::<f32>(rows * heads * dim)?;
        let target: Out<f32> = products.written_by();
        let factors = [network.units(z.0, hidden), network.weight2(second.weight.matrix().address)];
        multiply_batch(&call, heads, factors.map(Matrix::plain), network.units(target.0, dim), false)?;
        (sums, added) = (products, second.added.as_ref());
    }
    let (sums, added, blocks) = (sums.read_by(), address_or_none(added), network.blocks.read_by());
    let params = CompressFinish { sums, added, blocks, y, rows: rows as i64 };
    network.launch("compress_finish", rows * heads * dim, params)
}
