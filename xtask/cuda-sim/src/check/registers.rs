//! Which registers and local bytes hold a value.

use crate::code::{Inst, Kernel, Left, Op, Site, Wgmma};
use crate::exec::lanes::sources;
use crate::exec::regs::{Class, Reg};
use crate::exec::warp::{Warp, lanes};
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
    pub fn follow(&mut self, warp: &Warp, inst: &Inst, site: &Site, (mask, active): (u32, u32)) -> Result<(), Finding> {
        if let Op::Wgmma(wgmma) = &inst.op {
            self.begin_product(wgmma, active)?;
        } else if self.products.any {
            self.keep_off(site, active)?;
        }
        if inst.guard != Inst::ALWAYS {
            self.need(std::iter::once(Reg { class: Class::Predicate, row: inst.guard >> 1 }), mask)?;
        }
        let word = |row: u32| std::iter::once(Reg { class: Class::Word, row });
        let defined = match &inst.op {
            Op::Alu { .. } => match active & self.known(&site.reads) {
                known if known == active => active,
                known => known | self.selected(warp, site, active),
            },
            // What these write depends on other lanes, which may have to come first.
            Op::Shuffle { rows, .. } => return self.need(word(rows[4]), active),
            Op::Vote { members, .. } | Op::Match { members, .. } => return self.need(word(*members), active),
            Op::Redux { rows, .. } => return self.need(word(rows[2]), active),
            Op::Mma(_) | Op::Wgmma(_) => return Ok(()),
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

    /// Lanes where all these registers hold a value.
    #[inline(always)]
    fn known(&self, regs: &[Reg]) -> u32 {
        regs.iter().fold(u32::MAX, |lanes, reg| lanes & self.lanes(*reg))
    }

    /// Lanes where a choice between two registers takes one that holds a value, whatever the other does.
    fn selected(&self, warp: &Warp, site: &Site, active: u32) -> u32 {
        match &site.reads[..] {
            [a, b, by] if by.class == Class::Predicate && site.opcode.starts_with("selp") => {
                let first = warp.regs.predicate(by.row);
                let chosen = self.lanes(*a) & first | self.lanes(*b) & !first;
                active & self.lanes(*by) & chosen
            }
            _ => 0,
        }
    }

    /// Follows what lanes do together, once all of them are there: a lane's result is undefined where some lane's value
    /// that it depends on is.
    #[inline(always)]
    pub fn exchange(&mut self, warp: &Warp, op: &Op, site: &Site, active: u32) {
        match op {
            Op::Shuffle { mode, rows, valid } => {
                let word = |row: u32| Reg { class: Class::Word, row };
                let operands = active & self.known(&[word(rows[2]), word(rows[3])]);
                // What a lane has that does not take part is not defined either.
                let source = active & self.lanes(word(rows[1]));
                let mut defined = operands;
                if source != u32::MAX {
                    let (from, _) = sources(&warp.regs, *mode, rows, active);
                    defined =
                        lanes(operands).filter(|lane| source >> from[*lane] & 1 == 1).fold(0, |m, lane| m | 1 << lane);
                }
                self.set(word(rows[0]), active, defined);
                if let Some(row) = valid {
                    self.set(Reg { class: Class::Predicate, row: *row }, active, operands);
                }
            }
            Op::Vote { .. } | Op::Match { .. } | Op::Redux { .. } => {
                let all = active & self.known(&site.reads) == active;
                self.set_all(&site.writes, active, if all { active } else { 0 });
            }
            Op::Mma(mma) if active & self.known(&site.reads) != active => {
                let of = |regs: &[Reg]| active & !self.known(regs);
                let lost = rows_of(of(&mma.a)) | columns_of(of(&mma.b));
                let defined: Vec<u32> = mma.c.iter().map(|reg| self.lanes(*reg) & !lost).collect();
                mma.d.iter().zip(defined).for_each(|(reg, defined)| self.set(*reg, active, defined));
            }
            Op::Wgmma(wgmma) => {
                let accumulates = warp.encoded(wgmma.accumulate) & 1 == 1;
                let mut lost = 0;
                if active & self.known(&site.reads) != active {
                    lost = match &wgmma.a {
                        // The scale and the descriptors are one value for all.
                        Left::Registers(regs)
                            if site.reads.iter().all(|r| regs.contains(r) || of_all(self, *r, active)) =>
                        {
                            rows_of(active & !self.known(regs))
                        }
                        _ => active,
                    };
                }
                for reg in &wgmma.d {
                    let before = if accumulates { self.lanes(*reg) } else { active };
                    self.set(*reg, active, before & !lost);
                }
            }
            Op::Mma(_) => self.set_all(&site.writes, active, active),
            _ => {}
        }
    }

    #[inline(always)]
    fn set_all(&mut self, regs: &[Reg], active: u32, defined: u32) {
        regs.iter().for_each(|reg| self.set(*reg, active, defined));
    }
}

/// Whether a register holds a value in all lanes.
fn of_all(defined: &Defined, reg: Reg, active: u32) -> bool {
    active & !defined.lanes(reg) == 0
}

/// Lanes that hold the result's rows for which these lanes hold the left operand's: the same four.
fn rows_of(lanes: u32) -> u32 {
    (0..8).map(|row| 0xf << (4 * row)).filter(|row| lanes & row != 0).fold(0, |all, row| all | row)
}

/// Lanes that hold the result's columns for which these lanes hold the right operand's: four a column, and one of each four
/// holds two columns of the result.
fn columns_of(lanes: u32) -> u32 {
    let columns = (0..8).filter(|column| lanes >> (4 * column) & 0xf != 0);
    columns.fold(0, |all, column| all | 0x1111_1111 << (column / 2))
}
