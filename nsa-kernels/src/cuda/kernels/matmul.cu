// What products of matrices from a library leave to do: y = [y +] sums + bias, rounded once.
//
// Grid: a thread an element. Shared memory: none. Bytes: sums, y and the bias once.
//
// budget: kernel=finish threads=256 registers=32 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"

extern "C" __global__ void __launch_bounds__(256) finish(const __grid_constant__ FinishParams p) {
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= p.rows * p.columns) return;
    float sum = p.sums[at];
    if (p.bias) sum += to_float(p.bias[at % p.columns]);
    if constexpr (ACCUMULATE) sum = to_float(p.y[at]) + sum;
    p.y[at] = from_float<Element>(sum);
}
