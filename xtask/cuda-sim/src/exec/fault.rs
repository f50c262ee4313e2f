//! What a kernel did wrong, and where.

use crate::ptx::{Location, Space};
use std::fmt;
use std::sync::Arc;

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// An access outside every allocation or variable.
    OutOfBounds {
        /// The space.
        space: Space,
        /// The address.
        address: u64,
        /// Bytes.
        bytes: u32,
        /// Whether it writes.
        write: bool,
    },
    /// An address that is no multiple of the access's size.
    Misaligned {
        /// The space.
        space: Space,
        /// The address.
        address: u64,
        /// Bytes.
        bytes: u32,
    },
    /// A read of memory that nobody wrote.
    Uninitialised {
        /// The space.
        space: Space,
        /// The address.
        address: u64,
    },
    /// A read of a register that nobody wrote.
    UninitialisedRegister,
    /// Two accesses without an order, one of them a write.
    Race {
        /// The space.
        space: Space,
        /// The address.
        address: u64,
        /// Whether this access writes.
        write: bool,
        /// The other access.
        other: Party,
    },
    /// An access to the destination of a copy that is not known to be complete.
    PendingCopy {
        /// The address.
        address: u64,
        /// Whether this access writes.
        write: bool,
        /// Who started the copy.
        other: Party,
    },
    /// A write to what a bulk copy or a product may still read.
    PendingRead {
        /// The address.
        address: u64,
        /// Who started it.
        other: Party,
    },
    /// An access that is none of a barrier object's own to one that lives.
    LiveObject {
        /// The address.
        address: u64,
        /// Whether this access writes.
        write: bool,
        /// Who initialised the object.
        other: Party,
    },
    /// A CTA that ends while a bulk copy still reads or writes its shared memory.
    OpenCopy {
        /// Whether the copy writes shared memory.
        write: bool,
    },
    /// A use of a register of a product that was not waited for.
    PendingProduct,
    /// A warp of the warpgroup that does not execute this product with the others.
    DivergentProduct {
        /// The warp.
        warp: u32,
    },
    /// Lanes that a collective waits for cannot come.
    DivergentCollective {
        /// The lanes that are missing.
        missing: u32,
    },
    /// A barrier that cannot complete.
    Deadlock {
        /// What is waited for.
        what: String,
    },
    /// An operand without a meaning.
    BadOperand {
        /// What is wrong.
        what: String,
    },
    /// `trap`.
    Trap,
    /// A failed assertion.
    Assert {
        /// Its message.
        message: String,
    },
    /// More operations than the launch may take.
    Budget {
        /// Operations of a CTA.
        operations: u64,
    },
}

/// What went wrong and on which lane.
pub type Finding = (FaultKind, u32);

/// The other party of a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Party {
    /// Its CTA.
    pub cta: [u32; 3],
    /// Its warp.
    pub warp: u32,
    /// Its lane.
    pub lane: u32,
    /// Whether it writes.
    pub write: bool,
    /// Line of its PTX, 0 if not known.
    pub line: u32,
}

/// A fault and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What.
    pub kind: FaultKind,
    /// The kernel.
    pub kernel: String,
    /// Line of the PTX.
    pub line: u32,
    /// The opcode.
    pub opcode: Arc<str>,
    /// Line of the source.
    pub location: Option<Location>,
    /// The source file of that line.
    pub file: Option<String>,
    /// The CTA.
    pub cta: [u32; 3],
    /// The warp.
    pub warp: u32,
    /// The lane.
    pub lane: u32,
}

fn space_name(space: Space) -> &'static str {
    match space {
        Space::Generic => "generic",
        Space::Global => "global",
        Space::Shared => "shared",
        Space::Local => "local",
        Space::Const => "constant",
        Space::Param => "parameter",
    }
}

fn verb(write: bool) -> &'static str {
    if write { "write" } else { "read" }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.cta;
        let kind = verb(self.write);
        write!(f, "{kind} by CTA ({x}, {y}, {z}), warp {}, lane {}", self.warp, self.lane)?;
        if self.line > 0 { write!(f, " at PTX line {}", self.line) } else { Ok(()) }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfBounds { space, address, bytes, write } => {
                write!(
                    f,
                    "{} memory: {} of {bytes} bytes at {address:#x} is out of bounds",
                    space_name(*space),
                    verb(*write)
                )
            }
            Self::Misaligned { space, address, bytes } => {
                write!(f, "{} memory: {address:#x} is no multiple of {bytes}", space_name(*space))
            }
            Self::Uninitialised { space, address } => {
                write!(f, "{} memory: {address:#x} is read, but was never written", space_name(*space))
            }
            Self::UninitialisedRegister => f.write_str("a register is read that was never written"),
            Self::Race { space, address, write, other } => {
                write!(f, "race in {} memory at {address:#x}: this {} and a {other}", space_name(*space), verb(*write))
            }
            Self::PendingCopy { address, write, other } => {
                let kind = verb(*write);
                write!(f, "shared memory: {kind} at {address:#x} while a copy into it is pending: {other}")
            }
            Self::PendingRead { address, other } => {
                write!(f, "shared memory: write at {address:#x} while an asynchronous read of it is pending: {other}")
            }
            Self::LiveObject { address, write, other } => {
                let kind = verb(*write);
                write!(f, "shared memory: {kind} at {address:#x}, where a barrier object lives: {other}")
            }
            Self::OpenCopy { write } => {
                let kind = verb(*write);
                write!(f, "the CTA ends, and nobody waited for this copy's {kind} of its shared memory")
            }
            Self::PendingProduct => f.write_str("a register of a wgmma is used before the wait for its group"),
            Self::DivergentProduct { warp } => {
                write!(f, "the four warps of the warpgroup must execute this, and warp {warp} does not in its place")
            }
            Self::DivergentCollective { missing } => {
                write!(f, "lanes that this instruction waits for cannot reach it: mask {missing:#010x}")
            }
            Self::Deadlock { what } => write!(f, "deadlock: {what}"),
            Self::BadOperand { what } => f.write_str(what),
            Self::Trap => f.write_str("trap"),
            Self::Assert { message } => write!(f, "assertion failed: {message}"),
            Self::Budget { operations } => write!(f, "no end after {operations} operations of a CTA"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.cta;
        writeln!(f, "{}", self.kind)?;
        write!(f, "  kernel {}, PTX line {}: {}", self.kernel, self.line, self.opcode)?;
        if let (Some(file), Some(location)) = (&self.file, self.location) {
            write!(f, "\n  source {file}:{}", location.line)?;
        }
        write!(f, "\n  CTA ({x}, {y}, {z}), warp {}, lane {}", self.warp, self.lane)
    }
}

impl std::error::Error for Fault {}
