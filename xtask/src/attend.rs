//! `cargo xtask attend`: the operator on files. Safetensors in, safetensors out, forward or forward and backward, on any
//! backend: how a PyTorch user compares.

mod input;
mod output;

use crate::engine::{Choice, Engine};
use crate::files;
use anyhow::{Context, Result, anyhow};
use clap::Args;
use input::{Plan, Tensors};
use nsa_core::NsaConfig;
use nsa_tests::operator::{self, Inputs, Outputs};
use nsa_tests::{Kind, reference};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use std::path::PathBuf;
use std::time::Instant;

/// The files' contract, printed behind the options.
const TENSORS: &str =
    "In: q [N,Hq,Dk]; k_cmp, k_slc, k_win [N,G,Dk] and v_cmp, v_slc, v_win [N,G,Dv], or one k, one v for all branches;
gates [N,Hq,3] after the sigmoid, order cmp, slc, win; cu_seqlens [S+1] i32, without it one sequence; phi_k.*,
phi_v.* by compress_kind (weighted: weight [l,G]; linear: weight [G,l*D,D]; mlp: 0.weight [G,l*D,H], 0.bias [G,H],
2.weight [G,H,D], 2.bias [G,D], biases optional); pe_k, pe_v [l,G,D] optional; k_cmp_blocks, v_cmp_blocks [M,G,D]
instead of φ; block_indices [N,G,n] i32 instead of selection; with --backward do [N,Hq,Dv]. One float dtype for all:
F32, BF16, F16 or F64.

Out, in that dtype: o, o_cmp, o_slc, o_win; lse_cmp, lse_slc, lse_win [N,Hq] f32; block_indices; with --backward
d<name> of every differentiable tensor that took part (dk, dv are sums over the branches that share them).";

/// Options of `cargo xtask attend`.
#[derive(Args, Debug)]
#[command(after_long_help = TENSORS)]
pub struct Options {
    /// Configuration, JSON
    #[arg(long)]
    config: PathBuf,
    /// Tensors in, safetensors
    #[arg(long)]
    input: PathBuf,
    /// Tensors out, safetensors
    #[arg(long)]
    output: PathBuf,
    /// Gradients too
    #[arg(long)]
    backward: bool,
    #[command(flatten)]
    choice: Choice,
}

/// Runs the command.
///
/// # Errors
/// Names the file and the tensor or field, what was expected and what was found.
pub fn run(options: &Options) -> Result<()> {
    if options.choice.ran_on_simulator()? {
        return Ok(());
    }
    let (engine, why) = options.choice.engine()?;
    let config: NsaConfig = nsa_core::read_json(&options.config)?;
    let bytes = files::read(&options.input)?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| anyhow!("{} is no whole safetensors file: {error}", options.input.display()))?;
    let tensors: Tensors = file.tensors().into_iter().collect();
    let in_file = || options.input.display().to_string();
    let plan = Plan::new(config, &tensors, options.backward).with_context(in_file)?;
    for name in plan.unused(&tensors) {
        eprintln!("{}: `{name}` takes no part in this run", options.input.display());
    }
    let bytes = match plan.dtype {
        Dtype::F64 => compute::<f64>(&engine, &plan, &tensors),
        Dtype::F32 => compute::<f32>(&engine, &plan, &tensors),
        Dtype::F16 => compute::<half::f16>(&engine, &plan, &tensors),
        Dtype::BF16 => compute::<half::bf16>(&engine, &plan, &tensors),
        other => unreachable!("`q` of dtype {other} was refused"),
    }
    .with_context(in_file)?;
    files::write_atomic(&options.output, &bytes)?;
    println!("{} ({why}) wrote {}", engine.name(), options.output.display());
    Ok(())
}

/// Computes and packs the output file.
fn compute<T: Kind>(engine: &Engine, plan: &Plan, tensors: &Tensors) -> Result<Vec<u8>> {
    let inputs: Inputs<T> = plan.read(tensors)?;
    let start = Instant::now();
    let outputs: Outputs<f64, f64> = match engine {
        Engine::Reference => reference::run(&inputs, reference::Mode::Exact),
        Engine::Kernels(backend) => operator::run(backend, &inputs).map(|outputs| outputs.widen()),
    }
    .map_err(|message| anyhow!(message))?;
    eprintln!("{} tokens in {:.3} s", inputs.packing.num_tokens(), start.elapsed().as_secs_f64());
    let named = output::tensors(plan, &inputs, &outputs);
    let views = named.iter().map(output::Named::view).collect::<Result<Vec<_>, _>>()?;
    Ok(safetensors::serialize(views, None)?)
}
