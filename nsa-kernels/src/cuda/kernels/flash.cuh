// The core that all attention shares: a warp's rows of queries meet a tile of keys and values.
//
// A warp has TILES x 16 rows. Scores of KEYS keys are a product in registers, [16 x 8] parts in which lane l has rows l / 4 and
// l / 4 + 8, columns 2 (l % 4) and + 1; their exponentials are the left side of the product with the values, without leaving
// the registers. Softmax is online, in powers of two: with m near the greatest score so far (in units of log2),
//   p = 2^(scale log2(e) s - m),   l = sum of p,   o = sum of p v (p rounded to Element),   lse = (m + log2 l) / log2(e).
// m follows the greatest score only when that has grown by more than SLACK: p is at most 2^SLACK then, o and l are seldom
// scaled, and no lane asks the others for their maximum before one of them has to. Any m gives the same quotient o / l.
//
// Order of summation: keys in the order of tiles; within one, as tensor cores add; l: each lane its columns, then the quad's
// four lanes. Element = float multiplies with fused multiply-adds, in the order of d and of the keys.
#pragma once
#include "tile.cuh"

constexpr float SLACK = 8.0f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr bool TENSOR_CORES = sizeof(Element) == 2;

using Keys = Tile<HEAD_DIM_QK>;
using Values = Tile<HEAD_DIM_V>;
constexpr int STEPS_QK = Keys::PADDED / 16;
constexpr int PARTS_V = Values::PADDED / 8;

// Queries of a warp: in registers as the left side of products, or read from shared memory each time.
template <int TILES, bool HELD>
struct Queries {
    u32 held[HELD ? TILES : 1][HELD ? STEPS_QK : 1][4];
    const char* tile;

    // Rows 0..16 TILES of the tile.
    __device__ __forceinline__ Queries(const char* rows) : tile(rows) {
        if constexpr (HELD) {
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
#pragma unroll
                for (int k = 0; k < STEPS_QK; ++k) load_matrices(held[i][k], place(threadIdx.x % 32, i, k));
            }
        }
    }
    // Rows 8 apart are swapped alike.
    __device__ __forceinline__ u32 place(int lane, int i, int k) const {
        return shared_address(tile) + Keys::chunk(lane % 16, 2 * k + lane / 16) + i * 16 * Keys::PITCH;
    }
    __device__ __forceinline__ void part(u32 (&to)[4], int lane, int i, int k) const {
        if constexpr (HELD) {
#pragma unroll
            for (int x = 0; x < 4; ++x) to[x] = held[i][k][x];
        } else {
            load_matrices(to, place(lane, i, k));
        }
    }
};

// Scores, then their exponentials.
template <int TILES, int KEYS>
using Scores = float[TILES][KEYS / 8][4];

template <int TILES, int KEYS>
struct Flash {
    static constexpr int PARTS = KEYS / 8;
    float o[TILES][PARTS_V][4];
    float m[TILES][2];
    float l[TILES][2];

    __device__ __forceinline__ Flash() {
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int n = 0; n < PARTS_V; ++n) o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0.0f;
            m[i][0] = m[i][1] = NEGATIVE_INFINITY;
            l[i][0] = l[i][1] = 0.0f;
        }
    }

    // s = q k^T.
    template <bool HELD>
    __device__ __forceinline__ void multiply_keys(Scores<TILES, KEYS>& s, const Queries<TILES, HELD>& q, const char* keys) {
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int n = 0; n < PARTS; ++n) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0.0f;
        }
        if constexpr (TENSOR_CORES) {
            const int lane = anew(int(threadIdx.x % 32)), row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
            const u32 base = shared_address(keys);
#pragma unroll
            for (int k = 0; k < STEPS_QK; ++k) {
                u32 a[TILES][4];
#pragma unroll
                for (int i = 0; i < TILES; ++i) q.part(a[i], lane, i, k);
                const u32 from = base + Keys::chunk(row, 2 * k + half);
#pragma unroll
                for (int n = 0; n < PARTS; n += 2) {
                    u32 b[4];
                    load_matrices(b, from + n * 8 * Keys::PITCH);
#pragma unroll
                    for (int i = 0; i < TILES; ++i) {
                        multiply<Element>(s[i][n], a[i], b[0], b[1]);
                        multiply<Element>(s[i][n + 1], a[i], b[2], b[3]);
                    }
                }
            }
        } else {
            fused_keys(s, q.tile, keys);
        }
    }

    // o += p v.
    __device__ __forceinline__ void multiply_values(const Scores<TILES, KEYS>& p, const char* values) {
        if constexpr (TENSOR_CORES) {
            const int lane = anew(int(threadIdx.x % 32));
            const u32 base = shared_address(values);
#pragma unroll
            for (int k = 0; k < PARTS; k += 2) {
                u32 a[TILES][4];
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
#pragma unroll
                    for (int x = 0; x < 4; ++x) {
                        const float* two = &p[i][k + x / 2][x % 2 * 2];
                        a[i][x] = pack<Element>(two[0], two[1]);
                    }
                }
#pragma unroll
                for (int n = 0; n < PARTS_V; n += 2) {
                    u32 b[4];
                    load_transposed(b, base + Values::chunk(lane % 16, n + lane / 16) + k * 8 * Values::PITCH);
#pragma unroll
                    for (int i = 0; i < TILES; ++i) {
                        multiply<Element>(o[i][n], a[i], b[0], b[1]);
                        multiply<Element>(o[i][n + 1], a[i], b[2], b[3]);
                    }
                }
            }
        } else {
            fused_values(p, values);
        }
    }

    // Scores, minus infinity where masked, become p; l grows. Returns whether m has changed, and the factor by which, for
    // what else is kept relative to m.
    __device__ __forceinline__ bool exponentials(Scores<TILES, KEYS>& s, float scale_log2, float (&factor)[TILES][2]) {
        float top[TILES][2];
        bool grown = false;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float most = fmaxf(s[i][0][2 * h], s[i][0][2 * h + 1]);
#pragma unroll
                for (int n = 1; n < PARTS; ++n) most = fmaxf(most, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
                top[i][h] = most * scale_log2;
                grown |= top[i][h] > m[i][h] + SLACK;
            }
        }
        const bool changed = __any_sync(ALL_LANES, grown);
        if (changed) follow(top, factor);
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float base = m[i][h] == NEGATIVE_INFINITY ? 0.0f : m[i][h];
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < PARTS; ++n) {
#pragma unroll
                    for (int c = 2 * h; c < 2 * h + 2; ++c) {
                        s[i][n][c] = exp2_approx(fmaf(s[i][n][c], scale_log2, -base));
                        sum += s[i][n][c];
                    }
                }
                l[i][h] += sum;
            }
        }
        return changed;
    }

    // l over the quad; o is divided by it.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                l[i][h] = quad_sum(l[i][h]);
                const float factor = inverse(i, h);
#pragma unroll
                for (int n = 0; n < PARTS_V; ++n) {
                    o[i][n][2 * h] *= factor;
                    o[i][n][2 * h + 1] *= factor;
                }
            }
        }
    }

    // 1 / l, 0 for a row without keys; a NaN goes on to the output.
    __device__ __forceinline__ float inverse(int i, int h) const { return l[i][h] == 0.0f ? 0.0f : 1.0f / l[i][h]; }

    // Natural logarithm of the softmax's denominator. m is a score times scale_log2, which is rounded: `unscale` is
    // scale / scale_log2 in two parts, so that m becomes scale times the score again.
    __device__ __forceinline__ float lse(int i, int h, const float (&unscale)[2]) const {
        if (l[i][h] == 0.0f) return NEGATIVE_INFINITY;
        return fmaf(m[i][h], unscale[0], fmaf(m[i][h], unscale[1], log2_approx(l[i][h]) * LN_2));
    }

    // o of rows 0..16 TILES to a tile of shared memory.
    __device__ __forceinline__ void put(char* tile) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int n = 0; n < PARTS_V; ++n) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    char* to = tile + Values::at(i * 16 + h * 8 + lane / 4, n * 8 + lane % 4 * 2);
                    if constexpr (TENSOR_CORES) {
                        *reinterpret_cast<u32*>(to) = pack<Element>(o[i][n][2 * h], o[i][n][2 * h + 1]);
                    } else {
                        *reinterpret_cast<float2*>(to) = make_float2(o[i][n][2 * h], o[i][n][2 * h + 1]);
                    }
                }
            }
        }
    }

private:
    // m becomes the greatest score of the rows that have grown; l and o follow.
    __device__ __forceinline__ void follow(const float (&top)[TILES][2], float (&factor)[TILES][2]) {
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float most = quad_max(top[i][h]);
                const bool grown = most > m[i][h] + SLACK;
                factor[i][h] = grown ? exp2_approx(m[i][h] - most) : 1.0f;
                m[i][h] = grown ? most : m[i][h];
                l[i][h] *= factor[i][h];
#pragma unroll
                for (int n = 0; n < PARTS_V; ++n) {
                    o[i][n][2 * h] *= factor[i][h];
                    o[i][n][2 * h + 1] *= factor[i][h];
                }
            }
        }
    }

    __device__ __forceinline__ void fused_keys(Scores<TILES, KEYS>& s, const char* queries, const char* keys) {
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int d = 0; d < Keys::CHUNKS; ++d) {
            float4 q[TILES][2];
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = i * 16 + h * 8 + lane / 4;
                    q[i][h] = *reinterpret_cast<const float4*>(queries + Keys::chunk(row, d));
                }
            }
#pragma unroll
            for (int n = 0; n < PARTS; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int key = n * 8 + lane % 4 * 2 + c;
                    const float4 k = *reinterpret_cast<const float4*>(keys + Keys::chunk(key, d));
#pragma unroll
                    for (int i = 0; i < TILES; ++i) {
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            float& sum = s[i][n][2 * h + c];
                            sum = fmaf(q[i][h].x, k.x, sum);
                            sum = fmaf(q[i][h].y, k.y, sum);
                            sum = fmaf(q[i][h].z, k.z, sum);
                            sum = fmaf(q[i][h].w, k.w, sum);
                        }
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void fused_values(const Scores<TILES, KEYS>& p, const char* values) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll 1
            for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float weight[TILES][2];
#pragma unroll
                    for (int i = 0; i < TILES; ++i) {
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            weight[i][h] = __shfl_sync(ALL_LANES, p[i][part][2 * h + c], lane / 4 * 4 + pair);
                        }
                    }
                    add_value(weight, values, part * 8 + pair * 2 + c);
                }
            }
        }
    }

    __device__ __forceinline__ void add_value(const float (&weight)[TILES][2], const char* values, int key) {
#pragma unroll
        for (int n = 0; n < PARTS_V; ++n) {
            const float2 v = *reinterpret_cast<const float2*>(values + Values::at(key, n * 8 + threadIdx.x % 4 * 2));
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    o[i][n][2 * h] = fmaf(weight[i][h], v.x, o[i][n][2 * h]);
                    o[i][n][2 * h + 1] = fmaf(weight[i][h], v.y, o[i][n][2 * h + 1]);
                }
            }
        }
    }
};
