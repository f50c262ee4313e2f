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

constexpr int ROWS_OF_PAGE = PAGE_ROWS > 0 ? PAGE_ROWS : 1;

// A sequence's rows of one KV head: of a packed tensor `[rows, KV_HEADS, DIM]`, or in pages of PAGE_ROWS rows.
template <int DIM>
struct KeyRows {
    static constexpr i64 STRIDE = i64(KV_HEADS) * DIM;
    const Element* base;
    const u64* pages;
    int head;

    __device__ __forceinline__ KeyRows(const Element* tensor, const u64* table, int first, int kv_head)
        : base(tensor + first * STRIDE + kv_head * DIM), pages(table + first), head(kv_head) {}
    __device__ __forceinline__ const Element* operator()(int row) const {
        if constexpr (PAGE_ROWS == 0) {
            return base + row * STRIDE;
        } else {
            const Element* const page = reinterpret_cast<const Element*>(pages[row / ROWS_OF_PAGE]);
            return page + row % ROWS_OF_PAGE * STRIDE + head * DIM;
        }
    }
    // Rows from `row` on that lie in one page.
    __device__ __forceinline__ EvenRows<STRIDE> from(int row) const { return {(*this)(row)}; }
};
