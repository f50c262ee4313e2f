//! Initial values of the parameters.

use crate::random::{Purpose, generator};
use nsa_core::Real;
use nsa_core::model::{Init, ParamSpec};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

/// Initial values of all tensors, flat. Each tensor has a stream of random numbers of its own, so that its values depend on
/// the seed and on its place in the manifest alone.
pub(crate) fn initial<R: Real>(specs: &[ParamSpec], seed: u64) -> Vec<R> {
    let mut values = vec![R::zero(); specs.iter().map(ParamSpec::numel).sum()];
    let mut rest = &mut values[..];
    let mut parts = Vec::with_capacity(specs.len());
    for spec in specs {
        let part;
        (part, rest) = rest.split_at_mut(spec.numel());
        parts.push((spec, part));
    }
    parts.into_par_iter().enumerate().for_each(|(stream, (spec, part))| match spec.init {
        Init::Constant(value) => part.fill(R::of(value)),
        Init::Normal { std } => {
            let mut rng = generator(seed, Purpose::Parameters, stream as u64);
            part.fill_with(|| {
                let z: f64 = StandardNormal.sample(&mut rng);
                R::of(std * z)
            });
        }
    });
    values
}
