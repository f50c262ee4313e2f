//! What calls take of a workspace is what is said before.

use super::layer::Kit;
use half::bf16;
use nsa_core::{CompressKind, DType, Element};
use nsa_kernels::Backend;
use nsa_kernels::cuda::Cuda;
use nsa_kernels::cuda::workspace::{PhiParts, Workspace, layer};
use nsa_kernels::layer::{adamw, cross_entropy, linear, rmsnorm};
use nsa_tests::check::Op;
use nsa_tests::generate::Side;
use nsa_tests::{Case, sim::on_an_a100};

/// Bytes of a workspace that a case's calls take, as they are known before.
pub fn of_case(cuda: &Cuda, op: Op, case: &Case, dtype: DType) -> usize {
    let (config, packing) = (&case.config, case.packing());
    let needs = cuda.needs(config, &packing, dtype).expect("short");
    let of_phi = |side: Side, position| {
        // Keys have one bias, values the other.
        let mlp = config.compress_kind() == CompressKind::Mlp;
        let given = PhiParts { position, bias1: mlp && side == Side::Key, bias2: mlp && side == Side::Value };
        let dim = side.dim(config);
        needs.compress_forward(dim, given).max(needs.compress_backward(dim, given))
    };
    match op {
        // Keys without embedding in some cases.
        Op::Compress => of_phi(Side::Key, case.tokens().is_multiple_of(2)).max(of_phi(Side::Value, true)),
        Op::Cmp => needs.cmp_forward().max(needs.cmp_backward()),
        Op::Slc => needs.slc_forward().max(needs.slc_backward()),
        Op::Win => needs.win_backward(),
        Op::Gate => 0,
        Op::Nsa => [Side::Key, Side::Value]
            .map(|side| of_phi(side, true))
            .into_iter()
            .fold(needs.nsa_forward().max(needs.nsa_backward()), usize::max),
        // The step has memory of its own; blocks are compressed elsewhere.
        Op::Decode => 0,
        Op::Dense => needs.dense_forward().max(needs.dense_backward()),
    }
}

/// Bytes of the workspace that a call took, and those that were said before.
fn took(cuda: &Cuda, what: &str, said: usize, work: impl FnOnce() -> nsa_kernels::Result<()>) {
    let mut workspace = Workspace::new(cuda);
    cuda.with_workspace(&mut workspace, work).expect("runs");
    assert_eq!(workspace.bytes(), said, "{what}");
}

/// A linear layer of x and dx of type `T`, a weight of type `W`, a gradient dy of type `G`.
fn linear_takes<T, W, G>(backend: &Backend, cuda: &Cuda, sizes: layer::Linear)
where
    T: Element<Acc = f32>,
    W: Element<Acc = f32>,
    G: Element<Acc = f32>,
{
    let layer::Linear { rows, inputs, outputs } = sizes;
    let (kit, types) = (Kit::<bf16>::new(backend), [T::DTYPE, W::DTYPE, G::DTYPE]);
    let (x, weight) = (kit.values::<T>(1, rows * inputs), kit.values::<W>(2, outputs * inputs));
    let (b, dy) = (kit.values::<W>(3, outputs), kit.values::<G>(4, rows * outputs));
    let (mut y, mut dx) = (kit.values::<T>(5, rows * outputs), kit.values::<T>(6, rows * inputs));
    let (mut dw, mut db) = (kit.values::<f32>(7, outputs * inputs), kit.values::<f32>(8, outputs));
    for (bias, accumulate) in [(false, false), (true, false), (false, true), (true, true)] {
        let what = format!("{sizes:?}, {types:?}, bias {bias}, accumulate {accumulate}");
        let args = linear::Forward {
            x: x.tensor([rows, inputs]).unwrap(),
            weight: weight.tensor([outputs, inputs]).unwrap(),
            bias: bias.then(|| b.tensor([outputs]).unwrap()),
            y: y.tensor_mut([rows, outputs]).unwrap(),
            accumulate,
        };
        let said = layer::linear_forward(sizes, [T::DTYPE, W::DTYPE], bias, accumulate);
        took(cuda, &format!("forward of {what}"), said, || linear::forward(backend, args));
        let args = linear::BackwardInput {
            dy: dy.tensor([rows, outputs]).unwrap(),
            weight: weight.tensor([outputs, inputs]).unwrap(),
            dx: dx.tensor_mut([rows, inputs]).unwrap(),
            accumulate,
        };
        let said = layer::linear_backward_input(sizes, [G::DTYPE, W::DTYPE, T::DTYPE], accumulate);
        took(cuda, &format!("input of {what}"), said, || linear::backward_input(backend, args));
        let args = linear::BackwardWeight {
            x: x.tensor([rows, inputs]).unwrap(),
            dy: dy.tensor([rows, outputs]).unwrap(),
            dw: dw.tensor_mut([outputs, inputs]).unwrap(),
            db: bias.then(|| db.tensor_mut([outputs]).unwrap()),
        };
        let said = layer::linear_backward_weight(sizes, [T::DTYPE, G::DTYPE], bias);
        took(cuda, &format!("weight of {what}"), said, || linear::backward_weight(backend, args));
    }
}

/// A head and its loss, of an input of type `T` and a weight of type `W`.
fn head_takes<T: Element<Acc = f32>, W: Element<Acc = f32>>(backend: &Backend, cuda: &Cuda, sizes: layer::Head) {
    let layer::Head { rows, channels, vocabulary } = sizes;
    let (kit, types) = (Kit::<bf16>::new(backend), [T::DTYPE, W::DTYPE]);
    let (hidden, weight) = (kit.values::<T>(1, rows * channels), kit.values::<W>(2, vocabulary * channels));
    let targets = backend.upload(&(0..rows as u32).map(|row| row % vocabulary as u32).collect::<Vec<_>>());
    let (mut losses, mut d_hidden) = (kit.values::<f32>(3, rows), kit.values::<f32>(4, rows * channels));
    let mut dw = kit.values::<f32>(5, vocabulary * channels);
    for given in [false, true] {
        let what = format!("{sizes:?}, {types:?}, {given}");
        let args = cross_entropy::Forward {
            hidden: hidden.tensor([rows, channels]).unwrap(),
            weight: weight.tensor([vocabulary, channels]).unwrap(),
            targets: targets.tensor([rows]).unwrap(),
            losses: given.then(|| losses.tensor_mut([rows]).unwrap()),
        };
        let said = layer::cross_entropy_forward(sizes, types, given);
        took(cuda, &what, said, || cross_entropy::forward(backend, args).map(drop));
        let args = cross_entropy::ForwardBackward {
            hidden: hidden.tensor([rows, channels]).unwrap(),
            weight: weight.tensor([vocabulary, channels]).unwrap(),
            targets: targets.tensor([rows]).unwrap(),
            scale: 1.0,
            d_hidden: d_hidden.tensor_mut([rows, channels]).unwrap(),
            d_weight: given.then(|| dw.tensor_mut([vocabulary, channels]).unwrap()),
        };
        let said = layer::cross_entropy_forward_backward(sizes, types, given);
        took(cuda, &what, said, || cross_entropy::forward_backward(backend, args).map(drop));
    }
}

/// What layers take of a workspace is what is said before.
#[test]
fn layers_take_what_is_said() {
    on_an_a100("needs::layers_take_what_is_said", || {
        let backend = Backend::cuda(0).expect("the simulator");
        let Backend::Cuda(cuda) = &backend else { panic!("a CUDA device") };
        for rows in [16, 17, 300] {
            let sizes = layer::Linear { rows, inputs: 40, outputs: 72 };
            linear_takes::<f32, f32, f32>(&backend, cuda, sizes);
            linear_takes::<bf16, f32, f32>(&backend, cuda, sizes);
            linear_takes::<bf16, bf16, f32>(&backend, cuda, sizes);
        }
        for rows in [0, 3, 290] {
            let sizes = layer::Head { rows, channels: 24, vocabulary: 50 };
            head_takes::<f32, f32>(&backend, cuda, sizes);
            head_takes::<bf16, f32>(&backend, cuda, sizes);
            head_takes::<bf16, bf16>(&backend, cuda, sizes);
        }
        let kit = Kit::<bf16>::new(&backend);
        let (rows, channels) = (130, 64);
        let (x, weight) = (kit.values::<bf16>(1, rows * channels), kit.values::<bf16>(2, channels));
        let (rstd, dy) = (kit.values::<f32>(3, rows), kit.values::<f32>(4, rows * channels));
        let (mut dx, mut dw) = (kit.values::<f32>(5, rows * channels), kit.values::<f32>(6, channels));
        let args = rmsnorm::Backward {
            x: x.tensor([rows, channels]).unwrap(),
            weight: weight.tensor([channels]).unwrap(),
            rstd: rstd.tensor([rows]).unwrap(),
            dy: dy.tensor([rows, channels]).unwrap(),
            dx: dx.tensor_mut([rows, channels]).unwrap(),
            accumulate: false,
            dw: dw.tensor_mut([channels]).unwrap(),
        };
        took(cuda, "rmsnorm", layer::rmsnorm_backward(rows, channels), || rmsnorm::backward(&backend, args));
        let grads = kit.values::<f32>(7, 40_000);
        took(cuda, "adamw", layer::adamw_sum_of_squares(grads.len()), || {
            adamw::sum_of_squares(&backend, grads.tensor([40_000]).unwrap()).map(drop)
        });
    });
}
