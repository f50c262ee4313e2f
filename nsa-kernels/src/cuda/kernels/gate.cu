// The gated sum of the branches and the gradients of the gates (SPEC 2, 3):
//   o[r] = g[r,0] cmp[r] + g[r,1] slc[r] + g[r,2] win[r],   dg[r,c] = sum_d do[r,d] o^c[r,d],   r = token and head.
//
// Grid: forward, a thread takes VECTOR elements of a row, threads along all rows; backward, a warp takes a row.
// Shared memory: none. Bytes: forward (3 + 1) DIM + 3 elements a row, backward 4 DIM elements and 12 bytes a row; both are
// bound by memory (5 and 6 FLOP an element of o).
// Order of summation: forward cmp, slc, win; backward lane l takes elements l VECTOR + 32 VECTOR i in order, then the warp's
// tree. No row depends on another.
// Edges: the last block's threads beyond the rows do nothing; a DIM of 0 gives gradients of 0.
//
// budget: kernel=gate_forward threads=256 registers=40 spills=0 shared=0
// budget: kernel=gate_backward threads=256 registers=48 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "gate.cuh"

extern "C" __global__ void __launch_bounds__(256) gate_forward(const __grid_constant__ GateForwardParams p) {
    constexpr int PARTS = DIM < VECTOR ? 1 : DIM / VECTOR;
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 row = at / PARTS;
    if (row >= p.rows) return;
    const i64 offset = at * VECTOR;
    float g[3], cmp[VECTOR], slc[VECTOR], win[VECTOR];
    load_gates(p.gates, row, g);
    load<VECTOR>(p.cmp + offset, cmp);
    load<VECTOR>(p.slc + offset, slc);
    load<VECTOR>(p.win + offset, win);
    gated_sum(g, cmp, slc, win);
    store<VECTOR>(p.o + offset, cmp);
}

extern "C" __global__ void __launch_bounds__(256) gate_backward(const __grid_constant__ GateBackwardParams p) {
    const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    float sum[3] = {0.0f, 0.0f, 0.0f};
    for (int d = lane * VECTOR; d < DIM; d += 32 * VECTOR) {
        const i64 offset = row * DIM + d;
        float d_o[VECTOR], o[3][VECTOR];
        load<VECTOR>(p.d_o + offset, d_o);
        load<VECTOR>(p.cmp + offset, o[0]);
        load<VECTOR>(p.slc + offset, o[1]);
        load<VECTOR>(p.win + offset, o[2]);
#pragma unroll
        for (int c = 0; c < 3; ++c) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum[c] += d_o[i] * o[c][i];
        }
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        const float total = warp_sum(sum[c]);
        if (lane == c) p.d_gates[row * 3 + c] = total;
    }
}
