//! Arithmetic and functions of f32 and f64.

use super::Lower;
use super::opcode::Opcode;
use crate::error::At;
use crate::exec::regs::{AluFn, Class, alu};
use crate::number::{
    Rounding, add_odd, directed, exp2, flush, pass_nan, pick, product, quotient, saturate, to_f32, two_sum,
};
use crate::ptx::{Instruction, Kind, Type};

const MODES: [Rounding; 4] = [Rounding::Nearest, Rounding::Zero, Rounding::Down, Rounding::Up];

/// A function of f32 with and without flushing and saturation.
macro_rules! single {
    ($ftz:expr, $sat:expr; $($x:ident),+ => $e:expr) => {
        match ($ftz, $sat) {
            (false, false) => alu!(F; $(F $x),+ => $e),
            (true, false) => alu!(F; $(F $x),+ => { $(let $x = flush($x);)+ flush($e) }),
            (false, true) => alu!(F; $(F $x),+ => saturate($e)),
            (true, true) => alu!(F; $(F $x),+ => { $(let $x = flush($x);)+ saturate(flush($e)) }),
        }
    };
}

fn mode(index: u32) -> Rounding {
    MODES[index as usize & 3]
}

#[inline(always)]
fn pick32(a: f32, b: f32, larger: bool) -> f32 {
    let a_first = if a == b { a.is_sign_negative() } else { a < b };
    let chosen = if a_first != larger { a } else { b };
    if a.is_nan() {
        b
    } else if b.is_nan() {
        a
    } else {
        chosen
    }
}

/// Flushes a result that is subnormal before it is rounded, as the hardware does.
#[inline(always)]
fn flush_exact(result: f32, exact: f64) -> f32 {
    let tiny = exact.abs() < f64::from(f32::MIN_POSITIVE);
    if tiny { f32::from_bits(result.to_bits() & 1 << 31) } else { flush(result) }
}

/// A sum in another rounding mode; an exact zero is −0 downwards.
fn sum_f32(a: f64, b: f64, mode: Rounding) -> f32 {
    let sum = add_odd(a, b);
    if sum == 0.0 && mode == Rounding::Down && !(a.is_sign_positive() && b.is_sign_positive()) {
        return -0.0;
    }
    to_f32(sum, mode)
}

/// The smaller or larger of two f64; of two NaN the second.
fn either(a: f64, b: f64, larger: bool) -> f64 {
    if a.is_nan() && b.is_nan() { pass_nan(a, b, b) } else { pick(a, b, larger, false) }
}

/// a / b rounded to odd.
fn quotient_odd(a: f64, b: f64) -> f64 {
    let q = a / b;
    let rest = if q.is_finite() { (-q).mul_add(b, a) } else { 0.0 };
    odd(q, if b > 0.0 { rest } else { -rest })
}

fn odd(rounded: f64, lost: f64) -> f64 {
    if lost == 0.0 || lost.is_nan() || rounded.to_bits() & 1 == 1 {
        rounded
    } else if lost > 0.0 {
        rounded.next_up()
    } else {
        rounded.next_down()
    }
}

impl<'m> Lower<'m> {
    /// Floating-point arithmetic by type.
    pub(super) fn float(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let Some(ty) = i.opcode.rsplit('.').find_map(Type::named) else { return self.unsupported(i) };
        match (ty.kind, ty.bits) {
            (Kind::Float, 32) => self.float32(o, i),
            (Kind::Float, 64) => self.float64(o, i),
            _ => self.half(o, i),
        }
    }

    fn float32(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let rounding = o.one_of(&["rn", "rz", "rm", "rp", "approx", "full"]);
        let (ftz, sat) = (o.flag("ftz"), o.flag("sat"));
        let (nan, xorsign) = (o.flag("NaN"), o.flag("xorsign"));
        let abs = xorsign && o.flag("abs");
        let ty = self.some_type(o, i)?;
        if matches!(rounding, Some("rz" | "rm" | "rp")) {
            return self.directed32(i, ty, rounding, ftz, sat);
        }
        let f: AluFn = match o.base {
            "add" => single!(ftz, sat; a, b => a + b),
            "sub" => single!(ftz, sat; a, b => a - b),
            "mul" if ftz && !sat => alu!(F; F a, F b => {
                let (a, b) = (flush(a), flush(b));
                flush_exact(a * b, f64::from(a) * f64::from(b))
            }),
            "mul" => single!(ftz, sat; a, b => a * b),
            "fma" | "mad" if ftz && !sat => alu!(F; F a, F b, F c => {
                let (a, b, c) = (flush(a), flush(b), flush(c));
                flush_exact(a.mul_add(b, c), f64::from(a) * f64::from(b) + f64::from(c))
            }),
            "fma" | "mad" => single!(ftz, sat; a, b, c => a.mul_add(b, c)),
            "div" if rounding == Some("approx") && ftz => alu!(F; F a, F b => {
                let (a, b) = (flush(a), flush(b));
                if b.abs() > 8.507_059e37 && b.abs() < f32::INFINITY {
                    a * 0.0
                } else {
                    flush_exact(a / b, f64::from(a) / f64::from(b))
                }
            }),
            "div" if rounding == Some("approx") => {
                single!(ftz, false; a, b => if b.abs() > 8.507_059e37 && b.abs() < f32::INFINITY { a * 0.0 } else { a / b })
            }
            "div" if ftz => alu!(F; F a, F b => {
                let (a, b) = (flush(a), flush(b));
                flush_exact(a / b, f64::from(a) / f64::from(b))
            }),
            "div" => alu!(F; F a, F b => a / b),
            "min" | "max" => return self.min_max32(i, ty, ftz, nan, abs),
            "abs" => single!(ftz, false; a => a.abs()),
            "neg" => single!(ftz, false; a => -a),
            _ => return self.unsupported(i),
        };
        let sources = match o.base {
            "fma" | "mad" => 3,
            "abs" | "neg" => 1,
            _ => 2,
        };
        self.plain(i, ty, sources, f)
    }

    fn min_max32(&mut self, i: &'m Instruction, ty: Type, ftz: bool, nan: bool, abs: bool) -> Result<(), At> {
        let larger = i.opcode.starts_with("max");
        let f = match (larger, nan, abs) {
            (false, false, false) => single!(ftz, false; a, b => pick32(a, b, false)),
            (true, false, false) => single!(ftz, false; a, b => pick32(a, b, true)),
            (false, true, false) => {
                single!(ftz, false; a, b => if a.is_nan() || b.is_nan() { f32::NAN } else { pick32(a, b, false) })
            }
            (true, true, false) => {
                single!(ftz, false; a, b => if a.is_nan() || b.is_nan() { f32::NAN } else { pick32(a, b, true) })
            }
            (_, _, true) => {
                let flags = self.constant(Class::Word, u64::from(larger) | u64::from(nan) << 1 | u64::from(ftz) << 2);
                self.arity(i, 3..=3)?;
                let sources = [self.source(&i.operands[1], ty)?, self.source(&i.operands[2], ty)?, flags];
                let dst = self.dst(&i.operands[0], ty)?;
                let f = alu!(F; F a, F b, W flags => {
                    let (a, b) = if flags & 4 == 4 { (flush(a), flush(b)) } else { (a, b) };
                    let size = pick(f64::from(a.abs()), f64::from(b.abs()), flags & 1 == 1, flags & 2 == 2) as f32;
                    if a.is_sign_negative() != b.is_sign_negative() { -size } else { size }
                });
                return self.alu(f, dst, &sources);
            }
        };
        self.plain(i, ty, 2, f)
    }

    /// Rounding modes that the host lacks; flags are the mode and bits for flushing and saturation.
    fn directed32(
        &mut self,
        i: &'m Instruction,
        ty: Type,
        rounding: Option<&str>,
        ftz: bool,
        sat: bool,
    ) -> Result<(), At> {
        let index = match rounding {
            Some("rz") => 1,
            Some("rm") => 2,
            _ => 3,
        };
        let flags = self.constant(Class::Word, index | u64::from(ftz) << 2 | u64::from(sat) << 3);
        fn before(x: f32, flags: u32) -> f64 {
            f64::from(if flags & 4 == 4 { flush(x) } else { x })
        }
        fn after(x: f32, exact: f64, flags: u32) -> f32 {
            let x = if flags & 4 == 4 { flush_exact(x, exact) } else { x };
            if flags & 8 == 8 { saturate(x) } else { x }
        }
        fn sum(a: f64, b: f64, k: u32) -> f32 {
            after(sum_f32(a, b, mode(k)), a + b, k)
        }
        fn rounded(exact: f64, k: u32) -> f32 {
            after(to_f32(exact, mode(k)), exact, k)
        }
        let base = i.opcode.split('.').next().unwrap_or("");
        let (count, f) = match base {
            "add" => (2, alu!(F; F a, F b, W k => sum(before(a, k), before(b, k), k))),
            "sub" => (2, alu!(F; F a, F b, W k => sum(before(a, k), -before(b, k), k))),
            "mul" => (2, alu!(F; F a, F b, W k => rounded(before(a, k) * before(b, k), k))),
            "div" => (2, alu!(F; F a, F b, W k => rounded(quotient_odd(before(a, k), before(b, k)), k))),
            "fma" | "mad" => (3, alu!(F; F a, F b, F c, W k => sum(before(a, k) * before(b, k), before(c, k), k))),
            _ => return self.unsupported(i),
        };
        self.arity(i, count + 1..=count + 1)?;
        let mut sources = Vec::new();
        for operand in &i.operands[1..] {
            sources.push(self.source(operand, ty)?);
        }
        sources.push(flags);
        let dst = self.dst(&i.operands[0], ty)?;
        self.alu(f, dst, &sources)
    }

    fn float64(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let rounding = o.one_of(&["rn", "rz", "rm", "rp"]);
        let ty = self.some_type(o, i)?;
        let f: AluFn = match (o.base, rounding) {
            ("add", None | Some("rn")) => alu!(G; G a, G b => pass_nan(a, b, a + b)),
            ("sub", None | Some("rn")) => alu!(G; G a, G b => pass_nan(a, b, a - b)),
            ("mul", None | Some("rn")) => alu!(G; G a, G b => pass_nan(a, b, a * b)),
            ("fma" | "mad", Some("rn")) => alu!(G; G a, G b, G c => pass_nan(pass_nan(a, c, a), b, a.mul_add(b, c))),
            ("div", Some("rn")) => alu!(G; G a, G b => pass_nan(b, a, a / b)),
            ("min", None) => alu!(G; G a, G b => either(a, b, false)),
            ("max", None) => alu!(G; G a, G b => either(a, b, true)),
            ("abs", None) => alu!(G; G a => if a.is_nan() { pass_nan(a, a, a) } else { a.abs() }),
            ("neg", None) => alu!(G; G a => if a.is_nan() { pass_nan(a, a, a) } else { -a }),
            ("add" | "sub" | "mul" | "div", Some(rounding)) => return self.directed64(i, ty, rounding),
            _ => return self.unsupported(i),
        };
        let sources = match o.base {
            "fma" | "mad" => 3,
            "abs" | "neg" => 1,
            _ => 2,
        };
        self.plain(i, ty, sources, f)
    }

    fn directed64(&mut self, i: &'m Instruction, ty: Type, rounding: &str) -> Result<(), At> {
        fn sum(a: f64, b: f64, mode: Rounding) -> f64 {
            if !a.is_finite() || !b.is_finite() {
                return a + b;
            }
            let (sum, lost) = two_sum(a, b);
            if sum == 0.0 && mode == Rounding::Down && !(a.is_sign_positive() && b.is_sign_positive()) {
                return -0.0;
            }
            directed(sum, lost, mode)
        }
        let f = match i.opcode.split('.').next() {
            Some("add") => alu!(G; G a, G b, W k => pass_nan(a, b, sum(a, b, mode(k)))),
            Some("sub") => alu!(G; G a, G b, W k => pass_nan(a, b, sum(a, -b, mode(k)))),
            Some("mul") => alu!(G; G a, G b, W k => pass_nan(a, b, product(a, b, mode(k)))),
            // Of two NaN a quotient passes on the first.
            _ => alu!(G; G a, G b, W k => pass_nan(b, a, quotient(a, b, mode(k)))),
        };
        let index = ["rn", "rz", "rm", "rp"].iter().position(|name| *name == rounding).unwrap_or(0);
        self.arity(i, 3..=3)?;
        let sources = [
            self.source(&i.operands[1], ty)?,
            self.source(&i.operands[2], ty)?,
            self.constant(Class::Word, index as u64),
        ];
        let dst = self.dst(&i.operands[0], ty)?;
        self.alu(f, dst, &sources)
    }

    /// Functions of one number, and two odd ones.
    pub(super) fn function_of_float(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        if o.base == "testp" {
            return self.testp(o, i);
        }
        let rounding = o.one_of(&["rn", "rz", "rm", "rp", "approx"]);
        let ftz = o.flag("ftz");
        let ty = self.some_type(o, i)?;
        if ty.bits == 16 || matches!(ty.kind, Kind::FloatPair | Kind::BrainPair) {
            return self.half_function(o.base, i, ty, ftz);
        }
        let f: AluFn = match (o.base, ty.bits, rounding) {
            ("copysign", 32, None) => alu!(W; W a, W b => a & 1 << 31 | b & !(1 << 31)),
            ("copysign", 64, None) => alu!(D; D a, D b => a & 1 << 63 | b & !(1 << 63)),
            ("rcp", 32, Some("rn" | "approx")) => single!(ftz, false; a => 1.0 / a),
            ("sqrt", 32, Some("rn" | "approx")) => single!(ftz, false; a => a.sqrt()),
            ("rsqrt", 32, Some("approx")) => single!(ftz, false; a => (1.0 / f64::from(a).sqrt()) as f32),
            ("sin", 32, Some("approx")) => single!(ftz, false; a => f64::from(a).sin() as f32),
            ("cos", 32, Some("approx")) => single!(ftz, false; a => f64::from(a).cos() as f32),
            ("lg2", 32, Some("approx")) => single!(ftz, false; a => f64::from(a).log2() as f32),
            ("ex2", 32, Some("approx")) => single!(ftz, false; a => exp2(a)),
            ("tanh", 32, Some("approx")) => single!(ftz, false; a => f64::from(a).tanh() as f32),
            ("rcp", 64, Some("approx")) if ftz => alu!(G; G a => {
                let flushed = |x: f64| if x.is_subnormal() { 0.0f64.copysign(x) } else { x };
                // The lower half of the bits is not looked at.
                flushed(1.0 / flushed(f64::from_bits(a.to_bits() & !0xffff_ffff)))
            }),
            ("rcp", 64, Some("rn")) => alu!(G; G a => 1.0 / a),
            ("sqrt", 64, Some("rn")) => alu!(G; G a => a.sqrt()),
            ("rsqrt", 64, Some("approx")) => alu!(G; G a => 1.0 / a.sqrt()),
            ("rcp" | "sqrt", 32, Some(rounding)) => return self.directed_function(o.base, i, ty, rounding, ftz),
            _ => return self.unsupported(i),
        };
        self.plain(i, ty, if o.base == "copysign" { 2 } else { 1 }, f)
    }

    fn directed_function(
        &mut self,
        base: &str,
        i: &'m Instruction,
        ty: Type,
        rounding: &str,
        ftz: bool,
    ) -> Result<(), At> {
        fn root_odd(a: f64) -> f64 {
            let root = a.sqrt();
            if root.is_finite() { odd(root, (-root).mul_add(root, a)) } else { root }
        }
        let f = match (base, ftz) {
            ("rcp", false) => alu!(F; F a, W k => to_f32(quotient_odd(1.0, f64::from(a)), mode(k))),
            ("rcp", true) => alu!(F; F a, W k => flush(to_f32(quotient_odd(1.0, f64::from(flush(a))), mode(k)))),
            (_, false) => alu!(F; F a, W k => to_f32(root_odd(f64::from(a)), mode(k))),
            (_, true) => alu!(F; F a, W k => flush(to_f32(root_odd(f64::from(flush(a))), mode(k)))),
        };
        let index = ["rn", "rz", "rm", "rp"].iter().position(|name| *name == rounding).unwrap_or(0);
        self.arity(i, 2..=2)?;
        let sources = [self.source(&i.operands[1], ty)?, self.constant(Class::Word, index as u64)];
        let dst = self.dst(&i.operands[0], ty)?;
        self.alu(f, dst, &sources)
    }

    fn testp(&mut self, o: &mut Opcode<'_>, i: &'m Instruction) -> Result<(), At> {
        let test = o.next();
        let ty = self.some_type(o, i)?;
        let f = match (test, ty.bits) {
            (Some("finite"), 32) => alu!(P; F a => a.is_finite()),
            (Some("infinite"), 32) => alu!(P; F a => a.is_infinite()),
            (Some("number"), 32) => alu!(P; F a => !a.is_nan()),
            (Some("notanumber"), 32) => alu!(P; F a => a.is_nan()),
            (Some("normal"), 32) => alu!(P; F a => a.is_normal() || a == 0.0),
            (Some("subnormal"), 32) => alu!(P; F a => a.is_subnormal()),
            (Some("finite"), 64) => alu!(P; G a => a.is_finite()),
            (Some("infinite"), 64) => alu!(P; G a => a.is_infinite()),
            (Some("number"), 64) => alu!(P; G a => !a.is_nan()),
            (Some("notanumber"), 64) => alu!(P; G a => a.is_nan()),
            (Some("normal"), 64) => alu!(P; G a => a.is_normal() || a == 0.0),
            (Some("subnormal"), 64) => alu!(P; G a => a.is_subnormal()),
            _ => return self.unsupported(i),
        };
        self.arity(i, 2..=2)?;
        let source = self.source(&i.operands[1], ty)?;
        let dst = self.dst(&i.operands[0], Type { kind: Kind::Predicate, bits: 1 })?;
        self.alu(f, dst, &[source])
    }
}
