// Softmax attention over a run of tokens: `dense`, all up to the query's own (SPEC 1), and `win`, the last w (SPEC 2.3).
#include "config.cuh"
#include "params.cuh"
#include "band.cuh"

struct Nothing {
    __device__ __forceinline__ void operator()(const BandFlash&, const BandScores&, int, bool, const float (&)[TILES][2]) const {}
};

template <class Span>
__device__ __forceinline__ void band_forward(const BandForwardParams& p) {
    const BandTile tile(p, blockIdx.x);
    const Span span(tile.sequence);
    BandFlash flash;
    Nothing nothing;
    attend<0>(p, tile, span, flash, nothing);
    const int base = threadIdx.x / 32 * WARP_ROWS;
    write_rows(p, tile, flash, base, tile.rows - base < WARP_ROWS ? tile.rows - base : WARP_ROWS);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) dense_forward(const __grid_constant__ BandForwardParams p) {
    band_forward<Dense>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) win_forward(const __grid_constant__ BandForwardParams p) {
    band_forward<Window>(p);
}
