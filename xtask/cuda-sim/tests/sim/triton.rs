//! Kernels that Triton compiled, against plain loops.

use crate::kit::Sim;
use cuda_sim::probe::random;
use half::{bf16, f16};
use rand::RngExt;

/// A module of `fixtures/triton`, with the dynamic shared memory that its first line names.
fn load(name: &str) -> Sim {
    let path = format!("{}/fixtures/triton/{name}.ptx", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let mut sim = Sim::new(&text);
    let shared = text.strip_prefix("// shared ").and_then(|rest| rest.split(',').next()).unwrap();
    sim.shared = shared.parse().unwrap();
    sim
}

fn uniform(name: &str, count: usize) -> Vec<f32> {
    let mut random = random(name);
    (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
}

/// How a matrix's elements are stored.
#[derive(Clone, Copy, Debug)]
enum Stored {
    Brain,
    Half,
    Tensor,
}

impl Stored {
    fn name(self) -> &'static str {
        match self {
            Self::Brain => "bf16",
            Self::Half => "fp16",
            Self::Tensor => "fp32",
        }
    }

    /// Bytes, and the numbers that they hold where a tensor core reads them.
    fn store(self, values: &[f32]) -> (Vec<u8>, Vec<f64>) {
        let mut bytes = Vec::new();
        let kept = values.iter().map(|value| match self {
            Self::Brain => {
                let short = bf16::from_f32(*value);
                bytes.extend(short.to_le_bytes());
                short.to_f64()
            }
            Self::Half => {
                let short = f16::from_f32(*value);
                bytes.extend(short.to_le_bytes());
                short.to_f64()
            }
            Self::Tensor => {
                bytes.extend(value.to_le_bytes());
                f64::from(*value)
            }
        });
        let kept = kept.collect();
        (bytes, kept)
    }

    /// What rounding an operand to tf32 may cost.
    fn slack(self) -> f64 {
        if matches!(self, Self::Tensor) { 2e-3 } else { 1e-6 }
    }
}

fn matmul(arch: u32, stored: Stored, masked: bool, [m, n, k]: [usize; 3]) {
    let name = format!("matmul_{}_{}_sm{arch}", stored.name(), if masked { "masked" } else { "aligned" });
    let sim = load(&name);
    let (a_bytes, a) = stored.store(&uniform("a", m * k));
    let (b_bytes, b) = stored.store(&uniform("b", k * n));
    let (pa, pb, pc) = (sim.bytes(&a_bytes), sim.bytes(&b_bytes), sim.blank(m as u64 * n as u64 * 4));
    let sizes = [m, n, k, k, n, n].map(|size| size as u64);
    let arguments = [&[pa, pb, pc][..], &sizes, &[0, 0]].concat();
    let grid = [m.div_ceil(64) as u32, n.div_ceil(64) as u32, 1];
    sim.launch_grid("matmul", grid, 128, &arguments).unwrap_or_else(|fault| panic!("{name}: {fault}"));
    for (at, got) in sim.read(pc, m * n).into_iter().enumerate() {
        let (row, column) = (at / n, at % n);
        let terms = (0..k).map(|i| a[row * k + i] * b[i * n + column]);
        let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
        let got = f64::from(f32::from_bits(got));
        assert!((got - sum).abs() <= stored.slack() * size, "{name} [{row}, {column}]: {got} against {sum}");
    }
}

#[test]
pub fn matrix_products_of_ampere() {
    for stored in [Stored::Brain, Stored::Half, Stored::Tensor] {
        matmul(80, stored, false, [128, 64, 96]);
        matmul(80, stored, true, [77, 65, 47]);
    }
}

fn softmax(arch: u32) {
    let sim = load(&format!("softmax_sm{arch}"));
    let (rows, n) = (3, 777);
    let x = uniform("softmax", rows * n);
    let (from, to) = (sim.floats(&x), sim.blank((rows * n * 4) as u64));
    sim.launch("softmax", rows as u32, 128, &[from, to, n as u64, 0, 0]).unwrap_or_else(|fault| panic!("{fault}"));
    for (row, got) in x.chunks_exact(n).zip(sim.read(to, rows * n).chunks_exact(n)) {
        let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        for (x, got) in row.iter().zip(got) {
            let want = f64::from(*x).exp() / total;
            let got = f64::from(f32::from_bits(*got));
            assert!((got - want).abs() <= 1e-6 * want, "{got} against {want}");
        }
    }
}

fn scan_and_sort(arch: u32) {
    let mut random = random("scan");
    let x: Vec<u32> = (0..1024).map(|_| random.random_range(0..1000)).collect();
    let sim = load(&format!("scan_sm{arch}"));
    let (from, to) = (sim.words(&x), sim.blank(4096));
    sim.launch("scan", 2, 128, &[from, to, 0, 0]).unwrap_or_else(|fault| panic!("{fault}"));
    let sums = x.chunks_exact(512).flat_map(|part| {
        part.iter().scan(0, |sum, x| {
            *sum += x;
            Some(*sum)
        })
    });
    assert_eq!(sim.read(to, 1024), sums.collect::<Vec<u32>>());

    let sim = load(&format!("sort_sm{arch}"));
    let (from, to) = (sim.words(&x), sim.blank(4096));
    sim.launch("sort", 4, 128, &[from, to, 0, 0]).unwrap_or_else(|fault| panic!("{fault}"));
    let mut sorted = x.clone();
    sorted.chunks_exact_mut(256).for_each(<[u32]>::sort_unstable);
    assert_eq!(sim.read(to, 1024), sorted);
}

fn attention(arch: u32) {
    let sim = load(&format!("attention_sm{arch}"));
    let (t, d) = (150, 64);
    let parts: Vec<(Vec<u8>, Vec<f64>)> =
        ["q", "k", "v"].iter().map(|name| Stored::Brain.store(&uniform(name, t * d))).collect();
    let places: Vec<u64> = parts.iter().map(|part| sim.bytes(&part.0)).collect();
    let out = sim.blank((t * d * 2) as u64);
    let scale = u64::from(0.125f32.to_bits());
    let arguments = [&places[..], &[out, t as u64, scale, 0, 0]].concat();
    sim.launch("attention", 3, 128, &arguments).unwrap_or_else(|fault| panic!("{fault}"));
    let got: Vec<f64> = sim
        .read(out, t * d / 2)
        .iter()
        .flat_map(|pair| [*pair as u16, (*pair >> 16) as u16])
        .map(|bits| bf16::from_bits(bits).to_f64())
        .collect();
    let (q, k, v) = (&parts[0].1, &parts[1].1, &parts[2].1);
    for row in 0..t {
        let scores: Vec<f64> =
            (0..=row).map(|key| 0.125 * (0..d).map(|i| q[row * d + i] * k[key * d + i]).sum::<f64>()).collect();
        let total: f64 = scores.iter().map(|s| s.exp()).sum();
        for i in 0..d {
            let want: f64 = scores.iter().enumerate().map(|(key, s)| s.exp() / total * v[key * d + i]).sum();
            let got = got[row * d + i];
            assert!((got - want).abs() <= 0.01 * want.abs() + 0.005, "[{row}, {i}]: {got} against {want}");
        }
    }
}

fn histogram(arch: u32) {
    let sim = load(&format!("histogram_sm{arch}"));
    let mut random = random("histogram");
    let n = 1000;
    let x: Vec<u32> = (0..n).map(|_| random.random_range(0..64)).collect();
    let (from, counts, sums) = (sim.words(&x), sim.words(&[0; 73]), sim.words(&[0; 4]));
    sim.launch("histogram", 4, 128, &[from, counts, sums, n as u64, 0, 0]).unwrap_or_else(|fault| panic!("{fault}"));
    let mut want = vec![0; 73];
    x.iter().for_each(|v| want[*v as usize] += 1);
    want[64] = *x.iter().max().unwrap();
    want[65..69].copy_from_slice(&[1, 2, 3, 4]);
    want[72] = 5;
    assert_eq!(sim.read(counts, 73), want);
    for (rest, got) in sim.read(sums, 4).into_iter().enumerate() {
        let want: u32 = x.iter().filter(|v| **v as usize % 4 == rest).sum();
        assert_eq!(f32::from_bits(got), want as f32);
    }
}

#[test]
pub fn kernels_of_hopper() {
    for stored in [Stored::Brain, Stored::Half, Stored::Tensor] {
        matmul(90, stored, false, [128, 64, 96]);
        matmul(90, stored, true, [77, 65, 47]);
    }
    softmax(90);
    scan_and_sort(90);
    attention(90);
    histogram(90);
}

#[test]
pub fn other_kernels_of_ampere() {
    softmax(80);
    scan_and_sort(80);
    attention(80);
    histogram(80);
}
