use crate::kit::*;
use nsa_core::Real;
use nsa_kernels::layer::adamw::{self, AdamW, Step};

const CONFIG: AdamW = AdamW { lr: 3e-2, beta1: 0.9, beta2: 0.95, eps: 1e-6, weight_decay: 0.1 };
const STEPS: u64 = 5;
const GRAD_SCALE: f64 = 0.5;

/// Gradient of parameter `i` in step `t`; one is always 0.
fn gradient(i: usize, t: u64) -> f64 {
    if i % 7 == 3 { 0.0 } else { ((i as f64 + 1.0) * 0.37 + t as f64).sin() }
}

/// Parameters, m and v after some steps.
fn run<R: Real>(len: usize, config: AdamW) -> [Vec<R>; 3] {
    let mut params: Vec<R> = random::<f64>(1, len).into_iter().map(R::of).collect();
    let (mut m, mut v) = (vec![R::of(0.0); len], vec![R::of(0.0); len]);
    for step in 1..=STEPS {
        let grads: Vec<R> = (0..len).map(|i| R::of(gradient(i, step))).collect();
        let (params, m, v) = (tensor_mut(&mut params, [len]), tensor_mut(&mut m, [len]), tensor_mut(&mut v, [len]));
        let args = Step { config, step, grad_scale: GRAD_SCALE, grads: tensor(&grads, [len]), params, m, v };
        adamw::step(&backend(), args).unwrap();
    }
    [params, m, v]
}

fn plain(len: usize, config: AdamW) -> [Vec<f64>; 3] {
    let AdamW { lr, beta1, beta2, eps, weight_decay } = config;
    let mut params = random::<f64>(1, len);
    let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
    for t in 1..=STEPS {
        for i in 0..len {
            let g = GRAD_SCALE * gradient(i, t);
            m[i] = beta1 * m[i] + (1.0 - beta1) * g;
            v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
            let (mean, square) = (m[i] / (1.0 - beta1.powi(t as i32)), v[i] / (1.0 - beta2.powi(t as i32)));
            params[i] -= lr * (mean / (square.sqrt() + eps) + weight_decay * params[i]);
        }
    }
    [params, m, v]
}

#[test]
fn steps_are_plain_loops() {
    for len in [0, 1, 37, 40_000] {
        for config in [CONFIG, AdamW { weight_decay: 0.0, ..CONFIG }, AdamW { beta1: 0.0, beta2: 0.0, ..CONFIG }] {
            let (want, single, double) = (plain(len, config), run::<f32>(len, config), run::<f64>(len, config));
            for (what, part) in ["params", "m", "v"].into_iter().zip(0..) {
                let scale = vec![1.0; len];
                assert_near(what, &single[part], &want[part], &scale, 16.0);
                assert_near(what, &double[part], &want[part], &scale, 16.0);
            }
        }
    }
}

#[test]
fn late_steps_need_no_correction() {
    let (grads, mut params, mut m, mut v) = ([1.0f64], [0.0], [1.0], [1.0]);
    let config = AdamW { lr: 0.5, beta1: 0.5, beta2: 0.5, eps: 0.0, weight_decay: 0.0 };
    let state = (tensor_mut(&mut params, [1]), tensor_mut(&mut m, [1]), tensor_mut(&mut v, [1]));
    let (params_out, m, v) = state;
    let args = Step { config, step: u64::MAX, grad_scale: 1.0, grads: tensor(&grads, [1]), params: params_out, m, v };
    adamw::step(&backend(), args).unwrap();
    assert_eq!(params, [-0.5]);
}

#[test]
fn sums_of_squares() {
    for len in [0, 1, 9, 100_003] {
        let grads = random::<f32>(len as u64, len);
        let want: f64 = grads.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
        let got = adamw::sum_of_squares(&backend(), tensor(&grads, [len])).unwrap();
        assert!((got - want).abs() <= 1e-12 * want, "{got} {want}");
        assert_same_bits("sum", || adamw::sum_of_squares(&backend(), tensor(&grads, [len])).unwrap().to_bits());
    }
    // Squares beyond f32.
    assert_eq!(
        adamw::sum_of_squares(&backend(), tensor(&[1e30f32, 1e30], [2])).unwrap(),
        2.0 * f64::from(1e30f32).powi(2)
    );
    assert!(adamw::sum_of_squares(&backend(), tensor(&[1.0, f32::NAN], [2])).unwrap().is_nan());
}

#[test]
fn threads_change_no_bit() {
    assert_same_bits("step", || run::<f32>(40_000, CONFIG));
}

#[test]
fn wrong_arguments_are_named() {
    let run = |config: AdamW, step: u64, grad_scale: f64, len: usize| {
        let (grads, mut params, mut m, mut v) = ([0f32; 2], [0f32; 2], [0f32; 2], [0f32; 2]);
        let (params, m, v) = (tensor_mut(&mut params, [2]), tensor_mut(&mut m, [len]), tensor_mut(&mut v, [2]));
        let args = Step { config, step, grad_scale, grads: tensor(&grads, [2]), params, m, v };
        adamw::step(&backend(), args).map_err(|error| error.to_string())
    };
    assert_eq!(run(CONFIG, 1, 1.0, 2), Ok(()));
    let range = |field: &str, value: &str| format!("adamw::step: `{field}` = {value}: must be in [0, 1)");
    assert_eq!(run(AdamW { beta1: 1.0, ..CONFIG }, 1, 1.0, 2).unwrap_err(), range("beta1", "1"));
    assert_eq!(run(AdamW { beta2: -0.5, ..CONFIG }, 1, 1.0, 2).unwrap_err(), range("beta2", "-0.5"));
    let finite =
        |field: &str, value: &str| format!("adamw::step: `{field}` = {value}: must be finite and not negative");
    assert_eq!(run(AdamW { lr: f64::NAN, ..CONFIG }, 1, 1.0, 2).unwrap_err(), finite("lr", "NaN"));
    assert_eq!(run(CONFIG, 1, f64::INFINITY, 2).unwrap_err(), finite("grad_scale", "inf"));
    assert_eq!(run(CONFIG, 0, 1.0, 2).unwrap_err(), "adamw::step: `step` = 0: the first step is 1");
    assert_eq!(run(CONFIG, 1, 1.0, 1).unwrap_err(), "adamw::step: `m` has shape [1], expected [2]");
}
