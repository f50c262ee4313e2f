// The loss of rows of logits and its gradient: loss = ln sum_v e^z_v - z_target, z <- scale (p - [v = target]).
//
// Grid: a block a row. Shared memory: 32 bytes. Bytes: the row twice (three times with gradients, which are written in its
// place); it is in the cache after the first time unless vocabularies are large.
// Order of summation: a thread's elements in order, lanes by the warp's tree, warps in order. The maximum is taken out first.
// Edges: a row without a target has loss 0 and gradients 0; a target beyond the vocabulary gives NaN, and the host an error.
//
// budget: kernel=cross_entropy threads=256 registers=40 spills=0 shared=32
#include "element.cuh"
#include "config.cuh"
#include "reduce.cuh"
#include "params.cuh"

extern "C" __global__ void __launch_bounds__(256) cross_entropy(const __grid_constant__ CrossEntropyParams p) {
    __shared__ float shared[8];
    float* z = p.logits + i64(blockIdx.x) * p.vocabulary;
    const u32 target = p.targets[blockIdx.x];
    const bool ignored = target == 0xffffffffu;
    float largest = negative_infinity();
    for (i64 v = threadIdx.x; v < p.vocabulary; v += 256) largest = fmaxf(largest, z[v]);
    largest = group_max<256>(largest, shared);
    float sum = 0.0f;
    for (i64 v = threadIdx.x; v < p.vocabulary; v += 256) sum += expf(z[v] - largest);
    sum = group_sum<256>(sum, shared);
    if (threadIdx.x == 0) {
        const float nan = not_a_number();
        const float loss = target < p.vocabulary ? logf(sum) + (largest - z[target]) : nan;
        p.losses[blockIdx.x] = ignored ? 0.0f : loss;
    }
    if constexpr (GRADIENTS) {
        __syncthreads();
        for (i64 v = threadIdx.x; v < p.vocabulary; v += 256) {
            const float probability = expf(z[v] - largest) / sum;
            const float slope = p.scale * (v == i64(target) ? probability - 1.0f : probability);
            z[v] = ignored ? 0.0f : slope;
        }
    }
}
