// phi of the kinds `linear` and `mlp` (SPEC 2.1), around the products that cuBLAS makes. With z a block's tokens plus their
// embeddings, flattened,
//   linear:  block = z W;   mlp:  block = gelu(z W1 + b1) W2 + b2,   gelu(h) = h Phi(h), Phi the normal distribution.
// Tokens are taken in chunks of d = COMPRESS_STRIDE: a block is l / d of them, and chunk c + s times slice s of W1 (the rows
// of tokens s d .. s d + d of a block) is summed over s into row c. So each chunk is multiplied once by each slice, for all
// sequences in one product, and no block is copied. Rows of chunks that begin no block (the last l / d - 1 of a sequence but
// the last one) are multiplied too, and left out here: `blocks` says which block each row is, or -1.
// What embeddings add to every block, vec(e) W1, is summed apart, in double: its error would not average out over blocks.
// The same for what the gradients get from it: with s_h = sum over blocks of dh, db1_h += s_h, de += W1 s, dW1 += vec(e) s.
//
// A chunk's tokens of one head lie one behind the other: `compress_gather` brings them there, [C, G, d, D].
// Grid: compress_gather and compress_scatter, a thread takes VECTOR elements of a token and KV head; compress_embedded, a thread
// a column of W1 and a token of the block (y); compress_embedding_backward, a warp a row of W1; the others a thread an element.
// Shared memory: none. FLOP: 2 l D a hidden unit and block in the products (1 / l of that once more for W2; backward twice
// that, and for mlp the first product again); a few dozen an element of the hidden layer here. Bytes here: x and dx twice,
// hidden units once for each kernel, W1 once for the embedding and twice for its gradient. Bound by memory; the products by
// arithmetic. Order of summation: slices ascending; tokens ascending, in double; lanes of a row of W1 by the warp's tree.
// Edges: tokens of no block get 0, and are not read.
// Not on tensor cores: products of gradients, which are f32. Split in two parts of TF32 they would be about four times as
// fast, but tensor cores cut their sums where f32 rounds, and over thousands of blocks that is more than f32's own error.
//
// budget: kernel=compress_gather threads=256 registers=40 spills=0 shared=0
// budget: kernel=compress_scatter threads=256 registers=40 spills=0 shared=0
// budget: kernel=compress_embedded threads=256 registers=40 spills=0 shared=0
// budget: kernel=compress_added threads=256 registers=32 spills=0 shared=0
// budget: kernel=compress_finish threads=256 registers=40 spills=0 shared=0
// budget: kernel=compress_gelu threads=256 registers=40 spills=0 shared=0
// budget: kernel=compress_spread threads=256 registers=40 spills=0 shared=0
// budget: kernel=compress_gelu_backward threads=256 registers=40 spills=0 shared=0
// budget: kernel=compress_bias threads=256 registers=32 spills=0 shared=0
// budget: kernel=compress_embedding_backward threads=256 registers=48 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"

constexpr int ROW = KV_HEADS * DIM;
constexpr int HIDDEN_ROW = KV_HEADS * HIDDEN;
constexpr int CHUNK = COMPRESS_STRIDE * ROW;

// Where VECTOR elements of gathered chunks [C, G, d, D] are in [N, G, D], given the first token of each chunk.
struct Place {
    i64 gathered, token;
};
__device__ __forceinline__ bool place(i64 thread, const int* tokens, i64 chunks, Place& place) {
    constexpr int parts = CHUNK / VECTOR;
    const i64 chunk = thread / parts;
    if (chunk >= chunks) return false;
    // Threads in the order of tokens.
    const int within = int(thread % parts) * VECTOR;
    const int token = within / ROW, head = within % ROW / DIM, column = within % DIM;
    place.gathered = chunk * CHUNK + (head * COMPRESS_STRIDE + token) * DIM + column;
    place.token = (i64(tokens[chunk]) + token) * ROW + head * DIM + column;
    return true;
}

__device__ __forceinline__ i64 thread() { return i64(blockIdx.x) * blockDim.x + threadIdx.x; }

extern "C" __global__ void __launch_bounds__(256) compress_gather(const __grid_constant__ CompressGatherParams p) {
    Place at;
    if (!place(thread(), p.tokens, p.chunks, at)) return;
    float x[VECTOR];
    load<VECTOR>(p.x + at.token, x);
    store<VECTOR>(p.gathered + at.gathered, x);
}

extern "C" __global__ void __launch_bounds__(256) compress_scatter(const __grid_constant__ CompressScatterParams p) {
    Place at;
    if (!place(thread(), p.tokens, p.chunks, at)) return;
    float x[VECTOR];
    load<VECTOR>(p.gathered + at.gathered, x);
    store<VECTOR>(p.dx + at.token, x);
}

// partial[p, g, h] = sum_c e[p, g, c] W1[g, p D + c, h].
extern "C" __global__ void __launch_bounds__(256) compress_embedded(const __grid_constant__ CompressEmbeddedParams p) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (column >= HIDDEN_ROW) return;
    const int head = column / HIDDEN;
    const Element* const e = p.position + token * ROW + head * DIM;
    const Element* const w = p.weight + i64(head * COMPRESS_BLOCK + token) * DIM * HIDDEN + column % HIDDEN;
    double sum = 0.0;
    for (int c = 0; c < DIM; ++c) sum += double(to_float(e[c])) * double(to_float(w[i64(c) * HIDDEN]));
    p.partial[token * HIDDEN_ROW + column] = sum;
}

// What is added to every row of a layer.
extern "C" __global__ void __launch_bounds__(256) compress_added(const __grid_constant__ CompressAddedParams p) {
    const i64 at = thread();
    if (at >= p.columns) return;
    const double bias = p.bias ? double(to_float(p.bias[at])) : 0.0;
    p.added[at] = float(bias + (p.embedded ? p.embedded[at] : 0.0));
}

// Rows that are blocks, rounded once.
extern "C" __global__ void __launch_bounds__(256) compress_finish(const __grid_constant__ CompressFinishParams p) {
    const i64 at = thread(), row = at / ROW;
    if (row >= p.rows) return;
    const int block = p.blocks[row], column = int(at % ROW);
    if (block < 0) return;
    const float added = p.added ? p.added[column] : 0.0f;
    p.y[i64(block) * ROW + column] = from_float<Element>(p.sums[at] + added);
}

// Phi(z); from erfc, since 1 + erf has lost its digits where z is far below 0.
__device__ __forceinline__ float normal(float z) { return 0.5f * erfcf(z * -0.70710678118654752f); }

extern "C" __global__ void __launch_bounds__(256) compress_gelu(const __grid_constant__ CompressGeluParams p) {
    const i64 at = thread(), row = at / HIDDEN_ROW;
    if (row >= p.rows) return;
    const float z = p.z[at] + (p.added ? p.added[at % HIDDEN_ROW] : 0.0f);
    p.z[at] = z * normal(z);
}

// dy of each row: a block's gradient, or 0.
extern "C" __global__ void __launch_bounds__(256) compress_spread(const __grid_constant__ CompressSpreadParams p) {
    const i64 at = thread(), row = at / ROW;
    if (row >= p.rows) return;
    const int block = p.blocks[row];
    p.dy[at] = block < 0 ? 0.0f : p.d_blocks[i64(block) * ROW + at % ROW];
}

// z becomes gelu(z), the gradient of gelu(z) that of z. Rows that are no block are 0.
extern "C" __global__ void __launch_bounds__(256) compress_gelu_backward(const __grid_constant__ CompressGeluBackwardParams p) {
    const i64 at = thread(), row = at / HIDDEN_ROW;
    if (row >= p.rows) return;
    if (p.blocks[row] < 0) {
        p.z[at] = 0.0f;
        p.gradient[at] = 0.0f;
        return;
    }
    const float z = p.z[at] + (p.added ? p.added[at % HIDDEN_ROW] : 0.0f);
    const float below = normal(z), density = 0.39894228040143268f * expf(-0.5f * z * z);
    p.z[at] = z * below;
    p.gradient[at] *= below + z * density;
}

extern "C" __global__ void __launch_bounds__(256) compress_bias(const __grid_constant__ CompressBiasParams p) {
    const i64 at = thread();
    if (at < p.columns) p.d_bias[at] += float(p.totals[at]);
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// Row (g, p, c) of W1: de[p, g, c] += sum_h W1[row, h] s[g, h];  dW1[row, h] += e[p, g, c] s[g, h].
extern "C" __global__ void __launch_bounds__(256)
    compress_embedding_backward(const __grid_constant__ CompressEmbeddingBackwardParams p) {
    const i64 row = thread() / 32;
    const int lane = threadIdx.x % 32;
    if (row >= i64(COMPRESS_BLOCK) * ROW) return;
    const int column = int(row % DIM), token = int(row / DIM % COMPRESS_BLOCK), head = int(row / (COMPRESS_BLOCK * DIM));
    const int at = token * ROW + head * DIM + column;
    const double e = double(to_float(p.position[at]));
    double sum = 0.0;
    for (int h = lane; h < HIDDEN; h += 32) {
        const double total = p.totals[head * HIDDEN + h];
        p.d_weight[row * HIDDEN + h] += float(e * total);
        sum += double(to_float(p.weight[row * HIDDEN + h])) * total;
    }
    sum = warp_sum(sum);
    if (lane == 0 && p.d_position) p.d_position[at] += float(sum);
}
