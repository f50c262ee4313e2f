// A forward kernel of one run of keys a query, whose outputs may meet others as they are written.
#pragma once
#include "band.cuh"

// Where outputs leave registers for them, two blocks of warpgroups share a multiprocessor: one multiplies while the other takes
// exponentials.
constexpr int LEAST_BLOCKS = WARPGROUPS && Values::PADDED <= 128 ? 2 : 1;

struct Nothing {
    template <class... Args>
    __device__ __forceinline__ void operator()(const Args&...) const {}
};

// Attention of one tile of queries over its keys. `then(tile, base, rows, own)` finds a warp's outputs written, and in `own`.
template <class Span, class Then>
__device__ __forceinline__ void band_forward(const BandForwardParams& p, const Then& then) {
    const BandTile tile(p, blockIdx.x);
    const Span span(tile.sequence);
    BandFlash flash;
    Nothing nothing;
    Arrivals arrivals = begin_arrivals();
    attend<0>(p, tile, span, flash, arrivals, nothing);
    const int base = threadIdx.x / 32 * WARP_ROWS, rows = tile.rows - base < WARP_ROWS ? tile.rows - base : WARP_ROWS;
    char* const own = shared + base * Values::PITCH;
    write_rows(p, tile, flash, base, rows, own);
    then(tile, base, rows, own);
}
