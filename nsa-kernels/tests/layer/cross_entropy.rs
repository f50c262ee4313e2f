use crate::kit::*;
use half::{bf16, f16};
use nsa_core::{DType, Element};
use nsa_kernels::layer::cross_entropy::{self, Forward, ForwardBackward, IGNORED, Loss};

const SCALE: f64 = 0.37;

fn targets(n: usize, v: usize) -> Vec<u32> {
    (0..n).map(|n| if n % 5 == 2 { IGNORED } else { ((7 * n + 1) % v) as u32 }).collect()
}

/// Loss of each row, and the scaled gradients of the logits.
fn plain(hidden: &[f64], weight: &[f64], targets: &[u32], c: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for (n, &target) in targets.iter().enumerate() {
        let z: Vec<f64> = weight.chunks(c).map(|w| dot(w, &hidden[n * c..(n + 1) * c])).collect();
        let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = z.iter().map(|z| (z - max).exp()).sum();
        let ignored = target == IGNORED;
        losses.push(if ignored { 0.0 } else { sum.ln() + max - z[target as usize] });
        gradients.extend(z.iter().enumerate().map(|(v, z)| {
            let hit = if v == target as usize { 1.0 } else { 0.0 };
            if ignored { 0.0 } else { SCALE * ((z - max).exp() / sum - hit) }
        }));
    }
    (losses, gradients)
}

/// Gradients of logits as they are multiplied with a matrix of type `M`, and how far each may be off: where the exact
/// number is so near the middle between two of bf16 that the kernel's own error decides, by their distance.
fn as_multiplied<M: Element>(dz: &[f64]) -> (Vec<f64>, Vec<f64>) {
    // Relative, of a gradient in f32.
    const ERROR: f64 = 1.0 / (1 << 17) as f64;
    if backend().operand_type(M::DTYPE) != DType::Bf16 {
        return (dz.to_vec(), vec![0.0; dz.len()]);
    }
    let times =
        |factor: f64| rounded::<M>(&backend(), &dz.iter().map(|z| M::Acc::from_f64(z * factor)).collect::<Vec<_>>());
    let ties = times(1.0 - ERROR).iter().zip(times(1.0 + ERROR)).map(|(low, high)| (high - low).abs()).collect();
    (times(1.0), ties)
}

struct Got<A> {
    loss: Loss,
    losses: Vec<A>,
    fused: Loss,
    d_hidden: Vec<A>,
    d_weight: Vec<A>,
}

fn run<T: Element, W: Element<Acc = T::Acc>>(hidden: &[T], weight: &[W], targets: &[u32], c: usize) -> Got<T::Acc> {
    let (n, v) = (targets.len(), weight.len() / c);
    let (hidden, weight) = (Gapped::new(hidden, [n, c], 3), Gapped::new(weight, [v, c], 1));
    let (hidden, weight, targets) = (hidden.tensor(), weight.tensor(), tensor(targets, [n]));
    let nan = T::Acc::from_f64(f64::NAN);
    let (mut losses, mut d_hidden, mut d_weight) = (vec![nan; n], vec![nan; n * c], vec![T::Acc::from_f64(1.0); v * c]);
    let losses_out = Some(tensor_mut(&mut losses, [n]));
    let loss = cross_entropy::forward(&backend(), Forward { hidden, weight, targets, losses: losses_out }).unwrap();
    let (dh, dw) = (tensor_mut(&mut d_hidden, [n, c]), Some(tensor_mut(&mut d_weight, [v, c])));
    let args = ForwardBackward { hidden, weight, targets, scale: SCALE, d_hidden: dh, d_weight: dw };
    let fused = cross_entropy::forward_backward(&backend(), args).unwrap();
    // A frozen head changes nothing else.
    let mut alone = vec![nan; n * c];
    let dh = tensor_mut(&mut alone, [n, c]);
    let args = ForwardBackward { hidden, weight, targets, scale: SCALE, d_hidden: dh, d_weight: None };
    let loss_alone = cross_entropy::forward_backward(&backend(), args).unwrap();
    assert_eq!((loss_alone.sum.to_bits(), loss_alone.count), (fused.sum.to_bits(), fused.count));
    assert_eq!(format!("{alone:?}"), format!("{d_hidden:?}"));
    Got { loss, losses, fused, d_hidden, d_weight }
}

fn check<T: Element, W: Element<Acc = T::Acc>>() {
    // The last two have several chunks, the last one by the least number of rows.
    for [n, v, c] in [[0, 5, 3], [1, 1, 1], [7, 13, 5], [300, 260, 24], [2500, 500, 4], [150, 20_000, 3]] {
        let (hidden, weight) = (random::<T>(n as u64, n * c), random::<W>(v as u64, v * c));
        let targets = targets(n, v);
        let got = run(&hidden, &weight, &targets, c);
        let (hidden, weight) = (exact(&hidden), exact(&weight));
        let (losses, dz) = plain(&hidden, &weight, &targets, c);
        let what = format!("{} × {} {n}x{v}x{c}", T::DTYPE, W::DTYPE);
        let scale: Vec<f64> = losses.iter().map(|loss| 2.0 + loss.abs() + c as f64).collect();
        assert_near(&format!("losses {what}"), &got.losses, &losses, &scale, 16.0);
        let count = targets.iter().filter(|&&target| target != IGNORED).count();
        assert_eq!((got.loss.count, got.fused.count), (count, count));
        let sum: f64 = losses.iter().sum();
        assert!((got.loss.sum - sum).abs() <= 16.0 * unit::<T::Acc>() * scale.iter().sum::<f64>(), "{what}: {sum}");
        assert!((got.fused.sum - sum).abs() <= 16.0 * unit::<T::Acc>() * scale.iter().sum::<f64>(), "{what}: {sum}");
        let add = |terms: &mut dyn Iterator<Item = f64>| terms.fold((0.0, 0.0), |(a, b), t: f64| (a + t, b + t.abs()));
        let ((dz_w, slack_w), (dz_t, slack_t)) = (as_multiplied::<W>(&dz), as_multiplied::<T>(&dz));
        let slack = 64.0 + (v as f64).sqrt();
        let rows = (0..n * c).map(|at| {
            let (sum, scale) = add(&mut (0..v).map(|v_| dz_w[at / c * v + v_] * weight[v_ * c + at % c]));
            let (ties, _) = add(&mut (0..v).map(|v_| (slack_w[at / c * v + v_] * weight[v_ * c + at % c]).abs()));
            (sum, scale + ties / (slack * unit::<T::Acc>()))
        });
        let (want, scale): (Vec<f64>, Vec<f64>) = rows.unzip();
        assert_near(&format!("d_hidden {what}"), &got.d_hidden, &want, &scale, slack);
        let slack = 64.0 + (n as f64).sqrt();
        let rows = (0..v * c).map(|at| {
            let (sum, scale) = add(&mut (0..n).map(|n_| dz_t[n_ * v + at / c] * hidden[n_ * c + at % c]));
            let (ties, _) = add(&mut (0..n).map(|n_| (slack_t[n_ * v + at / c] * hidden[n_ * c + at % c]).abs()));
            (1.0 + sum, 1.0 + scale + ties / (slack * unit::<T::Acc>()))
        });
        let (want, scale): (Vec<f64>, Vec<f64>) = rows.unzip();
        assert_near(&format!("d_weight {what}"), &got.d_weight, &want, &scale, slack);
    }
}

#[test]
fn loss_and_gradients_are_plain_loops() {
    check::<f64, f64>();
    check::<f32, f32>();
    check::<f32, bf16>();
    check::<bf16, bf16>();
    check::<f16, f32>();
}

#[test]
fn gradients_are_slopes() {
    let [n, v, c] = [4, 6, 3];
    let (hidden, weight, targets) = (random::<f64>(1, n * c), random::<f64>(2, v * c), targets(n, v));
    let got = run(&hidden, &weight, &targets, c);
    let loss = |hidden: &[f64], weight: &[f64]| {
        let (hidden, weight, targets) = (tensor(hidden, [n, c]), tensor(weight, [v, c]), tensor(&targets, [n]));
        SCALE * cross_entropy::forward(&backend(), Forward { hidden, weight, targets, losses: None }).unwrap().sum
    };
    assert_gradient("d_hidden", &hidden, &got.d_hidden, |hidden| loss(hidden, &weight));
    let d_weight: Vec<f64> = got.d_weight.iter().map(|d| d - 1.0).collect();
    assert_gradient("d_weight", &weight, &d_weight, |weight| loss(&hidden, weight));
}

#[test]
fn huge_logits_overflow_nothing() {
    // Logits ±1e30, and rows where all are equal and huge.
    let (hidden, weight) = ([1e15f32, -1e15, 1e15, 0.0], [1e15f32, 0.0, -1e15]);
    let got = run(&hidden, &weight, &[0, 2, 2, 1], 1);
    assert_eq!((got.losses[0], got.losses[1], got.losses[3]), (0.0, 0.0, 3f32.ln()));
    assert!((f64::from(got.losses[2]) / 2e30 - 1.0).abs() < 1e-6);
    assert!(got.d_hidden.iter().chain(&got.d_weight).all(|d| d.is_finite()));
    assert_eq!(got.d_hidden[..2], [0.0, 0.0]);
    let got = run(&[1e19f32, 1e19], &[1e19f32, 1e19, 1e19], &[0, 1], 1);
    assert_eq!(got.losses, [3f32.ln(); 2]);
}

#[test]
fn what_is_no_number_stays_none() {
    let got = run(&[1.0f32, f32::NAN], &[1.0f32, 2.0, 3.0], &[0, 1], 1);
    assert!(got.losses[0].is_finite() && got.losses[1].is_nan() && got.loss.sum.is_nan() && got.loss.mean().is_nan());
}

#[test]
fn all_rows_ignored() {
    let got = run(&[1.0f32, 2.0], &[1.0f32, 2.0, 3.0], &[IGNORED, IGNORED], 1);
    assert_eq!((got.loss, got.fused), (Loss::default(), Loss::default()));
    assert_eq!((got.d_hidden, got.d_weight), (vec![0.0; 2], vec![1.0; 3]));
    assert!(got.loss.mean().is_nan());
}

#[test]
fn threads_change_no_bit() {
    for [n, v, c] in [[300, 260, 24], [2500, 500, 4]] {
        let (hidden, weight) = (random::<f32>(1, n * c), random::<f32>(2, v * c));
        let targets = targets(n, v);
        assert_same_bits(&format!("{n}x{v}x{c}"), || {
            let got = run(&hidden, &weight, &targets, c);
            (got.loss, got.losses, got.fused, got.d_hidden, got.d_weight)
        });
    }
}

#[test]
fn targets_outside_the_vocabulary_are_named() {
    let (hidden, weight, mut d) = (vec![0f32; 2], vec![0f32; 3], vec![0f32; 2]);
    let targets = [IGNORED, 3];
    let (hidden, weight, targets) = (tensor(&hidden, [2, 1]), tensor(&weight, [3, 1]), tensor(&targets, [2]));
    let error = cross_entropy::forward(&backend(), Forward { hidden, weight, targets, losses: None }).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cross_entropy::forward: `targets` = 3 at position 1: must be below the vocabulary size"
    );
    let d_hidden = tensor_mut(&mut d, [2, 1]);
    let args = ForwardBackward { hidden, weight, targets, scale: 1.0, d_hidden, d_weight: None };
    assert!(cross_entropy::forward_backward(&backend(), args).is_err());
}
