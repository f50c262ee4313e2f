//! `cp.async` that lands as late as its waits allow: what a kernel reads too early is then not there.

use super::warp::lanes;

/// A copy whose bytes are read, but not yet written.
#[derive(Clone, Copy, Debug)]
struct Copy {
    lane: u32,
    group: u32,
    /// Its place in shared memory, in words.
    to: usize,
    words: usize,
    data: [u32; 4],
}

/// Copies of a warp.
#[derive(Clone, Debug, Default)]
pub struct Late {
    /// Copies of this warp wait; else they land at once.
    pub waits: bool,
    open: Vec<Copy>,
    /// Groups that each lane closed.
    closed: [u32; 32],
}

impl Late {
    /// Starts a copy of a lane.
    #[inline(always)]
    pub fn copy(&mut self, lane: usize, to: usize, data: &[u32], shared: &mut [u32]) {
        if !self.waits {
            shared[to..][..data.len()].copy_from_slice(data);
            return;
        }
        let mut kept = [0; 4];
        kept[..data.len()].copy_from_slice(data);
        let group = self.closed[lane];
        self.open.push(Copy { lane: lane as u32, group, to, words: data.len(), data: kept });
    }

    /// Lanes close their groups.
    pub fn commit(&mut self, active: u32) {
        if self.waits {
            lanes(active).for_each(|lane| self.closed[lane] += 1);
        }
    }

    /// Lanes wait for all but so many groups, or for all copies: these land.
    pub fn land(&mut self, active: u32, groups: Option<u32>, shared: &mut [u32]) {
        let closed = &self.closed;
        self.open.retain(|copy| {
            let over = groups.is_none_or(|groups| copy.group + groups < closed[copy.lane as usize]);
            let over = over && active >> copy.lane & 1 == 1;
            if over {
                shared[copy.to..][..copy.words].copy_from_slice(&copy.data[..copy.words]);
            }
            !over
        });
    }
}
