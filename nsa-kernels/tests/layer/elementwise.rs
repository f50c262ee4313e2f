use crate::kit::*;
use half::{bf16, f16};
use nsa_core::Element;
use nsa_kernels::Backend;
use nsa_kernels::layer::{add, copy, round, sigmoid, swiglu};

const SHAPES: [[usize; 2]; 6] = [[0, 3], [3, 0], [1, 1], [3, 7], [65, 33], [130, 400]];

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Numbers from −20 to 20, with the far ends.
fn wide<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let ends = [-1e4, 1e4, -90.0, 90.0, 0.0];
    let value = |(at, x): (usize, f64)| T::from_f64(if at % 17 < 5 { ends[at % 17] } else { 20.0 * x });
    random::<f64>(seed, len).into_iter().enumerate().map(value).collect()
}

fn check_add<T: Element>() {
    for [n, c] in SHAPES {
        let (a, b) = (random::<T>(1, n * c), random::<T>(2, n * c));
        let want: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a.to_f64() + b.to_f64()).collect();
        let (a_rows, b_rows) = (Gapped::new(&a, [n, c], 2), Gapped::new(&b, [n, c], 3));
        let mut y = vec![T::from_f64(f64::NAN); n * c];
        let (at, bt, y_out) = (a_rows.tensor(), b_rows.tensor(), tensor_mut(&mut y, [n, c]));
        add::forward(&backend(), add::Forward { a: at, b: bt, y: y_out }).unwrap();
        assert_near("a + b", &y, &want, &want, 1.0);
        let mut sum = a.clone();
        let (x, y_out) = (b_rows.tensor(), tensor_mut(&mut sum, [n, c]));
        add::accumulate(&backend(), add::Accumulate { x, y: y_out }).unwrap();
        assert!(sum == y, "{} {n}x{c}", T::DTYPE);
    }
}

#[test]
fn sums_are_plain_loops() {
    check_add::<f64>();
    check_add::<f32>();
    check_add::<bf16>();
    check_add::<f16>();
}

fn check_round<T: Element<Acc = f32>>() {
    for len in [0, 1, 1023, 1024, 40_007] {
        let (x, mut y) = (random::<f32>(len as u64, len), vec![T::from_f64(f64::NAN); len]);
        round::round(&backend(), round::Round { x: tensor(&x, [len]), y: tensor_mut(&mut y, [len]) }).unwrap();
        let want: Vec<T> = x.iter().map(|&x| T::from_acc(x)).collect();
        assert!(y == want, "{} {len}", T::DTYPE);
        let mut wide = vec![f32::NAN; len];
        round::widen(&backend(), round::Widen { x: tensor(&y, [len]), y: tensor_mut(&mut wide, [len]) }).unwrap();
        assert!(wide == y.iter().map(|y| y.to_acc()).collect::<Vec<_>>(), "{} {len}", T::DTYPE);
    }
}

#[test]
fn copies_in_another_type_are_plain_loops() {
    check_round::<f32>();
    check_round::<bf16>();
    check_round::<f16>();
}

#[test]
fn copies_go_each_to_its_place() {
    let source = random::<f32>(3, 100);
    let mut target = vec![0.5f32; 100];
    let (_, rest) = tensor_mut(&mut target, [100]).split_at(3).unwrap();
    let (first, rest) = rest.split_at(20).unwrap();
    let (second, third) = rest.split_at(0).unwrap();
    let copies = [(40, first), (7, second), (1, third)];
    let copies = copies.map(|(at, target)| copy::Piece { source: tensor(&source[at..], target.shape()), target });
    copy::all(&backend(), copies.into()).unwrap();
    assert_eq!(target, [&[0.5; 3], &source[40..60], &source[1..78]].concat());
    let short = copy::Piece { source: tensor(&source, [4]), target: tensor_mut(&mut target, [5]) };
    let error = copy::all(&backend(), vec![short]).unwrap_err().to_string();
    assert!(error.contains("copy::all") && error.contains("target"), "{error}");
}

fn check_sigmoid<T: Element>() {
    for [n, f] in SHAPES {
        let x = wide::<T>(3, n * f);
        let want: Vec<f64> = x.iter().map(|x| logistic(x.to_f64())).collect();
        let rows = Gapped::new(&x, [n, f], 2);
        let mut y = vec![T::from_f64(f64::NAN); n * f];
        let y_out = tensor_mut(&mut y, [n, f]);
        sigmoid::forward(&backend(), sigmoid::Forward { x: rows.tensor(), y: y_out }).unwrap();
        assert_near("sigmoid", &y, &want, &want, 6.0);
        let dy = random::<T::Acc>(4, n * f);
        let slope = |at: usize| dy[at].to_f64() * y[at].to_f64() * (1.0 - y[at].to_f64());
        let want: Vec<f64> = (0..n * f).map(slope).collect();
        let (y_rows, dy_rows) = (Gapped::new(&y, [n, f], 1), Gapped::new(&dy, [n, f], 4));
        let mut dx = vec![T::Acc::from_f64(f64::NAN); n * f];
        let (yt, dyt, dx_out) = (y_rows.tensor(), dy_rows.tensor(), tensor_mut(&mut dx, [n, f]));
        sigmoid::backward(&backend(), sigmoid::Backward { y: yt, dy: dyt, dx: dx_out }).unwrap();
        assert_near("d sigmoid", &dx, &want, &want, 6.0);
    }
}

#[test]
fn sigmoid_is_a_plain_loop() {
    check_sigmoid::<f64>();
    check_sigmoid::<f32>();
    check_sigmoid::<bf16>();
    check_sigmoid::<f16>();
}

fn check_swiglu<T: Element>(backend: &Backend) {
    for [n, f] in SHAPES {
        // Few of T can hold the products of the far ends.
        let gate: Vec<T> = wide::<T>(5, n * f).into_iter().map(|x| T::from_f64(x.to_f64().clamp(-1e4, 90.0))).collect();
        let (up, dy) = (random::<T>(6, n * f), random::<T::Acc>(7, n * f));
        let (g64, u64, dy64) = (exact(&gate), exact(&up), exact(&dy));
        let want: Vec<f64> = (0..n * f).map(|at| g64[at] * logistic(g64[at]) * u64[at]).collect();
        let (gate_rows, up_rows) = (Gapped::new(&gate, [n, f], 2), Gapped::new(&up, [n, f], 1));
        let dy_rows = Gapped::new(&dy, [n, f], 3);
        let mut y = vec![T::from_f64(f64::NAN); n * f];
        let (gt, ut, y_out) = (gate_rows.tensor(), up_rows.tensor(), tensor_mut(&mut y, [n, f]));
        swiglu::forward(backend, swiglu::Forward { gate: gt, up: ut, y: y_out }).unwrap();
        assert_near("swiglu", &y, &want, &want, 8.0);
        let nan = T::Acc::from_f64(f64::NAN);
        let (mut d_gate, mut d_up) = (vec![nan; n * f], vec![nan; n * f]);
        let (dg, du) = (tensor_mut(&mut d_gate, [n, f]), tensor_mut(&mut d_up, [n, f]));
        let args = swiglu::Backward { gate: gt, up: ut, dy: dy_rows.tensor(), d_gate: dg, d_up: du };
        swiglu::backward(backend, args).unwrap();
        let slope = |at: usize| {
            let s = logistic(g64[at]);
            dy64[at] * u64[at] * s * (1.0 + g64[at] * (1.0 - s))
        };
        let want_gate: Vec<f64> = (0..n * f).map(slope).collect();
        let want_up: Vec<f64> = (0..n * f).map(|at| dy64[at] * g64[at] * logistic(g64[at])).collect();
        // 1 − s loses what s rounds off, times gate.
        let scale: Vec<f64> =
            (0..n * f).map(|at| (dy64[at] * u64[at] * logistic(g64[at])).abs() * (1.0 + g64[at].abs())).collect();
        assert_near("d gate", &d_gate, &want_gate, &scale, 8.0);
        assert_near("d up", &d_up, &want_up, &want_up, 8.0);
        // The same in T: rounded once.
        let nan = T::from_f64(f64::NAN);
        let (mut narrow_gate, mut narrow_up) = (vec![nan; n * f], vec![nan; n * f]);
        let (dg, du) = (tensor_mut(&mut narrow_gate, [n, f]), tensor_mut(&mut narrow_up, [n, f]));
        let args = swiglu::Backward { gate: gt, up: ut, dy: dy_rows.tensor(), d_gate: dg, d_up: du };
        swiglu::backward(backend, args).unwrap();
        let narrow = |wide: &[T::Acc]| wide.iter().map(|&x| T::from_acc(x)).collect::<Vec<T>>();
        assert!(narrow_gate == narrow(&d_gate) && narrow_up == narrow(&d_up), "{}", T::DTYPE);
    }
}

#[test]
fn swiglu_is_a_plain_loop() {
    for backend in backends() {
        check_swiglu::<f64>(&backend);
        check_swiglu::<f32>(&backend);
        check_swiglu::<bf16>(&backend);
        check_swiglu::<f16>(&backend);
    }
}

#[test]
fn gradients_are_slopes() {
    let shape = [2, 9];
    let (gate, up, dy) = (random::<f64>(1, 18), random::<f64>(2, 18), random::<f64>(3, 18));
    let swiglu_loss = |gate: &[f64], up: &[f64]| {
        let mut y = vec![f64::NAN; 18];
        let (gate, up, y_out) = (tensor(gate, shape), tensor(up, shape), tensor_mut(&mut y, shape));
        swiglu::forward(&backend(), swiglu::Forward { gate, up, y: y_out }).unwrap();
        dot(&y, &dy)
    };
    let (mut d_gate, mut d_up) = (vec![f64::NAN; 18], vec![f64::NAN; 18]);
    let (dg, du) = (tensor_mut(&mut d_gate, shape), tensor_mut(&mut d_up, shape));
    let (gt, ut, dyt) = (tensor(&gate, shape), tensor(&up, shape), tensor(&dy, shape));
    swiglu::backward(&backend(), swiglu::Backward { gate: gt, up: ut, dy: dyt, d_gate: dg, d_up: du }).unwrap();
    assert_gradient("d gate", &gate, &d_gate, |gate| swiglu_loss(gate, &up));
    assert_gradient("d up", &up, &d_up, |up| swiglu_loss(&gate, up));

    let run = |x: &[f64]| {
        let mut y = vec![f64::NAN; 18];
        let y_out = tensor_mut(&mut y, shape);
        sigmoid::forward(&backend(), sigmoid::Forward { x: tensor(x, shape), y: y_out }).unwrap();
        y
    };
    let (y, mut dx) = (run(&gate), vec![f64::NAN; 18]);
    let dx_out = tensor_mut(&mut dx, shape);
    sigmoid::backward(&backend(), sigmoid::Backward { y: tensor(&y, shape), dy: dyt, dx: dx_out }).unwrap();
    assert_gradient("d sigmoid", &gate, &dx, |x| dot(&run(x), &dy));
}

#[test]
fn wrong_shapes_are_named() {
    let (a, mut y, mut z) = (vec![0f32; 6], vec![0f32; 6], vec![0f32; 6]);
    let (good, bad) = (tensor(&a, [2, 3]), tensor(&a, [3, 2]));
    let mut errors = vec![
        add::forward(&backend(), add::Forward { a: good, b: bad, y: tensor_mut(&mut y, [2, 3]) }),
        add::accumulate(&backend(), add::Accumulate { x: good, y: tensor_mut(&mut y, [3, 2]) }),
        sigmoid::forward(&backend(), sigmoid::Forward { x: good, y: tensor_mut(&mut y, [3, 2]) }),
        sigmoid::backward(&backend(), sigmoid::Backward { y: good, dy: bad, dx: tensor_mut(&mut y, [2, 3]) }),
        swiglu::forward(&backend(), swiglu::Forward { gate: good, up: bad, y: tensor_mut(&mut y, [2, 3]) }),
    ];
    let (d_gate, d_up) = (tensor_mut(&mut y, [2, 3]), tensor_mut(&mut z, [3, 2]));
    errors.push(swiglu::backward(&backend(), swiglu::Backward { gate: good, up: good, dy: good, d_gate, d_up }));
    for (error, arg) in errors.into_iter().zip(["`b`", "`y`", "`y`", "`dy`", "`up`", "`d_up`"]) {
        assert!(error.unwrap_err().to_string().contains(&format!("{arg} has shape [3, 2], expected [2, 3]")));
    }
}
