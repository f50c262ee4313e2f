// Attention over selected blocks (SPEC 2.2).
#include "config.cuh"
#include "params.cuh"
#include "flash.cuh"
#include "sequence.cuh"

// A warp works alone: QUERIES queries with HEADS_PER_TILE of their heads are its 16 rows.
constexpr int PARTS_OF_GROUP = ceil_div(GROUP, 16);
constexpr int HEADS_PER_TILE = ceil_div(GROUP, PARTS_OF_GROUP);
constexpr int ROWS = 16;
constexpr int STAGE_BYTES = KEYS * (Keys::PITCH + Values::PITCH);
constexpr int HEAD_BYTES = ROWS * (Keys::PITCH > Values::PITCH ? Keys::PITCH : Values::PITCH);
// Queries that are held in registers come through the stages, and outputs leave through them.
constexpr bool HELD = QUERIES_HELD && TENSOR_CORES && HEAD_BYTES <= STAGES * STAGE_BYTES;
constexpr int LIST_BYTES = round_up(QUERIES * SELECT_COUNT * 4, 16);
constexpr int WARP_BYTES = STAGES * STAGE_BYTES + (HELD ? 0 : HEAD_BYTES) + LIST_BYTES;
static_assert(ROWS_OF_PAGE % SELECT_BLOCK == 0 || PAGE_ROWS == 0, "a block lies in one page");
constexpr int NO_MORE = 0x7fffffff;
static_assert(QUERIES * HEADS_PER_TILE <= ROWS, "a tile has 16 rows");

extern __shared__ __align__(128) char shared[];

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

// The rows of a warp.
struct SelectTile {
    Sequence sequence;
    int head;     // KV head
    int query;    // first, within the sequence
    int queries;
    int first;    // head of the group
    int heads;    // of the group

    __device__ __forceinline__ int query_of(int row) const { return row / HEADS_PER_TILE; }
    __device__ __forceinline__ bool has(int row) const {
        return query_of(row) < queries && row % HEADS_PER_TILE < heads;
    }
    __device__ __forceinline__ i64 token(int row) const { return sequence.query + query + query_of(row); }
    __device__ __forceinline__ int query_head(int row) const { return head * GROUP + first + row % HEADS_PER_TILE; }
};

__device__ __forceinline__ void mask(Scores<1, KEYS>& s, const Blocks& blocks, const SelectTile& tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int end = blocks.count_of(tile.query_of(h * 8 + lane / 4)) - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                if (n * 8 + c >= end) s[0][n][2 * h + c] = NEGATIVE_INFINITY;
            }
        }
    }
}

__device__ __forceinline__ void write_rows(const BandForwardParams& p, const SelectTile& tile, const Flash<1, KEYS>& flash, char* own) {
    const int lane = threadIdx.x % 32;
    const float unscale[2] = {p.unscale_high, p.unscale_low};
    flash.put(own);
    __syncwarp();
    if (lane % 4 == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = h * 8 + lane / 4;
            if (tile.has(row)) p.lse[tile.token(row) * HEADS + tile.query_head(row)] = flash.lse(0, h, unscale);
        }
    }
    store_rows<HEAD_DIM_V, 32, V_COPY_BYTES>(own, lane, tile.queries * tile.heads, [&](int row) {
        return p.o + (tile.token(row) * HEADS + tile.query_head(row)) * HEAD_DIM_V;
    });
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) slc_forward(const __grid_constant__ SlcForwardParams params) {
    const BandForwardParams& p = params.common;
    const int lane = threadIdx.x % 32;
    const i64 work = i64(blockIdx.x) * WARPS + threadIdx.x / 32;
    const i64 index = work / PARTS_OF_GROUP;
    if (index >= p.tiles) return;
    SelectTile tile;
    tile.head = blockIdx.y;
    tile.first = int(work % PARTS_OF_GROUP) * HEADS_PER_TILE;
    tile.heads = GROUP - tile.first < HEADS_PER_TILE ? GROUP - tile.first : HEADS_PER_TILE;
    tile.sequence = find_sequence(p.sequences, p.num_sequences, int(index));
    tile.query = int(index - tile.sequence.tile) * QUERIES;
    tile.queries = tile.sequence.queries - tile.query < QUERIES ? tile.sequence.queries - tile.query : QUERIES;

    char* const own = shared + threadIdx.x / 32 * WARP_BYTES;
    char* const rows = own + (HELD ? 0 : STAGES * STAGE_BYTES);
    int* const lists = reinterpret_cast<int*>(own + WARP_BYTES - LIST_BYTES);
    load_rows<HEAD_DIM_QK, ROWS, 32, QK_COPY_BYTES>(shared_address(rows), lane, tile.queries * HEADS_PER_TILE, [&](int row) {
        const int at = tile.has(row) ? row : 0;
        return p.q + (tile.token(at) * HEADS + tile.query_head(at)) * HEAD_DIM_QK;
    });
    copy_commit();
    for (int i = lane; i < tile.queries * SELECT_COUNT; i += 32) {
        const i64 list = (tile.token(0) + i / SELECT_COUNT) * KV_HEADS + tile.head;
        lists[i] = params.block_indices[list * SELECT_COUNT + i % SELECT_COUNT];
    }
    copy_wait<0>();
    __syncwarp();
    Queries<1, HELD> q(rows);
    q.take();
    __syncwarp();

    const KeyRows<HEAD_DIM_QK> k(p.k, p.k_pages, tile.sequence.key, tile.head);
    const KeyRows<HEAD_DIM_V> v(p.v, p.v_pages, tile.sequence.key, tile.head);
    const auto load = [&](const Blocks& blocks, int stage) {
        if (!blocks.done()) {
            const int token = blocks.token(), count = blocks.count();
            const u32 to = shared_address(own) + stage * STAGE_BYTES;
            load_rows<HEAD_DIM_QK, KEYS, 32, QK_COPY_BYTES>(to, lane, count, k.from(token));
            load_rows<HEAD_DIM_V, KEYS, 32, V_COPY_BYTES>(to + KEYS * Keys::PITCH, lane, count, v.from(token));
        }
        copy_commit();
    };
    Blocks now(lists, tile.queries, tile.sequence.context + tile.query);
    Blocks ahead = now;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        load(ahead, stage);
        if (!ahead.done()) ahead.next();
    }
    Flash<1, KEYS> flash;
    for (int stage = 0; !now.done(); now.next()) {
        copy_wait<STAGES - 2>();
        __syncwarp();
        load(ahead, (stage + STAGES - 1) % STAGES);
        if (!ahead.done()) ahead.next();
        const char* const at = own + stage * STAGE_BYTES;
        stage = (stage + 1) % STAGES;
        Scores<1, KEYS> s;
        flash.multiply_keys(s, q, at);
        if (!now.whole()) mask(s, now, tile);
        float factor[1][2];
        flash.exponentials(s, p.scale_log2, factor);
        flash.multiply_values(s, at + KEYS * Keys::PITCH);
    }
    copy_wait<0>();
    __syncwarp();
    flash.finish();
    write_rows(p, tile, flash, own);
}
