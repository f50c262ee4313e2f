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

// Begins s = rows keys^T with the warp's 16 rows, which are rows base.. of a tile of ROWS that begins at `tile`, and all rows of
// another tile.
template <int ROWS, int DIM, int PARTS, class Left, int AT>
__device__ __forceinline__ void begin_dots_with(float (&s)[1][PARTS][4], const char* tile, int base, const Left& rows,
                                                const Right<DIM, false, AT>& keys) {
    if constexpr (WARPGROUPS) {
        begin_products();
        begin_dots<DIM, ROWS, 8 * PARTS>(s, tile, first_together<ROWS>(base), keys.rows());
        commit_products();
    } else {
        dot_rows(s, rows, keys);
    }
}

// Begins o += p values.
template <int DIM, int TILES, int COLUMN_PARTS, int PARTS, int AT>
__device__ __forceinline__ void begin_rows_of(float (&o)[TILES][COLUMN_PARTS][4], const float (&p)[TILES][PARTS][4],
                                              const Right<DIM, true, AT>& values) {
    if constexpr (WARPGROUPS) {
        Operands<8 * PARTS> weights;
        round_parts<8 * PARTS>(weights, p);
        begin_products();
        begin_rows<DIM, 8 * PARTS>(o, weights, values.rows());
        commit_products();
    } else {
        add_rows<0>(o, p, values);
    }
}

// What was begun is done, but for the last PENDING products.
template <int PENDING, int TILES, int N>
__device__ __forceinline__ void end_products(float (&parts)[TILES][N][4]) {
    if constexpr (WARPGROUPS) finish<PENDING>(parts);
}
