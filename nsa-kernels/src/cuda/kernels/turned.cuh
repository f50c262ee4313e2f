// CTAs that own a block of keys, and leave a share of each row of the queries that have selected it.
#pragma once
#include "inverse.cuh"

constexpr int THREADS = 32 * WARPS;
// Rows of a block of keys in shared memory.
constexpr int SPAN = round_up(SELECT_BLOCK, KEYS);
constexpr int BLOCK_BYTES = SPAN * (Keys::PITCH + Values::PITCH);

// A query of a work as its entry of the index names it.
struct Selected {
    int query;  // of the index's
    int place;  // of the block in its list

    __device__ __forceinline__ explicit Selected(int entry) : query(entry / SELECT_COUNT), place(entry % SELECT_COUNT) {}
};

// The work of a CTA, whose warps take 16 rows in turn.
struct TurnedWork : BlockWork {
    int rows;
    int first_token;
    int ahead;  // rows of the sequence's keys from the block's first one up to the index's first query

    __device__ __forceinline__ TurnedWork(const SlcIndexParams& p, int work)
        : BlockWork(p, work), rows(count * GROUP), first_token(p.first_token),
          ahead(sequence.context + first_token - sequence.query + 1 - key) {}
    __device__ __forceinline__ Selected selected(int row) const { return Selected(entries[row / GROUP]); }
    // The row's query in [N].
    __device__ __forceinline__ i64 token(int row) const { return first_token + selected(row).query; }
    __device__ __forceinline__ int query_head(int row) const { return head * GROUP + row % GROUP; }
    // Rows of the block that the query sees.
    __device__ __forceinline__ int seen(int query) const {
        return ahead + query < SELECT_BLOCK ? ahead + query : SELECT_BLOCK;
    }
    // Those that the first of 16 rows sees, which sees least; that the last of them sees (at least, where they are one step).
    __device__ __forceinline__ int least_seen(int first) const { return uniform(seen(selected(first).query)); }
    __device__ __forceinline__ int most_seen(int first) const {
        if constexpr (SPAN == KEYS) return KEYS;
        return uniform(seen(selected(first + 15 < rows ? first + 15 : rows - 1).query));
    }
    // Which share is a row's, of [queries, HEADS, SELECT_COUNT].
    __device__ __forceinline__ i64 share(int row) const {
        const Selected of = selected(row);
        return (i64(of.query) * HEADS + query_head(row)) * SELECT_COUNT + of.place;
    }
    // Starts to copy rows `first`.. of a tensor [N, HEADS, DIM] to the warp's tile of 16.
    template <int DIM, int BYTES>
    __device__ __forceinline__ void load_queries(char* to, const Element* tensor, int first) const {
        const auto token = [&](int i) { return first_token + Selected(entries[i]).query; };
        load_tiles<Tile<DIM>, 16, 32, BYTES>(shared_address(to), threadIdx.x % 32, rows - first,
                                             QueryRows<DIM, 1, decltype(token)>{{tensor + i64(head) * GROUP * DIM}, first, token});
    }
    // Waits for the block, whose copies are under way, and with it for the warp's first rows, which `load_queries(first)` starts to
    // copy. Returns the first of them.
    template <class Load>
    __device__ __forceinline__ int begin(const Load& load_queries) const {
        const int first = uniform(int(threadIdx.x / 32)) * 16;
        load_queries(first);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        return first;
    }
    // Starts to copy the block, as far as its last query sees it.
    __device__ __forceinline__ void load_block(char* to, const KeyRows<HEAD_DIM_QK>& k, const KeyRows<HEAD_DIM_V>& v) const {
        const int keys = seen(Selected(entries[count - 1]).query);
        load_tile<Keys, SPAN, THREADS, QK_COPY_BYTES>(shared_address(to), threadIdx.x, keys, k.from(key));
        load_tile<Values, SPAN, THREADS, V_COPY_BYTES>(shared_address(to) + SPAN * Keys::PITCH, threadIdx.x, keys, v.from(key));
    }
};

// Writes a lane's part of row h of 16 to a share of so many columns as a tile's rows have.
template <class Layout>
__device__ __forceinline__ void write_share(float* shares, i64 share, const float (&from)[Layout::PADDED / 8][4], int h) {
    float* const to = shares + share * Layout::PADDED + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < Layout::PADDED / 8; ++n) {
        *reinterpret_cast<float2*>(to + n * 8) = make_float2(from[n][2 * h], from[n][2 * h + 1]);
    }
}
