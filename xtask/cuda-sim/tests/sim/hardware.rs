//! Every case of the probe against what an H100 answered (`fixtures/h100.fixture`).

use crate::kit::run_case;
use cuda_sim::driver::device::Profile;
use cuda_sim::driver::occupancy::active_ctas;
use cuda_sim::probe::{Answer, Case, Fixture, cases};
use rayon::prelude::*;
use std::path::Path;

fn answers() -> Fixture {
    Fixture::read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/h100.fixture"))).unwrap()
}

/// What may differ from the hardware and how far.
enum Slack {
    /// Units in the last place of f32, f16 or bf16.
    Places(u32),
    /// So much of the value and so much besides.
    Near(f64, f64),
    /// The same, besides growing with the argument; huge arguments are not compared.
    Angle(f64),
    /// Only which NaN is passed on.
    Nan,
}

/// The approximate functions compute here what is exact, rounded; the hardware is off by these bounds.
fn slack(name: &str) -> Option<Slack> {
    let opcode = name.split(' ').next().unwrap_or("");
    Some(match opcode {
        "atom.global.add.f64" => Slack::Nan,
        _ if !opcode.contains(".approx") && !opcode.contains("div.full") => return None,
        _ if opcode.ends_with("f64") => Slack::Near(1e-5, 0.0),
        _ if opcode.starts_with("sin") || opcode.starts_with("cos") => Slack::Angle(1e-6),
        _ if opcode.starts_with("tanh.approx.f32") => Slack::Near(6e-4, 0.0),
        _ if opcode.starts_with("lg2") => Slack::Near(2e-7, 2.5e-7),
        _ if opcode.contains("f32") => Slack::Places(2),
        _ => Slack::Places(1),
    })
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

/// Distance of two patterns of a format with `mantissa` stored bits, in units of the last place; NaN are alike.
fn places(a: u32, b: u32, bits: u32, mantissa: u32) -> u32 {
    let (sign, infinity) = (1 << (bits - 1), ((1u32 << (bits - 1 - mantissa)) - 1) << mantissa);
    let (size_a, size_b) = (a & !sign & (sign | (sign - 1)), b & !sign & (sign | (sign - 1)));
    match (size_a > infinity, size_b > infinity) {
        (true, true) => 0,
        (false, false) if a & sign == b & sign || size_a == 0 && size_b == 0 => size_a.abs_diff(size_b),
        _ => u32::MAX,
    }
}

fn near(case: &Case, at: usize, want: u32, got: u32, slack: &Slack) -> bool {
    let double = case.name.ends_with("f64");
    // The upper halves of f64 say enough.
    if double && at.is_multiple_of(2) {
        return true;
    }
    let infinite = want & 0x7ff0_0000 == 0x7ff0_0000;
    match slack {
        Slack::Places(most) if case.name.contains("16") => {
            let mantissa = if case.name.contains("bf16") { 7 } else { 10 };
            let low = places(want & 0xffff, got & 0xffff, 16, mantissa);
            low.max(places(want >> 16, got >> 16, 16, mantissa)) <= *most
        }
        Slack::Places(most) => places(want, got, 32, 23) <= *most,
        Slack::Near(..) | Slack::Nan if double && infinite => got & 0x7ff0_0000 == want & 0x7ff0_0000,
        Slack::Near(part, _) if double => {
            let wide = |word: u32| f64::from_bits(u64::from(word) << 32);
            (wide(want) - wide(got)).abs() <= part * wide(want).abs()
        }
        Slack::Near(part, more) => close(want, got, part * f64::from(f32::from_bits(want).abs()) + more),
        Slack::Angle(part) => {
            let angle = f64::from(f32::from_bits(words(&case.input)[at]).abs());
            angle > 1000.0 || close(want, got, part * angle.max(1.0))
        }
        Slack::Nan => want == got,
    }
}

fn close(want: u32, got: u32, most: f64) -> bool {
    let (want, got) = (f32::from_bits(want), f32::from_bits(got));
    want == got || want.is_nan() && got.is_nan() || f64::from((want - got).abs()) <= most
}

fn compare(case: &Case, answer: &Answer) -> Result<(), String> {
    let got = match run_case(case) {
        Err(code) if code == answer.code => return Ok(()),
        Ok(got) if answer.code == 0 => got,
        other => return Err(format!("{}: {:?}, on hardware code {}", case.name, other.err(), answer.code)),
    };
    if answer.is(&got.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()) {
        return Ok(());
    }
    let want = words(&answer.output);
    let Some(slack) = slack(&case.name).filter(|_| !want.is_empty()) else {
        return Err(format!("{}: not what the hardware wrote", case.name));
    };
    let wrong = want.iter().zip(&got).enumerate().find(|(at, (want, got))| !near(case, *at, **want, **got, &slack));
    match wrong {
        None => Ok(()),
        Some((at, (want, got))) => Err(format!("{}: word {at} is {got:#010x}, on hardware {want:#010x}", case.name)),
    }
}

/// Bit for bit, but for the approximate functions: arithmetic in all rounding modes, conversions, bits, shuffles, atomics,
/// layouts and sums of tensor cores, swizzled copies of tensors.
#[test]
fn single_instructions_do_what_the_hardware_does() {
    let fixture = answers();
    let all = cases(90);
    let asked: Vec<(&Case, &Answer)> =
        all.iter().filter_map(|case| fixture.answer(case).map(|answer| (case, answer))).collect();
    // Where a thread runs is not compared.
    assert!(asked.len() + 1 >= all.len(), "{} of {} cases have an answer", asked.len(), all.len());
    let wrong: Vec<String> = asked.par_iter().filter_map(|(case, answer)| compare(case, answer).err()).collect();
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), asked.len());
}

fn host(name: &str) -> String {
    let fixture = answers();
    let answer = fixture.answers.iter().find(|answer| answer.name == format!("host: {name}")).unwrap();
    String::from_utf8(answer.output.clone()).unwrap()
}

#[test]
fn occupancy_is_the_drivers() {
    let device = Profile::named("h100").unwrap();
    let mut compared = 0;
    for line in host("occupancy").lines().filter(|line| line.starts_with("registers")) {
        let numbers: Vec<i64> = line.split([' ', ':']).filter_map(|word| word.parse().ok()).collect();
        let [registers, threads, shared, code, count] = numbers[..] else { panic!("{line}") };
        if code != 0 || shared > i64::from(device.shared_optin) {
            continue;
        }
        let got = active_ctas(&device, threads as u32, registers as u32, shared as u32);
        assert_eq!(i64::from(got), count, "{line}");
        compared += 1;
    }
    assert!(compared > 1200, "{compared}");
}

#[test]
fn attributes_are_the_devices() {
    let device = Profile::named("h100").unwrap();
    for line in host("device attributes").lines().take(147) {
        let numbers: Vec<i32> = line.split([' ', ':']).filter_map(|word| word.parse().ok()).collect();
        assert_eq!(device.attribute(numbers[0]), Some(numbers[2]), "{line}");
    }
    assert!(host("device attributes").contains(&format!("of device {}", device.memory_bytes)));
    assert_eq!(device.attribute(0), None);
    assert_eq!(device.attribute(148), None);
}
