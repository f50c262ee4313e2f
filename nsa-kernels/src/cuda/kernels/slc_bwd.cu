// Gradients of attention over selected blocks (SPEC 3; see grad.cuh).
//
// dq: a warp a query, as in slc_fwd.cu. dk and dv: the lists are inverted on the device first, to the queries of each block of keys,
// in order: a counting sort of parts of the queries (count, sum over parts, sum over blocks, scatter), O(N n) memory and no
// atomics but on counts and masks, where their order changes nothing. A CTA then takes a block of keys (or a share of one of
// more than 16 WARPS keys) and up to work_queries of its queries, gathers their rows, and has dk and dv in registers. Blocks
// with more queries (a forced block has all) are several works, whose gradients are added in order by a kernel at the end.
// Shared memory, bytes at D = 128 in bf16: dq, a warp: 2 stages x 16 x 512 (q and do come through them, and stay in registers where
// Dk + Dv <= 256; else 16 x 512 more), the list 128; dk and dv as in band_bwd.cu, and products of four warps together as there on
// sm_90a.
// Registers: dq 64, q and do 64, scores and their gradients 16, addresses of a lane's chunks 20; dk and dv as in band_bwd.cu.
// Roofline, a query and KV head: dq 2 R (2 Dk + Dv) n l' FLOP, bound by the cache as the forward; dk and dv 4 R (Dk + Dv) n l'
// FLOP, for 2 R (Dk + Dv) bytes a query and block.
// Order of summation: dq: blocks in order; dk, dv: queries in order, then heads; works in order.
// Measured on an H100 at R = 16, D = 128, T = 16,384: works of 256 queries 1.6 ms, of 4,096 5.2 ms; dq 1.14 ms, and 1.30 ms with
// copies that stay in the first cache, as the forward has them: dq reads more from shared memory, which is the same memory.
// Edges: as in slc_fwd.cu. Blocks that no query has selected have gradients of 0.
//
// budget: kernel=slc_row_facts threads=256 registers=40 spills=0 shared=0
// budget: kernel=slc_query_gradients threads=128 registers=248 spills=0 shared=66048
// budget: kernel=slc_count threads=256 registers=40 spills=0 shared=0
// budget: kernel=slc_sum_parts threads=1024 registers=64 spills=0 shared=4096
// budget: kernel=slc_sum_blocks threads=1024 registers=64 spills=0 shared=256
// budget: kernel=slc_sum_blocks arch=sm_90a threads=1024 registers=64 spills=0 shared=1024
// budget: kernel=slc_scatter threads=256 registers=40 spills=0 shared=0
// budget: kernel=slc_key_gradients threads=128 registers=255 spills=0 shared=66560
// budget: kernel=slc_key_gradients arch=sm_90a threads=128 registers=255 spills=0 shared=100352
// budget: kernel=slc_add_works threads=256 registers=64 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "grad.cuh"
#include "select.cuh"

// Rows of q and do that are held in registers come through a stage.
constexpr bool HELD = QUERIES_HELD && TENSOR_CORES;
constexpr int ROWS_BYTES = ROWS * (Keys::PITCH + Values::PITCH);
constexpr int WARP_BYTES = STAGES * STAGE_BYTES + (HELD ? 0 : ROWS_BYTES) + LIST_BYTES;
static_assert(ROWS_BYTES <= STAGES * STAGE_BYTES, "rows come through stages");
constexpr int THREADS = 32 * WARPS;
// Rows of a block of keys that one CTA takes, and CTAs a block.
constexpr int SHARES = ceil_div(SELECT_BLOCK, KEY_ROWS);

extern __shared__ __align__(TILE_ALIGNMENT) char shared[];

extern "C" __global__ void __launch_bounds__(256) slc_row_facts(const __grid_constant__ SlcBackwardParams p) {
    row_facts(p.common);
}

// ds of a step: from scores s and do v. Rows see all of its keys (`whole`), or as many as they may.
__device__ __forceinline__ void score_gradients(Parts<1, KEYS>& ds, const Parts<1, KEYS>& s, float scale, const RowFacts (&facts)[2],
                                                bool whole, const Blocks& blocks, int step, const SelectTile& tile) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const RowFacts& row = facts[c / 2];
            ds[0][n][c] = score_gradient(probability(s[0][n][c], scale, row), ds[0][n][c], scale * row.z, row);
        }
    }
    if (whole) return;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = h * 8 + lane / 4;
        const int end = (tile.has(row) ? blocks.count_of(tile.query_of(row)) : 0) - step * KEYS - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                if (n * 8 + c >= end) ds[0][n][2 * h + c] = 0.0f;
            }
        }
    }
}

// Copies of this lane and of all others are there; all have left what they read before.
__device__ __forceinline__ void wait_for_stage() {
    copy_wait<0>();
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) slc_query_gradients(const __grid_constant__ SlcBackwardParams params) {
    const BandBackwardParams& p = params.common;
    const int lane = threadIdx.x % 32;
    const SelectTile tile(p.sequences, p.num_sequences, p.query_tiles);
    if (tile.queries == 0) return;
    char* const own = shared + uniform(int(threadIdx.x / 32)) * WARP_BYTES;
    char* const rows = own + (HELD ? 0 : STAGES * STAGE_BYTES);
    int* const lists = reinterpret_cast<int*>(own + WARP_BYTES - LIST_BYTES);
    tile.load_rows_of<Keys, QK_COPY_BYTES>(p.q, shared_address(rows));
    tile.load_rows_of<Values, V_COPY_BYTES>(p.d_o, shared_address(rows) + ROWS * Keys::PITCH);
    copy_commit();
    tile.load_lists(lists, params.block_indices);
    RowFacts facts[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = h * 8 + lane / 4;
        facts[h] = tile.has(row) ? facts_of(p)[tile.place(row)] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    wait_for_stage();
    Rows<HEAD_DIM_QK, 1, HELD> q(rows);
    Rows<HEAD_DIM_V, 1, HELD> d_o(rows + ROWS * Keys::PITCH);
    q.take();
    d_o.take();
    __syncwarp();

    StepCopies<Tile<HEAD_DIM_QK>, Tile<HEAD_DIM_V>> copies(shared_address(own), lane, tile.sequence, tile.head, p.k, nullptr, p.v, nullptr);
    float dq[1][Keys::PADDED / 8][4];
    clear<1, Keys::PADDED>(dq);
    const auto keys = Right<HEAD_DIM_QK, false>(own).pinned();
    const auto across = Right<HEAD_DIM_QK, true>(own).pinned();
    const auto values = Right<HEAD_DIM_V, false>(own + KEYS * Keys::PITCH).pinned();
    const auto meet = [&](const Blocks& blocks, auto step, u32 behind, bool whole) {
        constexpr int I = step.value;
        Parts<1, KEYS> s, ds;
        dot_rows(s, q, keys.further<I * STAGE_BYTES>(behind));
        dot_rows(ds, d_o, values.further<I * STAGE_BYTES>(behind));
        score_gradients(ds, s, p.scale, facts, whole, blocks, I, tile);
        add_rows<0>(dq, ds, across.further<I * STAGE_BYTES>(behind));
    };
    walk(Blocks(lists, tile.queries, tile.position(0)), copies, [] { wait_for_stage(); }, meet);
    copy_wait<0>();
    add_query_gradients(dq,
                        [&](int row) { return tile.has(row) ? p.dq + tile.place(row) * HEAD_DIM_QK : nullptr; });
}

// The inverse index: for every block of keys, KV heads outermost, the queries that have selected it, in order. Queries are
// cut into parts; each part counts its queries a block, sums over parts and blocks say where each part's go.

// Place of a block in `[KV_HEADS, blocks]`; -1 if the list names none there.
__device__ __forceinline__ int block_of(const SlcBackwardParams& p, int token, int head, int place) {
    const int block = p.block_indices[(i64(token) * KV_HEADS + head) * SELECT_COUNT + place];
    const Sequence seq = find_sequence<0>(p.common.key_sequences, p.common.num_sequences, token);
    if (block < 0 || block > (seq.context + token - seq.query) / SELECT_BLOCK) return -1;
    return head * p.blocks + seq.tile + block;
}

// counts [parts, KV_HEADS blocks], zero before. A thread an entry of the lists.
extern "C" __global__ void __launch_bounds__(256) slc_count(const __grid_constant__ SlcBackwardParams p) {
    const i64 entry = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const int token = int(entry / (KV_HEADS * SELECT_COUNT)), rest = int(entry % (KV_HEADS * SELECT_COUNT));
    if (token >= p.tokens) return;
    const int block = block_of(p, token, rest / SELECT_COUNT, rest % SELECT_COUNT);
    if (block >= 0) atomicAdd(p.counts + i64(token / p.part_tokens) * KV_HEADS * p.blocks + block, 1);
}

// Per block the sum over its parts, and in each part's place the sum before it. A CTA 32 blocks, whose counts lie side by side, a
// warp some of their parts in a row; loads of several are under way together. Leaves empty masks for slc_scatter.
extern "C" __global__ void __launch_bounds__(1024) slc_sum_parts(const __grid_constant__ SlcBackwardParams p) {
    constexpr int TURN = 8;
    __shared__ int sums[32][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, all = KV_HEADS * p.blocks, block = blockIdx.x * 32 + lane;
    const int own = ceil_div(p.parts, 32), end = own * (warp + 1) < p.parts ? own * (warp + 1) : p.parts;
    const bool there = block < all;
    int sum = 0;
#pragma unroll 8
    for (int part = own * warp; part < end; ++part) sum += there ? p.counts[i64(part) * all + block] : 0;
    sums[warp][lane] = sum;
    __syncthreads();
    if (!there) return;
    int before = 0;
    for (int other = 0; other < warp; ++other) before += sums[other][lane];
    if (warp == 31) p.totals[block] = before + sum;
    for (int first = own * warp; first < end; first += TURN) {
        int counts[TURN];
#pragma unroll
        for (int i = 0; i < TURN; ++i) counts[i] = first + i < end ? p.counts[i64(first + i) * all + block] : 0;
#pragma unroll
        for (int i = 0; i < TURN; ++i) {
            if (first + i >= end) continue;
            p.counts[i64(first + i) * all + block] = before;
            p.masks[i64(first + i) * all + block] = 0;
            before += counts[i];
        }
    }
}

// Of each lane, the sums up to its own.
__device__ __forceinline__ int2 sum_to(int2 sum) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int x = __shfl_up_sync(ALL_LANES, sum.x, step), y = __shfl_up_sync(ALL_LANES, sum.y, step);
        if (int(threadIdx.x % 32) >= step) sum.x += x, sum.y += y;
    }
    return sum;
}

// Sums over the blocks before each: of queries, and of the works that its queries are cut into. One CTA.
extern "C" __global__ void __launch_bounds__(1024) slc_sum_blocks(const __grid_constant__ SlcBackwardParams p) {
    __shared__ int2 sums[32];
    const int thread = threadIdx.x, lane = thread % 32, all = KV_HEADS * p.blocks;
    int2 before = make_int2(0, 0);
    for (int first = 0; first < all; first += 1024) {
        const int block = first + thread, total = block < all ? p.totals[block] : 0;
        const int works = block < all ? (total > p.work_queries ? ceil_div(total, p.work_queries) : 1) : 0;
        const int2 sum = sum_to(make_int2(total, works));
        if (lane == 31) sums[thread / 32] = sum;
        __syncthreads();
        const int2 chunk = sum_to(sums[lane]);
        const int last = thread / 32 - 1;
        const int2 mine = make_int2(__shfl_sync(ALL_LANES, chunk.x, last & 31), __shfl_sync(ALL_LANES, chunk.y, last & 31));
        const int2 start = make_int2(before.x + (last < 0 ? 0 : mine.x), before.y + (last < 0 ? 0 : mine.y));
        before.x += __shfl_sync(ALL_LANES, chunk.x, 31), before.y += __shfl_sync(ALL_LANES, chunk.y, 31);
        __syncthreads();
        if (block < all) {
            p.starts[block] = start.x + sum.x - total;
            const int first_work = start.y + sum.y - works;
            p.work_starts[block] = first_work;
            for (int i = 0; i < works; ++i) p.works[first_work + i] = block;
        }
    }
    if (thread == 0) p.work_starts[all] = before.y;
}

// Queries that a mask has bits for.
constexpr int MASK_TOKENS = 32;

// Calls act(block, place among the queries from `first` on, token) for all blocks that these queries, before `end`, have selected.
template <class Act>
__device__ __forceinline__ void each_selected(const SlcBackwardParams& p, int head, int first, int end, const Act& act) {
    for (int i = threadIdx.x; i < MASK_TOKENS * SELECT_COUNT; i += blockDim.x) {
        const int at = i / SELECT_COUNT, block = first + at < end ? block_of(p, first + at, head, i % SELECT_COUNT) : -1;
        if (block >= 0) act(block, at, first + at);
    }
}

// Writes the queries to their places. A CTA a part and KV head, MASK_TOKENS queries at a time: each block has a mask of those that
// have selected it, which says how many of them come before one.
extern "C" __global__ void __launch_bounds__(256) slc_scatter(const __grid_constant__ SlcBackwardParams p) {
    const int part = blockIdx.x, head = blockIdx.y;
    int* const counts = p.counts + i64(part) * KV_HEADS * p.blocks;
    u32* const masks = p.masks + i64(part) * KV_HEADS * p.blocks;
    const int end = (part + 1) * p.part_tokens < p.tokens ? (part + 1) * p.part_tokens : p.tokens;
    for (int first = part * p.part_tokens;; first += MASK_TOKENS) {
        each_selected(p, head, first, end, [&](int block, int at, int) { atomicOr(masks + block, 1u << at); });
        __syncthreads();
        each_selected(p, head, first, end, [&](int block, int at, int token) {
            const int before = __popc(__ldcg(masks + block) & ((1u << at) - 1));
            p.lists[p.starts[block] + counts[block] + before] = token;
        });
        if (first + MASK_TOKENS >= end) return;
        __syncthreads();
        // One of a block's queries, whichever comes first, counts them all.
        each_selected(p, head, first, end, [&](int block, int, int) {
            const u32 mask = atomicExch(masks + block, 0);
            if (mask != 0) counts[block] += __popc(mask);
        });
        __syncthreads();
    }
}

// What a CTA of `slc_key_gradients` does: a share of a block's keys, some of the block's queries.
struct KeyWork {
    int block, head, index;  // the block in [KV_HEADS, blocks], its KV head, which of its works
    int works;               // of the block
    Sequence sequence;
    int key, end;            // rows of the sequence's keys
    const int* queries;
    int count;

    __device__ __forceinline__ KeyWork(const SlcBackwardParams& p, int work, int share) {
        block = uniform(p.works[work]);
        head = block / p.blocks;
        const int first_work = uniform(p.work_starts[block]);
        index = work - first_work;
        works = uniform(p.work_starts[block + 1]) - first_work;
        sequence = sequence_of_warp<5>(p.common.key_sequences, p.common.num_sequences, block % p.blocks);
        const int first = (block % p.blocks - sequence.tile) * SELECT_BLOCK;
        key = first + share * KEY_ROWS;
        const int last = first + SELECT_BLOCK < key + KEY_ROWS ? first + SELECT_BLOCK : key + KEY_ROWS;
        end = last < sequence.keys ? last : sequence.keys;
        const int total = uniform(p.totals[block]), from = index * p.work_queries;
        queries = p.lists + uniform(p.starts[block]) + from;
        count = total - from < p.work_queries ? total - from : p.work_queries;
    }
};

// Floats from one work's gradients that are added later to the next one's.
constexpr i64 WORK_PARTIAL = i64(SHARES) * PARTIAL;

template <bool K, bool V>
__device__ __forceinline__ void key_gradients(const SlcBackwardParams& params, const KeyWork& work, int share) {
    const BandBackwardParams& p = params.common;
    const int keys = work.end - work.key, rows = work.count * GROUP, base = threadIdx.x / 32 * 16, mine = work.key + base;
    char* const stages = shared + OWN_BYTES;
    const KeyRows<HEAD_DIM_QK> k(p.k, nullptr, work.sequence.key, work.head);
    const KeyRows<HEAD_DIM_V> v(p.v, nullptr, work.sequence.key, work.head);
    load_key_rows<K>(shared, keys, k.from(work.key), v.from(work.key));
    const auto load = [&](int first, int stage) {
        load_query_rows(p, shared_address(stages) + stage * QUERY_STAGE_BYTES, first, rows, work.head,
                        [&](int i) { return __ldg(work.queries + i); });
    };
    KeyGradients<K, V> gradients;
    const KeySides sides(shared, stages);
    if (rows > 0) load(0, 0);
    copy_commit();
    for (int first = 0, stage = 0; first < rows; first += QUERY_ROWS, stage ^= 1) {
        wait_for_tiles();
        if (first + QUERY_ROWS < rows) load(first + QUERY_ROWS, stage ^ 1);
        copy_commit();
        // Warps whose products are made together leave together.
        if (first_together<KEY_ROWS>(base) >= keys) continue;
        // The first query of the stage is the one that sees least.
        const int t = position_of(*facts_in(stages + stage * QUERY_STAGE_BYTES));
        const bool whole = first + QUERY_ROWS <= rows && mine + 16 <= t + 1;
        gradients.add(sides, base, stage * QUERY_STAGE_BYTES, p.scale, whole,
                      [&](int t) { return make_int2(0, t + 1 - mine); });
    }
    copy_wait<0>();
    // Found anew: it took registers in the loop.
    const KeyWork done(params, anew(int(blockIdx.x)), share);
    const int own = done.end - done.key - base;
    if (done.index == 0) {
        const i64 at = i64(done.sequence.key + done.key + base) * KV_HEADS + done.head;
        gradients.template write<KV_HEADS>(p.dk + at * HEAD_DIM_QK, p.dv + at * HEAD_DIM_V, own);
    } else {
        // Works after the first of their blocks come in order: this is the place among them.
        const i64 slot = i64(params.work_starts[done.block]) - done.block + done.index - 1;
        gradients.write_partial(params.partial + slot * WORK_PARTIAL + share * PARTIAL, base, own);
    }
}

// Grid: works, shares of the block, (with dk and dv apart) which of them. There may be fewer works than CTAs.
extern "C" __global__ void __launch_bounds__(THREADS, 1) slc_key_gradients(const __grid_constant__ SlcBackwardParams p) {
    if (int(blockIdx.x) >= p.work_starts[KV_HEADS * p.blocks]) return;
    const KeyWork work(p, blockIdx.x, blockIdx.y);
    if (work.key >= work.end) return;
    if constexpr (!APART) {
        key_gradients<true, true>(p, work, blockIdx.y);
    } else if (blockIdx.z == 0) {
        key_gradients<true, false>(p, work, blockIdx.y);
    } else {
        key_gradients<false, true>(p, work, blockIdx.y);
    }
}

// Adds what the other works of a block have to its first one's, in order. Grid: blocks, shares of them, CTAs a share.
extern "C" __global__ void __launch_bounds__(256) slc_add_works(const __grid_constant__ SlcBackwardParams p) {
    const int first = p.work_starts[blockIdx.x], works = p.work_starts[blockIdx.x + 1] - first;
    if (works == 1) return;
    const KeyWork work(p, first, blockIdx.y);
    const float* const partial = p.partial + i64(first - int(blockIdx.x)) * WORK_PARTIAL + blockIdx.y * PARTIAL;
    const i64 at = i64(work.sequence.key + work.key) * KV_HEADS + work.head;
    add_partials(p.common.dk + at * HEAD_DIM_QK, p.common.dv + at * HEAD_DIM_V, partial, WORK_PARTIAL, works - 1,
                 work.end - work.key, blockIdx.z * 256 + threadIdx.x, gridDim.z * 256);
}
