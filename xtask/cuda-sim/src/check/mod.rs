//! The checker: bounds and alignment are the executor's; here are values never written, races and misused copies.

mod clock;
mod global;
mod groups;
mod pipes;
mod registers;
mod shared;

pub use global::GlobalShadow;

use crate::code::{Inst, Op, Order, Pipe, Scope, Site};
use crate::exec::access::find;
use crate::exec::checks::{Checks, ObjectUse, Touch, TouchKind};
use crate::exec::regs::Reg;
use crate::exec::warp::{Warp, lanes};
use crate::exec::{FaultKind, Finding, Launch, Party};
use crate::lower::{LOCAL_BASE, SHARED_BASE};
use crate::memory::Allocation;
use crate::ptx::Space;
use clock::{Clock, Clocks, Left, Public};
use global::View;
use groups::Groups;
use pipes::Pipes;
use registers::Defined;
use shared::{SharedShadow, Visit, Wrong};
use std::collections::HashMap;
use std::sync::Arc;

/// A copy that is not complete.
#[derive(Clone, Copy, Debug)]
struct Copy {
    lane: u32,
    offset: u64,
    bytes: u32,
    group: u32,
}

/// Copies of a warp.
#[derive(Clone, Debug, Default)]
struct Copies {
    open: Vec<Copy>,
    /// Groups that each lane closed.
    closed: [u32; 32],
}

/// What the operation that runs takes from undefined registers to shared memory, and what it loads from there.
#[derive(Debug, Default)]
struct Undefined {
    /// Lanes without a value, a mask for each register that is stored; empty where all have one.
    stored: Vec<u32>,
    /// Registers that are loaded.
    loaded: Vec<Reg>,
    /// Their number.
    count: u32,
    /// They are of matrices, transposed or not.
    matrix: Option<bool>,
}

impl Undefined {
    fn any(&self) -> bool {
        !self.stored.is_empty()
    }

    #[inline(always)]
    fn note_store(&mut self, defined: &Defined, regs: &[Reg], active: u32) {
        if regs.iter().any(|reg| active & !defined.lanes(*reg) != 0) {
            self.stored.extend(regs.iter().map(|reg| active & !defined.lanes(*reg)));
        }
    }

    fn note_load(&mut self, regs: &[Reg], matrix: Option<bool>) {
        self.loaded.clear();
        self.loaded.extend_from_slice(regs);
        (self.count, self.matrix) = (regs.len() as u32, matrix);
    }
}

fn bit(mask: u32, lane: usize) -> u32 {
    mask | 1 << lane
}

/// A checker of a CTA.
pub struct Checker {
    id: [u32; 3],
    linear: u32,
    grid: [u32; 3],
    lines: Vec<u32>,
    defined: Vec<Defined>,
    clocks: Clocks,
    shared: SharedShadow,
    global: Arc<GlobalShadow>,
    undefined: Undefined,
    copies: Vec<Copies>,
    pipes: Pipes,
    groups: Groups,
    barriers: [(Clock, Vec<(u32, bool)>); 16],
    objects: HashMap<u64, Clock>,
    /// What is known at shared addresses of strong accesses.
    places: HashMap<u64, Public>,
}

impl Checks for Checker {
    const ON: bool = true;

    fn new(launch: &Launch<'_>, id: [u32; 3], linear: u32, shared_bytes: u32) -> Self {
        let warps = launch.block.iter().product::<u32>().div_ceil(32) as usize;
        let kernel = launch.kernel;
        Self {
            id,
            linear,
            grid: launch.grid,
            lines: kernel.sites.iter().map(|site| site.line).collect(),
            defined: (0..warps).map(|_| Defined::new(kernel)).collect(),
            clocks: Clocks::new(warps),
            shared: SharedShadow::new(shared_bytes, kernel.narrowest.shared, warps),
            global: launch.shadow.clone(),
            undefined: Undefined::default(),
            copies: vec![Copies::default(); warps],
            pipes: Pipes::new(warps),
            groups: Groups::new(warps),
            barriers: std::array::from_fn(|_| (Clock::default(), Vec::new())),
            objects: HashMap::new(),
            places: HashMap::new(),
        }
    }

    #[inline(always)]
    fn before(&mut self, warp: &Warp, inst: &Inst, site: &Site, mask: u32, active: u32) -> Result<(), Finding> {
        let defined = &mut self.defined[warp.index as usize];
        if self.shared.tainted {
            self.undefined.loaded.clear();
        }
        match &inst.op {
            Op::Store(access) if access.space == Space::Shared => {
                self.undefined.note_store(defined, &access.regs, active);
            }
            Op::Load(access) if self.shared.tainted && access.space == Space::Shared => {
                self.undefined.note_load(&access.regs, None);
            }
            Op::Matrix(matrix) if self.shared.tainted && !matrix.store => {
                self.undefined.note_load(&matrix.regs, Some(matrix.transposed));
            }
            _ => {}
        }
        defined.follow(warp, inst, site, (mask, active))
    }

    #[inline(always)]
    fn exchange(&mut self, warp: &Warp, op: &Op, site: &Site, active: u32) {
        self.defined[warp.index as usize].exchange(warp, op, site, active);
    }

    fn touch(
        &mut self,
        warp: u32,
        touch: &Touch<'_>,
        memory: &[Arc<Allocation>],
        hint: &mut usize,
    ) -> Result<(), Finding> {
        match touch.space {
            Space::Shared => self.touch_shared(warp, touch),
            Space::Local => self.touch_local(warp, touch),
            Space::Global | Space::Const => self.touch_global(warp, touch, memory, hint),
            Space::Param | Space::Generic => Ok(()),
        }
    }

    fn local_written(&mut self, warp: u32, lane: u32, address: u32, bytes: u32) {
        let first = (u64::from(address) - LOCAL_BASE) as usize;
        let written = &mut self.defined[warp as usize].local;
        written[first..first + bytes as usize].iter_mut().for_each(|lanes| *lanes |= 1 << lane);
    }

    fn fence(&mut self, warp: u32, scope: Scope) {
        self.clocks.fence(warp, self.linear, scope);
    }

    fn warp_sync(&mut self, warp: u32, members: u32, live: u32) {
        self.clocks.synchronise(warp, members, live);
    }

    fn barrier_arrive(&mut self, warp: u32, id: u32, waits: bool, whole: bool) {
        let (known, waiting) = &mut self.barriers[id as usize];
        known.join(&self.clocks.warps[warp as usize]);
        if waits {
            waiting.push((warp, whole));
        }
        if waits && whole {
            self.clocks.synchronise(warp, u32::MAX, u32::MAX);
        } else {
            self.clocks.tick(warp);
        }
    }

    fn barrier_complete(&mut self, id: u32) {
        let (known, waiting) = std::mem::take(&mut self.barriers[id as usize]);
        for (warp, whole) in waiting {
            self.clocks.warps[warp as usize].join(&known);
            if !whole {
                // Lanes that came apart are in order from here on.
                self.clocks.synchronise(warp, u32::MAX, u32::MAX);
            }
        }
    }

    fn copy_commit(&mut self, warp: u32, active: u32) {
        let closed = &mut self.copies[warp as usize].closed;
        lanes(active).for_each(|lane| closed[lane] += 1);
    }

    fn copy_wait(&mut self, warp: u32, active: u32, groups: Option<u32>) {
        let Copies { open, closed } = &mut self.copies[warp as usize];
        let (shared, clocks) = (&mut self.shared, &self.clocks);
        open.retain(|copy| {
            let over = groups.is_none_or(|groups| copy.group + groups < closed[copy.lane as usize]);
            let over = over && active >> copy.lane & 1 == 1;
            if over {
                shared.complete(clocks, warp, copy.offset, copy.bytes);
            }
            !over
        });
    }

    fn async_commit(&mut self, warp: u32, active: u32, pipe: Pipe) {
        self.pipes.commit(warp, active, pipe);
        if pipe == Pipe::Product {
            self.defined[warp as usize].close_products();
        }
    }

    fn async_wait(&mut self, warp: u32, active: u32, pipe: Pipe, groups: u32) {
        let over = self.pipes.wait(&mut self.shared, &self.clocks, warp, active, (pipe, groups));
        if pipe == Pipe::Product {
            self.defined[warp as usize].end_products(over);
        }
    }

    fn object_filled(&mut self, _: u32, offset: u64) {
        self.pipes.fill(offset, self.objects.entry(offset).or_default());
    }

    fn object_used(&mut self, by: (u32, u32, u32), offset: u64, how: ObjectUse) -> Result<(), FaultKind> {
        let (warp, lane, pc) = by;
        let knows = self.clocks.view(warp);
        self.shared
            .use_object(&knows, (lane, offset, pc), how)
            .map_err(|(offset, wrong)| self.shared_fault(true, offset + SHARED_BASE, wrong))
    }

    fn object_arrive(&mut self, warp: u32, offset: u64) {
        self.objects.entry(offset).or_default().join(&self.clocks.warps[warp as usize]);
        self.clocks.tick(warp);
    }

    fn product(&mut self, warp: u32, pc: u32) -> Result<(), Finding> {
        self.groups.product(warp, pc)
    }

    fn end(&self) -> Result<(), (Finding, u32, u32)> {
        let copy = || {
            let ((warp, lane, pc), write) = self.pipes.open(&self.clocks)?;
            Some(((FaultKind::OpenCopy { write }, lane), warp, pc))
        };
        self.groups.open().or_else(copy).map_or(Ok(()), Err)
    }

    fn object_wait(&mut self, warp: u32, offset: u64) {
        if let Some(known) = self.objects.get(&offset) {
            self.clocks.warps[warp as usize].join(known);
        }
    }
}

fn visit(touch: &Touch<'_>) -> Visit {
    let strong = touch.kind == TouchKind::Atomic || touch.order != Order::Weak;
    Visit { pc: touch.pc, kind: touch.kind, strong, scope: touch.scope, owns: false, object: None }
}

impl Checker {
    fn party(&self, cta: [u32; 3], (warp, lane): (u32, u32), pc: u32, write: bool) -> Party {
        let line = self.lines.get(pc as usize).copied().unwrap_or(0);
        Party { cta, warp, lane, write, line }
    }

    fn touch_shared(&mut self, warp: u32, touch: &Touch<'_>) -> Result<(), Finding> {
        let mut visit = visit(touch);
        if let TouchKind::AsyncWrite { object } = touch.kind {
            visit.object = Some(self.pipes.write(object, (warp, touch.active.trailing_zeros(), touch.pc)));
        }
        if visit.strong {
            lanes(touch.active).for_each(|lane| self.strong_shared(warp, touch, touch.at[lane]));
        }
        let knows = self.clocks.view(warp);
        for lane in lanes(touch.active) {
            let offset = touch.at[lane] - SHARED_BASE;
            let found = self.shared.visit(&knows, &visit, (lane as u32, offset, touch.bytes));
            if let Err((offset, wrong)) = found {
                return Err((self.shared_fault(touch.kind.writes(), offset + SHARED_BASE, wrong), lane as u32));
            }
        }
        match touch.kind {
            TouchKind::Copy => {
                let Copies { open, closed } = &mut self.copies[warp as usize];
                open.extend(lanes(touch.active).map(|lane| {
                    let offset = touch.at[lane] - SHARED_BASE;
                    Copy { lane: lane as u32, offset, bytes: touch.bytes, group: closed[lane] }
                }));
            }
            TouchKind::AsyncRead(pipe) => {
                for lane in lanes(touch.active) {
                    let (offset, by) = (touch.at[lane] - SHARED_BASE, (warp, lane as u32));
                    self.pipes.read(&mut self.shared, by, pipe, (offset, touch.bytes), touch.pc);
                }
            }
            TouchKind::Write { .. } if self.undefined.any() => self.taint(touch),
            TouchKind::Read if self.shared.tainted => self.spread(warp, touch),
            _ => {}
        }
        Ok(())
    }

    /// Notes what a store takes from undefined registers.
    fn taint(&mut self, touch: &Touch<'_>) {
        let count = self.undefined.stored.len() as u32;
        for (element, undefined) in (0..).zip(&self.undefined.stored) {
            let bytes = touch.bytes / count;
            for lane in lanes(*undefined & touch.active) {
                self.shared.taint(touch.at[lane] - SHARED_BASE + u64::from(element * bytes), bytes);
            }
        }
        self.undefined.stored.clear();
    }

    /// Makes registers undefined that are loaded from what undefined registers left.
    fn spread(&mut self, warp: u32, touch: &Touch<'_>) {
        let Undefined { loaded, count, matrix, .. } = &mut self.undefined;
        let tainted = |lane: usize, skip: u32, bytes: u32| {
            self.shared.is_tainted(touch.at[lane] - SHARED_BASE + u64::from(skip), bytes)
        };
        for (number, reg) in loaded.drain(..).enumerate() {
            let mask = match matrix {
                None => {
                    let bytes = touch.bytes / *count;
                    lanes(touch.active).filter(|lane| tainted(*lane, number as u32 * bytes, bytes)).fold(0, bit)
                }
                Some(transposed) => {
                    let rows = (0..8).filter(|row| tainted(8 * number + row, 0, touch.bytes));
                    rows.fold(0u32, |mask, row| {
                        // A row goes to four lanes, or its elements to a pair's half of all columns.
                        mask | if *transposed { 0x1111_1111 << (row >> 1) } else { 0xf << (4 * row) }
                    })
                }
            };
            self.defined[warp as usize].forget(reg, mask);
        }
    }

    fn shared_fault(&self, write: bool, address: u64, wrong: Wrong) -> FaultKind {
        let space = Space::Shared;
        match wrong {
            Wrong::Object(stamp) => {
                FaultKind::LiveObject { address, write, other: self.party(self.id, stamp.by(), stamp.pc, true) }
            }
            Wrong::Unwritten => FaultKind::Uninitialised { space, address },
            Wrong::Race(stamp, other) => match self.pipes.starter(stamp.warp) {
                // A bulk copy that the barrier object did not tell of.
                Some(by) => FaultKind::PendingCopy { address, write, other: self.party(self.id, by, stamp.pc, true) },
                None => {
                    let other = self.party(self.id, stamp.by(), stamp.pc, other);
                    FaultKind::Race { space, address, write, other }
                }
            },
            Wrong::Pending(stamp) => {
                FaultKind::PendingCopy { address, write, other: self.party(self.id, stamp.by(), stamp.pc, true) }
            }
            Wrong::Held => {
                let (warp, lane, pc) = self.pipes.reader(address - SHARED_BASE, 1).unwrap_or_default();
                FaultKind::PendingRead { address, other: self.party(self.id, (warp, lane), pc, false) }
            }
        }
    }

    fn touch_local(&mut self, warp: u32, touch: &Touch<'_>) -> Result<(), Finding> {
        let written = &mut self.defined[warp as usize].local;
        for lane in lanes(touch.active) {
            let first = (touch.at[lane] - LOCAL_BASE) as usize;
            for (at, bytes) in written[first..first + touch.bytes as usize].iter_mut().enumerate() {
                if touch.kind != TouchKind::Read {
                    *bytes |= 1 << lane;
                } else if *bytes >> lane & 1 == 0 {
                    let address = touch.at[lane] + at as u64;
                    return Err((FaultKind::Uninitialised { space: Space::Local, address }, lane as u32));
                }
            }
        }
        Ok(())
    }

    fn touch_global(
        &mut self,
        warp: u32,
        touch: &Touch<'_>,
        memory: &[Arc<Allocation>],
        hint: &mut usize,
    ) -> Result<(), Finding> {
        let reads = matches!(touch.kind, TouchKind::Read | TouchKind::Atomic);
        let mut writable = false;
        for lane in lanes(touch.active) {
            // An address out of bounds is the executor's to report.
            let Some(found) = find(memory, hint, touch.at[lane], u64::from(touch.bytes)) else { return Ok(()) };
            writable |= !found.read_only;
            let offset = touch.at[lane] - found.base;
            if reads && !found.is_written(offset, u64::from(touch.bytes)) {
                let first = (0..u64::from(touch.bytes)).find(|at| !found.is_written(offset + at, 1)).unwrap_or(0);
                let address = touch.at[lane] + first;
                return Err((FaultKind::Uninitialised { space: Space::Global, address }, lane as u32));
            }
        }
        if !writable {
            return Ok(());
        }
        if touch.kind == TouchKind::Atomic || touch.order != Order::Weak {
            lanes(touch.active).for_each(|lane| self.strong_global(warp, touch, touch.at[lane]));
        }
        let visits = lanes(touch.active).map(|lane| (lane as u32, touch.at[lane]));
        let view = View { cta: self.linear, knows: self.clocks.view(warp), visit: visit(touch) };
        self.global.visit(&view, visits, touch.bytes).map_err(|(lane, address, (stamp, write))| {
            let [gx, gy, _] = self.grid;
            let cta = [stamp.cta % gx, stamp.cta / gx % gy, stamp.cta / gx / gy];
            let other = self.party(cta, (u32::from(stamp.warp), u32::from(stamp.lane)), stamp.pc, write);
            let write = touch.kind.writes();
            (FaultKind::Race { space: Space::Global, address, write, other }, lane)
        })
    }

    /// What a strong access learns from a place and leaves there.
    fn strong_global(&mut self, warp: u32, touch: &Touch<'_>, address: u64) {
        if let (true, Some(known)) = (reads(touch), self.global.public(address)) {
            self.learn(warp, touch, &known);
        }
        if let Some(left) = self.leaves(warp, touch) {
            let (cta, replaces) = (self.linear, !reads(touch));
            self.global.publish(address, |public| change(public, cta, &left, replaces));
            self.clocks.tick(warp);
        }
    }

    fn strong_shared(&mut self, warp: u32, touch: &Touch<'_>, address: u64) {
        if let (true, Some(known)) = (reads(touch), self.places.get(&address).cloned()) {
            self.learn(warp, touch, &known);
        }
        if let Some(left) = self.leaves(warp, touch) {
            change(self.places.entry(address).or_default(), self.linear, &left, !reads(touch));
            self.clocks.tick(warp);
        }
    }

    fn learn(&mut self, warp: u32, touch: &Touch<'_>, known: &Public) {
        if matches!(touch.order, Order::Acquire | Order::AcquireRelease) {
            self.clocks.warps[warp as usize].join_public(self.linear, known, touch.scope);
        } else {
            self.clocks.saw(warp, self.linear, known, touch.scope);
        }
    }

    /// What an access publishes, if it writes.
    fn leaves(&self, warp: u32, touch: &Touch<'_>) -> Option<Left> {
        match (touch.kind, touch.order) {
            (TouchKind::Read | TouchKind::Copy, _) => None,
            (_, Order::Release | Order::AcquireRelease) => Some(self.clocks.released(warp, touch.scope)),
            _ => self.clocks.published(warp, touch.scope),
        }
    }
}

fn reads(touch: &Touch<'_>) -> bool {
    matches!(touch.kind, TouchKind::Read | TouchKind::Atomic)
}

/// A plain write begins anew what is known at a place; an atomic adds to it.
fn change(public: &mut Public, cta: u32, left: &Left, replaces: bool) {
    if replaces {
        *public = Public::default();
    }
    public.join(cta, left);
}
