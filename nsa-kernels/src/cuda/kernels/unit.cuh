// Products of tiles in shared memory by the unit that a device has: each warp alone (product.cuh), or four together (wgmma.cuh).
//
// What begins may go on while other instructions run, and ends where it is said to. A warp alone has then long done it.
#pragma once
#include "wgmma.cuh"

// Rows of a tile whose products are made by one warp alone, or by four together (WARPGROUPS, as the device can).
constexpr int ROWS_TOGETHER = WARPGROUPS ? 64 : 16;
// Tiles begin at multiples of so many bytes.
constexpr int TILE_ALIGNMENT = WARPGROUPS ? 1024 : 128;

template <bool TOGETHER, int DIM, int ROWS>
struct TileOf {
    using Layout = Tile<DIM>;
};
template <int DIM, int ROWS>
struct TileOf<true, DIM, ROWS> {
    using Layout = Panels<DIM, ROWS>;
};
// How a tile of rows lies that products read.
template <int DIM, int ROWS>
using SharedTile = typename TileOf<WARPGROUPS != 0, DIM, ROWS>::Layout;

// What this thread has copied to shared memory, and all others, is there for products.
__device__ __forceinline__ void wait_for_tiles() {
    copy_wait<0>();
    if constexpr (WARPGROUPS) publish_to_products();
    __syncthreads();
}

// The first row of those whose products are made together, of a tile of ROWS.
template <int ROWS>
__device__ __forceinline__ int first_together(int row) {
    return ROWS <= ROWS_TOGETHER ? 0 : uniform(row / ROWS_TOGETHER * ROWS_TOGETHER);
}

// Begins s = rows keys^T with the warp's 16 rows from row `base` of a tile of ROWS on, and all rows of another tile.
template <int DIM, int ROWS, int N>
__device__ __forceinline__ void begin_dots_with(Parts<1, N>& s, const char* rows, int base, const char* keys) {
    if constexpr (WARPGROUPS) {
        begin_products();
        begin_dots<DIM, ROWS, N>(s, rows, first_together<ROWS>(base), keys);
        commit_products();
    } else {
        dot_rows<DIM, 1, N, false>(s, Rows<DIM, 1, false>(rows + base * Tile<DIM>::PITCH), keys);
    }
}

// Begins o += p values.
template <int DIM, int N, int TILES = 1>
__device__ __forceinline__ void begin_rows_of(Parts<TILES, Tile<DIM>::PADDED>& o, const Parts<TILES, N>& p, const char* values) {
    if constexpr (WARPGROUPS) {
        Operands<N> weights;
        round_parts<N>(weights, p);
        begin_products();
        begin_rows<DIM, N>(o, weights, values);
        commit_products();
    } else {
        add_rows<DIM, 0, Tile<DIM>::PADDED, TILES, N>(o, p, values);
    }
}

// What was begun is done, but for the last PENDING products.
template <int PENDING, int TILES, int N>
__device__ __forceinline__ void end_products(float (&parts)[TILES][N][4]) {
    if constexpr (WARPGROUPS) finish<PENDING>(parts);
}
