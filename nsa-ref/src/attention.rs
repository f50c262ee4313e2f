//! Softmax attention of one query over a list of keys: what the branches share. They differ in the list alone.

use crate::Arithmetic;

/// Attention of one query.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Σ_s p_s·v_s; 0 without keys. `[Dv]`.
    pub o: Vec<f64>,
    /// ln Σ_s exp(scale·q·k_s); −∞ without keys.
    pub lse: f64,
    /// p_s, in the order of the keys.
    pub probabilities: Vec<f64>,
}

/// o = Σ_s p_s·v_s with p = softmax_s(scale · q·k_s) over the given keys and values.
///
/// **Source**: paper equation 1; SPEC 2.
pub fn forward<A: Arithmetic>(a: &A, scale: f64, q: &[f64], keys: &[&[f64]], values: &[&[f64]], dim_v: usize) -> Row {
    let mut o = vec![0.0; dim_v];
    if keys.is_empty() {
        return Row { o, lse: f64::NEG_INFINITY, probabilities: Vec::new() };
    }
    let scores: Vec<f64> = keys.iter().map(|k| a.acc(a.dot(q, k) * a.acc(scale))).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|&s| a.acc(a.acc(s - max).exp())).collect();
    let sum = weights.iter().fold(0.0, |sum, &w| a.acc(sum + w));
    for (&w, v) in weights.iter().zip(values) {
        a.add_scaled(&mut o, a.prob(w), v);
    }
    for x in &mut o {
        *x = a.store(a.acc(*x / sum));
    }
    let lse = a.acc(max + a.acc(sum.ln()));
    let probabilities = weights.iter().map(|&w| a.acc(w / sum)).collect();
    Row { o, lse, probabilities }
}

/// What the backward pass of one query has.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// Softmax scale.
    pub scale: f64,
    /// `[Dk]`.
    pub q: &'a [f64],
    /// The forward's output `[Dv]`.
    pub o: &'a [f64],
    /// The forward's lse.
    pub lse: f64,
    /// Gradient of the output `[Dv]`.
    pub d_o: &'a [f64],
}

/// Gradients of one query's attention, for one key: (p, ds) with p = exp(scale·q·k − lse), ds = p·(do·v − δ).
///
/// **Source**: SPEC 3.
pub fn key_gradient<A: Arithmetic>(a: &A, saved: &Saved<'_>, delta: f64, k: &[f64], v: &[f64]) -> (f64, f64) {
    let score = a.acc(a.dot(saved.q, k) * a.acc(saved.scale));
    let p = a.acc(a.acc(score - saved.lse).exp());
    let ds = a.acc(p * a.acc(a.dot(saved.d_o, v) - delta));
    (p, ds)
}

/// Gradients of one query's attention. Adds to `dq` `[Dk]`, and hands each key's gradients to `add`:
/// `add(index in the list, factor of q in dk, factor of do in dv)`.
///
/// **Source**: SPEC 3: δ = Σ do·o; dq += scale·ds·k; dk += scale·ds·q; dv += p·do.
pub fn backward<A: Arithmetic>(
    a: &A,
    saved: &Saved<'_>,
    keys: &[&[f64]],
    values: &[&[f64]],
    dq: &mut [f64],
    mut add: impl FnMut(usize, f64, f64),
) {
    let delta = a.dot(saved.d_o, saved.o);
    for (i, (k, v)) in keys.iter().zip(values).enumerate() {
        let (p, ds) = key_gradient(a, saved, delta, k, v);
        let ds = a.prob(a.acc(ds * a.acc(saved.scale)));
        a.add_scaled(dq, ds, k);
        add(i, ds, a.prob(p));
    }
}
