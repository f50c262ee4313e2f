// The window's attention, and the gated sum of the three branches, of which it is the last (SPEC 2, 2.3):
//   o^win as in band_fwd.cuh;   o = g[0] o^cmp + g[1] o^slc + g[2] o^win, o^win rounded to Element, as gate.cu has it.
//
// Grid, shared memory, registers, order of summation, edges: those of `win_forward`. A warp's outputs lie in shared memory when they
// are written; there they meet the other branches' rows, 16 bytes a lane.
// Bytes: those of `win_forward` and 3 Dv elements a row, which the products hide; a kernel of its own reads o^win once more, and
// hides nothing: on an H100 it takes 0.36 of the 10 ms of a forward pass of 65,536 tokens.
//
// budget: kernel=win_gate_forward threads=128 registers=255 spills=0 shared=65536
// budget: kernel=win_gate_forward arch=sm_90a threads=256 registers=128 spills=0 shared=98320
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "band_fwd.cuh"
#include "gate.cuh"

// The sum of a warp's rows, whose outputs of the window are rows of `own`.
__device__ __forceinline__ void add_branches(const WinGateForwardParams& p, const BandTile& tile, int base, int rows, const char* own) {
    constexpr int PARTS = HEAD_DIM_V / VECTOR;
    const int lane = anew(int(threadIdx.x % 32));
#pragma unroll 2
    for (int i = lane; i < rows * PARTS; i += 32) {
        const int r = i / PARTS, d = i % PARTS * VECTOR;
        const i64 row = tile.token(base + r) * HEADS + tile.query_head(base + r), at = row * HEAD_DIM_V + d;
        float g[3], cmp[VECTOR], slc[VECTOR], win[VECTOR];
        load_gates(p.gates, row, g);
        load<VECTOR>(p.cmp + at, cmp);
        load<VECTOR>(p.slc + at, slc);
        load<VECTOR>(reinterpret_cast<const Element*>(own + Values::at(r, d)), win);
        gated_sum(g, cmp, slc, win);
        store<VECTOR>(p.sum + at, cmp);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS) win_gate_forward(const __grid_constant__ WinGateForwardParams p) {
    band_forward<Window>(p.common, [&](const BandTile& tile, int base, int rows, const char* own) {
        add_branches(p, tile, base, rows, own);
    });
}
