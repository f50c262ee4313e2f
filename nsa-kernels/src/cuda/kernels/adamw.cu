// AdamW: with g = scale grad, m <- old0 m + new0 g, v <- old1 v + new1 g^2, p <- keep p - rate m / (sqrt(v) root + eps);
// and the sum of squares of a gradient, a partial sum a block of 2^14 elements.
//
// Grid: a thread takes 4 elements where addresses allow it, threads along all of them; sum_of_squares: a block a part.
// Shared memory: sum_of_squares 2048 bytes. Bytes: step reads 4 and writes 3 floats a parameter, sum_of_squares reads one.
// Order of summation: a thread's elements in order, threads by a tree, parts in order on the host; in double.
//
// budget: kernel=adamw_step threads=256 registers=64 spills=0 shared=0
// budget: kernel=sum_of_squares threads=256 registers=40 spills=0 shared=2048
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"

extern "C" __global__ void __launch_bounds__(256) adamw_step(const __grid_constant__ AdamWParams p) {
    const i64 at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
    const auto update = [&](i64 at, auto size) {
        constexpr int N = decltype(size)::value;
        float g[N], x[N], m[N], v[N];
        load<N>(p.grads + at, g);
        load<N>(p.params + at, x);
        load<N>(p.m + at, m);
        load<N>(p.v + at, v);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float scaled = g[i] * p.scale;
            m[i] = p.old_mean * m[i] + p.new_mean * scaled;
            v[i] = p.old_square * v[i] + p.new_square * scaled * scaled;
            x[i] = x[i] * p.keep - p.rate * m[i] / (sqrtf(v[i]) * p.root + p.eps);
        }
        store<N>(p.params + at, x);
        store<N>(p.m + at, m);
        store<N>(p.v + at, v);
    };
    if (at + VECTOR <= p.count) {
        update(at, Size<VECTOR>());
    } else {
        for (i64 i = at; i < p.count; ++i) update(i, Size<1>());
    }
}

extern "C" __global__ void __launch_bounds__(256) sum_of_squares(const __grid_constant__ SumOfSquaresParams p) {
    __shared__ double shared[256];
    const i64 first = i64(blockIdx.x) * PART;
    const i64 end = first + PART < p.count ? first + PART : p.count;
    double sum = 0.0;
    for (i64 i = first + threadIdx.x; i < end; i += 256) {
        const double g = p.grads[i];
        sum += g * g;
    }
    shared[threadIdx.x] = sum;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) p.partial[blockIdx.x] = shared[0];
}
