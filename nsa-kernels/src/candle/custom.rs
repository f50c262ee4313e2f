//! An operation on packed elements as candle's, wherever they lie.

#[cfg(feature = "candle-cuda")]
use super::device;
use super::pack::wrap;
use super::place::{self, Number, Scalar};
use crate::mem::MemMut;
use crate::{Backend, Mem, TensorMut};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// An operation whose inputs are packed into one tensor.
pub(super) trait Operation: Send + Sync + 'static {
    /// Its name, for people.
    const NAME: &'static str;

    /// Type of the packed inputs and of the output.
    type Element: Scalar;

    /// Type that the output's gradient is taken in.
    type Gradient: Number;

    /// Shape of the output.
    fn output_shape(&self) -> [usize; 3];

    /// Computes the output.
    fn forward(
        &self,
        backend: &Backend,
        packed: Mem<'_, Self::Element>,
        output: TensorMut<'_, Self::Element, 3>,
    ) -> crate::Result<()>;

    /// Computes the gradients of the packed inputs, in their order.
    fn backward(
        &self,
        backend: &Backend,
        packed: Mem<'_, Self::Element>,
        d_output: Mem<'_, Self::Gradient>,
        gradients: TensorMut<'_, Acc<Self>, 1>,
    ) -> crate::Result<()>;
}

/// Type of an operation's sums.
type Acc<O> = <<O as Operation>::Element as nsa_core::Element>::Acc;

/// The operation as candle's.
pub(super) struct Custom<O>(pub(super) O);

impl<O: Operation> Custom<O> {
    fn output_shape(&self) -> Shape {
        Shape::from(self.0.output_shape().as_slice())
    }

    fn forward(&self, backend: &Backend, packed: Mem<'_, O::Element>, output: MemMut<'_, O::Element>) -> Result<()> {
        let output = TensorMut::packed(output, self.0.output_shape()).map_err(wrap)?;
        self.0.forward(backend, packed, output).map_err(wrap)
    }
}

impl<O: Operation> CustomOp1 for Custom<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = self.output_shape();
        let packed = place::host_elements(storage, layout)?;
        let output = place::on_host(shape.elem_count(), |backend, output| self.forward(backend, packed, output))?;
        Ok((output, shape))
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let shape = self.output_shape();
        let output = device::with_elements(storage, layout, |packed| {
            device::written(&storage.device, shape.elem_count(), |backend, output| {
                self.forward(backend, packed, output)
            })
        })?;
        Ok((output, shape))
    }

    fn bwd(&self, arg: &Tensor, _res: &Tensor, grad_res: &Tensor) -> Result<Option<Tensor>> {
        let len = arg.elem_count();
        let d_output = grad_res.to_dtype(<O::Gradient as candle_core::WithDType>::DTYPE)?;
        let gradients = place::written(O::NAME, arg.device(), len, |backend, gradients| {
            place::with_elements(O::NAME, arg, |packed| {
                place::with_elements(O::NAME, &d_output, |d_output| {
                    let gradients = TensorMut::packed(gradients, [len]).map_err(wrap)?;
                    self.0.backward(backend, packed, d_output, gradients).map_err(wrap)
                })
            })
        })?;
        Ok(Some(gradients.to_dtype(arg.dtype())?))
    }
}
