// Attention over selected blocks (SPEC 2.2) of small groups, turned round: the outer loop goes over blocks of keys.
//
// slc_fwd.cu fills a warp's 16 rows with 16 / R queries, which walk over the union of their lists: where these have little in common,
// each row computes what others have selected, and the union's rows come from the second cache again and again. Here a CTA owns a
// block of keys and gathers the queries that have selected it (slc_index.cu). Of each row it leaves a share in the workspace,
//   m = max s,   l = sum of 2^(s - m),   o = sum of 2^(s - m) v   (s in units of log2; see flash.cuh),
// at the block's place in the query's list; slc_merge then joins the shares of each row: with M the greatest m,
//   o = sum of 2^(m - M) o / sum of 2^(m - M) l,   lse = M / log2(e) + ln of that sum.
// Queries come in runs, so that shares take no more memory than TurnedTiles::run_tokens allows; each run has an index of its own.
//
// Grid: slc_turned: works of the index (a block of keys and up to work_queries of its queries; there may be fewer works than
// CTAs); a warp takes every WARPSth 16 of the work's rows: R rows a query, none left empty but at the end. slc_merge: LANES lanes a row.
// Shared memory, bytes at D = 128 in bf16: the block of keys 64 x 512, queries 4 warps x 16 x 256: 49,152.
// Registers: o 64, scores of 64 keys 32, queries 32, the rest addresses.
// Roofline, a query head: 2 (Dk + Dv) n l' FLOP, none of them for rows that have not selected the block; 4 n (Dv + 2) bytes of shares
// written, and as many read, n Dk elements of queries, and the blocks themselves once a work: 20 KiB at n = 16, D = 128 and works of
// many rows. Bound by memory, where shares go and come back.
// Order of summation: within a block as flash.cuh; then blocks in the order of the list; sums of l by lanes, then their tree.
// Edges: lists end as inverse.cuh says; a query without blocks: o = 0, lse = -infinity. A block's keys behind the last query of a
// work are not read.
//
// budget: kernel=slc_turned threads=128 registers=168 spills=0 shared=49152
// budget: kernel=slc_merge threads=256 registers=64 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "joined.cuh"
#include "inverse.cuh"

constexpr int THREADS = 32 * WARPS;
// Rows of a block of keys in shared memory.
constexpr int SPAN = round_up(SELECT_BLOCK, KEYS);
constexpr int BLOCK_BYTES = SPAN * (Keys::PITCH + Values::PITCH);
constexpr int QUERY_BYTES = 16 * Keys::PITCH;
constexpr bool HELD = QUERIES_HELD && TENSOR_CORES;
// Three CTAs share a multiprocessor where registers leave room: one loads its block while others multiply.
constexpr int LEAST_BLOCKS = TENSOR_CORES && SPAN == KEYS && Keys::PADDED <= 128 && Values::PADDED <= 128 ? 3 : 1;

extern __shared__ __align__(128) char shared[];

// A query of a work as its entry of the index names it.
struct Selected {
    int query;  // of the index's
    int place;  // of the block in its list

    __device__ __forceinline__ explicit Selected(int entry) : query(entry / SELECT_COUNT), place(entry % SELECT_COUNT) {}
};

// The work of a CTA, and of it 16 rows in turn.
struct TurnedWork : BlockWork {
    const SlcTurnedParams& p;
    int rows;
    int ahead;  // rows of the sequence's keys from the block's first one up to the index's first query

    __device__ __forceinline__ TurnedWork(const SlcTurnedParams& p_, int work)
        : BlockWork(p_.index, work), p(p_), rows(count * GROUP), ahead(sequence.context + p.index.first_token - sequence.query + 1 - key) {}
    __device__ __forceinline__ Selected selected(int row) const { return Selected(entries[row / GROUP]); }
    // Rows of the block that the query sees.
    __device__ __forceinline__ int seen(int query) const {
        return ahead + query < SELECT_BLOCK ? ahead + query : SELECT_BLOCK;
    }
    // Starts to copy rows `first`.. of the queries to the warp's tile.
    __device__ __forceinline__ void load_queries(char* to, int first) const {
        const auto token = [&](int i) { return p.index.first_token + Selected(entries[i]).query; };
        const Element* const from = p.common.q + i64(head) * GROUP * HEAD_DIM_QK;
        load_tile<Keys, 16, 32, QK_COPY_BYTES>(shared_address(to), threadIdx.x % 32, rows - first,
                                               QueryRows<HEAD_DIM_QK, decltype(token)>{from, first, token});
    }
    // Starts to copy the block, as far as its last query sees it.
    __device__ __forceinline__ void load_block(char* to) const {
        const int keys = seen(Selected(entries[count - 1]).query);
        const KeyRows<HEAD_DIM_QK> k(p.common.k, p.common.k_pages, sequence.key, head);
        const KeyRows<HEAD_DIM_V> v(p.common.v, p.common.v_pages, sequence.key, head);
        load_tile<Keys, SPAN, THREADS, QK_COPY_BYTES>(shared_address(to), threadIdx.x, keys, k.from(key));
        load_tile<Values, SPAN, THREADS, V_COPY_BYTES>(shared_address(to) + SPAN * Keys::PITCH, threadIdx.x, keys, v.from(key));
    }
    // Writes shares of rows `first`..
    __device__ __forceinline__ void write(const Flash<1, KEYS>& flash, int first) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float l = quad_sum(flash.l[0][h]);
            const int row = first + h * 8 + lane / 4;
            if (row >= rows) continue;
            const Selected of = selected(row);
            const i64 share = (i64(of.query) * HEADS + head * GROUP + row % GROUP) * SELECT_COUNT + of.place;
            if (lane % 4 == 0) *reinterpret_cast<float2*>(p.statistics + share * 2) = make_float2(flash.m[0][h], l);
            float* const to = p.shares + share * Values::PADDED + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < PARTS_V; ++n) {
                *reinterpret_cast<float2*>(to + n * 8) = make_float2(flash.o[0][n][2 * h], flash.o[0][n][2 * h + 1]);
            }
        }
    }
};

// Scores of keys FROM.. of the block that rows `first`.. do not see become minus infinity.
__device__ __forceinline__ void mask(Scores<1, KEYS>& s, const TurnedWork& work, int first, int from) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = first + h * 8 + lane / 4;
        // Rows that are none compute what the last one does.
        const int end = work.seen(work.selected(row < work.rows ? row : work.rows - 1).query) - from - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                if (n * 8 + c >= end) s[0][n][2 * h + c] = negative_infinity();
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS) slc_turned(const __grid_constant__ SlcTurnedParams p) {
    if (int(blockIdx.x) >= p.index.work_starts[KV_HEADS * p.index.blocks]) return;
    const TurnedWork work(p, blockIdx.x);
    const int warp = uniform(int(threadIdx.x / 32));
    char* const own = shared + BLOCK_BYTES + warp * QUERY_BYTES;
    int first = warp * 16;
    work.load_block(shared);
    if (first < work.rows) work.load_queries(own, first);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    for (; first < work.rows; first += 16 * WARPS) {
        Queries<1, HELD> q(own);
        q.take();
        __syncwarp();
        const int next = first + 16 * WARPS;
        if (HELD && next < work.rows) work.load_queries(own, next);
        copy_commit();
        // The first of the rows sees least, the last one most.
        const int least = uniform(work.seen(work.selected(first).query));
        const int last = first + 15 < work.rows ? first + 15 : work.rows - 1;
        const int most = SPAN == KEYS ? KEYS : uniform(work.seen(work.selected(last).query));
        Flash<1, KEYS> flash;
        for (int from = 0; from < most; from += KEYS) {
            Scores<1, KEYS> s;
            flash.multiply_keys(s, q, shared + from * Keys::PITCH);
            if (from + KEYS > least) mask(s, work, first, from);
            float factor[1][2];
            flash.exponentials(s, p.common.scale_log2, factor);
            flash.multiply_values(s, shared + SPAN * Keys::PITCH + from * Values::PITCH);
        }
        work.write(flash, first);
        __syncwarp();
        if (!HELD && next < work.rows) work.load_queries(own, next);
        copy_commit();
        copy_wait<0>();
        __syncwarp();
    }
}

// Elements of o that a lane of slc_merge writes at once, and how many times four of them it has.
constexpr int RUNS = ceil_div(Values::PADDED, 4 * LANES);
constexpr int VECTOR = V_COPY_BYTES >= 4 * int(sizeof(Element)) ? 4 : 1;

extern "C" __global__ void __launch_bounds__(256) slc_merge(const __grid_constant__ SlcTurnedParams p) {
    const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
    const int lane = threadIdx.x % LANES, query = int(row / HEADS), head = int(row % HEADS);
    const bool there = query < p.index.tokens;
    const int count = there ? List(p.index, query, head / GROUP).length(SELECT_COUNT) : 0;
    const float* const statistics = p.statistics + row * (SELECT_COUNT * 2);
    const Joined all = join_shares<LANES>(statistics, count, 2);
    if (!there) return;
    const float* const shares = p.shares + row * SELECT_COUNT * Values::PADDED;
    float o[RUNS][4] = {};
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
        const float weight = all.weight(statistics[i * 2]);
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
            const int d = (run * LANES + lane) * 4;
            if (d >= Values::PADDED) continue;
            float share[4];
            load<4>(shares + i * Values::PADDED + d, share);
#pragma unroll
            for (int c = 0; c < 4; ++c) o[run][c] = fmaf(share[c], weight, o[run][c]);
        }
    }
    const i64 out = i64(p.index.first_token) * HEADS + row;
    const float inverse = all.inverse(), unscale[2] = {p.common.unscale_high, p.common.unscale_low};
    if (lane == 0) p.common.lse[out] = all.lse(unscale);
#pragma unroll
    for (int run = 0; run < RUNS; ++run) {
        const int d = (run * LANES + lane) * 4;
#pragma unroll
        for (int c = 0; c < 4; ++c) o[run][c] *= inverse;
        Element* const to = p.common.o + out * HEAD_DIM_V + d;
        if constexpr (VECTOR == 4) {
            if (d < HEAD_DIM_V) store<4>(to, o[run]);
        } else {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                if (d + c < HEAD_DIM_V) to[c] = from_float<Element>(o[run][c]);
            }
        }
    }
}
