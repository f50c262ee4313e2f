use crate::kit::*;
use half::{bf16, f16};
use nsa_core::{Element, Real};
use nsa_kernels::layer::linear::{self, BackwardInput, BackwardWeight, Forward, Product};
use nsa_kernels::{Backend, Error};

/// [N, I, O]: empty ones, odd ones, each path by the number of rows, and more than one block, panel and task.
const SHAPES: [[usize; 3]; 17] = [
    [0, 3, 2],
    [3, 0, 5],
    [9, 0, 5],
    [2, 5, 0],
    [1, 1, 1],
    [1, 37, 19],
    [1, 700, 201],
    [3, 1, 7],
    [4, 301, 65],
    [5, 33, 600],
    [9, 600, 1030],
    [17, 300, 65],
    [64, 64, 64],
    [257, 41, 33],
    [300, 600, 450],
    [400, 259, 131],
    [2100, 33, 70],
];

/// Σ_k a(k)·b(k), and the sum of the magnitudes.
fn sum(len: usize, term: impl Fn(usize) -> f64) -> (f64, f64) {
    (0..len).map(term).fold((0.0, 0.0), |(sum, scale), term| (sum + term, scale + term.abs()))
}

fn check_forward<T: Element, W: Element<Acc = T::Acc>>(backend: &Backend) {
    for (seed, [n, i, o]) in SHAPES.into_iter().enumerate() {
        let seed = 100 * seed as u64;
        let (x, w) = (random::<T>(seed, n * i), random::<W>(seed + 1, o * i));
        let (bias, old) = (random::<W>(seed + 2, o), random::<T>(seed + 3, n * o));
        let (x_rows, w_rows) = (Gapped::new(&x, [n, i], 3), Gapped::new(&w, [o, i], 5));
        let (x, w) = (exact(&x), exact(&w));
        let products = (0..n * o).map(|at| sum(i, |k| x[at / o * i + k] * w[at % o * i + k]));
        let (sums, scales): (Vec<f64>, Vec<f64>) = products.unzip();
        for (accumulate, with_bias) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut y = if accumulate { old.clone() } else { vec![T::from_f64(f64::NAN); n * o] };
            let added = |at: usize| {
                let bias = if with_bias { bias[at % o].to_f64() } else { 0.0 };
                (bias, if accumulate { old[at].to_f64() } else { 0.0 })
            };
            let want: Vec<f64> = (0..n * o).map(|at| sums[at] + added(at).0 + added(at).1).collect();
            let scale: Vec<f64> = (0..n * o).map(|at| scales[at] + added(at).0.abs() + added(at).1.abs()).collect();
            let args = Forward {
                x: x_rows.tensor(),
                weight: w_rows.tensor(),
                bias: with_bias.then(|| tensor(&bias, [o])),
                y: tensor_mut(&mut y, [n, o]),
                accumulate,
            };
            linear::forward(backend, args).unwrap();
            let what = format!("{} × {} y {n}x{i}x{o} {accumulate} {with_bias}", T::DTYPE, W::DTYPE);
            assert_near(&what, &y, &want, &scale, 4.0 + (i as f64).sqrt());
        }
    }
}

#[test]
fn forward_is_a_plain_loop() {
    for backend in backends() {
        check_forward::<f64, f64>(&backend);
        check_forward::<f32, f32>(&backend);
        check_forward::<f32, bf16>(&backend);
        check_forward::<f32, f16>(&backend);
        check_forward::<bf16, bf16>(&backend);
        check_forward::<bf16, f32>(&backend);
        check_forward::<f16, f32>(&backend);
    }
}

#[test]
fn several_layers_are_each_as_alone() {
    fn check<T: Element, W: Element<Acc = T::Acc>>(backend: &Backend) {
        for (n, i) in [(0, 5), (1, 700), (3, 33), (40, 65)] {
            let x = random::<T>(n as u64, n * i);
            let outputs = [19, 0, 1, 130];
            let weights = outputs.map(|o| random::<W>(o as u64, o * i));
            let mut together = outputs.map(|o| vec![T::from_f64(f64::NAN); n * o]);
            let products = weights.iter().zip(&mut together).zip(outputs);
            let products = products.map(|((w, y), o)| Product { weight: tensor(w, [o, i]), y: tensor_mut(y, [n, o]) });
            linear::forward_all(backend, tensor(&x, [n, i]), products.collect()).unwrap();
            for ((weight, together), o) in weights.iter().zip(&together).zip(outputs) {
                let mut y = vec![T::from_f64(f64::NAN); n * o];
                let (x, weight) = (tensor(&x, [n, i]), tensor(weight, [o, i]));
                let args = Forward { x, weight, bias: None, y: tensor_mut(&mut y, [n, o]), accumulate: false };
                linear::forward(backend, args).unwrap();
                assert!(*together == y, "{} × {} {n}x{i}x{o}", T::DTYPE, W::DTYPE);
            }
        }
    }
    for backend in backends() {
        check::<f32, f32>(&backend);
        check::<f32, bf16>(&backend);
        check::<bf16, bf16>(&backend);
    }
    let (x, weight, mut y) = (vec![0.0f32; 6], vec![0.0f32; 8], vec![0.0f32; 8]);
    let product = Product { weight: tensor(&weight, [4, 2]), y: tensor_mut(&mut y, [2, 4]) };
    let error = linear::forward_all(&backend(), tensor(&x, [2, 3]), vec![product]).unwrap_err().to_string();
    assert_eq!(error, "linear::forward_all: `weight` has shape [4, 2], expected [4, 3]");
}

fn check_backward_input<W: Element>(backend: &Backend) {
    for (seed, [n, i, o]) in SHAPES.into_iter().enumerate() {
        let seed = 1000 + 100 * seed as u64;
        let (dy, w, old) = (random::<W::Acc>(seed, n * o), random::<W>(seed + 1, o * i), random::<W::Acc>(seed, n * i));
        let (dy_rows, w_rows) = (Gapped::new(&dy, [n, o], 1), Gapped::new(&w, [o, i], 2));
        let (dy, w) = (rounded::<W>(backend, &dy), exact(&w));
        for accumulate in [false, true] {
            let mut dx = if accumulate { old.clone() } else { vec![W::Acc::of(f64::NAN); n * i] };
            let start = |at: usize| if accumulate { old[at].to_f64() } else { 0.0 };
            let products = (0..n * i).map(|at| {
                let (total, scale) = sum(o, |k| dy[at / i * o + k] * w[k * i + at % i]);
                (total + start(at), scale + start(at).abs())
            });
            let (want, scale): (Vec<f64>, Vec<f64>) = products.unzip();
            let (dy, weight, dx_out) = (dy_rows.tensor(), w_rows.tensor(), tensor_mut(&mut dx, [n, i]));
            linear::backward_input(backend, BackwardInput { dy, weight, dx: dx_out, accumulate }).unwrap();
            let what = format!("{} dx {n}x{i}x{o} {accumulate}", W::DTYPE);
            assert_near(&what, &dx, &want, &scale, 4.0 + (o as f64).sqrt());
        }
    }
}

#[test]
fn the_input_gradient_is_a_plain_loop() {
    for backend in backends() {
        check_backward_input::<f64>(&backend);
        check_backward_input::<f32>(&backend);
        check_backward_input::<bf16>(&backend);
        check_backward_input::<f16>(&backend);
    }
}

/// Gradients that are stored in G and written in D.
fn check_narrow_gradients<T, G, D>(backend: &Backend)
where
    T: Element,
    G: Element<Acc = T::Acc>,
    D: Element<Acc = T::Acc>,
{
    for (seed, [n, i, o]) in SHAPES.into_iter().enumerate() {
        let seed = 3000 + 100 * seed as u64;
        let (x, w, dy) = (random::<T>(seed, n * i), random::<T>(seed + 1, o * i), random::<G>(seed + 2, n * o));
        let (mut dw, mut db) = (random::<T::Acc>(seed + 3, o * i), random::<T::Acc>(seed + 4, o));
        let (dy_rows, w_rows) = (Gapped::new(&dy, [n, o], 2), Gapped::new(&w, [o, i], 1));
        let x_rows = Gapped::new(&x, [n, i], 4);
        let what = format!("{} {} {} {n}x{i}x{o}", T::DTYPE, G::DTYPE, D::DTYPE);
        // What is not stored in A is multiplied as it is.
        let multiplied: Vec<f64> = match G::DTYPE == G::Acc::DTYPE {
            true => rounded::<T>(backend, &dy.iter().map(|y| y.to_acc()).collect::<Vec<_>>()),
            false => exact(&dy),
        };
        let (x, w, plain) = (exact(&x), exact(&w), exact(&dy));
        for accumulate in [false, true] {
            let old = random::<D>(seed + 5, n * i);
            let mut dx = if accumulate { old.clone() } else { vec![D::from_f64(f64::NAN); n * i] };
            let start = |at: usize| if accumulate { old[at].to_f64() } else { 0.0 };
            let products = (0..n * i).map(|at| {
                let (total, scale) = sum(o, |k| multiplied[at / i * o + k] * w[k * i + at % i]);
                (total + start(at), scale + start(at).abs())
            });
            let (want, scale): (Vec<f64>, Vec<f64>) = products.unzip();
            let (dy, weight, dx_out) = (dy_rows.tensor(), w_rows.tensor(), tensor_mut(&mut dx, [n, i]));
            linear::backward_input(backend, BackwardInput { dy, weight, dx: dx_out, accumulate }).unwrap();
            assert_near(&format!("dx {what} {accumulate}"), &dx, &want, &scale, 4.0 + (o as f64).sqrt());
        }
        let plus = |(total, scale): (f64, f64), old: f64| (total + old, scale + old.abs());
        let weights =
            (0..o * i).map(|at| plus(sum(n, |k| multiplied[k * o + at / i] * x[k * i + at % i]), dw[at].to_f64()));
        let biases = (0..o).map(|at| plus(sum(n, |k| plain[k * o + at]), db[at].to_f64()));
        let (want_w, scale_w): (Vec<f64>, Vec<f64>) = weights.unzip();
        let (want_b, scale_b): (Vec<f64>, Vec<f64>) = biases.unzip();
        let (dw_out, db_out) = (tensor_mut(&mut dw, [o, i]), Some(tensor_mut(&mut db, [o])));
        let args = BackwardWeight { x: x_rows.tensor(), dy: dy_rows.tensor(), dw: dw_out, db: db_out };
        linear::backward_weight(backend, args).unwrap();
        assert_near(&format!("dw {what}"), &dw, &want_w, &scale_w, 4.0 + (n as f64).sqrt());
        assert_near(&format!("db {what}"), &db, &want_b, &scale_b, 4.0 + (n as f64).sqrt());
    }
}

#[test]
fn gradients_may_be_stored_in_other_types() {
    for backend in backends() {
        check_narrow_gradients::<bf16, bf16, bf16>(&backend);
        check_narrow_gradients::<bf16, bf16, f32>(&backend);
        check_narrow_gradients::<bf16, f32, bf16>(&backend);
        check_narrow_gradients::<f16, f16, f16>(&backend);
        check_narrow_gradients::<f32, bf16, f32>(&backend);
        check_narrow_gradients::<bf16, f16, f32>(&backend);
    }
}

fn check_backward_weight<T: Element>(backend: &Backend) {
    for (seed, [n, i, o]) in SHAPES.into_iter().enumerate() {
        let seed = 2000 + 100 * seed as u64;
        let (x, dy) = (random::<T>(seed, n * i), random::<T::Acc>(seed + 1, n * o));
        let (mut dw, mut db) = (random::<T::Acc>(seed + 2, o * i), random::<T::Acc>(seed + 3, o));
        let (x_rows, dy_rows) = (Gapped::new(&x, [n, i], 7), Gapped::new(&dy, [n, o], 1));
        let (x, dy, plain_dy) = (exact(&x), rounded::<T>(backend, &dy), exact(&dy));
        let plus = |(total, scale): (f64, f64), old: f64| (total + old, scale + old.abs());
        let weights = (0..o * i).map(|at| plus(sum(n, |k| dy[k * o + at / i] * x[k * i + at % i]), dw[at].to_f64()));
        let biases = (0..o).map(|at| plus(sum(n, |k| plain_dy[k * o + at]), db[at].to_f64()));
        let (want_w, scale_w): (Vec<f64>, Vec<f64>) = weights.unzip();
        let (want_b, scale_b): (Vec<f64>, Vec<f64>) = biases.unzip();
        let args = BackwardWeight {
            x: x_rows.tensor(),
            dy: dy_rows.tensor(),
            dw: tensor_mut(&mut dw, [o, i]),
            db: Some(tensor_mut(&mut db, [o])),
        };
        linear::backward_weight(backend, args).unwrap();
        let what = format!("{} {n}x{i}x{o}", T::DTYPE);
        assert_near(&format!("dw {what}"), &dw, &want_w, &scale_w, 4.0 + (n as f64).sqrt());
        assert_near(&format!("db {what}"), &db, &want_b, &scale_b, 4.0 + (n as f64).sqrt());
    }
}

#[test]
fn the_weight_gradients_are_plain_loops() {
    for backend in backends() {
        check_backward_weight::<f64>(&backend);
        check_backward_weight::<f32>(&backend);
        check_backward_weight::<bf16>(&backend);
        check_backward_weight::<f16>(&backend);
    }
}

#[test]
fn gradients_are_slopes() {
    let [n, i, o] = [3, 5, 4];
    let (x, w, b) = (random::<f64>(1, n * i), random::<f64>(2, o * i), random::<f64>(3, o));
    let dy = random::<f64>(4, n * o);
    let loss = |x: &[f64], w: &[f64], b: &[f64]| {
        let mut y = vec![f64::NAN; n * o];
        let (x, weight, bias) = (tensor(x, [n, i]), tensor(w, [o, i]), Some(tensor(b, [o])));
        let args = Forward { x, weight, bias, y: tensor_mut(&mut y, [n, o]), accumulate: false };
        linear::forward(&backend(), args).unwrap();
        dot(&y, &dy)
    };
    let (mut dx, mut dw, mut db) = (vec![f64::NAN; n * i], vec![0.0; o * i], vec![0.0; o]);
    let (weight, dx_out) = (tensor(&w, [o, i]), tensor_mut(&mut dx, [n, i]));
    let args = BackwardInput { dy: tensor(&dy, [n, o]), weight, dx: dx_out, accumulate: false };
    linear::backward_input(&backend(), args).unwrap();
    let (dw_out, db_out) = (tensor_mut(&mut dw, [o, i]), Some(tensor_mut(&mut db, [o])));
    let args = BackwardWeight { x: tensor(&x, [n, i]), dy: tensor(&dy, [n, o]), dw: dw_out, db: db_out };
    linear::backward_weight(&backend(), args).unwrap();
    assert_gradient("dx", &x, &dx, |x| loss(x, &w, &b));
    assert_gradient("dw", &w, &dw, |w| loss(&x, w, &b));
    assert_gradient("db", &b, &db, |b| loss(&x, &w, b));
}

#[test]
fn threads_change_no_bit() {
    fn check<W: Element<Acc = f32>>() {
        for [n, i, o] in [[1, 300, 700], [3, 300, 700], [7, 300, 700], [33, 300, 700], [700, 130, 250]] {
            let (x, w, dy) = (random::<f32>(1, n * i), random::<W>(2, o * i), random::<f32>(3, n * o));
            assert_same_bits(&format!("{n}x{i}x{o}"), || {
                let (mut y, mut dx, mut dw, mut db) =
                    (vec![0f32; n * o], vec![0f32; n * i], vec![0f32; o * i], vec![0f32; o]);
                let (x, weight, dy) = (tensor(&x, [n, i]), tensor(&w, [o, i]), tensor(&dy, [n, o]));
                let y_out = tensor_mut(&mut y, [n, o]);
                linear::forward(&backend(), Forward { x, weight, bias: None, y: y_out, accumulate: false }).unwrap();
                let dx_out = tensor_mut(&mut dx, [n, i]);
                linear::backward_input(&backend(), BackwardInput { dy, weight, dx: dx_out, accumulate: false })
                    .unwrap();
                let (dw_out, db_out) = (tensor_mut(&mut dw, [o, i]), Some(tensor_mut(&mut db, [o])));
                linear::backward_weight(&backend(), BackwardWeight { x, dy, dw: dw_out, db: db_out }).unwrap();
                (y, dx, dw, db)
            });
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn threads_change_no_bit_of_pairs() {
    for [n, i, o] in [[300, 300, 70], [2100, 131, 250]] {
        let (x, w, dy) = (random::<bf16>(1, n * i), random::<bf16>(2, o * i), random::<f32>(3, n * o));
        assert_same_bits(&format!("{n}x{i}x{o}"), || {
            let (mut y, mut dx, mut dw) = (vec![bf16::ZERO; n * o], vec![0f32; n * i], vec![0f32; o * i]);
            let (x, weight, dy) = (tensor(&x, [n, i]), tensor(&w, [o, i]), tensor(&dy, [n, o]));
            let y_out = tensor_mut(&mut y, [n, o]);
            linear::forward(&backend(), Forward { x, weight, bias: None, y: y_out, accumulate: false }).unwrap();
            let dx_out = tensor_mut(&mut dx, [n, i]);
            linear::backward_input(&backend(), BackwardInput { dy, weight, dx: dx_out, accumulate: false }).unwrap();
            let dw_out = tensor_mut(&mut dw, [o, i]);
            linear::backward_weight(&backend(), BackwardWeight { x, dy, dw: dw_out, db: None }).unwrap();
            (y, dx, dw)
        });
    }
}

#[test]
fn the_order_of_rows_changes_no_bit() {
    for n in [2, 4, 7, 100, 300] {
        let (i, o) = (70, 90);
        let (x, w) = (random::<f32>(1, n * i), random::<f32>(2, o * i));
        let reversed: Vec<f32> = x.chunks(i).rev().flatten().copied().collect();
        let run = |x: &[f32]| {
            let mut y = vec![0f32; n * o];
            let (x, weight, y_out) = (tensor(x, [n, i]), tensor(&w, [o, i]), tensor_mut(&mut y, [n, o]));
            linear::forward(&backend(), Forward { x, weight, bias: None, y: y_out, accumulate: false }).unwrap();
            y
        };
        let back: Vec<f32> = run(&reversed).chunks(o).rev().flatten().copied().collect();
        assert!(run(&x) == back, "{n} rows");
    }
}

#[test]
fn wrong_shapes_are_named() {
    let (x, w, mut y) = (vec![0f32; 6], vec![0f32; 8], vec![0f32; 8]);
    let (x, weight, y) = (tensor(&x, [2, 3]), tensor(&w, [4, 2]), tensor_mut(&mut y, [2, 4]));
    let error = linear::forward(&backend(), Forward { x, weight, bias: None, y, accumulate: false }).unwrap_err();
    assert!(matches!(error, Error::Shape(_)));
    assert_eq!(error.to_string(), "linear::forward: `weight` has shape [4, 2], expected [4, 3]");
}
