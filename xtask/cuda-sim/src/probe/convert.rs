//! Cases of `cvt`.

use super::Case;
use super::element::{Element, Width};
use super::values::{BF16, F16, F32, F64, INT, tuples};
use Width::{D, H, W};

const INTEGERS: [(&str, u32, Width); 8] = [
    ("u8", 8, H),
    ("s8", 8, H),
    ("u16", 16, H),
    ("s16", 16, H),
    ("u32", 32, W),
    ("s32", 32, W),
    ("u64", 64, D),
    ("s64", 64, D),
];
const FLOATS: [(&str, u32, Width); 3] = [("f16", 16, H), ("f32", 32, W), ("f64", 64, D)];

fn corners(ty: &str) -> Vec<u64> {
    match ty {
        "f16" => F16.iter().map(|bits| u64::from(*bits)).collect(),
        "bf16" => BF16.iter().map(|bits| u64::from(*bits)).collect(),
        "f32" => F32.iter().map(|bits| u64::from(*bits)).collect(),
        "f64" => F64.to_vec(),
        _ => INT.to_vec(),
    }
}

fn one(cases: &mut Vec<Case>, opcode: &str, from: (&str, Width), to: Width) {
    let body = format!("{opcode} o0, i0;");
    let bits = if from.1 == D { 64 } else { 32 };
    let mut rows = tuples(opcode, &corners(from.0), 1, bits, 512);
    if from.0.starts_with('f') {
        // Numbers near what integers hold, and halves between them.
        for k in 0..512 {
            let value = (f64::from(k) - 256.0) * 0.25 * if k % 3 == 0 { 129.0 } else { 1.0 };
            rows.push(vec![match from.0 {
                "f16" => u64::from(half::f16::from_f64(value).to_bits()),
                "f32" => u64::from((value as f32).to_bits()),
                _ => value.to_bits(),
            }]);
        }
    }
    cases.push(Element { name: opcode, body: &body, inputs: &[from.1], outputs: &[to], target: "sm_80" }.case(&rows));
}

/// All cases.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (to, to_bits, to_width) in INTEGERS {
        for (from, from_bits, from_width) in INTEGERS {
            if to == from {
                continue;
            }
            one(&mut cases, &format!("cvt.{to}.{from}"), (from, from_width), to_width);
            if to_bits < from_bits || to[..1] != from[..1] && to_bits == from_bits {
                one(&mut cases, &format!("cvt.sat.{to}.{from}"), (from, from_width), to_width);
            }
        }
        for (from, _, from_width) in FLOATS {
            for mode in ["rni", "rzi", "rmi", "rpi"] {
                one(&mut cases, &format!("cvt.{mode}.{to}.{from}"), (from, from_width), to_width);
            }
        }
        for (float, _, width) in FLOATS {
            for mode in ["rn", "rz", "rm", "rp"] {
                one(&mut cases, &format!("cvt.{mode}.{float}.{to}"), (to, to_width), width);
            }
        }
    }
    floats(&mut cases);
    pairs(&mut cases);
    cases
}

fn floats(cases: &mut Vec<Case>) {
    for opcode in ["cvt.f32.f16", "cvt.f64.f16"] {
        one(cases, opcode, ("f16", H), if opcode.contains("f64") { D } else { W });
    }
    one(cases, "cvt.f64.f32", ("f32", W), D);
    one(cases, "cvt.ftz.f64.f32", ("f32", W), D);
    for mode in ["rn", "rz", "rm", "rp"] {
        one(cases, &format!("cvt.{mode}.f32.f64"), ("f64", D), W);
        one(cases, &format!("cvt.{mode}.ftz.f32.f64"), ("f64", D), W);
        one(cases, &format!("cvt.{mode}.f16.f64"), ("f64", D), H);
        one(cases, &format!("cvt.{mode}.f16.f32"), ("f32", W), H);
    }
    for mode in ["rni", "rzi", "rmi", "rpi"] {
        one(cases, &format!("cvt.{mode}.f32.f32"), ("f32", W), W);
        one(cases, &format!("cvt.{mode}.ftz.f32.f32"), ("f32", W), W);
        one(cases, &format!("cvt.{mode}.f64.f64"), ("f64", D), D);
        one(cases, &format!("cvt.{mode}.f16.f16"), ("f16", H), H);
    }
    one(cases, "cvt.sat.f32.f32", ("f32", W), W);
    one(cases, "cvt.rn.sat.f32.s32", ("s32", W), W);
    for mode in ["rn", "rz", "rn.relu", "rz.relu"] {
        one(cases, &format!("cvt.{mode}.bf16.f32"), ("f32", W), H);
    }
    one(cases, "cvt.rna.tf32.f32", ("f32", W), W);
}

fn pairs(cases: &mut Vec<Case>) {
    for mode in ["rn", "rz", "rn.relu", "rz.relu"] {
        for to in ["f16x2", "bf16x2"] {
            let name = format!("cvt.{mode}.{to}.f32");
            let body = format!("{name} o0, i0, i1;");
            let rows = tuples(&name, &corners("f32"), 2, 32, 4096);
            cases.push(
                Element { name: &name, body: &body, inputs: &[W, W], outputs: &[W], target: "sm_80" }.case(&rows),
            );
        }
    }
    for name in ["cvt.pack.sat.u8.s32.b32", "cvt.pack.sat.s8.s32.b32"] {
        let body = format!("{name} o0, i0, i1, i2;");
        let rows = tuples(name, &INT, 3, 32, 1024);
        cases.push(Element { name, body: &body, inputs: &[W; 3], outputs: &[W], target: "sm_80" }.case(&rows));
    }
    for name in ["cvt.pack.sat.u16.s32", "cvt.pack.sat.s16.s32"] {
        let body = format!("{name} o0, i0, i1;");
        let rows = tuples(name, &INT, 2, 32, 1024);
        cases.push(Element { name, body: &body, inputs: &[W; 2], outputs: &[W], target: "sm_80" }.case(&rows));
    }
}
