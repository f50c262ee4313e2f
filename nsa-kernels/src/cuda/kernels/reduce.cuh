// Sums over the threads that share a row.
#pragma once
#include "element.cuh"

// The sum over WIDTH neighbouring threads of a block, in all of them: 32, or more that are whole warps, in which case every
// thread of the block must call it. Lanes by the warp's tree, warps in order. `shared` has a float a warp of the block.
template <int WIDTH>
__device__ __forceinline__ float group_sum(float x, float* shared) {
    static_assert(WIDTH >= 32 && WIDTH % 32 == 0, "whole warps");
    x = warp_sum(x);
    if constexpr (WIDTH == 32) {
        return x;
    } else {
        const int warp = threadIdx.x / 32, first = threadIdx.x / WIDTH * (WIDTH / 32);
        __syncthreads();
        if (threadIdx.x % 32 == 0) shared[warp] = x;
        __syncthreads();
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WIDTH / 32; ++i) sum += shared[first + i];
        return sum;
    }
}

// The same for the largest.
template <int WIDTH>
__device__ __forceinline__ float group_max(float x, float* shared) {
    static_assert(WIDTH >= 32 && WIDTH % 32 == 0, "whole warps");
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    if constexpr (WIDTH == 32) {
        return x;
    } else {
        const int warp = threadIdx.x / 32, first = threadIdx.x / WIDTH * (WIDTH / 32);
        __syncthreads();
        if (threadIdx.x % 32 == 0) shared[warp] = x;
        __syncthreads();
        float largest = shared[first];
#pragma unroll
        for (int i = 1; i < WIDTH / 32; ++i) largest = fmaxf(largest, shared[first + i]);
        return largest;
    }
}
