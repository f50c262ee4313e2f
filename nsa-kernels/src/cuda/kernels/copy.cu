// Copies of segments of neighbouring bytes, none of which is written by one copy and read or written by another.
//
// Grid: segments; blocks along a segment, up to 64, which take turns. Shared memory: none. Bytes: each segment read and
// written once. A thread moves 16 bytes at a time where both addresses and the length allow it, else 4, else 2.
// copy_segments has up to 32 segments as its arguments: there is no table to upload. copy_table reads them where they lie on the
// device, for launches that are recorded before it is known what they copy; segments of no bytes are none.
//
// budget: kernel=copy_segments threads=256 registers=32 spills=0 shared=0
// budget: kernel=copy_table threads=256 registers=32 spills=0 shared=0
#include "array.cuh"
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"

template <class Unit>
__device__ __forceinline__ void copy(const CopySegmentParams& segment) {
    const Unit* from = reinterpret_cast<const Unit*>(segment.from);
    Unit* to = reinterpret_cast<Unit*>(segment.to);
    const u64 count = segment.bytes / sizeof(Unit);
    for (u64 i = u64(blockIdx.y) * 256 + threadIdx.x; i < count; i += u64(gridDim.y) * 256) to[i] = from[i];
}

__device__ __forceinline__ void copy(const CopySegmentParams& segment) {
    const u64 places = segment.from | segment.to | segment.bytes;
    if (places % 16 == 0) {
        copy<uint4>(segment);
    } else if (places % 4 == 0) {
        copy<u32>(segment);
    } else {
        copy<u16>(segment);
    }
}

extern "C" __global__ void __launch_bounds__(256) copy_segments(const __grid_constant__ CopySegmentsParams p) {
    copy(p.segments.at[blockIdx.x]);
}

extern "C" __global__ void __launch_bounds__(256) copy_table(const __grid_constant__ CopyTableParams p) {
    copy(p.segments[blockIdx.x]);
}
