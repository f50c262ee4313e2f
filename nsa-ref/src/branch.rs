//! A branch: attention of every query of a call over the keys that the branch's pattern gives it.

use crate::{Arithmetic, Tensor, attention};
use nsa_core::{NsaConfig, Packing, Seq, ShapeError};

/// Output of a branch.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// `[N, Hq, Dv]`; 0 where a query has no key.
    pub o: Tensor,
    /// `[N, Hq]`, natural log; −∞ where a query has no key.
    pub lse: Tensor,
}

/// Gradients of a branch, in the accumulator: kernels hand them over unrounded.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// `[N, Hq, Dk]`.
    pub dq: Tensor,
    /// `[rows, G, Dk]`.
    pub dk: Tensor,
    /// `[rows, G, Dv]`.
    pub dv: Tensor,
}

/// Inputs of a branch.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[N, Hq, Dk]`.
    pub q: &'a Tensor,
    /// `[rows, G, Dk]`, packed per sequence.
    pub k: &'a Tensor,
    /// `[rows, G, Dv]`.
    pub v: &'a Tensor,
}

/// What the forward left and what comes back.
#[derive(Clone, Copy, Debug)]
pub struct Upstream<'a> {
    /// The forward's output.
    pub output: &'a Output,
    /// Gradient of the branch's output `[N, Hq, Dv]`.
    pub d_o: &'a Tensor,
}

/// One query of one KV head: what a pattern decides by.
pub(crate) struct Query<'a> {
    /// Its sequence.
    pub seq: &'a Seq,
    /// Index of that sequence.
    pub s: usize,
    /// Its row among the packed queries.
    pub row: usize,
    /// Its KV head.
    pub g: usize,
}

impl Query<'_> {
    /// Its position.
    pub fn t(&self) -> usize {
        self.seq.context + self.row - self.seq.rows.start
    }
}

/// Shapes of queries, keys and values.
pub(crate) fn check(
    op: &'static str,
    config: &NsaConfig,
    packing: &Packing,
    inputs: &Inputs<'_>,
    rows: usize,
) -> Result<(), ShapeError> {
    let (heads, kv_heads) = (config.num_heads(), config.num_kv_heads());
    inputs.q.check(op, "q", &[packing.num_tokens(), heads, config.head_dim_qk()])?;
    inputs.k.check(op, "k", &[rows, kv_heads, config.head_dim_qk()])?;
    inputs.v.check(op, "v", &[rows, kv_heads, config.head_dim_v()])
}

/// Shapes of what the forward left and of the gradient that comes back.
pub(crate) fn check_upstream(
    op: &'static str,
    config: &NsaConfig,
    packing: &Packing,
    upstream: &Upstream<'_>,
) -> Result<(), ShapeError> {
    let shape = [packing.num_tokens(), config.num_heads(), config.head_dim_v()];
    upstream.output.o.check(op, "o", &shape)?;
    upstream.output.lse.check(op, "lse", &shape[..2])?;
    upstream.d_o.check(op, "do", &shape)
}

/// Calls `f` for every query and KV head.
fn for_each_query(config: &NsaConfig, packing: &Packing, mut f: impl FnMut(Query<'_>)) {
    for (s, seq) in packing.seqs().enumerate() {
        for row in seq.rows.clone() {
            for g in 0..config.num_kv_heads() {
                f(Query { seq: &seq, s, row, g });
            }
        }
    }
}

/// Attention of every query over the rows that `pattern` gives; `see` is shown every head's probabilities.
pub(crate) fn forward<A: Arithmetic>(
    a: &A,
    config: &NsaConfig,
    packing: &Packing,
    inputs: &Inputs<'_>,
    pattern: impl Fn(&Query<'_>) -> Vec<usize>,
    mut see: impl FnMut(&Query<'_>, &[f64]),
) -> Output {
    let (n, heads, dim_v) = (packing.num_tokens(), config.num_heads(), config.head_dim_v());
    let mut output = Output { o: Tensor::zeros(&[n, heads, dim_v]), lse: Tensor::zeros(&[n, heads]) };
    for_each_query(config, packing, |query| {
        let rows = pattern(&query);
        let keys: Vec<&[f64]> = rows.iter().map(|&r| inputs.k.row(&[r, query.g])).collect();
        let values: Vec<&[f64]> = rows.iter().map(|&r| inputs.v.row(&[r, query.g])).collect();
        for h in query.g * config.group_size()..(query.g + 1) * config.group_size() {
            let q = inputs.q.row(&[query.row, h]);
            let result = attention::forward(a, config.scale(), q, &keys, &values, dim_v);
            output.o.row_mut(&[query.row, h]).copy_from_slice(&result.o);
            output.lse.row_mut(&[query.row])[h] = result.lse;
            see(&query, &result.probabilities);
        }
    });
    output
}

/// Gradients of [`forward`].
pub(crate) fn backward<A: Arithmetic>(
    a: &A,
    config: &NsaConfig,
    packing: &Packing,
    inputs: &Inputs<'_>,
    upstream: &Upstream<'_>,
    pattern: impl Fn(&Query<'_>) -> Vec<usize>,
) -> Gradients {
    let mut grads = Gradients {
        dq: Tensor::zeros(&inputs.q.shape),
        dk: Tensor::zeros(&inputs.k.shape),
        dv: Tensor::zeros(&inputs.v.shape),
    };
    for_each_query(config, packing, |query| {
        let rows = pattern(&query);
        let keys: Vec<&[f64]> = rows.iter().map(|&r| inputs.k.row(&[r, query.g])).collect();
        let values: Vec<&[f64]> = rows.iter().map(|&r| inputs.v.row(&[r, query.g])).collect();
        for h in query.g * config.group_size()..(query.g + 1) * config.group_size() {
            let saved = attention::Saved {
                scale: config.scale(),
                q: inputs.q.row(&[query.row, h]),
                o: upstream.output.o.row(&[query.row, h]),
                lse: upstream.output.lse.row(&[query.row])[h],
                d_o: upstream.d_o.row(&[query.row, h]),
            };
            let dq = grads.dq.row_mut(&[query.row, h]);
            let (dk, dv) = (&mut grads.dk, &mut grads.dv);
            attention::backward(a, &saved, &keys, &values, dq, |i, ds, p| {
                a.add_scaled(dk.row_mut(&[rows[i], query.g]), ds, saved.q);
                a.add_scaled(dv.row_mut(&[rows[i], query.g]), p, saved.d_o);
            });
        }
    });
    grads
}
