//! `cargo xtask check`: every operation × case × dtype on a backend against the reference, with the table of worst errors.

mod memory;

use crate::dtype::Dtype;
use crate::engine::{Choice, Engine};
use crate::machine::Machine;
use anyhow::{Result, bail, ensure};
use clap::Args;
use comfy_table::{Table, presets};
use nsa_core::DType;
use nsa_kernels::Backend;
use nsa_kernels::error::NO_KERNEL;
use nsa_tests::check::{self, Op, Report};
use nsa_tests::{Case, case, sim};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Options of `cargo xtask check`.
#[derive(Args, Debug)]
pub struct Options {
    /// Only these operations: compress, cmp, slc, win, gate, nsa, decode, dense
    #[arg(long, value_parser = parse_op, value_delimiter = ',')]
    op: Vec<Op>,
    /// Only the cases whose names contain one of these
    #[arg(long, value_delimiter = ',')]
    case: Vec<String>,
    /// Only these dtypes: f32, bf16, f16, f64 (f64 on the CPU alone)
    #[arg(long, value_parser = parse_dtype, value_delimiter = ',')]
    dtype: Vec<DType>,
    /// A line for every output, not only the worst of each operation and dtype
    #[arg(long)]
    all: bool,
    /// On the simulator, the cases of many tokens too
    #[arg(long)]
    full: bool,
    /// Only the memory beside inputs and outputs at 65,536 tokens, forward and backward (Linux, the CPU's backend; some minutes)
    #[arg(long, conflicts_with_all = ["op", "case", "dtype", "all", "full"])]
    memory: bool,
    #[command(flatten)]
    choice: Choice,
}

/// Tokens of the cases that the simulator runs unless it is asked for all.
const SIM_TOKENS: usize = 200;

fn parse_op(name: &str) -> Result<Op, String> {
    Op::ALL.into_iter().find(|op| op.name() == name).ok_or_else(|| {
        let names: Vec<&str> = Op::ALL.iter().map(|op| op.name()).collect();
        format!("there are {}", names.join(", "))
    })
}

fn parse_dtype(name: &str) -> Result<DType, String> {
    let known = Dtype::ALL.map(DType::from).into_iter().chain([DType::F64]);
    known.clone().find(|dtype| dtype.to_string() == name).ok_or_else(|| {
        let names: Vec<String> = known.map(|dtype| dtype.to_string()).collect();
        format!("there are {}", names.join(", "))
    })
}

/// Runs the command.
///
/// # Errors
/// If anything is red, or the backend asked for is not there.
pub fn run(options: &Options) -> Result<()> {
    if options.choice.ran_on_simulator()? {
        return Ok(());
    }
    let (backend, why) = backend(&options.choice)?;
    if options.memory {
        ensure!(
            backend.computes_in_host_memory(),
            "--memory: {} has its own; must be the CPU's backend",
            backend.name()
        );
        return memory::run(|| Ok(self::backend(&options.choice)?.0), &why);
    }
    let cases: Vec<Case> = case::cases().into_iter().filter(|case| chosen(&options.case, &case.name)).collect();
    let all = cases.len();
    ensure!(all > 0, "no case has {} in its name", options.case.join(" or "));
    let short = |case: &Case| !sim::inside() || options.full || !options.case.is_empty() || case.tokens() <= SIM_TOKENS;
    let cases: Vec<Case> = cases.into_iter().filter(short).collect();
    if cases.len() < all {
        println!("{} cases of more than {SIM_TOKENS} tokens are left out; --full runs them", all - cases.len());
    }
    let ops = if options.op.is_empty() { Op::ALL.to_vec() } else { options.op.clone() };
    let dtypes = dtypes(&options.dtype, &backend)?;
    println!("{} ({why}), {} cases; {}", backend.name(), cases.len(), Machine::here().line());
    let mut lines = Lines { list: Vec::new(), missing: BTreeMap::new(), all: options.all };
    let (mut red, mut compared) = (Vec::new(), 0);
    let cases_of = |op, dtype| cases.iter().map(move |case| Job { op, dtype, case });
    let jobs: Vec<_> = ops.iter().flat_map(|&op| dtypes.iter().flat_map(move |&dtype| cases_of(op, dtype))).collect();
    for (Job { op, dtype, case }, report) in jobs.iter().zip(reports(&jobs, &backend, &options.choice)?) {
        if report.is_missing() && options.op.is_empty() {
            *lines.missing.entry(op.name()).or_default() += 1;
            continue;
        }
        compared += 1;
        red.extend(report.failures().into_iter().map(|failure| format!("{op} {} {dtype}: {failure}", case.name)));
        lines.take(*op, *dtype, case, &report);
    }
    println!("{}", lines.table());
    for (op, count) in &lines.missing {
        println!("{op}: not compared {count} times, as {} {NO_KERNEL} it; `--op {op}` says for what", backend.name());
    }
    println!("{}", verdict(compared, jobs.len(), &red)?);
    Ok(())
}

/// The types to check: those asked for, else all that the backend has kernels for.
fn dtypes(asked: &[DType], backend: &Backend) -> Result<Vec<DType>> {
    let cuda = matches!(backend, Backend::Cuda(_));
    ensure!(!(cuda && asked.contains(&DType::F64)), "--dtype f64: must be f32, bf16 or f16 on {}", backend.name());
    let all = Dtype::ALL.into_iter().map(DType::from).chain((!cuda).then_some(DType::F64));
    Ok(if asked.is_empty() { all.collect() } else { asked.to_vec() })
}

/// What the run says at its end.
///
/// # Errors
/// If anything is red, or nothing was compared.
fn verdict(compared: usize, jobs: usize, red: &[String]) -> Result<String> {
    ensure!(red.is_empty(), "{} red:\n{}", red.len(), red.join("\n"));
    ensure!(compared > 0, "nothing was compared");
    Ok(format!("all green: {compared} of {jobs} comparisons"))
}

/// An operation on a case in a type.
struct Job<'a> {
    op: Op,
    dtype: DType,
    case: &'a Case,
}

impl Job<'_> {
    fn check(&self, backend: &Backend) -> Report {
        check::check(self.op, self.case, self.dtype, backend)
    }
}

/// The reports on all jobs. Where a GPU computes, or the simulator, each of the host's threads has a stream of its own and does what the
/// host has to do beside; the CPU's backend has threads itself.
fn reports(jobs: &[Job<'_>], first: &Backend, choice: &Choice) -> Result<Vec<Report>> {
    if !matches!(first, Backend::Cuda(_)) {
        return Ok(jobs.iter().map(|job| job.check(first)).collect());
    }
    let threads = rayon::current_num_threads().min(jobs.len().max(1));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let more = (1..pool.current_num_threads()).map(|_| Ok(backend(choice)?.0));
    let backends = std::iter::once(Ok(first.clone())).chain(more).collect::<Result<Vec<_>>>()?;
    let own = || &backends[rayon::current_thread_index().expect("a thread of the pool")];
    Ok(pool.install(|| jobs.par_iter().map(|job| job.check(own())).collect()))
}

/// A backend of the kernels, none of its scratch memory taken yet, and why it is this one.
fn backend(choice: &Choice) -> Result<(Backend, String)> {
    match choice.engine()? {
        (Engine::Kernels(backend), why) => Ok((backend, why)),
        (Engine::Reference, _) => bail!("--backend ref: the reference is what others are checked against"),
    }
}

/// Cases with far more blocks than a query selects, and with a model's dims.
const QUICK: [&str; 2] = ["far-group-4", "dims-128"];

/// The whole operator, full attention and decoding steps on two small cases in the types that are to be timed: what must be green before
/// any time is printed.
///
/// # Errors
/// If they are red.
pub fn quick(backend: &Backend, dtypes: impl IntoIterator<Item: Into<DType>>) -> Result<()> {
    let dtypes: Vec<DType> = dtypes.into_iter().map(Into::into).collect();
    for name in QUICK {
        let case = case::find(name).expect("a case of the table");
        for (op, &dtype) in
            [Op::Nsa, Op::Dense, Op::Decode].into_iter().flat_map(|op| dtypes.iter().map(move |t| (op, t)))
        {
            let failures = check::check(op, &case, dtype, backend).failures();
            ensure!(failures.is_empty(), "{op} {name} {dtype} is red, so nothing is timed:\n{}", failures.join("\n"));
        }
    }
    let dtypes: Vec<String> = dtypes.iter().map(DType::to_string).collect();
    let (cases, dtypes) = (QUICK.join(", "), dtypes.join(", "));
    println!("correct against the reference in {dtypes} (cases {cases}; `cargo xtask check` runs them all)");
    Ok(())
}

fn chosen(filters: &[String], name: &str) -> bool {
    filters.is_empty() || filters.iter().any(|filter| name.contains(filter))
}

/// One line of the table: the worst case of an output.
struct Line {
    op: Op,
    dtype: DType,
    tensor: String,
    case: String,
    share: f64,
    /// RMS error over the truth's size, largest error, RMS error over the rounded reference's.
    cells: [Option<f64>; 3],
    near_ties: usize,
}

/// The worst of each operation, dtype and output, or of each operation and dtype.
struct Lines {
    list: Vec<Line>,
    /// How often the backend had no kernel for an operation.
    missing: BTreeMap<&'static str, usize>,
    all: bool,
}

impl Lines {
    fn take(&mut self, op: Op, dtype: DType, case: &Case, report: &Report) {
        for outcome in &report.outcomes {
            // Of nothing there is no part, as of gradients that are zero.
            let over =
                |kernel: f64, whole: f64| (kernel == 0.0 || whole > 0.0).then(|| kernel / whole.max(f64::MIN_POSITIVE));
            let (kernel, rounded) = (outcome.kernel, outcome.rounded);
            let line = Line {
                op,
                dtype,
                tensor: outcome.tensor.clone(),
                case: case.name.clone(),
                share: outcome.worst_share(),
                cells: [over(kernel.rms, outcome.size), Some(kernel.max), over(kernel.rms, rounded.rms)],
                near_ties: report.near_ties,
            };
            let same = |other: &&mut Line| {
                other.op == op && other.dtype == dtype && (!self.all || other.tensor == outcome.tensor)
            };
            match self.list.iter_mut().find(same) {
                Some(other) => {
                    let near_ties = other.near_ties.max(line.near_ties);
                    if line.share > other.share {
                        *other = line;
                    }
                    other.near_ties = near_ties;
                }
                None => self.list.push(line),
            }
        }
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
        let header = [
            "op",
            "dtype",
            "worst output",
            "case",
            "share of limit",
            "RMS, relative",
            "max",
            "RMS / rounded",
            "near ties",
        ];
        table.set_header(header);
        let cell = |x: Option<f64>, format: fn(f64) -> String| x.map_or_else(|| "-".to_owned(), format);
        for line in &self.list {
            let [relative, max, over] = line.cells;
            table.add_row([
                line.op.to_string(),
                line.dtype.to_string(),
                line.tensor.clone(),
                line.case.clone(),
                format!("{:.2}", line.share),
                cell(relative, |x| format!("{x:.1e}")),
                cell(max, |x| format!("{x:.1e}")),
                cell(over, |x| format!("{x:.2}")),
                line.near_ties.to_string(),
            ]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_tests::check::check_faulty;
    use nsa_tests::fault::Fault;

    #[test]
    fn what_is_red_or_was_not_compared_is_an_error() {
        let message = |compared, red: &[String]| verdict(compared, 9, red).expect_err("not green").to_string();
        assert_eq!(verdict(7, 9, &[]).expect("green"), "all green: 7 of 9 comparisons");
        assert_eq!(message(0, &[]), "nothing was compared");
        assert_eq!(message(9, &["one".to_owned(), "two".to_owned()]), "2 red:\none\ntwo");
    }

    #[test]
    fn types_are_named() {
        let (backend, _) = Backend::pick(Some("cpu")).expect("the CPU");
        assert_eq!(dtypes(&[], &backend).expect("all").len(), 4);
        assert_eq!(dtypes(&[DType::F64], &backend).expect("f64"), [DType::F64]);
        assert_eq!(parse_dtype("bf16"), Ok(DType::Bf16));
        assert_eq!(parse_dtype("f8"), Err("there are f32, bf16, f16, f64".to_owned()));
    }

    /// What must be green before anything is timed sees every fault that can be planted in the whole operator and in steps.
    #[test]
    fn the_quick_cases_notice_faults() {
        let (backend, _) = Backend::pick(Some("cpu")).expect("the CPU");
        let cases = QUICK.map(|name| case::find(name).expect("a case of the table"));
        for op in [Op::Nsa, Op::Dense, Op::Decode] {
            let mut planted = 0;
            for fault in Fault::ALL {
                let reports = cases
                    .iter()
                    .filter_map(|case| check_faulty(op, case, DType::Bf16, &backend, fault).expect("compared"));
                let red: Vec<bool> = reports.map(|report| !report.failures().is_empty()).collect();
                planted += usize::from(!red.is_empty());
                assert!(red.is_empty() || red.contains(&true), "{op}: {fault:?} is not noticed");
            }
            assert!(planted > 3, "{op}: {planted} faults");
        }
        quick(&backend, Dtype::ALL).expect("green");
    }
}
