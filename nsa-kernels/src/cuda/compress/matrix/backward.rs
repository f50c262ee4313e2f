//! Gradients of `linear` and `mlp`.

use super::{
    CompressBias, CompressEmbeddingBackward, CompressGeluBackward, CompressScatter, CompressSpread, Network, Second,
    Sizes, address_or_none,
};
use crate::cuda::Cuda;
use crate::cuda::blas::{Matrix, multiply_batch};
use crate::cuda::geometry::vector;
use crate::cuda::launch::Call;
use crate::cuda::layer::matmul::Operand;
use crate::cuda::params::{In, Out};
use crate::cuda::reduce::column_totals;
use crate::cuda::workspace::Scratch;
use crate::op::compress::{Backward, PhiGrad};
use crate::{Element, Result, TensorMut};
use nsa_core::DType;
use std::marker::PhantomData;

/// Where gradients go.
struct Grads {
    weight1: Out<f32>,
    bias1: Option<Out<f32>>,
    weight2: Option<Out<f32>>,
    bias2: Option<Out<f32>>,
    /// `[l, G, D]`.
    position: Option<Out<f32>>,
    /// `[N, G, D]`, of zeros.
    dx: Out<f32>,
}

pub(in crate::cuda::compress) fn backward<T: Element>(
    cuda: &Cuda,
    op: &'static str,
    args: Backward<'_, T>,
) -> Result<()> {
    let Backward { config, packing, x, position, phi, d_blocks, mut dx, mut d_position, d_phi } = args;
    let ([_, heads, dim], call) = (x.shape(), Call::new::<T>(cuda, op)?);
    let (x, d_blocks) = (call.input("x", &x)?, call.input("d_blocks", &d_blocks)?);
    let grads = Grads::new(&call, &mut dx, d_position.as_mut(), d_phi)?;
    dx.fill(T::Acc::default())?;
    let width = vector(dim, size_of::<f32>(), &[x.0, grads.dx.0]);
    let network = Network::new(&call, (config, packing), (&phi, position.as_ref()), (dim, width))?;
    if network.rows == 0 {
        return Ok(());
    }
    let rows = network.rows;
    let gathered = network.gathered(x)?;
    let mut dy = call.workspace::<f32>(rows * heads * dim)?;
    let params = CompressSpread { d_blocks, blocks: network.blocks.read_by(), dy: dy.written_by(), rows: rows as i64 };
    network.launch("compress_spread", rows * heads * dim, params)?;
    let dz = match &network.second {
        None => dy,
        Some(second) => network.second_backward(second, &gathered, &dy, &grads)?,
    };
    network.first_backward(&gathered, &dz, &grads)?;
    network.added_backward(&dz, &grads)
}

impl Grads {
    fn new<A: nsa_core::Element>(
        call: &Call<'_>,
        dx: &mut TensorMut<'_, A, 3>,
        d_position: Option<&mut TensorMut<'_, A, 3>>,
        d_phi: PhiGrad<'_, A>,
    ) -> Result<Self> {
        let dx = call.output("dx", dx)?;
        let position = d_position.map(|d| call.output("d_position", d)).transpose()?;
        match d_phi {
            PhiGrad::Linear { mut weight } => {
                let weight1 = call.output("d_phi.weight", &mut weight)?;
                Ok(Self { weight1, bias1: None, weight2: None, bias2: None, position, dx })
            }
            PhiGrad::Mlp { mut weight1, bias1, mut weight2, bias2 } => Ok(Self {
                weight1: call.output("d_phi.weight1", &mut weight1)?,
                bias1: bias1.map(|mut bias| call.output("d_phi.bias1", &mut bias)).transpose()?,
                weight2: Some(call.output("d_phi.weight2", &mut weight2)?),
                bias2: bias2.map(|mut bias| call.output("d_phi.bias2", &mut bias)).transpose()?,
                position,
                dx,
            }),
            PhiGrad::Mean | PhiGrad::Weighted { .. } => unreachable!("the face has checked the kind"),
        }
    }
}

impl Network<'_> {
    /// Adds to the gradients of the second layer; returns that of the first one's result, `[rows, G, H]`.
    fn second_backward(
        &self,
        second: &Second,
        gathered: &Operand,
        dy: &Scratch<f32>,
        grads: &Grads,
    ) -> Result<Scratch<f32>> {
        let (Sizes { heads, dim, hidden, .. }, call, rows) = (self.sizes, &self.call, self.rows);
        if let Some(bias) = grads.bias2 {
            self.add_bias(&column_totals(call, dy.read_by(), [rows, heads * dim])?, bias, heads * dim)?;
        }
        let dy: In<f32> = dy.read_by();
        let dy = self.units(dy.0, dim);
        let mut gradient = call.workspace::<f32>(rows * heads * hidden)?;
        let d_units: Out<f32> = gradient.written_by();
        let weight = self.weight2(second.weight.matrix().address);
        multiply_batch(call, heads, [dy.plain(), weight.transposed()], self.units(d_units.0, hidden), false)?;
        let mut z = self.first(gathered)?;
        let units: Out<f32> = z.written_by();
        let params = CompressGeluBackward {
            z: units,
            gradient: d_units,
            added: address_or_none(self.added1.as_ref()),
            blocks: self.blocks.read_by(),
            rows: rows as i64,
        };
        self.launch("compress_gelu_backward", rows * heads * hidden, params)?;
        if let Some(d_weight) = grads.weight2 {
            let units = self.units(units.0, hidden).transposed();
            multiply_batch(call, heads, [units, dy.plain()], self.weight2(d_weight.0), true)?;
        }
        Ok(gradient)
    }

    /// Gradients of tokens and of the first weight, given that of the first product, `[rows, G, H]`.
    fn first_backward(&self, gathered: &Operand, dz: &Scratch<f32>, grads: &Grads) -> Result<()> {
        let (Sizes { heads, dim, hidden, .. }, call) = (self.sizes, &self.call);
        let dz: In<f32> = dz.read_by();
        let dz = self.units(dz.0, hidden);
        let x = Operand::of_type(call, gathered.matrix(), DType::F32)?;
        let d_weight = Matrix { address: grads.weight1.0, dtype: DType::F32, ..self.weight1() };
        for slice in self.slices() {
            let x = self.chunks_from(x.matrix(), slice).transposed();
            multiply_batch(call, heads, [x, dz.plain()], self.slice_of(d_weight, slice), true)?;
        }
        let weight = Operand::of_type(call, self.weight1(), DType::F32)?;
        let shape = [self.chunks, heads * self.sizes.chunk()];
        let d_chunks = match self.in_place {
            Some(_) => None,
            None => Some(call.zeros::<f32>(shape[0] * shape[1])?),
        };
        let target = match (&d_chunks, self.in_place) {
            (Some(d_chunks), _) => d_chunks.read_by::<f32>().0,
            (None, first) => Matrix::packed(grads.dx.0, DType::F32, shape).after(first.unwrap_or(0) * dim).address,
        };
        let target = Matrix::packed(target, DType::F32, shape);
        for slice in self.slices() {
            let weight = self.slice_of(weight.matrix(), slice).transposed();
            multiply_batch(call, heads, [dz.plain(), weight], self.chunks_from(target, slice), true)?;
        }
        let Some(d_chunks) = d_chunks else { return Ok(()) };
        let (gathered, tokens, dx) = (d_chunks.read_by(), self.tokens.read_by(), grads.dx);
        let params = CompressScatter { gathered, tokens, dx, chunks: self.chunks as i64 };
        self.launch("compress_scatter", shape[0] * shape[1], params)
    }

    /// Gradients of what the first layer adds to every row.
    fn added_backward(&self, dz: &Scratch<f32>, grads: &Grads) -> Result<()> {
        let Sizes { heads, dim, hidden, block, .. } = self.sizes;
        if grads.bias1.is_none() && self.position.0 == 0 {
            return Ok(());
        }
        let totals = column_totals(&self.call, dz.read_by(), [self.rows, heads * hidden])?;
        if let Some(bias) = grads.bias1 {
            self.add_bias(&totals, bias, heads * hidden)?;
        }
        if self.position.0 == 0 {
            return Ok(());
        }
        let params = CompressEmbeddingBackward {
            position: self.position,
            weight: self.weight1,
            totals: totals.read_by(),
            d_position: grads.position.unwrap_or(Out(0, PhantomData)),
            d_weight: grads.weight1,
        };
        self.launch("compress_embedding_backward", 32 * block * heads * dim, params)
    }

    fn add_bias(&self, totals: &Scratch<f64>, d_bias: Out<f32>, columns: usize) -> Result<()> {
        let params = CompressBias { totals: totals.read_by(), d_bias, columns: columns as i64 };
        self.launch("compress_bias", columns, params)
    }
}
