//! Copies of neighbouring elements.

use crate::Result;
use crate::cuda::Cuda;
use crate::cuda::ahead::Build;
use crate::cuda::geometry::Geometry;
use crate::cuda::launch::Call;
use crate::cuda::params::{Field, Params, params};
use crate::cuda::program::{Constants, Program};
use crate::layer::copy::Piece;
use nsa_core::{DType, Element};

/// The kernel.
pub(crate) static PROGRAM: Program = Program {
    file: "copy.cu",
    text: include_str!("../kernels/copy.cu"),
    params: &[CopySegment::declaration, CopySegments::declaration],
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
        segments: Segments,
    }
}

#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Segments([CopySegment; SEGMENTS]);

impl Field for Segments {
    fn cpp() -> String {
        format!("Array<CopySegmentParams, {SEGMENTS}>")
    }
}

/// What the operation runs.
pub(super) fn build() -> Build {
    Build::new(&PROGRAM, Constants::new(DType::F32), &[("copy_segments", THREADS)])
}

pub(crate) fn all<T: Element>(cuda: &Cuda, op: &'static str, copies: Vec<Piece<'_, T>>) -> Result<()> {
    let call = Call::new::<T>(cuda, op)?;
    let segment = |copy: &mut Piece<'_, T>| -> Result<CopySegment> {
        Ok(CopySegment {
            from: call.address("source", &copy.source)?,
            to: call.address_mut("target", &mut copy.target)?,
            bytes: (size_of::<T>() * copy.source.shape()[0]) as u64,
        })
    };
    // The kernel moves bytes, whatever they are.
    let bytes = call.of_type(DType::F32);
    let mut copies = copies;
    for copies in copies.chunks_mut(SEGMENTS) {
        let mut segments = [CopySegment { from: 0, to: 0, bytes: 0 }; SEGMENTS];
        for (copy, place) in copies.iter_mut().zip(&mut segments) {
            *place = segment(copy)?;
        }
        let longest = segments.iter().map(|segment| segment.bytes).max().unwrap_or(0);
        let blocks = longest.div_ceil(16 * u64::from(THREADS)).min(BLOCKS);
        let geometry = Geometry { grid: [blocks, copies.len() as u64, 1], threads: THREADS, shared_bytes: 0 };
        bytes.launch(&PROGRAM, "copy_segments", geometry, CopySegments { segments: Segments(segments) })?;
    }
    Ok(())
}
