// A tile of queries over the blocks that they have selected: QUERIES queries with HEADS_PER_TILE of their heads are the ROWS rows of
// a warp alone (16), or of four together (64).
#pragma once
#include "bulk.cuh"
#include "sequence.cuh"
#include "unit.cuh"

constexpr int PARTS_OF_GROUP = ceil_div(GROUP, ROWS);
constexpr int HEADS_PER_TILE = ceil_div(GROUP, PARTS_OF_GROUP);
constexpr int TILE_THREADS = 2 * ROWS;
// What lies behind begins where tiles may.
constexpr int LIST_BYTES = round_up(QUERIES * SELECT_COUNT * 4, 128);
constexpr int CTA_TILES = 32 * WARPS / TILE_THREADS;
constexpr int NO_MORE = 0x7fffffff;
static_assert(ROWS_OF_PAGE % SELECT_BLOCK == 0 || PAGE_ROWS == 0, "a block lies in one page");
static_assert(QUERIES * HEADS_PER_TILE <= ROWS && QUERIES <= 32, "a tile has so many rows, a lane a query");

// Steps of KEYS tokens go to stages of shared memory in turn. A turn is as many steps of one block as there are stages, so that
// each knows its own, or one step, where a block's do not come out even.
static_assert(STAGES == 2, "one step is on its way while another is met");
constexpr int BLOCK_STEPS = ceil_div(SELECT_BLOCK, KEYS);
constexpr int TURN_STEPS = BLOCK_STEPS % STAGES == 0 ? STAGES : 1;

// Warps that work alone may walk jointly: over the blocks of all tiles of their CTA, whose lists a warp's lanes hold then. A turn is one
// step for each of them.
constexpr bool JOINT = JOINT_PERCENT > 0;
constexpr int JOINT_QUERIES = WARPS * QUERIES;
constexpr int JOINT_STEPS = BLOCK_STEPS < WARPS ? BLOCK_STEPS : WARPS;

// The greatest power of two below `count`, from a lesser one on.
constexpr int power_below(int count, int power = 1) { return power * 2 < count ? power_below(count, power * 2) : power; }

// Lists of queries in shared memory, one for each lane: those of a tile, or of all tiles of a CTA, which begin LIST_BYTES apart.
struct Lists {
    const int* first;
    int count;
    int position;  // of the first query
    int skipped;   // tiles of the first query before

    __device__ __forceinline__ int position_of(int list) const {
        return position + (PARTS_OF_GROUP == 1 ? list : (skipped + list) / PARTS_OF_GROUP);
    }
    __device__ __forceinline__ const int* list(int i) const {
        return first + i / QUERIES * (LIST_BYTES / 4) + i % QUERIES * SELECT_COUNT;
    }
    // Block at a place of a list, NO_MORE behind its end. A list that is none, which the caller did not check, ends where it leaves
    // the query's candidates.
    __device__ __forceinline__ int read(int i, int place) const {
        if (place >= SELECT_COUNT) return NO_MORE;
        const int block = list(i)[place];
        return block < 0 || block > position_of(i) / SELECT_BLOCK ? NO_MORE : block;
    }
    // Whether list `i` has a block. Lists ascend.
    __device__ __forceinline__ bool has(int i, int block) const {
        const int* const blocks = list(i);
        int at = 0;
#pragma unroll
        for (int step = power_below(SELECT_COUNT); step > 0; step /= 2) {
            if (at + step < SELECT_COUNT && u32(blocks[at + step]) <= u32(block)) at += step;
        }
        return blocks[at] == block;
    }
};

// The blocks that at least one of up to COUNT queries has selected, in order, TURN tokens at a time.
template <int COUNT, int TURN>
struct Blocks {
    Lists lists;
    int place;     // lane i: in list i
    int mine;      // lane i: block at that place
    int block;     // in turn
    u32 selected;  // bit i: list i has it
    int offset;    // of the turn within the block

    __device__ __forceinline__ explicit Blocks(const Lists& all) : lists(all), place(0), offset(0) {
        const int lane = threadIdx.x % 32;
        mine = lane < lists.count ? lists.read(lane, 0) : NO_MORE;
        choose();
    }
    __device__ __forceinline__ void choose() {
        if constexpr (COUNT == 1) {
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
    __device__ __forceinline__ int last() const { return COUNT == 1 ? lists.position : lists.position_of(31 - __clz(selected)); }
    // Tokens of the block from the turn's first on that some query sees.
    __device__ __forceinline__ int count() const { return within(last() + 1 - token()); }
    // Those that query i sees, none if it has not selected the block.
    __device__ __forceinline__ int count_of(int i) const {
        if (COUNT > 1 && (selected >> i & 1) == 0) return 0;
        return within(lists.position_of(i) + 1 - token());
    }
    // Whether all rows of queries first.. whose bits are `all` see the whole turn.
    __device__ __forceinline__ bool whole(int first, u32 all) const {
        return (COUNT == 1 || (selected & all) == all) && within(lists.position_of(first) + 1 - token()) >= TURN;
    }
    __device__ __forceinline__ void next() {
        offset += TURN;
        if (offset < SELECT_BLOCK && token() <= last()) return;
        offset = 0;
        if (mine == block && !done()) {
            ++place;
            mine = lists.read(threadIdx.x % 32, place);
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
using OwnBlocks = Blocks<QUERIES, TURN_STEPS * KEYS>;
using JointBlocks = Blocks<JOINT_QUERIES, JOINT_STEPS * KEYS>;

// Bits of `count` queries from `first` on.
__device__ __forceinline__ u32 bits_of(int first, int count) { return (count >= 32 ? ALL_LANES : (1u << count) - 1) << first; }

// Bytes of a step: keys, and values behind them.
constexpr int STAGE_BYTES = KEYS * (Tile<HEAD_DIM_QK>::PITCH + Tile<HEAD_DIM_V>::PITCH);

// Copies of this thread and those of all others of its tile are there; all have left what they read before.
__device__ __forceinline__ void wait_for_stage() {
    copy_wait<0>();
    if constexpr (TILE_THREADS > 32) {
        publish_to_products();
        __syncthreads();
    } else {
        __syncwarp();
    }
}

// A thread's part in copies of steps to stages, of THREADS threads, where keys and values lie so.
template <class KeyTile, class ValueTile, int THREADS>
struct StepCopies {
    using CopyKeys = EvenCopy<KeyTile, KEYS, THREADS, QK_COPY_BYTES, KeyRows<HEAD_DIM_QK>::STRIDE>;
    using CopyValues = EvenCopy<ValueTile, KEYS, THREADS, V_COPY_BYTES, KeyRows<HEAD_DIM_V>::STRIDE>;
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

    // Starts to copy step STEP of a turn to that stage, `behind` bytes further. The first one comes first.
    template <int STEP, class AnyBlocks>
    __device__ __forceinline__ void start(const AnyBlocks& blocks, u32 behind) {
        const bool there = STEP == 0 ? !blocks.done() : count > STEP * KEYS;
        if (STEP == 0) {
            count = 0;
            if (there) keys = k(blocks.token()), values = v(blocks.token()), count = blocks.count();
        }
        if (there) {
            constexpr int AT = STEP * STAGE_BYTES, FIRST = STEP * KEYS;
            copy_keys.template copy<AT, FIRST>(keys, count - FIRST, behind);
            copy_values.template copy<AT + KEYS * Tile<HEAD_DIM_QK>::PITCH, FIRST>(values, count - FIRST, behind);
        }
        copy_commit();
    }
    // Until the step that was copied last is there, and all have left the one before.
    template <int STEP, class AnyBlocks>
    __device__ __forceinline__ void wait(const AnyBlocks&, u32) const {
        wait_for_stage();
    }
};

// The same of bulk copies, to the stages of the CTA's only tile; `p` has the tensors' maps.
template <class P>
struct StepBoxes {
    const P& p;
    char* stages;
    int head, key;  // KV head, the sequence's first row of keys
    Arrivals arrivals;

    __device__ __forceinline__ StepBoxes(const P& params, char* first_stage, int kv_head, int first_key, const Arrivals& counted)
        : p(params), stages(first_stage), head(kv_head), key(first_key), arrivals(counted) {}

    // A stage is waited for as often as it is filled, be it with nothing.
    template <int STEP, class AnyBlocks>
    __device__ __forceinline__ void start(const AnyBlocks& blocks, u32 behind) const {
        const bool there = !blocks.done() && (STEP == 0 || blocks.count() > STEP * KEYS);
        const u32 at = STEP * STAGE_BYTES + behind;
        const int row = there ? key + blocks.token() + STEP * KEYS : key;
        load_key_boxes<true, KEYS>(p, arrivals, int(at / STAGE_BYTES), shared_address(stages) + at, there ? 1 : 0, head, row);
    }
    template <int STEP, class AnyBlocks>
    __device__ __forceinline__ void wait(const AnyBlocks& blocks, u32 behind) {
        const u32 at = STEP * STAGE_BYTES + behind;
        arrivals.wait(int(at / STAGE_BYTES));
        // Rows behind the last one that is seen may be another sequence's: scores are masked, values are weighted by 0.
        const int count = blocks.count() - STEP * KEYS;
        if (count > 0 && count < KEYS) {
            clear_rows<HEAD_DIM_V, KEYS, TILE_THREADS>(stages + at + KEYS * Tile<HEAD_DIM_QK>::PITCH, count);
        }
        wait_for_stage();
    }
};

// Walks over blocks: `meet(blocks, step, behind, whole)` meets a step in stage `step.value`, `behind` bytes further. Of a turn that all
// rows see (`whole`, the same in all lanes) there is nothing to mask.
template <class Copies, class Meet>
__device__ __forceinline__ void walk(OwnBlocks blocks, Copies& copies, const Meet& meet) {
    const u32 all = bits_of(0, blocks.lists.count);
    copies.template start<0>(blocks, 0);
    // Of turns of one step every other one lies in the other stage.
    for (u32 turn = 0; !blocks.done(); turn = STAGE_BYTES - turn) {
        const u32 behind = TURN_STEPS == 1 ? turn : 0;
        const OwnBlocks now = blocks;
        const bool whole = uniform(now.whole(0, all));
        unroll<0, TURN_STEPS>([&](auto step) {
            constexpr int I = step.value;
            copies.template wait<I>(now, behind);
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

// The same of all warps of a CTA over the blocks of all of its tiles: each block is copied once, and met by those warps that have
// selected it, for `count` queries from list `first` on. `meet` as above. What a warp meets, and in which order, is the same.
template <class Copies, class Meet>
__device__ __forceinline__ void walk_jointly(JointBlocks blocks, int first, int count, Copies& copies, const Meet& meet) {
    const u32 all = bits_of(first, count);
    const auto start = [&](u32 behind) { unroll<0, JOINT_STEPS>([&](auto step) { copies.template start<step.value>(blocks, behind); }); };
    start(0);
    for (u32 behind = 0; !blocks.done(); behind = WARPS * STAGE_BYTES - behind) {
        const JointBlocks now = blocks;
        const u32 mine = now.selected & all;
        copy_wait<0>();
        __syncthreads();
        blocks.next();
        start(WARPS * STAGE_BYTES - behind);
        if (uniform(mine) == 0) continue;
        const bool whole = uniform(now.whole(first, all));
        const int seen = now.count_of(31 - __clz(mine));
        unroll<0, JOINT_STEPS>([&](auto step) {
            if (step.value == 0 || whole || seen > step.value * KEYS) meet(now, step, behind, whole);
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
        const i64 work = i64(blockIdx.x) * CTA_TILES + threadIdx.x / TILE_THREADS;
        const i64 index = work / PARTS_OF_GROUP;
        head = blockIdx.y;
        first = int(work % PARTS_OF_GROUP) * HEADS_PER_TILE;
        heads = GROUP - first < HEADS_PER_TILE ? GROUP - first : HEADS_PER_TILE;
        // Behind the last tile there are no queries, but its sequence.
        const int tile = index < tiles ? int(index) : tiles - 1;
        sequence = sequence_of_warp<5>(sequences, count, tile);
        query = (tile - sequence.tile) * QUERIES;
        queries = index >= tiles ? 0 : sequence.queries - query < QUERIES ? sequence.queries - query : QUERIES;
    }
    // The tile's own lists.
    __device__ __forceinline__ Lists lists(const int* own) const { return {own, queries, position(0), 0}; }
    // Those of all tiles of the CTA, if they are one sequence's: the first of them lies at `all`.
    __device__ __forceinline__ Lists joint_lists(const int* all) const {
        const i64 work = i64(blockIdx.x) * CTA_TILES;
        const int skipped = int(work % PARTS_OF_GROUP), before = (int(work / PARTS_OF_GROUP) - sequence.tile) * QUERIES;
        const int rest = (sequence.queries - before) * PARTS_OF_GROUP - skipped;
        return {all, rest < JOINT_QUERIES ? rest : JOINT_QUERIES, sequence.context + before, skipped};
    }
    // Whether the CTA's first tile is of the same sequence. Tiles are in the order of sequences.
    __device__ __forceinline__ bool begins_in_sequence() const {
        return i64(blockIdx.x) * CTA_TILES / PARTS_OF_GROUP >= sequence.tile;
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

// Where the tiles of a CTA have their memory: the stages of all, ROWS_BYTES more of each, their lists; what counts
// arrivals of bulk copies.
template <int ROWS_BYTES>
struct SelectMemory {
    static constexpr int STAGES_OF_TILE = STAGES * STAGE_BYTES, ROWS_AT = CTA_TILES * STAGES_OF_TILE;
    static constexpr int LISTS_AT = ROWS_AT + CTA_TILES * ROWS_BYTES, ARRIVALS_AT = LISTS_AT + CTA_TILES * LIST_BYTES;
    char* all;
    int tile;  // of the CTA

    __device__ __forceinline__ explicit SelectMemory(char* shared) : all(shared), tile(uniform(int(threadIdx.x / TILE_THREADS))) {}
    __device__ __forceinline__ char* stages() const { return all + tile * STAGES_OF_TILE; }
    // Without bytes of their own rows come through the stages.
    __device__ __forceinline__ char* rows() const { return ROWS_BYTES == 0 ? stages() : all + ROWS_AT + tile * ROWS_BYTES; }
    __device__ __forceinline__ Arrivals arrivals() const { return {shared_address(all) + ARRIVALS_AT}; }
    __device__ __forceinline__ int* lists(int of) const { return reinterpret_cast<int*>(all + LISTS_AT + of * LIST_BYTES); }
};

// Whether the tiles of a CTA walk jointly: all are of one sequence, and copy JOINT_PERCENT of what they would alone at most. All threads
// ask, and see the lists then.
__device__ __forceinline__ bool walks_jointly(const SelectTile& tile, const Lists& lists) {
    if (!__syncthreads_and(tile.begins_in_sequence())) return false;
    int apart = 0, together = 0;
    for (int from = 0; from < lists.count * SELECT_COUNT; from += 32 * WARPS) {
        const int i = (from + int(threadIdx.x)) / SELECT_COUNT, begin = i / QUERIES * QUERIES;
        const int block = i < lists.count ? lists.read(i, (from + int(threadIdx.x)) % SELECT_COUNT) : NO_MORE;
        // Whether the block is the first one of its number in the tile's lists, in all lists.
        bool in_tile = block != NO_MORE, in_all = in_tile;
        for (int other = 0; in_tile && other < i; ++other) {
            if (lists.has(other, block)) in_all = false, in_tile = other < begin;
        }
        apart += __syncthreads_count(in_tile);
        together += __syncthreads_count(in_all);
    }
    return 100 * together <= JOINT_PERCENT * apart;
}

// Walks over the blocks of a CTA's tiles, jointly or each alone. `copies_to(stages, threads)` are copies of so many threads to stages,
// `meet_in(stages, first)` what a warp does with steps there (see `walk`), whose queries' lists are those from `first` on. All have
// left the stages at the end.
template <class Memory, class CopiesTo, class MeetIn>
__device__ __forceinline__ void walk_tiles(const Memory& memory, const SelectTile& tile, const CopiesTo& copies_to,
                                           const MeetIn& meet_in) {
    if constexpr (JOINT) {
        const Lists all = tile.joint_lists(memory.lists(0));
        if (walks_jointly(tile, all)) {
            auto copies = copies_to(memory.all, Size<32 * WARPS>());
            const int first = memory.tile * QUERIES;
            walk_jointly(JointBlocks(all), first, tile.queries, copies, meet_in(memory.all, first));
            copy_wait<0>();
            __syncthreads();
            return;
        }
        if (tile.queries == 0) return;
    }
    auto copies = copies_to(memory.stages(), Size<TILE_THREADS>());
    walk(OwnBlocks(tile.lists(memory.lists(memory.tile))), copies, meet_in(memory.stages(), 0));
    wait_for_stage();
}
