// The core that all forwards share: a warp's rows of queries meet a tile of keys and values.
//
// A warp has TILES x 16 rows. Scores of KEYS keys are a product in registers; their exponentials are the left side of the
// product with the values, without leaving the registers. Softmax is online, in powers of two: with m near the greatest
// score so far (in units of log2),
//   p = 2^(scale log2(e) s - m),   l = sum of p,   o = sum of p v (p rounded to Element),   lse = m / log2(e) + ln l.
// m is the greatest score so far, so that the key that outweighs all others has p = 1, which needs no rounding. No lane asks the
// others for their maximum before one of them has a greater one, and o and l are scaled then only.
// Tried: m that follows once scores have grown by 8 (in log2): seldom scaled, but rows that one key dominates err twice as much.
//
// Order of summation: keys in the order of tiles; within one, as in product.cuh; l: each lane its columns, then the quad's
// four lanes.
#pragma once
#include "product.cuh"

using Keys = Tile<HEAD_DIM_QK>;
using Values = Tile<HEAD_DIM_V>;
constexpr int PARTS_V = Values::PADDED / 8;

template <int TILES, bool HELD>
using Queries = Rows<HEAD_DIM_QK, TILES, HELD>;

// Scores, then their exponentials.
template <int TILES, int KEYS>
using Scores = Parts<TILES, KEYS>;

// 1 / l, 0 for a row without keys; a NaN goes on to the output.
__device__ __forceinline__ float inverse_of(float l) { return l == 0.0f ? 0.0f : 1.0f / l; }

// Natural logarithm of the softmax's denominator. m is a score times scale_log2, which is rounded: `unscale` is
// scale / scale_log2 in two parts, so that m becomes scale times the score again.
__device__ __forceinline__ float lse_of(float m, float l, const float (&unscale)[2]) {
    if (l == 0.0f) return negative_infinity();
    return fmaf(m, unscale[0], fmaf(m, unscale[1], logf(l)));
}

// What exponents are relative to.
__device__ __forceinline__ float base_of(float m) { return m == negative_infinity() ? 0.0f : m; }

template <int TILES, int KEYS>
struct Flash {
    static constexpr int PARTS = KEYS / 8;
    float o[TILES][PARTS_V][4];
    float m[TILES][2];
    float l[TILES][2];

    __device__ __forceinline__ Flash() {
        clear<TILES, Values::PADDED>(o);
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            m[i][0] = m[i][1] = negative_infinity();
            l[i][0] = l[i][1] = 0.0f;
        }
    }

    // s = q k^T.
    template <class Left, int AT>
    __device__ __forceinline__ void multiply_keys(Scores<TILES, KEYS>& s, const Left& q, const Right<HEAD_DIM_QK, false, AT>& keys) {
        dot_rows<true>(s, q, keys);
    }

    // o += p v.
    template <int AT>
    __device__ __forceinline__ void multiply_values(const Scores<TILES, KEYS>& p, const Right<HEAD_DIM_V, true, AT>& values) {
        add_rows<0>(o, p, values);
    }

    // Scores, minus infinity where masked, become p; l grows. Returns whether m has changed, and the factor by which, for what else
    // is kept relative to m. Lanes vote on all rows at once, or on eight at a time (APART): more votes, but fewer rows are scaled.
    template <bool APART = false>
    __device__ __forceinline__ bool exponentials(Scores<TILES, KEYS>& s, float scale_log2, float (&factor)[TILES][2]) {
        float top[TILES][2];
        bool grown[TILES][2], changed = false;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float most = fmaxf(s[i][0][2 * h], s[i][0][2 * h + 1]);
#pragma unroll
                for (int n = 1; n < PARTS; ++n) most = fmaxf(most, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
                top[i][h] = most * scale_log2;
                grown[i][h] = top[i][h] > m[i][h];
                if (APART) grown[i][h] = __any_sync(ALL_LANES, grown[i][h]);
                changed |= grown[i][h];
            }
        }
        if (!APART) changed = __any_sync(ALL_LANES, changed);
        if (changed) {
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    factor[i][h] = 1.0f;
                    if (!APART || grown[i][h]) factor[i][h] = follow(top[i][h], i, h);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float base = base_of(m[i][h]);
                float sum;
#pragma unroll
                for (int n = 0; n < PARTS; ++n) {
#pragma unroll
                    for (int c = 2 * h; c < 2 * h + 2; ++c) {
                        s[i][n][c] = exp2_approx(fmaf(s[i][n][c], scale_log2, -base));
                        sum = n == 0 && c == 2 * h ? s[i][n][c] : sum + s[i][n][c];
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

    __device__ __forceinline__ float inverse(int i, int h) const { return inverse_of(l[i][h]); }

    __device__ __forceinline__ float lse(int i, int h, const float (&unscale)[2]) const { return lse_of(m[i][h], l[i][h], unscale); }

    // o of rows 0..16 TILES to a tile of shared memory.
    __device__ __forceinline__ void put(char* tile) const {
        const int lane = threadIdx.x % 32;
        // Parts that lie at other chunks of those that are swapped; the others, and rows 8 apart, at constant distances from them.
        constexpr int PERIOD = Values::SWAPPED * Values::PER_CHUNK / 8, PART_BYTES = 8 * int(sizeof(Element));
#pragma unroll
        for (int first = 0; first < PERIOD; ++first) {
            char* const from = tile + Values::at(lane / 4, first * 8 + lane % 4 * 2);
#pragma unroll
            for (int n = first; n < PARTS_V; n += PERIOD) {
#pragma unroll
                for (int row = 0; row < 16 * TILES; row += 8) {
                    const float* const two = &o[row / 16][n][row / 8 % 2 * 2];
                    store_two<Element>(from + (n - first) * PART_BYTES + row * Values::PITCH, two[0], two[1]);
                }
            }
        }
    }

private:
    // m becomes the greatest score of rows some of which have grown; l and o follow. Returns the factor.
    __device__ __forceinline__ float follow(float top, int i, int h) {
        const float most = quad_max(top);
        const bool grown = most > m[i][h];
        const float factor = grown ? exp2_approx(m[i][h] - most) : 1.0f;
        m[i][h] = grown ? most : m[i][h];
        l[i][h] *= factor;
#pragma unroll
        for (int n = 0; n < PARTS_V; ++n) {
            o[i][n][2 * h] *= factor;
            o[i][n][2 * h + 1] *= factor;
        }
        return factor;
    }
};
