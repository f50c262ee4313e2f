//! The gated sum of the branches (SPEC 2).

use crate::{Arithmetic, Result, Tensor};

/// o = Σ_c g^c·o^c, order cmp, slc, win. Gates `[N, Hq, 3]`, branches and result `[N, Hq, Dv]`.
///
/// **Source**: paper equation 5; SPEC 2.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<A: Arithmetic>(a: &A, gates: &Tensor, branches: [&Tensor; 3]) -> Result<Tensor> {
    let shape = check(gates, branches)?;
    let mut o = Tensor::zeros(&shape);
    for (n, h) in rows(shape) {
        let g = gates.row(&[n, h]);
        for (&g, branch) in g.iter().zip(branches) {
            a.add_scaled(o.row_mut(&[n, h]), g, branch.row(&[n, h]));
        }
    }
    Ok(o.map(|x| a.store(x)))
}

/// (dg, [do^cmp, do^slc, do^win]): dg^c = Σ_dv do·o^c, do^c = g^c·do; all in the accumulator.
///
/// **Source**: SPEC 3.
///
/// # Errors
/// If a shape does not fit.
pub fn backward<A: Arithmetic>(
    a: &A,
    gates: &Tensor,
    branches: [&Tensor; 3],
    d_o: &Tensor,
) -> Result<(Tensor, [Tensor; 3])> {
    let shape = check(gates, branches)?;
    d_o.check("gate", "do", &shape)?;
    let mut d_gates = Tensor::zeros(&gates.shape);
    let mut d_branches = [(); 3].map(|()| Tensor::zeros(&shape));
    for (n, h) in rows(shape) {
        for c in 0..3 {
            d_gates.row_mut(&[n, h])[c] = a.dot(d_o.row(&[n, h]), branches[c].row(&[n, h]));
            let factor = gates.row(&[n, h])[c];
            a.add_scaled(d_branches[c].row_mut(&[n, h]), factor, d_o.row(&[n, h]));
        }
    }
    Ok((d_gates, d_branches))
}

/// Shape of the branches, `[N, Hq, Dv]`.
fn check(gates: &Tensor, branches: [&Tensor; 3]) -> Result<[usize; 3]> {
    let size = |tensor: &Tensor, axis: usize| tensor.shape.get(axis).copied().unwrap_or(0);
    let shape = [size(gates, 0), size(gates, 1), size(branches[0], 2)];
    gates.check("gate", "gates", &[shape[0], shape[1], 3])?;
    for (branch, name) in branches.iter().zip(["o_cmp", "o_slc", "o_win"]) {
        branch.check("gate", name, &shape)?;
    }
    Ok(shape)
}

fn rows([tokens, heads, _]: [usize; 3]) -> impl Iterator<Item = (usize, usize)> {
    (0..tokens).flat_map(move |n| (0..heads).map(move |h| (n, h)))
}
