// Products that four warps make together from shared memory (wgmma, sm_90a): 64 rows, 16 a warp, whose right side is read once
// for all of them. Parts of a product lie over lanes as those of product.cuh.
//
// A product is begun, and goes on while other instructions run: what it reads and writes is left alone until `finish`.
// Order of summation: as tensor cores add, 16 at a time, in order.
#pragma once
#include "product.cuh"

// Rows of DIM elements, a multiple of 64, as panels of 64 columns: [DIM / 64][ROWS] of 128 bytes, whose chunks of 16 bytes are
// swapped by the row's number, as tensor cores expect it. Panels lie at multiples of 1,024 bytes.
template <int DIM, int ROWS>
struct Panels {
    static constexpr int COLUMNS = DIM;
    static constexpr int PADDED = DIM;
    static constexpr int PITCH = DIM * int(sizeof(Element));
    static constexpr int CHUNKS = PITCH / 16;
    static constexpr int PER_CHUNK = 16 / int(sizeof(Element));
    static constexpr int ROW_BYTES = 128;
    static constexpr int GROUP_BYTES = 8 * ROW_BYTES;  // of rows that are swapped differently
    static constexpr int PANEL_BYTES = ROWS * ROW_BYTES;

    static __device__ __forceinline__ constexpr int swap(int row) { return int(u32(row) % 8); }
    static __device__ __forceinline__ int chunk(int row, int chunk) {
        return chunk / 8 * PANEL_BYTES + row * ROW_BYTES + ((chunk % 8 ^ swap(row)) * 16);
    }
};

// Where the lines of a matrix lie: LEADING bytes from 64 columns to the next (where columns are its lines). The lower half of
// what instructions take.
__device__ __forceinline__ u32 matrix_at(u32 address, int leading) { return (address & 0x3ffff) >> 4 | u32(leading) >> 4 << 16; }
// The whole of the same matrix from BYTES further on; 1,024 bytes from eight rows to the next.
__device__ __forceinline__ u64 further(u32 matrix, int bytes) {
    constexpr u64 SWAPPED_128 = u64(1) << 62;
    return u64(matrix + u32(bytes >> 4)) | u64(1024 >> 4) << 32 | SWAPPED_128;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING groups of products are under way; `parts` are those of one that is done then.
template <int PENDING, int TILES, int N>
__device__ __forceinline__ void finish(float (&parts)[TILES][N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            // The compiler takes them as known since the product has begun.
            asm volatile("" : "+f"(parts[i][n][0]), "+f"(parts[i][n][1]), "+f"(parts[i][n][2]), "+f"(parts[i][n][3])::"memory");
        }
    }
}

// Writes of this thread to shared memory are there for products and bulk copies that are begun after the next barrier.
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define NSA_PART(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define NSA_PARTS_4(n) NSA_PART(n), NSA_PART(n + 1), NSA_PART(n + 2), NSA_PART(n + 3)
#define NSA_PARTS_8(n) NSA_PARTS_4(n), NSA_PARTS_4(n + 4)
#define NSA_PARTS_16(n) NSA_PARTS_8(n), NSA_PARTS_8(n + 8)
#define NSA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NSA_NAMES_32 NSA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NSA_NAMES_64                                                                                                           \
    NSA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
                 "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// `along`: d = a b or d += a b, both of which lie in shared memory along the sum. `across`: parts FIRST.. of d += a b, a in
// registers, b in shared memory across the sum.
#define NSA_WGMMA(TYPE, COLUMNS, NAMES, A, B, SUM, ENDING)                                                            \
    "{\n.reg .pred sum;\nsetp.ne.b32 sum, " SUM ", 0;\n"                                                              \
    "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" NAMES "}, " A ", " B ", sum, 1, 1, " ENDING ";\n}"

#define NSA_WGMMA_COLUMNS(T, TYPE, COUNT, NAMES, PARTS, P0, P1, P2, P3, P4, P5)                                              \
    template <>                                                                                                              \
    struct Wgmma<T, COUNT> {                                                                                                 \
        static __device__ __forceinline__ void along(float (&d)[COUNT / 8][4], u64 a, u64 b, bool sum) {                     \
            asm volatile(NSA_WGMMA(TYPE, #COUNT, NAMES, P0, P1, P2, "0, 0") : PARTS(0) : "l"(a), "l"(b), "r"(int(sum)));     \
        }                                                                                                                    \
        template <int FIRST, int N>                                                                                          \
        static __device__ __forceinline__ void across(float (&d)[N][4], const u32 (&a)[4], u64 b) {                          \
            static_assert(FIRST + COUNT / 8 <= N, "parts");                                                                  \
            asm volatile(NSA_WGMMA(TYPE, #COUNT, NAMES, "{" P0 ", " P1 ", " P2 ", " P3 "}", P4, P5, "1")                     \
                         : PARTS(FIRST)                                                                                      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                                      \
        }                                                                                                                    \
    };

template <class T, int COLUMNS>
struct Wgmma;
#define NSA_WGMMA_TYPE(T, TYPE)                                                                                                 \
    NSA_WGMMA_COLUMNS(T, TYPE, 32, NSA_NAMES_16, NSA_PARTS_4, "%16", "%17", "%18", "%19", "%20", "%21")                  \
    NSA_WGMMA_COLUMNS(T, TYPE, 64, NSA_NAMES_32, NSA_PARTS_8, "%32", "%33", "%34", "%35", "%36", "%37")                  \
    NSA_WGMMA_COLUMNS(T, TYPE, 128, NSA_NAMES_64, NSA_PARTS_16, "%64", "%65", "%66", "%67", "%68", "%69")
NSA_WGMMA_TYPE(Bf16, "bf16")
NSA_WGMMA_TYPE(F16, "f16")

// Begins s = rows keys^T over dims 16 FROM.. 16 TO: 64 rows from `first` on of a tile of LEFT_ROWS, with each of KEYS rows of
// another.
template <int DIM, int LEFT_ROWS, int KEYS, int FROM = 0, int TO = DIM / 16>
__device__ __forceinline__ void begin_dots(Parts<1, KEYS>& s, const char* rows, int first, const char* keys) {
    using Left = Panels<DIM, LEFT_ROWS>;
    using Right = Panels<DIM, KEYS>;
    const u32 a = matrix_at(shared_address(rows) + first * Left::ROW_BYTES, 0), b = matrix_at(shared_address(keys), 0);
#pragma unroll
    for (int k = FROM; k < TO; ++k) {
        Wgmma<Element, KEYS>::along(s[0], further(a, k / 4 * Left::PANEL_BYTES + k % 4 * 32),
                                    further(b, k / 4 * Right::PANEL_BYTES + k % 4 * 32), k > FROM);
    }
}

// s = rows keys^T; sums over more than 128 dims are two, as in `dot_rows`.
template <int DIM, int LEFT_ROWS, int KEYS, int TILES>
__device__ __forceinline__ void dots_together(Parts<TILES, KEYS>& s, const char* rows, int first, const char* keys) {
    constexpr int STEPS = DIM / 16, FIRST = STEPS > 8 ? STEPS / 2 : STEPS;
    Parts<TILES, KEYS> rest;
    begin_products();
    begin_dots<DIM, LEFT_ROWS, KEYS, 0, FIRST>(s, rows, first, keys);
    if constexpr (FIRST < STEPS) begin_dots<DIM, LEFT_ROWS, KEYS, FIRST, STEPS>(rest, rows, first, keys);
    commit_products();
    finish<0>(s);
    if constexpr (FIRST < STEPS) {
        finish<0>(rest);
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) s[0][n][c] += rest[0][n][c];
        }
    }
}

// Elements of KEYS columns as the left side of a product.
template <int KEYS>
using Operands = u32[KEYS / 16][4];

template <int KEYS>
__device__ __forceinline__ void round_parts(Operands<KEYS>& to, const Parts<1, KEYS>& p) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            const float* two = &p[0][2 * k + x / 2][x % 2 * 2];
            to[k][x] = operand<Element>(two[0], two[1]);
        }
    }
}

// Begins to add rows of a tile, weighted by p: COUNT columns from FROM on.
template <int DIM, int FROM, int COUNT, int KEYS>
__device__ __forceinline__ void begin_columns(Parts<1, DIM>& o, const Operands<KEYS>& p, u32 values) {
    using Layout = Panels<DIM, KEYS>;
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) {
        Wgmma<Element, COUNT>::template across<FROM / 8>(o[0], p[k],
                                                         further(values, FROM / 64 * Layout::PANEL_BYTES + k * 2 * Layout::GROUP_BYTES));
    }
}

// Begins o += p values: rows of a tile of KEYS rows, weighted by p.
template <int DIM, int KEYS>
__device__ __forceinline__ void begin_rows(Parts<1, DIM>& o, const Operands<KEYS>& p, const char* values) {
    static_assert(DIM % 64 == 0 && DIM <= 256, "columns");
    const u32 at = matrix_at(shared_address(values), Panels<DIM, KEYS>::PANEL_BYTES);
    if constexpr (DIM >= 128) begin_columns<DIM, 0, 128, KEYS>(o, p, at);
    if constexpr (DIM >= 256) begin_columns<DIM, 128, 128, KEYS>(o, p, at);
    if constexpr (DIM % 128 == 64) begin_columns<DIM, DIM - 64, 64, KEYS>(o, p, at);
}
