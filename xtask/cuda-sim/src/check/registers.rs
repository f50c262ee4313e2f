//! Which registers and local bytes hold a value.

use crate::code::{Inst, Kernel, Op, Site};
use crate::exec::regs::{Class, Reg};
use crate::exec::{FaultKind, Finding};
use crate::ptx::Space;

/// Lanes where each register of a warp holds a value, and each byte of local memory.
#[derive(Debug)]
pub struct Defined {
    files: [Vec<u32>; 3],
    /// Lanes that wrote each byte of local memory.
    pub local: Vec<u32>,
}

impl Defined {
    /// A warp at its start: constants and special registers hold values.
    pub fn new(kernel: &Kernel) -> Self {
        let mut files = kernel.rows.map(|rows| vec![0; rows as usize]);
        let known = kernel.constants.iter().map(|found| found.0).chain(kernel.specials.iter().map(|found| found.0));
        known.for_each(|reg| files[reg.class as usize][reg.row as usize] = u32::MAX);
        Self { files, local: vec![0; kernel.local_bytes as usize] }
    }

    #[inline(always)]
    fn lanes(&self, reg: Reg) -> u32 {
        self.files[reg.class as usize][reg.row as usize]
    }

    #[inline(always)]
    fn set(&mut self, reg: Reg, active: u32, defined: u32) {
        let lanes = &mut self.files[reg.class as usize][reg.row as usize];
        *lanes = *lanes & !active | defined & active;
    }

    /// Registers whose value matters.
    #[inline(always)]
    fn need(&self, regs: impl Iterator<Item = Reg>, active: u32) -> Result<(), Finding> {
        for reg in regs {
            let missing = active & !self.lanes(reg);
            if missing != 0 {
                return Err((FaultKind::UninitialisedRegister, missing.trailing_zeros()));
            }
        }
        Ok(())
    }

    /// Follows an operation. Arithmetic passes on what is undefined; guards, addresses, and what is stored to global
    /// memory must be defined.
    #[inline(always)]
    pub fn follow(&mut self, inst: &Inst, site: &Site, mask: u32, active: u32) -> Result<(), Finding> {
        if inst.guard != Inst::ALWAYS {
            self.need(std::iter::once(Reg { class: Class::Predicate, row: inst.guard >> 1 }), mask)?;
        }
        let defined = match &inst.op {
            Op::Alu { .. } => site.reads.iter().fold(active, |lanes, reg| lanes & self.lanes(*reg)),
            Op::Shuffle { .. } | Op::Vote { .. } | Op::Match { .. } | Op::Redux { .. } | Op::Mma(_) | Op::Wgmma(_) => {
                site.reads.iter().fold(active, |lanes, reg| lanes & self.lanes(*reg))
            }
            Op::Load(access) => {
                self.need(access.place.base.into_iter(), active)?;
                active
            }
            Op::Store(access) if matches!(access.space, Space::Shared | Space::Local) => {
                self.need(access.place.base.into_iter(), active)?;
                active
            }
            _ => {
                self.need(site.reads.iter().copied(), active)?;
                active
            }
        };
        for reg in &site.writes {
            self.set(*reg, active, defined);
        }
        Ok(())
    }
}
