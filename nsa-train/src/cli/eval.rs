//! `nsa-train eval`.

use super::pick_backend;
use anyhow::{Context, Result, ensure};
use nsa_core::tokenizer::Tokenizer;
use nsa_train::checkpoint;
use nsa_train::data::{Corpus, Text, TextOptions, unescape};
use nsa_train::eval::{EvalOptions, Evaluation, evaluate};
use nsa_train::model::{Capacity, Model, Workspace};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

/// Tokens that pass through the model at once, unless the context is longer.
const BATCH_TOKENS: usize = 8192;

/// Measure a checkpoint on text files: loss, perplexity, bits per byte.
///
/// Documents are kept apart; every token but the first of each is predicted once. Bits per byte charge log2(vocabulary) for
/// those first tokens, so that they are a code length of the text.
#[derive(Debug, clap::Args)]
pub struct EvalArgs {
    /// A checkpoint, or any model's folder with config.json and its weights in one file or several, or the folder of a run, whose
    /// newest checkpoint is taken.
    #[arg(long, value_name = "FOLDER")]
    checkpoint: PathBuf,
    /// UTF-8 files.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    data: Vec<PathBuf>,
    /// Tokens that a prediction may look back on [default: the model's max_position_embeddings].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    context: Option<usize>,
    /// Tokens from one window to the next [default: the context].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    stride: Option<usize>,
    /// Tokens to predict at most; 0 takes all.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    max_tokens: u64,
    /// Text between documents of a file; \f, \n, \r, \t, \0 and \\ are understood.
    #[arg(long, value_name = "TEXT")]
    document_separator: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn eval(args: &EvalArgs, backend: Option<&str>) -> Result<ExitCode> {
    let backend = pick_backend(backend)?;
    let folder = checkpoint::resolve(&args.checkpoint)?;
    let config = checkpoint::load_config(&folder)?;
    let tokenizer = Tokenizer::for_model(&config, &folder)?;
    let context = args.context.unwrap_or(config.max_position_embeddings());
    if context > config.max_position_embeddings() {
        let trained = config.max_position_embeddings();
        tracing::warn!("context {context} exceeds the model's max_position_embeddings = {trained}");
    }
    let text_options = TextOptions {
        separator: args.document_separator.as_deref().map(unescape).transpose()?,
        bos: config.bos_token_id(),
        eos: config.eos_token_id(),
    };
    let cache = tempfile::tempdir().context("making a temporary folder")?;
    let corpus = Corpus::open(&args.data, &tokenizer, &text_options, cache.path())?;
    let model = Model::<f32>::with_params(&backend, config.clone(), &checkpoint::load_params(&folder, &config)?)?;
    let capacity = Capacity { tokens: context.max(BATCH_TOKENS), longest: context };
    let mut workspace = Workspace::for_inference(&model, capacity)?;
    let options = EvalOptions { context, stride: args.stride.unwrap_or(context), max_tokens: args.max_tokens };
    let evaluation = evaluate(&model, &mut workspace, &Text::whole(Arc::new(corpus)), options)?;
    let loss = evaluation.loss;
    ensure!(loss.is_finite(), "{}: the loss is {loss}: its logits are not finite", folder.display());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&evaluation)?);
    } else {
        print(&evaluation, context);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(evaluation: &Evaluation, context: usize) {
    let Evaluation { loss, perplexity, bits_per_byte, tokens, bytes, documents, .. } = evaluation;
    println!("bits per byte  {bits_per_byte:.4}");
    println!("perplexity     {perplexity:.4} a token");
    println!("loss           {loss:.4} nats a token");
    println!("text           {bytes} bytes, {tokens} tokens predicted, {documents} documents, context {context}");
}
