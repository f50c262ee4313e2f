// RMSNorm of rows of CHANNELS elements.
//   forward:   r = 1 / sqrt(mean x^2 + eps),  y = x r w
//   backward:  dx = [dx +] r dy w - r^3 x (sum_c dy w x) / C,   partial dw[part, c] = sum over the part's rows of dy x r
//
// Grid: ROW_THREADS threads take a row, 256 / ROW_THREADS rows a block along x; a row stays in registers. rmsnorm_weight: a
// thread a channel, channels along x, parts of rows along y; reduce.cu adds the parts up.
// Shared memory: 32 bytes. Bytes: forward x, y once; backward x, dy twice (dx, dw), dx once. Bound by memory.
// Order of summation: a thread's elements in order, lanes by the warp's tree, warps in order.
// Edges: threads beyond the last row take part in barriers and write nothing.
//
// budget: kernel=rmsnorm_forward threads=256 registers=96 spills=0 shared=32
// budget: kernel=rmsnorm_backward threads=256 registers=128 spills=0 shared=32
// budget: kernel=rmsnorm_weight threads=256 registers=40 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "reduce.cuh"
#include "params.cuh"

constexpr int STEP = ROW_THREADS * VECTOR;
constexpr int STEPS = (CHANNELS + STEP - 1) / STEP;

extern "C" __global__ void __launch_bounds__(256) rmsnorm_forward(const __grid_constant__ RmsNormForwardParams p) {
    __shared__ float shared[8];
    const i64 row = i64(blockIdx.x) * (256 / ROW_THREADS) + threadIdx.x / ROW_THREADS;
    const int first = threadIdx.x % ROW_THREADS * VECTOR;
    const bool there = row < p.rows;
    float x[STEPS][VECTOR], sum = 0.0f;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int c = first + s * STEP;
        if (there && c < CHANNELS) {
            load<VECTOR>(p.x + row * CHANNELS + c, x[s]);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum += x[s][i] * x[s][i];
        }
    }
    const float r = 1.0f / sqrtf(group_sum<ROW_THREADS>(sum, shared) / float(CHANNELS) + p.eps);
    if (!there) return;
    if (p.rstd && first == 0) p.rstd[row] = r;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int c = first + s * STEP;
        if (c < CHANNELS) {
            float w[VECTOR];
            load<VECTOR>(p.weight + c, w);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) w[i] *= x[s][i] * r;
            store<VECTOR>(p.y + row * CHANNELS + c, w);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) rmsnorm_backward(const __grid_constant__ RmsNormBackwardParams p) {
    __shared__ float shared[8];
    const i64 row = i64(blockIdx.x) * (256 / ROW_THREADS) + threadIdx.x / ROW_THREADS;
    const int first = threadIdx.x % ROW_THREADS * VECTOR;
    const bool there = row < p.rows;
    // g = dy w.
    float x[STEPS][VECTOR], g[STEPS][VECTOR], dot = 0.0f;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int c = first + s * STEP;
        if (there && c < CHANNELS) {
            float w[VECTOR];
            load<VECTOR>(p.weight + c, w);
            load<VECTOR>(p.x + row * CHANNELS + c, x[s]);
            load<VECTOR>(p.dy + row * CHANNELS + c, g[s]);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                g[s][i] *= w[i];
                dot += g[s][i] * x[s][i];
            }
        }
    }
    dot = group_sum<ROW_THREADS>(dot, shared);
    if (!there) return;
    const float r = p.rstd[row];
    const float factor = r * r * r * dot / float(CHANNELS);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int c = first + s * STEP;
        if (c < CHANNELS) {
            float dx[VECTOR];
            if constexpr (ACCUMULATE) {
                load<VECTOR>(p.dx + row * CHANNELS + c, dx);
            } else {
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) dx[i] = 0.0f;
            }
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) dx[i] += r * g[s][i] - factor * x[s][i];
            store<VECTOR>(p.dx + row * CHANNELS + c, dx);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) rmsnorm_weight(const __grid_constant__ RmsNormWeightParams p) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= CHANNELS) return;
    const i64 first = i64(blockIdx.y) * p.part_rows;
    const i64 end = first + p.part_rows < p.rows ? first + p.part_rows : p.rows;
    float sum = 0.0f;
    for (i64 row = first; row < end; ++row) {
        sum += p.dy[row * CHANNELS + c] * to_float(p.x[row * CHANNELS + c]) * p.rstd[row];
    }
    p.partial[i64(blockIdx.y) * CHANNELS + c] = sum;
}
