//! The embedding.

use super::add::Add;
use super::par::{elements, for_rows};
use crate::cpu::Cpu;
use crate::cpu::simd::{Loops, compiled_for};
use crate::layer::embedding::{Backward, Forward, token_error};
use crate::{Result, Tensor};
use nsa_core::{Element, Real};
use rayon::prelude::*;

/// Rows of the table whose gradients one task gathers.
const TASK_ROWS: usize = 16;

pub fn forward<T, W>(cpu: &Cpu, op: &'static str, args: Forward<'_, T, W>) -> Result<()>
where
    T: Element,
    W: Element<Acc = T::Acc>,
{
    let weight = args.weight.to_host()?;
    let [vocabulary, channels] = weight.shape();
    let tokens = check_tokens(op, &args.tokens, vocabulary)?;
    for_rows(args.y.into_host()?.into_data(), channels, |n, y| {
        compiled_for(cpu.isa(), Convert { weight: weight.row(tokens[n] as usize), y });
    });
    Ok(())
}

struct Convert<'a, W, T> {
    weight: &'a [W],
    y: &'a mut [T],
}

impl<T: Element, W: Element<Acc = T::Acc>> Loops for Convert<'_, W, T> {
    #[inline(always)]
    fn run(self) {
        for (y, w) in self.y.iter_mut().zip(self.weight) {
            *y = T::from_acc(w.to_acc());
        }
    }
}

pub fn backward<A: Real>(cpu: &Cpu, op: &'static str, args: Backward<'_, A>) -> Result<()> {
    let dy = args.dy.to_host()?;
    let [vocabulary, channels] = args.dw.shape();
    let tokens = check_tokens(op, &args.tokens, vocabulary)?;
    let dw = args.dw.into_host()?.into_data();
    if dw.is_empty() {
        return Ok(());
    }
    // Rows in the order of their tokens; a task then finds those of its part of the table next to each other.
    let mut order: Vec<(u32, usize)> = tokens.iter().copied().zip(0..).collect();
    order.sort_unstable();
    dw.par_chunks_mut(TASK_ROWS * channels).enumerate().for_each(|(task, dw)| {
        let first = task * TASK_ROWS;
        let start = order.partition_point(|&(token, _)| (token as usize) < first);
        for &(token, n) in order[start..].iter().take_while(|&&(token, _)| (token as usize) < first + TASK_ROWS) {
            let row = &mut dw[(token as usize - first) * channels..][..channels];
            compiled_for(cpu.isa(), Add { x: dy.row(n), y: row });
        }
    });
    Ok(())
}

fn check_tokens<'a>(op: &'static str, tokens: &Tensor<'a, u32, 1>, vocabulary: usize) -> Result<&'a [u32]> {
    let tokens = elements(tokens.to_host()?);
    match tokens.iter().position(|&token| token as usize >= vocabulary) {
        None => Ok(tokens),
        Some(position) => Err(token_error(op, "tokens", position, tokens[position])),
    }
}
