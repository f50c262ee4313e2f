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

// Steps of KEYS tokens go to stages of shared memory in turn. A turn is as many steps of one block as there are stages, so that
// each knows its own, or one step, where a block's do not come out even.
static_assert(STAGES == 2, "one step is on its way while another is met");
constexpr int TURN_STEPS = ceil_div(SELECT_BLOCK, KEYS) % STAGES == 0 ? STAGES : 1;
constexpr int TURN = TURN_STEPS * KEYS;

// The blocks that at least one of a tile's queries has selected, in order, a turn at a time.
struct Blocks {
    const int* lists;  // [QUERIES, SELECT_COUNT] in shared memory
    int queries;       // of the tile
    int position;      // of the first query
    int place;         // lane q: in query q's list
    int mine;          // lane q: block at that place
    int block;         // in turn
    u32 selected;      // bit q: query q has selected it
    int offset;        // of the turn within the block

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
    // Tokens of the block from the turn's first on that some query sees.
    __device__ __forceinline__ int count() const { return within(last() + 1 - token()); }
    // Those that query q sees, none if it has not selected the block.
    __device__ __forceinline__ int count_of(int q) const {
        if (QUERIES > 1 && (selected >> q & 1) == 0) return 0;
        return within(position + q + 1 - token());
    }
    // Whether all rows see the whole turn.
    __device__ __forceinline__ bool whole() const {
        const u32 all = queries == 32 ? ALL_LANES : (1u << queries) - 1;
        return (QUERIES == 1 || selected == all) && within(position + 1 - token()) >= TURN;
    }
    __device__ __forceinline__ void next() {
        offset += TURN;
        if (offset < SELECT_BLOCK && token() <= last()) return;
        offset = 0;
        if (mine == block && !done()) {
            ++place;
            mine = read(threadIdx.x % 32);
        }
        choose();
    }

private:
    // Turns may go on behind the block's end.
    __device__ __forceinline__ int within(int seen) const {
        if (SELECT_BLOCK % TURN == 0) return seen;
        return seen < SELECT_BLOCK - offset ? seen : SELECT_BLOCK - offset;
    }
};

// Bytes of a step: keys, and values behind them.
constexpr int STAGE_BYTES = KEYS * (Tile<HEAD_DIM_QK>::PITCH + Tile<HEAD_DIM_V>::PITCH);

// A thread's part in copies of steps to the stages of its tile, where keys and values lie so.
template <class KeyTile, class ValueTile>
struct StepCopies {
    using CopyKeys = EvenCopy<KeyTile, KEYS, TILE_THREADS, QK_COPY_BYTES, KeyRows<HEAD_DIM_QK>::STRIDE>;
    using CopyValues = EvenCopy<ValueTile, KEYS, TILE_THREADS, V_COPY_BYTES, KeyRows<HEAD_DIM_V>::STRIDE>;
    CopyKeys copy_keys;
    CopyValues copy_values;
    KeyRows<HEAD_DIM_QK> k;
    KeyRows<HEAD_DIM_V> v;
    // Of the turn: where this thread begins to read, tokens that are read.
    const Element* keys;
    const Element* values;
    int count;

    // Of the sequence's rows of k and v with a KV head, in tensors or pages.
    __device__ __forceinline__ StepCopies(u32 stages, int thread, const Sequence& sequence, int head, const Element* k_rows,
                                          const u64* k_pages, const Element* v_rows, const u64* v_pages)
        : copy_keys(CopyKeys(stages, thread).pinned()),
          copy_values(CopyValues(stages, thread).pinned()),
          k(k_rows, k_pages, sequence.key, head, CopyKeys::begin(thread)),
          v(v_rows, v_pages, sequence.key, head, CopyValues::begin(thread)) {}

    // Starts to copy step STEP of a turn to that stage, `behind` bytes further.
    template <int STEP>
    __device__ __forceinline__ void start(const Blocks& blocks, u32 behind) {
        const bool there = STEP == 0 ? !blocks.done() : count > STEP * KEYS;
        if (STEP == 0 && there) {
            keys = k(blocks.token()), values = v(blocks.token());
            count = blocks.count();
        }
        if (there) {
            constexpr int AT = STEP * STAGE_BYTES, FIRST = STEP * KEYS;
            copy_keys.template copy<AT, FIRST>(keys, count - FIRST, behind);
            copy_values.template copy<AT + KEYS * Tile<HEAD_DIM_QK>::PITCH, FIRST>(values, count - FIRST, behind);
        }
        copy_commit();
    }
};

// Walks over blocks: `wait()` waits until the step that was copied last is there, and all have left the one before;
// `meet(blocks, step, behind, whole)` meets it in stage `step.value`, `behind` bytes further. Of a turn that all rows see (`whole`,
// the same in all lanes) there is nothing to mask.
template <class Copies, class Wait, class Meet>
__device__ __forceinline__ void walk(Blocks blocks, Copies& copies, const Wait& wait, const Meet& meet) {
    copies.template start<0>(blocks, 0);
    // Of turns of one step every other one lies in the other stage.
    for (u32 turn = 0; !blocks.done(); turn = STAGE_BYTES - turn) {
        const u32 behind = TURN_STEPS == 1 ? turn : 0;
        const Blocks now = blocks;
        const bool whole = uniform(now.whole());
        unroll<0, TURN_STEPS>([&](auto step) {
            constexpr int I = step.value;
            wait();
            if constexpr (I + 1 < TURN_STEPS) {
                copies.template start<I + 1>(blocks, behind);
            } else {
                blocks.next();
                copies.template start<0>(blocks, TURN_STEPS == 1 ? STAGE_BYTES - behind : 0);
            }
            if (I == 0 || whole || now.count() > I * KEYS) meet(now, step, behind, whole);
        });
    }
}

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
    // Row of tensors [N, HEADS].
    __device__ __forceinline__ i64 place(int row) const { return token(row) * HEADS + query_head(row); }
    // Starts to copy the tile's rows of a tensor [N, HEADS, DIM] to a tile that lies so. Heads of one query lie beside each other.
    template <class Layout, int BYTES, int DIM = Layout::COLUMNS>
    __device__ __forceinline__ void load_rows_of(const Element* tensor, u32 to) const {
        const int thread = int(threadIdx.x % TILE_THREADS);
        if constexpr (QUERIES == 1) {
            load_tile<Layout, ROWS, TILE_THREADS, BYTES>(to, thread, heads, EvenRows<DIM>{tensor + place(0) * DIM});
        } else {
            // Rows that are none are not written: any will do.
            load_tile<Layout, ROWS, TILE_THREADS, BYTES>(to, thread, queries * HEADS_PER_TILE,
                                                         [&](int row) { return tensor + place(has(row) ? row : 0) * DIM; });
        }
    }
};

