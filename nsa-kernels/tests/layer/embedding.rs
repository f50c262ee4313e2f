use crate::kit::*;
use half::{bf16, f16};
use nsa_core::Element;
use nsa_kernels::layer::embedding::{self, Backward, Forward};

/// Tokens with repeats, most of them few.
fn tokens(n: usize, vocabulary: usize) -> Vec<u32> {
    (0..n).map(|n| if n % 3 == 0 { (vocabulary - 1) as u32 } else { (n * n % vocabulary) as u32 }).collect()
}

fn check_forward<T: Element, W: Element<Acc = T::Acc>>() {
    for [n, v, c] in [[0, 5, 3], [4, 7, 0], [1, 1, 1], [9, 50, 13], [300, 33, 100]] {
        let (tokens, w) = (tokens(n, v), random::<W>(n as u64, v * c));
        let rows = Gapped::new(&w, [v, c], 2);
        let mut y = vec![T::from_f64(f64::NAN); n * c];
        let y_out = tensor_mut(&mut y, [n, c]);
        embedding::forward(&backend(), Forward { tokens: tensor(&tokens, [n]), weight: rows.tensor(), y: y_out })
            .unwrap();
        let want: Vec<T> = (0..n * c).map(|at| T::from_f64(w[tokens[at / c] as usize * c + at % c].to_f64())).collect();
        assert!(y == want, "{} × {} {n}x{v}x{c}", T::DTYPE, W::DTYPE);
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

fn backward(tokens: &[u32], dy: &[f32], v: usize, c: usize) -> Vec<f32> {
    let (n, mut dw) = (tokens.len(), random::<f32>(99, v * c));
    let rows = Gapped::new(dy, [n, c], 3);
    let args = Backward { tokens: tensor(tokens, [n]), dy: rows.tensor(), dw: tensor_mut(&mut dw, [v, c]) };
    embedding::backward(&backend(), args).unwrap();
    dw
}

#[test]
fn the_gradient_adds_rows_in_order() {
    for [n, v, c] in [[0, 5, 3], [4, 7, 0], [1, 1, 1], [9, 50, 13], [3000, 33, 20]] {
        let (tokens, dy) = (tokens(n, v), random::<f32>(n as u64, n * c));
        let mut want = random::<f32>(99, v * c);
        for (n, &token) in tokens.iter().enumerate() {
            (0..c).for_each(|c_| want[token as usize * c + c_] += dy[n * c + c_]);
        }
        assert!(backward(&tokens, &dy, v, c) == want, "{n}x{v}x{c}");
        assert_same_bits("dw", || backward(&tokens, &dy, v, c));
    }
}

#[test]
fn the_gradient_is_a_slope() {
    let [n, v, c] = [5, 4, 3];
    let (tokens, w, dy) = (tokens(n, v), random::<f64>(1, v * c), random::<f64>(2, n * c));
    let mut dw = vec![0.0; v * c];
    let args = Backward { tokens: tensor(&tokens, [n]), dy: tensor(&dy, [n, c]), dw: tensor_mut(&mut dw, [v, c]) };
    embedding::backward(&backend(), args).unwrap();
    assert_gradient("dw", &w, &dw, |w| {
        let mut y = vec![f64::NAN; n * c];
        let (tokens, weight) = (tensor(&tokens, [n]), tensor(w, [v, c]));
        embedding::forward(&backend(), Forward { tokens, weight, y: tensor_mut(&mut y, [n, c]) }).unwrap();
        dot(&y, &dy)
    });
}

#[test]
fn tokens_outside_the_vocabulary_are_named() {
    let (tokens, w) = ([2, 0, 3, 9], vec![0f32; 6]);
    let (mut y, mut dw) = (vec![0f32; 8], vec![0f32; 6]);
    let tokens = tensor(&tokens, [4]);
    let args = Forward { tokens, weight: tensor(&w, [3, 2]), y: tensor_mut(&mut y, [4, 2]) };
    let error = embedding::forward(&backend(), args).unwrap_err().to_string();
    assert_eq!(error, "embedding::forward: `tokens` = 3 at position 2: must be below the vocabulary size");
    let args = Backward { tokens, dy: tensor(&y, [4, 2]), dw: tensor_mut(&mut dw, [3, 2]) };
    let error = embedding::backward(&backend(), args).unwrap_err().to_string();
    assert_eq!(error, "embedding::backward: `tokens` = 3 at position 2: must be below the vocabulary size");
}
