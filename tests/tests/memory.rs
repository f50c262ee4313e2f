//! Nothing of size T×M or T×T exists: what the operator takes beside inputs and outputs stays small and grows no faster
//! than T. `cargo xtask check --memory` measures 65,536 tokens.

use nsa_kernels::Backend;
use nsa_tests::memory::MEASURES;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Bytes that are allocated at most while the closure runs, above those before.
fn allocated(run: &mut dyn FnMut() -> Result<(), String>) -> Result<u64, String> {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    run()?;
    Ok((MEMORY.peak_usage() - before) as u64)
}

/// One test: what other threads allocate would count.
#[test]
fn memory_beside_inputs_and_outputs_is_linear_in_tokens() {
    // Scratch is one set a thread: a number that does not depend on the machine.
    let threads = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    for (name, measure) in MEASURES {
        let peak = |tokens| {
            // A new backend: none of its scratch is there yet.
            let (backend, _) = Backend::pick(None).unwrap();
            threads.install(|| measure(&backend, tokens, &allocated)).unwrap()
        };
        let (half, whole) = (peak(1536), peak(3072));
        println!("{name}: {half:?} at 1536 tokens, {whole:?} at 3072");
        // The scores of 16 heads would be 36 MiB at T×M and 576 MiB at T×T; the forward may take 12.
        assert!(whole.bytes <= whole.limit_bytes, "{name}: {whole:?}");
        assert!(whole.bytes as f64 <= 2.1 * half.bytes as f64, "{name}: {half:?} at half the tokens of {whole:?}");
    }
}
