//! Single opcodes against Rust's own arithmetic, on the probe's inputs.

use crate::kit::run_case;
use cuda_sim::probe::{Case, cases};
use half::{bf16, f16};
use std::collections::HashMap;

fn all() -> HashMap<String, Case> {
    cases(80).into_iter().map(|case| (case.name.clone(), case)).collect()
}

fn words(case: &Case) -> Vec<u32> {
    case.input.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

fn nan32(value: f32) -> u32 {
    if value.is_nan() { 0x7fff_ffff } else { value.to_bits() }
}

/// Compares a case whose rows are `inputs` words and one word of output.
fn check(cases: &HashMap<String, Case>, name: &str, inputs: usize, expected: impl Fn(&[u32]) -> u32) {
    let case = cases.get(name).unwrap_or_else(|| panic!("no case {name}"));
    let got = run_case(case).unwrap();
    for (row, got) in words(case).chunks_exact(inputs).zip(got) {
        let want = expected(row);
        assert_eq!(got, want, "{name} of {row:x?}: {got:#x} instead of {want:#x}");
    }
}

/// The same for 64-bit numbers.
fn check64(cases: &HashMap<String, Case>, name: &str, inputs: usize, expected: impl Fn(&[u64]) -> u64) {
    let case = cases.get(name).unwrap_or_else(|| panic!("no case {name}"));
    let wide = |words: &[u32]| -> Vec<u64> {
        words.chunks_exact(2).map(|pair| u64::from(pair[0]) | u64::from(pair[1]) << 32).collect()
    };
    let got = wide(&run_case(case).unwrap());
    for (row, got) in wide(&words(case)).chunks_exact(inputs).zip(got) {
        let want = expected(row);
        assert_eq!(got, want, "{name} of {row:x?}: {got:#x} instead of {want:#x}");
    }
}

#[test]
fn single_precision() {
    let cases = all();
    let f = f32::from_bits;
    check(&cases, "add.rn.f32", 2, |r| nan32(f(r[0]) + f(r[1])));
    check(&cases, "sub.rn.f32", 2, |r| nan32(f(r[0]) - f(r[1])));
    check(&cases, "mul.rn.f32", 2, |r| nan32(f(r[0]) * f(r[1])));
    check(&cases, "div.rn.f32", 2, |r| nan32(f(r[0]) / f(r[1])));
    check(&cases, "fma.rn.f32", 3, |r| nan32(f(r[0]).mul_add(f(r[1]), f(r[2]))));
    check(&cases, "sqrt.rn.f32", 1, |r| nan32(f(r[0]).sqrt()));
    check(&cases, "rcp.rn.f32", 1, |r| nan32(1.0 / f(r[0])));
    check(&cases, "neg.f32", 1, |r| nan32(-f(r[0])));
    check(&cases, "copysign.f32", 2, |r| r[0] & 1 << 31 | r[1] & !(1 << 31));
}

/// Directed rounding brackets the exact result, and is exact where nearest is.
#[test]
fn directed_rounding() {
    let cases = all();
    for op in ["add", "mul", "fma", "div"] {
        let run = |mode: &str| run_case(&cases[&format!("{op}.{mode}.f32")]).unwrap();
        let inputs = if op == "fma" { 3 } else { 2 };
        // The four cases have inputs of their own: each is compared with f64.
        for mode in ["rz", "rm", "rp"] {
            let case = &cases[&format!("{op}.{mode}.f32")];
            for (row, got) in words(case).chunks_exact(inputs).zip(run(mode)) {
                let v: Vec<f64> = row.iter().map(|bits| f64::from(f32::from_bits(*bits))).collect();
                let near = match op {
                    "add" => v[0] + v[1],
                    "mul" => v[0] * v[1],
                    "div" => v[0] / v[1],
                    _ => v[0].mul_add(v[1], v[2]),
                };
                let got = f64::from(f32::from_bits(got));
                if !near.is_finite() || near.abs() > f64::from(f32::MAX) || got.is_infinite() {
                    continue;
                }
                let holds = match mode {
                    "rm" => got <= near,
                    "rp" => got >= near,
                    _ => got.abs() <= near.abs(),
                };
                // f64 itself rounds: half of its last place is allowed.
                let slack = (got - near).abs() <= near.abs() * f64::EPSILON;
                assert!(holds || slack, "{op}.{mode} of {v:?}: {got} against {near}");
                let next = (near.abs() * 2f64.powi(-23)).max(2f64.powi(-149));
                assert!((got - near).abs() <= next, "{op}.{mode} of {v:?}: {got} is too far from {near}");
            }
        }
    }
}

#[test]
fn double_precision() {
    let cases = all();
    fn f(bits: u64) -> f64 {
        f64::from_bits(bits)
    }
    let same = |want: f64| move |got: u64| f(got).is_nan() == want.is_nan() && (want.is_nan() || got == want.to_bits());
    for (name, inputs, op) in [
        ("add.rn.f64", 2, (|r| f(r[0]) + f(r[1])) as fn(&[u64]) -> f64),
        ("mul.rn.f64", 2, |r| f(r[0]) * f(r[1])),
        ("div.rn.f64", 2, |r| f(r[0]) / f(r[1])),
        ("fma.rn.f64", 3, |r| f(r[0]).mul_add(f(r[1]), f(r[2]))),
        ("sqrt.rn.f64", 1, |r| f(r[0]).sqrt()),
    ] {
        let case = &cases[name];
        let wide: Vec<u64> = case.input.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect();
        let got = run_case(case).unwrap();
        for (row, got) in wide.chunks_exact(inputs).zip(got.chunks_exact(2)) {
            let got = u64::from(got[0]) | u64::from(got[1]) << 32;
            assert!(same(op(row))(got), "{name} of {row:x?}: {got:#x}");
        }
    }
}

#[test]
fn halves() {
    let cases = all();
    let h = |bits: u32| f64::from(f16::from_bits(bits as u16));
    let pack = |value: f64| if value.is_nan() { 0x7fff } else { u32::from(f16::from_f64(value).to_bits()) };
    check(&cases, "add.rn.f16", 2, |r| pack(h(r[0]) + h(r[1])));
    check(&cases, "sub.rn.f16", 2, |r| pack(h(r[0]) - h(r[1])));
    check(&cases, "mul.rn.f16", 2, |r| pack(h(r[0]) * h(r[1])));
    check(&cases, "fma.rn.f16", 3, |r| pack(h(r[0]) * h(r[1]) + h(r[2])));
    check(&cases, "mul.rn.f16x2", 2, |r| {
        pack(h(r[0] & 0xffff) * h(r[1] & 0xffff)) | pack(h(r[0] >> 16) * h(r[1] >> 16)) << 16
    });
    let b = |bits: u32| f32::from_bits(bits << 16);
    check(&cases, "max.bf16", 2, |r| {
        let (x, y) = (b(r[0] & 0xffff), b(r[1] & 0xffff));
        let larger = if x.is_nan() || !y.is_nan() && (y > x || y == x && x.is_sign_negative()) { y } else { x };
        if x.is_nan() && y.is_nan() { 0x7fff } else { larger.to_bits() >> 16 }
    });
    check(&cases, "cvt.rn.bf16x2.f32", 2, |r| {
        let round = |bits: u32| {
            let value = f32::from_bits(bits);
            if value.is_nan() { 0x7fff } else { u32::from(bf16::from_f32(value).to_bits()) }
        };
        round(r[0]) << 16 | round(r[1])
    });
}

#[test]
fn integers() {
    let cases = all();
    check(&cases, "add.u32", 2, |r| r[0].wrapping_add(r[1]));
    check(&cases, "mul.hi.s32", 2, |r| ((i64::from(r[0] as i32) * i64::from(r[1] as i32)) >> 32) as u32);
    check(&cases, "mad.lo.s32", 3, |r| r[0].wrapping_mul(r[1]).wrapping_add(r[2]));
    check(&cases, "min.s32", 2, |r| (r[0] as i32).min(r[1] as i32) as u32);
    check(&cases, "sad.u32", 3, |r| r[2].wrapping_add(r[0].abs_diff(r[1])));
    check(&cases, "add.s16", 2, |r| r[0].wrapping_add(r[1]) & 0xffff);
    check64(&cases, "mul.hi.u64", 2, |r| ((u128::from(r[0]) * u128::from(r[1])) >> 64) as u64);
    check64(&cases, "add.s64", 2, |r| r[0].wrapping_add(r[1]));
    check(&cases, "dp4a.s32.s32", 3, |r| {
        let dot: i32 = (0..4).map(|k| i32::from((r[0] >> (8 * k)) as i8) * i32::from((r[1] >> (8 * k)) as i8)).sum();
        r[2].wrapping_add(dot as u32)
    });
    let divide = |a: u32, b: u32| if b == 0 { u32::MAX } else { (a as i32).wrapping_div(b as i32) as u32 };
    check(&cases, "div.s32", 2, |r| divide(r[0], r[1]));
}

#[test]
fn bits() {
    let cases = all();
    check(&cases, "popc.b32", 1, |r| r[0].count_ones());
    check(&cases, "clz.b32", 1, |r| r[0].leading_zeros());
    check(&cases, "brev.b32", 1, |r| r[0].reverse_bits());
    check(&cases, "bfind.u32", 1, |r| r[0].checked_ilog2().unwrap_or(u32::MAX));
    check(&cases, "lop3.b32 0x96", 3, |r| r[0] ^ r[1] ^ r[2]);
    check(&cases, "lop3.b32 0xe8", 3, |r| r[0] & r[1] | r[0] & r[2] | r[1] & r[2]);
    check(&cases, "lop3.b32 0xca", 3, |r| r[0] & r[1] | !r[0] & r[2]);
    check(&cases, "shl.b32", 2, |r| r[0].checked_shl(r[1]).unwrap_or(0));
    check(&cases, "shr.s32", 2, |r| (r[0] as i32 >> r[1].min(31)) as u32);
    check(&cases, "shf.l.wrap.b32", 3, |r| ((u64::from(r[1]) << 32 | u64::from(r[0])) << (r[2] & 31) >> 32) as u32);
    check(&cases, "prmt.b32", 3, |r| {
        let bytes = [r[0].to_le_bytes(), r[1].to_le_bytes()].concat();
        u32::from_le_bytes(std::array::from_fn(|at| {
            let pick = r[2] >> (4 * at) & 15;
            let byte = bytes[(pick & 7) as usize];
            if pick & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte }
        }))
    });
    // Bit by bit, as the PTX ISA's pseudocode goes.
    check(&cases, "bfe.s32", 3, |r| {
        let (pos, len) = (r[1] & 255, r[2] & 255);
        let sign = if len == 0 { 0 } else { r[0] >> (pos + len - 1).min(31) & 1 };
        (0..32).fold(0, |out, i| {
            let bit = if i < len && pos + i <= 31 { r[0] >> (pos + i) & 1 } else { sign };
            out | bit << i
        })
    });
    check(&cases, "bfi.b32", 4, |r| {
        let (pos, len) = (r[2] & 255, r[3] & 255);
        (0..len).fold(
            r[1],
            |out, i| {
                if pos + i > 31 { out } else { out & !(1 << (pos + i)) | (r[0] >> i & 1) << (pos + i) }
            },
        )
    });
}

#[test]
fn conversions() {
    let cases = all();
    check(&cases, "cvt.rn.f32.s32", 1, |r| (r[0] as i32 as f32).to_bits());
    check(&cases, "cvt.rzi.s32.f32", 1, |r| f32::from_bits(r[0]) as i32 as u32);
    check(&cases, "cvt.rzi.u32.f32", 1, |r| f32::from_bits(r[0]) as u32);
    check(&cases, "cvt.rni.s32.f32", 1, |r| f32::from_bits(r[0]).round_ties_even() as i32 as u32);
    check(&cases, "cvt.rmi.f32.f32", 1, |r| nan32(f32::from_bits(r[0]).floor()));
    check(&cases, "cvt.f32.f16", 1, |r| nan32(f16::from_bits(r[0] as u16).to_f32()));
    check(&cases, "cvt.rn.f16.f32", 1, |r| {
        let value = f32::from_bits(r[0]);
        if value.is_nan() { 0x7fff } else { u32::from(f16::from_f32(value).to_bits()) }
    });
    check(&cases, "cvt.sat.s32.u32", 1, |r| r[0].min(i32::MAX as u32));
    check(&cases, "cvt.s32.s8", 1, |r| i32::from(r[0] as i8) as u32);
}

/// Approximate functions: how far they may be from the exact value, in units of the last place of f32.
#[test]
fn approximations() {
    let cases = all();
    for (name, exact) in [
        ("ex2.approx.f32", f64::exp2 as fn(f64) -> f64),
        ("lg2.approx.f32", f64::log2),
        ("rsqrt.approx.f32", |x| 1.0 / x.sqrt()),
        ("sin.approx.f32", f64::sin),
        ("tanh.approx.f32", f64::tanh),
    ] {
        let case = &cases[name];
        for (input, got) in words(case).into_iter().zip(run_case(case).unwrap()) {
            let want = exact(f64::from(f32::from_bits(input)));
            let (got, near) = (f32::from_bits(got), want as f32);
            if want.is_nan() {
                assert!(got.is_nan(), "{name} of {input:#x}: {got}");
            } else {
                let steps = (i64::from(got.to_bits()) - i64::from(near.to_bits())).abs();
                assert!(steps <= 1, "{name} of {input:#x}: {got:e} against {near:e}");
            }
        }
    }
}
