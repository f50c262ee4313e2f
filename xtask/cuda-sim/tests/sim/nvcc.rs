//! Kernels that nvcc compiles on the spot, with the pinned toolchain or the machine's.

use crate::kit::Sim;
use cuda_sim::exec::FaultKind;
use cuda_sim::probe::random;
use cuda_sim::toolchain::Toolchain;
use rand::RngExt;
use std::path::Path;

fn toolchain() -> Toolchain {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/toolchain");
    Toolchain::find_or_fetch(&target).unwrap_or_else(|error| panic!("{error}"))
}

/// The module, compiled once.
fn block() -> Sim {
    static PTX: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let ptx = PTX.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("block.cu");
        std::fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/nvcc/block.cu"), &source).unwrap();
        toolchain().compile(&source, "sm_80", &[]).unwrap_or_else(|error| panic!("{error}"))
    });
    Sim::new(ptx)
}

fn numbers(count: usize) -> Vec<u32> {
    let mut random = random("nvcc");
    (0..count).map(|_| random.random_range(0..100_000)).collect()
}

#[test]
pub fn block_primitives_of_cub() {
    let sim = block();
    let x = numbers(512);
    let (from, to) = (sim.words(&x), sim.blank(2048));
    sim.launch("reduce", 4, 128, &[from, to]).unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(sim.read(to, 4), x.chunks_exact(128).map(|part| part.iter().sum()).collect::<Vec<u32>>());
    sim.launch("scan", 1, 128, &[from, to]).unwrap_or_else(|fault| panic!("{fault}"));
    let sums: Vec<u32> = (0..128).map(|at| x[..at].iter().sum()).collect();
    assert_eq!(sim.read(to, 128), sums);
    sim.launch("sort", 1, 128, &[from, to]).unwrap_or_else(|fault| panic!("{fault}"));
    let mut sorted = x;
    sorted.sort_unstable();
    assert_eq!(sim.read(to, 512), sorted);
}

#[test]
pub fn functions_local_memory_and_a_switch() {
    let sim = block();
    let n = 200;
    let mut x: Vec<f32> = (0..n).map(|i| (i % 37) as f32 * 0.75).collect();
    // An angle that is reduced in local memory, by thread 147.
    x[150] = 1e6;
    let (from, to) = (sim.floats(&x), sim.blank(4 * n as u64));
    sim.launch("functions", 2, 128, &[from, to, n as u64]).unwrap_or_else(|fault| panic!("{fault}"));
    for (i, got) in sim.read(to, n).into_iter().enumerate() {
        let local = |k: usize| f64::from(x[(i + k) % n]);
        let chosen = x[i] as usize & 7;
        let v = local(chosen);
        let want = match chosen {
            0 => v * v + 3.0,
            1 => v.exp(),
            2 => v.sqrt(),
            3 => v.sin(),
            4 => v / 7.0,
            _ => v * v + 3.0 * local((chosen + 1) & 7),
        };
        let got = f64::from(f32::from_bits(got));
        assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{i}: {got} against {want}");
    }
}

#[test]
pub fn an_assertion_names_its_source() {
    let sim = block();
    sim.launch("says", 1, 32, &[5]).unwrap_or_else(|fault| panic!("{fault}"));
    let fault = sim.launch("says", 1, 32, &[13]).unwrap_err();
    let FaultKind::Assert { message } = &fault.kind else { panic!("{fault}") };
    assert!(message.contains("value != 13") && message.contains("block.cu"), "{message}");
    assert!(fault.to_string().contains("source") && fault.to_string().contains("block.cu:"), "{fault}");
}

/// The assembler takes what the simulator ran, and tells its resources.
#[test]
fn kernels_are_assembled() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["attention_sm80", "matmul_bf16_aligned_sm80"] {
        let ptx = format!("{}/fixtures/triton/{name}.ptx", env!("CARGO_MANIFEST_DIR"));
        let found = toolchain().assemble(Path::new(&ptx), "sm_80", &folder.path().join("out.cubin"));
        let found = found.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(found.len(), 1);
        assert!(found[0].registers > 16 && found[0].registers < 256 && found[0].spills == (0, 0), "{found:?}");
    }
}
