//! Cases of `mma`: layouts by small integers, rounding by numbers that reveal it.

use super::Case;
use super::element::{Element, Width};
use super::values::random;
use Width::{D, W};
use half::{bf16, f16};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Warps of a case.
const WARPS: usize = 8;

struct Shape {
    shape: &'static str,
    types: &'static str,
    a: usize,
    b: usize,
    c: usize,
    width: Width,
}

const fn shape(shape: &'static str, types: &'static str, [a, b, c]: [usize; 3], width: Width) -> Shape {
    Shape { shape, types, a, b, c, width }
}

const SHAPES: [Shape; 18] = [
    shape("m16n8k16", "f32.bf16.bf16.f32", [4, 2, 4], W),
    shape("m16n8k16", "f32.f16.f16.f32", [4, 2, 4], W),
    shape("m16n8k16", "f16.f16.f16.f16", [4, 2, 2], W),
    shape("m16n8k8", "f32.bf16.bf16.f32", [2, 1, 4], W),
    shape("m16n8k8", "f32.f16.f16.f32", [2, 1, 4], W),
    shape("m16n8k8", "f16.f16.f16.f16", [2, 1, 2], W),
    shape("m16n8k8", "f32.tf32.tf32.f32", [4, 2, 4], W),
    shape("m16n8k4", "f32.tf32.tf32.f32", [2, 1, 4], W),
    shape("m16n8k32", "s32.s8.s8.s32", [4, 2, 4], W),
    shape("m16n8k32", "s32.u8.s8.s32", [4, 2, 4], W),
    shape("m16n8k16", "s32.s8.s8.s32", [2, 1, 4], W),
    shape("m16n8k16", "s32.u8.u8.s32", [2, 1, 4], W),
    shape("m8n8k16", "s32.s8.u8.s32", [1, 1, 2], W),
    shape("m16n8k64", "s32.s4.s4.s32", [4, 2, 4], W),
    shape("m16n8k64", "s32.u4.s4.s32", [4, 2, 4], W),
    shape("m16n8k32", "s32.s4.u4.s32", [2, 1, 4], W),
    shape("m8n8k32", "s32.s4.s4.s32", [1, 1, 2], W),
    shape("m8n8k4", "f64.f64.f64.f64", [1, 1, 2], D),
];

/// What numbers a case multiplies.
#[derive(Clone, Copy, PartialEq)]
enum Numbers {
    /// One element of A and one of B at a time.
    OneHot,
    /// Small integers: every sum is exact.
    Integers,
    /// Uniform in [−1, 1].
    Uniform,
    /// Exponents far apart, and products that cancel.
    Cancelling,
    /// Near the ends of the format.
    Extreme,
}

/// All cases.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for s in &SHAPES {
        let floating = s.types.contains('f');
        let kinds = [Numbers::OneHot, Numbers::Integers, Numbers::Uniform, Numbers::Cancelling, Numbers::Extreme];
        for numbers in &kinds[..if floating { 5 } else { 2 }] {
            cases.push(case(s, *numbers, ""));
        }
        if !floating {
            cases.push(case(s, Numbers::Extreme, ".satfinite"));
        }
    }
    cases.push(ladder());
    cases
}

fn case(s: &Shape, numbers: Numbers, saturate: &str) -> Case {
    let opcode = format!("mma.sync.aligned.{}.row.col{saturate}.{}", s.shape, s.types);
    let label = match numbers {
        Numbers::OneHot => "one-hot",
        Numbers::Integers => "integers",
        Numbers::Uniform => "uniform",
        Numbers::Cancelling => "cancelling",
        Numbers::Extreme => "extreme",
    };
    let name = format!("{opcode} {label}");
    let mut random = random(&name);
    let parts: Vec<&str> = s.types.split('.').collect();
    let warps = if numbers == Numbers::OneHot { 32 } else { WARPS };
    let mut rows = Vec::new();
    for warp in 0..warps {
        for lane in 0..32 {
            let mut row = Vec::new();
            for (operand, count, ty) in [(0, s.a, parts[1]), (1, s.b, parts[2]), (2, s.c, parts[3])] {
                for register in 0..count {
                    row.push(match (numbers, operand) {
                        (Numbers::OneHot, 0) => one_hot(ty, warp, lane, register, s.a),
                        (Numbers::OneHot, 1) => register_of(&mut random, ty, Numbers::Integers, false),
                        (Numbers::OneHot, _) => 0,
                        (numbers, operand) => register_of(&mut random, ty, numbers, operand == 2),
                    });
                }
            }
            rows.push(row);
        }
    }
    let vector = |letter: char, from: usize, count: usize| {
        let names: Vec<String> = (from..from + count).map(|at| format!("{letter}{at}")).collect();
        format!("{{{}}}", names.join(", "))
    };
    let body = format!(
        "{opcode} {}, {}, {}, {};",
        vector('o', 0, s.c),
        vector('i', 0, s.a),
        vector('i', s.a, s.b),
        vector('i', s.a + s.b, s.c)
    );
    let inputs = vec![s.width; s.a + s.b + s.c];
    let outputs = vec![s.width; s.c];
    Element { name: &name, body: &body, inputs: &inputs, outputs: &outputs, target: "sm_80" }.case(&rows)
}

/// A register of an operand that has a single one, in another lane, register and element for each warp.
fn one_hot(ty: &str, warp: usize, lane: usize, register: usize, registers: usize) -> u64 {
    let chosen = lane == (warp * 11 + 5) % 32 && register == warp % registers;
    let elements = match ty {
        "f16" | "bf16" => 2,
        "s8" | "u8" => 4,
        "s4" | "u4" => 8,
        _ => 1,
    };
    pack(ty, |at| if chosen && at == warp / 4 % elements { 1.0 } else { 0.0 })
}

/// A register of elements.
fn pack(ty: &str, mut element: impl FnMut(usize) -> f64) -> u64 {
    match ty {
        "f64" => element(0).to_bits(),
        "f32" | "tf32" => u64::from((element(0) as f32).to_bits()),
        "s32" => u64::from(element(0) as i64 as u32),
        "f16" => (0..2).fold(0, |bits, at| bits | u64::from(f16::from_f64(element(at)).to_bits()) << (16 * at)),
        "bf16" => (0..2).fold(0, |bits, at| bits | u64::from(bf16::from_f64(element(at)).to_bits()) << (16 * at)),
        "s8" | "u8" => (0..4).fold(0, |bits, at| bits | (element(at) as i64 as u64 & 255) << (8 * at)),
        _ => (0..8).fold(0, |bits, at| bits | (element(at) as i64 as u64 & 15) << (4 * at)),
    }
}

fn register_of(random: &mut ChaCha8Rng, ty: &str, numbers: Numbers, accumulator: bool) -> u64 {
    if matches!(ty, "s8" | "u8" | "s4" | "u4" | "s32") {
        return match numbers {
            Numbers::Extreme if ty == "s32" => {
                u64::from([i32::MAX - 100, i32::MIN + 100, i32::MAX, i32::MIN][random.random_range(0..4)] as u32)
            }
            Numbers::Extreme => [0x7f7f_7f7f, 0x8080_8080, 0xffff_ffff, 0x8888_8888][random.random_range(0..4)],
            _ if ty == "s32" => u64::from(random.random_range(-1000i32..1000) as u32),
            _ => u64::from(random.random::<u32>()),
        };
    }
    pack(ty, |_| match numbers {
        Numbers::OneHot | Numbers::Integers => f64::from(random.random_range(-8i32..9)),
        Numbers::Uniform => random.random_range(-1.0..1.0),
        Numbers::Cancelling => {
            let size = f64::from(random.random_range(1.0f32..2.0)) * f64::from(random.random_range(-12i32..13)).exp2();
            let size = if accumulator { size * f64::from(random.random_range(-12i32..13)).exp2() } else { size };
            if random.random() { size } else { -size }
        }
        Numbers::Extreme => {
            let corners = [0.0, -0.0, 1.0, 65504.0, 6e-8, 1e-30, 3e38, f64::INFINITY, f64::NAN, 1e-40, -65504.0, 2.0];
            // Mostly harmless, so that not every row is NaN.
            if random.random_range(0..12) == 0 { corners[random.random_range(0..corners.len())] } else { 0.5 }
        }
    })
}

/// One large product, a small one and the negated large one, with the small one ever smaller: where its bits are lost
/// shows how wide the sum is, and how it rounds.
fn ladder() -> Case {
    let opcode = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32";
    let mut rows = Vec::new();
    for warp in 0..32usize {
        for lane in 0..32usize {
            let (group, thread) = (lane / 4, lane % 4);
            // Row `group` has a0 at column 0, a1 at column 1, a8 at column 8; column `group` of B is 2^x, small, −2^x.
            let small = f64::from(-(warp as i32)).exp2() * if group % 2 == 0 { 1.0 } else { 1.5 };
            let big = f64::from(group as i32).exp2();
            let pair = |low: f64, high: f64| pack("bf16", |at| if at == 0 { low } else { high });
            let first = if thread == 0 { pair(1.0, 1.0) } else { 0 };
            let second = if thread == 0 { pair(1.0, 0.0) } else { 0 };
            let b = if thread == 0 { [pair(big, small), pair(-big, 0.0)] } else { [0, 0] };
            let c = if group < 4 { 0.0 } else { small * 0.75 };
            let c = pack("f32", |_| c);
            rows.push(vec![first, first, second, second, b[0], b[1], c, c, c, c]);
        }
    }
    let body = format!("{opcode} {{o0, o1, o2, o3}}, {{i0, i1, i2, i3}}, {{i4, i5}}, {{i6, i7, i8, i9}};");
    let name = format!("{opcode} ladder");
    Element { name: &name, body: &body, inputs: &[W; 10], outputs: &[W; 4], target: "sm_80" }.case(&rows)
}
