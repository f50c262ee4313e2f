//! Vector clocks: what each warp knows to have happened.

use crate::code::Scope;
use std::collections::BTreeMap;

/// Times of all warps that a warp knows: those of its own CTA, and of others that it heard of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// Warps of the own CTA.
    pub own: Vec<u32>,
    /// Warps of other CTAs.
    pub others: BTreeMap<u32, Vec<u32>>,
}

fn join_times(to: &mut Vec<u32>, from: &[u32]) {
    if to.len() < from.len() {
        to.resize(from.len(), 0);
    }
    for (to, from) in to.iter_mut().zip(from) {
        *to = (*to).max(*from);
    }
}

impl Clock {
    /// Learns what another warp of the CTA knows.
    pub fn join(&mut self, other: &Self) {
        join_times(&mut self.own, &other.own);
        for (cta, times) in &other.others {
            join_times(self.others.entry(*cta).or_default(), times);
        }
    }

    /// Learns what was left at a place that all CTAs see, for an access of a scope by a warp of a CTA.
    pub fn join_public(&mut self, cta: u32, public: &Public, scope: Scope) {
        if let Some(within) = public.within.get(&cta) {
            self.join(within);
        }
        if scope == Scope::Device {
            for (other, times) in &public.times {
                let to = if *other == cta { &mut self.own } else { self.others.entry(*other).or_default() };
                join_times(to, times);
            }
        }
    }
}

/// What a strong write leaves at its place: for its own CTA, and for others.
#[derive(Clone, Debug)]
pub struct Left {
    within: Clock,
    others: Option<Clock>,
}

/// What is known at a place that all CTAs see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Public {
    /// By accesses of the device's scope.
    times: BTreeMap<u32, Vec<u32>>,
    /// What warps of a CTA left for each other.
    within: BTreeMap<u32, Clock>,
}

impl Public {
    /// Adds what a warp of a CTA leaves.
    pub fn join(&mut self, cta: u32, left: &Left) {
        self.within.entry(cta).or_default().join(&left.within);
        if let Some(clock) = &left.others {
            join_times(self.times.entry(cta).or_default(), &clock.own);
            for (other, times) in &clock.others {
                join_times(self.times.entry(*other).or_default(), times);
            }
        }
    }
}

/// The clocks of a CTA's warps, and the order of lanes within each.
#[derive(Debug)]
pub struct Clocks {
    /// What each warp knows; its own entry is its time.
    pub warps: Vec<Clock>,
    /// The time up to which all lanes of a warp are in order.
    full: Vec<u32>,
    /// The same for pairs of lanes, where only some synchronised.
    pairs: Vec<Option<Box<[[u32; 32]; 32]>>>,
    /// What a warp's last fence covers, and its last one for other CTAs.
    fenced: Vec<(Option<Clock>, Option<Clock>)>,
    /// What relaxed reads saw: known after a fence.
    seen: Vec<Public>,
}

impl Clocks {
    /// Clocks of so many warps.
    pub fn new(warps: usize) -> Self {
        let clock = |warp: usize| {
            let mut own = vec![0; warps];
            own[warp] = 1;
            Clock { own, others: BTreeMap::new() }
        };
        Self {
            warps: (0..warps).map(clock).collect(),
            full: vec![0; warps],
            pairs: vec![None; warps],
            fenced: vec![(None, None); warps],
            seen: vec![Public::default(); warps],
        }
    }

    /// A warp's time.
    #[inline(always)]
    pub fn time(&self, warp: u32) -> u32 {
        self.warps[warp as usize].own[warp as usize]
    }

    /// What a warp did so far can be told from what it does next.
    pub fn tick(&mut self, warp: u32) {
        self.warps[warp as usize].own[warp as usize] += 1;
    }

    /// What a warp knows now.
    #[inline(always)]
    pub fn view(&self, warp: u32) -> Knows<'_> {
        let at = warp as usize;
        let Clock { own, others } = &self.warps[at];
        Knows { warp, time: own[at], own, others, full: self.full[at], pairs: self.pairs[at].as_deref() }
    }

    /// Lanes of a warp synchronise.
    pub fn synchronise(&mut self, warp: u32, members: u32, live: u32) {
        self.tick(warp);
        let now = self.time(warp);
        if members & live == live {
            self.full[warp as usize] = now;
            return;
        }
        let pairs = self.pairs[warp as usize].get_or_insert_with(|| Box::new([[0; 32]; 32]));
        for a in (0..32).filter(|lane| members >> lane & 1 == 1) {
            for b in (0..32).filter(|lane| members >> lane & 1 == 1) {
                pairs[a][b] = now;
            }
        }
    }

    /// A fence: what came before may be published by relaxed writes, and what relaxed reads saw is known.
    pub fn fence(&mut self, warp: u32, cta: u32, scope: Scope) {
        let (clock, seen) = (&mut self.warps[warp as usize], &mut self.seen[warp as usize]);
        clock.join_public(cta, seen, scope);
        let fenced = &mut self.fenced[warp as usize];
        fenced.0 = Some(clock.clone());
        if scope == Scope::Device {
            fenced.1 = Some(clock.clone());
            *seen = Public::default();
        }
        self.tick(warp);
    }

    /// What a release of a warp leaves.
    pub fn released(&self, warp: u32, scope: Scope) -> Left {
        let clock = &self.warps[warp as usize];
        Left { within: clock.clone(), others: (scope == Scope::Device).then(|| clock.clone()) }
    }

    /// What a relaxed write of a warp publishes.
    pub fn published(&self, warp: u32, scope: Scope) -> Option<Left> {
        let (within, others) = &self.fenced[warp as usize];
        let others = others.as_ref().filter(|_| scope == Scope::Device);
        within.as_ref().map(|within| Left { within: within.clone(), others: others.cloned() })
    }

    /// A relaxed read of a warp of a CTA saw this.
    pub fn saw(&mut self, warp: u32, cta: u32, public: &Public, scope: Scope) {
        let seen = &mut self.seen[warp as usize];
        if let Some(within) = public.within.get(&cta) {
            seen.within.entry(cta).or_default().join(within);
        }
        if scope == Scope::Device {
            for (cta, times) in &public.times {
                join_times(seen.times.entry(*cta).or_default(), times);
            }
        }
    }
}

/// What a warp knows at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Knows<'c> {
    /// The warp.
    pub warp: u32,
    /// Its time.
    pub time: u32,
    own: &'c [u32],
    others: &'c BTreeMap<u32, Vec<u32>>,
    full: u32,
    pairs: Option<&'c [[u32; 32]; 32]>,
}

impl Knows<'_> {
    /// Whether an access of a lane of the CTA at a time comes before what another lane of this warp does now.
    #[inline(always)]
    pub fn ordered(&self, lane: u32, (other, other_lane): (u32, u32), time: u32) -> bool {
        if self.warp != other {
            return self.own.get(other as usize).is_some_and(|known| *known >= time);
        }
        if lane == other_lane || time < self.full {
            return true;
        }
        self.pairs.is_some_and(|pairs| time < pairs[lane as usize][other_lane as usize])
    }

    /// The same for an access of another CTA's warp.
    pub fn ordered_elsewhere(&self, cta: u32, warp: u32, time: u32) -> bool {
        let known = self.others.get(&cta).and_then(|times| times.get(warp as usize));
        known.is_some_and(|known| *known >= time)
    }
}
