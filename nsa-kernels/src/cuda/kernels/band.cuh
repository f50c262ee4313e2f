// Attention in which a query sees one run of keys that only grows at its end with the query: `dense`, `win`, `cmp`.
//
// A block of WARPS x TILES x 16 rows holds QUERIES queries with all R heads of a group, so that a key is read once for all of
// them: row = query R + head. Keys and values come in tiles of KEYS rows, COPIED at once, through two stages of shared memory:
// warps wait for each other once a stage, and between its tiles multiply while others take exponentials.
// Shared memory, bytes: queries ROWS max(pitch of k, pitch of v); 2 stages x COPIED x KEYS (pitch of k + pitch of v); what counts
// arrivals.
#pragma once
#include "bulk.cuh"
#include "flash.cuh"
#include "span.cuh"
#include "unit.cuh"

constexpr int WARP_ROWS = 16 * TILES;
constexpr int ROWS = WARPS * WARP_ROWS;
constexpr int QUERIES = ROWS / GROUP;
constexpr int THREADS = 32 * WARPS;
constexpr int ROWS_BYTES = ROWS * (Keys::PITCH > Values::PITCH ? Keys::PITCH : Values::PITCH);
constexpr int TILE_BYTES = KEYS * (Keys::PITCH + Values::PITCH);
constexpr int STAGE_BYTES = COPIED * TILE_BYTES;
constexpr bool HELD = QUERIES_HELD && TENSOR_CORES;
static_assert(QUERIES > 0, "a block holds all heads of a query");

using BandFlash = Flash<TILES, KEYS>;
using BandScores = Scores<TILES, KEYS>;

extern __shared__ __align__(TILE_ALIGNMENT) char shared[];

// What a block knows of its bulk copies.
__device__ __forceinline__ Arrivals begin_arrivals() {
    const Arrivals arrivals{shared_address(shared) + ROWS_BYTES + 2 * STAGE_BYTES};
    if constexpr (BULK) arrivals.init();
    return arrivals;
}

// What a block works on.
struct BandTile {
    Sequence sequence;
    int head;   // KV head
    int query;  // first, within the sequence
    int rows;   // that hold a query

    template <class P>
    __device__ __forceinline__ BandTile(const P& p, u32 work) {
        // The tiles with most keys come first.
        const int tile = p.tiles - 1 - int(work / KV_HEADS);
        head = int(work % KV_HEADS);
        sequence = sequence_of_warp<5>(p.sequences, p.num_sequences, tile);
        query = (tile - sequence.tile) * QUERIES;
        const int left = sequence.queries - query;
        rows = (left < QUERIES ? left : QUERIES) * GROUP;
    }
    // Position of a row's query.
    __device__ __forceinline__ int position(int row) const { return sequence.context + query + int(u32(row) / GROUP); }
    // Token and head of a row in tensors of HEADS heads.
    __device__ __forceinline__ i64 token(int row) const { return sequence.query + query + int(u32(row) / GROUP); }
    __device__ __forceinline__ int query_head(int row) const { return head * GROUP + int(u32(row) % GROUP); }
};

// The rows of this warp that count, and the keys that they see.
template <class Span>
struct WarpSpan {
    int base, rows;
    int first, end;                // of all rows whose products are made together
    int common_first, common_end;  // keys that every row of the warp sees

    __device__ __forceinline__ WarpSpan(const BandTile& tile, const Span& span) {
        base = anew(int(threadIdx.x)) / 32 * WARP_ROWS;
        rows = tile.rows - base < WARP_ROWS ? tile.rows - base : WARP_ROWS;
        const int before = tile.position(base), after = tile.position(base + (rows > 0 ? rows : 1) - 1);
        common_first = span.first(after), common_end = span.end(before);
        const int theirs = WARPGROUPS ? first_together<ROWS>(base) : base, behind = theirs + (WARPGROUPS ? ROWS_TOGETHER : WARP_ROWS);
        first = span.first(tile.position(theirs));
        end = theirs < tile.rows ? span.end(tile.position((behind < tile.rows ? behind : tile.rows) - 1)) : 0;
    }
};

template <class Span>
__device__ __forceinline__ void mask(BandScores& s, const BandTile& tile, const WarpSpan<Span>& warp, const Span& span, int key) {
    const int lane = int(lane_anew()), row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int t = tile.position(warp.base + i * 16 + h * 8 + row);
            const int first = span.first(t) - key - column, end = span.end(t) - key - column;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int at = n * 8 + c;
                    if (at < first || at >= end) s[i][n][2 * h + c] = negative_infinity();
                }
            }
        }
    }
}

// Writes o and lse of a warp's rows, which go through `own`, which nobody else uses.
template <class P>
__device__ __forceinline__ void write_rows(const P& p, const BandTile& tile, const BandFlash& flash, int base, int rows, char* own) {
    const int lane = anew(int(threadIdx.x % 32));
    const float unscale[2] = {p.unscale_high, p.unscale_low};
    flash.put(own);
    if (lane % 4 == 0) {
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = i * 16 + h * 8 + lane / 4;
                if (row < rows) {
                    p.lse[tile.token(base + row) * HEADS + tile.query_head(base + row)] = flash.lse(i, h, unscale);
                }
            }
        }
    }
    __syncwarp();
    const auto to = [&](int row) { return p.o + (tile.token(base + row) * HEADS + tile.query_head(base + row)) * HEAD_DIM_V; };
    // Heads of one query lie beside each other.
    constexpr int RUN = GROUP < WARP_ROWS ? GROUP : WARP_ROWS;
    if constexpr (RUN % 8 == 0 && WARP_ROWS % RUN == 0 && GROUP % RUN == 0) {
#pragma unroll
        for (int row = 0; row < WARP_ROWS; row += RUN) {
            store_even_rows<HEAD_DIM_V, RUN, 32, V_COPY_BYTES>(own + row * Values::PITCH, lane, rows - row, to(row));
        }
    } else {
        store_rows<HEAD_DIM_V, 32, V_COPY_BYTES>(own, lane, rows, to);
    }
}

// Starts to copy KEYS rows from `key` on.
template <int DIM, int BYTES>
__device__ __forceinline__ void load_keys(u32 to, int count, const KeyRows<DIM>& rows, int key) {
    const int thread = anew(int(threadIdx.x));
    if constexpr (PAGE_ROWS == 0) {
        // As many threads as divide the rows.
        constexpr int LOADERS = WARPS % 3 == 0 ? THREADS / 3 * 2 : THREADS;
        if (LOADERS == THREADS || thread < LOADERS) {
            load_tile<SharedTile<DIM, KEYS>, KEYS, LOADERS, BYTES>(to, thread, count, rows.from(key));
        }
    } else {
        // Tiles behind the last row are zeros, but an address is looked up all the same: that of the first row.
        const int first = count > 0 ? key : 0;
        load_tile<SharedTile<DIM, KEYS>, KEYS, THREADS, BYTES>(to, thread, count, [&](int r) { return rows(first + r); });
    }
}

// Over a tile of queries' keys, from the first tile of keys on: `see(key, index, stage)` for each tile from `key` on that rows of the
// warp see, k and behind it v, if they are wanted, in `stage`. EXTRA keys more are walked over, which are zeros. Other copies that
// are under way are waited for first, and `ready()` is called when they are there.
template <int EXTRA, bool WITH_VALUES, class P, class Span, class Ready, class See>
__device__ __forceinline__ void walk_keys(const P& p, const BandTile& tile, const Span& span, const WarpSpan<Span>& warp,
                                          char* stages, Arrivals& arrivals, const Ready& ready, See& see) {
    const Sequence& seq = tile.sequence;
    const int begin = span.first(tile.position(0)), last = span.end(tile.position(tile.rows - 1));
    const int end = last > 0 ? last + EXTRA : 0;
    const KeyRows<HEAD_DIM_QK> k(p.k, p.k_pages, seq.key, tile.head);
    const KeyRows<HEAD_DIM_V> v(p.v, p.v_pages, seq.key, tile.head);
    const auto load = [&](int key, int stage) {
        const u32 to = shared_address(stages) + stage * STAGE_BYTES;
        if constexpr (BULK) {
            const int left = ceil_div(last - key, KEYS);
            load_key_boxes<WITH_VALUES, KEYS>(p, arrivals, stage, to, left < COPIED ? left : COPIED, tile.head, seq.key + key);
        } else {
#pragma unroll
            for (int at = 0; at < COPIED; ++at) {
                const u32 tile = to + at * TILE_BYTES;
                const int first = key + at * KEYS, count = last - first;
                if (COPIED > 1 && first >= end) break;
                load_keys<HEAD_DIM_QK, QK_COPY_BYTES>(tile, count, k, first);
                if constexpr (WITH_VALUES) load_keys<HEAD_DIM_V, V_COPY_BYTES>(tile + KEYS * Keys::PITCH, count, v, first);
            }
        }
        copy_commit();
    };
    const auto wait = [&](int key, int stage) {
        if constexpr (BULK) {
            arrivals.wait(stage);
            // Rows behind the last key are others': their scores are masked, but 0 times a value that is not finite is none.
#pragma unroll
            for (int at = 0; at < COPIED; ++at) {
                const int first = key + at * KEYS, count = last - first;
                if (first >= end || count >= KEYS) continue;
                char* const tile = stages + stage * STAGE_BYTES + at * TILE_BYTES;
                if (EXTRA > 0 && count <= 0) clear_rows<HEAD_DIM_QK, KEYS, THREADS>(tile, 0);
                if constexpr (WITH_VALUES) clear_rows<HEAD_DIM_V, KEYS, THREADS>(tile + KEYS * Keys::PITCH, count > 0 ? count : 0);
            }
        }
        wait_for_tiles();
    };
    if (begin < end) load(begin, 0);
    copy_commit();
    if (begin < end) {
        wait(begin, 0);
    } else {
        wait_for_tiles();
    }
    ready();
    for (int key = begin, stage = 0; key < end; key += COPIED * KEYS, stage ^= 1) {
        if (key > begin) wait(key, stage);
        if (key + COPIED * KEYS < end) load(key + COPIED * KEYS, stage ^ 1);
#pragma unroll 1
        for (int at = 0; at < COPIED; ++at) {
            const int first = key + at * KEYS;
            if (warp.end == 0 || first >= warp.end + EXTRA || first + KEYS <= warp.first) continue;
            see(first, (first - begin) / KEYS, stages + stage * STAGE_BYTES + at * TILE_BYTES);
        }
    }
}

// Starts to copy a tile's queries.
template <class P>
__device__ __forceinline__ void load_queries(const P& p, const BandTile& tile, char* to) {
    const auto token = [&](int i) { return tile.sequence.query + tile.query + i; };
    const Element* const q = p.q + i64(tile.head) * GROUP * HEAD_DIM_QK;
    load_tiles<SharedTile<HEAD_DIM_QK, ROWS>, ROWS, THREADS, QK_COPY_BYTES>(
        shared_address(to), anew(int(threadIdx.x)), tile.rows, QueryRows<HEAD_DIM_QK, 1, decltype(token)>{{q}, 0, token});
}

// Where a lane of a warp alone reads keys: bytes from where a tile of them begins. Other places are found anew: registers are for
// products.
struct BandLane {
    u32 own = u32(anew(Right<HEAD_DIM_QK, false>::own(lane_anew())));

    __device__ __forceinline__ Right<HEAD_DIM_QK, false> of_keys(const char* tile) const {
        return {tile, Chunks<HEAD_DIM_QK>(shared_address(tile) + own)};
    }
};

// Scores of a warp's rows with a tile of keys from `key` on, minus infinity where they are not seen; `q` is what warps alone read.
template <class Span>
__device__ __forceinline__ void score_keys(BandScores& s, BandFlash& flash, const Queries<TILES, HELD>& q, const BandTile& tile,
                                           const WarpSpan<Span>& warp, const Span& span, int key, const char* keys, const BandLane& lane) {
    if constexpr (WARPGROUPS) {
        dots_together<HEAD_DIM_QK, ROWS, KEYS, TILES>(s, shared, first_together<ROWS>(warp.base), keys);
    } else {
        flash.multiply_keys(s, q, lane.of_keys(keys));
    }
    if (key < warp.common_first || key + KEYS > warp.common_end) mask(s, tile, warp, span, key);
}

// One tile of queries over its keys. `look(flash, s, index, rescaled, factor)` is shown each tile's p, and those of EXTRA keys
// more, which are 0.
template <int EXTRA, class P, class Span, class Look>
__device__ __forceinline__ void attend(const P& p, const BandTile& tile, const Span& span, BandFlash& flash, Arrivals& arrivals,
                                       Look& look) {
    const WarpSpan<Span> warp(tile, span);
    load_queries(p, tile, shared);
    // Read by warps alone.
    Queries<TILES, HELD> q(shared + warp.base * Keys::PITCH);
    const BandLane lane;
    const auto see = [&](int key, int index, const char* stage) {
        BandScores s;
        score_keys(s, flash, q, tile, warp, span, key, stage, lane);
        float factor[TILES][2];
        const bool rescaled = flash.exponentials(s, p.scale_log2, factor);
        look(flash, s, index, rescaled, factor);
        begin_rows_of(flash.o, s, Right<HEAD_DIM_V, true>(stage + KEYS * Keys::PITCH));
        end_products<0>(flash.o);
    };
    walk_keys<EXTRA, true>(p, tile, span, warp, shared + ROWS_BYTES, arrivals, [&] { q.take(); }, see);
    flash.finish();
    // All have read the queries and the last tile.
    __syncthreads();
}
