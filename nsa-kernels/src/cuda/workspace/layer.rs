//! Bytes that layer operations take of a workspace, by their sizes and types alone. Those that are not listed here take nothing.
//!
//! Factors of a product that have another type than it is made in are copied, and what the library does not round as asked is summed
//! in f32 first.

use super::Places;
use crate::cuda::layer::{adamw, cross_entropy, linear, matmul};
use crate::cuda::reduce::{Parts, take_column_sums};
use nsa_core::DType;

/// Sizes of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// N.
    pub rows: usize,
    /// I.
    pub inputs: usize,
    /// O.
    pub outputs: usize,
}

/// [`layer::linear::forward`](crate::layer::linear::forward) of x and y of type `x`, weight and bias of type `weight`.
pub fn linear_forward(sizes: Linear, [x, weight]: [DType; 2], bias: bool, accumulate: bool) -> usize {
    let Linear { rows, inputs, outputs } = sizes;
    let mut places = Places::default();
    if !linear::has_few_rows(rows, [x, weight], bias) {
        let common = matmul::common([x, weight]);
        take_operand(&mut places, rows * inputs, [x, common]);
        take_operand(&mut places, outputs * inputs, [weight, common]);
        if matmul::is_summed_first([common, x], bias, accumulate) {
            places.take_of::<f32>(rows * outputs);
        }
    }
    places.most()
}

/// [`layer::linear::backward_input`](crate::layer::linear::backward_input) of dy, weight and dx of these types.
pub fn linear_backward_input(sizes: Linear, [dy, weight, dx]: [DType; 3], accumulate: bool) -> usize {
    let Linear { rows, inputs, outputs } = sizes;
    let mut places = Places::default();
    take_operand(&mut places, rows * outputs, [dy, weight]);
    if matmul::is_summed_first([weight, dx], false, accumulate) {
        places.take_of::<f32>(rows * inputs);
    }
    places.most()
}

/// [`layer::linear::backward_weight`](crate::layer::linear::backward_weight) of x and dy of these types, with the bias's gradient or
/// without.
pub fn linear_backward_weight(sizes: Linear, [x, dy]: [DType; 2], bias: bool) -> usize {
    let Linear { rows, outputs, .. } = sizes;
    let mut places = Places::default();
    if let Some(copy) = take_operand(&mut places, rows * outputs, [dy, x]) {
        places.give_back(copy);
    }
    if bias {
        take_column_sums(&mut places, [rows, outputs]);
    }
    places.most()
}

/// [`layer::rmsnorm::backward`](crate::layer::rmsnorm::backward) of x `[rows, channels]`.
pub fn rmsnorm_backward(rows: usize, channels: usize) -> usize {
    let mut places = Places::default();
    places.take_of::<f32>(Parts::of(rows).count * channels);
    places.most()
}

/// Sizes of a head with its loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// N.
    pub rows: usize,
    /// C.
    pub channels: usize,
    /// V.
    pub vocabulary: usize,
}

/// [`layer::cross_entropy::forward`](crate::layer::cross_entropy::forward) of input and head of these types, which writes losses of
/// rows or keeps them for itself.
pub fn cross_entropy_forward(sizes: Head, types: [DType; 2], losses: bool) -> usize {
    let mut places = Places::default();
    places.take_of::<f32>(if losses { 0 } else { sizes.rows });
    take_chunk(&mut places, sizes, types, &[]);
    places.most()
}

/// [`layer::cross_entropy::forward_backward`](crate::layer::cross_entropy::forward_backward) of input and head of these types, with the
/// head's gradient or without.
pub fn cross_entropy_forward_backward(sizes: Head, types: [DType; 2], d_weight: bool) -> usize {
    let [hidden, weight] = types;
    let mut places = Places::default();
    places.take_of::<f32>(sizes.rows);
    let gradients = [weight, hidden];
    take_chunk(&mut places, sizes, types, &gradients[..if d_weight { 2 } else { 1 }]);
    places.most()
}

/// [`layer::adamw::sum_of_squares`](crate::layer::adamw::sum_of_squares) of so many gradients.
pub fn adamw_sum_of_squares(count: usize) -> usize {
    let mut places = Places::default();
    places.take_of::<f64>(adamw::parts(count));
    places.most()
}

/// Logits of a chunk of rows, copies of their factors, then copies of their gradients of types `gradients`, and what losses sum to.
fn take_chunk(places: &mut Places, sizes: Head, [hidden, weight]: [DType; 2], gradients: &[DType]) {
    let Head { rows, channels, vocabulary } = sizes;
    let chunk = cross_entropy::chunk_rows(rows, vocabulary);
    let logits = places.take_of::<f32>(chunk * vocabulary);
    if rows > 0 {
        let common = matmul::common([hidden, weight]);
        let copies = [
            take_operand(places, chunk * channels, [hidden, common]),
            take_operand(places, vocabulary * channels, [weight, common]),
        ];
        copies.into_iter().flatten().for_each(|copy| places.give_back(copy));
        for &dtype in gradients {
            if let Some(copy) = take_operand(places, chunk * vocabulary, [DType::F32, dtype]) {
                places.give_back(copy);
            }
        }
    }
    places.give_back(logits);
    places.take_of::<f64>(cross_entropy::TOTALS);
}

/// A copy of so many elements of type `from` as `to`, if these are two.
fn take_operand(places: &mut Places, elements: usize, [from, to]: [DType; 2]) -> Option<usize> {
    (from != to).then(|| places.take_of::<u8>(elements * to.size_bytes()))
}
