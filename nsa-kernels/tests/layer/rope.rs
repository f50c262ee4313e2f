use crate::kit::*;
use half::{bf16, f16};
use nsa_core::view::Strided;
use nsa_core::{Element, Real};
use nsa_kernels::layer::rope::{self, RopeCache, Rotate, RotateInPlace};
use nsa_kernels::{Mem, Tensor};

const FACTOR: f64 = 1.25;
const POSITIONS: usize = 40;

fn frequencies(dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| 100f64.powf(-2.0 * i as f64 / dim as f64)).collect()
}

/// Plain loops over [N, H, D].
fn plain(x: &[f64], positions: &[i32], heads: usize, dim: usize) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    for (at, y) in y.iter_mut().enumerate() {
        let (n, d) = (at / (heads * dim), at % dim);
        let half = dim / 2;
        let angle = f64::from(positions[n]) * frequencies(dim)[d % half];
        let (partner, sign) = if d < half { (at + half, -1.0) } else { (at - half, 1.0) };
        *y = FACTOR * (x[at] * angle.cos() + sign * x[partner] * angle.sin());
    }
    y
}

fn check<T: Element>() {
    for [n, heads, dim] in [[0, 2, 4], [1, 1, 2], [3, 0, 4], [3, 2, 6], [130, 3, 64]] {
        let x = random::<T>(n as u64, n * heads * dim);
        let positions: Vec<i32> = (0..n).map(|n| ((7 * n + 3) % POSITIONS) as i32).collect();
        let cache = RopeCache::<T::Acc>::new(&backend(), &frequencies(dim), FACTOR, POSITIONS);
        assert_eq!((cache.positions(), cache.head_dim()), (POSITIONS, dim));
        let x64 = exact(&x);
        let want = plain(&x64, &positions, heads, dim);
        let what = format!("{} {n}x{heads}x{dim}", T::DTYPE);
        // Gaps between heads and between rows.
        let strides = [heads * (dim + 3) + 5, dim + 3, 1];
        let mut data = vec![T::from_f64(f64::NAN); n * strides[0]];
        for (at, &x) in x.iter().enumerate() {
            data[at / (heads * dim) * strides[0] + at / dim % heads * strides[1] + at % dim] = x;
        }
        let gapped = Tensor::new(Mem::Host(&data), Strided::new([n, heads, dim], strides).unwrap()).unwrap();
        let mut y = vec![T::from_f64(f64::NAN); x.len()];
        let (row_positions, y_out) = (tensor(&positions, [n]), tensor_mut(&mut y, [n, heads, dim]));
        let args = Rotate { cache: &cache, positions: row_positions, x: gapped, y: y_out };
        rope::forward(&backend(), args).unwrap();
        let scale = vec![2.0 * FACTOR; x.len()];
        assert_near(&format!("y {what}"), &y, &want, &scale, 4.0);
        let mut in_place = x.clone();
        let x_out = tensor_mut(&mut in_place, [n, heads, dim]);
        rope::forward_in_place(&backend(), RotateInPlace { cache: &cache, positions: row_positions, x: vec![x_out] })
            .unwrap();
        assert!(in_place == y, "in place {what}");
        let mut both = [x.clone(), [x.clone(), x.clone()].concat()];
        let [one, two] = &mut both;
        let x_out = vec![tensor_mut(one, [n, heads, dim]), tensor_mut(&mut two[..x.len()], [n, heads, dim])];
        rope::forward_in_place(&backend(), RotateInPlace { cache: &cache, positions: row_positions, x: x_out })
            .unwrap();
        assert!(both[0] == y && both[1][..x.len()] == y && both[1][x.len()..] == x, "two in place {what}");
    }
}

#[test]
fn forward_is_a_plain_loop() {
    check::<f64>();
    check::<f32>();
    check::<bf16>();
    check::<f16>();
}

#[test]
fn gradients_are_slopes() {
    let [n, heads, dim] = [4, 2, 6];
    let (x, dy) = (random::<f64>(1, n * heads * dim), random::<f64>(2, n * heads * dim));
    let positions = [0, 39, 5, 5];
    let cache = RopeCache::<f64>::new(&backend(), &frequencies(dim), FACTOR, POSITIONS);
    let mut dx = vec![f64::NAN; x.len()];
    let shape = [n, heads, dim];
    let row_positions = tensor(&positions, [n]);
    let args = Rotate { cache: &cache, positions: row_positions, x: tensor(&dy, shape), y: tensor_mut(&mut dx, shape) };
    rope::backward(&backend(), args).unwrap();
    assert_gradient("dx", &x, &dx, |x| dot(&plain(x, &positions, heads, dim), &dy));
    let mut in_place = dy.clone();
    let x_out = tensor_mut(&mut in_place, shape);
    rope::backward_in_place(&backend(), RotateInPlace { cache: &cache, positions: row_positions, x: vec![x_out] })
        .unwrap();
    assert_eq!(in_place, dx);
}

#[test]
fn wrong_arguments_are_named() {
    fn run<A: Real>(positions: &[i32], dim: usize) -> Result<(), String> {
        let cache = RopeCache::<A>::new(&backend(), &frequencies(4), 1.0, POSITIONS);
        let mut x = vec![A::of(0.0); 2 * dim];
        let (positions, x) = (tensor(positions, [positions.len()]), tensor_mut(&mut x, [2, 1, dim]));
        let args = RotateInPlace { cache: &cache, positions, x: vec![x] };
        rope::forward_in_place(&backend(), args).map_err(|error| error.to_string())
    }
    assert_eq!(run::<f32>(&[0, 39], 4), Ok(()));
    let outside = "rope::forward_in_place: `positions` = 40 in row 1: must be in 0..positions of the cache";
    assert_eq!(run::<f32>(&[0, 40], 4).unwrap_err(), outside);
    assert!(run::<f32>(&[-1, 0], 4).unwrap_err().contains("= -1 in row 0"));
    assert!(run::<f32>(&[0], 4).unwrap_err().contains("`x` has shape [2, 1, 4], expected [1, 1, 4]"));
    assert!(run::<f32>(&[0, 0], 6).unwrap_err().contains("`x` has shape [2, 1, 6], expected [2, 1, 4]"));
}
