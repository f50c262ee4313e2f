// Packed sequences, and rows of keys and values where they lie.
#pragma once
#include "tile.cuh"

// A sequence of a call. Tokens context .. context + queries are its queries; its rows of keys belong to the last `keys`
// tokens (or blocks) up to the last query.
struct Sequence {
    int query;    // its first query's row in q
    int queries;
    int context;
    int key;      // its first row of keys; with pages, the place of its first page in the table
    int keys;
    int tile;     // tiles of the sequences before it
};

constexpr int SEQUENCE_INTS = 6;

// The last sequence whose number COLUMN is not above `value`: that of a query's row with 0, of a tile with 5.
template <int COLUMN>
__device__ __forceinline__ Sequence find_sequence(const int* sequences, int count, int value) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (sequences[middle * SEQUENCE_INTS + COLUMN] <= value) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const int* at = sequences + low * SEQUENCE_INTS;
    return {at[0], at[1], at[2], at[3], at[4], at[5]};
}

// The same for all of a warp, which ask with the same value.
template <int COLUMN>
__device__ __forceinline__ Sequence sequence_of_warp(const int* sequences, int count, int value) {
    const Sequence found = find_sequence<COLUMN>(sequences, count, value);
    return {uniform(found.query), uniform(found.queries), uniform(found.context), uniform(found.key), uniform(found.keys),
            uniform(found.tile)};
}

constexpr int ROWS_OF_PAGE = PAGE_ROWS > 0 ? PAGE_ROWS : 1;

// A sequence's rows of one KV head: of a packed tensor `[rows, KV_HEADS, DIM]`, or in pages of PAGE_ROWS rows.
template <int DIM>
struct KeyRows {
    static constexpr i64 STRIDE = i64(KV_HEADS) * DIM;
    const Element* base;
    const u64* pages;
    int within;  // a row of a page

    // From an element of the rows on.
    __device__ __forceinline__ KeyRows(const Element* tensor, const u64* table, int first, int kv_head, int element = 0)
        : base(tensor + first * STRIDE + kv_head * DIM + element), pages(table + first), within(kv_head * DIM + element) {}
    __device__ __forceinline__ const Element* operator()(int row) const {
        if constexpr (PAGE_ROWS == 0) {
            return base + row * STRIDE;
        } else {
            const Element* const page = reinterpret_cast<const Element*>(pages[row / ROWS_OF_PAGE]);
            return page + row % ROWS_OF_PAGE * STRIDE + within;
        }
    }
    // Rows from `row` on that lie in one page.
    __device__ __forceinline__ EvenRows<STRIDE> from(int row) const { return {(*this)(row)}; }
};

// Rows of queries with one KV head, R a query: those from row `first` on in the order of queries, then heads. `token(i)` is the i-th
// query's row in [N]; `heads` the first of the KV head's rows in each of N tensors [N, HEADS, DIM].
template <int DIM, int N, class Token>
struct QueryRows {
    const Element* heads[N];
    int first;
    const Token& token;

    __device__ __forceinline__ const Element* operator()(int tensor, int row) const {
        return heads[tensor] + (i64(token((first + row) / GROUP)) * HEADS + (first + row) % GROUP) * DIM;
    }
};

// As load_tile, of such rows to a tile for each tensor, one behind the other. Where tiles begin with a query's first head, each
// thread keeps its chunk and its head, or goes from head to head.
template <class Layout, int ROWS, int THREADS, int BYTES, int DIM, int N, class Token>
__device__ __forceinline__ void load_tiles(u32 tile, int thread, int count, const QueryRows<DIM, N, Token>& rows) {
    constexpr int PIECES = Layout::PITCH / BYTES, DOWN = THREADS / PIECES, TILE_BYTES = ROWS * Layout::PITCH;
    constexpr bool WHOLE = THREADS % PIECES == 0 && ROWS % DOWN == 0 && (DOWN & (DOWN - 1)) == 0;
    constexpr bool ALIKE = WHOLE && ROWS % GROUP == 0 && (GROUP % DOWN == 0 || DOWN % GROUP == 0);
    if constexpr (BYTES == 16 && DIM == Layout::PADDED && ALIKE) {
        constexpr int SAME = GROUP > DOWN ? GROUP : DOWN;  // rows from which on a thread comes to another query
        const int row = int(u32(thread) / PIECES), piece = int(u32(thread) % PIECES), before = GROUP < DOWN ? int(u32(row) / GROUP) : 0;
        const u32 to = tile + Layout::chunk(row, piece);
        const int own = (row - before * GROUP) * DIM + piece * Layout::PER_CHUNK;
        const auto copy = [&](auto whole) {
            constexpr bool ALL = whole.value != 0;
            unroll<0, ROWS, SAME>([&](auto same) {
                constexpr int I = same.value;
                const bool there = ALL || row + I < count;
                const int query = rows.first / GROUP + (there ? before + I / GROUP : 0);
                const i64 from = i64(rows.token(query)) * (HEADS * DIM) + own;
                unroll<0, N>([&](auto tensor) {
                    constexpr int AT = tensor.value * TILE_BYTES;
                    const Element* const at = rows.heads[tensor.value] + from;
                    unroll<0, SAME, DOWN>([&](auto down) {
                        constexpr int J = down.value;
                        using To = Below<Layout, I + J>;
                        if constexpr (ALL) {
                            copy_chunk<To::BYTES + AT, J * DIM * int(sizeof(Element))>(to ^ To::SWAP, at);
                        } else {
                            copy_chunk<To::BYTES + AT, J * DIM * int(sizeof(Element))>(to ^ To::SWAP, at, there);
                        }
                    });
                });
            });
        };
        if (count >= ROWS) {
            copy(Size<1>());
        } else {
            copy(Size<0>());
        }
    } else {
#pragma unroll
        for (int tensor = 0; tensor < N; ++tensor) {
            load_tile<Layout, ROWS, THREADS, BYTES>(tile + tensor * TILE_BYTES, thread, count,
                                                    [&](int row) { return rows(tensor, row); });
        }
    }
}
