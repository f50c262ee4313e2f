//! Sliding-window attention: bound by arithmetic.

mod operands;

use criterion::{Criterion, criterion_group, criterion_main};
use nsa_core::index;
use nsa_kernels::{Rows, op::win};
use operands::{Operands, SHAPES, tensor, tensor_mut};

fn forward(x: &mut Operands) {
    let (q, k, rows) = (x.queries(), x.keys(), x.rows());
    let args = win::Forward {
        config: &x.config,
        packing: &x.packing,
        q: tensor(&x.q, q),
        k: Rows::packed(tensor(&x.k, k), &x.offsets),
        v: Rows::packed(tensor(&x.v, k), &x.offsets),
        o: tensor_mut(&mut x.o, q),
        lse: tensor_mut(&mut x.lse, rows),
    };
    win::forward(&x.backend, args).expect("a legal call");
}

fn backward(x: &mut Operands) {
    let (q, k, rows) = (x.queries(), x.keys(), x.rows());
    let args = win::Backward {
        config: &x.config,
        packing: &x.packing,
        q: tensor(&x.q, q),
        k: tensor(&x.k, k),
        v: tensor(&x.v, k),
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
    win::backward(&x.backend, args).expect("a legal call");
}

fn bench(criterion: &mut Criterion) {
    for shape in SHAPES {
        let mut operands = Operands::new(shape, 4096, |_, packing| packing.cu_seqlens().clone());
        let pairs = |x: &Operands, t| index::window_tokens(&x.config, t).len();
        operands.measure(criterion, "win", pairs, [&forward, &backward]);
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
