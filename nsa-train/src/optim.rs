//! AdamW over the flat buffers, decay on matrices only.

use crate::model::Model;
use crate::{Result, TrainOptions};
use nsa_core::Real;
use nsa_core::model::ParamSpec;
use nsa_kernels::layer::adamw::{self, AdamW, Step};
use nsa_kernels::{Backend, Buffer, Element};

/// The optimizer's state.
#[derive(Debug)]
pub struct Optimizer<R: Real> {
    m: Buffer<R>,
    v: Buffer<R>,
    groups: Vec<Group>,
}

/// Neighbouring parameters with the same settings.
#[derive(Clone, Debug, PartialEq)]
struct Group {
    offset: usize,
    len: usize,
    decays: bool,
}

fn groups(specs: &[ParamSpec]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut offset = 0;
    for spec in specs {
        let (len, decays) = (spec.numel(), spec.kind.decays());
        match groups.last_mut().filter(|group| group.decays == decays) {
            Some(group) => group.len += len,
            None => groups.push(Group { offset, len, decays }),
        }
        offset += len;
    }
    groups
}

impl<R: Real> Optimizer<R> {
    /// The state before the first step.
    pub fn new<T: Element<Acc = R>>(model: &Model<T>) -> Self {
        let new = || model.new_gradients();
        Self { m: new(), v: new(), groups: groups(model.manifest()) }
    }

    /// AdamW's two moments, flat.
    pub fn moments(&self) -> [&Buffer<R>; 2] {
        [&self.m, &self.v]
    }

    /// AdamW's two moments, flat and writable.
    pub fn moments_mut(&mut self) -> [&mut Buffer<R>; 2] {
        [&mut self.m, &mut self.v]
    }

    /// Applies step number `step`, counted from 1, with gradient `scale`·`grads`.
    ///
    /// # Errors
    /// If an option is out of its range.
    pub fn step<T: Element<Acc = R>>(
        &mut self,
        model: &mut Model<T>,
        grads: &Buffer<R>,
        options: &TrainOptions,
        (step, lr, scale): (u64, f64, f64),
    ) -> Result<()> {
        let backend = model.backend().clone();
        model.change_params(|params| {
            for &Group { offset, len, decays } in &self.groups {
                let weight_decay = if decays { options.weight_decay } else { 0.0 };
                let (beta1, beta2, eps) = (options.beta1, options.beta2, options.eps);
                let args = Step {
                    config: AdamW { lr, beta1, beta2, eps, weight_decay },
                    step,
                    grad_scale: scale,
                    grads: grads.tensor_at(offset, [len])?,
                    params: params.tensor_mut_at(offset, [len])?,
                    m: self.m.tensor_mut_at(offset, [len])?,
                    v: self.v.tensor_mut_at(offset, [len])?,
                };
                adamw::step(&backend, args)?;
            }
            Ok(())
        })
    }
}

/// The norm of a flat gradient.
///
/// # Errors
/// If the gradient is not in the backend's memory.
pub fn gradient_norm<R: Real>(backend: &Backend, grads: &Buffer<R>) -> Result<f64> {
    Ok(adamw::sum_of_squares(backend, grads.tensor([grads.len()])?)?.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::model::{ModelConfig, ParamKind, manifest};

    #[test]
    fn groups_cover_every_parameter_once_and_decay_matrices_only() {
        let specs = manifest(&ModelConfig::preset("small-10m").unwrap());
        let groups = groups(&specs);
        let mut offset = 0;
        let mut at = groups.iter();
        let mut group = at.next().unwrap();
        for spec in &specs {
            if offset == group.offset + group.len {
                group = at.next().unwrap();
            }
            assert!(group.offset <= offset && offset + spec.numel() <= group.offset + group.len, "{}", spec.name);
            assert_eq!(group.decays, spec.kind != ParamKind::Vector, "{}", spec.name);
            offset += spec.numel();
        }
        assert_eq!((at.next(), offset), (None, group.offset + group.len));
        assert!(groups.windows(2).all(|pair| pair[0].decays != pair[1].decays));
    }
}
