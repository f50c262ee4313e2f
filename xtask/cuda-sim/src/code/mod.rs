//! The lowered form of a kernel: one compact operation an instruction, registers as rows.

mod copies;
mod tensor;

pub use copies::{Bulk, CopyAsync, Mbarrier};
pub use tensor::{Accumulator, Element, Left, Matrix, Mma, Wgmma};

use crate::exec::regs::{AluFn, Reg};
use crate::ptx::{Location, Space};
use std::sync::Arc;

/// A kernel, ready to run.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Operations.
    pub code: Vec<Inst>,
    /// Where each operation comes from, and its registers.
    pub sites: Vec<Site>,
    /// Rows of the three register files: words, doubles, predicates.
    pub rows: [u32; 3],
    /// Rows that hold a constant.
    pub constants: Vec<(Reg, u64)>,
    /// Rows that hold a special register.
    pub specials: Vec<(Reg, Special)>,
    /// Bytes of static shared memory.
    pub shared_bytes: u32,
    /// Bytes of local memory a thread.
    pub local_bytes: u32,
    /// Offset, bytes of each parameter.
    pub params: Vec<(u32, u32)>,
    /// Bytes of all parameters.
    pub param_bytes: u32,
    /// The most threads of a CTA.
    pub max_threads: Option<u32>,
    /// The exact shape of a CTA.
    pub required_threads: Option<[u32; 3]>,
    /// The narrowest accesses.
    pub narrowest: Narrowest,
    /// Registers that the source declares, a rough measure where no assembler says.
    pub declared_registers: u32,
    /// Source files of `.loc`.
    pub files: Arc<Vec<(u32, String)>>,
}

/// The narrowest accesses of a kernel, in bytes: no finer does a checker need to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Narrowest {
    /// To shared memory.
    pub shared: u32,
    /// To global memory.
    pub global: u32,
}

/// Where an operation comes from and which registers it touches.
#[derive(Clone, Debug)]
pub struct Site {
    /// Line of the PTX.
    pub line: u32,
    /// The first operation of its instruction.
    pub first: bool,
    /// Opcode with modifiers.
    pub opcode: Arc<str>,
    /// Line of the source.
    pub location: Option<Location>,
    /// Registers read.
    pub reads: Box<[Reg]>,
    /// Registers written.
    pub writes: Box<[Reg]>,
}

/// An operation and the lanes that run it.
#[derive(Clone, Debug)]
pub struct Inst {
    /// `row << 1 | negated`, or [`Inst::ALWAYS`].
    pub guard: u32,
    /// What it does.
    pub op: Op,
}

impl Inst {
    /// A guard that holds everywhere.
    pub const ALWAYS: u32 = u32::MAX;
}

/// A special register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    /// `%tid`
    Tid(u8),
    /// `%ntid`
    Ntid(u8),
    /// `%ctaid`
    Ctaid(u8),
    /// `%nctaid`
    Nctaid(u8),
    /// `%laneid`
    Lane,
    /// `%warpid`
    Warp,
    /// `%nwarpid`
    Warps,
    /// `%smid`
    Sm,
    /// `%nsmid`
    Sms,
    /// `%gridid`
    Grid,
    /// `%lanemask_eq`, `_lt`, `_le`, `_gt`, `_ge`
    LaneMask(MaskKind),
    /// `%dynamic_smem_size`
    DynamicShared,
    /// `%total_smem_size`
    TotalShared,
    /// A constant: clusters hold one CTA.
    Fixed(u32),
}

/// Which lanes a lane mask names, against the lane's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MaskKind {
    /// The same.
    Equal,
    /// Lower.
    Below,
    /// Lower or the same.
    UpTo,
    /// Higher.
    Above,
    /// Higher or the same.
    From,
}

/// An address: a register, if any, and an offset.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The register.
    pub base: Option<Reg>,
    /// Bytes added.
    pub offset: i64,
}

/// A load or a store.
#[derive(Clone, Debug)]
pub struct Access {
    /// The space.
    pub space: Space,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub bytes: u32,
    /// Sign-extend elements.
    pub signed: bool,
    /// Bits of the registers: 16, 32 or 64.
    pub width: u32,
    /// Registers in order.
    pub regs: Box<[Reg]>,
    /// Where.
    pub place: Place,
    /// Ordering.
    pub order: Order,
    /// Whom it is ordered for.
    pub scope: Scope,
}

/// What an access promises about order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Nothing.
    Weak,
    /// No tearing, no order (`.volatile`, `.relaxed`).
    Relaxed,
    /// Later accesses stay behind it.
    Acquire,
    /// Earlier accesses stay before it.
    Release,
    /// Both.
    AcquireRelease,
}

/// Who an ordered access or a fence is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Threads of the CTA, and of its cluster, which holds no other.
    Cta,
    /// Threads of all CTAs.
    Device,
}

/// What an atomic does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOp {
    /// Bits.
    And,
    /// Bits.
    Or,
    /// Bits.
    Xor,
    /// Exchange.
    Exchange,
    /// Compare and exchange.
    CompareExchange,
    /// Addition.
    Add,
    /// Up to a bound, then 0.
    Inc,
    /// Down to 0, then a bound.
    Dec,
    /// The smaller.
    Min,
    /// The larger.
    Max,
}

/// What an atomic's bits mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicType {
    /// Unsigned or plain bits.
    Unsigned,
    /// Signed.
    Signed,
    /// f16, f32 or f64 by width.
    Float,
    /// f16x2.
    HalfPair,
    /// bf16.
    Brain,
    /// bf16x2.
    BrainPair,
}

/// `atom` or `red`.
#[derive(Clone, Debug)]
pub struct Atomic {
    /// The space.
    pub space: Space,
    /// The function.
    pub op: AtomicOp,
    /// The type.
    pub ty: AtomicType,
    /// Bytes: 2, 4 or 8.
    pub bytes: u32,
    /// The old value's registers; none for `red`.
    pub dst: Box<[Reg]>,
    /// Where.
    pub place: Place,
    /// Operands, one an element.
    pub src: Box<[Reg]>,
    /// What is exchanged for, with `cas`.
    pub swap: Option<Reg>,
    /// Ordering.
    pub order: Order,
    /// Whom it is ordered for.
    pub scope: Scope,
    /// Flush subnormal results (f32 in global memory).
    pub flush: bool,
}

impl Atomic {
    /// One without operands: what a bulk reduction does to each element.
    pub fn of_elements(op: AtomicOp, ty: AtomicType, bytes: u32) -> Self {
        Self {
            space: Space::Global,
            op,
            ty,
            bytes,
            dst: Box::new([]),
            place: Place { base: None, offset: 0 },
            src: Box::new([]),
            swap: None,
            order: Order::Relaxed,
            scope: Scope::Device,
            flush: false,
        }
    }
}

/// How a shuffle picks its source lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShuffleMode {
    /// Lower lanes.
    Up,
    /// Higher lanes.
    Down,
    /// Exclusive or.
    Butterfly,
    /// A given lane.
    Index,
}

/// What a vote or a reduction over predicates computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VoteMode {
    /// All lanes.
    All,
    /// Any lane.
    Any,
    /// All lanes alike.
    Uniform,
    /// A mask of lanes.
    Ballot,
}

/// What a reduction over lanes computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduxOp {
    /// Sum.
    Add,
    /// The smaller, unsigned.
    MinUnsigned,
    /// The larger, unsigned.
    MaxUnsigned,
    /// The smaller, signed.
    MinSigned,
    /// The larger, signed.
    MaxSigned,
    /// Bits.
    And,
    /// Bits.
    Or,
    /// Bits.
    Xor,
}

/// What a barrier does beyond waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarrierKind {
    /// Arrive and wait.
    Sync,
    /// Arrive only.
    Arrive,
    /// Arrive, wait and count threads whose predicate holds.
    Popc,
    /// Arrive, wait and tell whether all predicates hold.
    And,
    /// Arrive, wait and tell whether any predicate holds.
    Or,
}

/// `bar` and `barrier`.
#[derive(Clone, Debug)]
pub struct Barrier {
    /// What it does.
    pub kind: BarrierKind,
    /// The barrier's number.
    pub id: Reg,
    /// Threads expected; all of the CTA if none.
    pub count: Option<Reg>,
    /// A reduction's result and predicate (`row << 1 | negated`).
    pub reduce: Option<(Reg, u32)>,
    /// All lanes of a warp must come together.
    pub aligned: bool,
}

/// What works by itself, in groups that a thread closes and waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pipe {
    /// Bulk copies from shared memory; groups are a thread's.
    Bulk,
    /// `wgmma`; groups are a warp's.
    Product,
}

/// A function that the device's runtime provides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemCall {
    /// `vprintf(format, arguments) -> int`
    Print,
    /// `__assertfail(message, file, line, function, char_size)`
    AssertFail,
}

/// An operation.
#[derive(Clone, Debug)]
pub enum Op {
    /// Register arithmetic.
    Alu {
        /// The function.
        f: AluFn,
        /// Destination and sources.
        rows: [u32; 6],
    },
    /// Goes to another operation.
    Branch(u32),
    /// Goes to one of a list by index.
    BranchIndex(Reg, Box<[u32]>),
    /// Ends the thread.
    Exit,
    /// Ends the launch with an error.
    Trap,
    /// Loads.
    Load(Box<Access>),
    /// Stores.
    Store(Box<Access>),
    /// Atomic read-modify-write.
    Atomic(Box<Atomic>),
    /// Exchanges values between lanes.
    Shuffle {
        /// How.
        mode: ShuffleMode,
        /// Destination, source, lane operand, clamp operand, member mask.
        rows: [u32; 5],
        /// Lanes whose source was in range.
        valid: Option<u32>,
    },
    /// Votes over predicates.
    Vote {
        /// How.
        mode: VoteMode,
        /// Result.
        dst: Reg,
        /// Predicate (`row << 1 | negated`).
        src: u32,
        /// Member mask's row.
        members: u32,
    },
    /// Compares values between lanes.
    Match {
        /// All lanes alike, rather than any.
        all: bool,
        /// Lanes that agree.
        dst: u32,
        /// All agree.
        agree: Option<u32>,
        /// Values.
        src: Reg,
        /// Member mask's row.
        members: u32,
    },
    /// Reduces over lanes.
    Redux {
        /// How.
        op: ReduxOp,
        /// Destination, source, member mask.
        rows: [u32; 3],
    },
    /// Lanes that run.
    ActiveMask(u32),
    /// Picks the lowest lane.
    Elect {
        /// The lane.
        lane: Option<u32>,
        /// Holds on that lane.
        elected: u32,
        /// Member mask's row.
        members: u32,
    },
    /// Synchronises lanes.
    WarpSync(u32),
    /// Barrier of a CTA.
    Barrier(Box<Barrier>),
    /// Orders memory for a scope's threads; none where it orders proxies of one thread alone.
    Fence(Option<Scope>),
    /// Gives way to other warps.
    Yield,
    /// Loads or stores 8 by 8 matrices.
    Matrix(Box<Matrix>),
    /// Multiplies matrices.
    Mma(Box<Mma>),
    /// Multiplies matrices in shared memory.
    Wgmma(Box<Wgmma>),
    /// Copies in bulk.
    Bulk(Box<Bulk>),
    /// Copies to shared memory.
    CopyAsync(Box<CopyAsync>),
    /// Closes a group of copies.
    CopyCommit,
    /// Waits until at most so many groups are open; all copies if none.
    CopyWait(Option<u32>),
    /// Orders a warp's registers before products that read them.
    ProductFence,
    /// Closes a group of bulk copies or products.
    AsyncCommit(Pipe),
    /// Waits until at most so many groups are open.
    AsyncWait(Pipe, u32),
    /// Barrier objects in shared memory.
    Mbarrier(Box<Mbarrier>),
    /// A counter of the clock.
    Clock(Reg),
    /// A runtime function: result's local offset, offsets of arguments.
    System(SystemCall, Option<u32>, Box<[u32]>),
    /// Changes nothing that a simulation sees: prefetches, hints.
    Nothing,
}
