// Gradients of attention over a run of keys: `dense`, `win`, `cmp` (SPEC 3; see grad.cuh).
//
// Kernels of an operation: what is known of each row of queries (lse, delta, gate, position); dq, a CTA a tile of ROWS / R
// queries, over its keys; dk and dv, a CTA a tile of 16 WARPS keys, over the rows of the queries that see them, COPIED tiles of
// which come at once. Where tiles of keys are too few for a device (compressed ones are few, and the first are seen by all), their
// rows are cut into parts of part_rows, a CTA a part, whose gradients are added in order at the end. No atomics, nothing of size
// T x T.
// Shared memory, bytes at D = 128 in bf16: 64 rows of q and do (or of k and v) 32,768; 2 stages of 32 rows of k and v 32,768 (or
// of q, do and facts 33,792). On sm_90a, where four warps multiply together, tiles have 64 rows; dq is the work of twelve warps: 98,304
// and 65,536; dk and dv that of eight: 65,536, and 2 stages of two tiles, 135,168. There
// hardware copies rows of keys and of queries (bulk.cuh), which takes 16 more; facts of rows are copied by threads.
// Registers: dq 64, q 32 (where Dk + Dv <= 256), scores and their gradients 32; dk and dv 128, scores and their gradients 32. With
// Dk + Dv above 320 dk and dv are two CTAs' work, which costs the scores a second time. On sm_90a scores and their gradients 64;
// dv's product comes after that of dk there: the other order overlaps more, and spills.
// Passes over shared memory, 64 keys and 64 rows at D = 128: mma.sync reads its right side for each warp, 288 KiB; wgmma reads it
// once for four, 96 KiB in products that take 1,024 cycles of tensor cores.
// Roofline, a query row and key that it sees: dq 2 (2 Dk + Dv) FLOP, dk and dv 4 (Dk + Dv); from memory q, k, v, o, do once,
// and dq twice, dk and dv once in f32.
// Order of summation: dq: tiles of keys in order; dk, dv: rows in the order of tokens, then heads; parts in order. Their length
// follows from the shapes and the device's multiprocessors.
// Measured on an H100, R = 16, D = 128, one KV head: cmp at 16,384 tokens, 16 tiles of keys as one CTA each took 17.2 ms, of 25 of
// the whole backward. At 65,536: dk and dv of cmp 9.8 ms by blocks of four warps whose descriptors and addresses each thread
// computed, 5.1 ms now (docs/performance-cuda.md).
// Edges: as in band_fwd.cuh. Keys that no query sees have gradients of 0.
#pragma once
#include "grad.cuh"
#include "span.cuh"

constexpr int QUERY_THREADS = 32 * QUERY_WARPS;
constexpr int KEY_THREADS = 32 * WARPS;
constexpr int ROWS = 16 * QUERY_WARPS;
constexpr int QUERIES = ROWS / GROUP;
// As many threads as divide the rows of a tile of keys.
constexpr int LOADERS = QUERY_WARPS % 3 == 0 ? QUERY_THREADS / 3 * 2 : QUERY_THREADS;
// Rows of q are held in registers; those of do are read each time.
constexpr bool HELD = TENSOR_CORES && !WARPGROUPS && Keys::PADDED + Values::PADDED <= 256;
constexpr int STAGE_BYTES = KEYS * (Keys::PITCH + Values::PITCH);
constexpr int VALUES = KEYS * Keys::PITCH;  // of a stage, behind its keys
static_assert(QUERIES > 0, "a block holds all heads of a query");

extern __shared__ __align__(TILE_ALIGNMENT) char shared[];

// Rows of queries in the order of tokens, R a token.
struct QueryRun {
    const Sequence& sequence;
    int head;   // KV head
    int query;  // first, within the sequence

    __device__ __forceinline__ int position(int row) const { return sequence.context + query + int(u32(row) / GROUP); }
    // Row of the i-th query in [N].
    __device__ __forceinline__ int token(int i) const { return sequence.query + query + i; }
    // In tensors [N, HEADS].
    __device__ __forceinline__ i64 row(int at) const { return i64(token(int(u32(at) / GROUP))) * HEADS + head * GROUP + int(u32(at) % GROUP); }
};

// dq of a tile of queries, over its keys.
template <class Span>
__device__ __forceinline__ void query_gradients(const BandBackwardParams& p) {
    const int tile = p.query_tiles - 1 - int(blockIdx.x / KV_HEADS);
    const Sequence seq = sequence_of_warp<5>(p.sequences, p.num_sequences, tile);
    const QueryRun run{seq, int(blockIdx.x % KV_HEADS), (tile - seq.tile) * QUERIES};
    const int left = seq.queries - run.query, rows = (left < QUERIES ? left : QUERIES) * GROUP;
    const Span span(seq);
    char* const d_o = shared + ROWS * Keys::PITCH;
    char* const stages = d_o + ROWS * Values::PITCH;
    load_gradient_rows<ROWS, QUERY_THREADS>(p, shared_address(shared), int(threadIdx.x), 0, rows, run.head,
                                            [&](int i) { return run.token(i); });
    const int base = threadIdx.x / 32 * 16, own = rows - base < 16 ? rows - base : 16, lane = threadIdx.x % 32;
    RowFacts facts[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = h * 8 + lane / 4;
        facts[h] = row < own ? facts_of(p)[run.row(base + row)] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    const int before = run.position(base), after = run.position(base + (own > 0 ? own : 1) - 1);
    // Those whose products are made together skip the same tiles.
    const int theirs = first_together<ROWS>(base), last = rows - theirs < ROWS_TOGETHER ? rows : theirs + ROWS_TOGETHER;
    const int first_key = span.first(run.position(theirs)), end_key = theirs < rows ? span.end(run.position(last - 1)) : 0;
    const int begin = span.first(run.position(0)), end = span.end(run.position(rows - 1));
    const KeyRows<HEAD_DIM_QK> k(p.k, nullptr, seq.key, run.head);
    const KeyRows<HEAD_DIM_V> v(p.v, nullptr, seq.key, run.head);
    Arrivals arrivals{shared_address(stages) + 2 * STAGE_BYTES};
    if constexpr (BULK) arrivals.init();
    const auto load = [&](int key, int stage) {
        const u32 to = shared_address(stages) + stage * STAGE_BYTES;
        if constexpr (BULK) {
            load_key_boxes<true, KEYS>(p, arrivals, stage, to, 1, run.head, seq.key + key);
        } else {
            const int thread = int(threadIdx.x);
            if (LOADERS < QUERY_THREADS && thread >= LOADERS) return;
            load_tile<SharedTile<HEAD_DIM_QK, KEYS>, KEYS, LOADERS, QK_COPY_BYTES>(to, thread, end - key, k.from(key));
            load_tile<SharedTile<HEAD_DIM_V, KEYS>, KEYS, LOADERS, V_COPY_BYTES>(to + VALUES, thread, end - key, v.from(key));
        }
    };
    const auto wait = [&](int key, int stage) {
        if constexpr (BULK) {
            arrivals.wait(stage);
            // ds with what lies behind the last key is masked, before it meets the keys.
            if (end - key < KEYS) clear_rows<HEAD_DIM_QK, KEYS, QUERY_THREADS>(stages + stage * STAGE_BYTES, end - key);
        }
        wait_for_tiles();
    };
    float dq[1][Keys::PADDED / 8][4];
    clear<1, Keys::PADDED>(dq);
    copy_commit();
    if (begin < end) load(begin, 0);
    copy_commit();
    Rows<HEAD_DIM_QK, 1, HELD> q(shared + base * Keys::PITCH);
    if constexpr (HELD) {
        copy_wait<1>();
        __syncthreads();
        q.take();
    }
    // Of the first stage.
    const u32 of_keys = first_chunk<HEAD_DIM_QK, false>(stages), across = first_chunk<HEAD_DIM_QK, true>(stages);
    const u32 of_values = first_chunk<HEAD_DIM_V, false>(stages + VALUES);
    const auto rows_of_d_o = Right<HEAD_DIM_V, true>(d_o + base * Values::PITCH);
    for (int key = begin, stage = 0; key < end; key += KEYS, stage ^= 1) {
        wait(key, stage);
        if (key + KEYS < end) load(key + KEYS, stage ^ 1);
        copy_commit();
        if (key >= end_key || key + KEYS <= first_key) continue;
        const int behind = stage * STAGE_BYTES;
        const Right<HEAD_DIM_QK, false> keys(stages + behind, Chunks<HEAD_DIM_QK>(of_keys + behind));
        const bool whole = uniform(key >= span.first(after) && key + KEYS <= span.end(before));
        Parts<1, KEYS> s, ds;
        begin_dots_with<ROWS>(s, shared, base, q, keys);
        begin_dots_with<ROWS>(ds, d_o, base, rows_of_d_o, second_tile<HEAD_DIM_V, VALUES>(keys, of_values + behind));
        end_products<1>(s);
        end_products<0>(ds);
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const RowFacts& row = facts[c / 2];
                ds[0][n][c] = score_gradient(probability(s[0][n][c], p.scale, row), ds[0][n][c], p.scale * row.z, row);
            }
        }
        if (!whole) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int t = position_of(facts[h]), first = span.first(t) - key, last = t < 0 ? 0 : span.end(t) - key;
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int c = 2 * h; c < 2 * h + 2; ++c) {
                        const int at = n * 8 + lane % 4 * 2 + c % 2;
                        if (at < first || at >= last) ds[0][n][c] = 0.0f;
                    }
                }
            }
        }
        begin_rows_of(dq, ds, Right<HEAD_DIM_QK, true>(stages + behind, Chunks<HEAD_DIM_QK>(across + behind)));
        end_products<0>(dq);
    }
    copy_wait<0>();
    put_query_gradients(dq, p.accumulate != 0, [&](int row) {
        return row < own ? p.dq + run.row(base + row) * HEAD_DIM_QK : nullptr;
    });
}

// A CTA's tile of keys, of the KV head that the grid says, and the rows of queries that see any of them.
template <class Span>
struct KeyTile {
    const Sequence seq;
    const Span span;
    const int head, key, keys;
    const int query;  // the first that sees one, within the sequence
    const int rows;

    __device__ __forceinline__ KeyTile(const Sequence& of, int tile)
        : seq(of),
          span(seq),
          head(int(blockIdx.x % KV_HEADS)),
          key((tile - seq.tile) * KEY_ROWS),
          keys(seq.keys - key < KEY_ROWS ? seq.keys - key : KEY_ROWS),
          query(within(span.from(key))),
          rows((within(span.until(key + keys - 1)) - query) * GROUP) {}

private:
    // Of a position: the queries of the sequence before it.
    __device__ __forceinline__ int within(int position) const {
        const int stop = seq.context + seq.queries;
        return (position < seq.context ? seq.context : position < stop ? position : stop) - seq.context;
    }
};

// dk or dv, or both, of a tile of keys, over a part of the queries that see them.
template <bool K, bool V, class Span>
__device__ __forceinline__ void key_gradients(const BandBackwardParams& p) {
    // The first keys are seen by most queries.
    const int which = int(blockIdx.x / KV_HEADS);
    const KeyTile<Span> tile(sequence_of_warp<5>(p.key_sequences, p.num_sequences, which), which);
    const int begin = int(blockIdx.z) * p.part_rows;
    const int rows = tile.rows - begin < p.part_rows ? tile.rows : begin + p.part_rows;
    // The first part of a tile that nobody sees writes zeros.
    if (blockIdx.z > 0 && begin >= rows) return;
    const Span& span = tile.span;
    const int key = tile.key, keys = tile.keys, head = tile.head;
    char* const stages = shared + OWN_BYTES;
    const KeyRows<HEAD_DIM_QK> k(p.k, nullptr, tile.seq.key, head);
    const KeyRows<HEAD_DIM_V> v(p.v, nullptr, tile.seq.key, head);
    load_key_rows<K>(shared, keys, k.from(key), v.from(key));
    const QueryRun run{tile.seq, head, tile.query};
    const auto token = [&](int i) { return run.token(i); };
    QueryStages<COPIED, BandBackwardParams, decltype(token)> queries(p, stages, head, rows, token);
    KeyGradients<K, V> gradients;
    queries.load(begin, 0);
    const KeySides sides(shared, stages);
    const auto meet = [&](int first, int behind) {
        const int last = first + QUERY_ROWS < rows ? first + QUERY_ROWS : rows;
        const int base = anew(int(threadIdx.x)) / 32 * 16, mine = key + base;
        const int before = run.position(first), after = run.position(last - 1);
        // Those whose products are made together leave together.
        const int theirs = first_together<KEY_ROWS>(base), seen = key + theirs;
        if (theirs >= keys || seen >= span.end(after) || seen + ROWS_TOGETHER <= span.first(before)) return;
        const bool whole = first + QUERY_ROWS <= rows && mine + 16 <= span.end(before) && mine >= span.first(after);
        gradients.add(sides, base, behind, p.scale, whole,
                      [&](int t) { return make_int2(span.first(t) - mine, span.end(t) - mine); });
    };
    for (int first = begin, stage = 0; first < rows; first += COPIED * QUERY_ROWS, stage ^= 1) {
        queries.wait(first, stage);
        queries.load(first + COPIED * QUERY_ROWS, stage ^ 1);
#pragma unroll 1
        for (int i = 0; i < COPIED && first + i * QUERY_ROWS < rows; ++i) {
            meet(first + i * QUERY_ROWS, (stage * COPIED + i) * QUERY_STAGE_BYTES);
        }
    }
    copy_wait<0>();
    // Found anew: it took registers in the loop.
    const int base = anew(int(threadIdx.x)) / 32 * 16, place = anew(int(blockIdx.x));
    const Sequence own = find_sequence<5>(p.key_sequences, p.num_sequences, place / KV_HEADS);
    const int row = (place / KV_HEADS - own.tile) * KEY_ROWS + base;
    if (blockIdx.z == 0) {
        const i64 at = i64(own.key + row) * KV_HEADS + place % KV_HEADS;
        gradients.template write<KV_HEADS>(p.dk + at * HEAD_DIM_QK, p.dv + at * HEAD_DIM_V, own.keys - row);
    } else {
        gradients.write_partial(p.partial + ((blockIdx.z - 1) * i64(gridDim.x) + place) * PARTIAL, base, own.keys - row);
    }
}

// Adds what the other parts of a tile's queries have to the first one's. Grid: tiles of keys and KV heads, CTAs a tile.
template <class Span>
__device__ __forceinline__ void add_parts(const BandBackwardParams& p) {
    const int which = int(blockIdx.x / KV_HEADS);
    const KeyTile<Span> tile(find_sequence<5>(p.key_sequences, p.num_sequences, which), which);
    const i64 at = i64(tile.seq.key + tile.key) * KV_HEADS + tile.head;
    add_partials(p.dk + at * HEAD_DIM_QK, p.dv + at * HEAD_DIM_V, p.partial + i64(blockIdx.x) * PARTIAL, i64(gridDim.x) * PARTIAL,
                 tile.rows > 0 ? (tile.rows - 1) / p.part_rows : 0, tile.keys, blockIdx.y * 256 + threadIdx.x, gridDim.y * 256);
}

template <class Span>
__device__ __forceinline__ void key_gradients_of(const BandBackwardParams& p) {
    if constexpr (!APART) {
        key_gradients<true, true, Span>(p);
    } else if (blockIdx.y == 0) {
        key_gradients<true, false, Span>(p);
    } else {
        key_gradients<false, true, Span>(p);
    }
}
