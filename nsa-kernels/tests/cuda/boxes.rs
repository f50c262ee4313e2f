//! Rows that come to tiles in boxes, as an H100 copies, and end within one.

use super::pages::numbers;
use half::bf16;
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing, index};
use nsa_kernels::op::{cmp, dense, slc, win};
use nsa_kernels::{Backend, Buffer, Rows};
use nsa_tests::sim::on_an_h100;
use nsa_tests::{Case, generate};

/// Tokens of the sequences: none fills a tile, and keys of the last one end with their tensor.
const LENGTHS: [usize; 3] = [50, 130, 70];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Dense,
    Win,
    Cmp,
    Slc,
}

fn config(heads: [usize; 2], dims: [usize; 2], select_block: usize) -> NsaConfig {
    let builder =
        NsaConfig::builder(heads[0], heads[1], dims[0], dims[1]).compress_kind(CompressKind::Mean).compress_block(8);
    builder.compress_stride(4).select_block(select_block).select_count(3).window(33).build().expect("valid")
}

/// Inputs of a call, `lead` elements behind an address that is a multiple of 16, whose rows of the sequences that are not `kept` are
/// NaN.
struct Inputs {
    backend: Backend,
    lead: usize,
    kept: fn(usize) -> bool,
}

impl Inputs {
    /// `[rows, width]`, of sequences that lie as `offsets` says.
    fn rows(&self, offsets: &CuSeqlens, width: usize, step: usize) -> Buffer<bf16> {
        let mut all = numbers::<bf16>(offsets.total() * width, step);
        for s in (0..offsets.num_seqs()).filter(|&s| !(self.kept)(s)) {
            let range = offsets.range(s);
            all[range.start * width..range.end * width].fill(bf16::NAN);
        }
        self.backend.upload(&[&vec![bf16::NAN; self.lead][..], &all].concat())
    }

    /// The bits of o, lse and dq, dk and dv of the sequences that are kept.
    fn results(&self, op: Op, config: &NsaConfig) -> Vec<u32> {
        let Self { backend, lead, .. } = self;
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        let packing = Packing::new(CuSeqlens::from_lengths(LENGTHS).expect("short"));
        let rows_of = |tokens| if op == Op::Cmp { index::num_blocks(config, tokens) } else { tokens };
        let offsets = CuSeqlens::from_lengths(LENGTHS.map(rows_of)).expect("short");
        let (n, rows) = (packing.num_tokens(), offsets.total());
        let of_queries = |width, step| self.rows(packing.cu_seqlens(), width, step);
        let (q, d_o) = (of_queries(heads * dim_k, 31), of_queries(heads * dim_v, 7));
        let (k, v) = (self.rows(&offsets, groups * dim_k, 17), self.rows(&offsets, groups * dim_v, 23));
        let lists = backend.upload(&generate::selection(&Case::new("boxes", config.to_builder(), LENGTHS)));
        let (mut o, mut lse) = (backend.alloc::<bf16>(n * heads * dim_v + lead), backend.alloc::<f32>(n * heads));
        let sizes = [(n * heads, dim_k), (rows * groups, dim_k), (rows * groups, dim_v)];
        let [mut dq, mut dk, mut dv] = sizes.map(|(rows, dim)| backend.alloc::<f32>(rows * dim));
        macro_rules! run {
            ($op:ident, $k:ident, $v:ident, $dk:ident, $dv:ident, { $($more:tt)* }, { $($gradients:tt)* }) => {{
                let args = $op::Forward {
                    config,
                    packing: &packing,
                    q: q.tensor_at(*lead, [n, heads, dim_k]).expect("sizes"),
                    $k: Rows::packed(k.tensor_at(*lead, [rows, groups, dim_k]).expect("sizes"), &offsets),
                    $v: Rows::packed(v.tensor_at(*lead, [rows, groups, dim_v]).expect("sizes"), &offsets),
                    o: o.tensor_mut_at(*lead, [n, heads, dim_v]).expect("sizes"),
                    lse: lse.tensor_mut([n, heads]).expect("sizes"),
                    $($more)*
                };
                $op::forward(backend, args).expect("runs");
                let args = $op::Backward {
                    config,
                    packing: &packing,
                    q: q.tensor_at(*lead, [n, heads, dim_k]).expect("sizes"),
                    $k: k.tensor_at(*lead, [rows, groups, dim_k]).expect("sizes"),
                    $v: v.tensor_at(*lead, [rows, groups, dim_v]).expect("sizes"),
                    o: o.tensor_at(*lead, [n, heads, dim_v]).expect("sizes"),
                    lse: lse.tensor([n, heads]).expect("sizes"),
                    d_o: d_o.tensor_at(*lead, [n, heads, dim_v]).expect("sizes"),
                    dq: dq.tensor_mut([n, heads, dim_k]).expect("sizes"),
                    accumulate: false,
                    $dk: dk.tensor_mut([rows, groups, dim_k]).expect("sizes"),
                    $dv: dv.tensor_mut([rows, groups, dim_v]).expect("sizes"),
                    $($gradients)*
                };
                $op::backward(backend, args).expect("runs");
            }};
        }
        let block_indices = lists.tensor([n, groups, config.select_count()]).expect("sizes");
        match op {
            Op::Dense => run!(dense, k, v, dk, dv, {}, {}),
            Op::Win => run!(win, k, v, dk, dv, {}, { gates: None, d_gates: None }),
            Op::Cmp => run!(
                cmp, k_blocks, v_blocks, dk_blocks, dv_blocks, { block_indices: None }, { gates: None, d_gates: None }
            ),
            Op::Slc => {
                run!(slc, k, v, dk, dv, { block_indices }, { block_indices, gates: None, d_gates: None });
            }
        }
        let mut bits = Vec::new();
        let mut outputs = vec![bf16::ZERO; o.len()];
        o.read(&mut outputs).expect("there");
        let rounded: Vec<f32> = outputs[*lead..].iter().map(|x| x.to_f32()).collect();
        let mut keep = |all: &[f32], offsets: &CuSeqlens, width: usize| {
            for s in (0..offsets.num_seqs()).filter(|&s| (self.kept)(s)) {
                let range = offsets.range(s);
                let kept = &all[range.start * width..range.end * width];
                assert!(kept.iter().all(|x| x.is_finite() || *x == f32::NEG_INFINITY), "{op:?}");
                bits.extend(kept.iter().map(|x| x.to_bits()));
            }
        };
        keep(&rounded, packing.cu_seqlens(), heads * dim_v);
        for (buffer, offsets, width) in [
            (&lse, packing.cu_seqlens(), heads),
            (&dq, packing.cu_seqlens(), heads * dim_k),
            (&dk, &offsets, groups * dim_k),
            (&dv, &offsets, groups * dim_v),
        ] {
            let mut all = vec![0.0; buffer.len()];
            buffer.read(&mut all).expect("there");
            keep(&all, offsets, width);
        }
        bits
    }
}

fn inputs(lead: usize, kept: fn(usize) -> bool) -> Inputs {
    Inputs { backend: Backend::cuda(0).expect("the simulator"), lead, kept }
}

/// The sequence in the middle with those around it NaN, then the other way round: how many results there are together.
fn assert_apart(op: Op, config: &NsaConfig) -> usize {
    let kept: [fn(usize) -> bool; 2] = [|s| s == 1, |s| s != 1];
    kept.map(|kept| inputs(0, kept).results(op, config).len()).iter().sum()
}

/// What is not a number in the sequences before and behind one reaches none of its outputs and gradients. Where tensors begin at
/// addresses that boxes cannot begin at, threads copy, and the bits are the same.
#[test]
fn boxes_hold_what_threads_copy() {
    on_an_h100("boxes::boxes_hold_what_threads_copy", || {
        let config = config([16, 2], [64, 64], 32);
        for op in [Op::Dense, Op::Win, Op::Cmp, Op::Slc] {
            let [boxes, threads] = [0, 1].map(|lead| inputs(lead, |_| true).results(op, &config));
            assert!(boxes == threads, "{op:?}");
            assert_eq!(assert_apart(op, &config), boxes.len(), "{op:?}");
        }
        // Blocks of two steps, boxes of several panels.
        for op in [Op::Win, Op::Slc] {
            assert_apart(op, &self::config([8, 1], [192, 128], 64));
        }
    });
}
