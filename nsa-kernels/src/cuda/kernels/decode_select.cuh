// The choice of blocks in a decoding step (SPEC 2.2): a block of threads for one sequence and KV head.
//
// Each chunk of compressed blocks left, for each query head, its p summed to the selection blocks that it touches, relative to
// the chunk's own m. Importance S_j = sum over heads r and chunks c, in this order, of 2^(m_c,r - m_r) / l_r folded_c,r,j; then
// the least score that is taken is found digit by digit (a radix of 256: scores are not negative, so that their bits are in
// their order), and the blocks at or above it are written in their order; of those at it the lower ones.
#pragma once
#include "decode.cuh"

constexpr int CHUNKS = SELECT_BLOCK / COMPRESS_STRIDE;
constexpr int SPAN = COMPRESS_BLOCK / COMPRESS_STRIDE;
constexpr int FREE = SELECT_COUNT - SELECT_INITIAL - SELECT_LOCAL;
constexpr int DIGITS = 256;
static_assert(GROUP * 8 <= BODY_BYTES, "the statistics of a group lie in shared memory");

// Whether scores decide anything.
__device__ __forceinline__ bool selects_by_score(int context) { return FREE > 0 && num_candidates(context) > SELECT_COUNT; }

// The first selection block of a chunk.
__device__ __forceinline__ int first_column(int split) { return int(i64(split) * CHUNK / CHUNKS); }

// Folded scores of a query head and chunk, `[COLUMNS]`.
__device__ __forceinline__ float* folded_of(const DecodeParams& p, i64 group, int split, int head) {
    return p.folded + ((group * p.cmp_splits + split) * GROUP + head) * COLUMNS;
}

// Candidates of one list that compete by their scores.
struct Contest {
    const DecodeParams& p;
    i64 group;
    int blocks;  // compressed blocks
    int first;   // candidate
    int end;

    __device__ __forceinline__ Contest(const DecodeParams& params, i64 group_, int context)
        : p(params), group(group_), blocks(num_blocks(context)), first(SELECT_INITIAL),
          end(num_candidates(context) - SELECT_LOCAL) {}

    // A thread's scores are always of the same candidates: first + thread + THREADS i.
    __device__ __forceinline__ float& score(int block) const { return p.importance[group * p.candidates + block]; }

    // joined: `[GROUP, 2]` floats of shared memory.
    __device__ __forceinline__ void score_all(int splits, float* joined) const {
        const Shares shares(p, group);
        for (int r = threadIdx.x; r < GROUP; r += THREADS) {
            const Joined all(shares.statistics(p, 0, r), splits, GROUP * 2);
            joined[2 * r] = all.base;
            joined[2 * r + 1] = all.inverse();
        }
        __syncthreads();
        for (int block = first + threadIdx.x; block < end; block += THREADS) {
            const int from = block * CHUNKS - (SPAN - 1), to = (block + 1) * CHUNKS < blocks ? (block + 1) * CHUNKS : blocks;
            float sum = 0.0f;
            for (int r = 0; r < GROUP; ++r) {
                for (int split = from > 0 ? from / CHUNK : 0; split * CHUNK < to; ++split) {
                    const float m = shares.statistics(p, split, r)[0];
                    const float folded = folded_of(p, group, split, r)[block - first_column(split)];
                    sum = fmaf(folded, exp2_approx(m - joined[2 * r]) * joined[2 * r + 1], sum);
                }
            }
            // NaN has no order.
            score(block) = sum > 0.0f ? sum : 0.0f;
        }
    }
};

// The bits of the least score that is taken, and how many blocks that have it are.
struct Threshold {
    u32 bits;
    int ties;

    // histogram: `[DIGITS]`, found: two numbers of shared memory.
    __device__ __forceinline__ Threshold(const Contest& contest, int* histogram, int* found) : bits(0), ties(FREE) {
        for (int shift = 24; shift >= 0; shift -= 8) {
            for (int i = threadIdx.x; i < DIGITS; i += THREADS) histogram[i] = 0;
            __syncthreads();
            for (int block = contest.first + threadIdx.x; block < contest.end; block += THREADS) {
                const u32 score = __float_as_uint(contest.score(block));
                if (shift == 24 || (score ^ bits) >> (shift + 8) == 0) atomicAdd(&histogram[score >> shift & (DIGITS - 1)], 1);
            }
            __syncthreads();
            if (threadIdx.x < 32) find_digit(histogram, found);
            __syncthreads();
            bits |= u32(found[0]) << shift;
            ties -= found[1];
        }
    }
    // The digit at which the number of scores, from the highest digit on, reaches `ties`, and how many are above it; a warp's
    // work, each lane with eight digits.
    __device__ __forceinline__ void find_digit(const int* histogram, int* found) const {
        constexpr int OWN = DIGITS / 32;
        const int highest = DIGITS - 1 - int(threadIdx.x) * OWN;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < OWN; ++i) sum += histogram[highest - i];
        int above = sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, above, step);
            if (int(threadIdx.x) >= step) above += other;
        }
        above -= sum;
        if (above >= ties || above + sum < ties) return;
        int digit = highest;
        while (above + histogram[digit] < ties) above += histogram[digit--];
        found[0] = digit;
        found[1] = above;
    }
};

// Writes the list of the sequence's last token.
__device__ __forceinline__ void select(const DecodeParams& p, const Place& place) {
    constexpr int WARPS = THREADS / 32;
    __shared__ int histogram[DIGITS];
    __shared__ int found[2];
    __shared__ int counts[WARPS][2];
    const int candidates = num_candidates(place.context), thread = threadIdx.x;
    int* const list = p.block_indices + place.group() * SELECT_COUNT;
    if (candidates <= SELECT_COUNT) {
        for (int i = thread; i < SELECT_COUNT; i += THREADS) list[i] = i < candidates ? i : -1;
        return;
    }
    for (int i = thread; i < SELECT_INITIAL; i += THREADS) list[i] = i;
    for (int i = thread; i < SELECT_LOCAL; i += THREADS) list[SELECT_COUNT - SELECT_LOCAL + i] = candidates - SELECT_LOCAL + i;
    if (!selects_by_score(place.context)) return;
    const Contest contest(p, place.group(), place.context);
    contest.score_all(num_cmp_splits(place.context), reinterpret_cast<float*>(shared + QUERY_BYTES));
    const Threshold least(contest, histogram, found);
    // Blocks above the threshold and at it, before those of this turn.
    int above = 0, at = 0;
    for (int first = contest.first; first < contest.end; first += THREADS) {
        const int block = first + thread;
        const u32 score = block < contest.end ? __float_as_uint(contest.score(block)) : 0;
        const u32 higher = __ballot_sync(ALL_LANES, block < contest.end && score > least.bits);
        const u32 equal = __ballot_sync(ALL_LANES, block < contest.end && score == least.bits);
        __syncthreads();
        if (thread % 32 == 0) counts[thread / 32][0] = __popc(higher), counts[thread / 32][1] = __popc(equal);
        __syncthreads();
        const u32 before = (1u << thread % 32) - 1;
        int above_me = above + __popc(higher & before), at_me = at + __popc(equal & before);
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) {
            above += counts[warp][0], at += counts[warp][1];
            if (warp < thread / 32) above_me += counts[warp][0], at_me += counts[warp][1];
        }
        const int taken = above_me + (at_me < least.ties ? at_me : least.ties);
        const bool takes = (higher >> thread % 32 & 1) != 0 || ((equal >> thread % 32 & 1) != 0 && at_me < least.ties);
        if (takes) list[SELECT_INITIAL + taken] = block;
    }
}
