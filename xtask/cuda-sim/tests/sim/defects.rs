//! Seeded defects: the checker must find each, and stay silent on its repaired twin.

use crate::kit::Sim;
use cuda_sim::exec::{Fault, FaultKind, Summary};

/// A defect: what it is called, what must be found, a body that has it and one that has not.
pub struct Defect<'d> {
    name: &'d str,
    found: &'d str,
    bad: &'d str,
    good: &'d str,
}

pub const fn defect<'d>(name: &'d str, found: &'d str, bad: &'d str, good: &'d str) -> Defect<'d> {
    Defect { name, found, bad, good }
}

/// Two CTAs of 64 threads. `in` holds 130 words, `out` has room for 256 that nobody wrote, `flag` 16 zeros. `lin` and
/// `lout` are the thread's own word, `s` is shared memory of 2048 bytes and `ms` the thread's word of it.
fn kernel(body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.const .align 4 .b8 table[16] = {{1, 2, 3, 4}};\n\
         .visible .entry k(.param .u64 pin, .param .u64 pout, .param .u64 pflag)\n{{\n\
         .shared .align 128 .b8 buffer[2048];\n.local .align 8 .b8 stack[32];\n\
         .reg .b32 r<16>;\n.reg .b32 tid, cta, s, ms, lane;\n.reg .b64 d<8>;\n.reg .b64 in, out, lin, lout, flag;\n.reg .pred p<4>;\n.reg .pred first, warp0, cta0;\n\
         mov.u32 tid, %tid.x;\nmov.u32 cta, %ctaid.x;\nand.b32 lane, tid, 31;\n\
         ld.param.u64 in, [pin];\nld.param.u64 out, [pout];\nld.param.u64 flag, [pflag];\n\
         mad.lo.u32 r0, cta, 64, tid;\nmul.wide.u32 d0, r0, 4;\nadd.u64 lin, in, d0;\nadd.u64 lout, out, d0;\n\
         mov.u32 s, buffer;\nshl.b32 r1, tid, 2;\nadd.u32 ms, s, r1;\n\
         setp.eq.u32 first, tid, 0;\nsetp.lt.u32 warp0, tid, 32;\nsetp.eq.u32 cta0, cta, 0;\n{body}\nret;\n}}\n"
    )
}

fn run(body: &str) -> Result<Summary, Box<Fault>> {
    let mut sim = Sim::new(&kernel(body));
    sim.options.budget = 2_000_000;
    let (input, out, flag) = (sim.words(&[3; 130]), sim.blank(1024), sim.words(&[0; 16]));
    sim.launch("k", 2, 64, &[input, out, flag])
}

fn name(kind: &FaultKind) -> &'static str {
    match kind {
        FaultKind::OutOfBounds { .. } => "out of bounds",
        FaultKind::Misaligned { .. } => "misaligned",
        FaultKind::Uninitialised { .. } => "uninitialised",
        FaultKind::UninitialisedRegister => "register",
        FaultKind::Race { .. } => "race",
        FaultKind::PendingCopy { .. } => "pending copy",
        FaultKind::PendingRead { .. } => "pending read",
        FaultKind::LiveObject { .. } => "live object",
        FaultKind::OpenCopy { .. } => "open copy",
        FaultKind::PendingProduct => "pending product",
        FaultKind::DivergentProduct { .. } => "divergent product",
        FaultKind::DivergentCollective { .. } => "divergent",
        FaultKind::Deadlock { .. } => "deadlock",
        FaultKind::BadOperand { .. } => "operand",
        FaultKind::Trap => "trap",
        FaultKind::Assert { .. } => "assert",
        FaultKind::Budget { .. } => "budget",
    }
}

/// Each defect must be found in that kernel, and nothing in its repaired twin.
pub fn check(defects: &[Defect<'_>]) {
    check_by(run, defects);
}

/// Each defect must be found where a body is run, and nothing in its repaired twin.
pub fn check_by(run: impl Fn(&str) -> Result<Summary, Box<Fault>>, defects: &[Defect<'_>]) {
    let mut wrong = Vec::new();
    for defect in defects {
        match run(defect.bad) {
            Ok(_) => wrong.push(format!("{}: not found", defect.name)),
            Err(fault) if name(&fault.kind) != defect.found => wrong.push(format!("{}: found {fault}", defect.name)),
            Err(_) => {}
        }
        if let Err(fault) = run(defect.good) {
            wrong.push(format!("{}: the repaired twin: {fault}", defect.name));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn bounds() {
    check(&[
        defect("load past the end", "out of bounds", "ld.global.u32 r0, [in+520];", "ld.global.u32 r0, [in+516];"),
        defect("load before the start", "out of bounds", "ld.global.u32 r0, [in-4];", "ld.global.u32 r0, [in];"),
        defect(
            "store past the end",
            "out of bounds",
            "st.global.u32 [lout+1024], tid;",
            "st.global.u32 [lout+512], tid;",
        ),
        defect(
            "vector over the end",
            "out of bounds",
            "ld.global.v4.u32 {r0, r1, r2, r3}, [in+512];",
            "ld.global.v4.u32 {r0, r1, r2, r3}, [in+496];",
        ),
        defect("null pointer", "out of bounds", "mov.u64 d0, 0;\nld.u32 r0, [d0];", "ld.u32 r0, [in];"),
        defect(
            "shared load past the end",
            "out of bounds",
            "st.shared.u32 [ms], tid;\nld.shared.u32 r0, [ms+2048];",
            "st.shared.u32 [ms], tid;\nld.shared.u32 r0, [ms];",
        ),
        defect(
            "shared store past the end",
            "out of bounds",
            "st.shared.u32 [ms+2000], tid;",
            "st.shared.u32 [ms+1792], tid;",
        ),
        defect(
            "shared store before the start",
            "out of bounds",
            "st.shared.u32 [ms-4], tid;",
            "st.shared.u32 [ms+4], tid;",
        ),
        defect(
            "local index too large",
            "out of bounds",
            "mov.u32 r0, stack;\nadd.u32 r0, r0, 32;\nst.local.u32 [r0], tid;",
            "mov.u32 r0, stack;\nadd.u32 r0, r0, 28;\nst.local.u32 [r0], tid;",
        ),
        defect(
            "store to constants",
            "out of bounds",
            "mov.u64 d0, table;\nst.u32 [d0], tid;",
            "mov.u64 d0, table;\nld.u32 r0, [d0];",
        ),
        defect(
            "atomic past the end",
            "out of bounds",
            "red.global.add.u32 [flag+64], 1;",
            "red.global.add.u32 [flag+60], 1;",
        ),
        defect(
            "matrix row past the end",
            "out of bounds",
            "shl.b32 r2, tid, 4;\nadd.u32 r2, r2, s;\nmov.u32 r4, 0;\nst.shared.v4.u32 [r2], {r4, r4, r4, r4};\nbar.sync 0;\nshl.b32 r3, lane, 7;\nadd.u32 r3, r3, s;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {r4, r5, r6, r7}, [r3];",
            "shl.b32 r2, tid, 4;\nadd.u32 r2, r2, s;\nmov.u32 r4, 0;\nst.shared.v4.u32 [r2], {r4, r4, r4, r4};\nbar.sync 0;\nshl.b32 r3, lane, 4;\nadd.u32 r3, r3, s;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {r4, r5, r6, r7}, [r3];",
        ),
        defect(
            "copy of a source past the end",
            "out of bounds",
            "shl.b32 r2, tid, 4;\nadd.u32 r2, r2, s;\ncp.async.cg.shared.global [r2], [in+512], 16;\ncp.async.wait_all;",
            "shl.b32 r2, tid, 4;\nadd.u32 r2, r2, s;\ncp.async.cg.shared.global [r2], [in+512], 16, 8;\ncp.async.wait_all;",
        ),
    ]);
}

#[test]
fn alignment() {
    check(&[
        defect(
            "vector load",
            "misaligned",
            "ld.global.v4.u32 {r0, r1, r2, r3}, [in+8];",
            "ld.global.v4.u32 {r0, r1, r2, r3}, [in+16];",
        ),
        defect(
            "shared vector store",
            "misaligned",
            "mov.u32 r0, 1;\nst.shared.v2.u32 [ms], {r0, r0};",
            "st.shared.u32 [ms], tid;",
        ),
        defect(
            "copy",
            "misaligned",
            "shl.b32 r2, tid, 4;\nadd.u32 r2, r2, s;\ncp.async.cg.shared.global [r2], [in+8], 16;\ncp.async.wait_all;",
            "shl.b32 r2, tid, 4;\nadd.u32 r2, r2, s;\ncp.async.ca.shared.global [r2], [in+8], 8;\ncp.async.wait_all;",
        ),
        defect("atomic", "misaligned", "red.global.add.u64 [flag+4], 1;", "red.global.add.u64 [flag+8], 1;"),
        defect("word at a half", "misaligned", "ld.global.u32 r0, [in+2];", "ld.global.u16 r0, [in+2];"),
    ]);
}

#[test]
fn values_never_written() {
    check(&[
        defect(
            "global",
            "uninitialised",
            "ld.global.u32 r0, [lout];",
            "st.global.u32 [lout], tid;\nld.global.u32 r0, [lout];",
        ),
        defect(
            "half of a vector",
            "uninitialised",
            "mul.wide.u32 d1, tid, 8;\nmul.wide.u32 d2, cta, 512;\nadd.u64 d1, d1, d2;\nadd.u64 d1, d1, out;\nst.global.u32 [d1], tid;\nld.global.v2.u32 {r0, r1}, [d1];",
            "mul.wide.u32 d1, tid, 8;\nmul.wide.u32 d2, cta, 512;\nadd.u64 d1, d1, d2;\nadd.u64 d1, d1, out;\nst.global.u32 [d1], tid;\nst.global.u32 [d1+4], tid;\nld.global.v2.u32 {r0, r1}, [d1];",
        ),
        defect(
            "shared",
            "uninitialised",
            "ld.shared.u32 r0, [ms];",
            "st.shared.u32 [ms], tid;\nld.shared.u32 r0, [ms];",
        ),
        defect(
            "local",
            "uninitialised",
            "mov.u32 r0, stack;\nld.local.u32 r1, [r0+4];",
            "mov.u32 r0, stack;\nst.local.u32 [r0+4], tid;\nld.local.u32 r1, [r0+4];",
        ),
        defect(
            "a register that is stored",
            "register",
            "st.global.u32 [lout], r9;",
            "mov.u32 r9, 1;\nst.global.u32 [lout], r9;",
        ),
        defect(
            "a register through arithmetic",
            "register",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nadd.u32 r8, r9, tid;\nst.global.u32 [lout], r8;",
            "setp.eq.u32 p1, lane, 5;\nmov.u32 r9, 2;\n@!p1 mov.u32 r9, 1;\nadd.u32 r8, r9, tid;\nst.global.u32 [lout], r8;",
        ),
        defect(
            "a register through shared memory",
            "register",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nshl.b32 r2, tid, 3;\nadd.u32 r2, r2, s;\nst.shared.v2.u32 [r2], {tid, r9};\nld.shared.v2.u32 {r7, r8}, [r2];\nst.global.u32 [lout], r8;",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nshl.b32 r2, tid, 3;\nadd.u32 r2, r2, s;\nst.shared.v2.u32 [r2], {tid, r9};\nld.shared.v2.u32 {r7, r8}, [r2];\nst.global.u32 [lout], r7;\n@!p1 st.global.u32 [lout], r8;",
        ),
        defect(
            "a register through a matrix in shared memory",
            "register",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nshl.b32 r2, tid, 4;\nadd.u32 r2, r2, s;\nst.shared.v4.u32 [r2], {r9, tid, tid, tid};\nbar.warp.sync -1;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {r3}, [r2];\nst.global.u32 [lout], r3;",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nshl.b32 r2, tid, 4;\nadd.u32 r2, r2, s;\nst.shared.v4.u32 [r2], {r9, tid, tid, tid};\nbar.warp.sync -1;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {r3}, [r2];\nsetp.lt.u32 p2, lane, 20;\n@p2 st.global.u32 [lout], r3;",
        ),
        defect("an address", "register", "ld.global.u32 r0, [d7];", "mov.u64 d7, in;\nld.global.u32 r0, [d7];"),
        defect("a guard", "register", "@p3 mov.u32 r0, 1;", "setp.ne.u32 p3, tid, 1;\n@p3 mov.u32 r0, 1;"),
    ]);
}

#[test]
fn races_in_shared_memory() {
    check(&[
        defect(
            "no barrier before a read",
            "race",
            "mov.u32 r4, 0;\nst.shared.u32 [ms], tid;\nst.shared.u32 [ms+256], r4;\nbar.sync 0;\nst.shared.u32 [ms], r4;\nxor.b32 r2, tid, 63;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];",
            "mov.u32 r4, 0;\nst.shared.u32 [ms], tid;\nst.shared.u32 [ms+256], r4;\nbar.sync 0;\nst.shared.u32 [ms], r4;\nbar.sync 0;\nxor.b32 r2, tid, 63;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];",
        ),
        defect(
            "no barrier after a read",
            "race",
            "st.shared.u32 [ms], tid;\nbar.sync 0;\nxor.b32 r2, tid, 63;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];\nst.shared.u32 [ms], r3;",
            "st.shared.u32 [ms], tid;\nbar.sync 0;\nxor.b32 r2, tid, 63;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];\nbar.sync 0;\nst.shared.u32 [ms], r3;",
        ),
        defect(
            "lanes of a warp without a warp barrier",
            "race",
            "st.shared.u32 [ms], tid;\nxor.b32 r2, tid, 1;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];",
            "st.shared.u32 [ms], tid;\nbar.warp.sync -1;\nxor.b32 r2, tid, 1;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];",
        ),
        defect(
            "a warp barrier of the wrong lanes",
            "race",
            "st.shared.u32 [ms], tid;\nsetp.lt.u32 p0, lane, 16;\n@!p0 bra HIGH;\nbar.warp.sync 0x0000ffff;\nbra READ;\nHIGH:\nbar.warp.sync 0xffff0000;\nREAD:\nxor.b32 r2, tid, 16;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];",
            "st.shared.u32 [ms], tid;\nsetp.lt.u32 p0, lane, 16;\n@!p0 bra HIGH;\nbar.warp.sync 0x0000ffff;\nbra READ;\nHIGH:\nbar.warp.sync 0xffff0000;\nREAD:\nxor.b32 r2, tid, 3;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];",
        ),
        defect(
            "lanes write different values to one word",
            "race",
            "st.shared.u32 [s], tid;",
            "@first st.shared.u32 [s], tid;",
        ),
        defect(
            "warps write one word",
            "race",
            "setp.eq.u32 p0, lane, 0;\nmov.u32 r2, 7;\n@p0 st.shared.u32 [s], r2;",
            "mov.u32 r2, 7;\n@warp0 st.shared.u32 [s], r2;",
        ),
        defect(
            "an increment that is not atomic",
            "race",
            "mov.u32 r2, 0;\n@first st.shared.u32 [s], r2;\nbar.sync 0;\natom.shared.add.u32 r3, [s], 1;\n@first st.shared.u32 [s], r2;",
            "mov.u32 r2, 0;\n@first st.shared.u32 [s], r2;\nbar.sync 0;\natom.shared.add.u32 r3, [s], 1;\nbar.sync 0;\n@first st.shared.u32 [s], r2;",
        ),
        defect(
            "a tree without its last barrier",
            "race",
            "st.shared.u32 [ms], tid;\nbar.sync 0;\nsetp.lt.u32 p0, tid, 48;\n@!p0 bra END;\nld.shared.u32 r3, [ms+64];\nEND:\nsetp.lt.u32 p0, tid, 16;\n@p0 st.shared.u32 [ms+128], r3;",
            "st.shared.u32 [ms], tid;\nbar.sync 0;\nsetp.lt.u32 p0, tid, 48;\n@!p0 bra END;\nld.shared.u32 r3, [ms+64];\nEND:\nbar.sync 0;\nsetp.lt.u32 p0, tid, 16;\n@p0 st.shared.u32 [ms+128], r3;",
        ),
        defect(
            "a producer that arrives before it writes",
            "race",
            "@!warp0 bra CONSUME;\nbar.arrive 1, 64;\nst.shared.u32 [ms], tid;\nbra END;\nCONSUME:\nmov.u32 r4, 0;\nst.shared.u32 [ms], r4;\nbar.sync 1, 64;\nst.shared.u32 [ms-128], r4;\nEND:",
            "@!warp0 bra CONSUME;\nst.shared.u32 [ms], tid;\nbar.arrive 1, 64;\nbra END;\nCONSUME:\nmov.u32 r4, 0;\nst.shared.u32 [ms], r4;\nbar.sync 1, 64;\nst.shared.u32 [ms-128], r4;\nEND:",
        ),
    ]);
}

#[test]
fn races_in_global_memory() {
    check(&[
        defect(
            "warps of a CTA",
            "race",
            "st.global.u32 [lout], tid;\nxor.b32 r2, r0, 32;\nmul.wide.u32 d1, r2, 4;\nadd.u64 d1, d1, out;\nst.global.u32 [d1], tid;",
            "st.global.u32 [lout], tid;\nbar.sync 0;\nxor.b32 r2, r0, 32;\nmul.wide.u32 d1, r2, 4;\nadd.u64 d1, d1, out;\nst.global.u32 [d1], tid;",
        ),
        defect(
            "CTAs write one word",
            "race",
            "@first st.global.u32 [out], cta;",
            "@first red.global.add.u32 [flag], cta;",
        ),
        defect(
            "a CTA reads what another writes",
            "race",
            "@cta0 st.global.u32 [lin], tid;\n@!cta0 ld.global.u32 r2, [lin-256];",
            "@cta0 ld.global.u32 r2, [lin];\n@!cta0 ld.global.u32 r2, [lin-256];",
        ),
        defect(
            "no fence before a flag",
            "race",
            "mov.u32 r5, 1;\n@!first bra END;\n@!cta0 bra WAIT;\nst.global.u32 [out], r5;\nst.relaxed.gpu.global.u32 [flag], r5;\nbra END;\n\
             WAIT:\nld.acquire.gpu.global.u32 r6, [flag];\nsetp.eq.u32 p0, r6, 0;\n@p0 bra WAIT;\nld.global.u32 r7, [out];\nEND:",
            "mov.u32 r5, 1;\n@!first bra END;\n@!cta0 bra WAIT;\nst.global.u32 [out], r5;\nfence.acq_rel.gpu;\nst.relaxed.gpu.global.u32 [flag], r5;\nbra END;\n\
             WAIT:\nld.acquire.gpu.global.u32 r6, [flag];\nsetp.eq.u32 p0, r6, 0;\n@p0 bra WAIT;\nld.global.u32 r7, [out];\nEND:",
        ),
        defect(
            "no acquire behind a flag",
            "race",
            "mov.u32 r5, 1;\n@!first bra END;\n@!cta0 bra WAIT;\nst.global.u32 [out], r5;\nst.release.gpu.global.u32 [flag], r5;\nbra END;\n\
             WAIT:\nld.relaxed.gpu.global.u32 r6, [flag];\nsetp.eq.u32 p0, r6, 0;\n@p0 bra WAIT;\nld.global.u32 r7, [out];\nEND:",
            "mov.u32 r5, 1;\n@!first bra END;\n@!cta0 bra WAIT;\nst.global.u32 [out], r5;\nst.release.gpu.global.u32 [flag], r5;\nbra END;\n\
             WAIT:\nld.relaxed.gpu.global.u32 r6, [flag];\nsetp.eq.u32 p0, r6, 0;\n@p0 bra WAIT;\nfence.acq_rel.gpu;\nld.global.u32 r7, [out];\nEND:",
        ),
        defect(
            "a flag that is a plain word",
            "race",
            "mov.u32 r5, 1;\n@!first bra END;\n@!cta0 bra WAIT;\nst.global.u32 [flag], r5;\nbra END;\nWAIT:\nld.acquire.gpu.global.u32 r6, [flag];\nEND:",
            "mov.u32 r5, 1;\n@!first bra END;\n@!cta0 bra WAIT;\nst.release.gpu.global.u32 [flag], r5;\nbra END;\nWAIT:\nld.acquire.gpu.global.u32 r6, [flag];\nEND:",
        ),
        defect(
            "the last CTA reads partial sums without a fence",
            "race",
            "@!first bra END;\nmul.wide.u32 d1, cta, 4;\nadd.u64 d1, d1, out;\nst.global.u32 [d1], cta;\natom.global.add.u32 r5, [flag], 1;\nsetp.ne.u32 p0, r5, 1;\n@p0 bra END;\nld.global.v2.u32 {r6, r7}, [out];\nEND:",
            "@!first bra END;\nmul.wide.u32 d1, cta, 4;\nadd.u64 d1, d1, out;\nst.global.u32 [d1], cta;\nmembar.gl;\natom.global.add.u32 r5, [flag], 1;\nsetp.ne.u32 p0, r5, 1;\n@p0 bra END;\nmembar.gl;\nld.global.v2.u32 {r6, r7}, [out];\nEND:",
        ),
    ]);
}

/// What is ordered for the threads of a CTA alone orders nothing for another.
#[test]
fn scopes() {
    /// A word and a flag that one thread of the first CTA sets and one of the second waits for.
    fn handed(before: &str, set: &str, wait: &str) -> String {
        format!(
            "mov.u32 r5, 1;\n@!first bra END;\n@!cta0 bra WAIT;\nst.global.u32 [out], r5;\n{before}\n{set}.global.u32 [flag], r5;\nbra END;\n\
             WAIT:\n{wait}.global.u32 r6, [flag];\nsetp.eq.u32 p0, r6, 0;\n@p0 bra WAIT;\nld.global.u32 r7, [out];\nEND:"
        )
    }
    /// The same between warps of each CTA.
    fn within(before: &str, set: &str, wait: &str, after: &str) -> String {
        format!(
            "mov.u32 r5, 1;\nmul.wide.u32 d1, cta, 4;\nadd.u64 d2, d1, flag;\nadd.u64 d1, d1, out;\nsetp.eq.u32 p1, tid, 32;\n@p1 bra WAIT;\n@!first bra END;\n\
             st.global.u32 [d1], r5;\n{before}\n{set}.global.u32 [d2], r5;\nbra END;\n\
             WAIT:\n{wait}.global.u32 r6, [d2];\nsetp.eq.u32 p0, r6, 0;\n@p0 bra WAIT;\n{after}\nld.global.u32 r7, [d1];\nEND:"
        )
    }
    let (release, acquire) = ("st.release.gpu", "ld.acquire.gpu");
    let good = handed("", release, acquire);
    let fenced = handed("fence.acq_rel.gpu;", "st.relaxed.gpu", acquire);
    check(&[
        defect("a release for the CTA", "race", &handed("", "st.release.cta", acquire), &good),
        defect("an acquire for the CTA", "race", &handed("", release, "ld.acquire.cta"), &good),
        defect("a fence for the CTA", "race", &handed("fence.acq_rel.cta;", "st.relaxed.gpu", acquire), &fenced),
        defect("a membar for the CTA", "race", &handed("membar.cta;", "st.relaxed.gpu", acquire), &fenced),
        defect("a fence between proxies", "race", &handed("fence.proxy.alias;", "st.relaxed.gpu", acquire), &fenced),
        defect(
            "an atomic for the CTA",
            "race",
            "@first red.relaxed.cta.global.add.u32 [flag], 1;",
            "red.relaxed.cta.global.add.u32 [lin], 1;\n@first red.relaxed.gpu.global.add.u32 [flag], 1;",
        ),
        defect(
            "no release within a CTA",
            "race",
            &within("", "st.relaxed.cta", "ld.acquire.cta", ""),
            &within("", "st.release.cta", "ld.acquire.cta", ""),
        ),
        defect(
            "no acquire within a CTA",
            "race",
            &within("fence.acq_rel.cta;", "st.relaxed.gpu", "ld.relaxed.cta", ""),
            &within("fence.acq_rel.cta;", "st.relaxed.gpu", "ld.relaxed.cta", "fence.acq_rel.cta;"),
        ),
        defect(
            "no release for the CTA by an access for the device",
            "race",
            &within("", "st.relaxed.gpu", "ld.relaxed.gpu", "fence.acq_rel.cta;"),
            &within("", "st.release.gpu", "ld.relaxed.gpu", "fence.acq_rel.cta;"),
        ),
    ]);
}

#[test]
fn copies() {
    check(&[
        defect(
            "a read before the wait",
            "pending copy",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.commit_group;\nld.shared.u32 r2, [ms];",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.u32 r2, [ms];",
        ),
        defect(
            "a wait for too few groups",
            "pending copy",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.commit_group;\ncp.async.ca.shared.global [ms+256], [lin], 4;\ncp.async.commit_group;\ncp.async.wait_group 1;\nld.shared.u32 r2, [ms+256];",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.commit_group;\ncp.async.ca.shared.global [ms+256], [lin], 4;\ncp.async.commit_group;\ncp.async.wait_group 1;\nld.shared.u32 r2, [ms];",
        ),
        defect(
            "a copy in no group",
            "pending copy",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.wait_group 0;\nld.shared.u32 r2, [ms];",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.wait_all;\nld.shared.u32 r2, [ms];",
        ),
        defect(
            "a write while a copy is pending",
            "pending copy",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.commit_group;\nst.shared.u32 [ms], tid;",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.commit_group;\nst.shared.u32 [ms+256], tid;",
        ),
        defect(
            "stages that overlap",
            "pending copy",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.commit_group;\ncp.async.ca.shared.global [ms], [lin], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.commit_group;\ncp.async.ca.shared.global [ms+256], [lin], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;",
        ),
        defect(
            "a wait without a barrier",
            "race",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.wait_all;\nbar.sync 1;\ncp.async.ca.shared.global [ms], [lin], 4;\ncp.async.wait_all;\nxor.b32 r2, tid, 32;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];",
            "cp.async.ca.shared.global [ms], [lin], 4;\ncp.async.wait_all;\nbar.sync 1;\ncp.async.ca.shared.global [ms], [lin], 4;\ncp.async.wait_all;\nbar.sync 0;\nxor.b32 r2, tid, 32;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];",
        ),
        defect(
            "a copy over what others still read",
            "race",
            "st.shared.u32 [ms], tid;\nbar.sync 0;\nxor.b32 r2, tid, 32;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];\ncp.async.ca.shared.global [ms], [lin], 4;\ncp.async.wait_all;",
            "st.shared.u32 [ms], tid;\nbar.sync 0;\nxor.b32 r2, tid, 32;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];\nbar.sync 0;\ncp.async.ca.shared.global [ms], [lin], 4;\ncp.async.wait_all;",
        ),
        defect(
            "a source longer than the copy",
            "operand",
            "mov.u32 r2, 8;\ncp.async.ca.shared.global [ms], [lin], 4, r2;\ncp.async.wait_all;",
            "mov.u32 r2, 2;\ncp.async.ca.shared.global [ms], [lin], 4, r2;\ncp.async.wait_all;",
        ),
    ]);
}

/// A report says where and who.
#[test]
fn a_report_names_both_parties() {
    let body = "mov.u32 r4, 0;\nst.shared.u32 [ms], r4;\nbar.sync 0;\nst.shared.u32 [ms], tid;\nxor.b32 r2, tid, 63;\nshl.b32 r2, r2, 2;\nadd.u32 r2, r2, s;\nld.shared.u32 r3, [r2];";
    let report = run(body).unwrap_err().to_string();
    let lines: Vec<String> = kernel(body).lines().map(str::to_owned).collect();
    let line = |text: &str| lines.iter().rposition(|line| line.starts_with(text)).unwrap() + 1;
    for part in [
        "race in shared memory",
        "kernel k",
        ".shared.u32",
        "warp 0, lane",
        &format!("PTX line {}", line("ld.shared.u32")),
        &format!("PTX line {}", line("st.shared.u32")),
        "warp 1, lane",
    ] {
        assert!(report.contains(part), "{part}: {report}");
    }
}
