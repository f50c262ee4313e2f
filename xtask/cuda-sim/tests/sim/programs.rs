//! Whole small kernels.

use crate::kit::Sim;
use cuda_sim::exec::FaultKind;

fn kernel(registers: &str, body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 pin, .param .u64 pout, .param .u32 n)\n{{\n\
         .reg .b32 r<16>;\n.reg .b64 d<8>;\n.reg .pred p<4>;\n{registers}\n{body}\nret;\n}}\n"
    )
}

/// Every lane loops another number of times, leaves by another way, and all meet again.
#[test]
fn lanes_diverge_and_meet_again() {
    let sim = Sim::new(&kernel(
        "",
        "mov.u32 r0, %tid.x;\nmov.u32 r1, 0;\nmov.u32 r2, 0;\n\
         LOOP:\nsetp.ge.u32 p0, r1, r0;\n@p0 bra OUT;\nadd.u32 r1, r1, 1;\nand.b32 r3, r1, 1;\nsetp.eq.u32 p1, r3, 0;\n\
         @p1 bra EVEN;\nadd.u32 r2, r2, 1;\nbra LOOP;\nEVEN:\nadd.u32 r2, r2, 100;\nsetp.gt.u32 p2, r1, 20;\n@p2 bra OUT;\nbra LOOP;\n\
         OUT:\nactivemask.b32 r4;\nbar.warp.sync -1;\nactivemask.b32 r4;\n\
         ld.param.u64 d0, [pout];\nmul.wide.u32 d1, r0, 8;\nadd.u64 d0, d0, d1;\nst.global.v2.b32 [d0], {r2, r4};",
    ));
    let out = sim.blank(256);
    sim.launch("k", 1, 32, &[0, out]).unwrap();
    for (tid, pair) in sim.read(out, 64).chunks_exact(2).enumerate() {
        let steps = (tid as u32).min(22);
        assert_eq!(pair, [steps.div_ceil(2) + steps / 2 * 100, u32::MAX], "thread {tid}");
    }
}

/// Some lanes wait at a barrier, and the others come to it from further down.
#[test]
fn lanes_meet_again_further_up() {
    let sim = Sim::new(&kernel(
        "",
        "mov.u32 r0, %tid.x;\nand.b32 r1, r0, 31;\nsetp.lt.u32 p0, r1, 9;\nsetp.lt.u32 p1, r1, 20;\nbra SPLIT;\n\
         MEET:\nbar.sync 0;\nactivemask.b32 r2;\nld.param.u64 d0, [pout];\nmul.wide.u32 d1, r0, 4;\nadd.u64 d0, d0, d1;\n\
         st.global.b32 [d0], r2;\nbra END;\nSPLIT:\n@p0 bra MEET;\nadd.u32 r3, r0, r0;\n@p1 bra MEET;\nadd.u32 r3, r0, r0;\n\
         bra MEET;\nEND:",
    ));
    let out = sim.blank(256);
    sim.launch("k", 1, 64, &[0, out]).unwrap();
    assert_eq!(sim.read(out, 64), [u32::MAX; 64]);
}

/// A lane that spins until another lane of its warp sets a flag: both make progress.
#[test]
fn lanes_of_a_warp_may_wait_for_each_other() {
    let sim = Sim::new(&kernel(
        "",
        "ld.param.u64 d0, [pin];\nld.param.u64 d1, [pout];\nmov.u32 r0, %tid.x;\nsetp.eq.u32 p0, r0, 0;\n@!p0 bra SET;\n\
         SPIN:\nld.acquire.gpu.global.u32 r1, [d0];\nsetp.eq.u32 p1, r1, 0;\n@p1 bra SPIN;\nst.global.u32 [d1], r1;\nbra END;\n\
         SET:\nmov.u32 r2, 7;\nsetp.ne.u32 p2, r0, 1;\n@p2 bra END;\nst.release.gpu.global.u32 [d0], r2;\nEND:",
    ));
    let (flag, out) = (sim.words(&[0]), sim.blank(4));
    sim.launch("k", 1, 32, &[flag, out]).unwrap();
    assert_eq!(sim.read(out, 1), [7]);
}

/// Of many CTAs on all cores, which count themselves, the last reads what all have written.
#[test]
fn the_last_cta_sees_what_all_wrote() {
    let sim = Sim::new(&kernel(
        "",
        "ld.param.u64 d0, [pin];\nld.param.u64 d1, [pout];\nld.param.u32 r0, [n];\nmov.u32 r1, %ctaid.x;\n\
         mul.wide.u32 d2, r1, 4;\nadd.u64 d2, d1, d2;\nst.global.u32 [d2], r1;\nsub.u32 r2, r0, 1;\n\
         atom.acq_rel.gpu.global.inc.u32 r3, [d0], r2;\nsetp.ne.u32 p0, r3, r2;\n@p0 bra END;\n\
         mov.u32 r4, 0;\nmov.u32 r5, 0;\n\
         SUM:\nmul.wide.u32 d2, r4, 4;\nadd.u64 d2, d1, d2;\nld.global.u32 r6, [d2];\nadd.u32 r5, r5, r6;\n\
         add.u32 r4, r4, 1;\nsetp.lt.u32 p1, r4, r0;\n@p1 bra SUM;\nst.global.u32 [d1], r5;\nEND:",
    ));
    const CTAS: u32 = 64;
    let (counter, out) = (sim.words(&[0]), sim.blank(4 * u64::from(CTAS)));
    for _ in 0..300 {
        sim.launch("k", CTAS, 1, &[counter, out, u64::from(CTAS)]).unwrap();
        assert_eq!(sim.read(out, 1), [CTAS * (CTAS - 1) / 2]);
        assert_eq!(sim.read(counter, 1), [0]);
    }
}

#[test]
fn functions_are_called_with_parameters_in_memory_and_registers() {
    let sim = Sim::new(
        ".version 8.0\n.target sm_80\n.address_size 64\n\
         .func (.param .b32 out) square(.param .b32 x)\n{\n.reg .b32 r<2>;\nld.param.b32 r0, [x];\nmul.lo.u32 r1, r0, r0;\nst.param.b32 [out], r1;\nret;\n}\n\
         .func (.reg .b32 out) twice(.reg .b32 x)\n{\n.reg .b32 t;\nadd.u32 t, x, x;\nmov.u32 out, t;\nret;\n}\n\
         .visible .entry k(.param .u64 pout)\n{\n.reg .b32 r<4>;\n.reg .b64 d<3>;\n\
         mov.u32 r0, %tid.x;\n{\n.param .b32 a;\n.param .b32 b;\nst.param.b32 [a], r0;\ncall.uni (b), square, (a);\nld.param.b32 r1, [b];\n}\n\
         call (r2), twice, (r1);\nld.param.u64 d0, [pout];\nmul.wide.u32 d1, r0, 4;\nadd.u64 d0, d0, d1;\nst.global.u32 [d0], r2;\nret;\n}\n",
    );
    let out = sim.blank(128);
    sim.launch("k", 1, 32, &[out]).unwrap();
    let expected: Vec<u32> = (0..32).map(|tid| 2 * tid * tid).collect();
    assert_eq!(sim.read(out, 32), expected);
}

#[test]
fn a_switch_goes_to_its_case() {
    let sim = Sim::new(&kernel(
        "",
        "mov.u32 r0, %tid.x;\nand.b32 r1, r0, 3;\nT: .branchtargets A, B, C, D;\nbrx.idx r1, T;\n\
         A:\nmov.u32 r2, 10;\nbra E;\nB:\nmov.u32 r2, 11;\nbra E;\nC:\nmov.u32 r2, 12;\nbra E;\nD:\nmov.u32 r2, 13;\n\
         E:\nld.param.u64 d0, [pout];\nmul.wide.u32 d1, r0, 4;\nadd.u64 d0, d0, d1;\nst.global.u32 [d0], r2;",
    ));
    let out = sim.blank(128);
    sim.launch("k", 1, 32, &[0, out]).unwrap();
    let expected: Vec<u32> = (0..32).map(|tid| 10 + tid % 4).collect();
    assert_eq!(sim.read(out, 32), expected);
}

#[test]
fn faults_are_found() {
    let fault = |body: &str, options: fn(&mut Sim)| {
        let mut sim = Sim::new(&kernel("", body));
        options(&mut sim);
        let (input, out) = (sim.words(&[1; 64]), sim.words(&[0; 64]));
        sim.launch("k", 2, 64, &[input, out]).unwrap_err()
    };
    let found = fault("ld.param.u64 d0, [pin];\nld.global.u32 r0, [d0+256];", |_| {});
    assert!(matches!(found.kind, FaultKind::OutOfBounds { write: false, bytes: 4, .. }), "{found}");
    assert_eq!(found.line, 11);
    let found = fault("ld.param.u64 d0, [pin];\nst.global.u64 [d0+4], d0;", |_| {});
    assert!(matches!(found.kind, FaultKind::Misaligned { bytes: 8, .. }), "{found}");
    let found = fault("mov.u32 r0, %tid.x;\nsetp.lt.u32 p0, r0, 3;\n@p0 bar.sync 0;", |_| {});
    assert!(matches!(found.kind, FaultKind::DivergentCollective { .. }), "{found}");
    let found = fault("mov.u32 r0, %tid.x;\nsetp.lt.u32 p0, r0, 32;\n@p0 bra END;\nbar.sync 1, 64;\nEND:", |_| {});
    assert!(matches!(found.kind, FaultKind::Deadlock { .. }), "{found}");
    let found = fault("L:\nbra L;", |sim| sim.options.budget = 100_000);
    assert!(matches!(found.kind, FaultKind::Budget { .. }), "{found}");
    let found = fault("trap;", |_| {});
    assert_eq!(found.kind, FaultKind::Trap);
}
