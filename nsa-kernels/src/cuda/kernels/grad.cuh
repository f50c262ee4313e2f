// What all gradients of attention share (SPEC 3). With do^c = g do,
//   delta = sum_d do^c o,   p = e^(scale q k - lse),   ds = scale p (g do v - delta),
//   dq += sum ds k,   dk = sum ds q,   dv = sum (g p) do;   g p and ds are rounded to Element.
#pragma once
#include "unit.cuh"
#include "sequence.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

using Keys = Tile<HEAD_DIM_QK>;
using Values = Tile<HEAD_DIM_V>;

// Of a row: lse (0 without keys), scale delta, g, and the query's position plus one, which is 0 of rows that are none. Tensor
// cores' operands are rounded far above what a product of constants loses: for them lse is in powers of two.
using RowFacts = float4;

// Those of all rows, [N, HEADS].
template <class P>
__device__ __forceinline__ RowFacts* facts_of(const P& p) {
    return reinterpret_cast<RowFacts*>(p.facts);
}

__device__ __forceinline__ int position_of(const RowFacts& facts) { return __float_as_int(facts.w) - 1; }

// p of a score.
__device__ __forceinline__ float probability(float score, float scale, const RowFacts& facts) {
    return exp2_approx(TENSOR_CORES ? fmaf(score, scale * LOG2_E, -facts.x) : fmaf(score, scale, -facts.x) * LOG2_E);
}

// ds of a pair from p and do v; `scaled_gate` is scale g of the row.
__device__ __forceinline__ float score_gradient(float p, float d_p, float scaled_gate, const RowFacts& facts) {
    return p * fmaf(scaled_gate, d_p, -facts.y);
}

// Facts of all rows. The gates' gradients are sums of do o: a thread takes a row then; without them a warp, whose lanes go along it.
template <class P>
__device__ __forceinline__ void row_facts(const P& p) {
    const bool summed = p.d_gates != nullptr;
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, row = summed ? thread : thread / 32;
    if (row >= p.rows) return;
    const int lane = threadIdx.x % 32;
    const float gate = p.gates == nullptr ? 1.0f : to_float(p.gates[row * 3 + p.gate]);
    float sum = 0.0f;
    if (summed) {
        sum = gate * p.d_gates[row * 3 + p.gate];
    } else {
        for (int d = lane; d < HEAD_DIM_V; d += 32) {
            const float d_o = to_float(p.d_o[row * HEAD_DIM_V + d]) * gate;
            sum = fmaf(d_o, to_float(p.o[row * HEAD_DIM_V + d]), sum);
        }
        sum = warp_sum(sum);
    }
    if (summed || lane == 0) {
        const int token = int(row / HEADS);
        const Sequence seq = find_sequence<0>(p.sequences, p.num_sequences, token);
        const int position = seq.context + token - seq.query;
        const float natural = p.lse[row], lse = TENSOR_CORES ? natural * LOG2_E : natural;
        facts_of(p)[row] = make_float4(natural == negative_infinity() ? 0.0f : lse, p.scale * sum, gate, __int_as_float(position + 1));
    }
}

// A warp's rows of dq: written, or added to what is there. Loads of a row are under way together: a store may not pass a load that it
// could change.
template <class Place>
__device__ __forceinline__ void put_query_gradients(const Parts<1, Keys::PADDED>& dq, bool add, const Place& place) {
    constexpr int PARTS = Keys::PADDED / 8, TURN = PARTS < 16 ? PARTS : 16;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float* const to = place(h * 8 + lane / 4);
        if (to == nullptr) continue;
#pragma unroll
        for (int from = 0; from < PARTS; from += TURN) {
            float sums[TURN][2];
            const auto each = [&](const auto& act) {
#pragma unroll
                for (int n = 0; n < TURN; ++n) {
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int d = (from + n) * 8 + lane % 4 * 2 + c;
                        if (from + n < PARTS && d < HEAD_DIM_QK) act(to[d], sums[n][c], dq[0][from + n < PARTS ? from + n : 0][2 * h + c]);
                    }
                }
            };
            each([&](float& place, float& sum, float) { sum = add ? place : 0.0f; });
            each([](float& place, float& sum, float x) { place = sum + x; });
        }
    }
}

// Rows of queries and of do through two stages, for a block that owns keys.
constexpr int KEY_ROWS = 16 * WARPS;
constexpr int QUERY_STAGE_BYTES = round_up(QUERY_ROWS * (Keys::PITCH + Values::PITCH + int(sizeof(RowFacts))), TILE_ALIGNMENT);
constexpr int OWN_BYTES = KEY_ROWS * (Keys::PITCH + Values::PITCH);
// Where dk and dv do not fit into the registers of one warp, two blocks take one each.
constexpr bool APART = Keys::PADDED + Values::PADDED > 320;

// Starts to copy rows `first`.. of `rows` of the queries with a KV head to a stage: q, do, facts. R rows a query; `token(i)` is the
// i-th query's row in [N].
template <class P, class Token>
__device__ __forceinline__ void load_query_rows(const P& p, u32 to, int first, int rows, int head, const Token& token) {
    const int thread = anew(int(threadIdx.x)), count = rows - first;
    load_tile<SharedTile<HEAD_DIM_QK, QUERY_ROWS>, QUERY_ROWS, 32 * WARPS, QK_COPY_BYTES>(
        to, thread, count, QueryRows<HEAD_DIM_QK, Token>{p.q + i64(head) * GROUP * HEAD_DIM_QK, first, token});
    load_tile<SharedTile<HEAD_DIM_V, QUERY_ROWS>, QUERY_ROWS, 32 * WARPS, V_COPY_BYTES>(
        to + QUERY_ROWS * Keys::PITCH, thread, count, QueryRows<HEAD_DIM_V, Token>{p.d_o + i64(head) * GROUP * HEAD_DIM_V, first, token});
    const auto load_facts = [&](int r) {
        const bool there = r < count;
        const int row = there ? first + r : first;
        const RowFacts* const from = facts_of(p) + i64(token(row / GROUP)) * HEADS + head * GROUP + row % GROUP;
        copy_async<16>(to + QUERY_ROWS * (Keys::PITCH + Values::PITCH) + r * 16, from, there);
    };
    if constexpr (QUERY_ROWS <= 32 * WARPS) {
        if (thread < QUERY_ROWS) load_facts(thread);
    } else {
        for (int r = thread; r < QUERY_ROWS; r += 32 * WARPS) load_facts(r);
    }
}

// Starts to copy a block's own keys, and its values if it has a use for them.
template <bool WITH_VALUES, class K, class V>
__device__ __forceinline__ void load_key_rows(char* to, int count, const K& k, const V& v) {
    const u32 keys = shared_address(to), values = keys + KEY_ROWS * Keys::PITCH;
    load_tile<SharedTile<HEAD_DIM_QK, KEY_ROWS>, KEY_ROWS, 32 * WARPS, QK_COPY_BYTES>(keys, threadIdx.x, count, k);
    if constexpr (WITH_VALUES) {
        load_tile<SharedTile<HEAD_DIM_V, KEY_ROWS>, KEY_ROWS, 32 * WARPS, V_COPY_BYTES>(values, threadIdx.x, count, v);
    }
}

// Floats of a share of a tile's gradients that is added later.
constexpr int PARTIAL = KEY_ROWS * (HEAD_DIM_QK + HEAD_DIM_V);

// Adds `count` shares, `stride` floats apart, in order to dk and dv of `keys` rows, whose KV heads lie beside each other: the
// work of `threads`, of which this is number `thread`.
__device__ __forceinline__ void add_partials(float* dk, float* dv, const float* partial, i64 stride, int count, int keys, int thread,
                                             int threads) {
    for (int i = thread; i < keys * (HEAD_DIM_QK + HEAD_DIM_V); i += threads) {
        const bool of_k = i < keys * HEAD_DIM_QK;
        const int dim = of_k ? HEAD_DIM_QK : HEAD_DIM_V, rest = of_k ? i : i - keys * HEAD_DIM_QK;
        const float* from = partial + (of_k ? 0 : KEY_ROWS * HEAD_DIM_QK) + rest;
        float* const to = (of_k ? dk : dv) + i64(rest / dim) * KV_HEADS * dim + rest % dim;
        float sum = *to;
#pragma unroll 8
        for (int other = 0; other < count; ++other) sum += from[other * stride];
        *to = sum;
    }
}

using QueryScores = Parts<1, QUERY_ROWS>;

// Gradients of a warp's 16 keys.
template <bool K, bool V>
struct KeyGradients {
    float dk[1][K ? Keys::PADDED / 8 : 1][4];
    float dv[1][V ? Values::PADDED / 8 : 1][4];

    __device__ __forceinline__ KeyGradients() {
        if constexpr (K) clear<1, Keys::PADDED>(dk);
        if constexpr (V) clear<1, Values::PADDED>(dv);
    }

    // Of QUERY_ROWS rows in a stage, for the warp's keys, which are rows base.. of the tiles. Unless all see all (`whole`, the same in
    // all lanes), the query at position t sees those keys that `run(t)` says, counted from the warp's first one.
    template <class Run>
    __device__ __forceinline__ void add(const char* keys, const char* values, int base, const char* stage, float scale, bool whole,
                                        const Run& run) {
        QueryScores p, ds;
        // Both go on together; a warp alone, which has done the first before it begins the second, saves the registers.
        begin_dots_with<HEAD_DIM_QK, KEY_ROWS, QUERY_ROWS>(p, keys, base, stage);
        if constexpr (K && WARPGROUPS) begin_dots_with<HEAD_DIM_V, KEY_ROWS, QUERY_ROWS>(ds, values, base, d_o_of(stage));
        end_products<K ? 1 : 0>(p);
        probabilities(p, stage, scale);
        if (!uniform(whole)) mask(p, stage, run);
        if constexpr (K) {
            if constexpr (!WARPGROUPS) begin_dots_with<HEAD_DIM_V, KEY_ROWS, QUERY_ROWS>(ds, values, base, d_o_of(stage));
            end_products<0>(ds);
            score_gradients(ds, p, stage, scale);
            begin_rows_of<HEAD_DIM_QK, QUERY_ROWS>(dk, ds, stage);
        }
        if constexpr (V) {
            add_values(p, stage);
            end_products<0>(dv);
        }
        if constexpr (K) end_products<0>(dk);
    }

    // Writes rows 0..rows, row r to dk + r APART_ROWS HEAD_DIM_QK and dv likewise.
    template <int APART_ROWS>
    __device__ __forceinline__ void write(float* to_k, float* to_v, int rows) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = h * 8 + lane / 4;
            if (row >= rows) continue;
            if constexpr (K) write_row<HEAD_DIM_QK>(to_k + i64(row) * APART_ROWS * HEAD_DIM_QK, dk[0], h);
            if constexpr (V) write_row<HEAD_DIM_V>(to_v + i64(row) * APART_ROWS * HEAD_DIM_V, dv[0], h);
        }
    }
    // Writes them where a part or a work leaves its share of a tile, [KEY_ROWS, Dk] before [KEY_ROWS, Dv]: rows base..base + rows.
    __device__ __forceinline__ void write_partial(float* partial, int base, int rows) const {
        write<1>(partial + base * HEAD_DIM_QK, partial + KEY_ROWS * HEAD_DIM_QK + base * HEAD_DIM_V, rows);
    }
    template <int DIM, int N>
    static __device__ __forceinline__ void write_row(float* to, const float (&from)[N][4], int h) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int d = n * 8 + threadIdx.x % 4 * 2 + c;
                if (d < DIM) to[d] = from[n][2 * h + c];
            }
        }
    }

private:
    static __device__ __forceinline__ const char* d_o_of(const char* stage) { return stage + QUERY_ROWS * Keys::PITCH; }
    // Of a part's column c.
    static __device__ __forceinline__ RowFacts facts_at(const char* stage, int n, int c) {
        const char* const facts = d_o_of(stage) + QUERY_ROWS * Values::PITCH;
        return reinterpret_cast<const RowFacts*>(facts)[n * 8 + anew(int(threadIdx.x % 4)) * 2 + c];
    }

    // p of keys that a query does not see becomes 0.
    template <class Run>
    static __device__ __forceinline__ void mask(QueryScores& p, const char* stage, const Run& run) {
        const int key = int(u32(anew(int(threadIdx.x % 32))) / 4);
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int t = position_of(facts_at(stage, n, c));
                const int2 seen = run(t);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int at = key + h * 8;
                    if (t < 0 || at < seen.x || at >= seen.y) p[0][n][2 * h + c] = 0.0f;
                }
            }
        }
    }
    // Scores become p.
    static __device__ __forceinline__ void probabilities(QueryScores& p, const char* stage, float scale) {
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const RowFacts row = facts_at(stage, n, c);
#pragma unroll
                for (int h = 0; h < 2; ++h) p[0][n][2 * h + c] = probability(p[0][n][2 * h + c], scale, row);
            }
        }
    }
    // Begins dv += (g p) do.
    __device__ __forceinline__ void add_values(const QueryScores& p, const char* stage) {
        QueryScores weights;
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n) {
#pragma unroll
            for (int x = 0; x < 4; ++x) weights[0][n][x] = p[0][n][x] * facts_at(stage, n, x % 2).z;
        }
        begin_rows_of<HEAD_DIM_V, QUERY_ROWS>(dv, weights, d_o_of(stage));
    }
    // Products of v and do become ds.
    static __device__ __forceinline__ void score_gradients(QueryScores& ds, const QueryScores& p, const char* stage, float scale) {
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const RowFacts row = facts_at(stage, n, c);
                const float scaled_gate = scale * row.z;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float& x = ds[0][n][2 * h + c];
                    x = score_gradient(p[0][n][2 * h + c], x, scaled_gate, row);
                }
            }
        }
    }
};
