//! Calls every operation of `nsa-kernels` on vectors: outputs start as NaN between guard zones.

use crate::Kind;
use crate::generate::{Guarded, PhiShapes, Poison, Side, Weights, mirror};
use bytemuck::Pod;
use nsa_core::{CuSeqlens, NsaConfig, Packing};
use nsa_kernels::op::{cmp, compress, dense, slc, win};
use nsa_kernels::{Backend, Buffer, Mem, Rows, Tensor, TensorMut};
use std::any::Any;

/// A tensor over a slice of exactly its size.
pub(crate) fn tensor<T: Copy, const N: usize>(data: &[T], shape: [usize; N]) -> Result<Tensor<'_, T, N>, String> {
    let size: usize = shape.iter().product();
    if data.len() != size {
        return Err(format!("{} elements for a tensor of shape {shape:?}", data.len()));
    }
    Tensor::host(data, shape).map_err(text)
}

/// Where the operands of a call lie: where they are for the host's processor, in copies for a device.
pub(crate) struct Place<'b> {
    backend: &'b Backend,
    copies: typed_arena::Arena<Box<dyn Any>>,
}

impl<'b> Place<'b> {
    pub(crate) fn new(backend: &'b Backend) -> Self {
        Self { backend, copies: typed_arena::Arena::new() }
    }

    /// A tensor over exactly these elements.
    pub(crate) fn input<'p, T: Pod, const N: usize>(
        &'p self,
        data: &'p [T],
        shape: [usize; N],
    ) -> Result<Tensor<'p, T, N>, String> {
        let on_host = tensor(data, shape)?;
        match self.backend {
            Backend::Cpu(_) => Ok(on_host),
            _ => self.copy(data).tensor(shape).map_err(text),
        }
    }

    /// Elements in the backend's memory.
    pub(crate) fn mem<'p, T: Pod>(&'p self, data: &'p [T]) -> Mem<'p, T> {
        match self.backend {
            Backend::Cpu(_) => Mem::Host(data),
            _ => self.copy(data).mem(),
        }
    }

    fn copy<T: Pod>(&self, data: &[T]) -> &Buffer<T> {
        let copy = self.copies.alloc(Box::new(self.backend.upload(data)));
        copy.downcast_ref::<Buffer<T>>().expect("the type that it was made with")
    }

    pub(crate) fn output<'o, T: Poison, const N: usize>(
        &self,
        data: &'o mut Guarded<T>,
        shape: [usize; N],
    ) -> Result<TensorMut<'o, T, N>, String> {
        data.tensor(self.backend, shape).map_err(text)
    }
}

pub(crate) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Sizes that shapes are made of.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// N.
    pub n: usize,
    /// Hq.
    pub hq: usize,
    /// G.
    pub g: usize,
    /// Dk.
    pub dk: usize,
    /// Dv.
    pub dv: usize,
    /// n: selected blocks a query.
    pub select: usize,
}

impl Sizes {
    /// Of a configuration and its queries.
    pub fn new(config: &NsaConfig, packing: &Packing) -> Self {
        Self {
            n: packing.num_tokens(),
            hq: config.num_heads(),
            g: config.num_kv_heads(),
            dk: config.head_dim_qk(),
            dv: config.head_dim_v(),
            select: config.select_count(),
        }
    }

    pub(crate) fn q(&self) -> [usize; 3] {
        [self.n, self.hq, self.dk]
    }

    pub(crate) fn o(&self) -> [usize; 3] {
        [self.n, self.hq, self.dv]
    }

    pub(crate) fn lse(&self) -> [usize; 2] {
        [self.n, self.hq]
    }

    pub(crate) fn gates(&self) -> [usize; 3] {
        [self.n, self.hq, 3]
    }

    pub(crate) fn indices(&self) -> [usize; 3] {
        [self.n, self.g, self.select]
    }
}

/// The operations that are softmax attention with a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Compressed.
    Cmp,
    /// Selected.
    Slc,
    /// Window.
    Win,
    /// All tokens before.
    Dense,
}

impl Pattern {
    /// Column of the gates; none for the baseline.
    pub const fn gate(self) -> Option<usize> {
        match self {
            Self::Cmp => Some(0),
            Self::Slc => Some(1),
            Self::Win => Some(2),
            Self::Dense => None,
        }
    }
}

/// Inputs of one attention operation.
#[derive(Clone, Debug)]
pub struct Attention<T> {
    /// Which.
    pub pattern: Pattern,
    /// Heads, dims, block sizes.
    pub config: NsaConfig,
    /// Queries.
    pub packing: Packing,
    /// `[N, Hq, Dk]`.
    pub q: Vec<T>,
    /// `[rows, G, Dk]`.
    pub k: Vec<T>,
    /// `[rows, G, Dv]`.
    pub v: Vec<T>,
    /// `[N, G, n]`; used by [`Pattern::Slc`].
    pub block_indices: Vec<i32>,
    /// `[N, Hq, Dv]`.
    pub d_o: Vec<T>,
    /// `[N, Hq, 3]`, if d_o is the gated sum's; unused by [`Pattern::Dense`].
    pub gates: Option<Vec<T>>,
}

/// What a forward wrote.
#[derive(Clone, Debug)]
pub struct AttentionOutput<T, A> {
    /// `[N, Hq, Dv]`.
    pub o: Vec<T>,
    /// `[N, Hq]`.
    pub lse: Vec<A>,
    /// `[N, G, n]`, from [`Pattern::Cmp`].
    pub block_indices: Vec<i32>,
}

/// What a backward wrote.
#[derive(Clone, Debug)]
pub struct AttentionGrads<A> {
    /// `[N, Hq, Dk]`.
    pub q: Vec<A>,
    /// `[rows, G, Dk]`.
    pub k: Vec<A>,
    /// `[rows, G, Dv]`.
    pub v: Vec<A>,
}

impl<T: Kind> Attention<T> {
    /// With features in reverse: the same mathematics, summed in another order.
    pub fn mirror(&self) -> Self {
        let (dk, dv) = (self.config.head_dim_qk(), self.config.head_dim_v());
        Self {
            q: mirror(&self.q, dk),
            k: mirror(&self.k, dk),
            v: mirror(&self.v, dv),
            d_o: mirror(&self.d_o, dv),
            ..self.clone()
        }
    }

    /// Offsets of the rows of k and v.
    pub fn rows(&self) -> Result<CuSeqlens, String> {
        match self.pattern {
            Pattern::Cmp => self.packing.cu_blocks(&self.config),
            Pattern::Slc | Pattern::Win | Pattern::Dense => self.packing.cu_keys(),
        }
        .map_err(text)
    }

    /// Runs the forward.
    ///
    /// # Errors
    /// If the kernel refuses, or writes beside an output.
    pub fn forward(&self, backend: &Backend) -> Result<AttentionOutput<T, T::Acc>, String> {
        let (sizes, place) = (Sizes::new(&self.config, &self.packing), Place::new(backend));
        let offsets = self.rows()?;
        let (config, packing) = (&self.config, &self.packing);
        let q = place.input(&self.q, sizes.q())?;
        let k = Rows::packed(place.input(&self.k, [offsets.total(), sizes.g, sizes.dk])?, &offsets);
        let v = Rows::packed(place.input(&self.v, [offsets.total(), sizes.g, sizes.dv])?, &offsets);
        let mut o_memory = Guarded::<T>::unwritten(sizes.o().iter().product());
        let mut lse_memory = Guarded::<T::Acc>::unwritten(sizes.n * sizes.hq);
        let selected = if self.pattern == Pattern::Cmp { sizes.n * sizes.g * sizes.select } else { 0 };
        let mut indices_memory = Guarded::<i32>::unwritten(selected);
        let o = place.output(&mut o_memory, sizes.o())?;
        let lse = place.output(&mut lse_memory, sizes.lse())?;
        match self.pattern {
            Pattern::Cmp => {
                let block_indices = Some(place.output(&mut indices_memory, sizes.indices())?);
                let (k_blocks, v_blocks) = (k, v);
                cmp::forward(backend, cmp::Forward { config, packing, q, k_blocks, v_blocks, o, lse, block_indices })
            }
            Pattern::Slc => {
                let block_indices = place.input(&self.block_indices, sizes.indices())?;
                slc::forward(backend, slc::Forward { config, packing, q, k, v, block_indices, o, lse })
            }
            Pattern::Win => win::forward(backend, win::Forward { config, packing, q, k, v, o, lse }),
            Pattern::Dense => dense::forward(backend, dense::Forward { config, packing, q, k, v, o, lse }),
        }
        .map_err(text)?;
        Ok(AttentionOutput {
            o: o_memory.finish("o")?,
            lse: lse_memory.finish("lse")?,
            block_indices: indices_memory.finish("block_indices")?,
        })
    }

    /// Runs the backward on what the forward left. `dq` is written.
    ///
    /// # Errors
    /// If the kernel refuses, or writes beside an output.
    pub fn backward(
        &self,
        backend: &Backend,
        forward: &AttentionOutput<T, T::Acc>,
    ) -> Result<AttentionGrads<T::Acc>, String> {
        let mut dq = Guarded::unwritten(self.q.len());
        let mut dk = Guarded::unwritten(self.k.len());
        let mut dv = Guarded::unwritten(self.v.len());
        self.backward_into(backend, forward, [&mut dq, &mut dk, &mut dv], false)?;
        Ok(AttentionGrads { q: dq.finish("dq")?, k: dk.finish("dk")?, v: dv.finish("dv")? })
    }

    /// Runs the backward into memory that is there; `accumulate` says whether dq is added to it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn backward_into(
        &self,
        backend: &Backend,
        forward: &AttentionOutput<T, T::Acc>,
        mut grads: [&mut Guarded<T::Acc>; 3],
        accumulate: bool,
    ) -> Result<(), String> {
        let (sizes, place) = (Sizes::new(&self.config, &self.packing), Place::new(backend));
        let rows = self.rows()?.total();
        let (config, packing) = (&self.config, &self.packing);
        let q = place.input(&self.q, sizes.q())?;
        let (k_shape, v_shape) = ([rows, sizes.g, sizes.dk], [rows, sizes.g, sizes.dv]);
        let (k, v) = (place.input(&self.k, k_shape)?, place.input(&self.v, v_shape)?);
        let o = place.input(&forward.o, sizes.o())?;
        let lse = place.input(&forward.lse, sizes.lse())?;
        let d_o = place.input(&self.d_o, sizes.o())?;
        let gates = self.gates.as_deref().map(|gates| place.input(gates, sizes.gates())).transpose()?;
        let d_gates = None;
        let [dq, dk, dv] = &mut grads;
        let dq = place.output(dq, sizes.q())?;
        let (dk, dv) = (place.output(dk, k_shape)?, place.output(dv, v_shape)?);
        match self.pattern {
            Pattern::Cmp => {
                let (k_blocks, v_blocks, dk_blocks, dv_blocks) = (k, v, dk, dv);
                let args = cmp::Backward {
                    config,
                    packing,
                    q,
                    k_blocks,
                    v_blocks,
                    o,
                    lse,
                    d_o,
                    gates,
                    d_gates,
                    dq,
                    accumulate,
                    dk_blocks,
                    dv_blocks,
                };
                cmp::backward(backend, args)
            }
            Pattern::Slc => {
                let block_indices = place.input(&self.block_indices, sizes.indices())?;
                let args = slc::Backward {
                    config,
                    packing,
                    q,
                    k,
                    v,
                    block_indices,
                    o,
                    lse,
                    d_o,
                    gates,
                    d_gates,
                    dq,
                    accumulate,
                    dk,
                    dv,
                };
                slc::backward(backend, args)
            }
            Pattern::Win => win::backward(
                backend,
                win::Backward { config, packing, q, k, v, o, lse, d_o, gates, d_gates, dq, accumulate, dk, dv },
            ),
            Pattern::Dense => dense::backward(
                backend,
                dense::Backward { config, packing, q, k, v, o, lse, d_o, dq, accumulate, dk, dv },
            ),
        }
        .map_err(text)?;
        grads.into_iter().try_for_each(Guarded::fetch)
    }
}

/// φ's weights as the operation takes them.
fn phi<'a, T: Kind>(
    place: &'a Place<'_>,
    weights: &'a Weights<T>,
    shapes: &PhiShapes,
) -> Result<compress::Phi<'a, T>, String> {
    Ok(match weights {
        Weights::Mean => compress::Phi::Mean,
        Weights::Weighted(weight) => compress::Phi::Weighted { weight: place.input(weight, shapes.weighted)? },
        Weights::Linear(weight) => compress::Phi::Linear { weight: place.input(weight, shapes.linear)? },
        Weights::Mlp { weight1, bias1, weight2, bias2 } => compress::Phi::Mlp {
            weight1: place.input(weight1, shapes.weight1)?,
            bias1: bias1.as_deref().map(|bias| place.input(bias, shapes.bias1)).transpose()?,
            weight2: place.input(weight2, shapes.weight2)?,
            bias2: bias2.as_deref().map(|bias| place.input(bias, shapes.bias2)).transpose()?,
        },
    })
}

/// Memory of the gradients of φ's weights: zero, between guards.
enum WeightGrads<A> {
    Mean,
    Weighted(Guarded<A>),
    Linear(Guarded<A>),
    Mlp { weight1: Guarded<A>, bias1: Option<Guarded<A>>, weight2: Guarded<A>, bias2: Option<Guarded<A>> },
}

impl<A: Poison + Default> WeightGrads<A> {
    fn zero<T>(weights: &Weights<T>) -> Self {
        let zero = |like: &Vec<T>| Guarded::filled(like.len(), A::default());
        match weights {
            Weights::Mean => Self::Mean,
            Weights::Weighted(weight) => Self::Weighted(zero(weight)),
            Weights::Linear(weight) => Self::Linear(zero(weight)),
            Weights::Mlp { weight1, bias1, weight2, bias2 } => Self::Mlp {
                weight1: zero(weight1),
                bias1: bias1.as_ref().map(zero),
                weight2: zero(weight2),
                bias2: bias2.as_ref().map(zero),
            },
        }
    }

    fn tensors(&mut self, place: &Place<'_>, shapes: &PhiShapes) -> Result<compress::PhiGrad<'_, A>, String> {
        Ok(match self {
            Self::Mean => compress::PhiGrad::Mean,
            Self::Weighted(weight) => compress::PhiGrad::Weighted { weight: place.output(weight, shapes.weighted)? },
            Self::Linear(weight) => compress::PhiGrad::Linear { weight: place.output(weight, shapes.linear)? },
            Self::Mlp { weight1, bias1, weight2, bias2 } => compress::PhiGrad::Mlp {
                weight1: place.output(weight1, shapes.weight1)?,
                bias1: bias1.as_mut().map(|bias| place.output(bias, shapes.bias1)).transpose()?,
                weight2: place.output(weight2, shapes.weight2)?,
                bias2: bias2.as_mut().map(|bias| place.output(bias, shapes.bias2)).transpose()?,
            },
        })
    }

    fn finish(self) -> Result<Weights<A>, String> {
        Ok(match self {
            Self::Mean => Weights::Mean,
            Self::Weighted(weight) => Weights::Weighted(weight.finish("dphi.weight")?),
            Self::Linear(weight) => Weights::Linear(weight.finish("dphi.weight")?),
            Self::Mlp { weight1, bias1, weight2, bias2 } => Weights::Mlp {
                weight1: weight1.finish("dphi.0.weight")?,
                bias1: bias1.map(|bias| bias.finish("dphi.0.bias")).transpose()?,
                weight2: weight2.finish("dphi.2.weight")?,
                bias2: bias2.map(|bias| bias.finish("dphi.2.bias")).transpose()?,
            },
        })
    }
}

/// Inputs of φ for keys or values.
#[derive(Clone, Debug)]
pub struct Compress<T> {
    /// Keys or values.
    pub side: Side,
    /// Block sizes.
    pub config: NsaConfig,
    /// Sequences.
    pub packing: Packing,
    /// `[N, G, D]`.
    pub x: Vec<T>,
    /// `[l, G, D]`.
    pub position: Option<Vec<T>>,
    /// φ's weights.
    pub weights: Weights<T>,
}

/// Gradients of φ.
#[derive(Clone, Debug)]
pub struct CompressGrads<A> {
    /// `[N, G, D]`.
    pub x: Vec<A>,
    /// `[l, G, D]`.
    pub position: Option<Vec<A>>,
    /// Of the weights.
    pub weights: Weights<A>,
}

impl<T: Copy> CompressGrads<T> {
    /// With features and hidden units in reverse.
    pub fn mirror(&self, config: &NsaConfig, side: Side) -> Self {
        let (dim, hidden) = (side.dim(config), config.compress_hidden().unwrap_or(1));
        Self {
            x: mirror(&self.x, dim),
            position: self.position.as_deref().map(|e| mirror(e, dim)),
            weights: self.weights.mirror(dim, hidden),
        }
    }
}

impl<T: Kind> Compress<T> {
    /// With features and hidden units in reverse: the same mathematics, summed in another order.
    pub fn mirror(&self) -> Self {
        let (dim, hidden) = (self.side.dim(&self.config), self.config.compress_hidden().unwrap_or(1));
        Self {
            x: mirror(&self.x, dim),
            position: self.position.as_deref().map(|e| mirror(e, dim)),
            weights: self.weights.mirror(dim, hidden),
            ..self.clone()
        }
    }

    fn shapes(&self) -> Result<([usize; 3], [usize; 3], PhiShapes), String> {
        let (g, dim) = (self.config.num_kv_heads(), self.side.dim(&self.config));
        let blocks = self.packing.cu_blocks(&self.config).map_err(text)?.total();
        let shapes = PhiShapes::new(&self.config, self.side);
        Ok(([self.packing.num_tokens(), g, dim], [blocks, g, dim], shapes))
    }

    /// Runs φ: `[M, G, D]`.
    ///
    /// # Errors
    /// If the kernel refuses, or writes beside an output.
    pub fn forward(&self, backend: &Backend) -> Result<Vec<T>, String> {
        let (place, (tokens, blocks, shapes)) = (Place::new(backend), self.shapes()?);
        let mut memory = Guarded::<T>::unwritten(blocks.iter().product());
        let args = compress::Forward {
            config: &self.config,
            packing: &self.packing,
            x: place.input(&self.x, tokens)?,
            position: self.position.as_deref().map(|e| place.input(e, shapes.position)).transpose()?,
            phi: phi(&place, &self.weights, &shapes)?,
            blocks: place.output(&mut memory, blocks)?,
        };
        compress::forward(backend, args).map_err(text)?;
        memory.finish("blocks")
    }

    /// Gradients from those of the blocks, `[M, G, D]`.
    ///
    /// # Errors
    /// If the kernel refuses, or writes beside an output.
    pub fn backward(&self, backend: &Backend, d_blocks: &[T::Acc]) -> Result<CompressGrads<T::Acc>, String> {
        let (place, (tokens, blocks, shapes)) = (Place::new(backend), self.shapes()?);
        let mut dx = Guarded::<T::Acc>::unwritten(self.x.len());
        let mut d_position = self.position.as_ref().map(|e| Guarded::filled(e.len(), T::Acc::default()));
        let mut d_phi = WeightGrads::zero(&self.weights);
        let args = compress::Backward {
            config: &self.config,
            packing: &self.packing,
            x: place.input(&self.x, tokens)?,
            position: self.position.as_deref().map(|e| place.input(e, shapes.position)).transpose()?,
            phi: phi(&place, &self.weights, &shapes)?,
            d_blocks: place.input(d_blocks, blocks)?,
            dx: place.output(&mut dx, tokens)?,
            d_position: d_position.as_mut().map(|e| place.output(e, shapes.position)).transpose()?,
            d_phi: d_phi.tensors(&place, &shapes)?,
        };
        compress::backward(backend, args).map_err(text)?;
        Ok(CompressGrads {
            x: dx.finish("dx")?,
            position: d_position.map(|e| e.finish("d_position")).transpose()?,
            weights: d_phi.finish()?,
        })
    }
}
