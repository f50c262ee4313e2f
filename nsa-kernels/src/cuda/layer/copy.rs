//! Copies of neighbouring elements.

use crate::Result;
use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::geometry::Geometry;
use crate::cuda::launch::Call;
use crate::cuda::memory::Mirror;
use crate::cuda::params::{Array, In, Params, params};
use crate::cuda::program::{Constants, Program};
use crate::layer::copy::Piece;
use nsa_core::{DType, Element};
use std::marker::PhantomData;

/// The kernel.
pub(crate) static PROGRAM: Program = Program {
    file: "copy.cu",
    text: include_str!("../kernels/copy.cu"),
    params: &[CopySegment::declaration, CopySegments::declaration, CopyTable::declaration],
};

/// Threads of a block.
const THREADS: u32 = 256;
/// Blocks that share a segment, at most: with more, each has little to do.
const BLOCKS: u64 = 64;
/// Segments of a launch, at most.
const SEGMENTS: usize = 32;

params! {
    /// Neighbouring bytes, a multiple of 2 at multiples of 2.
    struct CopySegment {
        /// Address.
        from: u64,
        /// Address.
        to: u64,
        bytes: u64,
    }

    /// Arguments of `copy_segments`.
    struct CopySegments {
        segments: Array<CopySegment, SEGMENTS>,
    }

    /// Arguments of `copy_table`.
    struct CopyTable {
        segments: In<CopySegment>,
    }
}

/// What the operation runs.
pub(super) fn build() -> Build {
    Build::new(&PROGRAM, Constants::new(DType::F32), &[("copy_segments", THREADS), ("copy_table", THREADS)])
}

/// Blocks of threads for so many copies, the longest of so many bytes. Copies are any number, which only the first axis takes.
fn geometry(longest: u64, copies: usize) -> Geometry {
    let blocks = longest.div_ceil(16 * u64::from(THREADS)).min(BLOCKS);
    Geometry { grid: [copies as u64, blocks, 1], threads: THREADS, shared_bytes: 0 }
}

/// The places of a copy.
fn segment<T: Element>(call: &Call<'_>, copy: &mut Piece<'_, T>) -> Result<CopySegment> {
    Ok(CopySegment {
        from: call.address("source", &copy.source)?,
        to: call.address_mut("target", &mut copy.target)?,
        bytes: (size_of::<T>() * copy.source.shape()[0]) as u64,
    })
}

pub(crate) fn all<T: Element>(cuda: &Cuda, op: &'static str, copies: Vec<Piece<'_, T>>) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?;
    // The kernel moves bytes, whatever they are.
    let bytes = call.of_type(DType::F32);
    let mut copies = copies;
    for copies in copies.chunks_mut(SEGMENTS) {
        let mut segments = [CopySegment { from: 0, to: 0, bytes: 0 }; SEGMENTS];
        for (copy, place) in copies.iter_mut().zip(&mut segments) {
            *place = segment(&call, copy)?;
        }
        let longest = segments.iter().map(|segment| segment.bytes).max().unwrap_or(0);
        let geometry = geometry(longest, copies.len());
        bytes.launch(&PROGRAM, "copy_segments", geometry, CopySegments { segments: Array(segments) })?;
    }
    Ok(())
}

/// See [`layer::copy::Table`](crate::layer::copy::Table).
#[derive(Debug)]
pub(crate) struct Table {
    cuda: Cuda,
    /// Copies of a slot.
    copies: usize,
    /// From, to and bytes of each copy, slot by slot.
    places: Mirror<[u64; 3]>,
}

impl Table {
    pub(crate) fn new(cuda: &Cuda, [slots, copies]: [usize; 2]) -> Result<Self> {
        Ok(Self { cuda: cuda.clone(), copies, places: Mirror::zeros(cuda, slots * copies)? })
    }

    pub(crate) fn set<T: Element>(&mut self, op: &'static str, slot: usize, copies: Vec<Piece<'_, T>>) -> Result<()> {
        let call = Call::new::<T>(&self.cuda, op)?;
        let mut places = vec![[0; 3]; self.copies];
        for (mut copy, place) in copies.into_iter().zip(&mut places) {
            let CopySegment { from, to, bytes } = segment(&call, &mut copy)?;
            *place = [from, to, bytes];
        }
        self.places.set(slot * self.copies, &places);
        Ok(())
    }

    pub(crate) fn send(&mut self, op: &'static str) -> Result<()> {
        self.places.send(op)
    }

    pub(crate) fn run(&self, op: &'static str, slot: usize) -> Result<()> {
        let first = slot * self.copies;
        let longest = self.places.host()[first..first + self.copies].iter().map(|[.., bytes]| *bytes).max();
        let call = Call::new::<f32>(&self.cuda, op)?;
        let segments = In(self.places.address(first), PhantomData);
        // Also if there is nothing to copy now: the launch may be recorded.
        let geometry = geometry(longest.unwrap_or(0).max(1), self.copies);
        call.launch(&PROGRAM, "copy_table", geometry, CopyTable { segments })
    }
}
