// What the kernels of a decoding step share: where shares and caches lie, and how many rows there are.
#pragma once
#include "step.cuh"

// What a block works on.
struct Place : Part {
    int split;
    int sequence;
    int context;  // tokens of the sequence; 0 if there is none

    __device__ __forceinline__ Place(const DecodeParams& p, int splits) : Place(p, splits, blockIdx.x) {}
    __device__ __forceinline__ i64 group() const { return i64(sequence) * KV_HEADS + head; }

private:
    __device__ __forceinline__ Place(const DecodeParams& p, int splits, u32 work)
        : Part(work), split(int(work % u32(splits))), sequence(int(work / u32(splits))),
          context(int(p.sequences[i64(sequence) * 3])) {}
};

// Where shares of the outputs lie: those of all branches of a group, compressed blocks first, then the window, then selected blocks.
struct Shares {
    i64 first;  // split 0 of the group
    __device__ __forceinline__ Shares(const DecodeParams& p, i64 group)
        : first(group * (p.cmp_splits + p.win_splits + p.slc_splits)) {}
    __device__ __forceinline__ float* o(const DecodeParams& p, int split, int head) const {
        return p.shares + ((first + split) * GROUP + head) * HEAD_DIM_V;
    }
    // m and l.
    __device__ __forceinline__ float* statistics(const DecodeParams& p, int split, int head) const {
        return p.statistics + ((first + split) * GROUP + head) * 2;
    }
};

// Compressed blocks of so many tokens.
__device__ __forceinline__ int num_blocks(int context) {
    return context < COMPRESS_BLOCK ? 0 : (context - COMPRESS_BLOCK) / COMPRESS_STRIDE + 1;
}
// Splits of a sequence's compressed blocks; the first one is there without a block too.
__device__ __forceinline__ int num_cmp_splits(int context) {
    const int splits = splits_of(num_blocks(context));
    return splits > 0 ? splits : 1;
}
__device__ __forceinline__ int num_candidates(int context) { return (context - 1) / SELECT_BLOCK + 1; }
// Tokens of all selected blocks: they are whole but for the query's own, which is the last.
__device__ __forceinline__ int num_selected(int context) {
    const int candidates = num_candidates(context), used = candidates < SELECT_COUNT ? candidates : SELECT_COUNT;
    return (used - 1) * SELECT_BLOCK + (context - 1) % SELECT_BLOCK + 1;
}
__device__ __forceinline__ int num_window(int context) { return context < WINDOW ? context : WINDOW; }

constexpr __host__ __device__ int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// Tokens of the window in their ring.
template <int DIM>
struct RingRows {
    static constexpr i64 STRIDE = i64(KV_HEADS) * DIM;
    const Element* base;  // of the head
    u32 first;            // the row of the window's first token

    __device__ __forceinline__ RingRows(u64 ring, int head, int context)
        : base(reinterpret_cast<const Element*>(ring) + head * DIM),
          first(u32(context - num_window(context)) % WINDOW) {}
    __device__ __forceinline__ const Element* operator()(int x) const {
        const u32 row = first + x;
        return base + i64(row >= WINDOW ? row - WINDOW : row) * STRIDE;
    }
    __device__ __forceinline__ bool even(int x, int count) const {
        return first + x >= WINDOW || first + x + count <= WINDOW;
    }
};

// The place's queries attend, see `attend` of step.cuh.
template <class KeyRows, class ValueRows, class Meanwhile, class See>
__device__ __forceinline__ void attend(const DecodeParams& p, const Place& place, StepFlash& flash, const KeyRows& k,
                                       const ValueRows& v, int first, int end, const Meanwhile& meanwhile, const See& see) {
    attend(p.q + place.query_head(place.sequence) * HEAD_DIM_QK, place.heads, p.scale_log2, flash, k, v, first, end, meanwhile, see);
}

__device__ __forceinline__ void write_share(const DecodeParams& p, const Place& place, int split, StepFlash& flash,
                                           float (&teams)[TEAMS][ROWS][2]) {
    const Shares shares(p, place.group());
    const int head = place.part * ROWS;
    write_share(shares.o(p, split, head), shares.statistics(p, split, head), place.heads, flash, teams);
}
