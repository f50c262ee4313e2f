// Rotary position embedding of heads of 2 PAIRS elements: pair (i, i + PAIRS) turns by position * frequency_i,
//   y_i = x_i cos - x_(i+PAIRS) sin,   y_(i+PAIRS) = x_(i+PAIRS) cos + x_i sin;   backward the other way (SIGN = -1).
//
// Grid: a thread takes VECTOR pairs, threads along all of a tensor's, tensor by tensor (up to 4, of the same tokens). Shared memory: none.
// Bytes: x and y once, cosines and sines once a token (then from the cache). Bound by memory. y may be x.
// Edges: a row whose position is not in the table becomes NaN.
//
// budget: kernel=rope threads=256 registers=64 spills=0 shared=0
#include "array.cuh"
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"

extern "C" __global__ void __launch_bounds__(256) rope(const __grid_constant__ RopeParams p) {
    constexpr int PARTS = PAIRS / VECTOR;
    i64 block;
    const RopeHeadsParams tensor = member_of_block(p.tensors, block);
    const i64 at = block * blockDim.x + threadIdx.x;
    const i64 head = at / PARTS;
    const i64 row = head / tensor.heads;
    if (row >= p.rows) return;
    const int pair = int(at % PARTS) * VECTOR;
    const i64 low = head * (2 * PAIRS) + pair;
    const i64 position = p.positions[row];
    float x[VECTOR], y[VECTOR], cos[VECTOR], sin[VECTOR];
    if (position < 0 || position >= p.table_rows) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) x[i] = y[i] = not_a_number();
    } else {
        load<VECTOR>(tensor.x + low, x);
        load<VECTOR>(tensor.x + low + PAIRS, y);
        load<VECTOR>(p.cos + position * PAIRS + pair, cos);
        load<VECTOR>(p.sin + position * PAIRS + pair, sin);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float turn = float(SIGN) * sin[i], first = x[i];
            x[i] = first * cos[i] - y[i] * turn;
            y[i] = y[i] * cos[i] + first * turn;
        }
    }
    store<VECTOR>(tensor.y + low, x);
    store<VECTOR>(tensor.y + low + PAIRS, y);
}
