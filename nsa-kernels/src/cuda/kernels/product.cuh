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

// The warp's lane, computed anew where it is used.
__device__ __forceinline__ u32 lane_anew() { return u32(anew(int(threadIdx.x % 32))); }

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
            const Chunks<DIM> chunks = begin(threadIdx.x % 32);
            unroll<0, TILES>([&](auto tile) {
                constexpr int I = tile.value;
                unroll<0, STEPS>([&](auto step) { chunks.template load<step.value, I * 16, 0>(held[I][step.value]); });
            });
        }
    }
    __device__ __forceinline__ const char* rows() const { return tile; }
    // Where a lane reads them.
    __device__ __forceinline__ Chunks<DIM> begin() const { return begin(HELD ? 0 : lane_anew()); }
    template <int I, int K>
    __device__ __forceinline__ void part(u32 (&to)[4], const Chunks<DIM>& chunks) const {
        if constexpr (HELD) {
#pragma unroll
            for (int x = 0; x < 4; ++x) to[x] = held[I][K][x];
        } else {
            chunks.template load<K, I * 16, 0>(to);
        }
    }

private:
    __device__ __forceinline__ Chunks<DIM> begin(u32 lane) const {
        return Chunks<DIM>(shared_address(tile) + Layout::chunk(int(lane % 16), int(lane / 16)));
    }
};

// Where a lane reads a tile as the right side of products, whose columns are the tile's rows, or across: whose columns are the
// tile's. A lane reads the rows of a left side as it reads across. The tile lies AT bytes behind `tile`.
template <int DIM, bool ACROSS, int AT = 0>
struct Right {
    const char* tile;
    Chunks<DIM> chunks;

    __device__ __forceinline__ Right(const char* rows, const Chunks<DIM>& begin) : tile(rows), chunks(begin) {}
    __device__ __forceinline__ explicit Right(const char* rows) : tile(rows), chunks(shared_address(rows) + own(lane_anew())) {}
    // The same of the tile BYTES further on, and of the one `bytes` more.
    template <int BYTES>
    __device__ __forceinline__ Right<DIM, ACROSS, AT + BYTES> further(u32 bytes) const {
        return {tile + bytes, chunks.behind(bytes)};
    }
    __device__ __forceinline__ const char* rows() const { return tile + AT; }
    // The same, held in registers.
    __device__ __forceinline__ Right pinned() const { return {tile, chunks.pinned()}; }
    // As a left side, like `Rows`.
    __device__ __forceinline__ const Chunks<DIM>& begin() const { return chunks; }
    template <int I, int K>
    __device__ __forceinline__ void part(u32 (&to)[4], const Chunks<DIM>& from) const {
        static_assert(ACROSS, "how lanes read rows");
        from.template load<K, I * 16, AT>(to);
    }
    // Bytes from a tile to where a lane begins.
    static __device__ __forceinline__ int own(u32 lane) {
        using Layout = Tile<DIM>;
        const u32 row = ACROSS ? lane % 16 : lane % 8 + lane / 16 * 8, half = ACROSS ? lane / 16 : lane / 8 % 2;
        return Layout::chunk(int(row), int(half));
    }
};

// The first chunk that a lane reads so.
template <int DIM, bool ACROSS>
__device__ __forceinline__ u32 first_chunk(const char* tile) {
    return Right<DIM, ACROSS>(tile).chunks.at[0];
}

// The tile of rows of DIM elements that lies BYTES behind another one, and whose own first chunk would be `begin`. Where their rows
// lie alike, both are read from the same addresses.
template <int DIM, int BYTES, int OTHER_DIM, bool ACROSS, int AT>
__device__ __forceinline__ auto second_tile(const Right<OTHER_DIM, ACROSS, AT>& other, u32 begin) {
    if constexpr (DIM == OTHER_DIM) {
        return other.template further<BYTES>(0);
    } else {
        return Right<DIM, ACROSS>(other.rows() + BYTES, Chunks<DIM>(begin));
    }
}

template <int DIM, int TILES, int KEYS>
__device__ __forceinline__ void fused_dot_rows(Parts<TILES, KEYS>& s, const char* rows, const char* keys) {
    using Layout = Tile<DIM>;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int d = 0; d < Layout::CHUNKS; ++d) {
        float4 q[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                q[i][h] = *reinterpret_cast<const float4*>(rows + Layout::chunk(i * 16 + h * 8 + lane / 4, d));
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

// s = rows keys^T over dims 16 FROM.. 16 TO, on tensor cores.
template <int FROM, int TO, int DIM, int TILES, int PARTS, class Left, int AT>
__device__ __forceinline__ void dot_dims(float (&s)[TILES][PARTS][4], const Left& rows, const Right<DIM, false, AT>& keys) {
    const Chunks<DIM> of_rows = rows.begin();
    unroll<FROM, TO>([&](auto step) {
        constexpr int K = step.value;
        u32 a[TILES][4];
        unroll<0, TILES>([&](auto i) { rows.template part<i.value, K>(a[i.value], of_rows); });
        unroll<0, PARTS, 2>([&](auto part) {
            constexpr int N = part.value;
            u32 b[4];
            keys.chunks.template load<K, N * 8, AT>(b);
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                multiply<Element, (K > FROM)>(s[i][N], a[i], b[0], b[1]);
                multiply<Element, (K > FROM)>(s[i][N + 1], a[i], b[2], b[3]);
            }
        });
    });
}

// s = rows keys^T: each of the warp's rows with each of 8 PARTS rows of a tile. Tensor cores cut sums towards zero each time that
// they add to them; with SHORT, sums over more than 128 dims are several of up to 128, which are added as IEEE 754 asks.
template <bool SHORT = false, int DIM, int TILES, int PARTS, class Left, int AT>
__device__ __forceinline__ void dot_rows(float (&s)[TILES][PARTS][4], const Left& rows, const Right<DIM, false, AT>& keys) {
    if constexpr (TENSOR_CORES) {
        constexpr int STEPS = Tile<DIM>::PADDED / 16, SUMS = SHORT ? (STEPS + 7) / 8 : 1;
        dot_dims<0, STEPS / SUMS>(s, rows, keys);
        unroll<1, SUMS>([&](auto sum) {
            constexpr int FROM = STEPS * sum.value / SUMS, TO = STEPS * (sum.value + 1) / SUMS;
            float more[TILES][PARTS][4];
            dot_dims<FROM, TO>(more, rows, keys);
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
#pragma unroll
                for (int n = 0; n < PARTS; ++n) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) s[i][n][c] += more[i][n][c];
                }
            }
        });
    } else {
        clear<TILES, 8 * PARTS>(s);
        fused_dot_rows<DIM, TILES, 8 * PARTS>(s, rows.rows(), keys.rows());
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

// o += p values: rows of a tile, weighted by p, which is rounded to Element. o has columns FIRST.. of the
// values.
template <int FIRST, int DIM, int TILES, int COLUMN_PARTS, int PARTS, int AT>
__device__ __forceinline__ void add_rows(float (&o)[TILES][COLUMN_PARTS][4], const float (&p)[TILES][PARTS][4],
                                         const Right<DIM, true, AT>& values) {
    if constexpr (TENSOR_CORES) {
        unroll<0, PARTS, 2>([&](auto part) {
            constexpr int K = part.value;
            u32 a[TILES][4];
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                    const float* two = &p[i][K + x / 2][x % 2 * 2];
                    a[i][x] = operand<Element>(two[0], two[1]);
                }
            }
            unroll<0, COLUMN_PARTS, 2>([&](auto column) {
                constexpr int N = column.value;
                u32 b[4];
                values.chunks.template load_across<FIRST / 16 + N / 2, K * 8, AT>(b);
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    multiply<Element, true>(o[i][N], a[i], b[0], b[1]);
                    multiply<Element, true>(o[i][N + 1], a[i], b[2], b[3]);
                }
            });
        });
    } else {
        fused_add_rows<DIM, FIRST, 8 * COLUMN_PARTS, TILES, 8 * PARTS>(o, p, values.rows());
    }
}
