//! One operation on one case against the reference: what the tests and `cargo xtask check` run.

use crate::compare::{Compared, Outcome, compared, rms};
use crate::fault::Fault;
use crate::gate::Gate;
use crate::generate::{self, Side, Weights, widen};
use crate::kernels::{Attention, AttentionGrads, AttentionOutput, Compress, CompressGrads, Pattern};
use crate::operator::{self, Branches, Compressed, Grads, Inputs, Outputs};
use crate::reference::{self, Mode};
use crate::select::Selections;
use crate::{Case, Kind, decode, sim};
use half::{bf16, f16};
use nsa_core::{DType, Element};
use nsa_kernels::Backend;
use nsa_kernels::error::NO_KERNEL;
use std::fmt;

/// The operations, by their stems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// φ.
    Compress,
    /// Compressed attention and selection.
    Cmp,
    /// Attention over selected blocks.
    Slc,
    /// Sliding window.
    Win,
    /// The gated sum.
    Gate,
    /// The whole operator from tokens.
    Nsa,
    /// One step from caches.
    Decode,
    /// Full attention.
    Dense,
}

impl Op {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Compress, Self::Cmp, Self::Slc, Self::Win, Self::Gate, Self::Nsa, Self::Decode, Self::Dense];

    /// Its stem.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Compress => "compress",
            Self::Cmp => "cmp",
            Self::Slc => "slc",
            Self::Win => "win",
            Self::Gate => "gate",
            Self::Nsa => "nsa",
            Self::Decode => "decode",
            Self::Dense => "dense",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The verdict on one operation, case and dtype.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// One an output.
    pub outcomes: Vec<Outcome>,
    /// Block lists that differ from the truth's on near ties.
    pub near_ties: usize,
    /// What else is wrong: selection, refusals, writes beside outputs.
    pub failure: Option<String>,
}

impl Report {
    /// Whether the backend has no kernel for this.
    pub fn is_missing(&self) -> bool {
        self.failure.as_ref().is_some_and(|failure| failure.contains(NO_KERNEL))
    }

    /// A hash of every bit of the outputs.
    pub fn bits(&self) -> u64 {
        generate::hash(self.outcomes.iter().flat_map(|outcome| outcome.bits.to_le_bytes()))
    }

    /// Everything that is wrong, one line each.
    pub fn failures(&self) -> Vec<String> {
        let outputs = self.outcomes.iter().filter_map(|o| o.failure.as_ref().map(|f| format!("`{}`: {f}", o.tensor)));
        self.failure.iter().cloned().chain(outputs).collect()
    }

    /// The same, without errors of rounding up to `factor` times what they may be.
    pub fn failures_beyond(&self, factor: f64) -> Vec<String> {
        let beyond = |o: &Outcome| o.failure_beyond(factor).map(|f| format!("`{}`: {f}", o.tensor));
        self.failure.iter().cloned().chain(self.outcomes.iter().filter_map(beyond)).collect()
    }
}

/// Runs `op` on `case` in `dtype`, forward and backward, against the reference.
pub fn check(op: Op, case: &Case, dtype: DType, backend: &Backend) -> Report {
    match dispatch(op, case, dtype, backend, None) {
        Ok(Some(report)) => report,
        Ok(None) => unreachable!("only a fault may not apply"),
        Err(failure) => Report { failure: Some(failure), ..Report::default() },
    }
}

/// The same with a fault planted in what the kernel gets or gives; `None` if it does not apply to this operation and case.
///
/// # Errors
/// If a kernel or the reference refuses what was planted: nothing was compared.
pub fn check_faulty(
    op: Op,
    case: &Case,
    dtype: DType,
    backend: &Backend,
    fault: Fault,
) -> Result<Option<Report>, String> {
    dispatch(op, case, dtype, backend, Some(fault))
}

/// A report, or none if the fault does not apply.
type Verdict = Result<Option<Report>, String>;

fn dispatch(op: Op, case: &Case, dtype: DType, backend: &Backend, fault: Option<Fault>) -> Verdict {
    match dtype {
        DType::F32 => run::<f32>(op, case, backend, fault),
        DType::F64 => run::<f64>(op, case, backend, fault),
        DType::Bf16 => run::<bf16>(op, case, backend, fault),
        DType::F16 => run::<f16>(op, case, backend, fault),
    }
}

fn run<T: Kind>(op: Op, case: &Case, backend: &Backend, fault: Option<Fault>) -> Verdict {
    match op {
        Op::Compress => compress::<T>(case, backend, fault),
        Op::Cmp => attention::<T>(case, Pattern::Cmp, backend, fault),
        Op::Slc => attention::<T>(case, Pattern::Slc, backend, fault),
        Op::Win => attention::<T>(case, Pattern::Win, backend, fault),
        Op::Dense => attention::<T>(case, Pattern::Dense, backend, fault),
        Op::Gate => gate::<T>(case, backend, fault),
        Op::Nsa => nsa::<T>(case, backend, fault),
        Op::Decode => decode_step::<T>(case, backend, decode::PAGE_ROWS, fault),
    }
}

/// What a GPU's exponential (`ex2.approx`) errs by its documentation, relative: a sum of them too, and its logarithm as much
/// absolute. The simulator's is exact.
fn exponential_error(backend: &Backend) -> f64 {
    if matches!(backend, Backend::Cuda(_)) && !sim::inside() { 2f64.powi(-22) } else { 0.0 }
}

/// With room for gelu, through which the output comes: erfc and the derivative have an exponential each, so that every term of
/// the output errs by as much relative. Errors of random sign add up as the terms do, to as much of the output's RMS.
fn through_gelu(backend: &Backend, compared: Compared) -> Compared {
    Compared { approximated: exponential_error(backend) * rms(compared.truth.iter().copied()), ..compared }
}

/// The verdicts on the outputs of a call of `tokens` tokens.
fn judge(list: &[Compared], tokens: usize) -> Vec<Outcome> {
    list.iter().map(|compared| Compared { draws: compared.draws.min(tokens), ..compared.clone() }.judge()).collect()
}

/// The largest Euclidean norm of a row.
fn row_norm<T: Element>(values: &[T], row: usize) -> f64 {
    let norm = |row: &[T]| row.iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>().sqrt();
    values.chunks(row.max(1)).map(norm).fold(0.0, f64::max)
}

/// Bounds on the terms that outputs and gradients of attention are summed from.
#[derive(Clone, Copy, Debug)]
struct Magnitudes {
    o: f64,
    lse: f64,
    dq: f64,
    dk: f64,
    dv: f64,
}

impl Magnitudes {
    /// |ds| ≤ p·(|do·v| + |δ|) ≤ 2·p·‖do‖·‖v‖, and Σ_s p = 1.
    fn new<T: Element>(inputs: [&[T]; 4], config: &nsa_core::NsaConfig) -> Self {
        let [q, k, v, d_o] = inputs;
        let (dk, dv) = (config.head_dim_qk(), config.head_dim_v());
        let (q, k, v, d_o) = (row_norm(q, dk), row_norm(k, dk), row_norm(v, dv), row_norm(d_o, dv));
        let (scale, heads) = (config.scale(), config.group_size() as f64);
        let ds = 2.0 * scale * d_o * v;
        Self { o: v, lse: scale * q * k, dq: ds * k, dk: ds * q * heads, dv: d_o * heads }
    }
}

/// Generated inputs of an attention operation.
pub fn attention_inputs<T: Kind>(case: &Case, pattern: Pattern) -> Attention<T> {
    let config = &case.config;
    let (n, hq, g) = (case.tokens(), config.num_heads(), config.num_kv_heads());
    let rows = |side: Side| match pattern {
        Pattern::Cmp => {
            let name = format!("{}_blocks", side.letter());
            generate::tensor(case, &name, &[case.blocks(), g, side.dim(config)], 1.0)
        }
        Pattern::Slc => operator::branch_tokens(case, side, "slc"),
        Pattern::Win | Pattern::Dense => operator::branch_tokens(case, side, "win"),
    };
    Attention {
        pattern,
        packing: case.packing(),
        q: generate::tensor(case, "q", &[n, hq, config.head_dim_qk()], case.sharpness),
        k: rows(Side::Key),
        v: rows(Side::Value),
        block_indices: if pattern == Pattern::Slc { generate::selection(case) } else { Vec::new() },
        d_o: generate::tensor(case, "do", &[n, hq, config.head_dim_v()], 1.0),
        gates: pattern.gate().map(|_| generate::gates(case)),
        config: config.clone(),
    }
}

fn attention<T: Kind>(case: &Case, pattern: Pattern, backend: &Backend, fault: Option<Fault>) -> Verdict {
    let honest = attention_inputs::<T>(case, pattern);
    let mut planted = honest.clone();
    let before = fault.is_none_or(|fault| fault.plant(&mut planted));
    let mut output = planted.forward(backend)?;
    let after = fault.is_some_and(|fault| fault.spoil(&honest, &mut output));
    if !before && !after {
        return Ok(None);
    }
    let grads = planted.backward(backend, &output)?;
    judge_attention(backend, &honest, &output, &grads).map(Some)
}

/// What a kernel wrote against the reference on the same inputs.
fn judge_attention<T: Kind>(
    backend: &Backend,
    inputs: &Attention<T>,
    output: &AttentionOutput<T, T::Acc>,
    grads: &AttentionGrads<T::Acc>,
) -> Result<Report, String> {
    let truth = reference::attention(inputs, Mode::Exact)?;
    let [first, second] = reference::attention_rounded(inputs, reference::rounded(backend, T::DTYPE))?;
    let mut report = Report::default();
    if inputs.pattern == Pattern::Cmp {
        let selections = Selections {
            config: &inputs.config,
            packing: &inputs.packing,
            kernel: &output.block_indices,
            truth: &truth.output.block_indices,
            scores: &truth.scores,
            rounded: [&first.scores, &second.scores],
            accumulator: <T::Acc as Element>::DTYPE,
        };
        report.take(selections.judge());
    }
    let sizes = Magnitudes::new([&inputs.q, &inputs.k, &inputs.v, &inputs.d_o], &inputs.config);
    let (dk, dv) = (inputs.config.head_dim_qk(), inputs.config.head_dim_v());
    let outputs = [&truth, &first, &second].map(|version| version.output.clone());
    let mut list = compare_output(backend, inputs, outputs, output, &sizes);
    let grads = [truth.grads, first.grads, second.grads, widen_grads(grads)];
    list.extend([
        compared::<T::Acc>("dq", grads.each_ref().map(|g| g.q.clone()), dk, sizes.dq),
        compared::<T::Acc>("dk", grads.each_ref().map(|g| g.k.clone()), dk, sizes.dk),
        compared::<T::Acc>("dv", grads.each_ref().map(|g| g.v.clone()), dv, sizes.dv),
    ]);
    report.outcomes = judge(&list, inputs.packing.num_tokens());
    Ok(report)
}

/// o and lse, with what the reference has: truth, two rounded.
fn compare_output<T: Kind>(
    backend: &Backend,
    inputs: &Attention<T>,
    reference: [AttentionOutput<f64, f64>; 3],
    kernel: &AttentionOutput<T, T::Acc>,
    sizes: &Magnitudes,
) -> Vec<Compared> {
    let [truth, first, second] = reference;
    let kernel = widen_output(kernel);
    let o = [truth.o, first.o, second.o, kernel.o];
    let lse = [truth.lse, first.lse, second.lse, kernel.lse];
    let lse = compared::<T::Acc>("lse", lse, inputs.config.num_heads(), sizes.lse);
    vec![
        compared::<T>("o", o, inputs.config.head_dim_v(), sizes.o),
        Compared { approximated: exponential_error(backend), ..lse },
    ]
}

/// Runs the forward of full attention on queries that may continue contexts, against the reference.
pub fn check_dense<T: Kind>(inputs: &Attention<T>, backend: &Backend) -> Report {
    let verdict = || -> Result<Report, String> {
        let kernel = inputs.forward(backend)?;
        let truth = reference::attention(inputs, Mode::Exact)?;
        let [first, second] = reference::attention_rounded(inputs, reference::rounded(backend, T::DTYPE))?;
        let sizes = Magnitudes::new([&inputs.q, &inputs.k, &inputs.v, &inputs.d_o], &inputs.config);
        let outputs = [truth, first, second].map(|version| version.output);
        let list = compare_output(backend, inputs, outputs, &kernel, &sizes);
        Ok(Report { outcomes: judge(&list, inputs.packing.num_tokens()), ..Report::default() })
    };
    verdict().unwrap_or_else(|failure| Report { failure: Some(failure), ..Report::default() })
}

fn widen_output<T: Kind>(output: &AttentionOutput<T, T::Acc>) -> AttentionOutput<f64, f64> {
    let block_indices = output.block_indices.clone();
    AttentionOutput { o: widen(&output.o), lse: widen(&output.lse), block_indices }
}

fn widen_grads<A: Element>(grads: &AttentionGrads<A>) -> AttentionGrads<f64> {
    AttentionGrads { q: widen(&grads.q), k: widen(&grads.k), v: widen(&grads.v) }
}

impl Report {
    fn take(&mut self, selections: Result<usize, String>) {
        match selections {
            Ok(near_ties) => self.near_ties += near_ties,
            Err(failure) => self.failure = Some(failure),
        }
    }
}

/// Generated inputs of φ for keys or values.
pub fn compress_inputs<T: Kind>(case: &Case, side: Side) -> Compress<T> {
    Compress {
        side,
        config: case.config.clone(),
        packing: case.packing(),
        x: operator::branch_tokens(case, side, "cmp"),
        // Keys without embedding in some cases: it is optional.
        position: (side == Side::Value || case.tokens().is_multiple_of(2)).then(|| generate::position(case, side)),
        weights: generate::weights(case, side),
    }
}

fn compress<T: Kind>(case: &Case, backend: &Backend, fault: Option<Fault>) -> Verdict {
    let mut report = Report::default();
    let mut applies = false;
    for side in [Side::Key, Side::Value] {
        let honest = compress_inputs::<T>(case, side);
        let mut planted = honest.clone();
        applies |= fault.is_none_or(|fault| fault.plant_compress(&mut planted));
        let blocks = planted.forward(backend)?;
        let shape = [case.blocks(), case.config.num_kv_heads(), side.dim(&case.config)];
        let d_blocks: Vec<T::Acc> = generate::tensor(case, "d_blocks", &shape, 1.0);
        let grads = planted.backward(backend, &d_blocks)?;
        let truth = reference::compressed(&honest, &widen(&d_blocks), Mode::Exact)?;
        let [first, second] =
            reference::compressed_rounded(&honest, &widen(&d_blocks), reference::rounded(backend, T::DTYPE))?;
        let largest = row_norm(&honest.x, 1);
        let name = format!("{}_cmp", side.letter());
        let versions = [truth.0, first.0, second.0, widen(&blocks)];
        let mut blocks = compared::<T>(&format!("{name}_blocks"), versions, shape[2], largest);
        if matches!(honest.weights, Weights::Mlp { .. }) {
            blocks = through_gelu(backend, blocks);
        }
        let kernel = CompressGrads {
            x: widen(&grads.x),
            position: grads.position.as_deref().map(widen),
            weights: grads.weights.map(widen),
        };
        let grads = [truth.1.into(), first.1.into(), second.1.into(), kernel.into()];
        let list = compress_grads::<T::Acc>(backend, side, shape, grads);
        report.outcomes.extend(judge(&[vec![blocks], list].concat(), case.tokens()));
    }
    Ok(applies.then_some(report))
}

/// Gradients of the compressed side, through blocks of shape `[M, G, D]`. All that comes through φ shares the rounding of
/// the blocks' gradients; the embedding sums them over the blocks, so its l rows are one row's draws.
fn compress_grads<T: Element>(
    backend: &Backend,
    side: Side,
    [blocks, groups, dim]: [usize; 3],
    grads: [Compressed<f64>; 4],
) -> Vec<Compared> {
    let letter = side.letter();
    let mlp = matches!(grads[0], Compressed::Tokens { phi: Weights::Mlp { .. }, .. });
    let [truth, first, second, kernel] = grads.map(parts);
    let all = truth.into_iter().zip(first).zip(second).zip(kernel);
    all.map(|((((name, truth), (_, first)), (_, second)), (_, kernel))| {
        let draws = if name == POSITION { blocks.min(groups * dim) } else { blocks };
        let versions = [truth, first, second, kernel];
        let grad = Compared { draws, ..compared::<T>(&name.replace('*', letter), versions, dim, 0.0) };
        if mlp && name != LAST_BIAS { through_gelu(backend, grad) } else { grad }
    })
    .collect()
}

/// Gradient of the position embedding.
const POSITION: &str = "dpe_*";

/// Gradient of an mlp's last bias, the only one that does not come through gelu.
const LAST_BIAS: &str = "dphi_*.2.bias";

fn parts(grads: Compressed<f64>) -> Vec<(&'static str, Vec<f64>)> {
    let (x, position, phi) = match grads {
        Compressed::Blocks(blocks) => return vec![("d*_cmp_blocks", blocks)],
        Compressed::Tokens { x, position, phi } => (x, position, phi),
    };
    let mut list = vec![("d*_cmp", x)];
    list.extend(position.map(|e| (POSITION, e)));
    match phi {
        Weights::Mean => {}
        Weights::Weighted(weight) | Weights::Linear(weight) => list.push(("dphi_*.weight", weight)),
        Weights::Mlp { weight1, bias1, weight2, bias2 } => {
            list.extend([("dphi_*.0.weight", weight1), ("dphi_*.2.weight", weight2)]);
            list.extend(bias1.map(|bias| ("dphi_*.0.bias", bias)));
            list.extend(bias2.map(|bias| (LAST_BIAS, bias)));
        }
    }
    list
}

fn gate<T: Kind>(case: &Case, backend: &Backend, fault: Option<Fault>) -> Verdict {
    let honest = Gate::<T>::generate(case);
    let mut planted = honest.clone();
    if !fault.is_none_or(|fault| fault.plant_gate(&mut planted)) {
        return Ok(None);
    }
    let list = planted.compare(&honest, backend)?;
    Ok(Some(Report { outcomes: judge(&list, case.tokens()), ..Report::default() }))
}

/// The whole operator from tokens to gradients. Selections are compared on the kernel's own k̃; then the reference
/// attends to the kernel's blocks, so that a near tie does not make the outputs incomparable.
fn nsa<T: Kind>(case: &Case, backend: &Backend, fault: Option<Fault>) -> Verdict {
    let mut inputs = Inputs::<T>::generate(case);
    let mut planted = inputs.clone();
    let before = fault.is_none_or(|fault| fault.plant_operator(&mut planted));
    let mut kernel = operator::run(backend, &planted)?;
    let after = fault.is_some_and(|fault| fault.spoil_operator(&inputs, &mut kernel));
    if !before && !after {
        return Ok(None);
    }
    let mut report = Report::default();
    report.take(judge_selection(backend, &inputs, &kernel.blocks, &kernel.block_indices));
    if report.failure.is_some() {
        return Ok(Some(report));
    }
    inputs.block_indices = Some(kernel.block_indices.clone());
    let truth = reference::run(&inputs, Mode::Exact)?;
    let [first, second] = reference::run_rounded(&inputs, reference::rounded(backend, T::DTYPE))?;
    let list = compare_outputs(backend, &inputs, [truth, first, second, kernel.widen()]);
    report.outcomes = judge(&list, inputs.packing.num_tokens());
    Ok(Some(report))
}

fn judge_selection<T: Kind>(
    backend: &Backend,
    inputs: &Inputs<T>,
    blocks: &[Vec<T>; 2],
    kernel: &[i32],
) -> Result<usize, String> {
    let attention = Attention {
        pattern: Pattern::Cmp,
        config: inputs.config.clone(),
        packing: inputs.packing.clone(),
        q: inputs.q.clone(),
        k: blocks[0].clone(),
        v: blocks[1].clone(),
        block_indices: Vec::new(),
        d_o: Vec::new(),
        gates: None,
    };
    let (truth, scores) = reference::selection(&attention, Mode::Exact)?;
    let rounded = Mode::Rounded(reference::rounded(backend, T::DTYPE));
    let (_, first) = reference::selection(&attention, rounded)?;
    let (_, second) = reference::selection(&attention.mirror(), rounded)?;
    Selections {
        config: &inputs.config,
        packing: &inputs.packing,
        kernel,
        truth: &truth,
        scores: &scores,
        rounded: [&first, &second],
        accumulator: <T::Acc as Element>::DTYPE,
    }
    .judge()
}

/// Every output of the operator, forward and backward.
fn compare_outputs<T: Kind>(backend: &Backend, inputs: &Inputs<T>, versions: [Outputs<f64, f64>; 4]) -> Vec<Compared> {
    let config = &inputs.config;
    let (dk, dv, heads) = (config.head_dim_qk(), config.head_dim_v(), config.num_heads());
    let d_o = inputs.d_o.clone().unwrap_or_default();
    let blocks = versions[0].blocks[0].len() / (config.num_kv_heads() * dk);
    let (k, v) = (&inputs.k, &inputs.v);
    let sizes = [
        Magnitudes::new(
            [&inputs.q, &blocks_as::<T>(&versions[0].blocks[0]), &blocks_as(&versions[0].blocks[1]), &d_o],
            config,
        ),
        Magnitudes::new([&inputs.q, &k.slc, &v.slc, &d_o], config),
        Magnitudes::new([&inputs.q, &k.win, &v.win, &d_o], config),
    ];
    let each = |f: &dyn Fn(&Outputs<f64, f64>) -> Vec<f64>| versions.each_ref().map(f);
    let largest = |f: fn(&Magnitudes) -> f64| sizes.iter().map(f).fold(0.0, f64::max);
    let mut list = vec![compared::<T>("o", each(&|out| out.o.clone()), dv, largest(|m| m.o))];
    for (c, name) in ["cmp", "slc", "win"].into_iter().enumerate() {
        // All queries share the rounding of the same k̃ and ṽ.
        let draws = if c == 0 { blocks } else { usize::MAX };
        let o = each(&|out| out.branches[c].clone());
        list.push(Compared { draws, ..compared::<T>(&format!("o_{name}"), o, dv, sizes[c].o) });
        let lse = each(&|out| out.lse[c].clone());
        let lse = compared::<T::Acc>(&format!("lse_{name}"), lse, heads, sizes[c].lse);
        list.push(Compared { draws, approximated: exponential_error(backend), ..lse });
    }
    let [Some(truth), Some(first), Some(second), Some(kernel)] = versions.each_ref().map(|out| out.grads.as_ref())
    else {
        return list;
    };
    let each = |f: &dyn Fn(&Grads<f64>) -> Vec<f64>| [truth, first, second, kernel].map(f);
    let all_branches = sizes.iter().map(|m| m.dq).sum();
    list.push(compared::<T::Acc>("dq", each(&|g| g.q.clone()), dk, all_branches));
    let products = row_norm(&d_o, dv) * largest(|m| m.o);
    list.push(compared::<T::Acc>("dgates", each(&|g| g.gates.clone()), 3, products));
    for side in [Side::Key, Side::Value] {
        let of = |g: &Grads<f64>| -> Branches<f64> { if side == Side::Key { g.k.clone() } else { g.v.clone() } };
        let magnitude = |m: &Magnitudes| if side == Side::Key { m.dk } else { m.dv };
        let (dim, letter) = (side.dim(config), side.letter());
        let slc = each(&|g| of(g).slc);
        list.push(compared::<T::Acc>(&format!("d{letter}_slc"), slc, dim, magnitude(&sizes[1])));
        let win = each(&|g| of(g).win);
        list.push(compared::<T::Acc>(&format!("d{letter}_win"), win, dim, magnitude(&sizes[2])));
        let shape = [blocks, config.num_kv_heads(), dim];
        let grads = [truth, first, second, kernel].map(|g| of(g).cmp);
        let mut cmp = compress_grads::<T::Acc>(backend, side, shape, grads);
        cmp.iter_mut().for_each(|c| c.magnitude = magnitude(&sizes[0]));
        list.extend(cmp);
    }
    list
}

fn blocks_as<T: Element>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&x| T::from_f64(x)).collect()
}

/// Runs decoding steps from pages of `page_rows` rows against the reference.
pub fn check_pages(case: &Case, dtype: DType, backend: &Backend, page_rows: usize) -> Report {
    let verdict = match dtype {
        DType::F32 => decode_step::<f32>(case, backend, page_rows, None),
        DType::F64 => decode_step::<f64>(case, backend, page_rows, None),
        DType::Bf16 => decode_step::<bf16>(case, backend, page_rows, None),
        DType::F16 => decode_step::<f16>(case, backend, page_rows, None),
    };
    match verdict {
        Ok(report) => report.unwrap_or_default(),
        Err(failure) => Report { failure: Some(failure), ..Report::default() },
    }
}

/// Steps from caches at several prefixes of each sequence, all in one call. Blocks are the CPU's: a step takes any.
fn decode_step<T: Kind>(case: &Case, backend: &Backend, page_rows: usize, fault: Option<Fault>) -> Verdict {
    let whole = Inputs::<T>::generate(case);
    let (cpu, _) = Backend::pick(Some("cpu")).map_err(|error| error.to_string())?;
    let blocks = operator::blocks(&cpu, &whole)?;
    let mut inputs = decode::steps(case, &whole, &blocks)?;
    let mut planted = inputs.clone();
    let before = fault.is_none_or(|fault| fault.plant_operator(&mut planted));
    let mut kernel = decode::step(backend, &planted, page_rows)?;
    let after = fault.is_some_and(|fault| fault.spoil_step(&inputs, &mut kernel));
    if !before && !after {
        return Ok(None);
    }
    let mut report = Report::default();
    let (Compressed::Blocks(k), Compressed::Blocks(v)) = (&inputs.k.cmp, &inputs.v.cmp) else {
        return Err("steps take blocks".to_owned());
    };
    report.take(judge_selection(backend, &inputs, &[k.clone(), v.clone()], &kernel.block_indices));
    report.failure = report.failure.or_else(|| rows_read(&inputs, &kernel));
    if report.failure.is_some() {
        return Ok(Some(report));
    }
    inputs.block_indices = Some(kernel.block_indices.clone());
    let truth = reference::run(&inputs, Mode::Exact)?;
    let [first, second] = reference::run_rounded(&inputs, reference::rounded(backend, T::DTYPE))?;
    let dv = case.config.head_dim_v();
    let magnitude = [&inputs.v.slc, &inputs.v.win, v].map(|v| row_norm(v, dv)).into_iter().fold(0.0, f64::max);
    let o = compared::<T>("o", [truth.o, first.o, second.o, widen(&kernel.o)], dv, magnitude);
    report.outcomes = judge(&[o], inputs.packing.num_tokens());
    Ok(Some(report))
}

/// Compares the count of rows read with SPEC 4's.
fn rows_read<T: Kind>(inputs: &Inputs<T>, step: &decode::Step<T>) -> Option<String> {
    let lists = inputs.config.num_kv_heads() * inputs.config.select_count();
    let expected: Vec<usize> = inputs
        .packing
        .seqs()
        .zip(step.block_indices.chunks(lists))
        .map(|(seq, lists)| decode::rows_of(&inputs.config, seq.end(), lists))
        .collect();
    (step.rows_read != expected).then(|| format!("rows read: {:?} instead of {expected:?}", step.rows_read))
}
