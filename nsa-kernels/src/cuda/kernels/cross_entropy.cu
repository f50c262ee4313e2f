// The loss of rows of logits and its gradient: loss = ln sum_v e^z_v - z_target, z <- scale (p - [v = target]); and the sum of
// the losses, which is all that the host must know.
//
// Grid: cross_entropy a block a row, cross_entropy_total one block. Shared memory: 32 and 6144 bytes. Bytes: the row twice (three times with gradients, which are written in its
// place); it is in the cache after the first time unless vocabularies are large.
// Order of summation: a thread's elements in order, lanes by the warp's tree, warps in order. The maximum is taken out first.
// cross_entropy_total: a thread's rows in order, threads by a tree; in double.
// Edges: a row without a target has loss 0 and gradients 0; a target beyond the vocabulary gives NaN, and the host an error.
//
// budget: kernel=cross_entropy threads=256 registers=40 spills=0 shared=32
// budget: kernel=cross_entropy_total threads=256 registers=40 spills=0 shared=6144
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

// Losses of rows without a target are 0; a row of which there is none has the number of rows.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_total(const __grid_constant__ CrossEntropyTotalParams p) {
    __shared__ double sums[256];
    __shared__ i64 counts[256], outside[256];
    double sum = 0.0;
    i64 count = 0, first = p.rows;
    for (i64 row = threadIdx.x; row < p.rows; row += 256) {
        const u32 target = p.targets[row];
        sum += p.losses[row];
        count += target != 0xffffffffu;
        if (target != 0xffffffffu && target >= p.vocabulary && row < first) first = row;
    }
    sums[threadIdx.x] = sum, counts[threadIdx.x] = count, outside[threadIdx.x] = first;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            const int other = threadIdx.x + half;
            sums[threadIdx.x] += sums[other];
            counts[threadIdx.x] += counts[other];
            if (outside[other] < outside[threadIdx.x]) outside[threadIdx.x] = outside[other];
        }
    }
    if (threadIdx.x == 0) {
        const bool found = outside[0] < p.rows;
        p.total[0] = sums[0];
        p.total[1] = double(counts[0]);
        p.total[2] = found ? double(p.targets[outside[0]]) : -1.0;
        p.total[3] = found ? double(outside[0]) : -1.0;
    }
}
