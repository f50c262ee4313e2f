//! What works by itself: bulk copies and products. Their reads of shared memory are over when their group was waited for;
//! the writes of bulk copies are known to those who waited for the barrier object.

use super::clock::{Clock, Clocks};
use super::shared::SharedShadow;
use crate::code::Pipe;
use crate::exec::warp::lanes;
use std::collections::HashMap;

/// Numbers of warps that stand for barrier objects, and that a stamp can hold.
const LAST: u32 = 255;

/// A read that is not over.
#[derive(Clone, Copy, Debug)]
struct Read {
    pipe: Pipe,
    lane: u32,
    offset: u64,
    bytes: u32,
    group: u32,
    pc: u32,
}

/// The pipes of a warp.
#[derive(Clone, Debug, Default)]
struct Reads {
    open: Vec<Read>,
    /// Groups that each lane closed, of bulk copies and of products.
    closed: [[u32; 32]; 2],
}

/// The pipes of a CTA.
#[derive(Debug)]
pub struct Pipes {
    warps: Vec<Reads>,
    /// The numbers of barrier objects among the warps of a clock.
    objects: HashMap<u64, u32>,
    /// Times of these, and who started the last copy.
    times: Vec<(u32, By)>,
}

/// Who started something: warp, lane and operation.
type By = (u32, u32, u32);

impl Pipes {
    /// Pipes of so many warps.
    pub fn new(warps: usize) -> Self {
        Self { warps: vec![Reads::default(); warps], objects: HashMap::new(), times: Vec::new() }
    }

    fn group(&self, warp: u32, lane: u32, pipe: Pipe) -> u32 {
        self.warps[warp as usize].closed[pipe as usize][lane as usize]
    }

    /// A read begins.
    pub fn read(
        &mut self,
        shared: &mut SharedShadow,
        (warp, lane): (u32, u32),
        pipe: Pipe,
        (offset, bytes): (u64, u32),
        pc: u32,
    ) {
        // A product's groups are its warp's; the lanes of its pieces mean nothing.
        let lane = if pipe == Pipe::Product { 0 } else { lane };
        let group = self.group(warp, lane, pipe);
        self.warps[warp as usize].open.push(Read { pipe, lane, offset, bytes, group, pc });
        shared.hold(offset, bytes);
    }

    /// Lanes close a group.
    pub fn commit(&mut self, warp: u32, active: u32, pipe: Pipe) {
        let closed = &mut self.warps[warp as usize].closed[pipe as usize];
        lanes(active).for_each(|lane| closed[lane] += 1);
    }

    /// Lanes wait for all but so many groups: reads of the others are over now. Gives the groups of lane 0 that are over.
    pub fn wait(
        &mut self,
        shared: &mut SharedShadow,
        clocks: &Clocks,
        warp: u32,
        active: u32,
        (pipe, groups): (Pipe, u32),
    ) -> u32 {
        let Reads { open, closed } = &mut self.warps[warp as usize];
        let closed = &closed[pipe as usize];
        open.retain(|read| {
            let over =
                read.pipe == pipe && active >> read.lane & 1 == 1 && read.group + groups < closed[read.lane as usize];
            if over {
                shared.release(&clocks.view(warp), (read.lane, read.offset, read.bytes), read.pc);
            }
            !over
        });
        closed[0].saturating_sub(groups)
    }

    /// Who reads bytes at an offset: warp, lane and operation.
    pub fn reader(&self, offset: u64, bytes: u32) -> Option<By> {
        let overlaps =
            |read: &&Read| read.offset < offset + u64::from(bytes) && offset < read.offset + u64::from(read.bytes);
        (0..)
            .zip(&self.warps)
            .find_map(|(warp, reads)| reads.open.iter().find(overlaps).map(|read| (warp, read.lane, read.pc)))
    }

    /// The number and time of a write that a barrier object completes.
    pub fn write(&mut self, object: u64, by: By) -> (u8, u32) {
        let first = self.warps.len() as u32;
        let next = self.objects.len() as u32;
        let number = *self.objects.entry(object).or_insert(first + next % (LAST - first));
        let at = (number - first) as usize;
        if self.times.len() <= at {
            self.times.resize(at + 1, (0, by));
        }
        let time = self.times[at].0 + 1;
        self.times[at] = (time, by);
        (number as u8, time)
    }

    /// A copy is complete: what it wrote is known at its object.
    pub fn fill(&self, object: u64, known: &mut Clock) {
        let Some(number) = self.objects.get(&object) else { return };
        let number = *number as usize;
        if known.own.len() <= number {
            known.own.resize(number + 1, 0);
        }
        known.own[number] = known.own[number].max(self.times[number - self.warps.len()].0);
    }

    /// Who started the copies of a number that stands for a barrier object.
    pub fn starter(&self, number: u8) -> Option<(u32, u32)> {
        let at = usize::from(number).checked_sub(self.warps.len())?;
        self.times.get(at).map(|(_, (warp, lane, _))| (*warp, *lane))
    }

    /// A bulk copy that no warp waited for, and whether it writes shared memory. What a warp waits for is over before it
    /// ends; shared memory may be another CTA's when the last one has.
    pub fn open(&self, clocks: &Clocks) -> Option<(By, bool)> {
        let read = (0..).zip(&self.warps).find_map(|(warp, reads)| {
            let read = reads.open.iter().find(|read| read.pipe == Pipe::Bulk)?;
            Some(((warp, read.lane, read.pc), false))
        });
        read.or_else(|| {
            let numbered = (self.warps.len()..).zip(&self.times);
            let known = |number: usize| clocks.warps.iter().filter_map(|clock| clock.own.get(number)).max();
            let mut open = numbered.filter(|(number, (time, _))| known(*number).is_none_or(|known| known < time));
            open.next().map(|(_, (_, by))| (*by, true))
        })
    }
}
