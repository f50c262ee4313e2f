//! Cases of memory: widths of accesses, `ldmatrix`, `cp.async`, atomics, barriers.

use super::Case;
use super::element::{Element, Width};
use super::values::{INT, random, tuples};
use Width::{D, W};
use rand::RngExt;
use std::fmt::Write;

/// A kernel of one warp (or more) with 16 KiB of shared memory, filled from the input; `body` may use `tid`, `sb` (the
/// start of shared memory), `gin`, `gout` (the thread's 16 words of output), `r0` … `r15`, `d0` … `d7`, `h0` … `h7`.
fn kernel(name: &str, target: &str, threads: u32, body: &str) -> Case {
    let version = if target == "sm_90a" { "8.0" } else { "7.8" };
    let mut ptx = String::new();
    let _ = write!(
        ptx,
        ".version {version}\n.target {target}\n.address_size 64\n\
         .visible .entry k(.param .u64 pin, .param .u64 pout)\n{{\n\
         .shared .align 1024 .b8 buffer[16384];\n\
         .reg .b32 tid, sb, x, y;\n.reg .b32 r<16>;\n.reg .b64 gin, gout, w;\n.reg .b64 d<8>;\n.reg .b16 h<8>;\n.reg .pred p, q;\n\
         mov.u32 tid, %tid.x;\nmov.u32 sb, buffer;\nld.param.u64 gin, [pin];\nld.param.u64 gout, [pout];\n\
         mul.wide.u32 w, tid, 64;\nadd.u64 gout, gout, w;\n\
         mov.u32 x, tid;\n\
         FILL:\nmul.wide.u32 w, x, 4;\nadd.u64 w, gin, w;\nld.global.b32 y, [w];\n\
         shl.b32 r0, x, 2;\nadd.u32 r0, r0, sb;\nst.shared.b32 [r0], y;\n\
         add.u32 x, x, {threads};\nsetp.lt.u32 p, x, 4096;\n@p bra FILL;\n\
         bar.sync 0;\n{body}\nret;\n}}\n"
    );
    let mut random = random(name);
    let input = (0..16384).map(|_| random.random()).collect();
    Case {
        name: name.to_owned(),
        ptx,
        grid: 1,
        block: threads,
        shared: 0,
        input,
        output: threads as usize * 64,
        map: None,
    }
}

fn store(count: usize) -> String {
    (0..count).map(|at| format!("st.global.b32 [gout+{}], r{at};\n", 4 * at)).collect()
}

/// All cases.
pub fn cases() -> Vec<Case> {
    let mut cases = matrices();
    cases.extend(copies());
    cases.extend(widths());
    cases.extend(atomics());
    cases.extend(barriers());
    cases
}

fn matrices() -> Vec<Case> {
    let mut cases = Vec::new();
    for (count, regs) in [(1, "{r0}"), (2, "{r0, r1}"), (4, "{r0, r1, r2, r3}")] {
        for trans in ["", ".trans"] {
            let opcode = format!("ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16");
            // Rows in an order of their own.
            let body = format!(
                "mul.lo.u32 x, tid, 7;\nand.b32 x, x, 31;\nmul.lo.u32 x, x, 48;\nadd.u32 x, x, sb;\n{opcode} {regs}, [x];\n{}",
                store(count)
            );
            cases.push(kernel(&opcode, "sm_80", 32, &body));
        }
    }
    cases
}

fn copies() -> Vec<Case> {
    let mut cases = Vec::new();
    for (cache, bytes) in [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)] {
        for source in ["", ", r4", ", p"] {
            let name = format!("cp.async.{cache} {bytes}{source}");
            // Sources of 0 … bytes, or left out on every third lane.
            let body = format!(
                "rem.u32 r4, tid, {};\nrem.u32 r5, tid, 3;\nsetp.eq.u32 p, r5, 0;\n\
                 mul.lo.u32 x, tid, 32;\nadd.u32 x, x, sb;\nmul.wide.u32 w, tid, 16;\nadd.u64 w, gin, w;\n\
                 cp.async.{cache}.shared.global [x], [w+4096], {bytes}{source};\n\
                 cp.async.commit_group;\ncp.async.wait_group 0;\nbar.sync 0;\n\
                 ld.shared.v4.b32 {{r0, r1, r2, r3}}, [x];\n{}",
                bytes + 1,
                store(4)
            );
            cases.push(kernel(&name, "sm_80", 32, &body));
        }
    }
    cases
}

fn widths() -> Vec<Case> {
    let mut cases = Vec::new();
    let loads = [
        ("u8", "b32", 1),
        ("s8", "b32", 1),
        ("u16", "b32", 2),
        ("s16", "b32", 2),
        ("u32", "b32", 4),
        ("u8", "b64", 1),
        ("s8", "b64", 1),
        ("s16", "b64", 2),
        ("s32", "b64", 4),
        ("u32", "b64", 4),
        ("u64", "b64", 8),
    ];
    for (ty, register, bytes) in loads {
        for space in ["shared", "global"] {
            let name = format!("ld.{space}.{ty} into {register}");
            let base = if space == "shared" {
                "cvt.u64.u32 w, sb;\nmul.wide.u32 d1, tid, 24;\nadd.u64 w, w, d1;\ncvt.u32.u64 x, w;"
            } else {
                "mul.wide.u32 w, tid, 24;\nadd.u64 w, w, gin;"
            };
            let at = if space == "shared" { "x" } else { "w" };
            let body = match register {
                "b32" => format!("{base}\nld.{space}.{ty} r0, [{at}+{bytes}];\n{}", store(1)),
                _ => format!("{base}\nld.{space}.{ty} d0, [{at}+{bytes}];\nst.global.b64 [gout], d0;\n"),
            };
            cases.push(kernel(&name, "sm_80", 32, &body));
        }
    }
    let body = format!(
        "shl.b32 x, tid, 6;\nadd.u32 x, x, sb;\nld.shared.v2.b16 {{h0, h1}}, [x+4];\nld.shared.v4.b16 {{h2, h3, h4, h5}}, [x+8];\n\
         ld.shared.s8 h6, [x+17];\ncvt.u32.u16 r0, h0;\ncvt.u32.u16 r1, h1;\ncvt.u32.u16 r2, h2;\ncvt.u32.u16 r3, h5;\ncvt.u32.u16 r4, h6;\n\
         st.shared.b8 [x+20], r0;\nst.shared.v2.b16 [x+24], {{h4, h3}};\nst.shared.u8 [x+29], h6;\n\
         ld.shared.v4.b32 {{r5, r6, r7, r8}}, [x+16];\n{}",
        store(9)
    );
    cases.push(kernel("vectors of 16 bits", "sm_80", 32, &body));
    let body = "cvta.to.global.u64 w, gin;\nmul.wide.u32 d0, tid, 32;\nadd.u64 w, w, d0;\n\
                ld.global.nc.L1::no_allocate.v4.b32 {r0, r1, r2, r3}, [w];\nld.global.v2.b64 {d1, d2}, [w+16];\n\
                st.global.v4.b32 [gout], {r3, r2, r1, r0};\nst.global.v2.b64 [gout+16], {d2, d1};\n\
                cvt.u64.u32 d3, sb;\ncvta.shared.u64 d3, d3;\nadd.u64 d3, d3, d0;\nld.b32 r4, [d3+8];\nst.global.b32 [gout+32], r4;\n\
                isspacep.shared p, d3;\nselp.u32 r5, 1, 0, p;\nisspacep.global q, gin;\nselp.u32 r6, 1, 0, q;\n\
                st.global.b32 [gout+36], r5;\nst.global.b32 [gout+40], r6;";
    cases.push(kernel("vectors and generic addresses", "sm_80", 32, body));
    cases
}

fn atomics() -> Vec<Case> {
    let mut cases = Vec::new();
    let words = [
        "add.u32", "add.f32", "min.s32", "max.s32", "min.u32", "max.u32", "and.b32", "or.b32", "xor.b32", "exch.b32",
        "inc.u32", "dec.u32",
    ];
    for space in ["shared", "global"] {
        let at = if space == "shared" { "x" } else { "w" };
        for op in words {
            // Each lane has a word of its own: the result does not depend on the order.
            let name = format!("atom.{space}.{op}");
            let again = if op == "exch.b32" { format!("atom.{space}.{op} r4,") } else { format!("red.{space}.{op}") };
            let body = format!(
                "shl.b32 x, tid, 4;\nadd.u32 x, x, sb;\nmul.wide.u32 w, tid, 16;\nadd.u64 w, w, gin;\n\
                 ld.{space}.b32 r3, [{at}+8];\natom.{space}.{op} r0, [{at}], r3;\nld.{space}.b32 r1, [{at}];\n{again} [{at}], r3;\n\
                 ld.{space}.b32 r2, [{at}];\n{}",
                store(3)
            );
            cases.push(kernel(&name, "sm_80", 32, &body));
        }
        let body = format!(
            "shl.b32 x, tid, 4;\nadd.u32 x, x, sb;\nmul.wide.u32 w, tid, 16;\nadd.u64 w, w, gin;\nld.{space}.b32 r3, [{at}];\n\
             and.b32 r4, tid, 1;\nadd.u32 r3, r3, r4;\natom.{space}.cas.b32 r0, [{at}], r3, tid;\nld.{space}.b32 r1, [{at}];\n\
             ld.{space}.b64 d0, [{at}+8];\natom.{space}.add.u64 d1, [{at}+8], d0;\natom.{space}.exch.b64 d2, [{at}+8], d1;\n\
             atom.{space}.cas.b64 d3, [{at}+8], d1, d0;\nst.global.b64 [gout+16], d1;\nst.global.b64 [gout+24], d2;\nst.global.b64 [gout+32], d3;\n{}",
            store(2)
        );
        cases.push(kernel(&format!("atom.{space} cas and 64 bits"), "sm_80", 32, &body));
    }
    cases.extend(shared_counters());
    cases
}

/// Atomics of many lanes on one address, where the sum does not depend on the order.
fn shared_counters() -> Vec<Case> {
    let mut cases = Vec::new();
    let body = format!(
        "st.shared.b32 [sb], 0;\nbar.sync 0;\natom.shared.add.u32 r0, [sb], 3;\nred.shared.add.u32 [sb], tid;\nbar.sync 0;\nld.shared.b32 r0, [sb];\n\
         red.global.add.u32 [gin], 1;\nred.global.add.u64 [gin+8], 5;\nred.global.max.u32 [gin+16], tid;\nmembar.gl;\nbar.sync 0;\n\
         ld.volatile.global.b32 r1, [gin];\nld.volatile.global.b32 r2, [gin+8];\nld.volatile.global.b32 r3, [gin+16];\n{}",
        store(4)
    );
    cases.push(kernel("atomics on one address", "sm_80", 128, &body));
    for (name, ty) in [("f16x2", "f16x2"), ("bf16x2", "bf16x2")] {
        let body = format!(
            "mul.wide.u32 w, tid, 16;\nadd.u64 w, w, gin;\nld.global.b32 r3, [w+8];\nand.b32 r3, r3, 0x7bff7bff;\nld.global.b32 r4, [w];\nand.b32 r4, r4, 0x7bff7bff;\nst.global.b32 [w], r4;\n\
             atom.global.add.noftz.{ty} r0, [w], r3;\nld.global.b32 r1, [w];\n{}",
            store(2)
        );
        let target = if name == "bf16x2" { "sm_90" } else { "sm_80" };
        cases.push(kernel(&format!("atom.global.add.noftz.{name}"), target, 32, &body));
    }
    let rows = tuples(
        "atom subnormal",
        &[1, 0x80_0000, 0x40_0000, 0x8000_0001, 0x3f80_0000, 0x7f80_0000, 0x7fc0_0001],
        2,
        32,
        256,
    );
    let body = "st.global.b32 [to], i0;\nred.global.add.f32 [to], i1;\nld.global.b32 o0, [to];";
    cases.push(
        Element { name: "red.global.add.f32 corners", body, inputs: &[W, W], outputs: &[W], target: "sm_80" }
            .case(&rows),
    );
    let rows = tuples("atom f64", &super::values::F64, 2, 64, 256);
    let body = "st.global.b64 [to], i0;\natom.global.add.f64 o1, [to], i1;\nld.global.b64 o0, [to];";
    cases.push(
        Element { name: "atom.global.add.f64", body, inputs: &[D, D], outputs: &[D, D], target: "sm_80" }.case(&rows),
    );
    let rows = tuples("atom minmax", &INT, 2, 64, 256);
    let body = "st.global.b64 [to], i0;\natom.global.max.s64 o1, [to], i1;\nld.global.b64 o0, [to];";
    cases.push(
        Element { name: "atom.global.max.s64", body, inputs: &[D, D], outputs: &[D, D], target: "sm_80" }.case(&rows),
    );
    cases
}

fn barriers() -> Vec<Case> {
    let body = format!(
        "setp.lt.u32 p, tid, 40;\nbar.red.popc.u32 r0, 0, p;\nbar.red.and.pred q, 0, p;\nselp.u32 r1, 1, 0, q;\nbar.red.or.pred q, 0, p;\nselp.u32 r2, 1, 0, q;\n{}",
        store(3)
    );
    let mut cases = vec![kernel("bar.red", "sm_80", 128, &body)];
    // Warps 0 and 1 produce, 2 and 3 consume.
    let body = format!(
        "mov.u32 r0, 0;\nsetp.lt.u32 p, tid, 64;\nshl.b32 x, tid, 2;\nadd.u32 x, x, sb;\n@!p bra CONSUME;\n\
         st.shared.b32 [x], tid;\nbar.arrive 1, 128;\nbra DONE;\nCONSUME:\nbar.sync 1, 128;\nld.shared.b32 r0, [x+-256];\nDONE:\n{}",
        store(1)
    );
    cases.push(kernel("named barriers", "sm_80", 128, &body));
    let body = format!(
        "setp.eq.u32 p, tid, 0;\n@p mbarrier.init.shared.b64 [sb], 64;\nbar.sync 0;\nshl.b32 x, tid, 2;\nadd.u32 x, x, sb;\nst.shared.b32 [x+1024], tid;\n\
         mbarrier.arrive.shared.b64 d0, [sb];\nWAIT:\nmbarrier.test_wait.shared.b64 p, [sb], d0;\n@!p bra WAIT;\n\
         xor.b32 y, tid, 33;\nshl.b32 y, y, 2;\nadd.u32 y, y, sb;\nld.shared.b32 r0, [y+1024];\n{}",
        store(1)
    );
    cases.push(kernel("mbarrier arrive and test_wait", "sm_80", 64, &body));
    cases
}
