// y = [y +] x w^T + bias for few rows of x, as decoding has them: the product of a matrix with a few vectors, bound by reading
// the matrix, whose elements may be of another type than those of x; up to 8 such products of one x, so that narrow ones (keys and
// values of several branches) fill a device together and are launched once.
//
// Grid: a warp takes OUTPUTS rows of w, 8 warps a block along x, product by product; ROWS rows of x a block along y, each of which
// reads w again (from the cache, as far as that holds it). Shared memory: none. Bytes: w once, x from the cache once a warp.
// Intensity: 2 ROWS FLOP an element of w. A warp reads ROWS / OUTPUTS elements of x for each of w, from the cache, which gives
// nine times the bytes of an H100's memory: 8 rows of f32 with w in bf16 keep up. Four outputs a warp were tried: 146 registers.
// Order of summation: a lane's elements in order, lanes by the warp's tree; the same for any number of rows.
// Edges: warps past the last output leave; rows past the last one repeat it and are not written.
//
// budget: kernel=linear_few_rows threads=256 registers=120 spills=0 shared=0
#include "array.cuh"
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"

extern "C" __global__ void __launch_bounds__(256, 2) linear_few_rows(const __grid_constant__ LinearFewRowsParams p) {
    i64 block;
    const LinearProductParams product = member_of_block(p.products, block);
    const i64 first = (block * 8 + threadIdx.x / 32) * OUTPUTS;
    if (first >= product.outputs) return;
    const int lane = threadIdx.x % 32;
    const Element* x[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const i64 row = i64(blockIdx.y) * ROWS + r;
        x[r] = p.x + (row < p.rows ? row : p.rows - 1) * p.inputs;
    }
    const Weight* w[OUTPUTS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
        w[o] = product.weight + (first + o < product.outputs ? first + o : product.outputs - 1) * p.inputs;
    }

    float sums[OUTPUTS][ROWS] = {};
    for (i64 i = lane * VECTOR; i < p.inputs; i += 32 * VECTOR) {
        float weights[OUTPUTS][VECTOR];
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) load<VECTOR>(w[o] + i, weights[o]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float values[VECTOR];
            load<VECTOR>(x[r] + i, values);
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
                for (int k = 0; k < VECTOR; ++k) sums[o][r] += values[k] * weights[o][k];
            }
        }
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
        const float bias = product.bias && first + o < product.outputs ? to_float(product.bias[first + o]) : 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float sum = warp_sum(sums[o][r]) + bias;
            const i64 row = i64(blockIdx.y) * ROWS + r;
            if (lane == 0 && row < p.rows && first + o < product.outputs) {
                Element* y = product.y + row * product.outputs + first + o;
                *y = from_float<Element>(ACCUMULATE ? to_float(*y) + sum : sum);
            }
        }
    }
}
