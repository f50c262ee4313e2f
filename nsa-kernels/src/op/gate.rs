//! The gated sum of the branches (SPEC 2).

use crate::{Backend, Element, Result, Tensor, TensorMut, cuda};

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

/// Adds up the branches' outputs under their gates: o_t,h = Σ_c g^c_t,h · o^c_t,h.
///
/// **Shapes**: on the fields of [`Forward`]; N, Hq and Dv are those of `o`.
///
/// **Numerics**: sums in A in the order cmp, slc, win; o rounded to `T` once.
///
/// **Source**: SPEC 2, the paper's equation 5; reference twin `nsa_ref::gate`.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<T: Element>(backend: &Backend, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "gate::forward";
    let [tokens, heads, dim] = args.o.shape();
    args.gates.check(OP, "gates", [tokens, heads, 3])?;
    for (c, branch) in args.branches.iter().enumerate() {
        branch.check(OP, &format!("branches[{c}]"), [tokens, heads, dim])?;
    }
    match backend {
        Backend::Cpu(cpu) => T::gate_forward(cpu, args),
        Backend::Cuda(cuda) => cuda::gate::forward(cuda, args),
    }
}

/// Gradients of the gates: dg^c_t,h = Σ_dv do_t,h · o^c_t,h.
///
/// **Shapes**: on the fields of [`Backward`]; N, Hq and Dv are those of `d_o`.
///
/// **Numerics**: sums in A.
///
/// **Source**: SPEC 3; reference twin `nsa_ref::gate`.
///
/// # Errors
/// If a shape does not fit.
pub fn backward<T: Element>(backend: &Backend, args: Backward<'_, T>) -> Result<()> {
    const OP: &str = "gate::backward";
    let [tokens, heads, dim] = args.d_o.shape();
    for (c, branch) in args.branches.iter().enumerate() {
        branch.check(OP, &format!("branches[{c}]"), [tokens, heads, dim])?;
    }
    args.d_gates.check(OP, "d_gates", [tokens, heads, 3])?;
    match backend {
        Backend::Cpu(cpu) => T::gate_backward(cpu, args),
        Backend::Cuda(cuda) => cuda::gate::backward(cuda, args),
    }
}
