//! Counters against what can be counted by hand.

use crate::kit::{Sim, count_case};
use cuda_sim::count::Counts;
use cuda_sim::probe;

fn counts(body: &str) -> Counts {
    let mut sim = Sim::new(&format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n.shared .align 128 .b8 s[8192];\n\
         .reg .b32 r<12>;\n.reg .b64 d<4>;\n.reg .pred q;\nmov.u32 r0, %tid.x;\nmov.u32 r1, s;\nld.param.u64 d0, [p];\n{body}\nret;\n}}\n"
    ));
    (sim.options.count, sim.options.check) = (true, false);
    let data = sim.words(&[0; 4096]);
    sim.launch("k", 2, 32, &[data]).unwrap_or_else(|fault| panic!("{fault}")).counts.unwrap()
}

/// A load of each lane's own word at a distance in bytes.
fn strided(stride: u32) -> Counts {
    counts(&format!("mul.wide.u32 d1, r0, {stride};\nadd.u64 d1, d0, d1;\nld.global.u32 r2, [d1];"))
}

#[test]
fn sectors_follow_the_stride() {
    for (stride, sectors) in [(4, 4), (8, 8), (16, 16), (32, 32), (64, 32)] {
        let counts = strided(stride);
        // Two CTAs do the same: the launch touches the sectors once.
        assert_eq!(counts.global_sectors, 2 * sectors, "stride {stride}");
        assert_eq!(counts.unique_bytes, sectors * 32, "stride {stride}");
        assert_eq!((counts.global_requests, counts.global_bytes), (2, 2 * 128), "stride {stride}");
    }
}

#[test]
fn bank_conflicts_follow_the_stride() {
    for (stride, wavefronts) in [(4, 1), (8, 2), (12, 1), (32, 8), (128, 32), (132, 1)] {
        let counts = counts(&format!("mul.lo.u32 r2, r0, {stride};\nadd.u32 r2, r2, r1;\nst.shared.u32 [r2], r0;"));
        assert_eq!(counts.shared_wavefronts, 2 * wavefronts, "stride {stride}");
        assert_eq!(counts.shared_ideal, 2, "stride {stride}");
    }
    // 16 bytes a lane: eight lanes fill all banks, four passes are the least.
    let wide = counts("shl.b32 r2, r0, 4;\nadd.u32 r2, r2, r1;\nst.shared.v4.u32 [r2], {r0, r0, r0, r0};");
    assert_eq!((wide.shared_wavefronts, wide.shared_ideal), (8, 8));
}

#[test]
fn instructions_lanes_and_products() {
    let one = counts("setp.lt.u32 q, r0, 8;\n@q add.u32 r2, r0, 1;");
    assert_eq!((one.instructions(), one.arithmetic, one.memory, one.control), (2 * 6, 2 * 4, 2, 2));
    assert_eq!(one.lanes, 2 * (5 * 32 + 8));
    let product = counts(
        "mov.u32 r2, 0;\nmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {r4, r5, r6, r7}, {r2, r2, r2, r2}, {r2, r2}, {r2, r2, r2, r2};",
    );
    assert_eq!((product.tensor, product.tensor_flop), (2, 2 * 2 * 16 * 8 * 16));
    let copies = counts(
        "shl.b32 r2, r0, 4;\nadd.u32 r2, r2, r1;\nmul.wide.u32 d1, r0, 16;\nadd.u64 d1, d0, d1;\n\
         cp.async.cg.shared.global [r2], [d1], 16;\ncp.async.commit_group;\ncp.async.cg.shared.global [r2+512], [d1+512], 16;\ncp.async.commit_group;\ncp.async.wait_group 0;",
    );
    assert_eq!((copies.copied_bytes, copies.groups_in_flight, copies.global_sectors), (2 * 1024, 2, 2 * 32));
    assert!(copies.json("k").contains("\"copied_bytes\": 2048"));
}

#[test]
fn a_box_passes_a_line_at_a_time() {
    let name = "tensor copy 2d, swizzle 3, 64 columns, inside";
    let cases = probe::cases(90);
    let counts = count_case(cases.iter().find(|case| case.name == name).unwrap());
    // Two warps fill 8,192 words; 16 rows of 128 bytes come; 528 words are read.
    assert_eq!(counts.shared_wavefronts, 256 + 16 + 17);
    assert_eq!(counts.shared_ideal, counts.shared_wavefronts);
}
