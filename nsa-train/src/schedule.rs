//! The learning rate over the steps.

use crate::TrainOptions;
use std::f64::consts::PI;

/// The learning rate of step `step`, counted from 1: a linear rise over `warmup` steps to `lr`, then half a cosine down to
/// `min_lr` at the last step and beyond.
///
/// ```
/// use nsa_train::{TrainOptions, schedule::learning_rate};
/// let options = TrainOptions { steps: 110, warmup: Some(10), lr: 1.0, min_lr: 0.1, ..TrainOptions::default() };
/// assert_eq!(learning_rate(&options, 5), 0.5);
/// assert_eq!(learning_rate(&options, 10), 1.0);
/// assert!((learning_rate(&options, 60) - 0.55).abs() < 1e-12);
/// assert_eq!(learning_rate(&options, 110), 0.1);
/// ```
pub fn learning_rate(options: &TrainOptions, step: u64) -> f64 {
    let TrainOptions { steps, lr, min_lr, .. } = *options;
    let warmup = options.warmup();
    if step < warmup {
        return lr * step as f64 / warmup as f64;
    }
    if step >= steps {
        return min_lr;
    }
    let done = (step - warmup) as f64 / (steps - warmup) as f64;
    min_lr + (lr - min_lr) * 0.5 * (1.0 + (PI * done).cos())
}
