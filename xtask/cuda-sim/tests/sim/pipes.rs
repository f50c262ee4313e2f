//! What works by itself: seeded defects of bulk copies and `wgmma` on sm_90a, and `cp.async` that lands late.

use crate::defects::{check_by, defect};
use crate::kit::Sim;
use cuda_sim::exec::{Fault, Summary};

/// One CTA of 128 threads.
fn run(body: &str) -> Result<Summary, Box<Fault>> {
    run_of(128, body)
}

/// One CTA. `in` holds 1024 words, `out` as many. `s` is shared memory of 4096 bytes that holds zeros, `ms`
/// the thread's 16 bytes of its first half, `mb` a barrier object for one arrival.
fn run_of(threads: u32, body: &str) -> Result<Summary, Box<Fault>> {
    let text = format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n\
         .visible .entry k(.param .u64 pin, .param .u64 pout)\n{{\n\
         .shared .align 128 .b8 buffer[4096];\n.shared .align 8 .b8 object[8];\n\
         .reg .b32 r<16>;\n.reg .f32 f<8>;\n.reg .b32 tid, s, ms, mb;\n.reg .b64 d<8>;\n.reg .b64 in, out;\n\
         .reg .pred p<4>;\n.reg .pred first, never;\n\
         mov.u32 tid, %tid.x;\nld.param.u64 in, [pin];\nld.param.u64 out, [pout];\nmov.u32 s, buffer;\nmov.u32 mb, object;\n\
         shl.b32 r0, tid, 4;\nadd.u32 ms, s, r0;\nsetp.eq.u32 first, tid, 0;\nsetp.gt.u32 never, tid, 1000;\n\
         mov.u32 r1, 0;\nst.shared.v4.u32 [ms], {{r1, r1, r1, r1}};\nst.shared.v4.u32 [ms+2048], {{r1, r1, r1, r1}};\n\
         @first mbarrier.init.shared.b64 [mb], 1;\nfence.proxy.async;\nbar.sync 0;\n{body}\nret;\n}}\n"
    );
    let mut sim = Sim::new(&text);
    sim.options.budget = 2_000_000;
    let (input, out) = (sim.words(&[3; 1024]), sim.blank(4096));
    sim.launch("k", 1, threads, &[input, out])
}

/// A load of 64 bytes that one thread starts.
macro_rules! load {
    () => {
        "@!first bra GO;\nmbarrier.arrive.expect_tx.shared.b64 _, [mb], 64;\ncp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [in], 64, [mb];\nGO:\n"
    };
}

/// Two loads of 64 bytes that one thread starts, the second so many bytes behind the first's place.
macro_rules! loads {
    ($at:literal) => {
        concat!(
            "@!first bra GO;\nmbarrier.arrive.expect_tx.shared.b64 _, [mb], 128;\ncp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [in], 64, [mb];\n\
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s+", $at, "], [in+64], 64, [mb];\nGO:\n"
        )
    };
}

/// The wait for it.
macro_rules! wait {
    () => {
        "L:\nmbarrier.try_wait.parity.shared.b64 p0, [mb], 0;\n@!p0 bra L;\n"
    };
}

/// A store of 64 bytes that one thread starts, and the rest of the body only that thread runs.
macro_rules! store {
    () => {
        "@!first bra END;\ncp.async.bulk.global.shared::cta.bulk_group [out], [s], 64;\ncp.async.bulk.commit_group;\n"
    };
}

/// A product of zeros, of 64 rows, 8 columns, 16 deep.
macro_rules! product {
    () => {
        "shr.u32 r2, s, 4;\ncvt.u64.u32 d2, r2;\nor.b64 d2, d2, 0x0000001000080000;\nadd.u64 d3, d2, 128;\nwgmma.fence.sync.aligned;\n\
         wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, d2, d3, never, 1, 1, 0, 0;\nwgmma.commit_group.sync.aligned;\n"
    };
}

/// The same with A in registers.
macro_rules! product_of_registers {
    () => {
        "shr.u32 r2, s, 4;\ncvt.u64.u32 d2, r2;\nor.b64 d2, d2, 0x0000001000080000;\nmov.u32 r4, 0;\nmov.u32 r5, 0;\nmov.u32 r6, 0;\nmov.u32 r7, 0;\nwgmma.fence.sync.aligned;\n\
         wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, {r4, r5, r6, r7}, d2, never, 1, 1, 0;\nwgmma.commit_group.sync.aligned;\n"
    };
}

#[test]
fn bulk_copies() {
    let defects = [
        defect(
            "its own load is read before the wait",
            "pending copy",
            concat!(load!(), "@first ld.shared.u32 r3, [s+4];\n", wait!()),
            concat!(load!(), wait!(), "@first ld.shared.u32 r3, [s+4];\n"),
        ),
        defect(
            "another's load is read before the wait",
            "pending copy",
            concat!(load!(), "bar.sync 0;\nld.shared.u32 r3, [s+4];\n", wait!()),
            concat!(load!(), "bar.sync 0;\n", wait!(), "ld.shared.u32 r3, [s+4];\n"),
        ),
        defect(
            "a load is overwritten before the wait",
            "pending copy",
            concat!(load!(), "@first st.shared.u32 [s], tid;\n", wait!()),
            concat!(load!(), wait!(), "@first st.shared.u32 [s], tid;\n"),
        ),
        defect("two loads to one place", "pending copy", concat!(loads!("0"), wait!()), concat!(loads!("64"), wait!())),
        defect(
            "the source of a store is overwritten before the wait",
            "pending read",
            concat!(store!(), "st.shared.u32 [s+8], tid;\nEND:"),
            concat!(store!(), "cp.async.bulk.wait_group.read 0;\nst.shared.u32 [s+8], tid;\nEND:"),
        ),
        defect(
            "a wait that leaves the store's group open",
            "pending read",
            concat!(store!(), "cp.async.bulk.wait_group.read 1;\nst.shared.u32 [s+8], tid;\nEND:"),
            concat!(
                store!(),
                "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 1;\nst.shared.u32 [s+8], tid;\nEND:"
            ),
        ),
        defect(
            "another overwrites the source after the wait, without a barrier",
            "race",
            concat!(
                store!(),
                "cp.async.bulk.wait_group.read 0;\nEND:\nsetp.eq.u32 p1, tid, 32;\n@p1 st.shared.u32 [s+8], tid;"
            ),
            concat!(
                store!(),
                "cp.async.bulk.wait_group.read 0;\nEND:\nbar.sync 0;\nsetp.eq.u32 p1, tid, 32;\n@p1 st.shared.u32 [s+8], tid;"
            ),
        ),
    ];
    check_by(run, &defects);
}

/// Shared memory is another CTA's once the last warp ended: copies must be over by then.
#[test]
fn copies_at_the_end() {
    let defects = [
        defect(
            "a load that nobody waits for",
            "open copy",
            load!(),
            concat!(load!(), "@!first bra END;\n", wait!(), "END:"),
        ),
        defect(
            "a second load that nobody waits for",
            "open copy",
            concat!(
                load!(),
                wait!(),
                "bar.sync 0;\n@!first bra GO2;\nmbarrier.arrive.expect_tx.shared.b64 _, [mb], 64;\ncp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s+64], [in], 64, [mb];\nGO2:\n"
            ),
            concat!(
                load!(),
                wait!(),
                "bar.sync 0;\n@!first bra GO2;\nmbarrier.arrive.expect_tx.shared.b64 _, [mb], 64;\ncp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s+64], [in], 64, [mb];\nGO2:\nL2:\nmbarrier.try_wait.parity.shared.b64 p0, [mb], 1;\n@!p0 bra L2;\n"
            ),
        ),
        defect(
            "a store that is not waited for",
            "open copy",
            concat!(store!(), "END:"),
            concat!(store!(), "cp.async.bulk.wait_group.read 0;\nEND:"),
        ),
        defect(
            "a store in no group",
            "open copy",
            "@!first bra END;\ncp.async.bulk.global.shared::cta.bulk_group [out], [s], 64;\ncp.async.bulk.wait_group.read 0;\nEND:",
            concat!(store!(), "cp.async.bulk.wait_group 0;\nEND:"),
        ),
    ];
    check_by(run, &defects);
}

#[test]
fn products() {
    let defects = [
        defect(
            "accumulators are read before the wait",
            "pending product",
            concat!(product!(), "add.f32 f4, f0, f1;\nwgmma.wait_group.sync.aligned 0;"),
            concat!(product!(), "wgmma.wait_group.sync.aligned 0;\nadd.f32 f4, f0, f1;"),
        ),
        defect(
            "accumulators are stored after a copy before the wait",
            "pending product",
            concat!(product!(), "mov.f32 f5, f2;\nst.global.f32 [out], f5;\nwgmma.wait_group.sync.aligned 0;"),
            concat!(
                product!(),
                "mov.f32 f5, f2;\nmov.f32 f2, f5;\nmov.f32 f5, f3;\nmov.f32 f5, 0f00000000;\nmov.f32 f5, f2;\nwgmma.wait_group.sync.aligned 0;\n@first st.global.f32 [out], f5;"
            ),
        ),
        defect(
            "a wait that leaves the group open",
            "pending product",
            concat!(product!(), "wgmma.wait_group.sync.aligned 1;\nadd.f32 f4, f0, f1;"),
            concat!(
                product!(),
                "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;\nadd.f32 f4, f0, f1;"
            ),
        ),
        defect(
            "accumulators are set before the wait",
            "pending product",
            concat!(product!(), "mov.f32 f3, 0f00000000;\nwgmma.wait_group.sync.aligned 0;"),
            concat!(product!(), "wgmma.wait_group.sync.aligned 0;\nmov.f32 f3, 0f00000000;"),
        ),
        defect(
            "operands in registers change before the wait",
            "pending product",
            concat!(product_of_registers!(), "add.u32 r5, r5, 1;\nwgmma.wait_group.sync.aligned 0;"),
            concat!(
                product_of_registers!(),
                "add.u32 r8, r5, 1;\nwgmma.wait_group.sync.aligned 0;\nadd.u32 r5, r5, 1;"
            ),
        ),
        defect(
            "operands in shared memory change before the wait",
            "pending read",
            concat!(product!(), "bar.sync 0;\nst.shared.u32 [ms], tid;\nwgmma.wait_group.sync.aligned 0;"),
            concat!(product!(), "wgmma.wait_group.sync.aligned 0;\nbar.sync 0;\nst.shared.u32 [ms], tid;"),
        ),
        defect(
            "operands change after the wait of one warp alone",
            "race",
            concat!(product!(), "wgmma.wait_group.sync.aligned 0;\n@first st.shared.u32 [s+2048], tid;"),
            concat!(product!(), "wgmma.wait_group.sync.aligned 0;\nbar.sync 0;\n@first st.shared.u32 [s+2048], tid;"),
        ),
        defect(
            "operands are loaded and not waited for",
            "pending copy",
            concat!(load!(), product!(), wait!(), "wgmma.wait_group.sync.aligned 0;"),
            concat!(load!(), wait!(), product!(), "wgmma.wait_group.sync.aligned 0;"),
        ),
    ];
    check_by(run, &defects);
}

/// A product's result is undefined where what it adds to, or a row that it multiplies, is.
#[test]
fn values_never_written() {
    let body = |set: &str, product: &str, lane: u32| {
        format!(
            "{set}\n{product}\nwgmma.wait_group.sync.aligned 0;\nand.b32 r9, tid, 31;\nsetp.eq.u32 p2, r9, {lane};\nshl.b32 r8, tid, 2;\ncvt.u64.u32 d5, r8;\nadd.u64 d5, d5, out;\n@p2 st.global.f32 [d5], f1;"
        )
    };
    let zeros = "mov.f32 f0, 0f00000000;\nmov.f32 f1, f0;\nmov.f32 f2, f0;\nmov.f32 f3, f0;";
    let adds = product!().replace("never", "p1");
    let set = "setp.lt.u32 p1, tid, 1000;";
    let lacks = product_of_registers!()
        .replace("mov.u32 r5, 0;", "and.b32 r9, tid, 31;\nsetp.eq.u32 p1, r9, 5;\n@!p1 mov.u32 r5, 0;");
    let bodies =
        [body(set, &adds, 0), body(&format!("{set}\n{zeros}"), &adds, 0), body("", &lacks, 6), body("", &lacks, 8)];
    let defects = [
        defect("accumulators that nobody set", "register", &bodies[0], &bodies[1]),
        defect("a row without a value", "register", &bodies[2], &bodies[3]),
    ];
    check_by(run, &defects);
}

#[test]
fn barrier_objects() {
    let defects = [
        defect(
            "an arrival too many",
            "operand",
            "@first mbarrier.arrive.shared.b64 d1, [mb], 2;",
            "@first mbarrier.arrive.shared.b64 d1, [mb], 1;",
        ),
        defect(
            "a store over an object",
            "live object",
            "@first st.shared.u32 [mb+4], tid;",
            "@first mbarrier.inval.shared.b64 [mb];\n@first st.shared.u32 [mb+4], tid;",
        ),
        defect(
            "a load of an object",
            "live object",
            "@first ld.shared.u64 d1, [mb];",
            "@first mbarrier.inval.shared.b64 [mb];\nmov.u64 d1, 0;\n@first st.shared.u64 [mb], d1;\n@first ld.shared.u64 d1, [mb];",
        ),
        defect(
            "a copy over an object",
            "live object",
            "@first mbarrier.init.shared.b64 [s+32], 1;\nbar.sync 0;\n@first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [in], 64, [mb];",
            concat!("@first mbarrier.init.shared.b64 [s+64], 1;\nbar.sync 0;\n", load!(), wait!()),
        ),
        defect(
            "an object that is initialised twice",
            "live object",
            "@first mbarrier.init.shared.b64 [mb], 1;",
            "@first mbarrier.inval.shared.b64 [mb];\n@first mbarrier.init.shared.b64 [mb], 1;",
        ),
        defect(
            "an object that ends while others test it",
            "race",
            "mbarrier.test_wait.parity.shared.b64 p0, [mb], 0;\nsetp.eq.u32 p1, tid, 96;\n@p1 mbarrier.inval.shared.b64 [mb];",
            "mbarrier.test_wait.parity.shared.b64 p0, [mb], 0;\nsetp.eq.u32 p1, tid, 96;\nbar.sync 0;\n@p1 mbarrier.inval.shared.b64 [mb];",
        ),
        defect(
            "an arrival that does not wait for the initialisation",
            "race",
            "@first mbarrier.init.shared.b64 [s], 128;\nmbarrier.arrive.shared.b64 _, [s];",
            "@first mbarrier.init.shared.b64 [s], 128;\nbar.sync 0;\nmbarrier.arrive.shared.b64 _, [s];",
        ),
        defect(
            "an initialisation over what another stores",
            "race",
            "setp.eq.u32 p1, tid, 32;\n@first st.shared.u32 [s], tid;\n@p1 mbarrier.init.shared.b64 [s], 1;",
            "setp.eq.u32 p1, tid, 32;\n@first st.shared.u32 [s], tid;\nbar.sync 0;\n@p1 mbarrier.init.shared.b64 [s], 1;",
        ),
        defect(
            "more bytes than an object counts",
            "operand",
            "@first mbarrier.expect_tx.relaxed.cta.shared.b64 [mb], 1048575;\n@first mbarrier.expect_tx.relaxed.cta.shared.b64 [mb], 1;",
            "@first mbarrier.expect_tx.relaxed.cta.shared.b64 [mb], 1048575;",
        ),
    ];
    check_by(run, &defects);
}

/// Products are the work of all four warps.
#[test]
fn warpgroups() {
    let defects = [
        defect(
            "a warp that skips a product",
            "divergent product",
            concat!("setp.ge.u32 p1, tid, 96;\n@p1 bra END;\n", product!(), "wgmma.wait_group.sync.aligned 0;\nEND:"),
            concat!("setp.ge.u32 p1, tid, 128;\n@p1 bra END;\n", product!(), "wgmma.wait_group.sync.aligned 0;\nEND:"),
        ),
        defect(
            "a warp that ends before the second product",
            "divergent product",
            concat!(
                product!(),
                "wgmma.wait_group.sync.aligned 0;\nsetp.lt.u32 p1, tid, 32;\n@p1 exit;\n",
                product!(),
                "wgmma.wait_group.sync.aligned 0;"
            ),
            concat!(
                product!(),
                "wgmma.wait_group.sync.aligned 0;\n",
                product!(),
                "wgmma.wait_group.sync.aligned 0;\nsetp.lt.u32 p1, tid, 32;\n@p1 exit;"
            ),
        ),
        defect(
            "a warp that multiplies elsewhere",
            "divergent product",
            concat!(
                "setp.lt.u32 p1, tid, 32;\n@p1 bra A;\n",
                product!(),
                "wgmma.wait_group.sync.aligned 0;\nbra END;\nA:\n",
                product!(),
                "wgmma.wait_group.sync.aligned 0;\nEND:"
            ),
            concat!(
                "@never bra A;\n",
                product!(),
                "wgmma.wait_group.sync.aligned 0;\nbra END;\nA:\n",
                product!(),
                "wgmma.wait_group.sync.aligned 0;\nEND:"
            ),
        ),
        defect(
            "a warp that multiplies once more",
            "divergent product",
            concat!(
                "shr.u32 r9, tid, 5;\nadd.u32 r9, r9, 1;\nmin.u32 r9, r9, 3;\nmov.u32 r8, 0;\nL:\n",
                product!(),
                "wgmma.wait_group.sync.aligned 0;\nadd.u32 r8, r8, 1;\nsetp.lt.u32 p1, r8, r9;\n@p1 bra L;"
            ),
            concat!(
                "mov.u32 r9, 3;\nmov.u32 r8, 0;\nL:\n",
                product!(),
                "wgmma.wait_group.sync.aligned 0;\nadd.u32 r8, r8, 1;\nsetp.lt.u32 p1, r8, r9;\n@p1 bra L;"
            ),
        ),
        defect(
            "a wait of half a warp",
            "divergent",
            concat!(product!(), "and.b32 r8, tid, 16;\nsetp.eq.u32 p1, r8, 0;\n@p1 wgmma.wait_group.sync.aligned 0;"),
            concat!(product!(), "wgmma.wait_group.sync.aligned 0;"),
        ),
        defect(
            "a group that half a warp closes",
            "divergent",
            "and.b32 r8, tid, 16;\nsetp.eq.u32 p1, r8, 0;\n@p1 wgmma.commit_group.sync.aligned;",
            "wgmma.commit_group.sync.aligned;",
        ),
        defect(
            "a fence of half a warp",
            "divergent",
            "and.b32 r8, tid, 16;\nsetp.eq.u32 p1, r8, 0;\n@p1 wgmma.fence.sync.aligned;",
            "wgmma.fence.sync.aligned;",
        ),
    ];
    check_by(run, &defects);
    let three_warps = concat!(product_of_registers!(), "wgmma.wait_group.sync.aligned 0;");
    check_by(|body| run_of(96, body), &[defect("a warpgroup of three warps", "divergent product", three_warps, "")]);
}

/// A kernel that copies `in` to `out` by way of shared memory, with a wait or without.
fn copied(wait: &str, seed: Option<u64>) -> Vec<u32> {
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 pin, .param .u64 pout)\n{{\n\
         .shared .align 16 .b8 buffer[512];\n.reg .b32 r<8>;\n.reg .b64 d<4>;\nmov.u32 r0, %tid.x;\nld.param.u64 d0, [pin];\nld.param.u64 d1, [pout];\n\
         mul.wide.u32 d2, r0, 4;\nadd.u64 d0, d0, d2;\nadd.u64 d1, d1, d2;\nmov.u32 r1, buffer;\nshl.b32 r2, r0, 2;\nadd.u32 r1, r1, r2;\n\
         mov.u32 r3, 0;\nst.shared.u32 [r1], r3;\ncp.async.ca.shared.global [r1], [d0], 4;\ncp.async.commit_group;\n{wait}\n\
         ld.shared.u32 r4, [r1];\nst.global.u32 [d1], r4;\nret;\n}}\n"
    );
    let mut sim = Sim::new(&text);
    (sim.options.check, sim.options.seed) = (false, seed);
    let (input, out) = (sim.words(&[7; 128]), sim.blank(512));
    sim.launch("k", 1, 128, &[input, out]).unwrap_or_else(|fault| panic!("{fault}"));
    sim.read(out, 128)
}

/// Without the checker a missing wait shows in the values, for nearly every seed; with the wait nothing changes.
#[test]
fn copies_land_late() {
    assert_eq!(copied("", None), [7; 128]);
    let early = (0..16).filter(|seed| copied("", Some(*seed)) == [7; 128]).count();
    assert!(early <= 4, "{early} of 16 seeds show nothing");
    for seed in 0..16 {
        assert_eq!(copied("cp.async.wait_group 0;", Some(seed)), [7; 128]);
        assert_eq!(copied("cp.async.wait_all;", Some(seed)), [7; 128]);
    }
}
