//! The gate on generated branches.

use crate::compare::Compared;
use crate::generate::{self, Guarded, widen};
use crate::kernels::{Place, Sizes, text};
use crate::{Case, Kind, reference};
use nsa_core::{DType, Element};
use nsa_kernels::Backend;
use nsa_kernels::op::gate;
use nsa_ref::{Exact, Tensor};

/// Inputs of the gate, both directions.
#[derive(Clone, Debug)]
pub struct Gate<T> {
    /// Shapes.
    pub sizes: Sizes,
    /// `[N, Hq, 3]`.
    pub gates: Vec<T>,
    /// Each `[N, Hq, Dv]`.
    pub branches: [Vec<T>; 3],
    /// `[N, Hq, Dv]`.
    pub d_o: Vec<T>,
}

impl<T: Kind> Gate<T> {
    /// Inputs of a case.
    pub fn generate(case: &Case) -> Self {
        let sizes = Sizes::new(&case.config, &case.packing());
        Self {
            sizes,
            gates: generate::gates(case),
            branches: ["o_cmp", "o_slc", "o_win"].map(|name| generate::tensor(case, name, &sizes.o(), 1.0)),
            d_o: generate::tensor(case, "do", &sizes.o(), 1.0),
        }
    }

    /// Runs the kernels: o and the gradient of the gates.
    ///
    /// # Errors
    /// If a kernel refuses, or writes beside an output.
    pub fn run(&self, backend: &Backend) -> Result<(Vec<T>, Vec<T::Acc>), String> {
        let (sizes, place) = (&self.sizes, Place::new(backend));
        let [cmp, slc, win] = &self.branches;
        let branches = [place.input(cmp, sizes.o())?, place.input(slc, sizes.o())?, place.input(win, sizes.o())?];
        let mut o = Guarded::<T>::unwritten(self.d_o.len());
        let gates = place.input(&self.gates, sizes.gates())?;
        gate::forward(backend, gate::Forward { gates, branches, o: place.output(&mut o, sizes.o())? }).map_err(text)?;
        let mut d_gates = Guarded::<T::Acc>::unwritten(self.gates.len());
        let d_o = place.input(&self.d_o, sizes.o())?;
        let args = gate::Backward { branches, d_o, d_gates: place.output(&mut d_gates, sizes.gates())? };
        gate::backward(backend, args).map_err(text)?;
        Ok((o.finish("o")?, d_gates.finish("dgates")?))
    }

    /// Runs the kernels on `self` and the reference on `honest` (the same inputs unless a fault was planted).
    ///
    /// # Errors
    /// If a kernel refuses, or writes beside an output.
    pub fn compare(&self, honest: &Self, backend: &Backend) -> Result<Vec<Compared>, String> {
        let (o, d_gates) = self.run(backend)?;
        let sizes = &self.sizes;
        let gates = Tensor::from_elements(&sizes.gates(), &honest.gates);
        let branches = honest.branches.each_ref().map(|branch| Tensor::from_elements(&sizes.o(), branch));
        let d_o = Tensor::from_elements(&sizes.o(), &honest.d_o);
        let rounded = reference::rounded(backend, T::DTYPE);
        let each = branches.each_ref();
        let forward = [
            nsa_ref::gate::forward(&Exact, &gates, each).map_err(text)?,
            nsa_ref::gate::forward(&rounded, &gates, each).map_err(text)?,
        ];
        let backward = [
            nsa_ref::gate::backward(&Exact, &gates, each, &d_o).map_err(text)?.0,
            nsa_ref::gate::backward(&rounded, &gates, each, &d_o).map_err(text)?.0,
        ];
        let largest = |values: &[T]| widen(values).iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let branch = self.branches.iter().map(|b| largest(b)).fold(0.0, f64::max);
        let compared = |name: &str, [truth, rounded]: [Tensor; 2], kernel, row, storage: DType, magnitude| Compared {
            tensor: name.to_owned(),
            truth: truth.data,
            rounded: vec![rounded.data],
            kernel,
            row,
            storage,
            accumulator: <T::Acc as Element>::DTYPE,
            magnitude,
            approximated: 0.0,
            draws: sizes.n,
        };
        let accumulator = <T::Acc as Element>::DTYPE;
        let products = largest(&honest.d_o) * branch * (sizes.dv as f64).sqrt();
        Ok(vec![
            compared("o", forward, widen(&o), sizes.dv, T::DTYPE, branch),
            compared("dgates", backward, widen(&d_gates), 3, accumulator, products),
        ])
    }
}
