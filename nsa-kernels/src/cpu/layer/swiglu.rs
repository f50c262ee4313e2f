//! The gated activation of the MLP.

use super::par::{for_rows, for_rows2};
use super::sigmoid::sigmoid;
use crate::Result;
use crate::layer::swiglu::{Backward, Forward};
use nsa_core::Element;
use num_traits::One;

pub fn forward<T: Element>(args: Forward<'_, T>) -> Result<()> {
    let (gate, up) = (args.gate.to_host()?, args.up.to_host()?);
    for_rows(args.y.into_host()?.into_data(), gate.shape()[1], |n, y| {
        for ((y, gate), up) in y.iter_mut().zip(gate.row(n)).zip(up.row(n)) {
            let gate = gate.to_acc();
            *y = T::from_acc(gate * sigmoid(gate) * up.to_acc());
        }
    });
    Ok(())
}

pub fn backward<T: Element>(args: Backward<'_, T>) -> Result<()> {
    let (gate, up, dy) = (args.gate.to_host()?, args.up.to_host()?, args.dy.to_host()?);
    let width = gate.shape()[1];
    let (d_gate, d_up) = (args.d_gate.into_host()?.into_data(), args.d_up.into_host()?.into_data());
    for_rows2((d_gate, width), (d_up, width), |n, d_gate, d_up| {
        let (gate, up, dy) = (gate.row(n), up.row(n), dy.row(n));
        for i in 0..width {
            let (gate, up) = (gate[i].to_acc(), up[i].to_acc());
            let s = sigmoid(gate);
            d_gate[i] = dy[i] * up * s * (T::Acc::one() + gate * (T::Acc::one() - s));
            d_up[i] = dy[i] * gate * s;
        }
    });
    Ok(())
}
