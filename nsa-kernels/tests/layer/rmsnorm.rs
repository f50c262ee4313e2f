use crate::kit::*;
use half::{bf16, f16};
use nsa_core::Element;
use nsa_kernels::layer::rmsnorm::{self, Backward, Forward};

const SHAPES: [[usize; 2]; 7] = [[0, 5], [1, 1], [3, 7], [5, 64], [130, 33], [1000, 24], [70, 700]];
const EPS: f64 = 1e-3;

/// y and 1/rms of plain loops.
fn plain(x: &[f64], w: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let c = w.len();
    let rstd: Vec<f64> =
        x.chunks(c).map(|x| 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / c as f64 + EPS).sqrt()).collect();
    ((0..x.len()).map(|at| x[at] * rstd[at / c] * w[at % c]).collect(), rstd)
}

fn check_forward<T: Element, W: Element<Acc = T::Acc>>() {
    for (seed, [n, c]) in SHAPES.into_iter().enumerate() {
        let (x, w) = (random::<T>(seed as u64, n * c), random::<W>(50 + seed as u64, c));
        let rows = Gapped::new(&x, [n, c], 3);
        let (want, want_rstd) = plain(&exact(&x), &exact(&w));
        let (mut y, mut rstd) = (vec![T::from_f64(f64::NAN); n * c], vec![T::Acc::from_f64(f64::NAN); n]);
        let what = format!("{} × {} {n}x{c}", T::DTYPE, W::DTYPE);
        for keep in [true, false] {
            y.fill(T::from_f64(f64::NAN));
            let rstd = keep.then(|| tensor_mut(&mut rstd, [n]));
            let (x, weight, y_out) = (rows.tensor(), tensor(&w, [c]), tensor_mut(&mut y, [n, c]));
            rmsnorm::forward(&backend(), Forward { x, weight, eps: EPS, y: y_out, rstd }).unwrap();
            assert_near(&format!("y {what}"), &y, &want, &want, 8.0 + c as f64 / 16.0);
        }
        assert_near(&format!("rstd {what}"), &rstd, &want_rstd, &want_rstd, 8.0 + c as f64 / 16.0);
    }
}

#[test]
fn forward_is_a_plain_loop() {
    check_forward::<f64, f64>();
    check_forward::<f32, f32>();
    check_forward::<f32, bf16>();
    check_forward::<bf16, bf16>();
    check_forward::<f16, f32>();
}

/// dx (added to 1 if `accumulate`) and dw (added to 0) of the operation.
fn backward<T: Element>(
    x: &[T],
    w: &[T],
    rstd: &[T::Acc],
    dy: &[T::Acc],
    accumulate: bool,
) -> (Vec<T::Acc>, Vec<T::Acc>) {
    let [n, c] = [rstd.len(), w.len()];
    let (x, dy) = (Gapped::new(x, [n, c], 2), Gapped::new(dy, [n, c], 1));
    let start = if accumulate { 1.0 } else { f64::NAN };
    let (mut dx, mut dw) = (vec![T::Acc::from_f64(start); n * c], vec![T::Acc::from_f64(0.0); c]);
    let (weight, rstd) = (tensor(w, [c]), tensor(rstd, [n]));
    let (dx_out, dw_out) = (tensor_mut(&mut dx, [n, c]), tensor_mut(&mut dw, [c]));
    let args = Backward { x: x.tensor(), weight, rstd, dy: dy.tensor(), dx: dx_out, accumulate, dw: dw_out };
    rmsnorm::backward(&backend(), args).unwrap();
    (dx, dw)
}

#[test]
fn gradients_are_slopes() {
    let [n, c] = [3, 11];
    let (x, w, dy) = (random::<f64>(1, n * c), random::<f64>(2, c), random::<f64>(3, n * c));
    let (_, rstd) = plain(&x, &w);
    let (dx, dw) = backward::<f64>(&x, &w, &rstd, &dy, false);
    assert_gradient("dx", &x, &dx, |x| dot(&plain(x, &w).0, &dy));
    assert_gradient("dw", &w, &dw, |w| dot(&plain(&x, w).0, &dy));
}

fn check_backward<T: Element>() {
    for (seed, [n, c]) in SHAPES.into_iter().enumerate() {
        let seed = 100 + seed as u64;
        let (x, w, dy) = (random::<T>(seed, n * c), random::<T>(seed + 50, c), random::<T::Acc>(seed + 90, n * c));
        let (x64, w64, dy64) = (exact(&x), exact(&w), exact(&dy));
        let (_, rstd64) = plain(&x64, &w64);
        let rstd: Vec<T::Acc> = rstd64.iter().map(|&r| T::Acc::from_f64(r)).collect();
        // The same formulas in f64 (held to be slopes above).
        let (want_dx, want_dw) = backward::<f64>(&x64, &w64, &rstd64, &dy64, false);
        let scale_dw: Vec<f64> =
            (0..c).map(|c_| (0..n).map(|n_| (dy64[n_ * c + c_] * x64[n_ * c + c_] * rstd64[n_]).abs()).sum()).collect();
        for accumulate in [false, true] {
            let (dx, dw) = backward::<T>(&x, &w, &rstd, &dy, accumulate);
            let start = if accumulate { 1.0 } else { 0.0 };
            let want_dx: Vec<f64> = want_dx.iter().map(|dx| start + dx).collect();
            let scale_dx: Vec<f64> = (0..n * c).map(|at| 1.0 + rstd64[at / c] * (1.0 + x64[at].abs())).collect();
            assert_near(&format!("{} dx {n}x{c}", T::DTYPE), &dx, &want_dx, &scale_dx, 16.0);
            assert_near(&format!("{} dw {n}x{c}", T::DTYPE), &dw, &want_dw, &scale_dw, 8.0 + (n as f64).sqrt());
        }
    }
}

#[test]
fn gradients_of_other_types_are_those_of_f64() {
    check_backward::<f32>();
    check_backward::<bf16>();
    check_backward::<f16>();
}

#[test]
fn threads_change_no_bit() {
    for [n, c] in [[1000, 24], [6000, 8], [70, 700]] {
        let (x, w, dy) = (random::<f32>(1, n * c), random::<f32>(2, c), random::<f32>(3, n * c));
        assert_same_bits(&format!("{n}x{c}"), || {
            let (mut y, mut rstd) = (vec![0f32; n * c], vec![0f32; n]);
            let (y_out, rstd_out) = (tensor_mut(&mut y, [n, c]), Some(tensor_mut(&mut rstd, [n])));
            let (xt, weight) = (tensor(&x, [n, c]), tensor(&w, [c]));
            rmsnorm::forward(&backend(), Forward { x: xt, weight, eps: EPS, y: y_out, rstd: rstd_out }).unwrap();
            let gradients = backward::<f32>(&x, &w, &rstd, &dy, false);
            (y, rstd, gradients)
        });
    }
}

#[test]
fn wrong_arguments_are_named() {
    let (x, w, mut y) = (vec![0f32; 6], vec![0f32; 3], vec![0f32; 6]);
    let mut run = |shape: [usize; 2], channels: usize, eps| {
        let (x, weight, y) = (tensor(&x, shape), tensor(&w, [channels]), tensor_mut(&mut y, shape));
        rmsnorm::forward(&backend(), Forward { x, weight, eps, y, rstd: None }).map_err(|error| error.to_string())
    };
    assert_eq!(run([2, 3], 3, 0.0), Ok(()));
    assert_eq!(run([3, 2], 3, 0.0).unwrap_err(), "rmsnorm::forward: `weight` has shape [3], expected [2]");
    assert_eq!(run([2, 3], 3, -1.0).unwrap_err(), "rmsnorm::forward: `eps` = -1: must be finite and not negative");
    assert_eq!(
        run([2, 0], 0, 1e-5).unwrap_err(),
        "rmsnorm::forward: `x` = rows of 0 channels: a mean needs at least one"
    );
}
