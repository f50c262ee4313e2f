// Softmax attention over a run of tokens: `dense`, all up to the query's own (SPEC 1), and `win`, the last w (SPEC 2.3), whose
// outputs may meet others as they are written.
//
// Grid: a CTA a tile of ROWS / R queries and KV head; tiles with most keys first, KV heads innermost. Its WARPS warps have
// 16 TILES rows each (query R + head), so that a key is read once for all heads of ROWS / R queries.
// Shared memory, bytes at D = 128 in bf16 (WARPS 4, TILES 2, KEYS 32): queries 128 x 256, later the outputs; 2 stages of
// k and v, 2 x 32 x 512; 65,536. On sm_90a, where four warps multiply together (WARPS 8, TILES 1, KEYS 64) and
// hardware copies tiles of keys (bulk.cuh): 98,304, and 16.
// Registers: o 128, scores 32, the rest addresses; two CTAs fit on an A100's multiprocessor. On sm_90a o 64, scores 32, and
// two CTAs of twice as many threads.
// Roofline, a KV head of T tokens: 4 R D T (T + 1) / 2 FLOP (dense), 4 R D T w (win); from memory at least q, o, k, v once:
// 4 T D (R + 1) bytes and lse; from the L2 cache k and v once a tile of queries. Bound by tensor cores from T of some hundreds.
// Counted on the simulator at R = 16, D = 128, T = 2,048: dense 1.015 of those FLOP, win 1.06 (w = 512; the tiles at both
// ends of a window), at R = 4 see docs; bytes from memory 1.00 of the least; no bank conflict; 0.90 passes over shared memory a
// cycle of tensor cores.
// Order of summation: see flash.cuh; tiles of keys in order. No row depends on what else is in the call.
// Edges: rows without a query are computed and not written; keys outside of a row's run are masked, those behind the
// sequence are zeros and not read; a query without keys gives o = 0, lse = -infinity. A value that is not finite reaches all
// rows of the 16 that meet it in a product, as 0 x NaN is NaN.
// Tried: 16 rows a warp (each key read from shared memory serves one product, not two: 1.3 times the passes); rows that are
// held in registers with TILES 2 (spills); loop invariants kept by the compiler (spills, see `anew`).
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
