// Gradients of the queries of attention over selected blocks (SPEC 3; see grad.cuh) of small groups, turned round as slc_turned.cu
// is: a CTA owns a block of keys, gathers the queries that have selected it with their do and facts, and leaves a share of each
// row's dq, sum of ds k, at the block's place in the query's list. slc_add_shares sums the shares of each row, into dq.
//
// Grid: as slc_turned.cu; slc_add_shares: a warp a row.
// Shared memory, bytes at D = 128 in bf16: the block of keys 64 x 512, q and do 4 warps x 16 x 512: 65,536.
// Registers: dq 64, scores and their gradients 32, facts 8, the rest addresses.
// Roofline, a query head: 2 (2 Dk + Dv) n l' FLOP; 4 n Dk bytes of shares written, and as many read, n (Dk + Dv) elements of
// queries, and the block once for the rows of a work. Bound by memory, where shares go and come back.
// Counted as in slc_turned.cu, R = 4, ms: 0.21 and 0.22 at 2,048 tokens; turned 0.51 at 4,096.
// Order of summation: keys in order; then blocks in the order of the list; then what dq was before, if the call adds to it, and
// the sum.
// Edges: as slc_turned.cu; a query without blocks adds nothing.
//
// budget: kernel=slc_turned_gradients threads=128 registers=168 spills=0 shared=65536
// budget: kernel=slc_add_shares threads=256 registers=64 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "grad.cuh"
#include "turned.cuh"

constexpr int QUERY_BYTES = 16 * (Keys::PITCH + Values::PITCH);

extern __shared__ __align__(128) char shared[];

// ds of keys `from`.. of the block: from scores s and do v. `whole`: all rows see all of them.
__device__ __forceinline__ void score_gradients(Parts<1, KEYS>& ds, const Parts<1, KEYS>& s, float scale,
                                                const RowFacts (&facts)[2], const TurnedWork& work, int from, bool whole) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        // Keys that the row sees: up to its position, none if it is none.
        const int seen = position_of(facts[h]) + 1 - work.key, end = (seen < SELECT_BLOCK ? seen : SELECT_BLOCK) - from;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int c = 2 * h; c < 2 * h + 2; ++c) {
                const float p = whole || n * 8 + lane % 4 * 2 + c % 2 < end ? probability(s[0][n][c], scale, facts[h]) : 0.0f;
                ds[0][n][c] = score_gradient(p, ds[0][n][c], scale * facts[h].z, facts[h]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) slc_turned_gradients(const __grid_constant__ SlcTurnedBackwardParams params) {
    const BandBackwardParams& p = params.common;
    if (int(blockIdx.x) >= params.index.work_starts[KV_HEADS * params.index.blocks]) return;
    const TurnedWork work(params.index, blockIdx.x);
    const int lane = threadIdx.x % 32;
    char* const own = shared + BLOCK_BYTES + uniform(int(threadIdx.x / 32)) * QUERY_BYTES;
    char* const d_o = own + 16 * Keys::PITCH;
    const auto load_queries = [&](int first) {
        if (first >= work.rows) return;
        work.load_queries<HEAD_DIM_QK, QK_COPY_BYTES>(own, p.q, first);
        work.load_queries<HEAD_DIM_V, V_COPY_BYTES>(d_o, p.d_o, first);
    };
    work.load_block(shared, KeyRows<HEAD_DIM_QK>(p.k, nullptr, work.sequence.key, work.head),
                    KeyRows<HEAD_DIM_V>(p.v, nullptr, work.sequence.key, work.head));
    for (int first = work.begin(load_queries); first < work.rows; first += 16 * WARPS) {
        RowFacts facts[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + h * 8 + lane / 4;
            facts[h] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (row < work.rows) facts[h] = facts_of(p)[work.token(row) * HEADS + work.query_head(row)];
        }
        const int least = first + 16 <= work.rows ? work.least_seen(first) : 0, most = work.most_seen(first);
        Parts<1, Keys::PADDED> dq;
        clear<1, Keys::PADDED>(dq);
        for (int from = 0; from < most; from += KEYS) {
            const char* const keys = shared + from * Keys::PITCH;
            const char* const values = shared + SPAN * Keys::PITCH + from * Values::PITCH;
            Parts<1, KEYS> s, ds;
            dot_rows(s, Rows<HEAD_DIM_QK, 1, false>(own), Right<HEAD_DIM_QK, false>(keys));
            dot_rows(ds, Rows<HEAD_DIM_V, 1, false>(d_o), Right<HEAD_DIM_V, false>(values));
            score_gradients(ds, s, p.scale, facts, work, from, from + KEYS <= least);
            add_rows<0>(dq, ds, Right<HEAD_DIM_QK, true>(keys));
        }
        __syncwarp();
        load_queries(first + 16 * WARPS);
        copy_commit();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + h * 8 + lane / 4;
            if (row < work.rows) write_share<Keys>(params.shares, work.share(row), dq[0], h);
        }
        copy_wait<0>();
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(256) slc_add_shares(const __grid_constant__ SlcTurnedBackwardParams p) {
    const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int query = int(row / HEADS), head = int(row % HEADS);
    if (query >= p.index.tokens) return;
    const int count = List(p.index, query, head / GROUP).length(SELECT_COUNT);
    const float* const shares = p.shares + row * SELECT_COUNT * Keys::PADDED;
    float* const dq = p.common.dq + (i64(p.index.first_token) * HEADS + row) * HEAD_DIM_QK;
#pragma unroll
    for (int d = threadIdx.x % 32; d < HEAD_DIM_QK; d += 32) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = 0; i < count; ++i) sum += shares[i * Keys::PADDED + d];
        if (p.common.accumulate == 0) {
            dq[d] = sum;
        } else if (count > 0) {
            dq[d] += sum;
        }
    }
}
