//! The CUDA backend on the simulator, against the error model; the simulator's checker must not report anything.

mod boxes;
mod compress;
mod decode;
mod dense;
mod layer;
mod needs;
mod pages;
mod record;
mod slc;
mod turned;
mod workspace;

use half::bf16;
use nsa_core::{CompressKind, DType, NsaConfig, NsaConfigBuilder};
use nsa_kernels::Backend;
use nsa_kernels::cuda::workspace::Workspace;
use nsa_tests::check::{self, Op};
use nsa_tests::sim::{self, BITS, on_an_a100, on_an_h100, on_simulator};
use nsa_tests::{Case, case, ties};

/// Cases of the table that run in every type; the others run in bf16. Compiling kernels is most of these tests' time, and those of f16
/// differ from those of bf16 by their conversions alone; `cargo xtask check --full` has every case in every type.
const IN_EVERY_TYPE: [&str; 8] =
    ["ragged", "group-16", "odd-sizes", "dims-64", "dims-128", "sharp", "far-group-2", "blocks-of-many-steps"];
/// Cases of the table that run in f32 too, whose tiles are others.
const IN_F32: [&str; 5] = ["1025", "dims-192-128", "dims-256", "all-blocks", "far-group-1"];
/// Cases that run in every type of operations that are made of others, or whose kernels are the largest.
const FEW_IN_EVERY_TYPE: [&str; 3] = ["ragged", "dims-64", "far-group-2"];

/// The table, or its cases of these names.
fn table(names: Option<&[&str]>) -> Vec<Case> {
    let cases = case::cases().into_iter().filter(|case| names.is_none_or(|names| names.contains(&case.name.as_str())));
    let cases: Vec<_> = cases.collect();
    assert!(names.is_none_or(|names| names.len() == cases.len()), "no case is missing");
    cases
}

/// The cases of an operation.
fn assert_op(op: Op) {
    assert_cases(op, &table(None), &[DType::Bf16]);
    assert_cases(op, &table(Some(&IN_EVERY_TYPE)), &[DType::F16, DType::F32]);
    assert_cases(op, &table(Some(&IN_F32)), &[DType::F32]);
}

/// The cases of an operation, few of them in other types than bf16.
fn assert_large_op(op: Op) {
    assert_cases(op, &table(None), &[DType::Bf16]);
    assert_cases(op, &table(Some(&FEW_IN_EVERY_TYPE)), &[DType::F16, DType::F32]);
}

fn assert_cases(op: Op, cases: &[Case], dtypes: &[DType]) {
    assert_cases_on(&Backend::cuda(0).expect("the simulator"), op, cases, dtypes);
}

/// Whether the kernels for a case are those of all devices up to 9.0, which has its own for types and dims that its warps multiply
/// together.
fn shared_by_devices(case: &Case, dtype: DType) -> bool {
    let dims = [case.config.head_dim_qk(), case.config.head_dim_v()];
    dtype == DType::F32 || dims.iter().any(|dim| !dim.is_multiple_of(64))
}

/// Checks the cases; on another device again those whose kernels it does not share with the first.
fn assert_cases_on(backend: &Backend, op: Op, cases: &[Case], dtypes: &[DType]) {
    let Backend::Cuda(cuda) = backend else { panic!("a CUDA device") };
    let mut red = Vec::new();
    for &dtype in dtypes {
        for case in cases.iter().filter(|case| !sim::again() || !shared_by_devices(case, dtype)) {
            let mut workspace = Workspace::new(cuda);
            let work = || Ok::<_, nsa_kernels::Error>(check::check(op, case, dtype, backend));
            let report = cuda.with_workspace(&mut workspace, work).expect("memory for the workspace");
            println!("{BITS}{op} {} {dtype}: {:016x}", case.name, report.bits());
            let (bytes, needed) = (workspace.bytes(), needs::of_case(cuda, op, case, dtype));
            let other = (bytes != needed).then(|| format!("{bytes} bytes of a workspace, {needed} said before"));
            let failures = report.failures().into_iter().chain(other);
            red.extend(failures.map(|failure| format!("{op} {} {dtype}: {failure}", case.name)));
        }
    }
    assert!(red.is_empty(), "{} red:\n{}", red.len(), red.join("\n"));
}

/// The paper's blocks.
fn paper(heads: usize, kv_heads: usize, dim_k: usize, dim_v: usize) -> NsaConfigBuilder {
    let builder = NsaConfig::builder(heads, kv_heads, dim_k, dim_v).compress_block(32).compress_stride(16);
    builder.select_block(64).select_count(16).window(512).compress_kind(CompressKind::Mean)
}

/// Runs `work` in this test of this program on the simulator, and gives a line of JSON with the counters of each of its
/// launches; nothing there.
fn counted(test: &str, work: impl FnOnce()) -> Option<Vec<String>> {
    if sim::inside() {
        work();
        return None;
    }
    let mut command = sim::this_program().unwrap_or_else(|error| panic!("{error}"));
    command.args(["--exact", test, "--nocapture"]);
    command.env("CUDA_SIM_DEVICE", "a100").env("CUDA_SIM_CHECK", "0").env("CUDA_SIM_COUNT", "json");
    let output = command.output().unwrap_or_else(|error| panic!("{error}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    Some(text.lines().filter(|line| line.contains("\"kernel\"")).map(str::to_owned).collect())
}

/// A counter of a launch.
fn field(line: &str, name: &str) -> f64 {
    let (_, rest) = line.split_once(&format!("\"{name}\": ")).expect("the counter");
    rest.split([',', '}']).next().expect("a number").parse().expect("a number")
}

/// Checks what launches move besides `least` bytes of rows: of the memory that they touch at most 15 %, with what blocks of
/// threads read anew (queries, shares of outputs) and write for each other at most 25 %; and passes over shared memory.
fn assert_few_bytes(name: &str, launches: &[String], least: f64) {
    let total = |name: &str| launches.iter().map(|line| field(line, name)).sum::<f64>();
    let (touched, moved) = (total("unique_bytes") / least, 32.0 * total("global_sectors") / least);
    let passes = total("shared_wavefronts") / total("shared_ideal");
    println!("{name}: touched {touched:.3}, moved {moved:.3}, passes over banks {passes:.3}");
    assert!(touched <= 1.15 && moved <= 1.25 && passes <= 1.1, "{name}: {launches:?}");
}

/// Groups whose heads fill more than 64 rows: gradients of two warpgroups, where the device has them.
#[test]
fn wide_groups() {
    on_simulator("wide_groups", || {
        for op in [Op::Cmp, Op::Slc, Op::Win, Op::Dense] {
            let config = paper(70, 1, 64, 64).compress_block(8).compress_stride(4).select_block(16).window(24);
            let case = Case::new("group-70", config.select_count(3), [70]);
            assert_cases(op, &[case], &[DType::F32, DType::Bf16]);
        }
    });
}

/// Tiles of keys whose queries are cut into parts, all of them whole, beside tiles that have fewer.
#[test]
fn parts_of_tiles() {
    on_simulator("parts_of_tiles", || {
        let config = || paper(16, 1, 64, 64).compress_block(8).compress_stride(4).select_block(16).window(65);
        for (op, longest) in [(Op::Dense, 128), (Op::Win, 128), (Op::Cmp, 135)] {
            let case = Case::new("parts", config().select_count(3), [longest, 40, 3]);
            assert_cases(op, &[case], &[DType::Bf16]);
        }
    });
}

/// Groups whose queries walk over the union of their blocks together: four queries, eight, seven
/// and one row that is none, one of two tiles.
#[test]
fn unions_of_lists() {
    on_an_h100("unions_of_lists", || {
        let config =
            |heads, block| paper(heads, 1, 64, 64).compress_block(8).compress_stride(4).select_block(block).window(24);
        let case = |heads, block, lengths: &[usize]| {
            Case::new(format!("group-{heads}"), config(heads, block).select_count(3), lengths.to_vec())
        };
        let cases = [case(16, 64, &[270, 45]), case(8, 32, &[120]), case(9, 32, &[100]), case(70, 32, &[100])];
        assert_cases(Op::Slc, &cases, &[DType::Bf16]);
    });
}

/// Groups whose scores are computed twice and summed within a warp, where the device has warpgroups: half of a warp's rows, all, two
/// warps'; and such whose are not, and take two tiles of keys at once, of which the second
/// may have one key behind the last alone. A sequence without a compressed key. A compressed block a selection block.
#[test]
fn importance_over_heads() {
    on_simulator("importance_over_heads", || {
        let case = |heads, lengths: &[usize]| {
            let config = paper(heads, 1, 64, 64).compress_block(8).compress_stride(4).select_block(16).window(24);
            Case::new(format!("group-{heads}"), config.select_count(6), lengths.to_vec())
        };
        let apart = paper(7, 1, 64, 64).compress_block(8).compress_stride(8).select_block(8).window(24);
        let cases = [
            case(8, &[120, 35]),
            case(16, &[130]),
            case(16, &[5]),
            case(32, &[100]),
            case(7, &[300, 260]),
            Case::new("apart", apart.select_count(6), [400, 35]),
        ];
        assert_cases(Op::Cmp, &cases, &[DType::F32, DType::Bf16]);
    });
}

/// So many compressed blocks that their scores are kept in the workspace.
#[test]
fn scores_in_memory() {
    on_simulator("scores_in_memory", || {
        let config = paper(1, 1, 64, 64).compress_block(2).compress_stride(1).select_block(4).window(8);
        let case = Case::new("scores-in-memory", config.select_count(5), [880]);
        assert_cases(Op::Cmp, &[case], &[DType::F32, DType::Bf16]);
    });
}

#[test]
fn gate() {
    on_an_a100("gate", || assert_op(Op::Gate));
}

#[test]
fn cmp() {
    on_simulator("cmp", || assert_op(Op::Cmp));
}

/// Blocks that are summed in registers and such that are not, one free place a lane and more.
#[test]
fn exact_ties_go_to_the_lower_block() {
    on_simulator("exact_ties_go_to_the_lower_block", || {
        let backend = Backend::cuda(0).expect("the simulator");
        let small = || NsaConfig::small().to_builder();
        let few = || small().select_initial(0).select_local(1).select_count(3);
        ties::assert_lower_blocks::<f32>(&backend, few(), &[200, 77]);
        ties::assert_lower_blocks::<bf16>(&backend, small().compress_stride(2), &[150]);
        ties::assert_lower_blocks::<bf16>(&backend, paper(4, 1, 64, 64).select_count(5), &[900]);
        ties::assert_lower_blocks::<f32>(&backend, small().select_count(40), &[800]);
    });
}

#[test]
fn slc() {
    on_simulator("slc", || assert_op(Op::Slc));
}

#[test]
fn win() {
    on_simulator("win", || assert_op(Op::Win));
}

#[test]
fn nsa() {
    on_simulator("nsa", || assert_large_op(Op::Nsa));
}
