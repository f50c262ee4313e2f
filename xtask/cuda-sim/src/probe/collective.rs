//! Cases of shuffles, votes, matches and reductions.

use super::Case;
use super::element::{Element, Width};
use super::values::{INT, tuples};
use Width::{D, P, W};

/// All cases.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in ["up", "down", "bfly", "idx"] {
        for clamp in [0x1fu32, 0x0, 0x10, 0x1800, 0x181f, 0x1c07, 0x1010] {
            let name = format!("shfl.sync.{mode}.b32 clamp {clamp:#x}");
            let body = format!("shfl.sync.{mode}.b32 o0|o1, i0, i1, {clamp}, -1;");
            let rows = lane_rows(&name, 512, 40);
            cases.push(
                Element { name: &name, body: &body, inputs: &[W, W], outputs: &[W, P], target: "sm_80" }.case(&rows),
            );
        }
    }
    let body = "vote.sync.all.pred o0, i0, -1;\nvote.sync.any.pred o1, i0, -1;\nvote.sync.uni.pred o2, i0, -1;\n\
                vote.sync.ballot.b32 o3, i0, -1;\nvote.sync.ballot.b32 o4, !i0, -1;\nactivemask.b32 o5;";
    let mut rows = tuples("vote", &[0, 1], 1, 1, 256);
    rows[..64].iter_mut().enumerate().for_each(|(at, row)| row[0] = u64::from(at < 32));
    cases.push(
        Element { name: "vote.sync", body, inputs: &[P], outputs: &[P, P, P, W, W, W], target: "sm_80" }.case(&rows),
    );
    let body = "match.any.sync.b32 o0, i0, -1;\nmatch.all.sync.b32 o1|o2, i0, -1;\nmatch.any.sync.b64 o3, i1, -1;";
    let mut rows = tuples("match", &[1, 2, 3, 4], 2, 2, 256);
    rows[..32].iter_mut().for_each(|row| row[0] = 9);
    cases.push(Element { name: "match", body, inputs: &[W, D], outputs: &[W, W, P, W], target: "sm_80" }.case(&rows));
    let mut body = String::new();
    for (at, op) in ["add.u32", "add.s32", "min.u32", "max.u32", "min.s32", "max.s32", "and.b32", "or.b32", "xor.b32"]
        .iter()
        .enumerate()
    {
        body.push_str(&format!("redux.sync.{op} o{at}, i0, -1;\n"));
    }
    let rows = tuples("redux", &INT, 1, 32, 512);
    cases
        .push(Element { name: "redux.sync", body: &body, inputs: &[W], outputs: &[W; 9], target: "sm_80" }.case(&rows));
    cases.extend(divergent());
    cases
}

/// A value and a lane operand for each lane; the operand is the same in a warp.
fn lane_rows(name: &str, count: usize, most: u64) -> Vec<Vec<u64>> {
    let random = tuples(name, &[0, 1, 2, 5, 16, 31, 33], 2, 32, count);
    (0..count).map(|at| vec![at as u64 * 3 + 7, (random[at / 32][1] + at as u64 / 32) % most]).collect()
}

/// Collectives of some lanes while others are elsewhere, and bits that depend on the lane.
fn divergent() -> Vec<Case> {
    let body = "mov.u32 t0, %laneid;\nand.b32 t1, t0, 1;\nsetp.eq.u32 q0, t1, 0;\n\
                @q0 bra EVEN;\n\
                shfl.sync.bfly.b32 o0, i0, 2, 31, 0xaaaaaaaa;\nactivemask.b32 o1;\nredux.sync.add.u32 o2, i0, 0xaaaaaaaa;\nbra JOIN;\n\
                EVEN:\n\
                shfl.sync.down.b32 o0, i0, 4, 31, 0x55555555;\nactivemask.b32 o1;\nredux.sync.max.u32 o2, i0, 0x55555555;\n\
                JOIN:\nbar.warp.sync -1;\nactivemask.b32 o3;\n\
                mov.u32 o4, %lanemask_lt;\nmov.u32 o5, %lanemask_ge;\nmov.u32 o6, %lanemask_eq;\nmov.u32 o7, %lanemask_gt;\nmov.u32 o8, %lanemask_le;";
    let rows = lane_rows("divergent", 64, 8);
    let case =
        Element { name: "divergent lanes", body, inputs: &[W, W], outputs: &[W; 9], target: "sm_80" }.case(&rows);
    let body = "mov.u32 o0, %laneid;\nmov.u32 o1, %warpid;\nmov.u32 o2, %tid.x;\nmov.u32 o3, %ntid.x;\nmov.u32 o4, %ctaid.x;\n\
                mov.u32 o5, %nctaid.x;\nmov.u32 o6, %tid.y;\nmov.u32 o7, %nctaid.z;\nmov.u32 o8, %dynamic_smem_size;\nmov.u32 o9, %total_smem_size;";
    let rows = lane_rows("special", 256, 8);
    let special =
        Element { name: "special registers", body, inputs: &[W], outputs: &[W; 10], target: "sm_80" }.case(&rows);
    vec![case, special]
}
