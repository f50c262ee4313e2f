//! Numbers to try: corners of the formats, and random ones.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// f32 at the corners of its format.
pub const F32: [u32; 40] = [
    0x0000_0000,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x3f00_0000,
    0x3fc0_0000,
    0x4000_0000,
    0xc040_0000,
    0x0000_0001,
    0x807f_ffff,
    0x0080_0000,
    0x8080_0001,
    0x7f7f_ffff,
    0xff7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0xffc1_2345,
    0x7f80_0001,
    0x3f80_0001,
    0x3f7f_ffff,
    0x4b80_0000,
    0x4b7f_ffff,
    0x4f00_0000,
    0xcf00_0000,
    0x4f80_0000,
    0x5f00_0000,
    0x5f80_0000,
    0x3dcc_cccd,
    0x4049_0fdb,
    0xc020_0000,
    0x4020_0000,
    0x3eff_ffff,
    0x477f_e000,
    0x477f_f000,
    0x3880_0000,
    0x3380_0000,
    0x0040_0000,
    0x7e80_0000,
    0x4228_f5c3,
];

/// f16 at the corners of its format.
pub const F16: [u32; 24] = [
    0x0000, 0x8000, 0x3c00, 0xbc00, 0x3800, 0x3e00, 0x4000, 0xc200, 0x0001, 0x83ff, 0x0400, 0x8401, 0x7bff, 0xfbff,
    0x7c00, 0xfc00, 0x7e00, 0xfe01, 0x7d01, 0x3c01, 0x3bff, 0x2e66, 0x4248, 0x0200,
];

/// bf16 at the corners of its format.
pub const BF16: [u32; 24] = [
    0x0000, 0x8000, 0x3f80, 0xbf80, 0x3f00, 0x3fc0, 0x4000, 0xc040, 0x0001, 0x807f, 0x0080, 0x8081, 0x7f7f, 0xff7f,
    0x7f80, 0xff80, 0x7fc0, 0xffc1, 0x7f81, 0x3f81, 0x3f7f, 0x3dcd, 0x4049, 0x0040,
];

/// f64 at the corners of its format.
pub const F64: [u64; 24] = [
    0x0000_0000_0000_0000,
    0x8000_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    0x3ff8_0000_0000_0000,
    0x4000_0000_0000_0000,
    0xc008_0000_0000_0000,
    0x0000_0000_0000_0001,
    0x800f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0xffef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_1234_5678_9abc,
    0x7ff0_0000_0000_0001,
    0x3ff0_0000_0000_0001,
    0x3fef_ffff_ffff_ffff,
    0x41e0_0000_0000_0000,
    0xc1e0_0000_0020_0000,
    0x43e0_0000_0000_0000,
    0x4009_21fb_5444_2d18,
];

/// Integers of up to 64 bits at their corners.
pub const INT: [u64; 20] = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    33,
    127,
    128,
    255,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
];

/// A generator whose seed is a name.
pub fn random(name: &str) -> ChaCha8Rng {
    // FNV-1a
    let seed =
        name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    ChaCha8Rng::seed_from_u64(seed)
}

/// Tuples of corners, then random ones, `count` in all.
pub fn tuples(name: &str, corners: &[u64], width: usize, bits: u32, count: usize) -> Vec<Vec<u64>> {
    let mut random = random(name);
    let all = corners.len().pow(width as u32);
    let mut out = Vec::with_capacity(count);
    for number in 0..count {
        if all <= count / 2 && number < all {
            let digit = |k: usize| corners[number / corners.len().pow(k as u32) % corners.len()];
            out.push((0..width).map(digit).collect());
        } else {
            let any = |random: &mut ChaCha8Rng| match random.random_range(0..3) {
                0 => corners[random.random_range(0..corners.len())],
                _ => random.random::<u64>() >> (64 - bits),
            };
            out.push((0..width).map(|_| any(&mut random)).collect());
        }
    }
    out
}

/// Numbers for functions of one f32: corners, a sweep over all exponents, and the ranges that kernels use.
pub fn sweep32(name: &str, count: usize) -> Vec<u64> {
    let mut random = random(name);
    let mut out: Vec<u64> = F32.iter().map(|bits| u64::from(*bits)).collect();
    while out.len() < count {
        let value = match out.len() % 4 {
            0 => random.random::<u32>(),
            1 => random.random_range(-20.0f32..20.0).to_bits(),
            2 => random.random_range(0.5f32..4.0).to_bits(),
            _ => random.random_range(-140.0f32..140.0).to_bits(),
        };
        out.push(u64::from(value));
    }
    out
}
