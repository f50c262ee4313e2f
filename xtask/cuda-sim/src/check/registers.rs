//! Which registers and local bytes hold a value.

use crate::code::{Inst, Kernel, Left, Op, Site, Wgmma};
use crate::exec::regs::{Class, Reg};
use crate::exec::{FaultKind, Finding};
use crate::ptx::Space;

/// Lanes where each register of a warp holds a value, and each byte of local memory.
#[derive(Debug)]
pub struct Defined {
    files: [Vec<u32>; 3],
    /// Lanes that wrote each byte of local memory.
    pub local: Vec<u32>,
    products: Products,
}

/// Registers of products that were not waited for: the number of the group, from 1; 0 for none.
#[derive(Debug, Default)]
struct Products {
    /// Accumulators: nobody may use them, but other products that add to them.
    written: Vec<u32>,
    /// Operands: nobody may write them.
    read: Vec<u32>,
    /// Copies of accumulators: nobody may use them, but they may be written.
    copied: Vec<u32>,
    /// Groups that were closed.
    closed: u32,
    /// There are some.
    any: bool,
}

impl Defined {
    /// A warp at its start: constants and special registers hold values.
    pub fn new(kernel: &Kernel) -> Self {
        let mut files = kernel.rows.map(|rows| vec![0; rows as usize]);
        let known = kernel.constants.iter().map(|found| found.0).chain(kernel.specials.iter().map(|found| found.0));
        known.for_each(|reg| files[reg.class as usize][reg.row as usize] = u32::MAX);
        let local = vec![0; kernel.local_bytes as usize];
        Self { files, local, products: Products::default() }
    }

    /// Lanes where a register holds a value.
    #[inline(always)]
    pub fn lanes(&self, reg: Reg) -> u32 {
        self.files[reg.class as usize][reg.row as usize]
    }

    #[inline(always)]
    fn set(&mut self, reg: Reg, active: u32, defined: u32) {
        let lanes = &mut self.files[reg.class as usize][reg.row as usize];
        *lanes = *lanes & !active | defined & active;
    }

    /// A product begins: its accumulators may be those of products before it.
    fn begin_product(&mut self, wgmma: &Wgmma, active: u32) -> Result<(), Finding> {
        let (rows, products) = (self.files[Class::Word as usize].len(), &mut self.products);
        products.written.resize(rows, 0);
        products.read.resize(rows, 0);
        products.copied.resize(rows, 0);
        let group = products.closed + 1;
        let operands = match &wgmma.a {
            Left::Registers(regs) => &regs[..],
            Left::Descriptor(_) => &[],
        };
        let busy = |reg: &Reg| products.written[reg.row as usize].max(products.copied[reg.row as usize]) != 0;
        let used = operands.iter().any(busy);
        if used || wgmma.d.iter().any(|reg| products.read[reg.row as usize] != 0) {
            return Err((FaultKind::PendingProduct, active.trailing_zeros()));
        }
        operands.iter().for_each(|reg| products.read[reg.row as usize] = group);
        for reg in &wgmma.d {
            (products.written[reg.row as usize], products.copied[reg.row as usize]) = (group, 0);
        }
        products.any = true;
        Ok(())
    }

    /// No other operation may use accumulators, but copy them: so do compilers before a wait and around loops, and the
    /// assembler leaves nothing of it.
    fn keep_off(&mut self, site: &Site, active: u32) -> Result<(), Finding> {
        let Products { written, read, copied, .. } = &mut self.products;
        let rows = |regs: &[Reg]| -> Vec<usize> {
            regs.iter().filter(|reg| reg.class == Class::Word).map(|reg| reg.row as usize).collect()
        };
        let (from, to) = (rows(&site.reads), rows(&site.writes));
        let group = from.iter().map(|row| written[*row].max(copied[*row])).max().unwrap_or(0);
        let copies = group != 0 && site.opcode.starts_with("mov");
        let changes = to.iter().any(|row| read[*row] != 0 || !copies && written[*row] != 0);
        if changes || group != 0 && !copies {
            return Err((FaultKind::PendingProduct, active.trailing_zeros() & 31));
        }
        for row in to {
            (written[row], copied[row]) = (0, group);
        }
        Ok(())
    }

    /// A group of products is closed.
    pub fn close_products(&mut self) {
        self.products.closed += 1;
    }

    /// Groups up to this one are over.
    pub fn end_products(&mut self, group: u32) {
        let Products { written, read, copied, any, .. } = &mut self.products;
        *any = false;
        for number in written.iter_mut().chain(read).chain(copied) {
            *number = if *number <= group { 0 } else { *number };
            *any |= *number != 0;
        }
    }

    /// A register holds nothing in some lanes.
    pub fn forget(&mut self, reg: Reg, lanes: u32) {
        self.files[reg.class as usize][reg.row as usize] &= !lanes;
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
        if let Op::Wgmma(wgmma) = &inst.op {
            self.begin_product(wgmma, active)?;
        } else if self.products.any {
            self.keep_off(site, active)?;
        }
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
