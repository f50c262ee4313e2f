//! Text that is no PTX gives an error with its line, never a panic and never silence.

use cuda_sim::Module;
use cuda_sim::exec::{Launch, Options};
use cuda_sim::memory::DeviceMemory;
use cuda_sim::probe::cases;
use proptest::prelude::*;

fn error(body: &str) -> String {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n.reg .b32 r<4>;\n.reg .b64 d;\n.reg .pred q;\n{body}\nret;\n}}\n"
    );
    Module::load(&text, &DeviceMemory::new(1 << 20)).unwrap_err().to_string()
}

#[test]
fn errors_name_line_and_text() {
    for (body, what) in [
        ("frobnicate.u32 r0, r1;", "`frobnicate.u32` is not supported"),
        ("add.u32.fast r0, r1, r2;", "modifier `.fast`"),
        ("add.u32 r0, r1;", "with 2 operands"),
        ("add.u32 r0, r1, none;", "`none` is not known here"),
        ("add.u64 d, d, r0;", "32 bits where 64 are needed"),
        ("bra NOWHERE;", "`NOWHERE` is no label"),
        ("@r0 bra NOWHERE;", "`r0` is no predicate"),
        ("mov.u32 q, r0;", "of another kind"),
        ("ld.global.u32 r0, r1;", "expected an address"),
        ("mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32 {r0}, {r0}, {r0}, {r0};", "not supported"),
        ("call foo, (r0);", "not declared"),
        ("cp.async.ca.shared.global [r0], [d], 7;", "a copy of 7 bytes"),
    ] {
        let error = error(body);
        assert!(error.contains(what), "{body}: {error}");
        assert!(error.contains("PTX line 9"), "{body}: {error}");
        assert!(error.contains(body.trim_end_matches(';')), "{body}: {error}");
    }
}

/// What ptxas refuses for a target, and takes for the next one.
#[test]
fn a_target_has_its_instructions() {
    let load = |target: &str, body: &str| {
        let text = format!(
            ".version 8.0\n.target {target}\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n.shared .align 128 .b8 s[1024];\n.reg .b32 r<8>;\n.reg .b64 d<8>;\n.reg .b16 h<4>;\n.reg .pred q;\n{body}\nret;\n}}\n"
        );
        Module::load(&text, &DeviceMemory::new(1 << 20)).map(|_| ()).map_err(|error| error.to_string())
    };
    for (least, body) in [
        ("sm_80", "cp.async.wait_all;"),
        ("sm_80", "redux.sync.add.u32 r3, r2, -1;"),
        ("sm_80", "mbarrier.init.shared.b64 [r1], r2;"),
        ("sm_80", "mbarrier.test_wait.parity.shared.b64 q, [r1], r2;"),
        ("sm_90", "mbarrier.try_wait.parity.shared.b64 q, [r1], r2;"),
        ("sm_90", "mbarrier.arrive.shared.b64 d1, [r1], 3;"),
        ("sm_90", "mbarrier.arrive.expect_tx.shared.b64 _, [r1], r2;"),
        ("sm_90", "mbarrier.expect_tx.relaxed.cta.shared.b64 [r1], r2;"),
        ("sm_90", "elect.sync r3|q, -1;"),
        ("sm_90", "fence.proxy.async;"),
        ("sm_90", "fence.mbarrier_init.release.cluster;"),
        ("sm_90", "fence.acq_rel.cluster;"),
        ("sm_90", "griddepcontrol.wait;"),
        ("sm_90", "stmatrix.sync.aligned.m8n8.x1.shared.b16 [r1], {r2};"),
        ("sm_90", "barrier.cluster.arrive;"),
        ("sm_90", "cp.async.bulk.commit_group;"),
        ("sm_90", "ld.shared::cluster.u32 r3, [r1];"),
        ("sm_90", "ld.relaxed.cluster.global.u32 r3, [d0];"),
        ("sm_90", "prefetch.tensormap [d0];"),
        ("sm_90", "red.global.add.noftz.bf16x2 [d0], r2;"),
        ("sm_90", "sub.bf16x2 r3, r1, r2;"),
        ("sm_90a", "setmaxnreg.inc.sync.aligned.u32 128;"),
        ("sm_90a", "wgmma.fence.sync.aligned;"),
        ("sm_75", "fence.proxy.alias;"),
        ("sm_75", "ld.shared::cta.u32 r3, [r1];"),
        ("sm_75", "fence.acq_rel.cta;"),
    ] {
        for target in ["sm_75", "sm_80", "sm_90", "sm_90a"] {
            let found = load(target, body);
            let refused = found.as_ref().is_err_and(|error| error.contains("needs .target sm_"));
            assert!(if target < least { refused } else { found.is_ok() }, "{target}, {body}: {found:?}");
        }
    }
    for (bytes, good) in [(48 * 1024 - 1024, true), (48 * 1024 - 1023, false)] {
        let found = load("sm_90a", &format!(".shared .align 1 .b8 more[{bytes}];"));
        assert_eq!(found.is_ok(), good, "{found:?}");
        assert!(good || found.unwrap_err().contains("49153 bytes of static shared memory"));
    }
}

#[test]
fn what_is_not_ptx_is_refused() {
    for text in
        ["", "hello", ".version 6.0\n.target sm_80", ".version 8.0\n.target sm_80\n.entry k(", "\"", "/*", "{{{{{{"]
    {
        assert!(Module::load(text, &DeviceMemory::new(1 << 20)).is_err(), "{text:?}");
    }
}

/// Loads damaged text and, where it still loads, runs it: neither may panic or hang.
fn try_all(text: &str) {
    let memory = DeviceMemory::new(1 << 24);
    let Ok(module) = Module::load(text, &memory) else { return };
    let options = Options { budget: 100_000, ..Options::default() };
    for kernel in module.kernels.values() {
        let input = memory.allocate(1 << 16, false).unwrap();
        let mut params = vec![0; kernel.param_bytes as usize];
        for (offset, bytes) in &kernel.params {
            let count = (*bytes as usize).min(8);
            params[*offset as usize..*offset as usize + count].copy_from_slice(&input.to_le_bytes()[..count]);
        }
        let block = kernel.required_threads.filter(|size| size.iter().product::<u32>() <= 1024).unwrap_or([64, 1, 1]);
        if !block.contains(&0) {
            let _ = Launch::new(kernel, ([1, 1, 1], block), 16384, &params, memory.snapshot(), &options).run();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_text_is_read_without_a_panic(text in "[ -~\\n]{0,200}") {
        try_all(&format!(".version 8.0\n.target sm_80\n.address_size 64\n{text}"));
    }

    #[test]
    fn damaged_kernels_neither_panic_nor_hang(
        number in 0usize..10_000, at in 0.0f64..1.0, length in 0usize..12, patch in "[a-z0-9.,%@;{}\\[\\]+-]{0,8}",
    ) {
        let all = cases_once();
        let text = &all[number % all.len()];
        let start = (at * text.len() as f64) as usize;
        let end = (start + length).min(text.len());
        try_all(&format!("{}{patch}{}", &text[..start], &text[end..]));
    }

    #[test]
    fn swapped_lines_neither_panic_nor_hang(number in 0usize..10_000, a in 0.0f64..1.0, b in 0.0f64..1.0) {
        let all = cases_once();
        let mut lines: Vec<&str> = all[number % all.len()].lines().collect();
        let place = |at: f64| (at * lines.len() as f64) as usize;
        let (a, b) = (place(a), place(b));
        lines.swap(a, b);
        try_all(&lines.join("\n"));
    }
}

/// Pieces that damage puts into compilers' kernels: what is there elsewhere is worse than noise.
const PIECES: [&str; 24] = [
    "%r1",
    "%rd1",
    "%f1",
    "%p1",
    "%rs1",
    "[%r1]",
    "[%rd1+4]",
    "-1",
    "0",
    "0x7fffffff",
    "4294967296",
    "0f7FC00000",
    ".u64",
    ".b16",
    ".v4",
    ".shared",
    ".global",
    ".local",
    ".sync",
    ".aligned",
    "@%p1",
    "bra $L__BB0_1;",
    "ret;",
    "bar.sync 0;",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    /// Words of compilers' kernels lost, doubled, exchanged with others or replaced.
    #[test]
    fn damaged_words_of_compilers_neither_panic_nor_hang(
        number in 0usize..10_000,
        edits in prop::collection::vec((0.0f64..1.0, 0.0f64..1.0, 0usize..PIECES.len(), 0u8..4), 1..6),
    ) {
        let all = compiled_once();
        let mut words: Vec<&str> = all[number % all.len()].split_inclusive([' ', '\t', '\n', ',', ';']).collect();
        for (at, other, piece, kind) in edits {
            let place = |at: f64| (at * words.len() as f64) as usize;
            let (at, other) = (place(at), place(other));
            match kind {
                0 => _ = words.remove(at),
                1 => words.insert(at, words[other]),
                2 => words.swap(at, other),
                _ => words[at] = PIECES[piece],
            }
        }
        try_all(&words.concat());
    }
}

/// Kernels that Triton compiled.
fn compiled_once() -> &'static [String] {
    static TEXTS: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
    TEXTS.get_or_init(|| {
        let folder = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/triton")).unwrap();
        let mut paths: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "ptx"));
        paths.sort();
        paths.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect()
    })
}

fn cases_once() -> &'static [String] {
    static TEXTS: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
    TEXTS.get_or_init(|| cases(90).into_iter().map(|case| case.ptx).collect())
}
