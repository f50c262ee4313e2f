//! Named barriers of a CTA.

use super::checks::Checks;
use super::cta::Cta;
use super::fault::{FaultKind, Finding};
use super::regs::{LANES, Reg};
use super::warp::{Warp, lanes};
use crate::code::{Barrier, BarrierKind};

/// Barriers that a CTA has.
const COUNT: usize = 16;

#[derive(Clone, Debug, Default)]
struct State {
    /// Warps that arrived in this phase.
    arrived: u32,
    /// Other warps and their lanes that did, while others of theirs did not.
    partly: Vec<(u32, u32)>,
    /// Warps that must; 0 for all that live.
    expected: u32,
    /// Threads whose predicate holds.
    holds: u32,
    /// Threads that gave one.
    asked: u32,
    /// The last phase's result: count, all, any.
    result: (u32, bool, bool),
    /// The result wanted is "and" rather than "or".
    all: bool,
}

/// The barriers of a CTA.
#[derive(Debug, Default)]
pub struct Barriers {
    states: [State; COUNT],
}

impl Barriers {
    /// The numbers of the barriers that complete now. A warp of which some lanes came has arrived when the others that live
    /// have come or ended.
    pub fn complete<C: Checks>(&mut self, warps: &[Warp], checks: &mut C) -> Vec<u32> {
        let mut done = Vec::new();
        for (id, state) in self.states.iter_mut().enumerate() {
            if state.arrived == 0 && state.partly.is_empty() {
                continue;
            }
            let live = || warps.iter().filter(|warp| warp.live() != 0).count() as u32;
            let whole = |(warp, came): &&(u32, u32)| warps[*warp as usize].live() & !came == 0;
            let arrived = state.arrived + state.partly.iter().filter(whole).count() as u32;
            let expected = if state.expected == 0 { live() } else { state.expected };
            if arrived >= expected {
                let result = (state.holds, state.holds == state.asked, state.holds > 0);
                *state = State { result, all: state.all, ..State::default() };
                checks.barrier_complete(id as u32);
                done.push(id as u32);
            }
        }
        done
    }

    /// The result of a barrier's last phase.
    pub fn result(&self, id: u32, count: bool) -> u64 {
        let state = &self.states[id as usize];
        let (holds, all, any) = state.result;
        match (count, state.all) {
            (true, _) => u64::from(holds),
            (false, true) => u64::from(all),
            (false, false) => u64::from(any),
        }
    }
}

impl<C: Checks> Cta<'_, C> {
    /// A warp arrives. Gives the barrier that it waits for and the register of the result, if it waits.
    pub fn arrive(
        &mut self,
        warp: &Warp,
        barrier: &Barrier,
        active: u32,
    ) -> Result<Option<(u32, Option<Reg>)>, Finding> {
        let first = active.trailing_zeros();
        let bad = |what: String| Err((FaultKind::BadOperand { what }, first));
        let id = warp.regs.value(barrier.id, first as usize);
        if id as usize >= COUNT {
            return bad(format!("barrier {id}: there are {COUNT}"));
        }
        let mut expected = 0;
        if let Some(count) = barrier.count {
            let threads = warp.regs.value(count, first as usize) as u32;
            if threads == 0 || !threads.is_multiple_of(LANES as u32) || threads > 1024 {
                return bad(format!("barrier {id} for {threads} threads: a multiple of 32 is needed"));
            }
            expected = threads / LANES as u32;
        }
        let state = &mut self.barriers.states[id as usize];
        if (state.arrived > 0 || !state.partly.is_empty()) && state.expected != expected {
            return bad(format!("barrier {id} is used with different numbers of threads at once"));
        }
        state.expected = expected;
        let whole = warp.live() & !active == 0;
        // Lanes that came before make up one arrival with these, if none of them came twice.
        let others = state.partly.iter_mut().find(|(of, came)| *of == warp.index && came & active == 0);
        match others {
            Some((_, came)) => *came |= active,
            None if whole => state.arrived += 1,
            None => state.partly.push((warp.index, active)),
        }
        if let Some((_, predicate)) = barrier.reduce {
            state.holds += (warp.encoded(predicate) & active).count_ones();
            state.asked += lanes(active).count() as u32;
            state.all = barrier.kind == BarrierKind::And;
        }
        let waits = barrier.kind != BarrierKind::Arrive;
        self.checks.barrier_arrive(warp.index, id as u32, waits, whole);
        Ok(waits.then_some((id as u32, barrier.reduce.map(|(result, _)| result))))
    }
}
