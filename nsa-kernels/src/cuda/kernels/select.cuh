// A tile of queries over the blocks that they have selected: QUERIES queries with HEADS_PER_TILE of their heads are the ROWS rows of
// a warp alone (16), or of four together (64).
#pragma once
#include "unit.cuh"
#include "sequence.cuh"

constexpr int PARTS_OF_GROUP = ceil_div(GROUP, ROWS);
constexpr int HEADS_PER_TILE = ceil_div(GROUP, PARTS_OF_GROUP);
constexpr int TILE_THREADS = 2 * ROWS;
// What lies behind begins where tiles may.
constexpr int LIST_BYTES = round_up(QUERIES * SELECT_COUNT * 4, 128);
constexpr int NO_MORE = 0x7fffffff;
static_assert(ROWS_OF_PAGE % SELECT_BLOCK == 0 || PAGE_ROWS == 0, "a block lies in one page");
static_assert(QUERIES * HEADS_PER_TILE <= ROWS && QUERIES <= 32, "a tile has so many rows, a lane a query");

// The blocks that at least one of a tile's queries has selected, in order, in steps of KEYS tokens.
struct Blocks {
    const int* lists;  // [QUERIES, SELECT_COUNT] in shared memory
    int queries;       // of the tile
    int position;      // of the first query
    int place;         // lane q: in query q's list
    int mine;          // lane q: block at that place
    int block;         // in turn
    u32 selected;      // bit q: query q has selected it
    int offset;        // of the step within the block

    __device__ __forceinline__ Blocks(const int* lists_, int queries_, int position_)
        : lists(lists_), queries(queries_), position(position_), place(0), offset(0) {
        const int lane = threadIdx.x % 32;
        mine = lane < queries ? read(lane) : NO_MORE;
        choose();
    }
    __device__ __forceinline__ int read(int q) const {
        if (place >= SELECT_COUNT) return NO_MORE;
        const int next = lists[q * SELECT_COUNT + place];
        // A list that is none, which the caller did not check, ends where it leaves the query's candidates.
        return next < 0 || next > (position + q) / SELECT_BLOCK ? NO_MORE : next;
    }
    __device__ __forceinline__ void choose() {
        if constexpr (QUERIES == 1) {
            block = __shfl_sync(ALL_LANES, mine, 0);
            selected = 1;
        } else {
            block = int(__reduce_min_sync(ALL_LANES, u32(mine)));
            selected = __ballot_sync(ALL_LANES, mine == block);
        }
    }
    __device__ __forceinline__ bool done() const { return block == NO_MORE; }
    __device__ __forceinline__ int token() const { return block * SELECT_BLOCK + offset; }
    // The position of the last query that has selected the block.
    __device__ __forceinline__ int last() const { return position + 31 - __clz(selected); }
    // Tokens of the step that some query sees.
    __device__ __forceinline__ int count() const {
        const int rest = SELECT_BLOCK - offset < KEYS ? SELECT_BLOCK - offset : KEYS;
        const int seen = last() + 1 - token();
        return seen < rest ? seen : rest;
    }
    // Tokens of the step that query q sees, none if it has not selected the block.
    __device__ __forceinline__ int count_of(int q) const {
        if ((selected >> q & 1) == 0) return 0;
        const int rest = SELECT_BLOCK - offset < KEYS ? SELECT_BLOCK - offset : KEYS;
        const int seen = position + q + 1 - token();
        return seen < rest ? seen : rest;
    }
    // Whether all rows see all KEYS tokens.
    __device__ __forceinline__ bool whole() const {
        const u32 all = queries == 32 ? ALL_LANES : (1u << queries) - 1;
        return selected == all && offset + KEYS <= SELECT_BLOCK && token() + KEYS <= position + 1;
    }
    __device__ __forceinline__ void next() {
        offset += KEYS;
        if (offset < SELECT_BLOCK && token() <= last()) return;
        offset = 0;
        if (mine == block && !done()) {
            ++place;
            mine = read(threadIdx.x % 32);
        }
        choose();
    }
};

// The rows of a warp, or of four.
struct SelectTile {
    Sequence sequence;
    int head;     // KV head
    int query;    // first, within the sequence
    int queries;
    int first;    // head of the group
    int heads;    // of the group

    // Of the thread's tile, with the KV head of the block; without queries behind the last tile.
    __device__ __forceinline__ SelectTile(const int* sequences, int count, int tiles) {
        const i64 work = i64(blockIdx.x) * (32 * WARPS / TILE_THREADS) + threadIdx.x / TILE_THREADS;
        const i64 index = work / PARTS_OF_GROUP;
        head = blockIdx.y;
        first = int(work % PARTS_OF_GROUP) * HEADS_PER_TILE;
        heads = GROUP - first < HEADS_PER_TILE ? GROUP - first : HEADS_PER_TILE;
        queries = 0;
        if (index >= tiles) return;
        sequence = sequence_of_warp<5>(sequences, count, int(index));
        query = int(index - sequence.tile) * QUERIES;
        queries = sequence.queries - query < QUERIES ? sequence.queries - query : QUERIES;
    }
    // The queries' lists to shared memory.
    __device__ __forceinline__ void load_lists(int* lists, const int* block_indices) const {
        for (int i = threadIdx.x % TILE_THREADS; i < queries * SELECT_COUNT; i += TILE_THREADS) {
            const i64 list = (token(0) + i / SELECT_COUNT) * KV_HEADS + head;
            lists[i] = block_indices[list * SELECT_COUNT + i % SELECT_COUNT];
        }
    }
    __device__ __forceinline__ int position(int q) const { return sequence.context + query + q; }
    __device__ __forceinline__ int query_of(int row) const { return row / HEADS_PER_TILE; }
    __device__ __forceinline__ bool has(int row) const {
        return query_of(row) < queries && row % HEADS_PER_TILE < heads;
    }
    __device__ __forceinline__ i64 token(int row) const { return sequence.query + query + query_of(row); }
    __device__ __forceinline__ int query_head(int row) const { return head * GROUP + first + row % HEADS_PER_TILE; }
};

