//! `nsa-decode info`.

use super::ModelArgs;
use nsa_core::index;
use nsa_core::model::{kv_cache_bytes, param_counts};
use nsa_core::units::Bytes;
use nsa_decode::Model;
use std::io::{self, Write};

/// Arguments of `info`.
#[derive(Debug, clap::Args)]
pub struct InfoArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Context that cache sizes are printed for; may be given several times [default: the model's longest].
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    context: Vec<usize>,
}

/// Opens the model, checking all of it, and prints what it is.
pub fn run(args: &InfoArgs) -> anyhow::Result<()> {
    let model = args.model.open()?;
    let mut out = io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string_pretty(model.config())?)?;
    print_weights(&mut out, &model)?;
    let contexts = match args.context.is_empty() {
        true => vec![model.config().max_position_embeddings()],
        false => args.context.clone(),
    };
    print_cache(&mut out, &model, &contexts)?;
    Ok(())
}

fn print_weights(out: &mut impl Write, model: &Model) -> io::Result<()> {
    let counts = param_counts(model.config());
    let info = model.weights_info();
    writeln!(out, "parameters     {}", counts.total)?;
    writeln!(out, "  embedding    {}", counts.embedding)?;
    writeln!(out, "  attention    {}", counts.attention)?;
    writeln!(out, "  mlp          {}", counts.mlp)?;
    for (dtype, count) in &info.dtypes {
        writeln!(out, "  in {:<8}  {count}", dtype.to_string())?;
    }
    writeln!(out, "weight files   {}", Bytes(info.file_bytes))?;
    writeln!(out, "  in place     {}", Bytes(info.mapped_bytes))?;
    writeln!(out, "  copied       {}", Bytes(info.copied_bytes))?;
    writeln!(out, "tokenizer      {} ids", model.tokenizer().vocab_size())?;
    writeln!(out, "backend        {}", model.backend().name())
}

fn print_cache(out: &mut impl Write, model: &Model, contexts: &[usize]) -> io::Result<()> {
    let config = model.config();
    let size = |context| kv_cache_bytes(config, context, model.precision().dtype());
    // Far from the start, where no ring is filling and blocks come at their steady rate.
    let span = config.nsa_config().map_or(1, |nsa| nsa.compress_stride());
    let far = config.max_position_embeddings().max(4096);
    writeln!(out, "cache a token  {} ({})", Bytes((size(far + span) - size(far)) / span as u64), model.precision())?;
    for &context in contexts {
        writeln!(out, "context {context}")?;
        writeln!(out, "  cache        {}", Bytes(size(context)))?;
        let rows = config.nsa_config().map_or(context, |nsa| index::decode_rows(&nsa, context));
        writeln!(out, "  rows a step  {rows} of K and V a layer, full attention {context}")?;
    }
    Ok(())
}
