//! Exchanges between the lanes of a warp.

use super::regs::{LANES, Regs};
use super::warp::lanes;
use crate::code::{Op, ReduxOp, ShuffleMode, VoteMode};

/// Runs a shuffle, vote, match, reduction or election for lanes that are together.
pub fn exchange(regs: &mut Regs, op: &Op, active: u32) {
    match op {
        Op::Shuffle { mode, rows, valid } => shuffle(regs, *mode, rows, *valid, active),
        Op::Vote { mode, dst, src, .. } => {
            let bits = regs.predicate(src >> 1);
            let holds = if src & 1 == 1 { !bits } else { bits } & active;
            let value = match mode {
                VoteMode::All => u64::from(holds == active),
                VoteMode::Any => u64::from(holds != 0),
                VoteMode::Uniform => u64::from(holds == active || holds == 0),
                VoteMode::Ballot => u64::from(holds),
            };
            lanes(active).for_each(|lane| regs.set(*dst, lane, value));
        }
        Op::Match { all, dst, agree, src, .. } => {
            let values: [u64; LANES] = std::array::from_fn(|lane| regs.value(*src, lane));
            for lane in lanes(active) {
                let same =
                    lanes(active).filter(|other| values[*other] == values[lane]).fold(0, |m, other| m | 1 << other);
                let uniform = same == active;
                regs.words[*dst as usize][lane] = if *all && !uniform { 0 } else { same };
                if let Some(agree) = agree {
                    let row = &mut regs.predicates[*agree as usize];
                    *row = *row & !(1 << lane) | u32::from(uniform) << lane;
                }
            }
        }
        Op::Redux { op, rows, .. } => {
            let values = *regs.word(rows[1]);
            let result = lanes(active).map(|lane| values[lane]).reduce(|a, b| match op {
                ReduxOp::Add => a.wrapping_add(b),
                ReduxOp::MinUnsigned => a.min(b),
                ReduxOp::MaxUnsigned => a.max(b),
                ReduxOp::MinSigned => (a as i32).min(b as i32) as u32,
                ReduxOp::MaxSigned => (a as i32).max(b as i32) as u32,
                ReduxOp::And => a & b,
                ReduxOp::Or => a | b,
                ReduxOp::Xor => a ^ b,
            });
            let row = &mut regs.words[rows[0] as usize];
            lanes(active).for_each(|lane| row[lane] = result.unwrap_or(0));
        }
        Op::Elect { lane: dst, elected, .. } => {
            let leader = active.trailing_zeros();
            if let Some(dst) = dst {
                lanes(active).for_each(|lane| regs.words[*dst as usize][lane] = leader);
            }
            let row = &mut regs.predicates[*elected as usize];
            *row = *row & !active | 1 << (leader & 31);
        }
        _ => {}
    }
}

/// The lanes that a `shfl.sync` reads, and those whose source was in range. The clamp operand holds a segment mask in bits 8
/// to 12 and a clamp in bits 0 to 4.
pub fn sources(regs: &Regs, mode: ShuffleMode, rows: &[u32; 5], active: u32) -> ([u8; LANES], u32) {
    let (offset, clamp) = (regs.word(rows[2]), regs.word(rows[3]));
    let (mut sources, mut in_range) = ([0; LANES], 0u32);
    for lane in lanes(active) {
        let (b, c) = (offset[lane] & 31, clamp[lane]);
        let (segment, limit) = (c >> 8 & 31, c & 31);
        let own = lane as u32;
        let (max, min) = ((own & segment) | (limit & !segment), own & segment);
        let (from, ok) = match mode {
            ShuffleMode::Up => (own.wrapping_sub(b), own as i32 - b as i32 >= max as i32),
            ShuffleMode::Down => (own + b, own + b <= max),
            ShuffleMode::Butterfly => (own ^ b, (own ^ b) <= max),
            ShuffleMode::Index => (min | b & !segment, (min | b & !segment) <= max),
        };
        sources[lane] = if ok { from & 31 } else { own } as u8;
        in_range |= u32::from(ok) << lane;
    }
    (sources, in_range)
}

fn shuffle(regs: &mut Regs, mode: ShuffleMode, rows: &[u32; 5], valid: Option<u32>, active: u32) {
    let source = *regs.word(rows[1]);
    let (sources, in_range) = sources(regs, mode, rows, active);
    let row = &mut regs.words[rows[0] as usize];
    lanes(active).for_each(|lane| row[lane] = source[sources[lane] as usize]);
    if let Some(valid) = valid {
        let row = &mut regs.predicates[valid as usize];
        *row = *row & !active | in_range;
    }
}
