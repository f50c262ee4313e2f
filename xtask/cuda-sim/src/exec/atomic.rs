//! Atomic read-modify-write.

use super::access::{addresses, read_words, resolve, write_words};
use super::checks::{Checks, Touch, TouchKind};
use super::cta::Cta;
use super::fault::{FaultKind, Finding};
use super::regs::LANES;
use super::warp::{Warp, lanes};
use crate::code::{Atomic, AtomicOp, AtomicType};
use crate::number::flush;
use crate::ptx::Space;
use half::{bf16, f16};
use std::sync::atomic::Ordering::Relaxed;

impl<C: Checks> Cta<'_, C> {
    /// `atom` and `red`; lanes take their turns in order.
    pub fn atomic(&mut self, warp: &mut Warp, atomic: &Atomic, pc: u32, active: u32) -> Result<(), Finding> {
        let mut at = addresses(&warp.regs, &atomic.place);
        let mut spaces = [atomic.space; LANES];
        if atomic.space == Space::Generic {
            for lane in lanes(active) {
                (spaces[lane], at[lane]) = resolve(at[lane]);
            }
        }
        let total = atomic.bytes * atomic.src.len() as u32;
        self.aligned(atomic.space, &at, total, active)?;
        for lane in lanes(active) {
            let space = spaces[lane];
            let bad = (FaultKind::OutOfBounds { space, address: at[lane], bytes: total, write: true }, lane as u32);
            let offset = match space {
                Space::Shared => self.shared_offset(at[lane], total),
                Space::Global => self.writable_offset(at[lane], total),
                _ => None,
            };
            let Some(offset) = offset else { return Err(bad) };
            if C::ON {
                let touch = Touch {
                    space,
                    at: &at,
                    active: 1 << lane,
                    bytes: total,
                    kind: TouchKind::Atomic,
                    order: atomic.order,
                    scope: atomic.scope,
                    pc,
                };
                self.checks.touch(warp.index, &touch, &self.launch.memory, &mut self.hint)?;
            }
            for (element, source) in atomic.src.iter().enumerate() {
                let place = offset + element as u64 * u64::from(atomic.bytes);
                let operand = warp.regs.value(*source, lane);
                let swap = atomic.swap.map_or(0, |swap| warp.regs.value(swap, lane));
                let old = if space == Space::Shared {
                    let old = read_words(&self.shared, place, atomic.bytes);
                    write_words(&mut self.shared, place, atomic.bytes, apply(atomic, old, operand, swap));
                    old
                } else {
                    self.global_atomic(atomic, place, operand, swap)
                };
                if let Some(dst) = atomic.dst.get(element) {
                    warp.regs.set(*dst, lane, old);
                }
            }
        }
        Ok(())
    }

    /// Changes global memory of the allocation found last; gives what was there.
    pub fn global_atomic(&self, atomic: &Atomic, offset: u64, operand: u64, swap: u64) -> u64 {
        let found = &self.launch.memory[self.hint];
        if atomic.bytes == 8 {
            let lock = &self.launch.wide_atomics[(offset >> 3) as usize % self.launch.wide_atomics.len()];
            let _held = lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let old = found.read(offset, 8);
            found.write(offset, 8, apply(atomic, old, operand, swap));
            return old;
        }
        let shift = 8 * (offset & 3) as u32;
        let mask = if atomic.bytes == 4 { u32::MAX } else { 0xffff << shift };
        let word = found.word((offset >> 2) as usize);
        let update = |word: u32| {
            let new = apply(atomic, u64::from((word & mask) >> shift), operand, swap) as u32;
            Some(word & !mask | new << shift & mask)
        };
        let old = word.fetch_update(Relaxed, Relaxed, update).unwrap_or_else(|word| word);
        u64::from((old & mask) >> shift)
    }
}

/// The new value.
fn apply(atomic: &Atomic, old: u64, operand: u64, swap: u64) -> u64 {
    let signed = |value: u64| if atomic.bytes == 4 { i64::from(value as u32 as i32) } else { value as i64 };
    let kept = if atomic.bytes == 8 { u64::MAX } else { (1 << (8 * atomic.bytes)) - 1 };
    let new = match (atomic.op, atomic.ty) {
        (AtomicOp::And, _) => old & operand,
        (AtomicOp::Or, _) => old | operand,
        (AtomicOp::Xor, _) => old ^ operand,
        (AtomicOp::Exchange, _) => operand,
        (AtomicOp::CompareExchange, _) => {
            if old == operand & kept {
                swap
            } else {
                old
            }
        }
        (AtomicOp::Inc, _) => {
            if old >= operand {
                0
            } else {
                old + 1
            }
        }
        (AtomicOp::Dec, _) => {
            if old == 0 || old > operand {
                operand
            } else {
                old - 1
            }
        }
        (AtomicOp::Add, AtomicType::Unsigned | AtomicType::Signed) => old.wrapping_add(operand),
        (AtomicOp::Min, AtomicType::Unsigned) => old.min(operand & kept),
        (AtomicOp::Max, AtomicType::Unsigned) => old.max(operand & kept),
        (AtomicOp::Min, AtomicType::Signed) => signed(old).min(signed(operand)) as u64,
        (AtomicOp::Max, AtomicType::Signed) => signed(old).max(signed(operand)) as u64,
        (op, _) => float(atomic, op, old, operand),
    };
    new & kept
}

fn float(atomic: &Atomic, op: AtomicOp, old: u64, operand: u64) -> u64 {
    let combine = |a: f64, b: f64| match op {
        AtomicOp::Min => crate::number::pick(a, b, false, false),
        AtomicOp::Max => crate::number::pick(a, b, true, false),
        _ => a + b,
    };
    let half = |a: u64, b: u64| {
        let sum = combine(f64::from(f16::from_bits(a as u16)), f64::from(f16::from_bits(b as u16)));
        if sum.is_nan() { 0x7fff } else { u64::from(f16::from_f32(sum as f32).to_bits()) }
    };
    let brain = |a: u64, b: u64| {
        let sum = combine(f64::from(bf16::from_bits(a as u16)), f64::from(bf16::from_bits(b as u16)));
        if sum.is_nan() { 0x7fff } else { u64::from(bf16::from_f32(sum as f32).to_bits()) }
    };
    match (atomic.ty, atomic.bytes) {
        (AtomicType::HalfPair, _) => half(old & 0xffff, operand & 0xffff) | half(old >> 16, operand >> 16) << 16,
        (AtomicType::BrainPair, _) => brain(old & 0xffff, operand & 0xffff) | brain(old >> 16, operand >> 16) << 16,
        (AtomicType::Brain, _) => brain(old, operand),
        (_, 2) => half(old, operand),
        (_, 8) => combine(f64::from_bits(old), f64::from_bits(operand)).to_bits(),
        _ => {
            let (a, b) = (f32::from_bits(old as u32), f32::from_bits(operand as u32));
            let (a, b) = if atomic.flush { (flush(a), flush(b)) } else { (a, b) };
            let sum = if op == AtomicOp::Add { a + b } else { combine(f64::from(a), f64::from(b)) as f32 };
            let sum = if atomic.flush { flush(sum) } else { sum };
            u64::from(if sum.is_nan() { 0x7fff_ffff } else { sum.to_bits() })
        }
    }
}
