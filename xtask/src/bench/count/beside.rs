//! A peer's kernels beside ours: the same inputs, the same simulator, results compared.

use super::counts::Counts;
use super::foreign::{self, Device, Kernels, Work};
use super::ours::{self, Op};
use super::{Options, process};
use crate::bench::columns;
use crate::bench::peer::{Job, Peer, Ready, Work as Asked};
use crate::bench::progress::Progress;
use anyhow::{Context, Result, ensure};
use nsa_core::NsaConfig;
use nsa_kernels::Backend;
use nsa_tests::sim;
use safetensors::SafeTensors;
use serde::Serialize;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// The device that the simulator pretends to be.
pub const DEVICE: &str = "a100";
/// Names to the counting process the folder for tensors.
const FOLDER: &str = "NSA_COUNT_FOLDER";
const OURS: &str = "nsa";
/// The fewest query heads a KV head, which are rows of the peer's tiles.
const MIN_GROUP: usize = 16;
/// The widest head dimension whose gradients the peer does not divide among blocks of threads.
const MAX_DIM: usize = 128;

/// A kernel of an operation at a length.
struct Row {
    who: String,
    op: Op,
    tokens: usize,
    kernel: String,
    /// Empty if there is no choice.
    configuration: String,
    /// Of a thread: registers that the assembler spilled. Of a peer's.
    stack_bytes: Option<u32>,
    /// Whether tables have it: of a peer's configurations one.
    chosen: bool,
    counts: Counts,
}

/// What a peer is asked to compile.
#[derive(Serialize)]
struct Request<'a> {
    #[serde(flatten)]
    job: Job,
    capability: u32,
    chosen: &'a BTreeMap<String, String>,
}

/// Runs the command.
pub fn run(options: &Options, peer: Peer) -> Result<()> {
    let config = options.heads.config_without_overlap()?;
    check(&config, &options.lengths())?;
    let ops = Op::of(&options.pass);
    if sim::inside() {
        let folder = std::env::var_os(FOLDER).with_context(|| format!("{FOLDER} is not set"))?;
        let backend = Backend::cuda(0)?;
        return options
            .lengths()
            .into_iter()
            .try_for_each(|tokens| ours::count(&backend, &config, tokens, ops, Path::new(&folder)));
    }
    let out = crate::files::out(options.out.as_deref(), "bench-count")?;
    // Where its compiler runs.
    let (cpu, _) = Backend::pick(Some("cpu"))?;
    let mut peer = Ready::prepare(peer, Asked::Kernels, &cpu, options.peer_python.as_deref(), u64::MAX)?;
    let folder = tempfile::tempdir()?;
    let mut rows = Vec::new();
    let keep = |name: &str, tokens: usize, kernels: process::Kernels| {
        let Some(&op) = ops.iter().find(|op| op.name() == name) else { return };
        rows.extend(kernels.into_iter().map(|(kernel, counts)| {
            let (who, configuration) = (OURS.to_owned(), String::new());
            Row { who, op, tokens, kernel, configuration, stack_bytes: None, chosen: true, counts }
        }));
    };
    let name_folder = |command: &mut Command| {
        command.env(FOLDER, folder.path());
    };
    process::run(DEVICE, name_folder, keep)?;
    let mut theirs = Theirs { peer: &mut peer, config: &config, folder: folder.path(), chosen: BTreeMap::new() };
    for tokens in options.lengths() {
        rows.extend(theirs.count(tokens, ops)?);
    }
    report(options, &peer.title, &rows, &out)
}

/// The rules of the peer's kernels that ours do not have.
fn check(config: &NsaConfig, lengths: &[usize]) -> Result<()> {
    let (group, block) = (config.num_heads() / config.num_kv_heads(), config.select_block());
    let of_heads = group >= MIN_GROUP && group.is_power_of_two();
    ensure!(of_heads, "--heads: {group} for each KV head: must be a power of two from {MIN_GROUP} on with --peer");
    for (flag, dim) in [("--dim-qk", config.head_dim_qk()), ("--dim-v", config.head_dim_v())] {
        ensure!(dim <= MAX_DIM, "{flag} {dim}: must be at most {MAX_DIM} with --peer, so that one part has all of it");
    }
    for tokens in lengths {
        ensure!(tokens % block == 0, "--tokens {tokens}: must be a multiple of a block of {block} with --peer");
    }
    Ok(())
}

/// The peer's side.
struct Theirs<'a> {
    peer: &'a mut Ready,
    config: &'a NsaConfig,
    folder: &'a Path,
    /// Configurations by what autotuners choose them for.
    chosen: BTreeMap<String, String>,
}

impl Theirs<'_> {
    fn count(&mut self, tokens: usize, ops: &[Op]) -> Result<Vec<Row>> {
        let mut progress = Progress::new();
        progress.show(format!("{} compiles for {tokens} tokens", self.peer.title));
        let backward = ops.contains(&Op::SlcBackward);
        let job = Job::new(self.config, tokens, "bf16", backward);
        let request = Request { job, capability: foreign::capability(), chosen: &self.chosen };
        let kernels = Kernels::read(self.peer.kernels(&request)?)?;
        let file = crate::files::read(&ours::file(self.folder, tokens))?;
        let tensors = SafeTensors::deserialize(&file)?;
        let device = Device::new(&kernels, &tensors)?;
        let mut rows: Vec<Row> = Vec::new();
        for step in &kernels.steps {
            let kernel = match &step.work {
                Work::PrefixSum(tensor) => {
                    device.prefix_sum(*tensor)?;
                    continue;
                }
                Work::Launch(kernel) => kernel,
            };
            progress.show(format!("{tokens} tokens: {}", kernel.kernel));
            let mut launches = Vec::new();
            for compiled in &kernel.configs {
                let counts = device.launch(&kernel.kernel, compiled)?;
                launches.push(Row {
                    who: self.peer.title.clone(),
                    op: step.op,
                    tokens,
                    kernel: kernel.kernel.clone(),
                    configuration: compiled.config.clone(),
                    stack_bytes: Some(compiled.stack_bytes),
                    chosen: false,
                    counts,
                });
            }
            let Some(best) = launches.iter_mut().min_by(|a, b| by_preference(a, b)) else { continue };
            best.chosen = true;
            if let Some(key) = &kernel.key {
                self.chosen.insert(key.clone(), best.configuration.clone());
            }
            rows.append(&mut launches);
        }
        let distance = device.compare(&tensors)?;
        progress.line(&format!("counted {} {tokens}: results at most {distance:.4} from ours", self.peer.title));
        progress.finish();
        Ok(rows)
    }
}

/// Of configurations that with the fewest spilled registers is chosen, of several that with the fewest bytes asked for, then
/// that with the fewest instructions.
fn by_preference(a: &Row, b: &Row) -> Ordering {
    let [(a, spilled), (b, more)] = [a, b].map(|row| (row.counts, row.stack_bytes));
    let bytes = a.global_sectors.total_cmp(&b.global_sectors);
    spilled.cmp(&more).then(bytes).then(a.instructions.total_cmp(&b.instructions))
}

/// Sums over the kernels of an operation.
fn sum(rows: &[Row], of: impl Fn(&Row) -> bool) -> Counts {
    let mut sum = Counts::default();
    rows.iter().filter(|row| row.chosen && of(row)).for_each(|row| sum += row.counts);
    sum
}

fn report(options: &Options, title: &str, rows: &[Row], out: &Path) -> Result<()> {
    let longest = *options.lengths().last().expect("one at least");
    println!(
        "bf16, {longest} tokens; touched: each sector once a launch; asked: by every load and store\n{}\n{}",
        kernels(rows, longest),
        ratios(options, title, rows)
    );
    columns::write(out, "count-peer.csv", &csv(rows)?)
}

/// Every kernel at a length.
fn kernels(rows: &[Row], tokens: usize) -> comfy_table::Table {
    let mut table = columns::table(&[&["operation", "of", "kernel"][..], &Counts::CELLS].concat(), 3);
    let mut shown: Vec<&Row> = rows.iter().filter(|row| row.chosen && row.tokens == tokens).collect();
    shown.sort_by_key(|row| row.op);
    for row in shown {
        let kernel = format!("{} {}", row.kernel, row.configuration);
        let names = [row.op.name().to_owned(), row.who.clone(), kernel.trim_end().to_owned()];
        table.add_row([&names[..], &row.counts.cells()].concat());
    }
    table
}

/// Theirs over ours.
fn ratios(options: &Options, title: &str, rows: &[Row]) -> comfy_table::Table {
    let over = format!("{title} / {OURS}: FLOP");
    let header =
        ["operation", "tokens", &over, "bytes touched", "bytes asked", "instructions", "shared passes", "over ideal"];
    let mut table = columns::table(&header, 1);
    for op in Op::of(&options.pass) {
        for tokens in options.lengths() {
            let of = |ours: bool| sum(rows, |row| (row.op, row.tokens, row.who == OURS) == (*op, tokens, ours));
            let (theirs, ours) = (of(false), of(true));
            let get: [fn(&Counts) -> f64; 5] = [
                |c| c.tensor_flop,
                |c| c.unique_bytes,
                |c| c.global_sectors,
                |c| c.instructions,
                |c| c.shared_wavefronts,
            ];
            let over = |of: fn(&Counts) -> f64| {
                if of(&ours) > 0.0 { format!("{:.2}", of(&theirs) / of(&ours)) } else { "-".to_owned() }
            };
            let passes = |counts: &Counts| counts.conflicts().map_or("-".to_owned(), |passes| format!("{passes:.2}"));
            let names = [op.name().to_owned(), tokens.to_string()];
            let last = format!("{}, {}", passes(&theirs), passes(&ours));
            table.add_row([&names[..], &get.map(over), &[last]].concat());
        }
    }
    table
}

/// Every configuration, the chosen ones marked.
fn csv(rows: &[Row]) -> Result<String> {
    let names = ["who", "operation", "kernel", "configuration", "stack_bytes", "chosen", "tokens"];
    let fields = |row: &Row| {
        let stack = row.stack_bytes.map_or(String::new(), |bytes| bytes.to_string());
        let (chosen, tokens) = (u8::from(row.chosen).to_string(), row.tokens.to_string());
        let names = [&row.who, row.op.name(), &row.kernel, &row.configuration, &stack, &chosen, &tokens];
        [&names.map(str::to_owned)[..], &row.counts.fields()].concat()
    };
    columns::csv(&[&names[..], &Counts::FIELDS].concat(), rows.iter().map(fields))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::work::Pass;

    fn row(who: &str, configuration: &str, stack_bytes: Option<u32>, [sectors, instructions]: [f64; 2]) -> Row {
        let counts = Counts {
            global_sectors: sectors,
            instructions,
            tensor_flop: 8.0,
            shared_wavefronts: 3.0,
            shared_ideal: 2.0,
            ..Counts::default()
        };
        let (who, configuration) = (who.to_owned(), configuration.to_owned());
        let (kernel, op) = ("kernel".to_owned(), Op::SlcForward);
        Row { who, op, tokens: 64, kernel, configuration, stack_bytes, chosen: true, counts }
    }

    #[test]
    fn the_configuration_is_chosen_by_spills_then_bytes_then_instructions() {
        let rows = [
            row("fla", "spills", Some(8), [1.0, 1.0]),
            row("fla", "asks more", Some(0), [3.0, 1.0]),
            row("fla", "longer", Some(0), [2.0, 5.0]),
            row("fla", "best", Some(0), [2.0, 4.0]),
        ];
        let best = rows.iter().min_by(|a, b| by_preference(a, b)).expect("four");
        assert_eq!(best.configuration, "best");
    }

    #[test]
    fn shapes_that_the_peer_cannot_run_are_named() {
        let config = |text: &str| {
            let options: Options = crate::bench::arguments::parse(text).expect("legal");
            options.heads.config_without_overlap().expect("legal")
        };
        for (heads, lengths, words) in [
            ("--heads 8", [64, 128], "--heads: 8 for each"),
            ("--heads 48 --kv-heads 2", [64, 128], "--heads: 24 for each"),
            ("--dim-v 256", [64, 128], "--dim-v 256: must be at most 128"),
            ("", [64, 100], "--tokens 100: must be a multiple of a block of 64"),
        ] {
            let error = check(&config(heads), &lengths).expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
        }
        check(&config("--heads 64 --kv-heads 2"), &[64]).expect("a group of 32");
    }

    #[test]
    fn theirs_are_divided_by_ours() {
        let mut rows = vec![
            row("fla", "warps=4", Some(0), [6.0, 5.0]),
            row("fla", "warps=8", Some(0), [600.0, 500.0]),
            row(OURS, "", None, [3.0, 10.0]),
        ];
        rows[1].chosen = false;
        let options = Options {
            tokens: vec![64],
            dense_limit: 64,
            estimate: 64,
            heads: Default::default(),
            inputs: Default::default(),
            pass: vec![Pass::Forward],
            peer: Some(Peer::Fla),
            device: Vec::new(),
            peer_python: None,
            out: None,
        };
        let table = ratios(&options, "fla", &rows).to_string();
        let line = table.lines().find(|line| line.contains("slc forward")).expect("a row");
        let cells: Vec<&str> = line.split('|').map(str::trim).filter(|cell| !cell.is_empty()).collect();
        // Nobody touched a byte in this test.
        assert_eq!(cells, ["slc forward", "64", "1.00", "-", "2.00", "0.50", "1.00", "1.50, 1.50"]);
        assert!(kernels(&rows, 64).to_string().contains("warps=4"), "the chosen configuration is named");
        assert!(!kernels(&rows, 64).to_string().contains("warps=8"), "the others are not");
        let text = csv(&rows).expect("text");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("fla,slc forward,kernel,warps=4,0,1,64,8.0"), "{text}");
        assert!(lines[2].starts_with("fla,slc forward,kernel,warps=8,0,0,64,"), "{text}");
        assert!(lines[3].starts_with("nsa,slc forward,kernel,,,1,64,"), "{text}");
    }
}
