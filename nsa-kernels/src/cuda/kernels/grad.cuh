// What all gradients of attention share (SPEC 3). With do^c = g do,
//   delta = sum_d do^c o,   p = e^(scale q k - lse),   ds = scale p (g do v - delta),
//   dq += sum ds k,   dk = sum ds q,   dv = sum (g p) do;   g p and ds are rounded to Element.
#pragma once
#include "bulk.cuh"
#include "sequence.cuh"
#include "unit.cuh"

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

// Facts of the rows in a stage.
__device__ __forceinline__ const RowFacts* facts_in(const char* stage) {
    return reinterpret_cast<const RowFacts*>(stage + QUERY_ROWS * (Keys::PITCH + Values::PITCH));
}

// Starts to copy `count` rows of q, and behind the tile of ROWS those of do: from row `first` on of the queries with a KV head, R rows
// a query; `token(i)` is the i-th query's row in [N].
template <int ROWS, int THREADS, class P, class Token>
__device__ __forceinline__ void load_gradient_rows(const P& p, u32 to, int thread, int first, int count, int head, const Token& token) {
    const Element *const q = p.q + i64(head) * GROUP * HEAD_DIM_QK, *const d_o = p.d_o + i64(head) * GROUP * HEAD_DIM_V;
    using QueryTile = SharedTile<HEAD_DIM_QK, ROWS>;
    using OutputTile = SharedTile<HEAD_DIM_V, ROWS>;
    if constexpr (HEAD_DIM_QK == HEAD_DIM_V && QK_COPY_BYTES == V_COPY_BYTES) {
        load_tiles<QueryTile, ROWS, THREADS, QK_COPY_BYTES>(to, thread, count,
                                                            QueryRows<HEAD_DIM_QK, 2, Token>{{q, d_o}, first, token});
    } else {
        load_tiles<QueryTile, ROWS, THREADS, QK_COPY_BYTES>(to, thread, count, QueryRows<HEAD_DIM_QK, 1, Token>{{q}, first, token});
        load_tiles<OutputTile, ROWS, THREADS, V_COPY_BYTES>(to + ROWS * Keys::PITCH, thread, count,
                                                            QueryRows<HEAD_DIM_V, 1, Token>{{d_o}, first, token});
    }
}

// Boxes of rows of queries that bulk copies take, if they do: BOX_HEADS heads of BOX_TOKENS queries, which follow each other.
constexpr bool BOXED = BULK && BOX_HEADS > 0;
constexpr int BOX_ROWS = BOXED ? BOX_HEADS * BOX_TOKENS : 1;
constexpr int BOX_BYTES = BOX_ROWS * (Keys::PITCH + Values::PITCH);

// Rows of the queries with a KV head, `rows` of them, on their way through two stages of TILES tiles: q, do, facts. `token(i)` is the
// i-th query's row in [N]. What counts arrivals lies behind the stages.
template <int TILES, class P, class Token>
struct QueryStages {
    static constexpr int STEP = TILES * QUERY_ROWS;
    const P& p;
    char* stages;
    int head, rows;
    const Token& token;
    Arrivals arrivals;

    __device__ __forceinline__ QueryStages(const P& params, char* first_stage, int kv_head, int count, const Token& token_of)
        : p(params),
          stages(first_stage),
          head(kv_head),
          rows(count),
          token(token_of),
          arrivals{shared_address(first_stage) + 2 * TILES * QUERY_STAGE_BYTES} {
        if constexpr (BOXED) arrivals.init();
    }
    // Starts to copy the step that begins with row `first`, if there is one.
    __device__ __forceinline__ void load(int first, int stage) const {
        if (first < rows) {
            if constexpr (BOXED) load_boxes(first, stage);
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const int row = first + i * QUERY_ROWS;
                if (TILES > 1 && row >= rows) break;
                const u32 to = shared_address(tile(stage, i));
                const int thread = anew(int(threadIdx.x));
                if constexpr (!BOXED) load_gradient_rows<QUERY_ROWS, 32 * WARPS>(p, to, thread, row, rows - row, head, token);
                load_facts(to + FACTS, thread, row);
            }
        }
        copy_commit();
    }
    // They are there; all have left what they read before.
    __device__ __forceinline__ void wait(int first, int stage) {
        if constexpr (BOXED) {
            arrivals.wait(stage);
            // The last rows of boxes may be none of these.
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const int count = rows - first - i * QUERY_ROWS;
                if (count <= 0 || count >= QUERY_ROWS) continue;
                clear_rows<HEAD_DIM_QK, QUERY_ROWS, 32 * WARPS>(tile(stage, i), count);
                clear_rows<HEAD_DIM_V, QUERY_ROWS, 32 * WARPS>(tile(stage, i) + D_O, count);
            }
        }
        wait_for_tiles();
    }

private:
    using QueryTile = SharedTile<HEAD_DIM_QK, QUERY_ROWS>;
    static constexpr int D_O = QUERY_ROWS * Keys::PITCH, FACTS = D_O + QUERY_ROWS * Values::PITCH;

    __device__ __forceinline__ char* tile(int stage, int i) const { return stages + (stage * TILES + i) * QUERY_STAGE_BYTES; }
    __device__ __forceinline__ void load_boxes(int first, int stage) const {
        if (threadIdx.x >= 32) return;
        constexpr int MOST = STEP / BOX_ROWS;
        const int left = ceil_div(rows - first, BOX_ROWS), boxes = left < MOST ? left : MOST;
        if (threadIdx.x == 0) arrivals.expect(stage, boxes * BOX_BYTES);
        const auto place = [&](int box) {
            const int row = box * BOX_ROWS, at = first + row;
            return Box{row / QUERY_ROWS * QUERY_STAGE_BYTES + row % QUERY_ROWS * QueryTile::ROW_BYTES, token(at / GROUP), head * GROUP + at % GROUP};
        };
        arrivals.copy<HEAD_DIM_QK, HEAD_DIM_V, QUERY_ROWS>(stage, shared_address(stages) + stage * TILES * QUERY_STAGE_BYTES, boxes, p.q_map,
                                                           p.d_o_map, place);
    }
    // Of rows `first`.., facts of none behind the last one.
    __device__ __forceinline__ void load_facts(u32 to, int thread, int first) const {
        const auto load = [&](int r) {
            const bool there = r < rows - first;
            const int row = there ? first + r : first;
            copy_async<16>(to + r * 16, facts_of(p) + i64(token(row / GROUP)) * HEADS + head * GROUP + row % GROUP, there);
        };
        if constexpr (QUERY_ROWS <= 32 * WARPS) {
            if (thread < QUERY_ROWS) load(thread);
        } else {
            for (int r = thread; r < QUERY_ROWS; r += 32 * WARPS) load(r);
        }
    }
};

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

// Where a lane of a warp alone reads the block's own keys and values, and rows of queries in stages: bytes from where tiles begin.
struct KeySides {
    static constexpr int VALUES = KEY_ROWS * Keys::PITCH, D_O = QUERY_ROWS * Keys::PITCH;
    const char* keys;
    const char* stages;
    u32 along_q, along_d_o, across_q, across_d_o;

    __device__ __forceinline__ KeySides(const char* own, const char* first)
        : keys(own),
          stages(first),
          along_q(u32(anew(Right<HEAD_DIM_QK, false>::own(lane_anew())))),
          along_d_o(u32(anew(Right<HEAD_DIM_V, false>::own(lane_anew())))),
          across_q(u32(anew(Right<HEAD_DIM_QK, true>::own(lane_anew())))),
          across_d_o(u32(anew(Right<HEAD_DIM_V, true>::own(lane_anew())))) {}

    // Rows base.. of keys and values.
    __device__ __forceinline__ auto of_k(int base) const { return at<HEAD_DIM_QK, true>(keys + base * Keys::PITCH, across_q); }
    __device__ __forceinline__ auto of_v(int base) const {
        if constexpr (HEAD_DIM_QK == HEAD_DIM_V) {
            return of_k(base).template further<VALUES>(0);
        } else {
            return at<HEAD_DIM_V, true>(keys + VALUES + base * Values::PITCH, across_d_o);
        }
    }
    // Of the stage `behind` bytes behind the first one.
    template <bool ACROSS>
    __device__ __forceinline__ auto of_q(int behind) const {
        return at<HEAD_DIM_QK, ACROSS>(stages + behind, ACROSS ? across_q : along_q);
    }
    template <bool ACROSS>
    __device__ __forceinline__ auto of_d_o(int behind) const {
        if constexpr (HEAD_DIM_QK == HEAD_DIM_V) {
            return of_q<ACROSS>(behind).template further<D_O>(0);
        } else {
            return at<HEAD_DIM_V, ACROSS>(stages + D_O + behind, ACROSS ? across_d_o : along_d_o);
        }
    }

private:
    template <int DIM, bool ACROSS>
    static __device__ __forceinline__ Right<DIM, ACROSS> at(const char* tile, u32 own) {
        return {tile, Chunks<DIM>(shared_address(tile) + own)};
    }
};

// Gradients of a warp's 16 keys.
template <bool K, bool V>
struct KeyGradients {
    float dk[1][K ? Keys::PADDED / 8 : 1][4];
    float dv[1][V ? Values::PADDED / 8 : 1][4];

    __device__ __forceinline__ KeyGradients() {
        if constexpr (K) clear<1, Keys::PADDED>(dk);
        if constexpr (V) clear<1, Values::PADDED>(dv);
    }

    // Of QUERY_ROWS rows in a stage, which lies `behind` bytes behind the first one, for the warp's keys, which are rows base.. of the
    // tiles. Unless all see all (`whole`, the same in all lanes), the query at position t sees those keys that `run(t)` says, counted
    // from the warp's first one.
    template <class Run>
    __device__ __forceinline__ void add(const KeySides& sides, int base, int behind, float scale, bool whole, const Run& run) {
        const char *const keys = sides.keys, *const values = keys + KeySides::VALUES;
        const auto q = sides.of_q<false>(behind);
        const auto d_o = sides.of_d_o<false>(behind);
        // Those of the lane's first column; the columns of part n are 8 n and 8 n + 1 further.
        const RowFacts* const facts = facts_in(sides.stages + behind) + anew(int(threadIdx.x % 4)) * 2;
        QueryScores p, ds;
        // Both go on together; a warp alone, which has done the first before it begins the second, saves the registers.
        begin_dots_with<KEY_ROWS>(p, keys, base, sides.of_k(base), q);
        if constexpr (K && WARPGROUPS) begin_dots_with<KEY_ROWS>(ds, values, base, sides.of_v(base), d_o);
        end_products<K ? 1 : 0>(p);
        probabilities(p, facts, scale);
        if (!uniform(whole)) mask(p, facts, run);
        if constexpr (K) {
            if constexpr (!WARPGROUPS) begin_dots_with<KEY_ROWS>(ds, values, base, sides.of_v(base), d_o);
            end_products<0>(ds);
            score_gradients(ds, p, facts, scale);
            begin_rows_of(dk, ds, sides.of_q<true>(behind));
        }
        if constexpr (V) {
            add_values(p, facts, sides.of_d_o<true>(behind));
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
    // p of keys that a query does not see becomes 0.
    template <class Run>
    static __device__ __forceinline__ void mask(QueryScores& p, const RowFacts* facts, const Run& run) {
        const int key = int(u32(anew(int(threadIdx.x % 32))) / 4);
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int t = position_of(facts[n * 8 + c]);
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
    static __device__ __forceinline__ void probabilities(QueryScores& p, const RowFacts* facts, float scale) {
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const RowFacts row = facts[n * 8 + c];
#pragma unroll
                for (int h = 0; h < 2; ++h) p[0][n][2 * h + c] = probability(p[0][n][2 * h + c], scale, row);
            }
        }
    }
    // Begins dv += (g p) do.
    template <int AT>
    __device__ __forceinline__ void add_values(const QueryScores& p, const RowFacts* facts, const Right<HEAD_DIM_V, true, AT>& d_o) {
        QueryScores weights;
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n) {
#pragma unroll
            for (int x = 0; x < 4; ++x) weights[0][n][x] = p[0][n][x] * facts[n * 8 + x % 2].z;
        }
        begin_rows_of(dv, weights, d_o);
    }
    // Products of v and do become ds.
    static __device__ __forceinline__ void score_gradients(QueryScores& ds, const QueryScores& p, const RowFacts* facts, float scale) {
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const RowFacts row = facts[n * 8 + c];
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
