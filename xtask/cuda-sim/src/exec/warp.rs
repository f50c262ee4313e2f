//! A warp: registers, and groups of lanes that run together.

use super::late::Late;
use super::regs::{LANES, Reg, Regs};
use crate::code::Inst;

/// Why a group does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Ready,
    /// It waits for lanes of its warp at this operation.
    Collective,
    /// It waits for a barrier.
    Barrier(u32),
}

/// Lanes at one place.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// The next operation.
    pub pc: u32,
    /// The lanes.
    pub mask: u32,
    /// Whether they run.
    pub state: State,
    /// The register and predicate value that a barrier's reduction waits to write.
    pub result: Option<Reg>,
}

/// A warp of a CTA.
#[derive(Debug, Default)]
pub struct Warp {
    /// Its number in the CTA.
    pub index: u32,
    /// Registers.
    pub regs: Regs,
    /// Lanes that exist.
    pub existing: u32,
    /// Lanes that ended.
    pub exited: u32,
    /// Groups.
    pub groups: Vec<Group>,
    /// Local memory, lane after lane.
    pub local: Vec<u32>,
    /// Asynchronous copies under way.
    pub late: Late,
    /// Take another group than the lowest next time.
    pub rotate: bool,
}

impl Warp {
    /// Lanes that have not ended.
    pub fn live(&self) -> u32 {
        self.existing & !self.exited
    }

    /// Puts lanes at a place, joining those that are there.
    pub fn park(&mut self, pc: u32, mask: u32) {
        if mask == 0 {
            return;
        }
        let there = self.groups.iter_mut().find(|g| g.pc == pc && matches!(g.state, State::Ready | State::Collective));
        match there {
            Some(group) => {
                group.mask |= mask;
                group.state = State::Ready;
            }
            None => self.groups.push(Group { pc, mask, state: State::Ready, result: None }),
        }
    }

    /// Takes the group to run: the lowest place, or another one where the lowest ran long. Gives also the lowest place
    /// of the rest, where the groups may join.
    pub fn pick(&mut self) -> Option<(u32, u32, u32)> {
        let ready = |group: &Group| group.state == State::Ready;
        let mut order: Vec<usize> = (0..self.groups.len()).filter(|at| ready(&self.groups[*at])).collect();
        order.sort_by_key(|at| self.groups[*at].pc);
        let turn = usize::from(self.rotate && order.len() > 1);
        self.rotate = false;
        let chosen = *order.get(turn)?;
        let group = self.groups.swap_remove(chosen);
        let others = self.groups.iter().filter(|group| matches!(group.state, State::Ready | State::Collective));
        let limit = others.map(|other| other.pc).filter(|pc| *pc > group.pc).min().unwrap_or(u32::MAX);
        Some((group.pc, group.mask, limit))
    }

    /// Whether a group can run.
    pub fn is_ready(&self) -> bool {
        self.groups.iter().any(|group| group.state == State::Ready)
    }

    /// Lanes of a mask where an operation's guard holds.
    #[inline(always)]
    pub fn guarded(&self, inst: &Inst, mask: u32) -> u32 {
        if inst.guard == Inst::ALWAYS { mask } else { mask & self.encoded(inst.guard) }
    }

    /// Lanes where an encoded predicate holds.
    #[inline(always)]
    pub fn encoded(&self, predicate: u32) -> u32 {
        let bits = self.regs.predicate(predicate >> 1);
        if predicate & 1 == 1 { !bits } else { bits }
    }
}

/// Calls a function for every lane of a mask.
#[inline(always)]
pub fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        (lane < LANES).then_some(lane)
    })
}
