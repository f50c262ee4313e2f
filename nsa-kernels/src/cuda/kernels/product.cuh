// Products of a warp's rows with tiles in shared memory. A part of a product is [16 x 8]: lane l has rows l / 4 and l / 4 + 8,
// columns 2 (l % 4) and + 1.
//
// Order of summation: as tensor cores add, 16 at a time, in order. Element = float multiplies with fused multiply-adds, in
// order.
#pragma once
#include "tile.cuh"

constexpr bool TENSOR_CORES = sizeof(Element) == 2;

// TILES x 16 rows, COLUMNS columns.
template <int TILES, int COLUMNS>
using Parts = float[TILES][COLUMNS / 8][4];

template <int TILES, int COLUMNS>
__device__ __forceinline__ void clear(Parts<TILES, COLUMNS>& parts) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) parts[i][n][0] = parts[i][n][1] = parts[i][n][2] = parts[i][n][3] = 0.0f;
    }
}

// A warp's rows as the left side of products: in registers, or read from shared memory each time.
template <int DIM, int TILES, bool HELD>
struct Rows {
    using Layout = Tile<DIM>;
    static constexpr int STEPS = Layout::PADDED / 16;
    u32 held[HELD ? TILES : 1][HELD ? STEPS : 1][4];
    const char* tile;

    // Rows 0..16 TILES of the tile.
    __device__ __forceinline__ Rows(const char* rows) : tile(rows) {}
    // To registers, if they are to be held, once they are in shared memory.
    __device__ __forceinline__ void take() {
        if constexpr (HELD) {
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
#pragma unroll
                for (int k = 0; k < STEPS; ++k) load_matrices(held[i][k], place(begin(threadIdx.x % 32), i, k));
            }
        }
    }
    // Where a lane begins.
    __device__ __forceinline__ u32 begin(int lane) const { return shared_address(tile) + Layout::chunk(lane % 16, lane / 16); }
    // Rows 8 apart are swapped alike.
    static __device__ __forceinline__ u32 place(u32 begin, int i, int k) {
        return Layout::behind(begin, 2 * k) + i * 16 * Layout::PITCH;
    }
    __device__ __forceinline__ void part(u32 (&to)[4], u32 begin, int i, int k) const {
        if constexpr (HELD) {
#pragma unroll
            for (int x = 0; x < 4; ++x) to[x] = held[i][k][x];
        } else {
            load_matrices(to, place(begin, i, k));
        }
    }
};

template <int DIM, int TILES, int KEYS, bool HELD>
__device__ __forceinline__ void fused_dot_rows(Parts<TILES, KEYS>& s, const Rows<DIM, TILES, HELD>& rows, const char* keys) {
    using Layout = Tile<DIM>;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int d = 0; d < Layout::CHUNKS; ++d) {
        float4 q[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                q[i][h] = *reinterpret_cast<const float4*>(rows.tile + Layout::chunk(i * 16 + h * 8 + lane / 4, d));
            }
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float4 k = *reinterpret_cast<const float4*>(keys + Layout::chunk(n * 8 + lane % 4 * 2 + c, d));
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

// Adds dims 16 FROM.. 16 TO of rows keys^T to s, on tensor cores.
template <int DIM, int FROM, int TO, int TILES, int KEYS, bool HELD>
__device__ __forceinline__ void add_dots(Parts<TILES, KEYS>& s, const Rows<DIM, TILES, HELD>& rows, const char* keys) {
    using Layout = Tile<DIM>;
    const int lane = anew(int(threadIdx.x % 32)), row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
    const u32 begin = shared_address(keys) + Layout::chunk(row, half), of_rows = HELD ? 0 : rows.begin(lane);
#pragma unroll
    for (int k = FROM; k < TO; ++k) {
        u32 a[TILES][4];
#pragma unroll
        for (int i = 0; i < TILES; ++i) rows.part(a[i], of_rows, i, k);
        const u32 from = Layout::behind(begin, 2 * k);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            u32 b[4];
            load_matrices(b, from + n * 8 * Layout::PITCH);
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                multiply<Element>(s[i][n], a[i], b[0], b[1]);
                multiply<Element>(s[i][n + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// s = rows keys^T: each of the warp's rows with each of KEYS rows of a tile. Tensor cores cut sums towards zero each time that
// they add to them; with HALVES, sums over more than 128 dims are two, which are added as IEEE 754 asks.
template <int DIM, int TILES, int KEYS, bool HELD, bool HALVES = false>
__device__ __forceinline__ void dot_rows(Parts<TILES, KEYS>& s, const Rows<DIM, TILES, HELD>& rows, const char* keys) {
    constexpr int STEPS = Tile<DIM>::PADDED / 16, FIRST = HALVES && STEPS > 8 ? STEPS / 2 : STEPS;
    clear<TILES, KEYS>(s);
    if constexpr (TENSOR_CORES) {
        add_dots<DIM, 0, FIRST, TILES, KEYS, HELD>(s, rows, keys);
    } else {
        fused_dot_rows<DIM, TILES, KEYS, HELD>(s, rows, keys);
    }
    if constexpr (TENSOR_CORES && FIRST < STEPS) {
        Parts<TILES, KEYS> rest;
        clear<TILES, KEYS>(rest);
        add_dots<DIM, FIRST, STEPS, TILES, KEYS, HELD>(rest, rows, keys);
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int c = 0; c < 4; ++c) s[i][n][c] += rest[i][n][c];
            }
        }
    }
}

template <int DIM, int FIRST, int COLUMNS, int TILES>
__device__ __forceinline__ void fused_add_row(Parts<TILES, COLUMNS>& o, const float (&weight)[TILES][2], const char* values,
                                              int key) {
    using Layout = Tile<DIM>;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) {
        const float2 v = *reinterpret_cast<const float2*>(values + Layout::at(key, FIRST + n * 8 + threadIdx.x % 4 * 2));
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

template <int DIM, int FIRST, int COLUMNS, int TILES, int KEYS>
__device__ __forceinline__ void fused_add_rows(Parts<TILES, COLUMNS>& o, const Parts<TILES, KEYS>& p, const char* values) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int part = 0; part < KEYS / 8; ++part) {
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
                fused_add_row<DIM, FIRST, COLUMNS, TILES>(o, weight, values, part * 8 + pair * 2 + c);
            }
        }
    }
}

// o += p values: rows of a tile of KEYS rows, weighted by p, which is rounded to Element. o has columns FIRST.. of the
// values.
template <int DIM, int FIRST, int COLUMNS, int TILES, int KEYS>
__device__ __forceinline__ void add_rows(Parts<TILES, COLUMNS>& o, const Parts<TILES, KEYS>& p, const char* values) {
    using Layout = Tile<DIM>;
    if constexpr (TENSOR_CORES) {
        const int lane = anew(int(threadIdx.x % 32));
        const u32 begin = shared_address(values) + Layout::chunk(lane % 16, lane / 16);
#pragma unroll
        for (int k = 0; k < KEYS / 8; k += 2) {
            u32 a[TILES][4];
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                    const float* two = &p[i][k + x / 2][x % 2 * 2];
                    a[i][x] = operand<Element>(two[0], two[1]);
                }
            }
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n += 2) {
                u32 b[4];
                load_transposed(b, Layout::behind(begin, FIRST / 8 + n) + k * 8 * Layout::PITCH);
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    multiply<Element>(o[i][n], a[i], b[0], b[1]);
                    multiply<Element>(o[i][n + 1], a[i], b[2], b[3]);
                }
            }
        }
    } else {
        fused_add_rows<DIM, FIRST, COLUMNS, TILES, KEYS>(o, p, values);
    }
}
