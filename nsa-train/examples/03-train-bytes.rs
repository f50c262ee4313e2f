//! Trains a byte-level NSA model through the library, on a file or on this program's own source.
//!
//! `cargo run --release -p nsa-train --example 03-train-bytes -- [FILE]`

use anyhow::{Context, ensure};
use nsa_core::model::ModelConfig;
use nsa_kernels::Backend;
use nsa_train::TrainOptions;
use nsa_train::model::{Batch, Capacity, Model, Workspace};
use nsa_train::optim::{Optimizer, gradient_norm};

const STEPS: u64 = 60;
const CONTEXT: usize = 256;

fn main() -> anyhow::Result<()> {
    let text = match std::env::args().nth(1) {
        Some(path) => std::fs::read(&path).with_context(|| format!("cannot read {path}"))?,
        None => include_bytes!("03-train-bytes.rs").to_vec(),
    };
    let tokens: Vec<u32> = text.into_iter().map(u32::from).collect();
    ensure!(tokens.len() > CONTEXT, "the text has {} bytes: more than {CONTEXT} are needed", tokens.len());

    let (backend, why) = Backend::pick(None)?;
    println!("{}: {why}", backend.name());
    let mut model = Model::<f32>::new(&backend, ModelConfig::preset("tiny-1m")?, 1)?;
    // Everything is allocated here, for the largest step, and reused.
    let mut workspace = Workspace::for_training(&model, Capacity { tokens: 4 * CONTEXT, longest: CONTEXT })?;
    let mut grads = model.new_gradients();
    let mut optimizer = Optimizer::new(&model);
    let options = TrainOptions::default();

    for step in 1..=STEPS {
        // Four windows of the text, packed behind one another; inputs and targets are shifted by one.
        let windows = [0, 1, 2, 3].map(|i| {
            let start = (step as usize * 4 + i) * 97 % (tokens.len() - CONTEXT);
            &tokens[start..start + CONTEXT]
        });
        let batch = Batch::next_token(&windows)?;
        let len = grads.len();
        grads.tensor_mut([len])?.fill(0.0)?;
        let scale = 1.0 / batch.num_targets() as f64;
        let loss = model.loss_and_gradients(&mut workspace, &batch, scale, &mut grads)?;
        let clip = (options.clip / gradient_norm(&backend, &grads)?).min(1.0);
        optimizer.step(&mut model, &grads, &options, (step, 2e-3, clip))?;
        if step % 10 == 0 {
            println!("step {step:3}: {:.3} bits per byte", loss.mean() / std::f64::consts::LN_2);
        }
    }
    Ok(())
}
