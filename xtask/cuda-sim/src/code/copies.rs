//! Asynchronous copies and barrier objects.

use super::{Atomic, AtomicOp, Place};
use crate::exec::regs::Reg;

/// `cp.async`.
#[derive(Clone, Debug)]
pub struct CopyAsync {
    /// Shared destination.
    pub dst: Place,
    /// Global source.
    pub src: Place,
    /// Bytes written.
    pub bytes: u32,
    /// Bytes read; the rest is zero.
    pub src_bytes: Option<Reg>,
    /// Lanes that read nothing (`row << 1 | negated`).
    pub ignore: Option<u32>,
}

/// A bulk copy, by one thread.
#[derive(Clone, Debug)]
pub enum Bulk {
    /// Global to shared memory; completes bytes of a barrier object.
    Load {
        /// Shared destination.
        dst: Place,
        /// Global source.
        src: Place,
        /// Bytes.
        bytes: Reg,
        /// The barrier object.
        object: Place,
    },
    /// Shared to global memory, perhaps combined with what is there.
    Store {
        /// Global destination.
        dst: Place,
        /// Shared source.
        src: Place,
        /// Bytes.
        bytes: Reg,
        /// How it is combined.
        reduce: Option<Box<Atomic>>,
    },
    /// A tile of a tensor to shared memory; completes bytes of a barrier object.
    LoadTile {
        /// Shared destination.
        dst: Place,
        /// Generic address of the tensor map.
        map: Place,
        /// Coordinates, the innermost first.
        at: Box<[Reg]>,
        /// The barrier object.
        object: Place,
    },
    /// A tile of shared memory to a tensor, perhaps combined with what is there.
    StoreTile {
        /// Shared source.
        src: Place,
        /// Generic address of the tensor map.
        map: Place,
        /// Coordinates, the innermost first.
        at: Box<[Reg]>,
        /// How it is combined.
        reduce: Option<AtomicOp>,
    },
}

/// What an `mbarrier` instruction does.
#[derive(Clone, Debug)]
pub enum Mbarrier {
    /// Sets the number of expected arrivals.
    Init {
        /// The barrier.
        place: Place,
        /// Arrivals.
        count: Reg,
    },
    /// Ends the barrier's life.
    Invalidate {
        /// The barrier.
        place: Place,
    },
    /// Expects bytes.
    Expect {
        /// The barrier.
        place: Place,
        /// Bytes.
        bytes: Reg,
    },
    /// Completes bytes.
    Complete {
        /// The barrier.
        place: Place,
        /// Bytes.
        bytes: Reg,
    },
    /// Arrives.
    Arrive {
        /// The barrier.
        place: Place,
        /// The phase's state before.
        state: Option<Reg>,
        /// Bytes expected with the arrival.
        bytes: Option<Reg>,
        /// Arrivals; 1 if none.
        count: Option<Reg>,
    },
    /// Asks whether a phase is over.
    Test {
        /// The barrier.
        place: Place,
        /// The answer.
        done: Reg,
        /// The phase: a state, or a parity.
        phase: Reg,
        /// The phase is a parity.
        parity: bool,
        /// May wait (`try_wait`).
        waits: bool,
    },
    /// Arrives when the thread's `cp.async` operations are over.
    CopyArrive {
        /// The barrier.
        place: Place,
        /// Does not count as a pending arrival of its own.
        noinc: bool,
    },
}

impl Mbarrier {
    /// Where the object is.
    pub fn place(&self) -> &Place {
        match self {
            Self::Init { place, .. }
            | Self::Invalidate { place }
            | Self::Expect { place, .. }
            | Self::Complete { place, .. }
            | Self::Arrive { place, .. }
            | Self::Test { place, .. }
            | Self::CopyArrive { place, .. } => place,
        }
    }
}
