// The embedding: y[n] = w[token(n)], and the gradient of the table, dw[v] += sum over n with token(n) = v of dy[n].
//
// Grid: forward, a thread takes VECTOR channels of a row; backward, a block takes the first row of each token (blocks whose
// token occurs before leave) and 128 VECTOR channels, and adds up all rows of that token.
// Shared memory: backward 16 bytes. Bytes: forward 2 N C elements; backward dy once and dw twice, and the tokens once a block
// from the cache: N^2 / 2 comparisons, N = 16384 takes as long as 1 MiB of dy a multiprocessor.
// Order of summation: rows ascending. No two blocks write the same row.
// Edges: a token beyond the table gives NaN forward and is passed over backward.
//
// budget: kernel=embedding_forward threads=256 registers=40 spills=0 shared=0
// budget: kernel=embedding_backward threads=128 registers=48 spills=0 shared=16
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"

extern "C" __global__ void __launch_bounds__(256) embedding_forward(const __grid_constant__ EmbeddingForwardParams p) {
    const i64 parts = p.channels / VECTOR;
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 row = at / parts;
    if (row >= p.rows) return;
    const i64 c = at % parts * VECTOR;
    const u32 token = p.tokens[row];
    float x[VECTOR];
    if (token < p.vocabulary) {
        load<VECTOR>(p.weight + token * p.channels + c, x);
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) x[i] = not_a_number();
    }
    store<VECTOR>(p.y + row * p.channels + c, x);
}

extern "C" __global__ void __launch_bounds__(128) embedding_backward(const __grid_constant__ EmbeddingBackwardParams p) {
    __shared__ u32 found[4];
    const i64 row = blockIdx.x;
    const u32 token = p.tokens[row];
    if (token >= p.vocabulary) return;
    for (i64 start = 0; start < row; start += 128) {
        const i64 n = start + threadIdx.x;
        if (__syncthreads_or(n < row && p.tokens[n] == token)) return;
    }
    const i64 c = (i64(blockIdx.y) * 128 + threadIdx.x) * VECTOR;
    const bool there = c < p.channels;
    float sum[VECTOR];
    if (there) load<VECTOR>(p.dw + token * p.channels + c, sum);
    for (i64 start = row; start < p.rows; start += 128) {
        const i64 n = start + threadIdx.x;
        const u32 mask = __ballot_sync(0xffffffffu, n < p.rows && p.tokens[n] == token);
        __syncthreads();
        if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = mask;
        __syncthreads();
        for (int warp = 0; warp < 4; ++warp) {
            for (u32 rest = found[warp]; rest; rest &= rest - 1) {
                const i64 m = start + warp * 32 + __ffs(rest) - 1;
                if (there) {
                    float x[VECTOR];
                    load<VECTOR>(p.dy + m * p.channels + c, x);
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) sum[i] += x[i];
                }
            }
        }
    }
    if (there) store<VECTOR>(p.dw + token * p.channels + c, sum);
}
