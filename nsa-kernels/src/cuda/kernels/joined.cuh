// Shares of a row's keys, each with a softmax of its own, as one softmax over all of them.
#pragma once
#include "flash.cuh"

// Sums of several softmaxes over the same denominator: sum of p = 2^(score - base).
struct Joined {
    float base;
    float sum;

    // What p relative to m counts.
    __device__ __forceinline__ float weight(float m) const { return exp2_approx(m - base); }
    // 1 / l, 0 without keys.
    __device__ __forceinline__ float inverse() const { return inverse_of(sum); }
    __device__ __forceinline__ float lse(const float (&unscale)[2]) const { return lse_of(base, sum, unscale); }
    // The greatest m is so far the base, and no sum.
    static __device__ __forceinline__ Joined of(float most) { return {base_of(most), 0.0f}; }
};

// Of `count` shares of a query head, whose m and l are `stride` floats apart, from these on; LANES neighbouring lanes' work, which
// take turns. All lanes of a warp come here.
template <int LANES>
__device__ __forceinline__ Joined join_shares(const float* statistics, int count, i64 stride) {
    const int lane = threadIdx.x % LANES;
    float most = negative_infinity();
#pragma unroll 4
    for (int i = lane; i < count; i += LANES) most = fmaxf(most, statistics[i * stride]);
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
    Joined all = Joined::of(most);
#pragma unroll 4
    for (int i = lane; i < count; i += LANES) {
        const float2 next = *reinterpret_cast<const float2*>(statistics + i * stride);
        all.sum = fmaf(next.y, all.weight(next.x), all.sum);
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) all.sum += __shfl_xor_sync(ALL_LANES, all.sum, step);
    return all;
}
