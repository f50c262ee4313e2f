//! Seeded defects of what threads do together: values that lanes exchange, votes, barriers, barrier objects.

use crate::defects::{check, defect};

/// Registers of one lane that others come to hold.
#[test]
fn values_that_lanes_exchange() {
    const MMA: &str = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {r8, r9, r10, r11}, {r2, r2, r2, r3}, {r2, r4}, {r2, r2, r2, r2};";
    let product = |set: &str, lane: u32| {
        format!(
            "mov.u32 r2, 0;\nsetp.eq.u32 p1, lane, 5;\n{set}\n{MMA}\nsetp.eq.u32 p2, lane, {lane};\n@p2 st.global.u32 [lout], r8;"
        )
    };
    let (a, b) = ("mov.u32 r4, 0;\n@!p1 mov.u32 r3, 0;", "mov.u32 r3, 0;\n@!p1 mov.u32 r4, 0;");
    let products = [product(a, 7), product(a, 8), product(b, 12), product(b, 13)];
    // One lane's last addend has no value, and nothing but its last sum depends on it.
    let sum = |stored: &str| {
        let values = "mov.u32 r2, 0;\nmov.u32 r3, 0;\nmov.u32 r4, 0;\nsetp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r5, 0;";
        let product = MMA.replace("{r2, r2, r2, r2};", "{r2, r2, r2, r5};");
        format!("{values}\n{product}\nst.global.u32 [lout], {stored};")
    };
    check(&[
        defect(
            "a shuffle of a lane that has no value",
            "register",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nshfl.sync.bfly.b32 r9, r9, 1, 31, -1;\nsetp.eq.u32 p2, lane, 4;\n@p2 st.global.u32 [lout], r9;",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nshfl.sync.bfly.b32 r9, r9, 1, 31, -1;\nsetp.ne.u32 p2, lane, 4;\n@p2 st.global.u32 [lout], r9;",
        ),
        defect(
            "a shuffle of a lane that does not take part",
            "register",
            "setp.lt.u32 p0, lane, 8;\n@!p0 bra END;\nshfl.sync.idx.b32 r8, tid, 9, 31, 0xff;\nst.global.u32 [lout], r8;\nEND:",
            "setp.lt.u32 p0, lane, 8;\n@!p0 bra END;\nshfl.sync.idx.b32 r8, tid, 9, 31, 0xff;\nshfl.sync.idx.b32 r8, tid, 7, 31, 0xff;\nst.global.u32 [lout], r8;\nEND:",
        ),
        defect(
            "a vote of a lane that has no value",
            "register",
            "setp.eq.u32 p1, lane, 5;\n@!p1 setp.lt.u32 p2, tid, 40;\nvote.sync.ballot.b32 r8, p2, -1;\n@!p1 st.global.u32 [lout], r8;",
            "setp.eq.u32 p1, lane, 5;\nsetp.lt.u32 p2, tid, 40;\nvote.sync.ballot.b32 r8, p2, -1;\n@!p1 st.global.u32 [lout], r8;",
        ),
        defect(
            "a match with a lane that has no value",
            "register",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nmatch.any.sync.b32 r8, r9, -1;\n@!p1 st.global.u32 [lout], r8;",
            "setp.eq.u32 p1, lane, 5;\nmov.u32 r9, 1;\nmatch.any.sync.b32 r8, r9, -1;\n@!p1 st.global.u32 [lout], r8;",
        ),
        defect(
            "a reduction over a lane that has no value",
            "register",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nredux.sync.add.u32 r8, r9, -1;\n@!p1 st.global.u32 [lout], r8;",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\n@p1 bra END;\nredux.sync.add.u32 r8, r9, 0xffffffdf;\nst.global.u32 [lout], r8;\nEND:",
        ),
        defect(
            "a member mask that was never set",
            "register",
            "shfl.sync.bfly.b32 r8, tid, 1, 31, r9;",
            "mov.u32 r9, -1;\nshfl.sync.bfly.b32 r8, tid, 1, 31, r9;",
        ),
        defect(
            "a vote's member mask that was never set",
            "register",
            "setp.lt.u32 p2, tid, 40;\nvote.sync.ballot.b32 r8, p2, r9;",
            "mov.u32 r9, -1;\nsetp.lt.u32 p2, tid, 40;\nvote.sync.ballot.b32 r8, p2, r9;",
        ),
        defect(
            "a match's member mask that was never set",
            "register",
            "match.any.sync.b32 r8, tid, r9;",
            "mov.u32 r9, -1;\nmatch.any.sync.b32 r8, tid, r9;",
        ),
        defect(
            "a reduction's member mask that was never set",
            "register",
            "redux.sync.add.u32 r8, tid, r9;",
            "mov.u32 r9, -1;\nredux.sync.add.u32 r8, tid, r9;",
        ),
        defect(
            "a choice of a register that has no value",
            "register",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nselp.u32 r8, r9, tid, p1;\nst.global.u32 [lout], r8;",
            "setp.eq.u32 p1, lane, 5;\n@!p1 mov.u32 r9, 1;\nselp.u32 r8, tid, r9, p1;\nst.global.u32 [lout], r8;",
        ),
        defect("a row of a product without a value", "register", &products[0], &products[1]),
        defect("a column of a product without a value", "register", &products[2], &products[3]),
        defect("an addend of a product without a value", "register", &sum("r11"), &sum("r10")),
    ]);
}

#[test]
fn collectives() {
    check(&[
        defect(
            "a barrier that some lanes skip",
            "divergent",
            "setp.lt.u32 p0, lane, 9;\n@p0 bar.sync 0;",
            "bar.sync 0;",
        ),
        defect(
            "a barrier in two branches of a warp",
            "divergent",
            "setp.lt.u32 p0, lane, 9;\n@p0 bra A;\nbar.sync 0;\nbra END;\nA:\nbar.sync 0;\nEND:",
            "@warp0 bra A;\nbar.sync 0;\nbra END;\nA:\nbar.sync 0;\nEND:",
        ),
        defect(
            "a shuffle of lanes that are elsewhere",
            "divergent",
            "setp.lt.u32 p0, lane, 9;\n@!p0 bra END;\nshfl.sync.bfly.b32 r2, tid, 1, 31, -1;\nEND:",
            "setp.lt.u32 p0, lane, 8;\n@!p0 bra END;\nshfl.sync.bfly.b32 r2, tid, 1, 31, 0xff;\nEND:",
        ),
        defect(
            "a vote of lanes that have ended",
            "divergent",
            "setp.lt.u32 p0, lane, 9;\n@p0 exit;\nvote.sync.ballot.b32 r2, p0, -1;",
            "setp.lt.u32 p0, lane, 8;\n@p0 exit;\nvote.sync.ballot.b32 r2, p0, 0xffffff00;",
        ),
        defect(
            "a matrix load of half a warp",
            "divergent",
            "mov.u32 r4, 0;\nshl.b32 r3, tid, 4;\nadd.u32 r3, r3, s;\nst.shared.v4.u32 [r3], {r4, r4, r4, r4};\nbar.sync 0;\nsetp.lt.u32 p0, lane, 16;\n@!p0 bra END;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {r2}, [r3];\nEND:",
            "mov.u32 r4, 0;\nshl.b32 r3, tid, 4;\nadd.u32 r3, r3, s;\nst.shared.v4.u32 [r3], {r4, r4, r4, r4};\nbar.sync 0;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {r2}, [r3];",
        ),
        defect(
            "a mask without the own lane",
            "operand",
            "shfl.sync.bfly.b32 r2, tid, 1, 31, 0xfffffffe;",
            "shfl.sync.bfly.b32 r2, tid, 1, 31, 0xffffffff;",
        ),
        defect(
            "masks that differ",
            "operand",
            "and.b32 r2, tid, 1;\nadd.u32 r2, r2, 0xfffffffe;\nor.b32 r2, r2, 0x7fffffff;\nor.b32 r3, r2, 0xffffffff;\nshl.b32 r4, 1, lane;\nshfl.sync.bfly.b32 r5, tid, 1, 31, r4;",
            "mov.u32 r4, -1;\nshfl.sync.bfly.b32 r5, tid, 1, 31, r4;",
        ),
        defect("a barrier for too many threads", "deadlock", "bar.sync 1, 96;", "bar.sync 1, 64;"),
        defect(
            "a barrier that a warp leaves out",
            "deadlock",
            "@warp0 bra END;\nbar.sync 1, 64;\nEND:",
            "@warp0 bra END;\nbar.sync 1, 32;\nEND:",
        ),
        defect(
            "a warp that comes in two halves counts once",
            "deadlock",
            "@!warp0 bra END;\nsetp.lt.u32 p0, lane, 16;\n@p0 bra A;\nbarrier.sync 1, 64;\nbra END;\nA:\nbarrier.sync 1, 64;\nEND:",
            "setp.lt.u32 p0, lane, 16;\n@p0 bra A;\nbarrier.sync 1, 64;\nbra END;\nA:\nbarrier.sync 1, 64;\nEND:",
        ),
        defect(
            "half a warp that goes on to another barrier",
            "deadlock",
            "setp.lt.u32 p0, lane, 16;\n@p0 bra A;\nbarrier.sync 1, 64;\nbra END;\nA:\nbarrier.sync 2, 64;\nEND:",
            "setp.lt.u32 p0, lane, 16;\n@p0 exit;\nbarrier.sync 1, 64;",
        ),
        defect(
            "half a warp that reads before the barrier",
            "race",
            "mov.u32 r4, 0;\nst.shared.u32 [ms], r4;\nbar.sync 0;\nsetp.lt.u32 p0, lane, 16;\n@!p0 bra B;\nst.shared.u32 [ms], tid;\nbarrier.sync 0;\nbra END;\nB:\nld.shared.u32 r3, [ms-64];\nbarrier.sync 0;\nEND:",
            "mov.u32 r4, 0;\nst.shared.u32 [ms], r4;\nbar.sync 0;\nsetp.lt.u32 p0, lane, 16;\n@!p0 bra B;\nst.shared.u32 [ms], tid;\nbarrier.sync 0;\nbra END;\nB:\nbarrier.sync 0;\nld.shared.u32 r3, [ms-64];\nEND:",
        ),
        defect("a count that is no multiple of 32", "operand", "bar.sync 1, 40;", "bar.sync 1, 64;"),
        defect("a barrier that does not exist", "operand", "bar.sync 16;", "bar.sync 15;"),
        defect(
            "no end",
            "budget",
            "L:\nbra L;",
            "mov.u32 r2, 0;\nL:\nadd.u32 r2, r2, 1;\nsetp.lt.u32 p0, r2, 100;\n@p0 bra L;",
        ),
        defect(
            "a flag that nobody sets",
            "budget",
            "L:\nld.acquire.gpu.global.u32 r2, [flag];\nsetp.eq.u32 p0, r2, 0;\n@p0 bra L;",
            "mov.u32 r3, 1;\nst.release.gpu.global.u32 [flag], r3;\nL:\nld.acquire.gpu.global.u32 r2, [flag];\nsetp.eq.u32 p0, r2, 0;\n@p0 bra L;",
        ),
        defect("a trap", "trap", "@first trap;", "setp.gt.u32 p0, tid, 100;\n@p0 trap;"),
    ]);
}

#[test]
fn barrier_objects() {
    let defects = [
        defect(
            "a read before the wait",
            "race",
            "@first mbarrier.init.shared.b64 [s], 32;\nmov.u32 r4, 0;\nst.shared.u32 [ms+256], r4;\nbar.sync 0;\n@!warp0 bra CONSUME;\nst.shared.u32 [ms+256], tid;\nmbarrier.arrive.shared.b64 d1, [s];\nbra END;\nCONSUME:\nld.shared.u32 r3, [ms+128];\nL:\nmbarrier.test_wait.parity.shared.b64 p0, [s], 0;\n@!p0 bra L;\nEND:",
            "@first mbarrier.init.shared.b64 [s], 32;\nmov.u32 r4, 0;\nst.shared.u32 [ms+256], r4;\nbar.sync 0;\n@!warp0 bra CONSUME;\nst.shared.u32 [ms+256], tid;\nmbarrier.arrive.shared.b64 d1, [s];\nbra END;\nCONSUME:\nL:\nmbarrier.test_wait.parity.shared.b64 p0, [s], 0;\n@!p0 bra L;\nld.shared.u32 r3, [ms+128];\nEND:",
        ),
        defect(
            "an arrival before the write",
            "race",
            "@first mbarrier.init.shared.b64 [s], 32;\nmov.u32 r4, 0;\nst.shared.u32 [ms+256], r4;\nbar.sync 0;\n@!warp0 bra CONSUME;\nmbarrier.arrive.shared.b64 d1, [s];\nst.shared.u32 [ms+256], tid;\nbra END;\nCONSUME:\nL:\nmbarrier.test_wait.parity.shared.b64 p0, [s], 0;\n@!p0 bra L;\nst.shared.u32 [ms+128], tid;\nEND:",
            "@first mbarrier.init.shared.b64 [s], 32;\nmov.u32 r4, 0;\nst.shared.u32 [ms+256], r4;\nbar.sync 0;\n@!warp0 bra CONSUME;\nst.shared.u32 [ms+256], tid;\nmbarrier.arrive.shared.b64 d1, [s];\nbra END;\nCONSUME:\nL:\nmbarrier.test_wait.parity.shared.b64 p0, [s], 0;\n@!p0 bra L;\nst.shared.u32 [ms+128], tid;\nEND:",
        ),
        defect(
            "the wrong phase",
            "race",
            "@first mbarrier.init.shared.b64 [s], 32;\nmov.u32 r4, 0;\nst.shared.u32 [ms+256], r4;\nbar.sync 0;\n@!warp0 bra CONSUME;\nst.shared.u32 [ms+256], tid;\nmbarrier.arrive.shared.b64 d1, [s];\nbra END;\nCONSUME:\nmbarrier.test_wait.parity.shared.b64 p0, [s], 1;\nld.shared.u32 r3, [ms+128];\nEND:",
            "@first mbarrier.init.shared.b64 [s], 32;\nmov.u32 r4, 0;\nst.shared.u32 [ms+256], r4;\nbar.sync 0;\n@!warp0 bra CONSUME;\nst.shared.u32 [ms+256], tid;\nmbarrier.arrive.shared.b64 d1, [s];\nbra END;\nCONSUME:\nL:\nmbarrier.test_wait.parity.shared.b64 p0, [s], 0;\n@!p0 bra L;\nld.shared.u32 r3, [ms+128];\nEND:",
        ),
        defect(
            "no initialisation",
            "operand",
            "mbarrier.arrive.shared.b64 d1, [s];",
            "@first mbarrier.init.shared.b64 [s], 64;\nbar.sync 0;\nmbarrier.arrive.shared.b64 d1, [s];",
        ),
        defect(
            "an arrival that never comes",
            "budget",
            "@first mbarrier.init.shared.b64 [s], 65;\nbar.sync 0;\nmbarrier.arrive.shared.b64 d1, [s];\nL:\nmbarrier.test_wait.shared.b64 p0, [s], d1;\n@!p0 bra L;",
            "@first mbarrier.init.shared.b64 [s], 64;\nbar.sync 0;\nmbarrier.arrive.shared.b64 d1, [s];\nL:\nmbarrier.test_wait.shared.b64 p0, [s], d1;\n@!p0 bra L;",
        ),
    ];
    check(&defects);
}
