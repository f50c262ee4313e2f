// phi of the kinds `mean` and `weighted` (SPEC 2.1): with a_p the weight of token p of a block (1 for `mean`, whose sum is
// multiplied by 1 / l once) and e_p its position embedding,
//   block_i = scale sum_p a_p (x_(start_i + p) + e_p),   dx_t = scale sum over blocks i that cover t of a_(t - start_i) dy_i,
//   de_p += scale a_p sum_i dy_i,   da_p += sum_i dy_i . (x_(start_i + p) + e_p).
// What the embedding adds to every block is summed apart, in double: its error would not average out over blocks.
//
// Grid: compress_forward and compress_tokens, a thread takes VECTOR elements of a block or token and KV head;
// compress_weight_sums, a block a part, a token and a head, its warps blocks in turn; the others a thread an element of what
// they write. Sums over blocks are those of reduce.cu.
// Shared memory: compress_weight_sums 64 bytes. Bytes: x, dy and what is written once, as far as the cache holds the l / d
// reads of each row; with weights x l times from the cache. Bound by memory.
// Order of summation: tokens and blocks ascending; parts ascending, in double.
// Edges: tokens that no block covers get 0. Blocks never reach into another sequence, so their first rows say all.
//
// budget: kernel=compress_constants threads=256 registers=48 spills=0 shared=0
// budget: kernel=compress_forward threads=256 registers=64 spills=0 shared=0
// budget: kernel=compress_tokens threads=256 registers=48 spills=0 shared=0
// budget: kernel=compress_position threads=256 registers=40 spills=0 shared=0
// budget: kernel=compress_weight_sums threads=256 registers=56 spills=0 shared=64
// budget: kernel=compress_weight threads=256 registers=40 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"

constexpr int ROW = KV_HEADS * DIM;
constexpr int PARTS = ROW / VECTOR;

// a_p of a head.
__device__ __forceinline__ float weight_of(const Element* weight, int p, int head) {
    if constexpr (WEIGHTED) return to_float(weight[p * KV_HEADS + head]);
    return 1.0f;
}

__device__ __forceinline__ float scale() { return WEIGHTED ? 1.0f : 1.0f / float(COMPRESS_BLOCK); }

// constants[g, d] = sum_p a_p e_p.
extern "C" __global__ void __launch_bounds__(256) compress_constants(const __grid_constant__ CompressConstantsParams p) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= ROW) return;
    double sum = 0.0;
    for (int token = 0; token < COMPRESS_BLOCK; ++token) {
        sum += double(weight_of(p.weight, token, column / DIM)) * double(to_float(p.position[token * ROW + column]));
    }
    p.constants[column] = float(sum);
}

extern "C" __global__ void __launch_bounds__(256) compress_forward(const __grid_constant__ CompressForwardParams p) {
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 block = at / PARTS;
    if (block >= p.count) return;
    const int column = int(at % PARTS) * VECTOR;
    const Element* const x = p.x + i64(p.starts[block]) * ROW + column;
    float sum[VECTOR] = {};
#pragma unroll 4
    for (int token = 0; token < COMPRESS_BLOCK; ++token) {
        const float a = weight_of(p.weight, token, column / DIM);
        float row[VECTOR];
        load<VECTOR>(x + i64(token) * ROW, row);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[i] += a * row[i];
    }
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        if (p.constants) sum[i] += p.constants[column + i];
        sum[i] *= scale();
    }
    store<VECTOR>(p.blocks + block * ROW + column, sum);
}

// Blocks whose first row is not above `row`.
__device__ __forceinline__ i64 blocks_up_to(const int* starts, i64 count, i64 row) {
    i64 low = 0, high = count;
    while (low < high) {
        const i64 middle = (low + high) / 2;
        if (starts[middle] <= row) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(256) compress_tokens(const __grid_constant__ CompressTokensParams p) {
    const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 row = at / PARTS;
    if (row >= p.rows) return;
    const int column = int(at % PARTS) * VECTOR;
    const i64 end = blocks_up_to(p.starts, p.count, row);
    i64 block = end;
    while (block > 0 && p.starts[block - 1] + COMPRESS_BLOCK > row) --block;
    float sum[VECTOR] = {};
    for (; block < end; ++block) {
        const float a = weight_of(p.weight, int(row - p.starts[block]), column / DIM) * scale();
        float dy[VECTOR];
        load<VECTOR>(p.d_blocks + block * ROW + column, dy);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[i] += a * dy[i];
    }
    store<VECTOR>(p.dx + row * ROW + column, sum);
}

extern "C" __global__ void __launch_bounds__(256) compress_position(const __grid_constant__ CompressPositionParams p) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= COMPRESS_BLOCK * ROW) return;
    const int column = at % ROW;
    const float a = weight_of(p.weight, at / ROW, column / DIM) * scale();
    p.d_position[at] += float(double(a) * p.totals[column]);
}

// partial[part, p, g] = sum over the part's blocks of dy . x_(start + p).
extern "C" __global__ void __launch_bounds__(256) compress_weight_sums(const __grid_constant__ CompressWeightSumsParams p) {
    __shared__ double shared[8];
    const int token = blockIdx.y, head = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 first = i64(blockIdx.x) * p.part_rows;
    const i64 end = first + p.part_rows < p.count ? first + p.part_rows : p.count;
    double sum = 0.0;
    for (i64 block = first + warp; block < end; block += 8) {
        const Element* const x = p.x + (i64(p.starts[block]) + token) * ROW + head * DIM;
        const float* const dy = p.d_blocks + block * ROW + head * DIM;
        float dot = 0.0f;
        for (int d = lane; d < DIM; d += 32) dot += to_float(x[d]) * dy[d];
        sum += double(warp_sum(dot));
    }
    if (lane == 0) shared[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (int i = 0; i < 8; ++i) total += shared[i];
        p.partial[(i64(blockIdx.x) * COMPRESS_BLOCK + token) * KV_HEADS + head] = total;
    }
}

extern "C" __global__ void __launch_bounds__(256) compress_weight(const __grid_constant__ CompressWeightParams p) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= COMPRESS_BLOCK * KV_HEADS) return;
    double sum = p.sums[at];
    if (p.position) {
        const int column = at % KV_HEADS * DIM;
        for (int d = 0; d < DIM; ++d) {
            sum += double(to_float(p.position[at / KV_HEADS * ROW + column + d])) * p.totals[column + d];
        }
    }
    p.d_weight[at] += float(sum);
}
