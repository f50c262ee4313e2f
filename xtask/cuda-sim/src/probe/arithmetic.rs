//! Cases of arithmetic, comparison and bits.

use super::Case;
use super::element::{Element, Width};
use super::values::{BF16, F16, F32, F64, INT, sweep32, tuples};
use Width::{D, H, P, W};

const COUNT: usize = 2048;
const SWEEP: usize = 4096;

fn wide(values: &[u32]) -> Vec<u64> {
    values.iter().map(|value| u64::from(*value)).collect()
}

/// Two halves, each with a corner.
fn pairs(values: &[u32]) -> Vec<u64> {
    let count = values.len();
    (0..count).map(|at| u64::from(values[at]) | u64::from(values[(at * 7 + 3) % count]) << 16).collect()
}

/// `op o0, i0, …;` for each opcode, over tuples.
fn family(cases: &mut Vec<Case>, opcodes: &[&str], widths: (&[Width], Width), corners: &[u64], count: usize) {
    let bits = if widths.0[0] == D { 64 } else { 32 };
    for opcode in opcodes {
        let operands: String = (0..widths.0.len()).map(|at| format!(", i{at}")).collect();
        let body = format!("{opcode} o0{operands};");
        let rows = tuples(opcode, corners, widths.0.len(), bits, count);
        cases.push(
            Element { name: opcode, body: &body, inputs: widths.0, outputs: &[widths.1], target: "sm_80" }.case(&rows),
        );
    }
}

/// Opcode templates with every value of `$` and `#`.
fn expand(template: &str, first: &[&str], second: &[&str]) -> Vec<String> {
    let mut out = Vec::new();
    for a in first {
        for b in second {
            out.push(template.replace('$', a).replace('#', b));
        }
    }
    out
}

/// All cases.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    single(&mut cases);
    functions(&mut cases);
    double(&mut cases);
    halves(&mut cases);
    integers(&mut cases);
    bits(&mut cases);
    comparisons(&mut cases);
    cases
}

fn run(cases: &mut Vec<Case>, opcodes: &[String], widths: (&[Width], Width), corners: &[u64], count: usize) {
    let names: Vec<&str> = opcodes.iter().map(String::as_str).collect();
    family(cases, &names, widths, corners, count);
}

fn single(cases: &mut Vec<Case>) {
    let corners = wide(&F32);
    let modes = ["rn", "rz", "rm", "rp"];
    for op in ["add", "sub", "mul"] {
        run(cases, &expand(&format!("{op}.$#.f32"), &modes, &["", ".ftz", ".sat"]), (&[W, W], W), &corners, 2 * COUNT);
    }
    run(cases, &expand("fma.$#.f32", &modes, &["", ".ftz", ".sat"]), (&[W, W, W], W), &corners, 2 * COUNT);
    run(cases, &expand("div.$#.f32", &modes, &["", ".ftz"]), (&[W, W], W), &corners, 2 * COUNT);
    let others = [
        "div.approx.f32",
        "div.approx.ftz.f32",
        "div.full.f32",
        "div.full.ftz.f32",
        "min.f32",
        "max.f32",
        "min.ftz.f32",
        "max.ftz.f32",
        "min.NaN.f32",
        "max.NaN.f32",
        "copysign.f32",
    ];
    family(cases, &others, (&[W, W], W), &corners, 2 * COUNT);
    for name in ["max.xorsign.abs.f32", "min.NaN.xorsign.abs.f32"] {
        let body = format!("{name} o0, i0, i1;");
        let rows = tuples(name, &corners, 2, 32, COUNT);
        cases.push(Element { name, body: &body, inputs: &[W; 2], outputs: &[W], target: "sm_86" }.case(&rows));
    }
}

fn functions(cases: &mut Vec<Case>) {
    let mut opcodes: Vec<String> = Vec::new();
    for op in ["rcp.rn", "rcp.rz", "rcp.rm", "rcp.rp", "sqrt.rn", "sqrt.rz", "sqrt.rm", "sqrt.rp"] {
        opcodes.push(format!("{op}.f32"));
    }
    for op in ["rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2"] {
        opcodes.extend([format!("{op}.approx.f32"), format!("{op}.approx.ftz.f32")]);
    }
    opcodes.extend(["tanh.approx.f32", "abs.f32", "abs.ftz.f32", "neg.f32", "neg.ftz.f32"].map(str::to_owned));
    for opcode in &opcodes {
        let body = format!("{opcode} o0, i0;");
        let rows: Vec<Vec<u64>> = sweep32(opcode, SWEEP).into_iter().map(|value| vec![value]).collect();
        cases.push(Element { name: opcode, body: &body, inputs: &[W], outputs: &[W], target: "sm_80" }.case(&rows));
    }
    for test in ["finite", "infinite", "number", "notanumber", "normal", "subnormal"] {
        let name = format!("testp.{test}.f32");
        let rows: Vec<Vec<u64>> = wide(&F32).into_iter().map(|value| vec![value]).collect();
        let body = format!("{name} o0, i0;");
        cases.push(Element { name: &name, body: &body, inputs: &[W], outputs: &[P], target: "sm_80" }.case(&rows));
    }
}

fn double(cases: &mut Vec<Case>) {
    let modes = ["rn", "rz", "rm", "rp"];
    run(cases, &expand("$.#.f64", &["add", "sub", "mul", "div"], &modes), (&[D, D], D), &F64, COUNT);
    family(cases, &["fma.rn.f64"], (&[D, D, D], D), &F64, COUNT);
    family(cases, &["min.f64", "max.f64", "copysign.f64"], (&[D, D], D), &F64, COUNT);
    let unary = ["abs.f64", "neg.f64", "sqrt.rn.f64", "rcp.rn.f64", "rcp.approx.ftz.f64", "rsqrt.approx.f64"];
    family(cases, &unary, (&[D], D), &F64, COUNT);
}

fn halves(cases: &mut Vec<Case>) {
    for (ty, width, corners, extras) in [
        ("f16", H, wide(&F16), &["", ".ftz", ".sat", ".ftz.sat"][..]),
        ("f16x2", W, pairs(&F16), &["", ".ftz", ".sat"][..]),
    ] {
        run(
            cases,
            &expand(&format!("$.rn#.{ty}"), &["add", "sub", "mul"], extras),
            (&[width; 2], width),
            &corners,
            COUNT,
        );
        run(cases, &expand(&format!("fma.rn#.{ty}"), &[""], extras), (&[width; 3], width), &corners, COUNT);
        run(cases, &expand(&format!("fma.rn#.relu.{ty}"), &[""], &["", ".ftz"]), (&[width; 3], width), &corners, COUNT);
        run(
            cases,
            &expand(&format!("$#.{ty}"), &["min", "max"], &["", ".ftz", ".NaN"]),
            (&[width; 2], width),
            &corners,
            COUNT,
        );
        run(
            cases,
            &expand(&format!("$.{ty}"), &["abs", "neg", "tanh.approx", "ex2.approx"], &[""]),
            (&[width], width),
            &corners,
            COUNT,
        );
    }
    for (ty, width, corners) in [("bf16", H, wide(&BF16)), ("bf16x2", W, pairs(&BF16))] {
        run(cases, &expand(&format!("fma.rn#.{ty}"), &[""], &["", ".relu"]), (&[width; 3], width), &corners, COUNT);
        run(cases, &expand(&format!("$#.{ty}"), &["min", "max"], &["", ".NaN"]), (&[width; 2], width), &corners, COUNT);
        run(cases, &expand(&format!("$.{ty}"), &["abs", "neg"], &[""]), (&[width], width), &corners, COUNT);
    }
}

/// bf16 arithmetic that came with sm_90.
pub fn brain_of_hopper() -> Vec<Case> {
    let mut cases = Vec::new();
    for (ty, width, corners) in [("bf16", H, wide(&BF16)), ("bf16x2", W, pairs(&BF16))] {
        let unary = expand(&format!("$.{ty}"), &["tanh.approx", "ex2.approx.ftz"], &[""]);
        let binary = expand(&format!("$.rn.{ty}"), &["add", "sub", "mul"], &[""]);
        for (opcodes, count) in [(unary, 1), (binary, 2)] {
            for opcode in &opcodes {
                let operands: String = (0..count).map(|at| format!(", i{at}")).collect();
                let body = format!("{opcode} o0{operands};");
                let rows = tuples(opcode, &corners, count, 32, COUNT);
                let inputs = vec![width; count];
                cases.push(
                    Element { name: opcode, body: &body, inputs: &inputs, outputs: &[width], target: "sm_90a" }
                        .case(&rows),
                );
            }
        }
    }
    cases
}

fn integers(cases: &mut Vec<Case>) {
    for (bits, width) in [(16, H), (32, W), (64, D)] {
        let types = [format!("u{bits}"), format!("s{bits}")];
        let types: Vec<&str> = types.iter().map(String::as_str).collect();
        let binary = ["add", "sub", "div", "rem", "min", "max", "mul.lo", "mul.hi"];
        run(cases, &expand("$.#", &binary, &types), (&[width; 2], width), &INT, COUNT);
        run(cases, &expand("$.#", &["mad.lo", "sad"], &types), (&[width; 3], width), &INT, COUNT);
        run(cases, &expand("$.#", &["abs", "neg"], &types[1..]), (&[width], width), &INT, 512);
    }
    family(cases, &["mul.wide.u16", "mul.wide.s16"], (&[H, H], W), &INT, COUNT);
    family(cases, &["mul.wide.u32", "mul.wide.s32"], (&[W, W], D), &INT, COUNT);
    family(cases, &["mad.wide.u32", "mad.wide.s32"], (&[W, W, D], D), &INT, COUNT);
    let triple = [
        "mad.hi.u32",
        "mad.hi.s32",
        "mad.hi.sat.s32",
        "dp4a.u32.u32",
        "dp4a.s32.s32",
        "dp4a.u32.s32",
        "dp2a.lo.s32.s32",
        "dp2a.hi.u32.u32",
    ];
    family(cases, &triple, (&[W, W, W], W), &INT, COUNT);
    family(cases, &["add.sat.s32", "sub.sat.s32", "mul24.lo.u32", "mul24.hi.s32"], (&[W, W], W), &INT, COUNT);
    let carry = "add.cc.u32 o0, i0, i1;\naddc.cc.u32 o1, i2, i3;\naddc.u32 o2, i0, i3;\n\
                 sub.cc.u32 o3, i0, i1;\nsubc.cc.u32 o4, i2, i3;\nsubc.u32 o5, i1, i2;\n\
                 mad.lo.cc.u32 o6, i0, i1, i2;\nmadc.hi.u32 o7, i0, i1, i3;";
    let rows = tuples("carry", &INT, 4, 32, COUNT);
    cases.push(
        Element { name: "carry chains", body: carry, inputs: &[W; 4], outputs: &[W; 8], target: "sm_80" }.case(&rows),
    );
}

fn bits(cases: &mut Vec<Case>) {
    for (bits, width) in [(16, H), (32, W), (64, D)] {
        run(cases, &expand(&format!("$.b{bits}"), &["and", "or", "xor"], &[""]), (&[width; 2], width), &INT, 512);
        run(cases, &expand(&format!("$.b{bits}"), &["not", "cnot"], &[""]), (&[width], width), &INT, 512);
        let shifts = [format!("shl.b{bits}"), format!("shr.u{bits}"), format!("shr.s{bits}"), format!("shr.b{bits}")];
        run(cases, &shifts, (&[width, W], width), &INT, COUNT);
    }
    for (bits, width) in [(32, W), (64, D)] {
        let counts = [
            format!("popc.b{bits}"),
            format!("clz.b{bits}"),
            format!("bfind.u{bits}"),
            format!("bfind.s{bits}"),
            format!("bfind.shiftamt.u{bits}"),
        ];
        run(cases, &counts, (&[width], W), &INT, 512);
        run(cases, &[format!("brev.b{bits}")], (&[width], width), &INT, 512);
        run(cases, &[format!("bfe.u{bits}"), format!("bfe.s{bits}")], (&[width, W, W], width), &INT, 8 * COUNT);
        run(cases, &[format!("bfi.b{bits}")], (&[width, width, W, W], width), &INT, 4 * COUNT);
    }
    let modes = ["", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"];
    run(
        cases,
        &expand("prmt.b32$", &modes, &[""]),
        (&[W, W, W], W),
        &[0x3210, 0x7654, 0xba98, 0xfedc, 0x0123, 0x4321, 0x8040_c0ff, 0xdead_beef],
        COUNT,
    );
    run(cases, &expand("shf.$.#.b32", &["l", "r"], &["wrap", "clamp"]), (&[W, W, W], W), &INT, COUNT);
    for table in [0x80, 0xfe, 0x96, 0xe8, 0xca, 0x01] {
        let name = format!("lop3.b32 {table:#x}");
        let body = format!("lop3.b32 o0, i0, i1, i2, {table};");
        let rows = tuples(&name, &INT, 3, 32, 512);
        cases.push(Element { name: &name, body: &body, inputs: &[W; 3], outputs: &[W], target: "sm_80" }.case(&rows));
    }
    run(cases, &expand("bmsk.$.b32", &["clamp", "wrap"], &[""]), (&[W, W], W), &INT, COUNT);
    run(cases, &expand("szext.$.#", &["clamp", "wrap"], &["u32", "s32"]), (&[W, W], W), &INT, COUNT);
}

fn comparisons(cases: &mut Vec<Case>) {
    let signed = ["eq", "ne", "lt", "le", "gt", "ge"];
    let floating = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"];
    for (ty, width, corners, ops) in [
        ("s16", H, INT.to_vec(), &signed[..]),
        ("s32", W, INT.to_vec(), &signed[..]),
        ("u32", W, INT.to_vec(), &["lo", "ls", "hi", "hs"][..]),
        ("s64", D, INT.to_vec(), &signed[..]),
        ("u64", D, INT.to_vec(), &["lo", "ls", "hi", "hs"][..]),
        ("f32", W, wide(&F32), &floating[..]),
        ("f64", D, F64.to_vec(), &floating[..]),
        ("f16", H, wide(&F16), &floating[..]),
    ] {
        let name = format!("setp.*.{ty}");
        let mut body = String::new();
        for (at, op) in ops.iter().enumerate() {
            body.push_str(&format!("setp.{op}.{ty} o{at}, i0, i1;\n"));
        }
        let outputs = vec![P; ops.len()];
        let rows = tuples(&name, &corners, 2, if width == D { 64 } else { 32 }, COUNT);
        cases.push(
            Element { name: &name, body: &body, inputs: &[width; 2], outputs: &outputs, target: "sm_80" }.case(&rows),
        );
    }
    let body =
        "setp.lt.and.s32 o0|o1, i0, i1, i2;\nsetp.lt.or.s32 o2|o3, i0, i1, i2;\nsetp.lt.xor.s32 o4|o5, i0, i1, !i2;";
    let rows = tuples("setp pairs", &[0, 1, 2, 0xffff_ffff], 3, 32, 512);
    cases.push(
        Element { name: "setp with a predicate", body, inputs: &[W, W, P], outputs: &[P; 6], target: "sm_80" }
            .case(&rows),
    );
    let body = "set.lt.u32.s32 o0, i0, i1;\nset.ge.f32.s32 o1, i0, i1;\nslct.b32.s32 o2, i0, i1, i1;\nslct.b32.f32 o3, i0, i1, i1;";
    let rows = tuples("set", &INT, 2, 32, COUNT);
    cases.push(Element { name: "set and slct", body, inputs: &[W, W], outputs: &[W; 4], target: "sm_80" }.case(&rows));
}
