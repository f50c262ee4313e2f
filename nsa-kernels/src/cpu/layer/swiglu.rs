//! The gated activation of the MLP. Its exponential is what it costs: rows are compiled for the instruction set chosen.

use super::par::{for_rows, for_rows2};
use super::sigmoid::sigmoid;
use crate::Result;
use crate::cpu::Cpu;
use crate::cpu::simd::{Loops, compiled_for};
use crate::layer::swiglu::{Backward, Forward};
use nsa_core::Element;
use num_traits::One;

pub fn forward<T: Element>(cpu: &Cpu, args: Forward<'_, T>) -> Result<()> {
    let (gate, up) = (args.gate.to_host()?, args.up.to_host()?);
    for_rows(args.y.into_host()?.into_data(), gate.shape()[1], |n, y| {
        compiled_for(cpu.isa(), ForwardRow { gate: gate.row(n), up: up.row(n), y });
    });
    Ok(())
}

struct ForwardRow<'a, T> {
    gate: &'a [T],
    up: &'a [T],
    y: &'a mut [T],
}

impl<T: Element> Loops for ForwardRow<'_, T> {
    #[inline(always)]
    fn run(self) {
        for ((y, gate), up) in self.y.iter_mut().zip(self.gate).zip(self.up) {
            let gate = gate.to_acc();
            *y = T::from_acc(gate * sigmoid(gate) * up.to_acc());
        }
    }
}

pub fn backward<T, G>(cpu: &Cpu, args: Backward<'_, T, G>) -> Result<()>
where
    T: Element,
    G: Element<Acc = T::Acc>,
{
    let (gate, up, dy) = (args.gate.to_host()?, args.up.to_host()?, args.dy.to_host()?);
    let width = gate.shape()[1];
    let (d_gate, d_up) = (args.d_gate.into_host()?.into_data(), args.d_up.into_host()?.into_data());
    for_rows2((d_gate, width), (d_up, width), |n, d_gate, d_up| {
        compiled_for(cpu.isa(), BackwardRow { gate: gate.row(n), up: up.row(n), dy: dy.row(n), d_gate, d_up });
    });
    Ok(())
}

struct BackwardRow<'a, T: Element, G> {
    gate: &'a [T],
    up: &'a [T],
    dy: &'a [T::Acc],
    d_gate: &'a mut [G],
    d_up: &'a mut [G],
}

impl<T: Element, G: Element<Acc = T::Acc>> Loops for BackwardRow<'_, T, G> {
    #[inline(always)]
    fn run(self) {
        let Self { gate, up, dy, d_gate, d_up } = self;
        let one = T::Acc::one();
        for ((((d_gate, d_up), gate), up), &dy) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(dy) {
            let (gate, up) = (gate.to_acc(), up.to_acc());
            let s = sigmoid(gate);
            *d_gate = G::from_acc(dy * up * s * (one + gate * (one - s)));
            *d_up = G::from_acc(dy * gate * s);
        }
    }
}
