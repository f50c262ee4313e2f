//! The gated sum of the branches: bound by memory, one pass over each tensor.

use crate::Result;
use crate::cpu::layer::par::for_rows;
use crate::op::gate::{Backward, Forward};
use nsa_core::{Element, Real};

pub(crate) fn forward<T: Element>(args: Forward<'_, T>) -> Result<()> {
    let gates = args.gates.to_host()?;
    let [cmp, slc, win] = args.branches;
    let [cmp, slc, win] = [cmp.to_host()?, slc.to_host()?, win.to_host()?];
    let [_, heads, dim] = args.o.shape();
    for_rows(args.o.into_host()?.into_data(), heads * dim, |t, o| {
        for (h, o) in o.chunks_exact_mut(dim).enumerate() {
            add(gates.row(t, h), [cmp.row(t, h), slc.row(t, h), win.row(t, h)], o);
        }
    });
    Ok(())
}

/// o = Σ_c g^c·o^c for one query and head.
pub(crate) fn add<T: Element>(gates: &[T], [cmp, slc, win]: [&[T]; 3], o: &mut [T]) {
    let g = [gates[0].to_acc(), gates[1].to_acc(), gates[2].to_acc()];
    for (((o, cmp), slc), win) in o.iter_mut().zip(cmp).zip(slc).zip(win) {
        *o = T::from_acc(g[0] * cmp.to_acc() + g[1] * slc.to_acc() + g[2] * win.to_acc());
    }
}

pub(crate) fn backward<T: Element>(args: Backward<'_, T>) -> Result<()> {
    let d_o = args.d_o.to_host()?;
    let [cmp, slc, win] = args.branches;
    let branches = [cmp.to_host()?, slc.to_host()?, win.to_host()?];
    let [_, heads, _] = d_o.shape();
    for_rows(args.d_gates.into_host()?.into_data(), heads * 3, |t, d_gates| {
        for (h, d_gates) in d_gates.chunks_exact_mut(3).enumerate() {
            for (d_gate, branch) in d_gates.iter_mut().zip(&branches) {
                *d_gate = dot(d_o.row(t, h), branch.row(t, h));
            }
        }
    });
    Ok(())
}

/// Σ a·b, in eight partial sums that the compiler keeps in one vector.
fn dot<T: Element>(a: &[T], b: &[T]) -> T::Acc {
    const LANES: usize = 8;
    let mut sums = [T::Acc::of(0.0); LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += a[i].to_acc() * b[i].to_acc();
        }
    }
    let rest: T::Acc = a_rest.iter().zip(b_rest).map(|(a, b)| a.to_acc() * b.to_acc()).sum();
    sums.into_iter().sum::<T::Acc>() + rest
}
