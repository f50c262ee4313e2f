//! The layer operations on the simulator against those of the CPU: the truth is the CPU's in f64, and the error may be
//! about that of the CPU in the same type.

use half::{bf16, f16};
use nsa_core::{DType, Element, Real};
use nsa_kernels::layer::{adamw, add, copy, cross_entropy, embedding, linear, rmsnorm, rope, round, sigmoid, swiglu};
use nsa_kernels::{Backend, Buffer, Isa};
use nsa_tests::compare::Compared;
use nsa_tests::sim::{BITS, on_an_a100};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What an operation wrote: name, elements of a row, type, values, a bound on the terms of its sums.
type Written = (&'static str, usize, DType, Vec<f64>, f64);

/// Makes operands in a backend's memory and reads results from it. `R` is the type that values are rounded to first.
pub struct Kit<'b, R> {
    backend: &'b Backend,
    of: std::marker::PhantomData<R>,
}

impl<'b, R: Element> Kit<'b, R> {
    pub fn new(backend: &'b Backend) -> Self {
        Self { backend, of: std::marker::PhantomData }
    }

    /// Numbers in (−2, 2), rounded to `R`, as elements of type `T`.
    pub fn values<T: Element>(&self, seed: u64, len: usize) -> Buffer<T> {
        self.upload(&random(seed, len))
    }

    fn upload<T: Element>(&self, values: &[f64]) -> Buffer<T> {
        self.backend.upload(&values.iter().map(|&x| T::from_f64(R::from_f64(x).to_f64())).collect::<Vec<_>>())
    }

    /// NaN, to be written.
    fn unwritten<T: Element>(&self, len: usize) -> Buffer<T> {
        self.backend.upload(&vec![T::from_f64(f64::NAN); len])
    }
}

fn random(seed: u64, len: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

fn read<T: Element>(buffer: &Buffer<T>) -> Vec<f64> {
    let mut values = vec![T::default(); buffer.len()];
    buffer.read(&mut values).expect("the device's work");
    values.iter().map(|x| x.to_f64()).collect()
}

/// A result, with the largest of its terms.
fn written<T: Element>(name: &'static str, row: usize, buffer: &Buffer<T>, magnitude: f64) -> Written {
    (name, row, T::DTYPE, read(buffer), magnitude)
}

/// Compares what an operation writes: `truth` in f64 on the CPU, `model` in the type on each of the CPU's paths, and on the
/// simulator.
fn compare(what: &str, truth: &[Written], models: &[Vec<Written>], kernel: &[Written]) {
    for (i, (name, row, storage, values, _)) in kernel.iter().enumerate() {
        let accumulator = if *storage == DType::F64 { DType::F64 } else { DType::F32 };
        let compared = Compared {
            tensor: format!("{what} {name}"),
            truth: truth[i].3.clone(),
            rounded: models.iter().map(|model| model[i].3.clone()).collect(),
            kernel: values.clone(),
            row: *row,
            storage: *storage,
            accumulator,
            draws: values.len() / row.max(&1),
            approximated: 0.0,
            magnitude: truth[i].4,
        };
        let outcome = compared.judge();
        println!("{BITS}{what} {name}: {:016x}", outcome.bits);
        assert_eq!(outcome.failure, None, "{what} {name}");
    }
}

fn paths() -> Vec<Backend> {
    Isa::available().map(|isa| Backend::with_isa(isa).expect("it is available")).collect()
}

/// Runs `$op::<T, R>(backend, args…)` for each type.
macro_rules! check {
    ($op:ident($($arg:expr),*)) => {{
        check!($op($($arg),*): f32);
        check!($op($($arg),*): bf16);
        check!($op($($arg),*): f16);
    }};
    ($op:ident($($arg:expr),*): $t:ty) => {{
        let (paths, cuda) = (paths(), Backend::cuda(0).expect("the simulator"));
        let truth = $op::<f64, $t>(&paths[0] $(, $arg)*);
        let models: Vec<_> = paths.iter().map(|path| $op::<$t, $t>(path $(, $arg)*)).collect();
        let kernel = $op::<$t, $t>(&cuda $(, $arg)*);
        compare(&format!("{} {:?} {}", stringify!($op), ($($arg,)*), <$t as Element>::DTYPE), &truth, &models, &kernel);
    }};
}

const SHAPES: [[usize; 2]; 5] = [[0, 8], [1, 1], [3, 7], [65, 33], [70, 72]];

fn elementwise<T: Element, R: Element>(backend: &Backend, shape: [usize; 2]) -> Vec<Written> {
    let (kit, [_, c], count) = (Kit::<R>::new(backend), shape, shape[0] * shape[1]);
    let (a, b) = (kit.values::<T>(1, count), kit.values::<T>(2, count));
    let wide = Kit::<R::Acc>::new(backend);
    let dy = wide.values::<T::Acc>(3, count);
    let (at, bt, dyt) = (a.tensor(shape).unwrap(), b.tensor(shape).unwrap(), dy.tensor(shape).unwrap());
    let mut outputs = [(); 5].map(|()| kit.unwritten::<T>(count));
    let [sum, y, squashed, d_gate, d_up] = &mut outputs;
    add::forward(backend, add::Forward { a: at, b: bt, y: sum.tensor_mut(shape).unwrap() }).unwrap();
    add::accumulate(backend, add::Accumulate { x: bt, y: sum.tensor_mut(shape).unwrap() }).unwrap();
    swiglu::forward(backend, swiglu::Forward { gate: at, up: bt, y: y.tensor_mut(shape).unwrap() }).unwrap();
    sigmoid::forward(backend, sigmoid::Forward { x: at, y: squashed.tensor_mut(shape).unwrap() }).unwrap();
    let (d_gate, d_up) = (d_gate.tensor_mut(shape).unwrap(), d_up.tensor_mut(shape).unwrap());
    swiglu::backward(backend, swiglu::Backward { gate: at, up: bt, dy: dyt, d_gate, d_up }).unwrap();
    let mut dx = kit.unwritten::<T::Acc>(count);
    let args = sigmoid::Backward { y: at, dy: dyt, dx: dx.tensor_mut(shape).unwrap() };
    sigmoid::backward(backend, args).unwrap();
    let mut rounded = kit.unwritten::<T>(count);
    let (x, y) = (dy.tensor([count]).unwrap(), rounded.tensor_mut([count]).unwrap());
    round::round(backend, round::Round { x, y }).unwrap();
    let names = ["sum", "swiglu", "sigmoid", "d gate", "d up"];
    let mut all: Vec<_> = names.into_iter().zip(&outputs).map(|(name, buffer)| written(name, c, buffer, 4.0)).collect();
    let mut widened = kit.unwritten::<T::Acc>(count);
    let (x, y) = (a.tensor([count]).unwrap(), widened.tensor_mut([count]).unwrap());
    round::widen(backend, round::Widen { x, y }).unwrap();
    all.extend([written("d sigmoid", c, &dx, 12.0), written("round", c, &rounded, 2.0)]);
    all.push(written("widen", c, &widened, 2.0));
    all
}

fn norm<T: Element, R: Element>(backend: &Backend, shape: [usize; 2], accumulate: bool) -> Vec<Written> {
    let (kit, [n, c], count) = (Kit::<R>::new(backend), shape, shape[0] * shape[1]);
    let (x, weight) = (kit.values::<T>(4, count), kit.values::<T>(5, c));
    let (mut y, mut rstd) = (kit.unwritten::<T>(count), kit.unwritten::<T::Acc>(n));
    let (xt, wt) = (x.tensor(shape).unwrap(), weight.tensor([c]).unwrap());
    let args = rmsnorm::Forward {
        x: xt,
        weight: wt,
        eps: 1e-5,
        y: y.tensor_mut(shape).unwrap(),
        rstd: Some(rstd.tensor_mut([n]).unwrap()),
    };
    rmsnorm::forward(backend, args).unwrap();
    let wide = Kit::<R::Acc>::new(backend);
    let (dy, mut dx, mut dw) =
        (wide.values::<T::Acc>(6, count), wide.values::<T::Acc>(7, count), wide.values::<T::Acc>(8, c));
    let args = rmsnorm::Backward {
        x: xt,
        weight: wt,
        rstd: rstd.tensor([n]).unwrap(),
        dy: dy.tensor(shape).unwrap(),
        dx: dx.tensor_mut(shape).unwrap(),
        accumulate,
        dw: dw.tensor_mut([c]).unwrap(),
    };
    rmsnorm::backward(backend, args).unwrap();
    let terms = (n as f64).sqrt() * 4.0;
    vec![
        written("y", c, &y, 4.0),
        written("rstd", 1, &rstd, 1.0),
        written("dx", c, &dx, 16.0),
        written("dw", c, &dw, terms),
    ]
}

fn rotated<T: Element, R: Element>(backend: &Backend, n: usize, heads: usize, dim: usize) -> Vec<Written> {
    let (kit, shape, count) = (Kit::<R>::new(backend), [n, heads, dim], n * heads * dim);
    let frequencies: Vec<f64> = (0..dim / 2).map(|i| 0.3 / (i + 1) as f64).collect();
    let cache = rope::RopeCache::<T::Acc>::new(backend, &frequencies, 1.25, 50);
    let positions: Buffer<i32> = backend.upload(&(0..n as i32).map(|i| i * 7 % 50).collect::<Vec<_>>());
    let (positions, x) = (positions.tensor([n]).unwrap(), kit.values::<T>(9, count));
    let (mut y, mut back) = (kit.unwritten::<T>(count), kit.values::<T>(9, count));
    let mut others = [1, 2, 3, 4, 5].map(|heads| kit.values::<T>(40 + heads as u64, n * heads * dim));
    let args = rope::Rotate { cache: &cache, positions, x: x.tensor(shape).unwrap(), y: y.tensor_mut(shape).unwrap() };
    rope::forward(backend, args).unwrap();
    let mut x = vec![back.tensor_mut(shape).unwrap()];
    x.extend(others.iter_mut().enumerate().map(|(i, x)| x.tensor_mut([n, i + 1, dim]).unwrap()));
    rope::backward_in_place(backend, rope::RotateInPlace { cache: &cache, positions, x }).unwrap();
    let mut all = vec![written("y", dim, &y, 4.0), written("back", dim, &back, 4.0)];
    all.extend(others.iter().map(|x| written("others", dim, x, 4.0)));
    all
}

fn embedded<T: Element, R: Element>(backend: &Backend, n: usize, c: usize) -> Vec<Written> {
    const V: usize = 11;
    let kit = Kit::<R>::new(backend);
    let tokens: Buffer<u32> = backend.upload(&(0..n as u32).map(|i| i * i % V as u32).collect::<Vec<_>>());
    let (weight, mut y) = (kit.values::<T>(10, V * c), kit.unwritten::<T>(n * c));
    let (tokens, weight) = (tokens.tensor([n]).unwrap(), weight.tensor([V, c]).unwrap());
    embedding::forward(backend, embedding::Forward { tokens, weight, y: y.tensor_mut([n, c]).unwrap() }).unwrap();
    let wide = Kit::<R::Acc>::new(backend);
    let (dy, mut dw) = (wide.values::<T::Acc>(11, n * c), wide.values::<T::Acc>(12, V * c));
    let (dy, dw_out) = (dy.tensor([n, c]).unwrap(), dw.tensor_mut([V, c]).unwrap());
    embedding::backward(backend, embedding::Backward { tokens, dy, dw: dw_out }).unwrap();
    vec![written("y", c, &y, 2.0), written("dw", c, &dw, 2.0 * (n as f64).sqrt())]
}

fn optimizer(backend: &Backend, rounded: bool, count: usize) -> Vec<Written> {
    fn run<A: Real>(backend: &Backend, count: usize) -> Vec<Written> {
        let kit = Kit::<f32>::new(backend);
        let (grads, mut params) = (kit.values::<A>(13, count), kit.values::<A>(14, count));
        let (mut m, mut v) = (backend.alloc::<A>(count), backend.alloc::<A>(count));
        let config = adamw::AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        for step in 1..=3 {
            let args = adamw::Step {
                config,
                step,
                grad_scale: 0.5,
                grads: grads.tensor([count]).unwrap(),
                params: params.tensor_mut([count]).unwrap(),
                m: m.tensor_mut([count]).unwrap(),
                v: v.tensor_mut([count]).unwrap(),
            };
            adamw::step(backend, args).unwrap();
        }
        let squares = adamw::sum_of_squares(backend, grads.tensor([count]).unwrap()).unwrap();
        vec![
            written("params", 1, &params, 2.0),
            written("m", 1, &m, 2.0),
            written("v", 1, &v, 4.0),
            ("squares", 1, DType::F64, vec![squares], 64.0 * squares),
        ]
    }
    if rounded { run::<f32>(backend, count) } else { run::<f64>(backend, count) }
}

/// Types of activations, weights, gradients of the output and of the input.
fn linear_of<T, W, R, RW>(backend: &Backend, [n, i, o]: [usize; 3], accumulate: bool, bias: bool) -> Vec<Written>
where
    T: Element,
    W: Element<Acc = T::Acc>,
    R: Element,
    RW: Element,
{
    let (kit, weights) = (Kit::<R>::new(backend), Kit::<RW>::new(backend));
    let (x, w, b) = (kit.values::<T>(15, n * i), weights.values::<W>(16, o * i), weights.values::<W>(17, o));
    let mut y = kit.values::<T>(18, n * o);
    let (xt, wt) = (x.tensor([n, i]).unwrap(), w.tensor([o, i]).unwrap());
    let bias = bias.then(|| b.tensor([o]).unwrap());
    let args = linear::Forward { x: xt, weight: wt, bias, y: y.tensor_mut([n, o]).unwrap(), accumulate };
    linear::forward(backend, args).unwrap();
    // Gradients that their rounding to the other operand's type leaves as they are.
    let short = Kit::<RW>::new(backend);
    let short_values = |seed, len| short.values::<T::Acc>(seed, len);
    let (dy, mut dx) = (short_values(19, n * o), Kit::<R::Acc>::new(backend).values::<T::Acc>(20, n * i));
    let dyt = dy.tensor([n, o]).unwrap();
    let args = linear::BackwardInput { dy: dyt, weight: wt, dx: dx.tensor_mut([n, i]).unwrap(), accumulate };
    linear::backward_input(backend, args).unwrap();
    let dy: Buffer<T> = kit.values(21, n * o);
    let wide = Kit::<R::Acc>::new(backend);
    let (mut dw, mut db) = (wide.values::<T::Acc>(22, o * i), wide.values::<T::Acc>(23, o));
    let args = linear::BackwardWeight {
        x: xt,
        dy: dy.tensor([n, o]).unwrap(),
        dw: dw.tensor_mut([o, i]).unwrap(),
        db: Some(db.tensor_mut([o]).unwrap()),
    };
    linear::backward_weight(backend, args).unwrap();
    let terms = |count: usize| 4.0 * (count as f64).sqrt() + 2.0;
    vec![
        written("y", o, &y, terms(i)),
        written("dx", i, &dx, terms(o)),
        written("dw", i, &dw, terms(n)),
        written("db", 1, &db, terms(n)),
    ]
}

/// Activations of `$t`, weights of `$w`.
macro_rules! check_linear {
    ($t:ty, $w:ty) => {{
        let (paths, cuda) = (paths(), Backend::cuda(0).expect("the simulator"));
        for (shape, accumulate, bias) in [
            ([0, 3, 2], false, false),
            ([2, 0, 3], true, true),
            ([1, 5, 7], false, true),
            ([33, 40, 24], true, false),
            ([70, 16, 9], true, true),
            ([3, 72, 20], true, false),
            ([11, 264, 33], false, true),
            // Enough outputs that a warp takes several.
            ([9, 16, 4500], true, true),
        ] {
            let truth = linear_of::<f64, f64, $t, $w>(&paths[0], shape, accumulate, bias);
            let run = |backend| linear_of::<$t, $w, $t, $w>(backend, shape, accumulate, bias);
            let models: Vec<_> = paths.iter().map(run).collect();
            let what = format!("linear {shape:?} {accumulate} {bias} {} {}", <$t>::DTYPE, <$w>::DTYPE);
            compare(&what, &truth, &models, &run(&cuda));
        }
    }};
}

/// Loss and gradients, gradients of logits rounded to the head's type as the device rounds them.
fn plain_loss<R: Element>([n, c, v]: [usize; 3], targets: &[u32], scale: f64) -> Vec<Written> {
    let value = |seed, len| random(seed, len).into_iter().map(|x| R::from_f64(x).to_f64()).collect::<Vec<_>>();
    let (hidden, weight) = (value(24, n * c), value(25, v * c));
    let (mut losses, mut d_hidden, mut d_weight) = (vec![0.0; n], vec![0.0; n * c], vec![0.5; v * c]);
    for (row, &target) in targets.iter().enumerate().filter(|(_, target)| **target != cross_entropy::IGNORED) {
        let x = &hidden[row * c..][..c];
        let z: Vec<f64> = weight.chunks(c).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
        let sum = z.iter().map(|z| z.exp()).sum::<f64>();
        losses[row] = sum.ln() - z[target as usize];
        for (token, z) in z.iter().enumerate() {
            let dz = scale * (z.exp() / sum - f64::from(token == target as usize));
            let dz = if R::DTYPE == DType::F32 { dz } else { R::from_f64(dz).to_f64() };
            for k in 0..c {
                d_hidden[row * c + k] += dz * weight[token * c + k];
                d_weight[token * c + k] += dz * x[k];
            }
        }
    }
    let loss = losses.iter().sum();
    vec![
        ("losses", 1, DType::F32, losses, 8.0),
        ("loss", 1, DType::F64, vec![loss, loss], loss),
        ("d hidden", c, DType::F32, d_hidden, 4.0),
        ("d weight", c, DType::F32, d_weight, 4.0),
    ]
}

fn loss_of<T: Element>(backend: &Backend, [n, c, v]: [usize; 3], targets: &[u32], scale: f64) -> Vec<Written> {
    let kit = Kit::<T>::new(backend);
    let (hidden, weight) = (kit.values::<T>(24, n * c), kit.values::<T>(25, v * c));
    let targets = backend.upload(targets);
    let (hidden, weight) = (hidden.tensor([n, c]).unwrap(), weight.tensor([v, c]).unwrap());
    let targets = targets.tensor([n]).unwrap();
    let mut losses = kit.unwritten::<T::Acc>(n);
    let args = cross_entropy::Forward { hidden, weight, targets, losses: Some(losses.tensor_mut([n]).unwrap()) };
    let first = cross_entropy::forward(backend, args).unwrap();
    let mut d_hidden = kit.unwritten::<T::Acc>(n * c);
    let mut d_weight: Buffer<T::Acc> = kit.upload(&vec![0.5; v * c]);
    let args = cross_entropy::ForwardBackward {
        hidden,
        weight,
        targets,
        scale,
        d_hidden: d_hidden.tensor_mut([n, c]).unwrap(),
        d_weight: Some(d_weight.tensor_mut([v, c]).unwrap()),
    };
    let second = cross_entropy::forward_backward(backend, args).unwrap();
    assert_eq!(first.count, second.count);
    vec![
        written("losses", 1, &losses, 8.0),
        ("loss", 1, DType::F64, vec![first.sum, second.sum], 1.0),
        written("d hidden", c, &d_hidden, 4.0),
        written("d weight", c, &d_weight, 4.0),
    ]
}

/// Largest errors within a few units of f32 and one rounding of a 16-bit gradient, which a near tie may turn the other way.
fn check_loss<T: Element>() {
    let cuda = Backend::cuda(0).expect("the simulator");
    for shape in [[0, 3, 5], [1, 1, 1], [37, 12, 300]] {
        let [n, _, v] = shape;
        let target = |i: usize| if i % 5 == 3 { cross_entropy::IGNORED } else { (i * 7 % v) as u32 };
        let targets: Vec<u32> = (0..n).map(target).collect();
        let scale = 0.25;
        let truth = plain_loss::<T>(shape, &targets, scale);
        let unit = if T::DTYPE == DType::F32 { 0.0 } else { scale * 2f64.powi(-9) };
        for ((name, _, _, want, size), (_, _, _, got, _)) in
            truth.iter().zip(loss_of::<T>(&cuda, shape, &targets, scale))
        {
            let bound = 1e-5 * size.max(1.0) + unit;
            for (i, (got, want)) in got.iter().zip(want).enumerate() {
                assert!((got - want).abs() <= bound, "{name}[{i}] {shape:?} {}: {got}, expected {want}", T::DTYPE);
            }
        }
    }
}

#[test]
fn each_element_by_itself() {
    on_an_a100("layer::each_element_by_itself", || {
        for shape in SHAPES {
            check!(elementwise(shape));
        }
    });
}

#[test]
fn norms() {
    on_an_a100("layer::norms", || {
        for shape in [[0, 8], [1, 1], [5, 33], [70, 128], [3, 1032], [130, 300]] {
            check!(norm(shape, shape[0] % 2 == 1));
        }
    });
}

#[test]
fn rotations() {
    on_an_a100("layer::rotations", || {
        check!(rotated(9, 3, 64));
        check!(rotated(4, 2, 6));
        check!(rotated(0, 2, 16));
    });
}

/// Several layers of one input have the bits of each layer alone, and rotations of several tensors those of each.
fn check_together<T: Element, W: Element<Acc = T::Acc>>(rows: usize) {
    const INPUTS: usize = 96;
    let (cuda, cpu) = (Backend::cuda(0).expect("the simulator"), Backend::pick(Some("cpu")).unwrap().0);
    let outputs = [5, 0, 300, 64, 64, 1, 7, 33, 16, 2];
    let of = |backend: &Backend, together: bool| {
        let x = Kit::<T>::new(backend).values::<T>(21, rows * INPUTS);
        let x = x.tensor([rows, INPUTS]).unwrap();
        let weights = outputs.map(|o| Kit::<W>::new(backend).values::<W>(30 + o as u64, o * INPUTS));
        let mut y = outputs.map(|o| Kit::<T>::new(backend).unwritten::<T>(rows * o));
        let layers = weights.iter().zip(&mut y).zip(outputs);
        let layers = layers.map(|((w, y), o)| (w.tensor([o, INPUTS]).unwrap(), y.tensor_mut([rows, o]).unwrap()));
        if together {
            let products = layers.map(|(weight, y)| linear::Product { weight, y }).collect();
            linear::forward_all(backend, x, products).unwrap();
        } else {
            for (weight, y) in layers {
                let args = linear::Forward { x, weight, bias: None, y, accumulate: false };
                linear::forward(backend, args).unwrap();
            }
        }
        y.iter().map(read).collect::<Vec<_>>()
    };
    let expected = of(&cuda, false);
    let same = of(&cuda, true) == expected;
    assert!(same || T::DTYPE == W::DTYPE && rows <= 16, "{rows} rows");
    assert_eq!(of(&cpu, true), of(&cpu, false));
    // Where the library makes the products of one layer, its order of sums is another one.
    for (got, want) in of(&cuda, true).iter().flatten().zip(of(&cpu, false).iter().flatten()) {
        let unit = if T::DTYPE == DType::F32 { 1e-5 } else { 2f64.powi(-7) };
        assert!((got - want).abs() <= unit * want.abs().max(1.0), "{rows} rows: {got}, expected {want}");
    }
}

#[test]
fn layers_of_one_input() {
    on_an_a100("layer::layers_of_one_input", || {
        for rows in [0, 1, 3, 16, 17] {
            check_together::<f32, f32>(rows);
            check_together::<f32, bf16>(rows);
        }
        check_together::<bf16, bf16>(5);
    });
}

/// Copies of several lengths, more than one launch makes, to places of every alignment.
fn check_copies<T: Element>() {
    let cuda = Backend::cuda(0).expect("the simulator");
    let (source, mut target) = (Kit::<T>::new(&cuda).values::<T>(3, 9000), cuda.alloc::<T>(9000));
    let (mut copies, mut rest) = (Vec::new(), target.tensor_mut([9000]).unwrap());
    let (mut at, mut expected) = (0, vec![0.0; 9000]);
    let values = read(&source);
    for i in 0..40 {
        let (gap, count) = (i % 3, [0, 1, 8, 3, 64, 800][i % 6]);
        let (_, after) = rest.split_at(gap).unwrap();
        let (target, after) = after.split_at(count).unwrap();
        let from = 8 * i + i % 5 / 3;
        copies.push(copy::Piece { source: source.tensor_at(from, [count]).unwrap(), target });
        expected[at + gap..][..count].copy_from_slice(&values[from..][..count]);
        (at, rest) = (at + gap + count, after);
    }
    copy::all(&cuda, copies).unwrap();
    assert_eq!(read(&target), expected);
}

#[test]
fn copies() {
    on_an_a100("layer::copies", || {
        check_copies::<f32>();
        check_copies::<bf16>();
    });
}

#[test]
fn embeddings() {
    on_an_a100("layer::embeddings", || {
        check!(embedded(0, 8));
        check!(embedded(7, 5));
        check!(embedded(300, 24));
    });
}

#[test]
fn optimizers() {
    on_an_a100("layer::optimizers", || {
        let (paths, cuda) = (paths(), Backend::cuda(0).expect("the simulator"));
        for count in [0, 1, 7, 40_003] {
            let models: Vec<_> = paths.iter().map(|path| optimizer(path, true, count)).collect();
            compare(
                &format!("adamw {count}"),
                &optimizer(&paths[0], false, count),
                &models,
                &optimizer(&cuda, true, count),
            );
        }
    });
}

#[test]
fn products() {
    on_an_a100("layer::products", || {
        check_linear!(f32, f32);
        check_linear!(bf16, bf16);
        check_linear!(f16, f16);
        check_linear!(f32, bf16);
        check_linear!(bf16, f32);
    });
}

#[test]
fn losses() {
    on_an_a100("layer::losses", || {
        check_loss::<f32>();
        check_loss::<bf16>();
        check_loss::<f16>();
    });
}

#[test]
fn what_is_not_there_is_an_error() {
    on_an_a100("layer::what_is_not_there_is_an_error", || {
        let (cuda, cpu) = (Backend::cuda(0).expect("the simulator"), Backend::pick(Some("cpu")).unwrap().0);
        let message = |result: nsa_kernels::Result<()>| result.unwrap_err().to_string();
        let (x, mut y) = (cpu.alloc::<f32>(6), cuda.alloc::<f32>(6));
        let x = x.tensor([2, 3]).unwrap();
        let on_host = message(sigmoid::forward(&cuda, sigmoid::Forward { x, y: y.tensor_mut([2, 3]).unwrap() }));
        assert_eq!(on_host, "sigmoid::forward: `x` is in the memory of the host, expected that of cuda:0");
        let (x, mut y) = (cuda.alloc::<f64>(6), cuda.alloc::<f64>(6));
        let (x, y) = (x.tensor([2, 3]).unwrap(), y.tensor_mut([2, 3]).unwrap());
        let double = message(sigmoid::forward(&cuda, sigmoid::Forward { x, y }));
        assert!(double.contains("`cuda:0` has no kernel for tensors of f64"), "{double}");
        let missing = Backend::cuda(9).unwrap_err().to_string();
        assert!(missing.contains("`cuda:9` is not available: the driver shows 1 device(s)"), "{missing}");
        let huge = cuda.alloc::<f32>(1 << 50);
        let error = huge.tensor([1]).unwrap_err().to_string();
        assert!(error.contains("OUT_OF_MEMORY"), "{error}");
        let wrong = [1u32, 99, 0];
        let targets = cuda.upload(&wrong);
        let (hidden, weight) = (cuda.alloc::<f32>(6), cuda.alloc::<f32>(8));
        let args = cross_entropy::Forward {
            hidden: hidden.tensor([3, 2]).unwrap(),
            weight: weight.tensor([4, 2]).unwrap(),
            targets: targets.tensor([3]).unwrap(),
            losses: None,
        };
        let error = cross_entropy::forward(&cuda, args).unwrap_err().to_string();
        assert!(error.contains("99 at position 1"), "{error}");
    });
}
