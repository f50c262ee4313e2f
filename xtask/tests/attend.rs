//! `cargo xtask attend` on files, against the reference called directly.

use half::{bf16, f16};
use nsa_core::NsaConfig;
use nsa_kernels::Isa;
use nsa_tests::generate::{PhiShapes, Side, Weights, widen};
use nsa_tests::operator::{Branches, Compressed, Inputs, Outputs};
use nsa_tests::reference::{self, Mode};
use nsa_tests::{Case, Kind, case};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

/// A tensor of a file: dtype, shape, bytes.
type Raw = (Dtype, Vec<usize>, Vec<u8>);
type File = BTreeMap<String, Raw>;

trait Stored: Kind {
    const STORED: Dtype;
}
impl Stored for f64 {
    const STORED: Dtype = Dtype::F64;
}
impl Stored for f32 {
    const STORED: Dtype = Dtype::F32;
}
impl Stored for bf16 {
    const STORED: Dtype = Dtype::BF16;
}
impl Stored for f16 {
    const STORED: Dtype = Dtype::F16;
}

fn raw<T: Stored>(shape: &[usize], data: &[T]) -> Raw {
    (T::STORED, shape.to_vec(), bytemuck::cast_slice(data).to_vec())
}

fn integers(shape: &[usize], data: &[i32]) -> Raw {
    (Dtype::I32, shape.to_vec(), bytemuck::cast_slice(data).to_vec())
}

/// Keys or values with φ's weights, as files name them.
fn put_side<T: Stored>(file: &mut File, config: &NsaConfig, side: Side, branches: &Branches<T>, rows: [usize; 2]) {
    let (letter, shapes) = (side.letter(), PhiShapes::new(config, side));
    let [_, groups, dim] = shapes.position;
    let mut put = |name: String, tensor: Raw| file.insert(name, tensor);
    match &branches.cmp {
        Compressed::Blocks(blocks) => {
            put(format!("{letter}_cmp_blocks"), raw(&[rows[1], groups, dim], blocks));
        }
        Compressed::Tokens { x, position, phi } => {
            put(format!("{letter}_cmp"), raw(&[rows[0], groups, dim], x));
            if let Some(e) = position {
                put(format!("pe_{letter}"), raw(&shapes.position, e));
            }
            let mut weight = |part: &str, shape: &[usize], data: &Vec<T>| {
                put(format!("phi_{letter}.{part}"), raw(shape, data));
            };
            match phi {
                Weights::Mean => {}
                Weights::Weighted(data) => weight("weight", &shapes.weighted, data),
                Weights::Linear(data) => weight("weight", &shapes.linear, data),
                Weights::Mlp { weight1, bias1, weight2, bias2 } => {
                    weight("0.weight", &shapes.weight1, weight1);
                    weight("2.weight", &shapes.weight2, weight2);
                    bias1.iter().for_each(|data| weight("0.bias", &shapes.bias1, data));
                    bias2.iter().for_each(|data| weight("2.bias", &shapes.bias2, data));
                }
            }
        }
    }
    file.insert(format!("{letter}_slc"), raw(&[rows[0], groups, dim], &branches.slc));
    file.insert(format!("{letter}_win"), raw(&[rows[0], groups, dim], &branches.win));
}

fn file<T: Stored>(inputs: &Inputs<T>) -> File {
    let (config, packing) = (&inputs.config, &inputs.packing);
    let (n, heads) = (packing.num_tokens(), config.num_heads());
    let rows = [n, packing.cu_blocks(config).unwrap().total()];
    let mut file = File::new();
    file.insert("q".into(), raw(&[n, heads, config.head_dim_qk()], &inputs.q));
    file.insert("gates".into(), raw(&[n, heads, 3], &inputs.gates));
    put_side(&mut file, config, Side::Key, &inputs.k, rows);
    put_side(&mut file, config, Side::Value, &inputs.v, rows);
    let offsets = packing.cu_seqlens().as_slice();
    file.insert("cu_seqlens".into(), integers(&[offsets.len()], offsets));
    if let Some(d_o) = &inputs.d_o {
        file.insert("do".into(), raw(&[n, heads, config.head_dim_v()], d_o));
    }
    if let Some(indices) = &inputs.block_indices {
        let shape = [n, config.num_kv_heads(), config.select_count()];
        file.insert("block_indices".into(), integers(&shape, indices));
    }
    file
}

struct Run {
    output: Output,
    folder: tempfile::TempDir,
}

impl Run {
    fn tensors(&self) -> File {
        let error = String::from_utf8_lossy(&self.output.stderr);
        assert!(self.output.status.success(), "{error}");
        let bytes = std::fs::read(self.folder.path().join("out.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let raw = |view: TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        file.tensors().into_iter().map(|(name, view)| (name, raw(view))).collect()
    }

    /// The message of a run that must fail, and must leave no output.
    fn error(&self) -> String {
        assert!(!self.output.status.success(), "it should have failed");
        let left: Vec<_> = std::fs::read_dir(self.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| name == "nsa.json" || name == "in.safetensors"), "{left:?}");
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }
}

fn write(folder: &Path, config: &str, file: &File) {
    std::fs::write(folder.join("nsa.json"), config).unwrap();
    let views = file
        .iter()
        .map(|(name, (dtype, shape, data))| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("in.safetensors"), bytes).unwrap();
}

fn attend_text(config: &str, file: &File, options: &[&str]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), config, file);
    run(folder, options)
}

fn run(folder: tempfile::TempDir, options: &[&str]) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["attend", "--config", "nsa.json", "--input", "in.safetensors", "--output", "out.safetensors"])
        .args(options)
        .env_remove("NSA_BACKEND")
        .current_dir(folder.path())
        .output()
        .unwrap();
    Run { output, folder }
}

fn attend(config: &NsaConfig, file: &File, options: &[&str]) -> Run {
    attend_text(&serde_json::to_string(config).unwrap(), file, options)
}

fn floats<T: Stored>(file: &File, name: &str) -> Vec<f64> {
    let (dtype, _, bytes) = file.get(name).unwrap_or_else(|| panic!("`{name}` is not there: {:?}", file.keys()));
    assert_eq!(*dtype, T::STORED, "{name}");
    let numbers: Vec<T> = bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect();
    widen(&numbers)
}

/// A tensor that a run must write.
struct Expected {
    name: String,
    values: Vec<f64>,
    /// Norm of the terms that it sums. Some gradients are 0 in exact arithmetic: a constant added to all keys of a group
    /// adds q·constant to all scores of a query and changes no softmax, nor does anything change that of one key. What is
    /// left of them is rounding of their terms, and to be measured against those.
    terms: f64,
}

fn norm(values: &[f64]) -> f64 {
    values.iter().filter(|x| x.is_finite()).map(|x| x * x).sum::<f64>().sqrt()
}

/// ‖a − b‖ / ‖b‖ over finite elements, or over the terms where b vanishes; infinities must be equal.
fn relative(expected: &Expected, a: &[f64]) -> f64 {
    let Expected { name, values, terms } = expected;
    assert_eq!(a.len(), values.len(), "{name}");
    let pairs = || a.iter().zip(values);
    for (x, y) in pairs() {
        assert!(x == y || (x.is_finite() && y.is_finite()), "{name}: {x} instead of {y}");
    }
    let errors: Vec<f64> = pairs().map(|(x, y)| if x == y { 0.0 } else { x - y }).collect();
    let vanishes = norm(values) < 1e-12 * terms;
    if norm(&errors) == 0.0 { 0.0 } else { norm(&errors) / if vanishes { *terms } else { norm(values) } }
}

/// scale·‖do‖·‖v‖·max(‖q‖, ‖k‖), of the largest rows of q, k and v: about the terms of dq and of gradients of keys.
fn terms_of_scores(inputs: &Inputs<f64>, out: &Outputs<f64, f64>) -> f64 {
    let (dk, dv) = (inputs.config.head_dim_qk(), inputs.config.head_dim_v());
    let row = |data: &[f64], dim: usize| data.chunks(dim).map(norm).fold(0.0, f64::max);
    let largest = |lists: [&[f64]; 4], dim: usize| lists.map(|list| row(list, dim)).into_iter().fold(0.0, f64::max);
    let k = largest([&inputs.q, &out.blocks[0], &inputs.k.slc, &inputs.k.win], dk);
    let v = largest([&[], &out.blocks[1], &inputs.v.slc, &inputs.v.win], dv);
    inputs.config.scale() * inputs.d_o.as_deref().map_or(0.0, norm) * v * k
}

/// The same inputs in f64.
fn exact<T: Kind>(inputs: &Inputs<T>) -> Inputs<f64> {
    Inputs {
        config: inputs.config.clone(),
        packing: inputs.packing.clone(),
        q: widen(&inputs.q),
        k: inputs.k.map(widen),
        v: inputs.v.map(widen),
        gates: widen(&inputs.gates),
        block_indices: inputs.block_indices.clone(),
        d_o: inputs.d_o.as_deref().map(widen),
    }
}

/// Norm of the gradient of k̃: its rows are the terms of the gradient of φ's last bias.
fn norm_of_d_blocks(inputs: &Inputs<f64>, truth: &Outputs<f64, f64>) -> f64 {
    let mut given = inputs.clone();
    given.k.cmp = Compressed::Blocks(truth.blocks[0].clone());
    given.block_indices = Some(truth.block_indices.clone());
    let out = reference::run(&given, Mode::Exact).unwrap();
    match &out.grads.unwrap().k.cmp {
        Compressed::Blocks(d_blocks) => norm(d_blocks),
        Compressed::Tokens { .. } => panic!("blocks were given"),
    }
}

/// Names and values that a run must write, from the reference's outputs.
fn expected(inputs: &Inputs<f64>, out: &Outputs<f64, f64>) -> Vec<Expected> {
    let plain = |name: String, values: &[f64]| Expected { name, values: values.to_vec(), terms: 0.0 };
    let mut list = vec![plain("o".into(), &out.o)];
    for (c, branch) in ["cmp", "slc", "win"].into_iter().enumerate() {
        list.push(plain(format!("o_{branch}"), &out.branches[c]));
    }
    let Some(grads) = &out.grads else { return list };
    let scores = terms_of_scores(inputs, out);
    list.extend([Expected { terms: scores, ..plain("dq".into(), &grads.q) }, plain("dgates".into(), &grads.gates)]);
    for (side, branches) in [("k", &grads.k), ("v", &grads.v)] {
        let scores = if side == "k" { scores } else { 0.0 };
        let plain = |name: String, values: &[f64]| Expected { terms: scores, ..plain(name, values) };
        list.push(plain(format!("d{side}_slc"), &branches.slc));
        list.push(plain(format!("d{side}_win"), &branches.win));
        match &branches.cmp {
            Compressed::Blocks(blocks) => list.push(plain(format!("d{side}_cmp_blocks"), blocks)),
            Compressed::Tokens { x, position, phi } => {
                list.push(plain(format!("d{side}_cmp"), x));
                // Under a linear φ e_k adds a constant to all k̃. Its gradient sums the terms that dk_cmp sums.
                let terms = if norm(x) > 1e-12 * scores { norm(x) } else { scores };
                list.extend(position.iter().map(|e| Expected { terms, ..plain(format!("dpe_{side}"), e) }));
                let part = |part: &str, values: &[f64]| plain(format!("dphi_{side}.{part}"), values);
                match phi {
                    Weights::Mean => {}
                    Weights::Weighted(data) | Weights::Linear(data) => list.push(part("weight", data)),
                    Weights::Mlp { weight1, bias1, weight2, bias2 } => {
                        list.extend([part("0.weight", weight1), part("2.weight", weight2)]);
                        list.extend(bias1.iter().map(|data| part("0.bias", data)));
                        // So does the last bias.
                        let terms = if side == "k" { norm_of_d_blocks(inputs, out).max(scores) } else { 0.0 };
                        list.extend(bias2.iter().map(|data| Expected { terms, ..part("2.bias", data) }));
                    }
                }
            }
        }
    }
    list
}

/// Runs the command on inputs and compares every tensor with the reference; returns what was written.
fn agree<T: Stored>(inputs: &Inputs<T>, backend: &[&str], tolerance: f64) -> File {
    let backward = if inputs.d_o.is_some() { vec!["--backward"] } else { Vec::new() };
    let options = [backend, &backward].concat();
    let written = attend(&inputs.config, &file(inputs), &options).tensors();
    let inputs = exact(inputs);
    let truth = reference::run(&inputs, Mode::Exact).unwrap();
    let list = expected(&inputs, &truth);
    let mut red = Vec::new();
    for expected in &list {
        let error = relative(expected, &floats::<T>(&written, &expected.name));
        if error > tolerance {
            red.push(format!("`{}` {error:e}", expected.name));
        }
    }
    for (c, branch) in ["cmp", "slc", "win"].into_iter().enumerate() {
        let lse = Expected { name: format!("lse_{branch}"), values: truth.lse[c].clone(), terms: 0.0 };
        let error = relative(&lse, &floats::<f32>(&written, &lse.name));
        if error > tolerance.max(1e-7) {
            red.push(format!("`{}` {error:e}", lse.name));
        }
    }
    assert!(red.is_empty(), "{options:?}, above {tolerance:e}: {}", red.join(", "));
    let bytes = written["block_indices"].2.chunks_exact(size_of::<i32>());
    let indices: Vec<i32> = bytes.map(bytemuck::pod_read_unaligned).collect();
    assert_eq!(indices, truth.block_indices);
    assert_eq!(written.len(), list.len() + 4, "{:?}", written.keys());
    written
}

fn find(name: &str) -> Case {
    case::find(name).unwrap()
}

/// The table's cases that the reference runs in no time: every φ, 1 to 16 heads a group and odd numbers of them, ragged
/// and empty batches, dims 192/128, strides of a whole block to an eighth.
fn cases() -> Vec<Case> {
    case::cases().into_iter().filter(|case| case.tokens() <= 160).collect()
}

#[test]
fn f32_agrees_forward_and_backward() {
    for case in cases() {
        let inputs = Inputs::<f32>::generate(&case);
        agree(&inputs, &["--backend", "cpu"], 2e-5);
        agree(&inputs, &["--backend", "ref"], 1e-6);
    }
}

#[test]
fn every_bias_of_an_mlp_has_its_gradient() {
    let mut inputs = Inputs::<f32>::generate(&find("odd-sizes"));
    for (side, branches) in [(Side::Key, &mut inputs.k), (Side::Value, &mut inputs.v)] {
        let shapes = PhiShapes::new(&inputs.config, side);
        let Compressed::Tokens { phi: Weights::Mlp { bias1, bias2, .. }, .. } = &mut branches.cmp else { panic!() };
        let make = |name: &str, shape: &[usize]| nsa_tests::generate::tensor(&find("odd-sizes"), name, shape, 0.5);
        *bias1 = Some(make("bias1", &shapes.bias1));
        *bias2 = Some(make("bias2", &shapes.bias2));
    }
    let written = agree(&inputs, &["--backend", "cpu"], 2e-5);
    agree(&inputs, &["--backend", "ref"], 1e-6);
    assert!(
        ["dphi_k.0.bias", "dphi_k.2.bias", "dphi_v.0.bias", "dphi_v.2.bias"].iter().all(|n| written.contains_key(*n))
    );
}

#[test]
fn half_precision_agrees_on_given_blocks() {
    for case in cases() {
        // k̃ rounded to 8 bits may select other blocks than exact k̃: the lists are given.
        let lists = nsa_tests::generate::selection(&case);
        let inputs = Inputs::<bf16> { block_indices: Some(lists.clone()), ..Inputs::generate(&case) };
        for isa in Isa::available() {
            agree(&inputs, &["--backend", "cpu", "--isa", isa.name()], 2e-2);
        }
        agree(&inputs, &["--backend", "ref"], 4e-3);
        let inputs = Inputs::<f16> { block_indices: Some(lists), ..Inputs::generate(&case) };
        agree(&inputs, &[], 2.5e-3);
    }
}

#[test]
fn f64_is_exact() {
    let inputs = Inputs::<f64>::generate(&find("odd-sizes"));
    let written = agree(&inputs, &["--backend", "ref"], 0.0);
    assert_eq!(written["lse_cmp"].0, Dtype::F32);
    agree(&inputs, &["--backend", "cpu"], 1e-13);
}

#[test]
fn forward_alone_needs_no_do_and_leaves_it_alone() {
    let mut inputs = Inputs::<f32>::generate(&find("ragged"));
    let with = file(&inputs);
    inputs.d_o = None;
    let written = agree(&inputs, &[], 2e-5);
    let run = attend(&inputs.config, &with, &[]);
    assert_eq!(run.tensors(), written);
    assert!(String::from_utf8_lossy(&run.output.stderr).contains("`do` takes no part"));
}

#[test]
fn without_cu_seqlens_there_is_one_sequence() {
    let case = Case { lengths: vec![78], ..find("odd-sizes") };
    let inputs = Inputs::<f32>::generate(&case);
    let mut without = file(&inputs);
    without.remove("cu_seqlens");
    let run = attend(&inputs.config, &without, &["--backward"]);
    assert_eq!(run.tensors(), agree(&inputs, &[], 2e-5));
}

#[test]
fn one_k_and_v_for_all_branches_get_the_sum_of_the_gradients() {
    let mut inputs = Inputs::<f32>::generate(&find("stride-eighth"));
    for branches in [&mut inputs.k, &mut inputs.v] {
        branches.win = branches.slc.clone();
        if let Compressed::Tokens { x, .. } = &mut branches.cmp {
            *x = branches.slc.clone();
        }
    }
    let mut shared = file(&inputs);
    for letter in ["k", "v"] {
        let one = shared.remove(&format!("{letter}_slc")).unwrap();
        shared.remove(&format!("{letter}_win"));
        shared.remove(&format!("{letter}_cmp"));
        shared.insert(letter.to_owned(), one);
    }
    let written = attend(&inputs.config, &shared, &["--backward"]).tensors();
    let apart = agree(&inputs, &[], 2e-5);
    assert_eq!(written["o"], apart["o"]);
    for letter in ["k", "v"] {
        let [a, b, c] = ["cmp", "slc", "win"].map(|b| floats::<f32>(&apart, &format!("d{letter}_{b}")));
        let sum: Vec<f64> = (0..a.len()).map(|i| a[i] + b[i] + c[i]).collect();
        let sum = Expected { name: format!("d{letter}"), values: sum, terms: 0.0 };
        let error = relative(&sum, &floats::<f32>(&written, &sum.name));
        assert!(error < 1e-6, "{}: {error:e}", sum.name);
        assert!(!written.contains_key(&format!("d{letter}_slc")));
    }
}

#[test]
fn given_blocks_skip_phi() {
    let case = find("63-group-1");
    let mut inputs = Inputs::<f32>::generate(&case);
    let shape = |side: Side| [case.blocks(), case.config.num_kv_heads(), side.dim(&case.config)];
    let blocks = |side: Side| nsa_tests::generate::tensor(&case, "blocks", &shape(side), 1.0);
    inputs.k.cmp = Compressed::Blocks(blocks(Side::Key));
    // One side alone: rotated keys, values through φ.
    agree(&inputs, &[], 2e-5);
    agree(&inputs, &["--backend", "ref"], 1e-6);
    inputs.v.cmp = Compressed::Blocks(blocks(Side::Value));
    let written = agree(&inputs, &[], 2e-5);
    assert!(written.contains_key("dk_cmp_blocks") && !written.contains_key("dk_cmp"));
}

/// The message for one change of a good input.
fn refused(change: impl FnOnce(&mut File), options: &[&str]) -> String {
    let inputs = Inputs::<f32>::generate(&find("odd-sizes"));
    let mut file = file(&inputs);
    change(&mut file);
    attend(&inputs.config, &file, options).error()
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| message.contains(part)), "{message}");
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let missing = |name: &'static str| refused(move |file| drop(file.remove(name)), &["--backward"]);
    says(&missing("k_slc"), &["in.safetensors", "`k_slc` is missing", "[79, 3, 5]"]);
    says(&missing("q"), &["`q` is missing"]);
    says(&missing("phi_v.2.weight"), &["`phi_v.2.weight` is missing", "[3, 7, 3]"]);
    says(&missing("do"), &["`do` is missing", "[79, 15, 3]"]);
    let unknown = refused(|file| drop(file.insert("k_sel".into(), integers(&[1], &[0]))), &[]);
    says(&unknown, &["unknown tensor `k_sel`", "k_slc"]);
    let other_phi = refused(|file| drop(file.insert("phi_k.weight".into(), integers(&[1], &[0]))), &[]);
    says(&other_phi, &["unknown tensor `phi_k.weight`", "mlp"]);
    let shape = refused(|file| file.get_mut("v_win").unwrap().1 = vec![79, 9, 1], &[]);
    says(&shape, &["`v_win` has shape [79, 9, 1], expected [79, 3, 3]"]);
    let rank = refused(|file| file.get_mut("q").unwrap().1 = vec![79 * 15, 5], &[]);
    says(&rank, &["`q` has shape [1185, 5], expected [N, 15, 5]"]);
    let mixed = refused(|file| drop(file.insert("gates".into(), raw(&[79, 15, 3], &vec![0f64; 79 * 45]))), &[]);
    says(&mixed, &["`gates` has dtype F64, expected F32"]);
    let integer = refused(|file| file.get_mut("q").unwrap().0 = Dtype::I32, &[]);
    says(&integer, &["`q` has dtype I32, expected F32, BF16, F16 or F64"]);
    let both = refused(|file| drop(file.insert("k".into(), file["k_slc"].clone())), &[]);
    says(&both, &["`k` and `k_cmp` are both there"]);
}

#[test]
fn a_run_that_fails_leaves_an_earlier_output_alone() {
    let inputs = Inputs::<f32>::generate(&find("odd-sizes"));
    let mut broken = file(&inputs);
    broken.remove("gates");
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &serde_json::to_string(&inputs.config).unwrap(), &broken);
    std::fs::write(folder.path().join("out.safetensors"), "earlier").unwrap();
    let run = run(folder, &[]);
    assert_eq!(run.output.status.code(), Some(1));
    says(&String::from_utf8_lossy(&run.output.stderr), &["`gates` is missing", "F32 [79, 15, 3]"]);
    assert_eq!(std::fs::read(run.folder.path().join("out.safetensors")).unwrap(), b"earlier");
    assert_eq!(std::fs::read_dir(run.folder.path()).unwrap().count(), 3);
}

#[test]
fn sequences_and_block_lists_are_checked() {
    let offsets = |list: &'static [i32]| {
        refused(move |file| drop(file.insert("cu_seqlens".into(), integers(&[list.len()], list))), &[])
    };
    says(&offsets(&[0, 60]), &["`cu_seqlens`", "ends at 60", "79 rows"]);
    says(&offsets(&[0, 60, 50, 79]), &["`cu_seqlens`", "must not decrease"]);
    says(&offsets(&[1, 79]), &["`cu_seqlens`", "must be 0"]);
    let dtype = refused(|file| file.get_mut("cu_seqlens").unwrap().0 = Dtype::U32, &[]);
    says(&dtype, &["`cu_seqlens` has dtype U32, expected I32"]);
    let lists = |row: usize, list: [i32; 3]| {
        let mut indices = vec![-1; 79 * 3 * 3];
        indices[(row * 3 + 1) * 3..][..3].copy_from_slice(&list);
        refused(move |file| drop(file.insert("block_indices".into(), integers(&[79, 3, 3], &indices))), &[])
    };
    says(&lists(20, [0, 3, -1]), &["`block_indices`[20, 1]", "below 3"]);
    says(&lists(20, [1, 0, -1]), &["`block_indices`[20, 1]", "ascending"]);
    says(&lists(20, [0, -1, 1]), &["`block_indices`[20, 1]"]);
    says(&lists(20, [0, 0, -1]), &["`block_indices`[20, 1]"]);
    // Row 55 is position 5 of the second sequence: one block.
    says(&lists(55, [0, 1, -1]), &["`block_indices`[55, 1]", "below 1"]);
}

#[test]
fn backends_configurations_and_files_are_checked() {
    let ok = |_: &mut File| ();
    says(&refused(ok, &["--backend", "cuda"]), &["cuda", "not available"]);
    says(&refused(ok, &["--backend", "ref", "--isa", "portable"]), &["--isa portable does not fit --backend ref"]);
    let inputs = Inputs::<f32>::generate(&find("odd-sizes"));
    let good = file(&inputs);
    let json = serde_json::to_string(&inputs.config).unwrap();
    let field = attend_text(&json.replace("window", "windows"), &good, &[]).error();
    says(&field, &["nsa.json", "windows"]);
    let kind = attend_text(&json.replace("\"window\":7", "\"window\":\"7\""), &good, &[]).error();
    says(&kind, &["nsa.json", "`window`: invalid type: string \"7\", expected usize"]);
    let list = attend_text("[15, 3, 5, 3, 6, 3, 6, 3, 1, 1, 7, \"mean\", null, null]", &good, &[]).error();
    says(&list, &["nsa.json", "invalid type: sequence, expected an object"]);
    let rule = attend_text(&json.replace("\"compress_stride\":3", "\"compress_stride\":4"), &good, &[]).error();
    says(&rule, &["nsa.json", "compress_block", "multiple of compress_stride"]);
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &json, &good);
    let path = folder.path().join("in.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    says(&run(folder, &[]).error(), &["in.safetensors is no whole safetensors file"]);
}

#[test]
fn a_reason_is_said_once() {
    let folder = tempfile::tempdir().unwrap();
    let no_config = run(folder, &[]).error();
    says(&no_config, &["nsa.json: cannot be read"]);
    assert_eq!(no_config.matches("No such file").count(), 1, "{no_config}");
    let inputs = Inputs::<f32>::generate(&find("odd-sizes"));
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &serde_json::to_string(&inputs.config).unwrap(), &file(&inputs));
    // Eight bytes announce a header of so many bytes, which is no JSON.
    std::fs::write(folder.path().join("in.safetensors"), b"\x08\0\0\0\0\0\0\0{\"a\": 1,").unwrap();
    let no_header = run(folder, &[]).error();
    assert_eq!(no_header.matches("line 1").count(), 1, "{no_header}");
}

#[test]
fn a_number_of_threads_that_is_none_is_refused() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_xtask")).arg("info").env("RAYON_NUM_THREADS", "abc").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    says(&said, &["RAYON_NUM_THREADS = `abc`", "must be a positive whole number"]);
}

#[test]
fn negative_numbers_are_values() {
    for arguments in [["bench", "--heads", "-1"], ["bench", "--tokens", "-1"], ["demo", "--steps", "-1"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask")).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        says(&said, &[&format!("invalid value '-1' for '{}", arguments[1])]);
    }
}
