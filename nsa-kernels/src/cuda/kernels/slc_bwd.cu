// Gradients of attention over selected blocks (SPEC 3; see grad.cuh).
//
// dq: a warp a query, as in slc_fwd.cu (small groups: slc_turned_bwd.cu). dk and dv: the lists are inverted on the device first,
// to the queries of each block of keys, in order (slc_index.cu). A CTA then takes a block of keys (or a share of one of more than
// 16 WARPS keys) and up to work_queries of its queries, gathers their rows, and has dk and dv in registers. Blocks with more
// queries (a forced block has all) are several works, whose gradients are added in order by a kernel at the end.
// Shared memory, bytes at D = 128 in bf16: dq, a warp: 2 stages x 16 x 512 (q and do come through them, and stay in registers where
// Dk + Dv <= 256; else 16 x 512 more), the list 128; dk and dv as in band_bwd.cuh, and products of four warps together and bulk
// copies as there on sm_90a: a box is the heads of a query, where R is a multiple of 8.
// Registers: dq 64, q and do 64, scores and their gradients 16, addresses of a lane's chunks 20; dk and dv as in band_bwd.cuh.
// Roofline, a query and KV head: dq 2 R (2 Dk + Dv) n l' FLOP, bound by the cache as the forward; dk and dv 4 R (Dk + Dv) n l'
// FLOP, for 2 R (Dk + Dv) bytes a query and block.
// Order of summation: dq: blocks in order; dk, dv: queries in order, then heads; works in order.
// Measured on an H100 at R = 16, D = 128, T = 16,384: works of 256 queries in any order 1.6 ms, of 4,096 5.2 ms; dq 1.14 ms, and 1.30 ms with
// copies that stay in the first cache, as the forward has them: dq reads more from shared memory, which is the same memory.
// Edges: as in slc_fwd.cu. Blocks that no query has selected have gradients of 0.
//
// budget: kernel=slc_row_facts threads=256 registers=40 spills=0 shared=0
// budget: kernel=slc_query_gradients threads=128 registers=248 spills=0 shared=66048
// budget: kernel=slc_key_gradients threads=128 registers=255 spills=0 shared=66560
// budget: kernel=slc_key_gradients arch=sm_90a threads=128 registers=255 spills=0 shared=100368
// budget: kernel=slc_add_works threads=256 registers=64 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "grad.cuh"
#include "inverse.cuh"
#include "select.cuh"

// Rows of q and do that are held in registers come through a stage.
constexpr bool HELD = QUERIES_HELD && TENSOR_CORES;
constexpr int ROWS_BYTES = ROWS * (Keys::PITCH + Values::PITCH);
static_assert(ROWS_BYTES <= STAGES * STAGE_BYTES, "rows come through stages");
using Memory = SelectMemory<HELD ? 0 : ROWS_BYTES>;
constexpr int THREADS = 32 * WARPS;
// Rows of a block of keys that one CTA takes, and CTAs a block.
constexpr int SHARES = ceil_div(SELECT_BLOCK, KEY_ROWS);

extern __shared__ __align__(TILE_ALIGNMENT) char shared[];

extern "C" __global__ void __launch_bounds__(256) slc_row_facts(const __grid_constant__ SlcBackwardParams p) {
    row_facts(p.common);
}

// ds of a step: from scores s and do v. Rows see all of its keys (`whole`), or as many as they may; `first` is the list of the tile's
// first query.
template <class AnyBlocks>
__device__ __forceinline__ void score_gradients(Parts<1, KEYS>& ds, const Parts<1, KEYS>& s, float scale, const RowFacts (&facts)[2],
                                                bool whole, const AnyBlocks& blocks, int first, int step, const SelectTile& tile) {
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
        const int end = (tile.has(row) ? blocks.count_of(first + tile.query_of(row)) : 0) - step * KEYS - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                if (n * 8 + c >= end) ds[0][n][2 * h + c] = 0.0f;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) slc_query_gradients(const __grid_constant__ SlcBackwardParams params) {
    const BandBackwardParams& p = params.common;
    const int lane = threadIdx.x % 32;
    const SelectTile tile(p.sequences, p.num_sequences, p.query_tiles);
    if (!JOINT && tile.queries == 0) return;
    const Memory memory(shared);
    char* const rows = memory.rows();
    tile.load_rows_of<Keys, QK_COPY_BYTES>(p.q, shared_address(rows));
    tile.load_rows_of<Values, V_COPY_BYTES>(p.d_o, shared_address(rows) + ROWS * Keys::PITCH);
    copy_commit();
    tile.load_lists(memory.lists(memory.tile), params.block_indices);
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

    float dq[1][Keys::PADDED / 8][4];
    clear<1, Keys::PADDED>(dq);
    // As in slc_fwd.cu.
    const auto meet_in = [&](const char* stages, int first) {
        const auto keys = Right<HEAD_DIM_QK, false>(stages).pinned();
        const auto across = Right<HEAD_DIM_QK, true>(stages).pinned();
        const auto values = Right<HEAD_DIM_V, false>(stages + KEYS * Keys::PITCH).pinned();
        return [&, keys, across, values, first](const auto& blocks, auto step, u32 behind, bool whole) {
            constexpr int I = step.value;
            Parts<1, KEYS> s, ds;
            dot_rows(s, q, keys.template further<I * STAGE_BYTES>(behind));
            dot_rows(ds, d_o, values.template further<I * STAGE_BYTES>(behind));
            score_gradients(ds, s, p.scale, facts, whole, blocks, first, I, tile);
            add_rows<0>(dq, ds, across.template further<I * STAGE_BYTES>(behind));
        };
    };
    const auto copies_to = [&](char* stages, auto threads) {
        constexpr int THREADS = threads.value;
        return StepCopies<Keys, Values, THREADS>(shared_address(stages), int(threadIdx.x % THREADS), tile.sequence, tile.head, p.k,
                                                 nullptr, p.v, nullptr);
    };
    walk_tiles(memory, tile, copies_to, meet_in);
    if (tile.queries == 0) return;
    put_query_gradients(dq, p.accumulate != 0,
                        [&](int row) { return tile.has(row) ? p.dq + tile.place(row) * HEAD_DIM_QK : nullptr; });
}

// What a CTA of `slc_key_gradients` does: a share of a block's keys, some of the block's queries.
struct KeyWork : BlockWork {
    int end;  // rows key..end of the sequence's keys
    const int* queries;

    template <class Work>
    __device__ __forceinline__ KeyWork(const SlcBackwardParams& p, Work work, int share)
        : BlockWork(p.index, work), queries(entries) {
        const int last = share * KEY_ROWS + KEY_ROWS < SELECT_BLOCK ? key + share * KEY_ROWS + KEY_ROWS : key + SELECT_BLOCK;
        key += share * KEY_ROWS;
        end = last < sequence.keys ? last : sequence.keys;
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
    const auto token = [&](int i) { return __ldg(work.queries + i); };
    QueryStages<1, BandBackwardParams, decltype(token)> queries(p, stages, work.head, rows, token);
    KeyGradients<K, V> gradients;
    const KeySides sides(shared, stages);
    queries.load(0, 0);
    for (int first = 0, stage = 0; first < rows; first += QUERY_ROWS, stage ^= 1) {
        queries.wait(first, stage);
        queries.load(first + QUERY_ROWS, stage ^ 1);
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
        // Its place among works after the first of their blocks, block by block.
        const i64 slot = i64(params.index.work_starts[done.block]) - done.block + done.index - 1;
        gradients.write_partial(params.partial + slot * WORK_PARTIAL + share * PARTIAL, base, own);
    }
}

// Grid: works, shares of the block, (with dk and dv apart) which of them. There may be fewer works than CTAs.
extern "C" __global__ void __launch_bounds__(THREADS, 1) slc_key_gradients(const __grid_constant__ SlcBackwardParams p) {
    if (int(blockIdx.x) >= p.index.work_starts[KV_HEADS * p.index.blocks]) return;
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
    const int first = p.index.work_starts[blockIdx.x], works = p.index.work_starts[blockIdx.x + 1] - first;
    if (works == 1) return;
    const KeyWork work(p, make_int2(blockIdx.x, 0), blockIdx.y);
    const float* const partial = p.partial + i64(first - int(blockIdx.x)) * WORK_PARTIAL + blockIdx.y * PARTIAL;
    const i64 at = i64(work.sequence.key + work.key) * KV_HEADS + work.head;
    add_partials(p.common.dk + at * HEAD_DIM_QK, p.common.dv + at * HEAD_DIM_V, partial, WORK_PARTIAL, works - 1,
                 work.end - work.key, blockIdx.z * 256 + threadIdx.x, gridDim.z * 256);
}
