// The gated sum of the branches.
#pragma once
#include "element.cuh"

// sum_c g[c] o^c of the N elements of a row that a thread has, in place of `cmp`.
template <int N>
__device__ __forceinline__ void gated_sum(const float (&g)[3], float (&cmp)[N], const float (&slc)[N], const float (&win)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) cmp[i] = g[0] * cmp[i] + g[1] * slc[i] + g[2] * win[i];
}

// Gates of a row, [rows, 3].
__device__ __forceinline__ void load_gates(const Element* gates, i64 row, float (&g)[3]) {
#pragma unroll
    for (int c = 0; c < 3; ++c) g[c] = to_float(gates[row * 3 + c]);
}
