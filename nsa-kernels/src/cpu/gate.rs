//! The gated sum of the branches: bound by memory, one pass over each tensor.

use crate::cpu::Cpu;
use crate::cpu::layer::par::{for_rows, lane_sum};
use crate::cpu::simd::{Loops, compiled_for};
use crate::op::gate::{Backward, Forward};
use crate::{Element, Result};
use nsa_core::View;

pub(crate) fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let gates = args.gates.to_host()?;
    let [cmp, slc, win] = args.branches;
    let [cmp, slc, win] = [cmp.to_host()?, slc.to_host()?, win.to_host()?];
    let [_, heads, dim] = args.o.shape();
    for_rows(args.o.into_host()?.into_data(), heads * dim, |t, o| {
        compiled_for(cpu.isa(), ForwardRow { t, gates: &gates, branches: [&cmp, &slc, &win], dim, o });
    });
    Ok(())
}

/// The heads of query t.
struct ForwardRow<'a, T> {
    t: usize,
    gates: &'a View<'a, T, 3>,
    branches: [&'a View<'a, T, 3>; 3],
    dim: usize,
    o: &'a mut [T],
}

impl<T: Element> Loops for ForwardRow<'_, T> {
    #[inline(always)]
    fn run(self) {
        for (h, o) in self.o.chunks_exact_mut(self.dim).enumerate() {
            add(self.gates.row(self.t, h), self.branches.map(|branch| branch.row(self.t, h)), o);
        }
    }
}

/// o = Σ_c g^c·o^c for one query and head.
#[inline(always)]
pub(crate) fn add<T: Element>(gates: &[T], [cmp, slc, win]: [&[T]; 3], o: &mut [T]) {
    let g = [gates[0].to_acc(), gates[1].to_acc(), gates[2].to_acc()];
    for (((o, cmp), slc), win) in o.iter_mut().zip(cmp).zip(slc).zip(win) {
        *o = T::from_acc(g[0] * cmp.to_acc() + g[1] * slc.to_acc() + g[2] * win.to_acc());
    }
}

pub(crate) fn backward<T: Element>(cpu: &Cpu, args: Backward<'_, T>) -> Result<()> {
    let d_o = args.d_o.to_host()?;
    let [cmp, slc, win] = args.branches;
    let branches = [cmp.to_host()?, slc.to_host()?, win.to_host()?];
    let [_, heads, _] = d_o.shape();
    for_rows(args.d_gates.into_host()?.into_data(), heads * 3, |t, d_gates| {
        compiled_for(cpu.isa(), BackwardRow { t, d_o: &d_o, branches: &branches, d_gates });
    });
    Ok(())
}

/// The heads of query t.
struct BackwardRow<'a, T: Element> {
    t: usize,
    d_o: &'a View<'a, T, 3>,
    branches: &'a [View<'a, T, 3>; 3],
    d_gates: &'a mut [T::Acc],
}

impl<T: Element> Loops for BackwardRow<'_, T> {
    #[inline(always)]
    fn run(self) {
        for (h, d_gates) in self.d_gates.chunks_exact_mut(3).enumerate() {
            for (d_gate, branch) in d_gates.iter_mut().zip(self.branches) {
                let (d_o, o) = (self.d_o.row(self.t, h), branch.row(self.t, h));
                *d_gate = lane_sum(d_o, o, o, |d_o, o, _| d_o.to_acc() * o.to_acc());
            }
        }
    }
}
