//! Compressed attention with selection: bound by arithmetic.

mod operands;

use criterion::{Criterion, criterion_group, criterion_main};
use nsa_core::index;
use nsa_kernels::{Rows, op::cmp};
use operands::{Operands, SHAPES, tensor, tensor_mut};
use std::cell::RefCell;

fn forward(x: &mut Operands, lists: &mut [i32]) {
    let (q, k, rows) = (x.queries(), x.keys(), x.rows());
    let args = cmp::Forward {
        config: &x.config,
        packing: &x.packing,
        q: tensor(&x.q, q),
        k_blocks: Rows::packed(tensor(&x.k, k), &x.offsets),
        v_blocks: Rows::packed(tensor(&x.v, k), &x.offsets),
        o: tensor_mut(&mut x.o, q),
        lse: tensor_mut(&mut x.lse, rows),
        block_indices: Some(tensor_mut(lists, [q[0], k[1], x.config.select_count()])),
    };
    cmp::forward(&x.backend, args).expect("a legal call");
}

fn backward(x: &mut Operands) {
    let (q, k, rows) = (x.queries(), x.keys(), x.rows());
    let args = cmp::Backward {
        config: &x.config,
        packing: &x.packing,
        q: tensor(&x.q, q),
        k_blocks: tensor(&x.k, k),
        v_blocks: tensor(&x.v, k),
        o: tensor(&x.o, q),
        lse: tensor(&x.lse, rows),
        d_o: tensor(&x.d_o, q),
        gates: None,
        d_gates: None,
        dq: tensor_mut(&mut x.dq, q),
        accumulate: false,
        dk_blocks: tensor_mut(&mut x.dk, k),
        dv_blocks: tensor_mut(&mut x.dv, k),
    };
    cmp::backward(&x.backend, args).expect("a legal call");
}

fn bench(criterion: &mut Criterion) {
    for shape in SHAPES {
        let blocks = |config: &_, packing: &nsa_core::Packing| packing.cu_blocks(config).expect("a short sequence");
        let mut operands = Operands::new(shape, 8192, blocks);
        let pairs = |x: &Operands, t| index::visible_blocks(&x.config, t);
        let lists = RefCell::new(vec![0; operands.packing.num_tokens() * operands.config.num_kv_heads() * 16]);
        let forward = |x: &mut Operands| forward(x, &mut lists.borrow_mut());
        operands.measure(criterion, "cmp", pairs, [&forward, &backward]);
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
