//! A CTA: its warps taken in turns until all have ended.

use super::Launch;
use super::barrier::Barriers;
use super::checks::Checks;
use super::fault::{Fault, FaultKind, Finding};
use super::mbarrier::Mbarriers;
use super::regs::{Class, LANES};
use super::warp::{Group, State, Warp, lanes};
use crate::code::{Inst, MaskKind, Op, Pipe, Special};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Operations of a warp before another takes its turn.
const QUANTUM: u32 = 20_000;

/// A CTA while it runs.
pub struct Cta<'a, C> {
    /// What is launched.
    pub launch: &'a Launch<'a>,
    /// Its index.
    pub id: [u32; 3],
    /// Its number.
    pub linear: u32,
    /// Shared memory as words.
    pub shared: Vec<u32>,
    /// Bytes of shared memory.
    pub shared_bytes: u32,
    /// The checker.
    pub checks: C,
    /// Named barriers.
    pub barriers: Barriers,
    /// Barrier objects in shared memory.
    pub mbarriers: Mbarriers,
    /// The allocation found last.
    pub hint: usize,
    warps: Vec<Warp>,
    operations: u64,
}

/// How an operation leaves the group that ran it.
enum Next {
    /// On to the next operation.
    Step,
    /// The group was parked or ended.
    Leave,
    /// On to the next operation, after other warps had a turn.
    Turn,
}

impl<'a, C: Checks> Cta<'a, C> {
    /// A CTA at its start.
    pub fn new(launch: &'a Launch<'a>, linear: u32) -> Self {
        let [gx, gy, _] = launch.grid;
        let id = [linear % gx, linear / gx % gy, linear / gx / gy];
        let threads = launch.block.iter().product::<u32>();
        let shared_bytes = launch.kernel.shared_bytes + launch.dynamic_shared;
        let mut cta = Self {
            launch,
            id,
            linear,
            shared: vec![launch.options.shared_fill; shared_bytes.div_ceil(8) as usize * 2],
            shared_bytes,
            checks: C::new(launch, id, linear, shared_bytes),
            barriers: Barriers::default(),
            mbarriers: Mbarriers::default(),
            hint: 0,
            warps: Vec::new(),
            operations: 0,
        };
        cta.warps = (0..threads.div_ceil(LANES as u32)).map(|index| cta.warp(index, threads)).collect();
        cta
    }

    fn warp(&self, index: u32, threads: u32) -> Warp {
        let kernel = self.launch.kernel;
        let count = (threads - index * LANES as u32).min(LANES as u32);
        let existing = if count == 32 { u32::MAX } else { (1 << count) - 1 };
        let mut warp = Warp { index, existing, ..Warp::default() };
        warp.regs.words = vec![[0; LANES]; kernel.rows[Class::Word as usize] as usize];
        warp.regs.doubles = vec![[0; LANES]; kernel.rows[Class::Double as usize] as usize];
        warp.regs.predicates = vec![0; kernel.rows[Class::Predicate as usize] as usize];
        warp.local = vec![0; kernel.local_bytes as usize / 4 * LANES];
        for (reg, value) in &kernel.constants {
            let filled = if reg.class == Class::Predicate && *value != 0 { u64::MAX } else { *value };
            match reg.class {
                Class::Predicate => warp.regs.predicates[reg.row as usize] = filled as u32,
                Class::Word => warp.regs.words[reg.row as usize] = [filled as u32; LANES],
                Class::Double => warp.regs.doubles[reg.row as usize] = [filled; LANES],
            }
        }
        for (reg, special) in &kernel.specials {
            for lane in 0..LANES {
                let value = self.special(*special, index, lane as u32);
                warp.regs.set(*reg, lane, value);
            }
        }
        warp.groups.push(Group { pc: 0, mask: existing, state: State::Ready, result: None });
        if let Some(seed) = self.launch.options.seed {
            let number = u64::from(self.linear) << 5 | u64::from(index);
            warp.late.waits = ChaCha8Rng::seed_from_u64(seed ^ number << 20).random();
        }
        warp
    }

    fn special(&self, special: Special, warp: u32, lane: u32) -> u64 {
        let [bx, by, _] = self.launch.block;
        let thread = warp * LANES as u32 + lane;
        let axis = |axis: u8, of: [u32; 3]| of[axis as usize];
        let value = match special {
            Special::Tid(at) => axis(at, [thread % bx, thread / bx % by, thread / bx / by]),
            Special::Ntid(at) => axis(at, self.launch.block),
            Special::Ctaid(at) => axis(at, self.id),
            Special::Nctaid(at) => axis(at, self.launch.grid),
            Special::Lane => lane,
            Special::Warp => warp,
            Special::Warps => 64,
            Special::Sm => self.linear % self.launch.options.multiprocessors.max(1),
            Special::Sms => self.launch.options.multiprocessors,
            Special::Grid => 1,
            Special::LaneMask(kind) => match kind {
                MaskKind::Equal => 1 << lane,
                MaskKind::Below => (1u32 << lane) - 1,
                MaskKind::UpTo => u32::MAX >> (31 - lane),
                MaskKind::Above => !(u32::MAX >> (31 - lane)),
                MaskKind::From => !((1u32 << lane) - 1),
            },
            Special::DynamicShared => self.launch.dynamic_shared,
            Special::TotalShared => self.shared_bytes,
            Special::Fixed(value) => value,
        };
        u64::from(value)
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// The first fault.
    pub fn run(mut self) -> Result<(C, u64), Box<Fault>> {
        let mut order: Vec<usize> = (0..self.warps.len()).collect();
        let mut random = self.launch.options.seed.map(|seed| ChaCha8Rng::seed_from_u64(seed ^ u64::from(self.linear)));
        loop {
            if let Some(random) = &mut random {
                order.shuffle(random);
            }
            let mut moved = false;
            for at in &order {
                if self.warps[*at].is_ready() {
                    moved = true;
                    let mut warp = std::mem::take(&mut self.warps[*at]);
                    let result = self.run_warp(&mut warp);
                    self.warps[*at] = warp;
                    result?;
                    self.complete_barriers()?;
                }
            }
            if self.warps.iter().all(|warp| warp.groups.is_empty()) {
                self.checks.end().map_err(|(finding, warp, pc)| self.fault(finding, warp, pc))?;
                return Ok((self.checks, self.operations));
            }
            if !moved {
                return Err(self.stuck());
            }
        }
    }

    /// Why nothing can run.
    fn stuck(&self) -> Box<Fault> {
        for warp in &self.warps {
            let waiting = warp.groups.iter().find(|group| group.state == State::Collective);
            if let Some(group) = waiting {
                let missing = warp.existing & !group.mask;
                let lane = group.mask.trailing_zeros();
                return self.fault((FaultKind::DivergentCollective { missing }, lane), warp.index, group.pc);
            }
        }
        let waiting = self.warps.iter().find_map(|warp| warp.groups.first().map(|group| (warp, group)));
        let (warp, pc, lane, what) = match waiting {
            Some((warp, Group { pc, mask, state: State::Barrier(id), .. })) => {
                let count = self.warps.iter().filter(|warp| !warp.groups.is_empty()).count();
                let what = format!("barrier {id} cannot complete: {count} warps wait and none can reach it");
                (warp.index, pc.saturating_sub(1), mask.trailing_zeros(), what)
            }
            _ => (0, 0, 0, "nothing can run".to_owned()),
        };
        self.fault((FaultKind::Deadlock { what }, lane), warp, pc)
    }

    /// A finding with its place.
    pub fn fault(&self, (kind, lane): Finding, warp: u32, pc: u32) -> Box<Fault> {
        let kernel = self.launch.kernel;
        let site = &kernel.sites[(pc as usize).min(kernel.sites.len() - 1)];
        let file = site.location.and_then(|at| kernel.files.iter().find(|file| file.0 == at.file));
        Box::new(Fault {
            kind,
            kernel: kernel.name.clone(),
            line: site.line,
            opcode: site.opcode.clone(),
            location: site.location,
            file: file.map(|file| file.1.clone()),
            cta: self.id,
            warp,
            lane,
        })
    }

    fn complete_barriers(&mut self) -> Result<(), Box<Fault>> {
        for id in self.barriers.complete(&self.warps, &mut self.checks) {
            for warp in &mut self.warps {
                let Warp { groups, regs, .. } = warp;
                for group in groups.iter_mut().filter(|group| group.state == State::Barrier(id)) {
                    group.state = State::Ready;
                    if let Some(result) = group.result.take() {
                        let value = self.barriers.result(id, result.class == Class::Word);
                        lanes(group.mask).for_each(|lane| regs.set(result, lane, value));
                    }
                }
            }
        }
        Ok(())
    }

    /// Runs a warp until nothing of it can, or its turn is over.
    fn run_warp(&mut self, warp: &mut Warp) -> Result<(), Box<Fault>> {
        let code: &'a [Inst] = &self.launch.kernel.code;
        let mut left = QUANTUM;
        while let Some((mut pc, mask, limit)) = warp.pick() {
            let mut mask = mask;
            loop {
                if left == 0 {
                    self.operations += u64::from(QUANTUM);
                    warp.rotate = true;
                    warp.park(pc, mask);
                    return self.check_budget(warp, pc);
                }
                left -= 1;
                let inst = &code[pc as usize];
                let active = warp.guarded(inst, mask);
                if C::ON {
                    let site = &self.launch.kernel.sites[pc as usize];
                    self.checks.before(warp, inst, site, mask, active).map_err(|f| self.fault(f, warp.index, pc))?;
                }
                match &inst.op {
                    Op::Alu { f, rows } => {
                        f(&mut warp.regs, rows, active);
                        pc += 1;
                    }
                    Op::Branch(target) if active == mask => pc = *target,
                    Op::Branch(_) if active == 0 => pc += 1,
                    Op::Branch(target) => {
                        warp.park(*target, active);
                        warp.park(pc + 1, mask & !active);
                        break;
                    }
                    op => match self.other(warp, op, pc, &mut mask, active) {
                        Ok(Next::Step) => pc += 1,
                        Ok(Next::Leave) => break,
                        Ok(Next::Turn) => {
                            self.operations += u64::from(QUANTUM - left);
                            warp.rotate = true;
                            warp.park(pc + 1, mask);
                            return self.check_budget(warp, pc);
                        }
                        Err(finding) => return Err(self.fault(finding, warp.index, pc)),
                    },
                }
                if pc >= limit {
                    warp.park(pc, mask);
                    break;
                }
            }
        }
        self.operations += u64::from(QUANTUM - left);
        Ok(())
    }

    fn check_budget(&self, warp: &Warp, pc: u32) -> Result<(), Box<Fault>> {
        if self.operations <= self.launch.options.budget {
            return Ok(());
        }
        let operations = self.operations;
        Err(self.fault((FaultKind::Budget { operations }, 0), warp.index, pc))
    }

    /// Operations beyond arithmetic and branches.
    fn other(&mut self, warp: &mut Warp, op: &Op, pc: u32, mask: &mut u32, active: u32) -> Result<Next, Finding> {
        match op {
            Op::Load(access) => {
                let _alone = self.launch.alone::<C>(access.space, access.order);
                self.load(warp, access, pc, active)?;
            }
            Op::Store(access) => {
                let _alone = self.launch.alone::<C>(access.space, access.order);
                self.store(warp, access, pc, active)?;
            }
            Op::Atomic(atomic) => {
                let _alone = self.launch.alone::<C>(atomic.space, atomic.order);
                self.atomic(warp, atomic, pc, active)?;
            }
            Op::BranchIndex(index, targets) => {
                for lane in lanes(active) {
                    let at = warp.regs.value(*index, lane) as usize;
                    let Some(target) = targets.get(at) else {
                        let what = format!("index {at} in a list of {} targets", targets.len());
                        return Err((FaultKind::BadOperand { what }, lane as u32));
                    };
                    warp.park(*target, 1 << lane);
                }
                warp.park(pc + 1, *mask & !active);
                return Ok(Next::Leave);
            }
            Op::Exit => {
                warp.exited |= active;
                *mask &= !active;
                if *mask == 0 {
                    return Ok(Next::Leave);
                }
            }
            Op::Trap if active != 0 => return Err((FaultKind::Trap, active.trailing_zeros())),
            Op::Fence(Some(scope)) => self.checks.fence(warp.index, *scope),
            Op::Clock(reg) => {
                let now = self.operations;
                lanes(active).for_each(|lane| warp.regs.set(*reg, lane, now));
            }
            Op::System(call, result, places) => self.system(warp, *call, *result, places, active)?,
            Op::CopyAsync(copy) => self.copy_async(warp, copy, pc, active)?,
            Op::Bulk(bulk) => self.bulk(warp, bulk, pc, active)?,
            Op::CopyCommit => {
                warp.late.commit(active);
                self.checks.copy_commit(warp.index, active);
            }
            Op::CopyWait(groups) => {
                warp.late.land(active, *groups, &mut self.shared);
                self.checks.copy_wait(warp.index, active, *groups);
            }
            Op::AsyncCommit(Pipe::Bulk) => self.checks.async_commit(warp.index, active, Pipe::Bulk),
            Op::AsyncWait(Pipe::Bulk, groups) => self.checks.async_wait(warp.index, active, Pipe::Bulk, *groups),
            Op::Mbarrier(op) => {
                if self.mbarrier(warp, op, pc, active)? {
                    return Ok(Next::Turn);
                }
            }
            Op::Yield => return Ok(Next::Turn),
            Op::Trap | Op::Nothing | Op::Fence(None) | Op::Alu { .. } | Op::Branch(_) => {}
            _ => return self.collective(warp, op, pc, *mask, active),
        }
        Ok(Next::Step)
    }

    /// Operations that lanes of a warp run together.
    fn collective(&mut self, warp: &mut Warp, op: &Op, pc: u32, mask: u32, active: u32) -> Result<Next, Finding> {
        if active == 0 {
            return Ok(Next::Step);
        }
        let needed = match op {
            Op::ActiveMask(dst) => {
                lanes(active).for_each(|lane| warp.regs.words[*dst as usize][lane] = active);
                return Ok(Next::Step);
            }
            Op::Shuffle { rows, .. } => self.members(warp, rows[4], active)?,
            Op::Vote { members, .. }
            | Op::Match { members, .. }
            | Op::Elect { members, .. }
            | Op::WarpSync(members) => self.members(warp, *members, active)?,
            Op::Redux { rows, .. } => self.members(warp, rows[2], active)?,
            Op::Barrier(barrier) if !barrier.aligned => active,
            _ => warp.existing,
        };
        if C::ON && needed & warp.exited != 0 && !matches!(op, Op::Barrier(_)) {
            return Err((FaultKind::DivergentCollective { missing: needed & warp.exited }, active.trailing_zeros()));
        }
        let missing = needed & warp.live() & !active;
        if missing != 0 {
            if missing & mask != 0 {
                // The guard keeps them out: they will not come here.
                return Err((FaultKind::DivergentCollective { missing }, active.trailing_zeros()));
            }
            warp.park(pc, mask);
            // With lanes that wait here already it tries again.
            if let Some(group) = warp.groups.iter_mut().find(|group| group.pc == pc && group.mask == mask) {
                group.state = State::Collective;
            }
            return Ok(Next::Leave);
        }
        if let Op::Barrier(barrier) = op {
            let waiting = self.arrive(warp, barrier, active)?;
            if let Some((id, result)) = waiting {
                warp.groups.push(Group { pc: pc + 1, mask: active, state: State::Barrier(id), result });
                warp.park(pc + 1, mask & !active);
                return Ok(Next::Leave);
            }
            return Ok(Next::Step);
        }
        self.together(warp, op, pc, active, needed)?;
        Ok(Next::Step)
    }

    /// The member mask of the lanes that run, which must be the same on all and hold each of them.
    fn members(&self, warp: &Warp, row: u32, active: u32) -> Result<u32, Finding> {
        let masks = warp.regs.word(row);
        let first = active.trailing_zeros();
        let mask = masks[first as usize & 31];
        for lane in lanes(active) {
            if masks[lane] != mask {
                let what = format!("member masks differ: {mask:#010x} and {:#010x}", masks[lane]);
                return Err((FaultKind::BadOperand { what }, lane as u32));
            }
            if mask >> lane & 1 == 0 {
                let what = format!("member mask {mask:#010x} does not hold lane {lane}");
                return Err((FaultKind::BadOperand { what }, lane as u32));
            }
        }
        Ok(mask & warp.existing)
    }

    fn together(&mut self, warp: &mut Warp, op: &Op, pc: u32, active: u32, needed: u32) -> Result<(), Finding> {
        if C::ON {
            self.checks.exchange(warp, op, &self.launch.kernel.sites[pc as usize], active);
        }
        match op {
            Op::WarpSync(_) => self.checks.warp_sync(warp.index, needed, warp.live()),
            Op::Matrix(matrix) => self.matrix(warp, matrix, pc)?,
            Op::Wgmma(wgmma) => {
                self.checks.product(warp.index, pc)?;
                self.wgmma(warp, wgmma, pc)?;
            }
            Op::AsyncCommit(pipe) => self.checks.async_commit(warp.index, active, *pipe),
            Op::AsyncWait(pipe, groups) => self.checks.async_wait(warp.index, active, *pipe, *groups),
            Op::ProductFence => {}
            Op::Mma(mma) => super::mma::multiply(&mut warp.regs, mma),
            _ => super::lanes::exchange(&mut warp.regs, op, active),
        }
        Ok(())
    }
}
