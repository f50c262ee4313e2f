//! The operator's parts. Each module has argument structs with a shape behind each tensor and one function a direction;
//! letters: N queries, Hq query heads, G KV heads, Dk and Dv head dims, M compression blocks, n selected blocks. A is the
//! type of sums: f32, or f64 for f64. Probabilities p and gradients of scores ds are rounded to
//! [`Backend::operand_type`](crate::Backend::operand_type) where they enter a product: A, or bf16 where bf16
//! tensors are multiplied without widening.

pub mod cmp;
pub mod compress;
pub mod decode;
pub mod dense;
pub mod gate;
pub mod nsa;
pub mod slc;
pub mod win;

use crate::{Element, Error, Result, Rows, Tensor, TensorMut};
use nsa_core::{NsaConfig, Packing};
use std::ops::RangeInclusive;

/// Shapes that the arguments of one call must have.
pub(crate) struct Shapes<'a> {
    op: &'static str,
    config: &'a NsaConfig,
    packing: &'a Packing,
}

impl<'a> Shapes<'a> {
    /// The shapes of operation `op` on the queries of `packing`.
    pub(crate) fn new(op: &'static str, config: &'a NsaConfig, packing: &'a Packing) -> Self {
        Self { op, config, packing }
    }

    /// `[N, Hq, Dk]`.
    pub(crate) fn queries(&self) -> [usize; 3] {
        [self.packing.num_tokens(), self.config.num_heads(), self.config.head_dim_qk()]
    }

    /// `[N, Hq, Dv]`.
    pub(crate) fn outputs(&self) -> [usize; 3] {
        [self.packing.num_tokens(), self.config.num_heads(), self.config.head_dim_v()]
    }

    /// `[N, Hq]`.
    pub(crate) fn lse(&self) -> [usize; 2] {
        [self.packing.num_tokens(), self.config.num_heads()]
    }

    /// `[N, Hq, 3]`.
    pub(crate) fn gates(&self) -> [usize; 3] {
        [self.packing.num_tokens(), self.config.num_heads(), 3]
    }

    /// `[rows, G, Dk]`.
    pub(crate) fn keys(&self, rows: usize) -> [usize; 3] {
        [rows, self.config.num_kv_heads(), self.config.head_dim_qk()]
    }

    /// `[rows, G, Dv]`.
    pub(crate) fn values(&self, rows: usize) -> [usize; 3] {
        [rows, self.config.num_kv_heads(), self.config.head_dim_v()]
    }

    /// `[N, G, n]`.
    pub(crate) fn selection(&self) -> [usize; 3] {
        [self.packing.num_tokens(), self.config.num_kv_heads(), self.config.select_count()]
    }

    /// Checks the tensors that every branch's forward has; sequence s has `lens(s)` rows of keys and values.
    pub(crate) fn forward<T: Element>(
        &self,
        q: &Tensor<'_, T, 3>,
        keys: (&str, &Rows<'_, T>),
        values: (&str, &Rows<'_, T>),
        outputs: (&TensorMut<'_, T, 3>, &TensorMut<'_, T::Acc, 2>),
        lens: impl Fn(usize) -> RangeInclusive<usize>,
    ) -> Result<()> {
        let kv_heads = self.config.num_kv_heads();
        q.check(self.op, "q", self.queries())?;
        let key_lens = keys.1.check(self.op, keys.0, [kv_heads, self.config.head_dim_qk()], self.packing, &lens)?;
        let as_keys = |s: usize| key_lens[s]..=key_lens[s];
        values.1.check(self.op, values.0, [kv_heads, self.config.head_dim_v()], self.packing, as_keys)?;
        outputs.0.check(self.op, "o", self.outputs())?;
        outputs.1.check(self.op, "lse", self.lse())
    }

    /// Checks that every sequence starts at position 0.
    pub(crate) fn whole_sequences(&self) -> Result<()> {
        match self.packing.seqs().map(|seq| seq.context).find(|&context| context > 0) {
            None => Ok(()),
            Some(context) => Err(Error::Value {
                op: self.op,
                arg: "packing",
                value: format!("a sequence with a context of {context}"),
                rule: "needs whole sequences: every context must be 0",
            }),
        }
    }

    /// Checks what every branch's backward has.
    pub(crate) fn backward<T: Element>(&self, args: &BranchGrad<'_, '_, T>) -> Result<()> {
        self.whole_sequences()?;
        args.q.check(self.op, "q", self.queries())?;
        args.k.1.check(self.op, args.k.0, self.keys(args.rows))?;
        args.v.1.check(self.op, args.v.0, self.values(args.rows))?;
        args.o.check(self.op, "o", self.outputs())?;
        args.lse.check(self.op, "lse", self.lse())?;
        args.d_o.check(self.op, "d_o", self.outputs())?;
        if let Some(gates) = args.gates {
            gates.check(self.op, "gates", self.gates())?;
        }
        if let Some(d_gates) = args.d_gates {
            d_gates.check(self.op, "d_gates", self.gates())?;
        }
        args.dq.check(self.op, "dq", self.queries())?;
        args.dk.1.check(self.op, args.dk.0, self.keys(args.rows))?;
        args.dv.1.check(self.op, args.dv.0, self.values(args.rows))
    }
}

/// How a branch's output enters the gated sum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gating<'a, T: nsa_core::Element> {
    /// `[N, Hq, 3]`; without them 1.
    pub(crate) gates: Option<Tensor<'a, T, 3>>,
    /// `[N, Hq, 3]`: Σ do·o of each branch, if known.
    pub(crate) d_gates: Option<Tensor<'a, T::Acc, 3>>,
    /// The branch's.
    pub(crate) column: usize,
}

impl<T: nsa_core::Element> Gating<'_, T> {
    /// Of an output that enters no sum.
    pub(crate) const NONE: Self = Self { gates: None, d_gates: None, column: 0 };
}

/// The arguments that every branch's backward has, with the names that differ.
pub(crate) struct BranchGrad<'b, 'a, T: Element> {
    /// Rows of keys and values.
    pub(crate) rows: usize,
    pub(crate) q: &'b Tensor<'a, T, 3>,
    pub(crate) k: (&'static str, &'b Tensor<'a, T, 3>),
    pub(crate) v: (&'static str, &'b Tensor<'a, T, 3>),
    pub(crate) o: &'b Tensor<'a, T, 3>,
    pub(crate) lse: &'b Tensor<'a, T::Acc, 2>,
    pub(crate) d_o: &'b Tensor<'a, T, 3>,
    pub(crate) gates: Option<&'b Tensor<'a, T, 3>>,
    pub(crate) d_gates: Option<&'b Tensor<'a, T::Acc, 3>>,
    pub(crate) dq: &'b TensorMut<'a, T::Acc, 3>,
    pub(crate) dk: (&'static str, &'b TensorMut<'a, T::Acc, 3>),
    pub(crate) dv: (&'static str, &'b TensorMut<'a, T::Acc, 3>),
}
