// Tiles of rows in shared memory: where an element lies, how rows get there and leave.
#pragma once
#include "mma.cuh"

// Rows of DIM elements, filled up with zeros to PADDED, a multiple of 16; no gaps between rows. The 16-byte chunks of a row
// are swapped by the row's number (exclusive or), so that eight lanes that read one chunk of eight rows meet all banks. Tiles
// begin at multiples of 128 bytes: swapping is then an exclusive or of the address, which a thread has ready for a place of
// its own.
template <int DIM>
struct Tile {
    static constexpr int COLUMNS = DIM;
    static constexpr int PADDED = round_up(DIM, 16);
    static constexpr int PITCH = PADDED * int(sizeof(Element));
    static constexpr int CHUNKS = PITCH / 16;
    static constexpr int PER_CHUNK = 16 / int(sizeof(Element));
    static constexpr int ROW_BYTES = PITCH;  // from a chunk to the one below it
    // Chunks that are swapped among each other, and rows between two swaps: rows of 2, 4, 8 chunks share the banks.
    static constexpr int SWAPPED = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
    static constexpr int STEP = 8 / SWAPPED;

    static __device__ __forceinline__ constexpr int swap(int row) { return (row / STEP) % SWAPPED; }
    // Byte of a chunk.
    static __device__ __forceinline__ int chunk(int row, int chunk) { return row * PITCH + ((chunk ^ swap(row)) * 16); }
    // The address of the chunk that is `chunks`, an even number, behind one of the first two of a row, which is at `at`.
    static __device__ __forceinline__ u32 behind(u32 at, int chunks) {
        return (at ^ (chunks % SWAPPED * 16)) + chunks / SWAPPED * (SWAPPED * 16);
    }
    // Byte of an element.
    static __device__ __forceinline__ int at(int row, int column) {
        return chunk(row, column / PER_CHUNK) + column % PER_CHUNK * int(sizeof(Element));
    }
};

// Rows at one distance from each other.
template <i64 STRIDE>
struct EvenRows {
    const Element* first;
    __device__ __forceinline__ const Element* operator()(int row) const { return first + row * STRIDE; }
};

// The address of the chunk `rows` below one at `at`, whose row is less than some power of two that divides `rows`.
template <class Layout>
__device__ __forceinline__ u32 below(u32 at, int rows) {
    return (at ^ (Layout::swap(rows) * 16)) + rows * Layout::ROW_BYTES;
}

// Starts to copy rows 0..ROWS to a tile that lies so: row r from `row(r)` if r < count, else zeros. BYTES at a time; all
// THREADS help.
template <class Layout, int ROWS, int THREADS, int BYTES, class Row>
__device__ __forceinline__ void load_tile(u32 tile, int thread, int count, const Row& row) {
    constexpr int PIECES = Layout::PITCH / BYTES;
    constexpr int USED = Layout::COLUMNS * int(sizeof(Element)) / BYTES;
    // Not unrolled: addresses in flight cost registers that products need.
#pragma unroll 1
    for (int i = thread; i < ROWS * PIECES; i += THREADS) {
        const int r = i / PIECES, byte = i % PIECES * BYTES;
        const bool there = r < count && i % PIECES < USED;
        const char* from = reinterpret_cast<const char*>(row(there ? r : 0)) + (there ? byte : 0);
        copy_async<BYTES>(tile + Layout::chunk(r, byte / 16) + byte % 16, from, there);
    }
}

// The same of even rows. Where the threads fill whole rows, each keeps its chunk and goes down.
template <class Layout, int ROWS, int THREADS, int BYTES, i64 STRIDE>
__device__ __forceinline__ void load_tile(u32 tile, int thread, int count, const EvenRows<STRIDE>& rows) {
    constexpr int PIECES = Layout::PITCH / BYTES, DOWN = THREADS / PIECES;
    constexpr bool WHOLE = THREADS % PIECES == 0 && ROWS % DOWN == 0 && (DOWN & (DOWN - 1)) == 0;
    if constexpr (BYTES == 16 && Layout::COLUMNS == Layout::PADDED && WHOLE) {
        const int first = int(u32(thread) / PIECES), piece = int(u32(thread) % PIECES);
        const u32 to = tile + Layout::chunk(first, piece);
        const Element* const from = rows(first) + piece * Layout::PER_CHUNK;
        if (count >= ROWS) {
#pragma unroll
            for (int i = 0; i < ROWS / DOWN; ++i) copy_chunk(below<Layout>(to, i * DOWN), from + i * DOWN * STRIDE);
        } else {
#pragma unroll
            for (int i = 0; i < ROWS / DOWN; ++i) {
                copy_async<16>(below<Layout>(to, i * DOWN), from + i * DOWN * STRIDE, first + i * DOWN < count);
            }
        }
    } else {
        load_tile<Layout, ROWS, THREADS, BYTES, EvenRows<STRIDE>>(tile, thread, count, rows);
    }
}

// The same of a tile of each warp's own.
template <int DIM, int ROWS, int THREADS, int BYTES, class Row>
__device__ __forceinline__ void load_rows(u32 tile, int thread, int count, const Row& row) {
    load_tile<Tile<DIM>, ROWS, THREADS, BYTES>(tile, thread, count, row);
}

// Writes rows 0..count of a tile to `row(r)`, BYTES at a time (or single elements); all THREADS help.
template <int DIM, int THREADS, int BYTES, class Row>
__device__ __forceinline__ void store_rows(const char* tile, int thread, int count, const Row& row) {
    using Layout = Tile<DIM>;
    constexpr int PIECES = DIM * int(sizeof(Element)) / BYTES;
    for (int i = thread; i < count * PIECES; i += THREADS) {
        const int r = i / PIECES, byte = i % PIECES * BYTES;
        char* to = reinterpret_cast<char*>(row(r)) + byte;
        const char* from = tile + Layout::chunk(r, byte / 16) + byte % 16;
        if constexpr (BYTES == 16) {
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else if constexpr (BYTES == 8) {
            *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
        } else if constexpr (BYTES == 4) {
            *reinterpret_cast<u32*>(to) = *reinterpret_cast<const u32*>(from);
        } else {
            *reinterpret_cast<u16*>(to) = *reinterpret_cast<const u16*>(from);
        }
    }
}
