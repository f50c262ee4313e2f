//! Where each parameter lies in the flat buffers.

use crate::Result;
use nsa_core::model::{ModelConfig, ParamSpec, manifest};
use nsa_core::{CompressKind, Element, Real, ShapeError};
use nsa_kernels::op::compress::{Phi, PhiGrad};
use nsa_kernels::{Buffer, Tensor, TensorMut};
use std::collections::HashMap;

/// The place of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    offset: usize,
    shape: Vec<usize>,
}

impl Slot {
    fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its shape as an array; the ranks are those of MODEL's manifest, which this file mirrors.
    fn shape<const N: usize>(&self) -> [usize; N] {
        self.shape.as_slice().try_into().expect("the manifest's rank")
    }

    /// The parameter, out of a flat buffer.
    fn tensor<'a, T: Element, const N: usize>(&self, buffer: &'a Buffer<T>) -> Result<Tensor<'a, T, N>> {
        Ok(buffer.tensor_at(self.offset, self.shape())?)
    }

    /// The parameter, out of a flat writable buffer.
    pub(crate) fn tensor_mut<'a, R: Real, const N: usize>(
        &self,
        buffer: &'a mut Buffer<R>,
    ) -> Result<TensorMut<'a, R, N>> {
        Ok(buffer.tensor_mut_at(self.offset, self.shape())?)
    }
}

/// The parameters of a model: as they are trained, and rounded to the type that they are multiplied in.
#[derive(Debug)]
pub(crate) struct Weights<'a, T: Element> {
    pub(crate) master: &'a Buffer<T::Acc>,
    /// `None` if the types are the same.
    pub(crate) rounded: Option<&'a Buffer<T>>,
}

impl<T: Element> Clone for Weights<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element> Copy for Weights<'_, T> {}

impl<'a, T: Element> Weights<'a, T> {
    /// A parameter as it is trained.
    pub(crate) fn master<const N: usize>(self, slot: &Slot) -> Result<Tensor<'a, T::Acc, N>> {
        slot.tensor(self.master)
    }

    /// A parameter in the type of the activations.
    pub(crate) fn tensor<const N: usize>(self, slot: &Slot) -> Result<Tensor<'a, T, N>> {
        match self.rounded {
            Some(rounded) => slot.tensor(rounded),
            None => Ok(self.master(slot)?.same_type().expect("weights of another type are rounded")),
        }
    }
}

/// Hands out several parameters of one flat buffer, in ascending order.
pub(crate) struct Carver<'a, R> {
    rest: TensorMut<'a, R, 1>,
    offset: usize,
}

impl<'a, R: Real> Carver<'a, R> {
    pub(crate) fn new(buffer: &'a mut Buffer<R>) -> Result<Self> {
        let len = buffer.len();
        Ok(Self { rest: buffer.tensor_mut([len])?, offset: 0 })
    }

    /// The parameter, and what follows it for the next call.
    pub(crate) fn take<const N: usize>(self, slot: &Slot) -> Result<(TensorMut<'a, R, N>, Self)> {
        let skip = slot.offset.checked_sub(self.offset).ok_or_else(|| {
            let (expected, got) = (vec![self.offset], vec![slot.offset]);
            ShapeError::Shape { op: "Carver::take", arg: "offset".to_owned(), expected, got }
        });
        let (_, rest) = self.rest.split_at(skip.map_err(nsa_kernels::Error::from)?)?;
        let (taken, rest) = rest.split_at(slot.numel())?;
        Ok((taken.reshape(slot.shape())?, Self { rest, offset: slot.offset + slot.numel() }))
    }
}

/// The places of φ's weights.
#[derive(Clone, Debug)]
pub(crate) enum PhiSlots {
    Mean,
    Weighted(Slot),
    Linear(Slot),
    Mlp { weight1: Slot, bias1: Option<Slot>, weight2: Slot, bias2: Option<Slot> },
}

impl PhiSlots {
    /// φ with weights out of a flat buffer.
    pub(crate) fn phi<'a, T: Element>(&self, weights: Weights<'a, T>) -> Result<Phi<'a, T>> {
        Ok(match self {
            Self::Mean => Phi::Mean,
            Self::Weighted(weight) => Phi::Weighted { weight: weights.tensor(weight)? },
            Self::Linear(weight) => Phi::Linear { weight: weights.tensor(weight)? },
            Self::Mlp { weight1, bias1, weight2, bias2 } => Phi::Mlp {
                weight1: weights.tensor(weight1)?,
                bias1: bias1.as_ref().map(|bias| weights.tensor(bias)).transpose()?,
                weight2: weights.tensor(weight2)?,
                bias2: bias2.as_ref().map(|bias| weights.tensor(bias)).transpose()?,
            },
        })
    }

    /// The gradients of φ's weights and of `position`, which lies behind them.
    pub(crate) fn grads<'a, R: Real>(
        &self,
        position: Option<&Slot>,
        grads: &'a mut Buffer<R>,
    ) -> Result<(PhiGrad<'a, R>, Option<TensorMut<'a, R, 3>>)> {
        let carver = Carver::new(grads)?;
        let (phi, carver) = match self {
            Self::Mean => (PhiGrad::Mean, carver),
            Self::Weighted(slot) => {
                let (weight, carver) = carver.take(slot)?;
                (PhiGrad::Weighted { weight }, carver)
            }
            Self::Linear(slot) => {
                let (weight, carver) = carver.take(slot)?;
                (PhiGrad::Linear { weight }, carver)
            }
            Self::Mlp { weight1, bias1, weight2, bias2 } => {
                let (weight1, carver) = carver.take(weight1)?;
                let (bias1, carver) = take_optional(carver, bias1.as_ref())?;
                let (weight2, carver) = carver.take(weight2)?;
                let (bias2, carver) = take_optional(carver, bias2.as_ref())?;
                (PhiGrad::Mlp { weight1, bias1, weight2, bias2 }, carver)
            }
        };
        Ok((phi, take_optional(carver, position)?.0))
    }
}

fn take_optional<'a, R: Real, const N: usize>(
    carver: Carver<'a, R>,
    slot: Option<&Slot>,
) -> Result<(Option<TensorMut<'a, R, N>>, Carver<'a, R>)> {
    match slot {
        None => Ok((None, carver)),
        Some(slot) => carver.take(slot).map(|(taken, carver)| (Some(taken), carver)),
    }
}

/// The places of φ and of its position embedding, for keys or for values.
#[derive(Clone, Debug)]
pub(crate) struct SideSlots {
    pub(crate) phi: PhiSlots,
    pub(crate) position: Option<Slot>,
}

/// The places of one branch's projections.
#[derive(Clone, Debug)]
pub(crate) struct BranchSlots {
    pub(crate) k: Slot,
    pub(crate) v: Slot,
    /// With QK-norm.
    pub(crate) k_norm: Option<Slot>,
}

/// The places of what only NSA has.
#[derive(Clone, Debug)]
pub(crate) struct SparseSlots {
    /// cmp, slc, win.
    pub(crate) branches: [BranchSlots; 3],
    pub(crate) gate_weight: Slot,
    pub(crate) gate_bias: Slot,
    pub(crate) key_side: SideSlots,
    pub(crate) value_side: SideSlots,
}

/// The places of what differs between the kinds of attention.
#[derive(Clone, Debug)]
pub(crate) enum CoreSlots {
    Sparse(Box<SparseSlots>),
    Dense(BranchSlots),
}

/// The places of one layer's attention.
#[derive(Clone, Debug)]
pub(crate) struct AttentionSlots {
    pub(crate) norm: Slot,
    pub(crate) q: Slot,
    /// With QK-norm.
    pub(crate) q_norm: Option<Slot>,
    pub(crate) core: CoreSlots,
    pub(crate) o: Slot,
}

/// The places of one layer's MLP.
#[derive(Clone, Debug)]
pub(crate) struct MlpSlots {
    pub(crate) norm: Slot,
    pub(crate) gate: Slot,
    pub(crate) up: Slot,
    pub(crate) down: Slot,
}

/// The places of one layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerSlots {
    pub(crate) attention: AttentionSlots,
    pub(crate) mlp: MlpSlots,
}

/// The places of all parameters.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    pub(crate) embedding: Slot,
    pub(crate) layers: Vec<LayerSlots>,
    pub(crate) norm: Slot,
    /// The embedding's when tied.
    pub(crate) head: Slot,
    /// Parameters in all.
    pub(crate) total: usize,
    pub(crate) specs: Vec<ParamSpec>,
}

impl Slots {
    /// The places of a model without experts.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let specs = manifest(config);
        let mut table = Table { slots: HashMap::new(), config };
        let mut total = 0;
        for spec in &specs {
            table.slots.insert(spec.name.clone(), Slot { offset: total, shape: spec.shape.clone() });
            total += spec.numel();
        }
        let embedding = table.take("model.embed_tokens.weight");
        let layers = (0..config.num_hidden_layers()).map(|layer| table.layer(layer)).collect();
        let norm = table.take("model.norm.weight");
        let head = if config.tie_word_embeddings() { embedding.clone() } else { table.take("lm_head.weight") };
        debug_assert!(table.slots.is_empty(), "parameters that nothing uses: {:?}", table.slots.keys());
        Self { embedding, layers, norm, head, total, specs }
    }
}

/// Parameters by name; what is left at the end would be untrained.
struct Table<'a> {
    slots: HashMap<String, Slot>,
    config: &'a ModelConfig,
}

impl Table<'_> {
    fn take(&mut self, name: &str) -> Slot {
        self.slots.remove(name).unwrap_or_else(|| panic!("the manifest has `{name}`"))
    }

    fn take_if(&mut self, wanted: bool, name: &str) -> Option<Slot> {
        wanted.then(|| self.take(name))
    }

    fn layer(&mut self, layer: usize) -> LayerSlots {
        let prefix = format!("model.layers.{layer}");
        let attention = self.attention(&prefix);
        let mlp = MlpSlots {
            norm: self.take(&format!("{prefix}.post_attention_layernorm.weight")),
            gate: self.take(&format!("{prefix}.mlp.gate_proj.weight")),
            up: self.take(&format!("{prefix}.mlp.up_proj.weight")),
            down: self.take(&format!("{prefix}.mlp.down_proj.weight")),
        };
        LayerSlots { attention, mlp }
    }

    fn attention(&mut self, layer: &str) -> AttentionSlots {
        let prefix = format!("{layer}.self_attn");
        let core = match self.config.nsa_config() {
            None => CoreSlots::Dense(self.branch(&prefix, "")),
            Some(nsa) => CoreSlots::Sparse(Box::new(SparseSlots {
                branches: ["_cmp", "_slc", "_win"].map(|branch| self.branch(&prefix, branch)),
                gate_weight: self.take(&format!("{prefix}.gate_proj.weight")),
                gate_bias: self.take(&format!("{prefix}.gate_proj.bias")),
                key_side: self.side(&prefix, 'k', nsa.compress_kind()),
                value_side: self.side(&prefix, 'v', nsa.compress_kind()),
            })),
        };
        AttentionSlots {
            norm: self.take(&format!("{layer}.input_layernorm.weight")),
            q: self.take(&format!("{prefix}.q_proj.weight")),
            q_norm: self.take_if(self.config.qk_norm(), &format!("{prefix}.q_norm.weight")),
            core,
            o: self.take(&format!("{prefix}.o_proj.weight")),
        }
    }

    fn branch(&mut self, prefix: &str, branch: &str) -> BranchSlots {
        BranchSlots {
            k: self.take(&format!("{prefix}.k{branch}_proj.weight")),
            v: self.take(&format!("{prefix}.v{branch}_proj.weight")),
            k_norm: self.take_if(self.config.qk_norm(), &format!("{prefix}.k{branch}_norm.weight")),
        }
    }

    fn side(&mut self, prefix: &str, side: char, kind: CompressKind) -> SideSlots {
        let (bias, position) = (self.config.compress_bias(), self.config.compress_position());
        let phi = match kind {
            CompressKind::Mean => PhiSlots::Mean,
            CompressKind::Weighted => PhiSlots::Weighted(self.take(&format!("{prefix}.phi_{side}.weight"))),
            CompressKind::Linear => PhiSlots::Linear(self.take(&format!("{prefix}.phi_{side}.weight"))),
            CompressKind::Mlp => PhiSlots::Mlp {
                weight1: self.take(&format!("{prefix}.phi_{side}.0.weight")),
                bias1: self.take_if(bias, &format!("{prefix}.phi_{side}.0.bias")),
                weight2: self.take(&format!("{prefix}.phi_{side}.2.weight")),
                bias2: self.take_if(bias, &format!("{prefix}.phi_{side}.2.bias")),
            },
        };
        SideSlots { phi, position: self.take_if(position, &format!("{prefix}.pe_{side}")) }
    }
}
