//! The gated sum of the branches (SPEC 2).

use crate::{Backend, Result, Tensor, TensorMut};
use nsa_core::Element;

/// Arguments of [`forward`]: o = Σ_c g^c · o^c.
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// After the sigmoid, `[N, Hq, 3]`; order cmp, slc, win.
    pub gates: Tensor<'a, T, 3>,
    /// The branches' outputs, each `[N, Hq, Dv]`; order cmp, slc, win.
    pub branches: [Tensor<'a, T, 3>; 3],
    /// Written: `[N, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
}

/// Arguments of [`backward`]: dg^c = Σ_dv do · o^c. (do^c = g^c · do is formed inside the branches' backward.)
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// The branches' outputs, each `[N, Hq, Dv]`; order cmp, slc, win.
    pub branches: [Tensor<'a, T, 3>; 3],
    /// Gradient of the gated sum `[N, Hq, Dv]`.
    pub d_o: Tensor<'a, T, 3>,
    /// Written: `[N, Hq, 3]`.
    pub d_gates: TensorMut<'a, T::Acc, 3>,
}
