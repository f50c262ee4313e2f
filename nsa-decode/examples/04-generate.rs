//! Generates from a checkpoint through the library: one text, then two that share a beginning.
//!
//! `cargo run --release -p nsa-decode --example 04-generate -- CHECKPOINT "Once upon a time"`
#![forbid(unsafe_code)]

use anyhow::Context;
use nsa_decode::{Backend, Batch, GenerateOptions, Model, Sampling};
use std::io::Write;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().context("the first argument is a checkpoint's folder")?;
    let prompt = arguments.next().unwrap_or_else(|| "Once upon a time".to_owned());

    let (backend, why) = Backend::pick(None)?;
    eprintln!("{}: {why}", backend.name());
    let model = Model::open(folder, backend)?;

    // The prompt is computed once, in chunks, when the first logits are asked for.
    let mut session = model.session();
    session.append(&model.encode_prompt(&prompt)?)?;
    let start = session.fork();

    let sampling = Sampling { temperature: 0.8, top_p: Some(0.95), ..Sampling::default() };
    let options = GenerateOptions { max_tokens: 100, sampling, stop: vec!["\n\n".to_owned()] };
    print!("{prompt}");
    for piece in model.generate(&mut session, options.clone())? {
        print!("{}", piece?.text);
        std::io::stdout().flush()?;
    }
    println!("\n---");

    // Forks share the pages of the prompt's caches, and a batch reads the weights once a step for both.
    let mut batch = Batch::new(&model);
    for _ in 0..2 {
        batch.add(start.fork(), options.clone())?;
    }
    let mut texts = [prompt.clone(), prompt];
    loop {
        let pieces = batch.step()?;
        if pieces.is_empty() {
            break;
        }
        pieces.iter().for_each(|(number, piece)| texts[*number].push_str(&piece.text));
    }
    println!("{}\n---\n{}", texts[0], texts[1]);
    Ok(())
}
