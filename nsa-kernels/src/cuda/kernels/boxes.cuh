// Keys and values, and rows of queries, in the boxes of bulk copies.
#pragma once
#include "bulk.cuh"
#include "unit.cuh"

// Rows that lie packed in boxes of whole chunks: hardware copies them by itself.
constexpr bool BULK = WARPGROUPS && PAGE_ROWS == 0 && QK_COPY_BYTES == 16 && V_COPY_BYTES == 16;

// Starts to copy `tiles` tiles of ROWS keys from row `row` of all on, and behind each its values if they are wanted, to a stage at `to`.
template <bool WITH_VALUES, int ROWS, class P>
__device__ __forceinline__ void load_key_boxes(const P& p, const Arrivals& arrivals, int stage, u32 to, int tiles, int head, int row) {
    constexpr int BYTES = ROWS * (HEAD_DIM_QK + (WITH_VALUES ? HEAD_DIM_V : 0)) * int(sizeof(Element));
    if (threadIdx.x >= 32) return;
    if (threadIdx.x == 0) arrivals.expect(stage, tiles * BYTES);
    constexpr int TILE = ROWS * (HEAD_DIM_QK + HEAD_DIM_V) * int(sizeof(Element));
    arrivals.copy<HEAD_DIM_QK, WITH_VALUES ? HEAD_DIM_V : 0, ROWS>(
        stage, to, tiles, p.k_map, p.v_map, [&](int tile) { return Box{tile * TILE, row + tile * ROWS, head}; });
}
