//! Warpgroups: `wgmma` is the work of four warps, which must all execute the same ones in the same order.

use crate::exec::{FaultKind, Finding};
use std::collections::VecDeque;

/// Warps of a warpgroup.
const WARPS: u32 = 4;

/// Four warps and the products that not all of them executed yet.
#[derive(Clone, Debug, Default)]
struct Group {
    /// The operation of each, and the warp that came to it first.
    open: VecDeque<(u32, u32)>,
    /// Products that all executed, and that came before these.
    over: u32,
    /// Products that each warp executed.
    ran: [u32; WARPS as usize],
}

/// The warpgroups of a CTA.
#[derive(Debug)]
pub struct Groups {
    groups: Vec<Group>,
}

impl Groups {
    /// Those of so many warps. Of a warpgroup that is no whole one some warp never executes what the others do.
    pub fn new(warps: usize) -> Self {
        Self { groups: vec![Group::default(); warps.div_ceil(WARPS as usize)] }
    }

    /// A warp executes a product.
    ///
    /// # Errors
    /// Another warp of its warpgroup executed another product in this one's place.
    pub fn product(&mut self, warp: u32, pc: u32) -> Result<(), Finding> {
        let group = &mut self.groups[(warp / WARPS) as usize];
        let ran = &mut group.ran[(warp % WARPS) as usize];
        match group.open.get((*ran - group.over) as usize) {
            Some((there, other)) if *there != pc => return Err((FaultKind::DivergentProduct { warp: *other }, 0)),
            Some(_) => {}
            None => group.open.push_back((pc, warp)),
        }
        *ran += 1;
        if group.ran.iter().all(|ran| *ran > group.over) {
            group.open.pop_front();
            group.over += 1;
        }
        Ok(())
    }

    /// A product that some warp never executed, with the warp and the operation of one that did.
    pub fn open(&self) -> Option<(Finding, u32, u32)> {
        (0..).zip(&self.groups).find_map(|(number, group)| {
            let (pc, by) = *group.open.front()?;
            let missing = (0..WARPS).find(|warp| group.ran[*warp as usize] == group.over)?;
            Some(((FaultKind::DivergentProduct { warp: WARPS * number + missing }, 0), by, pc))
        })
    }
}
