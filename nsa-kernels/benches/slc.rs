//! Attention over selected blocks, all of them far from the query and from one another: bound by arithmetic.

mod operands;

use criterion::{Criterion, criterion_group, criterion_main};
use nsa_core::{index, select};
use nsa_kernels::{Rows, Tensor, op::slc};
use operands::{Operands, SHAPES, tensor, tensor_mut};

fn forward(x: &mut Operands, lists: Tensor<'_, i32, 3>) {
    let (q, k, rows) = (x.queries(), x.keys(), x.rows());
    let args = slc::Forward {
        config: &x.config,
        packing: &x.packing,
        q: tensor(&x.q, q),
        k: Rows::packed(tensor(&x.k, k), &x.offsets),
        v: Rows::packed(tensor(&x.v, k), &x.offsets),
        block_indices: lists,
        o: tensor_mut(&mut x.o, q),
        lse: tensor_mut(&mut x.lse, rows),
    };
    slc::forward(&x.backend, args).expect("a legal call");
}

fn backward(x: &mut Operands, lists: Tensor<'_, i32, 3>) {
    let (q, k, rows) = (x.queries(), x.keys(), x.rows());
    let args = slc::Backward {
        config: &x.config,
        packing: &x.packing,
        q: tensor(&x.q, q),
        k: tensor(&x.k, k),
        v: tensor(&x.v, k),
        block_indices: lists,
        o: tensor(&x.o, q),
        lse: tensor(&x.lse, rows),
        d_o: tensor(&x.d_o, q),
        gates: None,
        d_gates: None,
        dq: tensor_mut(&mut x.dq, q),
        accumulate: false,
        dk: tensor_mut(&mut x.dk, k),
        dv: tensor_mut(&mut x.dv, k),
    };
    slc::backward(&x.backend, args).expect("a legal call");
}

/// The forced blocks, and others at equal distances, shifted by query and head.
fn lists(x: &Operands) -> Vec<i32> {
    let count = x.config.select_count() as i32;
    let list = |t: usize, g: usize| {
        let own = (t / x.config.select_block()) as i32;
        let mut list: Vec<i32> = if own < count {
            (0..=own).collect()
        } else {
            let (free, places) = (count - 3, own - 2);
            let inner = (0..free).map(|s| 1 + (s * places / free + (t + g) as i32 % (places / free)));
            [0].into_iter().chain(inner).chain([own - 1, own]).collect()
        };
        list.resize(count as usize, select::NO_BLOCK);
        list
    };
    (0..x.packing.num_tokens()).flat_map(|t| (0..x.config.num_kv_heads()).flat_map(move |g| list(t, g))).collect()
}

fn bench(criterion: &mut Criterion) {
    for shape in SHAPES {
        let mut operands = Operands::new(shape, 4096, |_, packing| packing.cu_seqlens().clone());
        let lists = lists(&operands);
        let shape = [operands.packing.num_tokens(), operands.config.num_kv_heads(), operands.config.select_count()];
        let count = shape[1] * shape[2];
        let pairs = |x: &Operands, t: usize| {
            let list = lists[t * count..][..shape[2]].iter().filter_map(|&j| usize::try_from(j).ok());
            list.map(|j| index::select_tokens(&x.config, j, t).len()).sum()
        };
        let forward = |x: &mut Operands| forward(x, tensor(&lists, shape));
        let backward = |x: &mut Operands| backward(x, tensor(&lists, shape));
        operands.measure(criterion, "slc", pairs, [&forward, &backward]);
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
