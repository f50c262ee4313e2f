//! Counters of a launch: instructions, tensor-core work, memory traffic, bank conflicts, divergence.

use crate::code::{Inst, Left, Op, Pipe, Scope, Site};
use crate::exec::checks::{Checks, ObjectUse, Touch, TouchKind};
use crate::exec::regs::LANES;
use crate::exec::warp::{Warp, lanes};
use crate::exec::{FaultKind, Finding, Launch};
use crate::memory::Allocation;
use crate::ptx::Space;
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

/// Bytes of a sector, the least that moves between memory and a multiprocessor.
const SECTOR: u64 = 32;
/// Banks of shared memory, each four bytes wide.
const BANKS: usize = 32;

/// Counters of a launch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Instructions of warps: arithmetic.
    pub arithmetic: u64,
    /// Loads, stores and atomics.
    pub memory: u64,
    /// Branches and ends.
    pub control: u64,
    /// Shuffles, votes, barriers, fences.
    pub collective: u64,
    /// Matrix products and the loads of their fragments.
    pub tensor: u64,
    /// Asynchronous copies, and waiting for them.
    pub copies: u64,
    /// Lanes that ran these instructions.
    pub lanes: u64,
    /// Multiplications and additions of tensor cores.
    pub tensor_flop: u64,
    /// Requests of warps to global memory.
    pub global_requests: u64,
    /// Sectors that they touch.
    pub global_sectors: u64,
    /// Bytes that lanes ask for.
    pub global_bytes: u64,
    /// Sectors that the whole launch touches, times their size.
    pub unique_bytes: u64,
    /// Passes over shared memory.
    pub shared_wavefronts: u64,
    /// Passes that would do without bank conflicts.
    pub shared_ideal: u64,
    /// Bytes copied asynchronously.
    pub copied_bytes: u64,
    /// The most groups of copies that a warp had open.
    pub groups_in_flight: u64,
    /// Lines of the PTX that some lane ran, by their number.
    pub lines: Vec<bool>,
    sectors: HashSet<u64>,
}

impl Counts {
    /// All instructions of warps.
    pub fn instructions(&self) -> u64 {
        self.arithmetic + self.memory + self.control + self.collective + self.tensor + self.copies
    }

    /// The part of lanes that ran.
    pub fn activity(&self) -> f64 {
        self.lanes as f64 / (self.instructions().max(1) * LANES as u64) as f64
    }

    /// Names and values, in the order of the table.
    pub fn fields(&self) -> [(&'static str, u64); 17] {
        [
            ("instructions", self.instructions()),
            ("arithmetic", self.arithmetic),
            ("memory", self.memory),
            ("control", self.control),
            ("collective", self.collective),
            ("tensor", self.tensor),
            ("copies", self.copies),
            ("lanes", self.lanes),
            ("tensor_flop", self.tensor_flop),
            ("global_requests", self.global_requests),
            ("global_sectors", self.global_sectors),
            ("global_bytes", self.global_bytes),
            ("unique_bytes", self.unique_bytes),
            ("shared_wavefronts", self.shared_wavefronts),
            ("shared_ideal", self.shared_ideal),
            ("copied_bytes", self.copied_bytes),
            ("groups_in_flight", self.groups_in_flight),
        ]
    }

    /// One JSON object.
    pub fn json(&self, kernel: &str) -> String {
        let fields: Vec<String> = self.fields().iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
        format!("{{\"kernel\": \"{kernel}\", {}}}", fields.join(", "))
    }

    /// Adds a CTA's counters.
    pub fn add(&mut self, other: &Self) {
        self.arithmetic += other.arithmetic;
        self.memory += other.memory;
        self.control += other.control;
        self.collective += other.collective;
        self.tensor += other.tensor;
        self.copies += other.copies;
        self.lanes += other.lanes;
        self.tensor_flop += other.tensor_flop;
        self.global_requests += other.global_requests;
        self.global_sectors += other.global_sectors;
        self.global_bytes += other.global_bytes;
        self.shared_wavefronts += other.shared_wavefronts;
        self.shared_ideal += other.shared_ideal;
        self.copied_bytes += other.copied_bytes;
        self.groups_in_flight = self.groups_in_flight.max(other.groups_in_flight);
        self.lines.resize(self.lines.len().max(other.lines.len()), false);
        self.lines.iter_mut().zip(&other.lines).for_each(|(ran, other)| *ran |= other);
        self.sectors.extend(&other.sectors);
        self.unique_bytes = self.sectors.len() as u64 * SECTOR;
    }

    fn global(&mut self, touch: &Touch<'_>) {
        let mut sectors: Vec<u64> = lanes(touch.active)
            .flat_map(|lane| touch.at[lane] / SECTOR..=(touch.at[lane] + u64::from(touch.bytes) - 1) / SECTOR)
            .collect();
        sectors.sort_unstable();
        sectors.dedup();
        self.global_requests += 1;
        self.global_sectors += sectors.len() as u64;
        self.global_bytes += u64::from(touch.bytes) * u64::from(touch.active.count_ones());
        self.sectors.extend(sectors);
    }

    /// Lanes whose accesses fill all banks together pass together.
    fn shared(&mut self, touch: &Touch<'_>) {
        let together = (4 * LANES / touch.bytes.clamp(4, 128) as usize).max(1);
        for first in (0..LANES).step_by(together) {
            let group = touch.active >> first & if together == LANES { u32::MAX } else { (1 << together) - 1 };
            if group == 0 {
                continue;
            }
            let mut words: Vec<u64> = lanes(group)
                .flat_map(|lane| {
                    let at = touch.at[first + lane];
                    at / 4..=(at + u64::from(touch.bytes) - 1) / 4
                })
                .collect();
            words.sort_unstable();
            words.dedup();
            let mut banks = [0u64; BANKS];
            words.iter().for_each(|word| banks[*word as usize % BANKS] += 1);
            self.shared_wavefronts += banks.into_iter().max().unwrap_or(0);
            self.shared_ideal += (words.len() as u64).div_ceil(BANKS as u64);
        }
    }

    fn instruction(&mut self, op: &Op) {
        let class = match op {
            Op::Alu { .. } | Op::Clock(_) | Op::ActiveMask(_) => &mut self.arithmetic,
            Op::Load(_) | Op::Store(_) | Op::Atomic(_) => &mut self.memory,
            Op::Branch(_) | Op::BranchIndex(..) | Op::Exit | Op::Trap | Op::System(..) | Op::Nothing | Op::Yield => {
                &mut self.control
            }
            Op::Matrix(_) | Op::Mma(_) | Op::Wgmma(_) => &mut self.tensor,
            Op::AsyncCommit(Pipe::Product) | Op::AsyncWait(Pipe::Product, _) => &mut self.tensor,
            Op::CopyAsync(_) | Op::CopyCommit | Op::CopyWait(_) | Op::Bulk(_) | Op::Mbarrier(_) => &mut self.copies,
            Op::AsyncCommit(Pipe::Bulk) | Op::AsyncWait(Pipe::Bulk, _) => &mut self.copies,
            _ => &mut self.collective,
        };
        *class += 1;
        if let Op::Wgmma(wgmma) = op {
            // Both sides are 32 bytes deep: 16 rows of the left one, and a fourth of the right one's columns.
            let rows = if matches!(wgmma.a, Left::Descriptor(_)) { 16 } else { 0 };
            let passes = (rows * 32 + u64::from(wgmma.columns) * 8).div_ceil(4 * BANKS as u64);
            self.shared_wavefronts += passes;
            self.shared_ideal += passes;
        }
        self.tensor_flop += match op {
            Op::Mma(mma) => 2 * mma.shape.iter().map(|size| u64::from(*size)).product::<u64>(),
            Op::Wgmma(wgmma) => 2 * 16 * u64::from(wgmma.columns) * u64::from(wgmma.depth),
            _ => 0,
        };
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.fields() {
            writeln!(f, "  {name:18} {value:>16}")?;
        }
        let ratio = |a: u64, b: u64| a as f64 / b.max(1) as f64;
        writeln!(f, "  {:18} {:>16.3}", "active lanes", self.activity())?;
        writeln!(f, "  {:18} {:>16.2}", "bytes a sector", ratio(self.global_bytes, self.global_sectors))?;
        write!(f, "  {:18} {:>16.2}", "bank conflicts", ratio(self.shared_wavefronts, self.shared_ideal))
    }
}

/// A counter of one CTA.
#[derive(Default)]
pub struct Counter {
    counts: Counts,
    /// Open groups of each warp.
    open: Vec<u64>,
}

impl Checks for Counter {
    const ON: bool = true;

    fn new(launch: &Launch<'_>, _: [u32; 3], _: u32, _: u32) -> Self {
        let warps = launch.block.iter().product::<u32>().div_ceil(LANES as u32) as usize;
        let last = launch.kernel.sites.iter().map(|site| site.line as usize).max().unwrap_or(0);
        Self { counts: Counts { lines: vec![false; last + 1], ..Counts::default() }, open: vec![0; warps] }
    }

    fn before(&mut self, _: &Warp, inst: &Inst, site: &Site, mask: u32, active: u32) -> Result<(), Finding> {
        if !site.first {
            return Ok(());
        }
        let ran = if matches!(inst.op, Op::Branch(_)) { mask } else { active };
        self.counts.instruction(&inst.op);
        self.counts.lines[site.line as usize] |= ran != 0;
        self.counts.lanes += u64::from(ran.count_ones());
        Ok(())
    }

    fn touch(&mut self, _: u32, touch: &Touch<'_>, _: &[Arc<Allocation>], _: &mut usize) -> Result<(), Finding> {
        match touch.space {
            Space::Global | Space::Const => self.counts.global(touch),
            // What `wgmma` reads is counted where it is begun: its four warps read it together.
            Space::Shared if touch.kind != TouchKind::AsyncRead(Pipe::Product) => self.counts.shared(touch),
            _ => {}
        }
        if touch.kind == TouchKind::Copy {
            self.counts.copied_bytes += u64::from(touch.bytes) * u64::from(touch.active.count_ones());
        }
        Ok(())
    }

    fn copy_commit(&mut self, warp: u32, _: u32) {
        let open = &mut self.open[warp as usize];
        *open += 1;
        self.counts.groups_in_flight = self.counts.groups_in_flight.max(*open);
    }

    fn copy_wait(&mut self, warp: u32, _: u32, groups: Option<u32>) {
        let open = &mut self.open[warp as usize];
        *open = (*open).min(u64::from(groups.unwrap_or(0)));
    }

    fn counts(self) -> Option<Counts> {
        Some(self.counts)
    }

    fn local_written(&mut self, _: u32, _: u32, _: u32, _: u32) {}
    fn fence(&mut self, _: u32, _: Scope) {}
    fn warp_sync(&mut self, _: u32, _: u32, _: u32) {}
    fn barrier_arrive(&mut self, _: u32, _: u32, _: bool, _: bool) {}
    fn barrier_complete(&mut self, _: u32) {}
    fn async_commit(&mut self, _: u32, _: u32, _: Pipe) {}
    fn async_wait(&mut self, _: u32, _: u32, _: Pipe, _: u32) {}
    fn object_arrive(&mut self, _: u32, _: u64) {}
    fn object_filled(&mut self, _: u32, _: u64) {}
    fn object_wait(&mut self, _: u32, _: u64) {}
}

/// Two of them at once.
impl<A: Checks, B: Checks> Checks for (A, B) {
    const ON: bool = A::ON || B::ON;

    fn new(launch: &Launch<'_>, id: [u32; 3], linear: u32, shared_bytes: u32) -> Self {
        (A::new(launch, id, linear, shared_bytes), B::new(launch, id, linear, shared_bytes))
    }

    fn before(&mut self, warp: &Warp, inst: &Inst, site: &Site, mask: u32, active: u32) -> Result<(), Finding> {
        self.0.before(warp, inst, site, mask, active)?;
        self.1.before(warp, inst, site, mask, active)
    }

    fn touch(
        &mut self,
        warp: u32,
        touch: &Touch<'_>,
        memory: &[Arc<Allocation>],
        hint: &mut usize,
    ) -> Result<(), Finding> {
        self.0.touch(warp, touch, memory, hint)?;
        self.1.touch(warp, touch, memory, hint)
    }

    fn local_written(&mut self, warp: u32, lane: u32, address: u32, bytes: u32) {
        self.0.local_written(warp, lane, address, bytes);
        self.1.local_written(warp, lane, address, bytes);
    }

    fn fence(&mut self, warp: u32, scope: Scope) {
        self.0.fence(warp, scope);
        self.1.fence(warp, scope);
    }

    fn warp_sync(&mut self, warp: u32, members: u32, live: u32) {
        self.0.warp_sync(warp, members, live);
        self.1.warp_sync(warp, members, live);
    }

    fn barrier_arrive(&mut self, warp: u32, id: u32, waits: bool, whole: bool) {
        self.0.barrier_arrive(warp, id, waits, whole);
        self.1.barrier_arrive(warp, id, waits, whole);
    }

    fn barrier_complete(&mut self, id: u32) {
        self.0.barrier_complete(id);
        self.1.barrier_complete(id);
    }

    fn copy_commit(&mut self, warp: u32, active: u32) {
        self.0.copy_commit(warp, active);
        self.1.copy_commit(warp, active);
    }

    fn copy_wait(&mut self, warp: u32, active: u32, groups: Option<u32>) {
        self.0.copy_wait(warp, active, groups);
        self.1.copy_wait(warp, active, groups);
    }

    fn async_commit(&mut self, warp: u32, active: u32, pipe: Pipe) {
        self.0.async_commit(warp, active, pipe);
        self.1.async_commit(warp, active, pipe);
    }

    fn async_wait(&mut self, warp: u32, active: u32, pipe: Pipe, groups: u32) {
        self.0.async_wait(warp, active, pipe, groups);
        self.1.async_wait(warp, active, pipe, groups);
    }

    fn object_arrive(&mut self, warp: u32, offset: u64) {
        self.0.object_arrive(warp, offset);
        self.1.object_arrive(warp, offset);
    }

    fn object_filled(&mut self, warp: u32, offset: u64) {
        self.0.object_filled(warp, offset);
        self.1.object_filled(warp, offset);
    }

    fn object_wait(&mut self, warp: u32, offset: u64) {
        self.0.object_wait(warp, offset);
        self.1.object_wait(warp, offset);
    }

    fn object_used(&mut self, by: (u32, u32, u32), offset: u64, how: ObjectUse) -> Result<(), FaultKind> {
        self.0.object_used(by, offset, how)?;
        self.1.object_used(by, offset, how)
    }

    fn exchange(&mut self, warp: &Warp, op: &Op, site: &Site, active: u32) {
        self.0.exchange(warp, op, site, active);
        self.1.exchange(warp, op, site, active);
    }

    fn product(&mut self, warp: u32, pc: u32) -> Result<(), Finding> {
        self.0.product(warp, pc)?;
        self.1.product(warp, pc)
    }

    fn end(&self) -> Result<(), (Finding, u32, u32)> {
        self.0.end()?;
        self.1.end()
    }

    fn counts(self) -> Option<Counts> {
        self.0.counts().or_else(|| self.1.counts())
    }
}
