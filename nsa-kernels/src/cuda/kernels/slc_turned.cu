// Attention over selected blocks (SPEC 2.2) of small groups, turned round: the outer loop goes over blocks of keys.
//
// slc_fwd.cu fills a warp's 16 rows with 16 / R queries, which walk over the union of their lists: where these have little in
// common, each row computes what others have selected, and the union's rows come from the second cache again and again. Here a
// CTA owns a block of keys and gathers the queries that have selected it (slc_index.cu). Of each row it leaves a share,
//   m = max s,   l = sum of 2^(s - m),   o = sum of 2^(s - m) v   (s in units of log2; see flash.cuh),
// at the block's place in the query's list; slc_merge joins the shares of each row: with M the greatest m,
//   o = sum of 2^(m - M) o / sum of 2^(m - M) l,   lse = M / log2(e) + ln of that sum.
// The index names the place beside the query, as it has it at hand when it is made: to find it again takes a search of the list.
// Queries come in runs, so that shares take no more memory than Cuda::limit_shares says; each run has an index of its own.
//
// Grid: slc_turned: works of the index (a block of keys and up to work_queries of its queries; there may be fewer works than
// CTAs); a warp takes every WARPSth 16 of the work's rows: R rows a query, none left empty but at the end. slc_merge: LANES
// lanes a row.
// Shared memory, bytes at D = 128 in bf16: the block of keys 64 x 512, queries 4 warps x 16 x 256: 49,152.
// Registers: o 64, scores of 64 keys 32, queries 32 until there are scores, the rest addresses.
// Roofline, a query head: 2 (Dk + Dv) n l' FLOP, none of them for rows that have not selected the block; 4 n (Dv + 2) bytes of
// shares written, and as many read, n Dk elements of queries, and the block once for the rows of a work: 20 KiB at n = 16, D = 128
// and many rows. Bound by memory, where shares go and come back.
// Counted, 16 heads, D = 128, n = 16, lists drawn at random, one sequence, runs of 2,016 queries: the least milliseconds that an
// A100's resources take, of warps that walk each alone (the second cache) and turned round (memory), without what a run's launches
// cost:
//   tokens     R = 1         R = 2         R = 4         R = 8
//    2,048    0.20  0.25    0.20  0.23    0.20  0.22    0.18  0.22
//    4,096    0.80  0.58    0.76  0.53    0.65  0.51    0.49  0.50
//    8,192    2.96  1.26    2.43  1.15    1.76  1.10    1.16  1.07
//   65,536     63  13        36  12        20  11        11  10      (from those: unions as they are then, powers of the length)
// At R = 4 and 8,192 tokens 65 GFLOP and 25 KB asked of the second cache a query head, 151 and 72 where queries walk; no bank
// conflicts. Warps that walk jointly (from R = 2 on, slc_fwd.cu) take 0.07, 0.24, 0.75, 2.36 ms at R = 4 and 2,048 to 16,384 tokens,
// 0.92 at R = 2 and 8,192. Lists of a model, of which neighbours' have more in common, let queries walk faster still: the other way
// is taken where warps would copy much of random lists (TurnedTiles::where_faster).
// Tried: steps of 32 keys need more registers than one of 64, as queries must stay until the last.
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
#include "turned.cuh"

constexpr int QUERY_BYTES = 16 * Keys::PITCH;
constexpr bool HELD = QUERIES_HELD && TENSOR_CORES;
// Three CTAs share a multiprocessor where registers leave room: one loads its block while others multiply.
constexpr int LEAST_BLOCKS = TENSOR_CORES && SPAN == KEYS && Keys::PADDED <= 128 && Values::PADDED <= 128 ? 3 : 1;

extern __shared__ __align__(128) char shared[];

// Writes shares of rows `first`..
__device__ __forceinline__ void write_shares(const SlcTurnedParams& p, const TurnedWork& work, const Flash<1, KEYS>& flash,
                                             int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float l = quad_sum(flash.l[0][h]);
        const int row = first + h * 8 + lane / 4;
        if (row >= work.rows) continue;
        const i64 share = work.share(row);
        if (lane % 4 == 0) *reinterpret_cast<float2*>(p.statistics + share * 2) = make_float2(flash.m[0][h], l);
        write_share<Values>(p.shares, share, flash.o[0], h);
    }
}

// Scores of keys FROM.. of the block that rows `first`.. do not see become minus infinity.
__device__ __forceinline__ void mask(Scores<1, KEYS>& s, const TurnedWork& work, int first, int from) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = first + h * 8 + lane / 4;
        // Rows that are none compute what the first one does.
        const int end = work.seen(work.selected(row < work.rows ? row : first).query) - from - lane % 4 * 2;
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
    const TurnedWork work(p.index, blockIdx.x);
    char* const own = shared + BLOCK_BYTES + uniform(int(threadIdx.x / 32)) * QUERY_BYTES;
    const auto load_queries = [&](int first) {
        if (first < work.rows) work.load_queries<HEAD_DIM_QK, QK_COPY_BYTES>(own, p.common.q, first);
    };
    const KeyRows<HEAD_DIM_QK> k(p.common.k, p.common.k_pages, work.sequence.key, work.head);
    const KeyRows<HEAD_DIM_V> v(p.common.v, p.common.v_pages, work.sequence.key, work.head);
    work.load_block(shared, k, v);
    for (int first = work.begin(load_queries); first < work.rows; first += 16 * WARPS) {
        Queries<1, HELD> q(own);
        q.take();
        __syncwarp();
        if constexpr (HELD) load_queries(first + 16 * WARPS);
        const int least = work.least_seen(first), most = work.most_seen(first);
        Flash<1, KEYS> flash;
        for (int from = 0; from < most; from += KEYS) {
            Scores<1, KEYS> s;
            flash.multiply_keys(s, q, Right<HEAD_DIM_QK, false>(shared + from * Keys::PITCH));
            if (from + KEYS > least) mask(s, work, first, from);
            float factor[1][2];
            flash.exponentials(s, p.common.scale_log2, factor);
            flash.multiply_values(s, Right<HEAD_DIM_V, true>(shared + SPAN * Keys::PITCH + from * Values::PITCH));
        }
        if constexpr (!HELD) {
            __syncwarp();
            load_queries(first + 16 * WARPS);
        }
        copy_commit();
        write_shares(p, work, flash, first);
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
