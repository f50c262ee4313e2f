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

    static __device__ __forceinline__ constexpr int swap(int row) { return int(u32(row) / STEP % SWAPPED); }
    // Byte of a chunk.
    static __device__ __forceinline__ int chunk(int row, int chunk) { return row * PITCH + ((chunk ^ swap(row)) * 16); }
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

// How the address of the chunk ROWS below another one, whose row is less than some power of two that divides ROWS, differs from
// its address: by an exclusive or with the first number, then the second more.
template <class Layout, int ROWS>
struct Below {
    static constexpr int SWAP = Layout::swap(ROWS) * 16;
    static constexpr int BYTES = ROWS * Layout::ROW_BYTES;
};

// Addresses of 16-byte chunks of a lane's own row, an even number of them apart, and of rows below it.
template <int DIM>
struct Chunks {
    using Layout = Tile<DIM>;
    static constexpr int COUNT = Layout::SWAPPED / 2;
    u32 at[COUNT];

    // One of the row's first two is at `first`.
    __device__ __forceinline__ explicit Chunks(u32 first) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) at[i] = first ^ (i * 32);
    }
    // What of the address of chunk 2 K behind it, ROW rows (a multiple of 8, which are swapped alike) below, is a constant.
    template <int K, int ROW>
    static constexpr int OFFSET = K / COUNT * (Layout::SWAPPED * 16) + ROW * Layout::PITCH;

    // Four matrices there, and AT bytes behind.
    template <int K, int ROW, int AT>
    __device__ __forceinline__ void load(u32 (&to)[4]) const {
        load_matrices<OFFSET<K, ROW> + AT>(to, at[K % COUNT]);
    }
    template <int K, int ROW, int AT>
    __device__ __forceinline__ void load_across(u32 (&to)[4]) const {
        load_transposed<OFFSET<K, ROW> + AT>(to, at[K % COUNT]);
    }
    // Those of a tile `bytes` behind.
    __device__ __forceinline__ Chunks behind(u32 bytes) const {
        Chunks other = *this;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) other.at[i] += bytes;
        return other;
    }
    // The same, held in registers.
    __device__ __forceinline__ Chunks pinned() const {
        Chunks other = *this;
        pin(other.at);
        return other;
    }
};

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

// A thread's part in copies of even rows to tiles of ROWS rows. Where the threads fill whole rows, each keeps its chunk and goes
// down, and what it has ready serves all tiles at constant distances.
template <class Layout, int ROWS, int THREADS, int BYTES, i64 STRIDE>
struct EvenCopy {
    static constexpr int PIECES = Layout::PITCH / BYTES, DOWN = THREADS / PIECES, SIZE = int(sizeof(Element));
    static constexpr bool WHOLE = THREADS % PIECES == 0 && ROWS % DOWN == 0 && (DOWN & (DOWN - 1)) == 0;
    // Distances are constants of 32 bits.
    static constexpr bool KEPT = BYTES == 16 && Layout::COLUMNS == Layout::PADDED && WHOLE && STRIDE * SIZE < 1 << 20;
    // Rows below the thread's own are swapped in so many ways, which differ by an exclusive or with multiples of UNIT.
    static constexpr int UNIT = !KEPT || DOWN >= 8 ? 8 : Layout::swap(DOWN) > 0 ? Layout::swap(DOWN) : 1;
    u32 to[8 / UNIT];
    int row;  // the thread's own; without a chunk kept, the thread

    __device__ __forceinline__ EvenCopy(u32 tile, int thread) : row(thread) {
        to[0] = tile;
        if constexpr (KEPT) {
            row = int(u32(thread) / PIECES);
            to[0] += Layout::chunk(row, int(u32(thread) % PIECES));
#pragma unroll
            for (int i = 1; i < 8 / UNIT; ++i) to[i] = to[0] ^ (i * UNIT * 16);
        }
    }
    // The same, held in registers.
    __device__ __forceinline__ EvenCopy pinned() const {
        EvenCopy other = *this;
        pin(other.to);
        return other;
    }
    // Elements from a tile's first row to where a thread begins to read.
    static __device__ __forceinline__ int begin(int thread) {
        return KEPT ? int(u32(thread) / PIECES * u32(STRIDE) + u32(thread) % PIECES * Layout::PER_CHUNK) : 0;
    }
    // Where the thread's chunk of the row D below its own lies.
    template <int D>
    __device__ __forceinline__ u32 at() const {
        return swapped<D>() + Below<Layout, D>::BYTES;
    }
    // Starts to copy `count` of the rows from the FIRST-th on, zeros behind them, to the tile AT + `behind` bytes behind.
    template <int AT, int FIRST>
    __device__ __forceinline__ void copy(const Element* from, int count, u32 behind) const {
        if constexpr (KEPT) {
            const auto each = [&](const auto& act) {
                unroll<0, ROWS, DOWN>([&](auto down) {
                    constexpr int D = down.value;
                    act(down, Size<AT + Below<Layout, D>::BYTES>(), Size<int((D + FIRST) * STRIDE) * SIZE>(), swapped<D>() + behind);
                });
            };
            if (count >= ROWS) {
                each([&](auto, auto after, auto further, u32 at) { copy_chunk<after.value, further.value>(at, from); });
            } else {
                each([&](auto down, auto after, auto further, u32 at) {
                    copy_chunk<after.value, further.value>(at, from, row + down.value < count);
                });
            }
        } else {
            load_tile<Layout, ROWS, THREADS, BYTES, EvenRows<STRIDE>>(to[0] + AT + behind, row, count, {from + FIRST * STRIDE});
        }
    }

private:
    template <int D>
    __device__ __forceinline__ u32 swapped() const {
        return to[Below<Layout, D>::SWAP / 16 / UNIT];
    }
};

// The same of even rows.
template <class Layout, int ROWS, int THREADS, int BYTES, i64 STRIDE>
__device__ __forceinline__ void load_tile(u32 tile, int thread, int count, const EvenRows<STRIDE>& rows) {
    using Copy = EvenCopy<Layout, ROWS, THREADS, BYTES, STRIDE>;
    Copy(tile, thread).template copy<0, 0>(rows.first + Copy::begin(thread), count, 0);
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

// The same of rows that lie beside each other, from `first` on, ROWS of them at most. Where the threads fill whole rows, each keeps
// its chunk and goes down.
template <int DIM, int ROWS, int THREADS, int BYTES>
__device__ __forceinline__ void store_even_rows(const char* tile, int thread, int count, Element* first) {
    using Copy = EvenCopy<Tile<DIM>, ROWS, THREADS, BYTES, DIM>;
    if constexpr (Copy::KEPT) {
        const Copy own(u32(0), thread);
        Element* const to = first + Copy::begin(thread);
        unroll<0, ROWS, Copy::DOWN>([&](auto down) {
            constexpr int D = down.value;
            if (own.row + D < count) {
                *reinterpret_cast<uint4*>(to + D * DIM) = *reinterpret_cast<const uint4*>(tile + own.template at<D>());
            }
        });
    } else {
        store_rows<DIM, THREADS, BYTES>(tile, thread, count < ROWS ? count : ROWS, [&](int row) { return first + row * DIM; });
    }
}
