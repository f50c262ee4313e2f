//! φ: compression blocks of keys or values (SPEC 2.1).

use super::Shapes;
use crate::{Backend, Element, Error, Result, Tensor, TensorMut, cuda};
use nsa_core::{CompressKind, NsaConfig, Packing};

/// The weights of φ, one set a KV head, for keys (D = Dk) or values (D = Dv). `T` is the type they are stored in.
#[derive(Clone, Copy, Debug)]
pub enum Phi<'a, T> {
    /// Average.
    Mean,
    /// Σ_p a_p · token p.
    Weighted {
        /// `[l, G]`.
        weight: Tensor<'a, T, 2>,
    },
    /// The flattened block (token-major) times a matrix.
    Linear {
        /// `[G, l·D, D]`.
        weight: Tensor<'a, T, 3>,
    },
    /// Linear, GELU (erf form), linear.
    Mlp {
        /// `[G, l·D, H]`.
        weight1: Tensor<'a, T, 3>,
        /// `[G, H]`.
        bias1: Option<Tensor<'a, T, 2>>,
        /// `[G, H, D]`.
        weight2: Tensor<'a, T, 3>,
        /// `[G, D]`.
        bias2: Option<Tensor<'a, T, 2>>,
    },
}

/// Gradients of the weights of φ, in the same shapes, accumulated (`+=`) in `A`.
#[derive(Debug)]
pub enum PhiGrad<'a, A> {
    /// Nothing to learn.
    Mean,
    /// See [`Phi::Weighted`].
    Weighted {
        /// `[l, G]`.
        weight: TensorMut<'a, A, 2>,
    },
    /// See [`Phi::Linear`].
    Linear {
        /// `[G, l·D, D]`.
        weight: TensorMut<'a, A, 3>,
    },
    /// See [`Phi::Mlp`].
    Mlp {
        /// `[G, l·D, H]`.
        weight1: TensorMut<'a, A, 3>,
        /// `[G, H]`.
        bias1: Option<TensorMut<'a, A, 2>>,
        /// `[G, H, D]`.
        weight2: TensorMut<'a, A, 3>,
        /// `[G, D]`.
        bias2: Option<TensorMut<'a, A, 2>>,
    },
}

/// Arguments of [`forward`]. Sequences are those of `packing`, which must start at position 0; block i of each
/// becomes row i of its part of `blocks`. (A decoding step passes the ring's l tokens as a sequence of its own.)
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Block sizes.
    pub config: &'a NsaConfig,
    /// Sequences of `x`.
    pub packing: &'a Packing,
    /// Keys or values `[N, G, D]`.
    pub x: Tensor<'a, T, 3>,
    /// Intra-block position embedding e `[l, G, D]`.
    pub position: Option<Tensor<'a, T, 3>>,
    /// φ.
    pub phi: Phi<'a, T>,
    /// Written: `[M, G, D]`, packed by `Packing::cu_blocks`.
    pub blocks: TensorMut<'a, T, 3>,
}

/// Arguments of [`backward`]; intermediate activations are recomputed.
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Block sizes.
    pub config: &'a NsaConfig,
    /// Sequences of `x`.
    pub packing: &'a Packing,
    /// Keys or values `[N, G, D]`.
    pub x: Tensor<'a, T, 3>,
    /// Intra-block position embedding e `[l, G, D]`.
    pub position: Option<Tensor<'a, T, 3>>,
    /// φ.
    pub phi: Phi<'a, T>,
    /// Gradient of the blocks `[M, G, D]`.
    pub d_blocks: Tensor<'a, T::Acc, 3>,
    /// Written: gradient of `x` `[N, G, D]`.
    pub dx: TensorMut<'a, T::Acc, 3>,
    /// Accumulated: gradient of e `[l, G, D]`.
    pub d_position: Option<TensorMut<'a, T::Acc, 3>>,
    /// Accumulated: gradients of φ's weights.
    pub d_phi: PhiGrad<'a, T::Acc>,
}

/// Compresses keys or values: block i is φ(x\[i·d .. i·d + l\] + e), with φ(z) one of
/// mean: Σ_p z_p / l; weighted: Σ_p a_p·z_p; linear: vec(z)·W; mlp: gelu(vec(z)·W1 + b1)·W2 + b2, erf form.
///
/// Tokens of a tail that belongs to no block are not read.
///
/// **Shapes**: on the fields of [`Forward`]; D is that of `x`, H is `compress_hidden`.
///
/// **Numerics**: sums in A; blocks rounded to `T` once, intermediates not. A block's bits depend on its sequence alone; on
/// CUDA devices, where cuBLAS makes the products of linear and mlp, also on the number of blocks of the call. Overlapping
/// blocks are not materialised; e costs one product a call. Scratch: a few MiB, and the weights of one head where `T` is
/// not A; on CUDA devices for linear and mlp a copy of `x`, the hidden units, and the second weight where `T` is not A.
///
/// **Source**: SPEC 2.1, the paper's equation 7; reference twin `nsa_ref::compress`.
///
/// # Errors
/// If a shape does not fit, φ is not of the configuration's kind, or a sequence has a context.
pub fn forward<T: Element>(backend: &Backend, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "compress::forward";
    let shapes = Shapes::new(OP, args.config, args.packing);
    shapes.whole_sequences()?;
    let [_, _, dim] = args.x.shape();
    let heads = args.config.num_kv_heads();
    args.x.check(OP, "x", [args.packing.num_tokens(), heads, dim])?;
    args.phi.check(OP, args.config, dim)?;
    if let Some(position) = &args.position {
        position.check(OP, "position", [args.config.compress_block(), heads, dim])?;
    }
    args.blocks.check(OP, "blocks", [args.packing.cu_blocks(args.config)?.total(), heads, dim])?;
    match backend {
        Backend::Cpu(cpu) => T::compress_forward(cpu, args),
        Backend::Cuda(cuda) => cuda::compress::forward(cuda, OP, args),
    }
}

/// Gradients of [`forward`]: dx_t sums over the blocks that cover t (0 where none does); the gradients of e and of φ's
/// weights sum over all blocks.
///
/// A gradient that is `None` is not computed.
///
/// **Shapes**: on the fields of [`Backward`].
///
/// **Numerics**: in A, in an order that depends on the shapes alone: the same bits on any number of threads. Scratch: as of
/// [`forward`]; on CUDA devices for linear and mlp `x`, its gradient and the weights in A.
///
/// **Source**: SPEC 3; reference twin `nsa_ref::compress`.
///
/// # Errors
/// If a shape does not fit, φ is not of the configuration's kind, a gradient has no weight that it belongs to, or a
/// sequence has a context.
pub fn backward<T: Element>(backend: &Backend, args: Backward<'_, T>) -> Result<()> {
    const OP: &str = "compress::backward";
    let shapes = Shapes::new(OP, args.config, args.packing);
    shapes.whole_sequences()?;
    let [_, _, dim] = args.x.shape();
    let (tokens, heads) = (args.packing.num_tokens(), args.config.num_kv_heads());
    args.x.check(OP, "x", [tokens, heads, dim])?;
    args.phi.check(OP, args.config, dim)?;
    let position_shape = [args.config.compress_block(), heads, dim];
    if let Some(position) = &args.position {
        position.check(OP, "position", position_shape)?;
    }
    args.d_blocks.check(OP, "d_blocks", [args.packing.cu_blocks(args.config)?.total(), heads, dim])?;
    args.dx.check(OP, "dx", [tokens, heads, dim])?;
    if let Some(d_position) = &args.d_position {
        check_owner(OP, "d_position", args.position.is_some())?;
        d_position.check(OP, "d_position", position_shape)?;
    }
    args.d_phi.check(OP, &args.phi)?;
    match backend {
        Backend::Cpu(cpu) => T::compress_backward(cpu, args),
        Backend::Cuda(cuda) => cuda::compress::backward(cuda, OP, args),
    }
}

/// Checks that what a gradient belongs to is there.
fn check_owner(op: &'static str, arg: &'static str, there: bool) -> Result<()> {
    if there {
        return Ok(());
    }
    Err(Error::Value { op, arg, value: "present".to_owned(), rule: "the forward's arguments have no such weight" })
}

impl<T> Phi<'_, T> {
    /// Which φ it is.
    pub fn kind(&self) -> CompressKind {
        match self {
            Self::Mean => CompressKind::Mean,
            Self::Weighted { .. } => CompressKind::Weighted,
            Self::Linear { .. } => CompressKind::Linear,
            Self::Mlp { .. } => CompressKind::Mlp,
        }
    }

    /// Checks kind and shapes for rows of `dim` elements.
    fn check(&self, op: &'static str, config: &NsaConfig, dim: usize) -> Result<()> {
        if self.kind() != config.compress_kind() {
            return Err(Error::Value {
                op,
                arg: "phi",
                value: format!("{:?}", self.kind()),
                rule: "must be of the configuration's compress_kind",
            });
        }
        let (heads, rows) = (config.num_kv_heads(), config.compress_block());
        match self {
            Self::Mean => Ok(()),
            Self::Weighted { weight } => weight.check(op, "phi.weight", [rows, heads]),
            Self::Linear { weight } => weight.check(op, "phi.weight", [heads, rows * dim, dim]),
            Self::Mlp { weight1, bias1, weight2, bias2 } => {
                let hidden = config.compress_hidden().expect("a configuration with an mlp has it");
                weight1.check(op, "phi.weight1", [heads, rows * dim, hidden])?;
                weight2.check(op, "phi.weight2", [heads, hidden, dim])?;
                if let Some(bias) = bias1 {
                    bias.check(op, "phi.bias1", [heads, hidden])?;
                }
                if let Some(bias) = bias2 {
                    bias.check(op, "phi.bias2", [heads, dim])?;
                }
                Ok(())
            }
        }
    }
}

impl<A> PhiGrad<'_, A> {
    /// Checks that kind and shapes are those of `phi`.
    fn check<T>(&self, op: &'static str, phi: &Phi<'_, T>) -> Result<()> {
        match (self, phi) {
            (Self::Mean, Phi::Mean) => Ok(()),
            (Self::Weighted { weight }, Phi::Weighted { weight: of }) => weight.check(op, "d_phi.weight", of.shape()),
            (Self::Linear { weight }, Phi::Linear { weight: of }) => weight.check(op, "d_phi.weight", of.shape()),
            (
                Self::Mlp { weight1, bias1, weight2, bias2 },
                Phi::Mlp { weight1: of_weight1, bias1: of_bias1, weight2: of_weight2, bias2: of_bias2 },
            ) => {
                weight1.check(op, "d_phi.weight1", of_weight1.shape())?;
                weight2.check(op, "d_phi.weight2", of_weight2.shape())?;
                check_bias(op, "d_phi.bias1", bias1.as_ref(), of_bias1.as_ref())?;
                check_bias(op, "d_phi.bias2", bias2.as_ref(), of_bias2.as_ref())
            }
            _ => Err(Error::Value {
                op,
                arg: "d_phi",
                value: format!("gradients of another kind than {:?}", phi.kind()),
                rule: "must be of phi's kind",
            }),
        }
    }
}

fn check_bias<A, T>(
    op: &'static str,
    arg: &'static str,
    gradient: Option<&TensorMut<'_, A, 2>>,
    bias: Option<&Tensor<'_, T, 2>>,
) -> Result<()> {
    match (gradient, bias) {
        (None, _) => Ok(()),
        (Some(_), None) => check_owner(op, arg, false),
        (Some(gradient), Some(bias)) => gradient.check(op, arg, bias.shape()),
    }
}
