//! `nsa-decode generate`.

use super::ModelArgs;
use anyhow::Context;
use nsa_core::units::Bytes;
use nsa_decode::{Batch, Finish, GenerateOptions, Model, Reads, Sampling, SessionOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue; several are continued together, each printed when it is finished.
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// File whose text is continued. Without any prompt, standard input is.
    #[arg(long, value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    /// Tokens to generate at most, for each prompt.
    #[arg(long, default_value_t = 256, allow_negative_numbers = true)]
    max_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token always.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Draw from this many likeliest tokens only.
    #[arg(long, allow_negative_numbers = true)]
    top_k: Option<usize>,
    /// Draw from the smallest set of likeliest tokens whose probabilities reach this sum.
    #[arg(long, allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Draw from tokens at least this share as likely as the likeliest.
    #[arg(long, allow_negative_numbers = true)]
    min_p: Option<f64>,
    /// Weakens tokens that the text holds already; 1 changes nothing.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f64,
    /// Seed of the random numbers.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    /// Text that ends the output, not part of it; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Tokens of the prompts that run through the model at once.
    #[arg(long, default_value_t = SessionOptions::default().chunk, allow_negative_numbers = true)]
    chunk: usize,
    /// Print the text only.
    #[arg(long)]
    quiet: bool,
}

impl GenerateArgs {
    fn options(&self) -> GenerateOptions {
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        };
        GenerateOptions { max_tokens: self.max_tokens, sampling, stop: self.stop.clone() }
    }

    fn prompts(&self) -> anyhow::Result<Vec<String>> {
        let mut prompts = self.prompt.clone();
        for path in &self.prompt_file {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            prompts.push(text);
        }
        if prompts.is_empty() {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).context("standard input")?;
            prompts.push(text);
        }
        Ok(prompts)
    }
}

/// What was done, for the report.
#[derive(Debug, Default)]
struct Figures {
    prompt_tokens: usize,
    prefill: Duration,
    new_tokens: usize,
    decode: Duration,
}

/// Generates and reports.
pub fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let model = args.model.open()?;
    let mut batch = Batch::new(&model);
    let mut figures = Figures::default();
    for (index, prompt) in args.prompts()?.iter().enumerate() {
        let mut session = model.session_with(SessionOptions { chunk: args.chunk, ..SessionOptions::default() })?;
        session
            .push(&model.encode_prompt(prompt)?)
            .and_then(|()| batch.add(session, args.options()))
            .with_context(|| format!("prompt {}", index + 1))?;
    }
    figures.prompt_tokens = batch.sessions().map(|session| session.len()).sum();
    let start = Instant::now();
    batch.advance()?;
    figures.prefill = start.elapsed();
    let finishes = stream(&mut batch, &mut figures)?;
    if !args.quiet {
        report(&model, &batch, &figures, &finishes)?;
    }
    Ok(())
}

/// Prints the text of one sequence as it comes, of several when each is finished. Returns why they ended.
fn stream(batch: &mut Batch<'_>, figures: &mut Figures) -> anyhow::Result<Vec<Option<Finish>>> {
    let mut out = io::stdout().lock();
    let count = batch.sessions().count();
    let mut texts = vec![String::new(); count];
    let mut finishes = vec![None; count];
    let start = Instant::now();
    loop {
        let pieces = batch.step()?;
        if pieces.is_empty() {
            break;
        }
        figures.new_tokens += pieces.len();
        for (number, piece) in pieces {
            if count == 1 {
                out.write_all(piece.text.as_bytes())?;
                out.flush()?;
            } else {
                texts[number].push_str(&piece.text);
                if piece.finish.is_some() {
                    writeln!(out, "--- prompt {} ---\n{}", number + 1, texts[number])?;
                    out.flush()?;
                }
            }
            finishes[number] = piece.finish;
        }
    }
    figures.decode = start.elapsed();
    if count == 1 {
        writeln!(out)?;
    }
    Ok(finishes)
}

fn report(model: &Model, batch: &Batch<'_>, figures: &Figures, finishes: &[Option<Finish>]) -> io::Result<()> {
    let mut err = io::stderr().lock();
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let seconds = |time: Duration| time.as_secs_f64();
    let (prompt, new) = (figures.prompt_tokens, figures.new_tokens);
    writeln!(
        err,
        "prefill  {prompt} tokens in {:.3} s: {:.1} tokens/s",
        seconds(figures.prefill),
        rate(prompt, figures.prefill)
    )?;
    writeln!(
        err,
        "decode   {new} tokens in {:.3} s: {:.1} tokens/s",
        seconds(figures.decode),
        rate(new, figures.decode)
    )?;
    let cache: u64 = batch.sessions().map(|session| session.cache_bytes()).sum();
    writeln!(err, "cache    {} ({cache} bytes) in {} sequence(s)", Bytes(cache), finishes.len())?;
    let mut reads = Reads::default();
    batch.sessions().for_each(|session| reads += session.reads());
    if reads.steps > 0 {
        let per_step = |rows: u64| rows as f64 / reads.steps as f64;
        writeln!(
            err,
            "rows     {:.1} token-rows of K and V read a step and layer, full attention {:.1}: {:.2} times as many",
            per_step(reads.rows),
            per_step(reads.full_rows),
            reads.full_rows as f64 / reads.rows.max(1) as f64
        )?;
    }
    for (index, finish) in finishes.iter().enumerate() {
        if let Some(finish) = finish {
            writeln!(err, "ended    prompt {}: {finish}", index + 1)?;
        }
    }
    writeln!(err, "backend  {}, {}", model.backend().name(), model.precision())
}
