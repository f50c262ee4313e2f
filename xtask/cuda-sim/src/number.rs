//! Arithmetic of the formats and rounding modes that the host's processor lacks.

/// A rounding mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To nearest, ties to even (`.rn`).
    Nearest,
    /// To nearest, ties away from zero (`.rna`).
    Away,
    /// Towards zero (`.rz`).
    Zero,
    /// Towards minus infinity (`.rm`).
    Down,
    /// Towards plus infinity (`.rp`).
    Up,
}

/// A binary format of up to 32 bits: bits of exponent and of the stored mantissa.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Bits of the exponent.
    pub exponent: u32,
    /// Stored bits of the mantissa.
    pub mantissa: u32,
}

/// IEEE half.
pub const F16: Format = Format { exponent: 5, mantissa: 10 };
/// bfloat16.
pub const BF16: Format = Format { exponent: 8, mantissa: 7 };
/// f32's range with 10 bits of mantissa, as 19 bits.
pub const TF32: Format = Format { exponent: 8, mantissa: 10 };
/// IEEE single.
pub const F32: Format = Format { exponent: 8, mantissa: 23 };

impl Format {
    fn bias(self) -> i32 {
        (1 << (self.exponent - 1)) - 1
    }

    fn sign(self) -> u32 {
        1 << (self.exponent + self.mantissa)
    }

    fn infinity(self) -> u32 {
        ((1 << self.exponent) - 1) << self.mantissa
    }

    /// Bits of the largest finite number.
    pub fn largest(self) -> u32 {
        self.infinity() - 1
    }

    /// The NaN that the hardware writes.
    pub fn nan(self) -> u32 {
        (1 << (self.exponent + self.mantissa)) - 1
    }

    /// The number of some bits.
    pub fn widen(self, bits: u32) -> f64 {
        let exponent = (bits >> self.mantissa) & ((1 << self.exponent) - 1);
        let mantissa = bits & ((1 << self.mantissa) - 1);
        let top = exponent == (1 << self.exponent) - 1;
        let size = if top {
            if mantissa == 0 { f64::INFINITY } else { f64::NAN }
        } else if exponent == 0 {
            f64::from(mantissa) * power(1 - self.bias() - self.mantissa as i32)
        } else {
            f64::from(mantissa | 1 << self.mantissa) * power(exponent as i32 - self.bias() - self.mantissa as i32)
        };
        if bits & self.sign() != 0 { -size } else { size }
    }

    /// Rounds a number to the format's bits. Too large numbers become infinity where the mode allows, else the largest.
    pub fn narrow(self, value: f64, mode: Rounding) -> u32 {
        if value.is_nan() {
            return self.nan();
        }
        let sign = if value.is_sign_negative() { self.sign() } else { 0 };
        let size = value.abs();
        if size == 0.0 {
            return sign;
        }
        if size.is_infinite() {
            return sign | self.infinity();
        }
        let exponent = (exponent_of(size)).max(1 - self.bias());
        // In units of the last place: exact, a power of two scales it.
        let scaled = scale(size, self.mantissa as i32 - exponent);
        let floor = scaled.floor();
        let rest = scaled - floor;
        let up = match mode {
            Rounding::Nearest => rest > 0.5 || rest == 0.5 && floor % 2.0 == 1.0,
            Rounding::Away => rest >= 0.5,
            Rounding::Zero => false,
            Rounding::Down => sign != 0 && rest > 0.0,
            Rounding::Up => sign == 0 && rest > 0.0,
        };
        let units = floor as u64 + u64::from(up);
        let base = u64::from((exponent + self.bias()) as u32 - 1) << self.mantissa;
        let bits = base + units;
        if bits > u64::from(self.largest()) {
            let to_infinity = match mode {
                Rounding::Nearest | Rounding::Away => true,
                Rounding::Zero => false,
                Rounding::Down => sign != 0,
                Rounding::Up => sign == 0,
            };
            return sign | if to_infinity { self.infinity() } else { self.largest() };
        }
        sign | bits as u32
    }
}

/// 2^e, exact over f64's whole range.
fn power(e: i32) -> f64 {
    scale(1.0, e)
}

fn scale(value: f64, e: i32) -> f64 {
    libm::scalbn(value, e)
}

fn exponent_of(size: f64) -> i32 {
    libm::ilogb(size)
}

/// a + b as a rounded sum and what the rounding lost.
pub fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let from_b = sum - a;
    (sum, (a - (sum - from_b)) + (b - from_b))
}

/// a + b rounded to odd: a further rounding to fewer bits is then as if from the exact sum.
pub fn add_odd(a: f64, b: f64) -> f64 {
    let (sum, lost) = two_sum(a, b);
    if lost == 0.0 || !sum.is_finite() || sum.to_bits() & 1 == 1 {
        return sum;
    }
    if (lost > 0.0) == (sum > 0.0) { f64::from_bits(sum.to_bits() + 1) } else { f64::from_bits(sum.to_bits() - 1) }
}

/// An exact f64, or one rounded to odd, as f32 in a rounding mode.
pub fn to_f32(value: f64, mode: Rounding) -> f32 {
    match mode {
        Rounding::Nearest => value as f32,
        _ => f32::from_bits(F32.narrow(value, mode)),
    }
}

/// The result that a rounded sum of finite numbers and the sign of its error give in another mode.
pub fn directed(rounded: f64, lost: f64, mode: Rounding) -> f64 {
    if rounded.is_infinite() {
        return overflow(rounded.is_sign_negative(), mode);
    }
    let up = lost > 0.0;
    match mode {
        _ if lost == 0.0 || rounded.is_nan() => rounded,
        Rounding::Up if up => rounded.next_up(),
        Rounding::Down if !up => rounded.next_down(),
        Rounding::Zero if up != (rounded > 0.0) => {
            if rounded > 0.0 {
                rounded.next_down()
            } else {
                rounded.next_up()
            }
        }
        _ => rounded,
    }
}

/// What a number beyond the range becomes.
fn overflow(negative: bool, mode: Rounding) -> f64 {
    match (mode, negative) {
        (Rounding::Zero | Rounding::Down, false) => f64::MAX,
        (Rounding::Zero | Rounding::Up, true) => f64::MIN,
        (_, false) => f64::INFINITY,
        (_, true) => f64::NEG_INFINITY,
    }
}

/// Mantissa and exponent of a finite number that is not zero: m · 2^e with 53 bits of m.
fn parts(value: f64) -> (u64, i32) {
    let bits = value.to_bits() & (u64::MAX >> 1);
    let (exponent, mantissa) = ((bits >> 52) as i32, bits & ((1 << 52) - 1));
    if exponent > 0 {
        return (mantissa | 1 << 52, exponent - 1075);
    }
    let shift = mantissa.leading_zeros() as i32 - 11;
    (mantissa << shift, -1074 - shift)
}

/// (m and a little more where `sticky`) · 2^e as f64 in a rounding mode; m has at least 64 bits.
fn round_parts(negative: bool, m: u128, e: i32, sticky: bool, mode: Rounding) -> f64 {
    let top = e + 127 - m.leading_zeros() as i32;
    let last = (top - 52).max(-1074);
    let shift = (last - e).clamp(0, 127) as u32;
    let (kept, rest, half) = (m >> shift, m & ((1 << shift) - 1), 1u128 << shift.max(1) >> 1);
    let inexact = rest != 0 || sticky;
    let up = match mode {
        Rounding::Nearest => rest > half || rest == half && (sticky || kept & 1 == 1),
        Rounding::Away => rest >= half,
        Rounding::Zero => false,
        Rounding::Down => negative && inexact,
        Rounding::Up => !negative && inexact,
    };
    let size = scale((kept + u128::from(up)) as f64, last);
    match (size.is_infinite(), negative) {
        (true, _) => overflow(negative, mode),
        (false, true) => -size,
        (false, false) => size,
    }
}

/// a · b in a rounding mode.
pub fn product(a: f64, b: f64, mode: Rounding) -> f64 {
    if !a.is_finite() || !b.is_finite() || a == 0.0 || b == 0.0 {
        return a * b;
    }
    let ((ma, ea), (mb, eb)) = (parts(a), parts(b));
    let negative = a.is_sign_negative() != b.is_sign_negative();
    round_parts(negative, u128::from(ma) * u128::from(mb), ea + eb, false, mode)
}

/// a / b in a rounding mode.
pub fn quotient(a: f64, b: f64, mode: Rounding) -> f64 {
    if !a.is_finite() || !b.is_finite() || a == 0.0 || b == 0.0 {
        return a / b;
    }
    let ((ma, ea), (mb, eb)) = (parts(a), parts(b));
    let negative = a.is_sign_negative() != b.is_sign_negative();
    let wide = u128::from(ma) << 75;
    let (m, rest) = (wide / u128::from(mb), wide % u128::from(mb));
    round_parts(negative, m, ea - 75 - eb, rest != 0, mode)
}

/// The NaN that an operation on two f64 passes on: the second's before the first's, made quiet.
#[inline(always)]
pub fn pass_nan(a: f64, b: f64, value: f64) -> f64 {
    let quiet = |nan: f64| f64::from_bits(nan.to_bits() | 1 << 51);
    if b.is_nan() {
        quiet(b)
    } else if a.is_nan() {
        quiet(a)
    } else {
        value
    }
}

/// Subnormal f32 to zero of the same sign.
#[inline(always)]
pub fn flush(value: f32) -> f32 {
    if value.abs() < f32::MIN_POSITIVE { f32::from_bits(value.to_bits() & 1 << 31) } else { value }
}

/// To [0, 1], NaN to 0.
#[inline(always)]
pub fn saturate(value: f32) -> f32 {
    if value > 0.0 { value.min(1.0) } else { 0.0 }
}

/// 2^x, to f32's last place; vectorises.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    let x = f64::from(x.clamp(-200.0, 200.0));
    let whole = (x + 0.5).floor();
    let t = (x - whole) * std::f64::consts::LN_2;
    const INVERSE: [f64; 10] = [
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
    ];
    let mut sum = 0.0;
    for factor in INVERSE {
        sum = sum * t + factor;
    }
    let sum = sum * t + 1.0;
    (sum * f64::from_bits(((whole as i64 + 1023) as u64) << 52)) as f32
}

/// The smaller or larger number; NaN loses, −0 < +0.
pub fn pick(a: f64, b: f64, larger: bool, nan_wins: bool) -> f64 {
    if a.is_nan() || b.is_nan() {
        return if nan_wins || a.is_nan() && b.is_nan() {
            f64::NAN
        } else if a.is_nan() {
            b
        } else {
            a
        };
    }
    let a_first = if a == b { a.is_sign_negative() } else { a < b };
    if a_first != larger { a } else { b }
}
