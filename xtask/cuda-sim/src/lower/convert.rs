//! `cvt`: fast lane functions for common pairs of types, and one general function for all.

use super::Lower;
use super::opcode::Opcode;
use crate::error::At;
use crate::exec::regs::{AluFn, Class, Reg, alu};
use crate::number::{BF16, F16, F32, Format, Rounding, TF32, directed, flush, to_f32};
use crate::ptx::{Instruction, Kind, Type};
use half::f16;

/// A conversion, packed into a constant that lane functions read.
#[derive(Clone, Copy)]
struct Conversion {
    from: Type,
    to: Type,
    mode: Rounding,
    /// Round to an integer.
    integral: bool,
    ftz: bool,
    sat: bool,
    relu: bool,
    finite: bool,
    /// Bits of the register written.
    width: u32,
}

const KINDS: [Kind; 5] = [Kind::Unsigned, Kind::Signed, Kind::Float, Kind::Brain, Kind::Tensor];
const MODES: [Rounding; 5] = [Rounding::Nearest, Rounding::Away, Rounding::Zero, Rounding::Down, Rounding::Up];

fn pack_type(ty: Type) -> u64 {
    let kind = KINDS.iter().position(|kind| *kind == ty.kind).unwrap_or(0) as u64;
    kind | u64::from(ty.bits.trailing_zeros() - 3) << 3
}

fn unpack_type(code: u32) -> Type {
    Type { kind: KINDS[(code & 7).min(4) as usize], bits: 8 << (code >> 3 & 3) }
}

impl Conversion {
    fn pack(self) -> u64 {
        let mode = MODES.iter().position(|mode| *mode == self.mode).unwrap_or(0) as u64;
        pack_type(self.from)
            | pack_type(self.to) << 5
            | mode << 10
            | u64::from(self.integral) << 13
            | u64::from(self.ftz) << 14
            | u64::from(self.sat) << 15
            | u64::from(self.relu) << 16
            | u64::from(self.finite) << 17
            | u64::from(self.width.trailing_zeros() & 7) << 18
    }

    fn unpack(code: u32) -> Self {
        Self {
            from: unpack_type(code & 31),
            to: unpack_type(code >> 5 & 31),
            mode: MODES[(code >> 10 & 7).min(4) as usize],
            integral: code >> 13 & 1 == 1,
            ftz: code >> 14 & 1 == 1,
            sat: code >> 15 & 1 == 1,
            relu: code >> 16 & 1 == 1,
            finite: code >> 17 & 1 == 1,
            width: 1 << (code >> 18 & 7),
        }
    }
}

fn extend(value: u64, ty: Type) -> i128 {
    let shift = 64 - ty.bits;
    if ty.kind == Kind::Signed {
        i128::from((value << shift) as i64 >> shift)
    } else {
        i128::from(value << shift >> shift)
    }
}

fn format_of(ty: Type) -> Format {
    match (ty.kind, ty.bits) {
        (Kind::Float, 16) => F16,
        (Kind::Brain, _) => BF16,
        (Kind::Tensor, _) => TF32,
        _ => F32,
    }
}

fn widen(value: u64, ty: Type) -> f64 {
    match (ty.kind, ty.bits) {
        (Kind::Float, 64) => f64::from_bits(value),
        (Kind::Float, 32) => f64::from(f32::from_bits(value as u32)),
        _ => format_of(ty).widen(value as u32),
    }
}

fn to_integral(value: f64, mode: Rounding) -> f64 {
    match mode {
        Rounding::Nearest => value.round_ties_even(),
        Rounding::Away => value.round(),
        Rounding::Zero => value.trunc(),
        Rounding::Down => value.floor(),
        Rounding::Up => value.ceil(),
    }
}

fn bounds(ty: Type) -> (i128, i128) {
    if ty.kind == Kind::Signed { (-(1 << (ty.bits - 1)), (1 << (ty.bits - 1)) - 1) } else { (0, (1 << ty.bits) - 1) }
}

/// An integer as f64, rounded to odd.
fn integer_odd(value: i128) -> f64 {
    let near = value as f64;
    let lost = value - near as i128;
    if lost == 0 || near.to_bits() & 1 == 1 {
        near
    } else if lost > 0 {
        near.next_up()
    } else {
        near.next_down()
    }
}

fn flush64(value: f64, ty: Type) -> f64 {
    if (ty.kind, ty.bits) == (Kind::Float, 32) { f64::from(flush(value as f32)) } else { value }
}

fn narrow(value: f64, c: Conversion) -> u64 {
    let value = if c.relu && value <= 0.0 { 0.0 } else { value };
    match (c.to.kind, c.to.bits) {
        (Kind::Float, 64) => value.to_bits(),
        (Kind::Float, 32) if value.is_nan() => 0x7fff_ffff,
        (Kind::Float, 32) => u64::from(to_f32(value, c.mode).to_bits()),
        (Kind::Tensor, _) => u64::from(TF32.narrow(value, c.mode) << 13),
        _ => {
            let format = format_of(c.to);
            let bits = format.narrow(value, c.mode);
            let sign = 1 << (format.exponent + format.mantissa);
            let clamped = c.finite && bits & (sign - 1) > format.largest() && !value.is_nan();
            u64::from(if clamped { bits & sign | format.largest() } else { bits })
        }
    }
}

/// One value by the general rules.
fn convert(value: u64, code: u32) -> u64 {
    let c = Conversion::unpack(code);
    if c.width > 32 { converted(value, c) } else { converted(value, c) & ((1 << c.width) - 1) }
}

fn converted(value: u64, c: Conversion) -> u64 {
    let float = |ty: Type| !matches!(ty.kind, Kind::Unsigned | Kind::Signed);
    match (float(c.from), float(c.to)) {
        (false, false) => {
            let value = extend(value, c.from);
            let (low, high) = bounds(c.to);
            let value = if c.sat { value.clamp(low, high) } else { value };
            extend(value as u64, c.to) as u64
        }
        (false, true) => {
            let value = extend(value, c.from);
            if c.to.bits == 64 {
                let near = value as f64;
                return directed(near, (value - near as i128) as f64, c.mode).to_bits();
            }
            let value = integer_odd(value);
            narrow(if c.sat { value.clamp(0.0, 1.0) } else { value }, c)
        }
        (true, false) => {
            let value = widen(value, c.from);
            let value = if c.ftz { flush64(value, c.from) } else { value };
            if value.is_nan() {
                // From or to 64 bits the least number of the width, else 0.
                let wide = c.to.bits == 64 || c.from.bits == 64;
                let least = u64::MAX << (c.to.bits - 1);
                return if wide {
                    least & if c.to.kind == Kind::Signed { u64::MAX } else { u64::MAX >> (64 - c.to.bits) }
                } else {
                    0
                };
            }
            let (low, high) = bounds(c.to);
            (to_integral(value, c.mode) as i128).clamp(low, high) as u64
        }
        (true, true) if widen(value, c.from).is_nan() => convert_nan(value, c),
        (true, true) => {
            let value = widen(value, c.from);
            let value = if c.ftz { flush64(value, c.from) } else { value };
            let value = if c.integral { to_integral(value, c.mode) } else { value };
            let value = match c.sat {
                true if value > 0.0 => value.min(1.0),
                true => 0.0,
                false => value,
            };
            let bits = narrow(value, c);
            if c.ftz && (c.to.kind, c.to.bits) == (Kind::Float, 32) {
                return u64::from(flush(f32::from_bits(bits as u32)).to_bits());
            }
            bits
        }
    }
}

/// NaN from format to format: payloads are kept from and to f64, and to tf32; else there is one NaN.
fn convert_nan(value: u64, c: Conversion) -> u64 {
    let (from, to) = (c.from.bits, c.to.bits);
    let quiet = |bits: u64| bits | 1 << 51;
    if c.sat {
        return 0;
    }
    match (from, to) {
        (64, 64) => quiet(value),
        (32, 64) if c.ftz => 0x7fff_ffff_e000_0000,
        (32, 64) => quiet((value & 1 << 31) << 32 | 0x7ff << 52 | (value & 0x7f_ffff) << 29),
        (16, 64) => quiet((value & 0x8000) << 48 | 0x7ff << 52 | (value & 0x3ff) << 42),
        (64, 32) => value >> 32 & 1 << 31 | 0x7fc0_0000 | value >> 29 & 0x3f_ffff,
        (64, 16) => value >> 48 & 0x8000 | 0x7e00 | value >> 42 & 0x1ff,
        _ if c.to.kind == Kind::Tensor => value & !0x1fff,
        _ => narrow(f64::NAN, c),
    }
}

/// f32 to bf16, nearest even.
#[inline(always)]
fn brain(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { 0x7fff } else { rounded }
}

#[inline(always)]
fn half(value: f32) -> u32 {
    if value.is_nan() { 0x7fff } else { u32::from(f16::from_f32(value).to_bits()) }
}

impl<'m> Lower<'m> {
    /// `cvt` and `cvt.pack`.
    pub(super) fn convert(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        if o.flag("pack") {
            return self.convert_pack(o, i);
        }
        let rounding = o.one_of(&["rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"]);
        let (ftz, sat, relu) = (o.flag("ftz"), o.flag("sat"), o.flag("relu"));
        let finite = o.flag("satfinite");
        let to = self.some_type(o, i)?;
        let from = self.some_type(o, i)?;
        let pair = matches!(to.kind, Kind::FloatPair | Kind::BrainPair);
        let integral = matches!(rounding, Some("rni" | "rzi" | "rmi" | "rpi"));
        let mode = match rounding {
            None | Some("rn" | "rni") => Rounding::Nearest,
            Some("rna") => Rounding::Away,
            Some("rz" | "rzi") => Rounding::Zero,
            Some("rm" | "rmi") => Rounding::Down,
            _ => Rounding::Up,
        };
        let plain = |ty: Type| match ty.kind {
            Kind::Bits => Type { kind: Kind::Unsigned, ..ty },
            Kind::FloatPair => Type { kind: Kind::Float, bits: 16 },
            Kind::BrainPair => Type { kind: Kind::Brain, bits: 16 },
            _ => ty,
        };
        let mut c = Conversion { from: plain(from), to: plain(to), mode, integral, ftz, sat, relu, finite, width: 32 };
        if [from, to].iter().any(|ty| matches!(ty.kind, Kind::Predicate) || ty.bits == 128) {
            return self.unsupported(i);
        }
        if pair {
            return self.convert_pair(i, from, to, c);
        }
        self.arity(i, 2..=2)?;
        let (source, _) = self.any_source(&i.operands[1], from)?;
        let (dst, bits) = self.any_dst(&i.operands[0], if to.bits == 64 { Class::Double } else { Class::Word })?;
        if bits != 0 && bits < to.bits {
            return self.fail(format!("a register of {bits} bits for a result of {}", to.bits));
        }
        if source.class == Class::Predicate {
            return self.fail("a predicate cannot be converted");
        }
        c.width = if bits == 0 { to.bits.max(16) } else { bits };
        self.converted(source, dst, c)
    }

    fn converted(&mut self, source: Reg, dst: Reg, c: Conversion) -> Result<(), At> {
        if let Some(f) = fast(source.class, dst.class, c) {
            return self.alu(f, dst, &[source]);
        }
        let code = self.constant(Class::Word, c.pack());
        let f = match (source.class, dst.class) {
            (Class::Word, Class::Word) => alu!(W; W a, W code => convert(u64::from(a), code) as u32),
            (Class::Word, _) => alu!(D; W a, W code => convert(u64::from(a), code)),
            (_, Class::Word) => alu!(W; D a, W code => convert(a, code) as u32),
            _ => alu!(D; D a, W code => convert(a, code)),
        };
        self.alu(f, dst, &[source, code])
    }

    /// Two f32 to one register: the first is the upper half.
    fn convert_pair(&mut self, i: &'m Instruction, from: Type, to: Type, c: Conversion) -> Result<(), At> {
        if (from.kind, from.bits) != (Kind::Float, 32) {
            return self.unsupported(i);
        }
        self.arity(i, 3..=3)?;
        let sources = [self.source(&i.operands[1], from)?, self.source(&i.operands[2], from)?];
        let dst = self.dst(&i.operands[0], to)?;
        let simple = c.mode == Rounding::Nearest && !c.ftz && !c.sat && !c.finite;
        let f = match (to.kind, c.relu) {
            (Kind::BrainPair, false) if simple => alu!(W; F a, F b => brain(a) << 16 | brain(b)),
            (Kind::FloatPair, false) if simple => alu!(W; F a, F b => half(a) << 16 | half(b)),
            _ => {
                let code = self.constant(Class::Word, c.pack());
                let f = alu!(W; W a, W b, W code => {
                    (convert(u64::from(a), code) << 16 | convert(u64::from(b), code)) as u32
                });
                return self.alu(f, dst, &[sources[0], sources[1], code]);
            }
        };
        self.alu(f, dst, &sources)
    }

    /// `cvt.pack.sat.u8.s32.b32 d, a, b, c`: two saturated integers in front of c's upper bits.
    fn convert_pack(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let sat = o.flag("sat");
        let to = self.some_type(o, i)?;
        let from = self.some_type(o, i)?;
        let with = o.ty();
        if !sat || (from.kind, from.bits) != (Kind::Signed, 32) || !matches!(to.bits, 8 | 16) {
            return self.unsupported(i);
        }
        let c = Conversion {
            from,
            to: Type { kind: if to.kind == Kind::Signed { Kind::Signed } else { Kind::Unsigned }, ..to },
            mode: Rounding::Nearest,
            integral: false,
            ftz: false,
            sat,
            relu: false,
            finite: false,
            width: 32,
        };
        self.arity(i, if with.is_some() { 4..=4 } else { 3..=3 })?;
        let mut sources = vec![self.source(&i.operands[1], from)?, self.source(&i.operands[2], from)?];
        sources.push(match i.operands.get(3) {
            Some(operand) => self.source(operand, from)?,
            None => self.constant(Class::Word, 0),
        });
        sources.push(self.constant(Class::Word, c.pack()));
        let dst = self.dst(&i.operands[0], from)?;
        let f = if to.bits == 16 {
            alu!(W; W a, W b, W _c, W code => {
                (convert(u64::from(a), code) << 16 & 0xffff_0000 | convert(u64::from(b), code) & 0xffff) as u32
            })
        } else {
            alu!(W; W a, W b, W c, W code => {
                let low = (convert(u64::from(a), code) << 8 & 0xff00 | convert(u64::from(b), code) & 0xff) as u32;
                low | c << 16
            })
        };
        self.alu(f, dst, &sources)
    }
}

/// Lane functions for what kernels convert most.
fn fast(source: Class, dst: Class, c: Conversion) -> Option<AluFn> {
    if c.ftz || c.sat || c.relu || c.finite {
        return None;
    }
    let key = (c.to.kind, c.to.bits, c.from.kind, c.from.bits);
    let nearest = c.mode == Rounding::Nearest;
    let narrow = source == Class::Word && dst == Class::Word;
    Some(match key {
        (Kind::Unsigned | Kind::Signed, 32, Kind::Unsigned | Kind::Signed, 64)
            if source == Class::Double && dst == Class::Word =>
        {
            alu!(W; D a => a as u32)
        }
        (_, 64, Kind::Unsigned, 32) if c.to.kind != Kind::Float && source == Class::Word => {
            alu!(D; W a => u64::from(a))
        }
        (_, 64, Kind::Signed, 32) if c.to.kind != Kind::Float && source == Class::Word => {
            alu!(D; W a => i64::from(a as i32) as u64)
        }
        (Kind::Float, 32, Kind::Signed, 32) if nearest && narrow => alu!(F; W a => a as i32 as f32),
        (Kind::Float, 32, Kind::Unsigned, 32) if nearest && narrow => alu!(F; W a => a as f32),
        (Kind::Signed, 32, Kind::Float, 32) if c.mode == Rounding::Zero && narrow => alu!(W; F a => a as i32 as u32),
        (Kind::Unsigned, 32, Kind::Float, 32) if c.mode == Rounding::Zero && narrow => alu!(W; F a => a as u32),
        (Kind::Float, 32, Kind::Float, 16) if narrow && !c.integral => {
            alu!(F; W a => f16::from_bits(a as u16).to_f32())
        }
        (Kind::Float, 32, Kind::Brain, 16) if narrow && !c.integral => alu!(F; W a => f32::from_bits(a << 16)),
        (Kind::Float, 16, Kind::Float, 32) if nearest && narrow && !c.integral => alu!(W; F a => half(a)),
        (Kind::Brain, 16, Kind::Float, 32) if nearest && narrow && !c.integral => alu!(W; F a => brain(a)),
        _ => return None,
    })
}
