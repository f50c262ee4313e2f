// The choice of blocks in a decoding step (SPEC 2.2): a block of threads for one sequence and KV head.
//
// Each chunk of compressed blocks left, for each query head, its p summed to the selection blocks that it touches, relative to
// the chunk's own m. Importance S_j = sum over chunks c and heads r, in this order, of w_c,r folded_c,r,j with
// w_c,r = 2^(m_c,r - m_r) / l_r; then the least score that is taken is found digit by digit (a radix of 256: scores are not
// negative, so that their bits are in their order), and the blocks at or above it are written in their order; of those at it
// the lower ones. Scores of TURN candidates are in registers; further ones are read from memory where they are needed.
#pragma once
#include "decode.cuh"

constexpr int CHUNKS = SELECT_BLOCK / COMPRESS_STRIDE;
constexpr int SPAN = COMPRESS_BLOCK / COMPRESS_STRIDE;
constexpr int FREE = SELECT_COUNT - SELECT_INITIAL - SELECT_LOCAL;
constexpr int DIGITS = 256;
constexpr int PASSES = 4;
constexpr int WARPS = THREADS / 32;
// Lanes that join the statistics of a query head.
constexpr int JOINERS = 8;
// Candidates whose scores a thread has in registers, and a block of threads.
constexpr int TURNS = 32 / WARPS;
constexpr int TURN = TURNS * THREADS;
static_assert(PASSES * DIGITS * 4 <= BODY_BYTES, "histograms lie in shared memory");
static_assert(TURNS * WARPS <= 32, "a lane for each warp's turn");

// Whether scores decide anything.
__device__ __forceinline__ bool selects_by_score(int context) { return FREE > 0 && num_candidates(context) > SELECT_COUNT; }

// The first selection block of a chunk.
__device__ __forceinline__ int first_column(int split) { return int(i64(split) * CHUNK / CHUNKS); }

// Folded scores of a query head and chunk, `[COLUMNS]`.
__device__ __forceinline__ float* folded_of(const DecodeParams& p, i64 group, int split, int head) {
    return p.folded + ((group * p.cmp_splits + split) * GROUP + head) * COLUMNS;
}

// What p of a chunk count, `[GROUP]`.
__device__ __forceinline__ float* weights_of(const DecodeParams& p, i64 group, int split) {
    return p.weights + (group * p.cmp_splits + split) * GROUP;
}

// Writes the weights of all chunks.
__device__ __forceinline__ void weigh(const DecodeParams& p, i64 group, int splits) {
    const Shares shares(p, group);
    for (int first = 0; first < GROUP; first += THREADS / JOINERS) {
        const int r = first + int(threadIdx.x) / JOINERS;
        const float* const statistics = shares.statistics(p, 0, r < GROUP ? r : 0);
        const Joined all = join_shares<JOINERS>(statistics, splits, GROUP * 2);
        const float inverse = all.inverse();
        for (int split = threadIdx.x % JOINERS; split < splits && r < GROUP; split += JOINERS) {
            weights_of(p, group, split)[r] = all.weight(statistics[i64(split) * (GROUP * 2)]) * inverse;
        }
    }
}

// Candidates of one list that compete by their scores. Scores are their bits without the sign, which is none.
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
    __device__ __forceinline__ u32& kept(int block) const {
        return reinterpret_cast<u32*>(p.importance)[group * p.candidates + block];
    }
    // Whether all scores are in registers.
    __device__ __forceinline__ bool held() const { return end - first <= TURN; }

    __device__ __forceinline__ float importance(int block) const {
        const int from = block * CHUNKS - (SPAN - 1), to = (block + 1) * CHUNKS < blocks ? (block + 1) * CHUNKS : blocks;
        float sum = 0.0f;
        for (int split = from > 0 ? from / CHUNK : 0; split * CHUNK < to; ++split) {
            const float* const weights = weights_of(p, group, split);
            const float* const folded = folded_of(p, group, split, 0) + block - first_column(split);
            // Loads of many heads are under way together.
#pragma unroll (GROUP <= 16 ? GROUP : 8)
            for (int r = 0; r < GROUP; ++r) sum = fmaf(folded[r * COLUMNS], weights[r], sum);
        }
        return sum;
    }

    __device__ __forceinline__ void score_all(u32 (&scores)[TURNS]) const {
#pragma unroll 1
        for (int block = first + threadIdx.x, t = 0; block < end; block += THREADS, ++t) {
            const float sum = importance(block);
            // NaN has no order.
            const u32 score = sum > 0.0f ? __float_as_uint(sum) << 1 : 0;
            if (!held()) kept(block) = score;
#pragma unroll
            for (int own = 0; own < TURNS; ++own) scores[own] = own == t ? score : scores[own];
        }
    }

    // Calls turn(block) for the first of each TURN candidates, whose scores are in `scores` then.
    template <class Turn>
    __device__ __forceinline__ void visit(u32 (&scores)[TURNS], const Turn& turn) const {
        for (int from = first; from < end; from += TURN) {
            if (!held()) {
#pragma unroll
                for (int t = 0; t < TURNS; ++t) {
                    const int block = from + t * THREADS + threadIdx.x;
                    if (block < end) scores[t] = kept(block);
                }
            }
            turn(from);
        }
    }
};

// The least score that is taken, and how many blocks that have it are; the lowest ones.
struct Threshold {
    u32 score;
    int ties;

    // histograms: `[PASSES, DIGITS]` zeros in shared memory.
    __device__ __forceinline__ Threshold(const Contest& contest, u32 (&scores)[TURNS], int* histogram) : score(0), ties(FREE) {
        u32 known = 0;
#pragma unroll 1
        for (int shift = 32 - 8; shift >= 0; shift -= 8, histogram += DIGITS) {
            contest.visit(scores, [&](int from) {
#pragma unroll
                for (int t = 0; t < TURNS; ++t) {
                    const bool there = from + t * THREADS + int(threadIdx.x) < contest.end;
                    if (there && ((scores[t] ^ score) & known) == 0) {
                        atomicAdd(&histogram[scores[t] >> shift & (DIGITS - 1)], 1);
                    }
                }
            });
            __syncthreads();
            if (find_digit(histogram, shift)) break;
            known |= u32(DIGITS - 1) << shift;
        }
    }

    // Adds the digit at which the number of scores, from the highest digit on, reaches `ties`, and takes those above it off;
    // each warp's work, each lane with eight digits. Whether all scores with this digit are taken.
    __device__ __forceinline__ bool find_digit(const int* histogram, int shift) {
        constexpr int OWN = DIGITS / 32;
        const int lane = threadIdx.x % 32;
        int counts[OWN];
        int sum = 0;
#pragma unroll
        for (int i = 0; i < OWN; i += 4) {
            const int4 four = *reinterpret_cast<const int4*>(histogram + DIGITS - OWN - lane * OWN + i);
            counts[i] = four.x, counts[i + 1] = four.y, counts[i + 2] = four.z, counts[i + 3] = four.w;
            sum += four.x + four.y + four.z + four.w;
        }
        int above = sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, above, step);
            if (lane >= step) above += other;
        }
        const bool reached = above >= ties;
        above -= sum;
        // Digits of this lane that are passed, and how many scores the next one has.
        int passed = 0, count = 0;
#pragma unroll
        for (int i = OWN - 1; i >= 0; --i) {
            if (OWN - 1 - i == passed) {
                count = counts[i];
                if (above + count < ties) above += count, ++passed;
            }
        }
        const int source = __ffs(int(__ballot_sync(ALL_LANES, reached))) - 1;
        score |= u32(DIGITS - 1 - source * OWN - __shfl_sync(ALL_LANES, passed, source)) << shift;
        ties -= __shfl_sync(ALL_LANES, above, source);
        if (__shfl_sync(ALL_LANES, count, source) > ties) return false;
        ties = FREE;
        return true;
    }
};

// Writes the candidates that are taken, in their order. counts: shared memory.
__device__ __forceinline__ void write_taken(const Contest& contest, const Threshold& least, u32 (&scores)[TURNS], int* list,
                                            u32 (&counts)[TURNS * WARPS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 lower = (1u << lane) - 1;
    // Candidates above the threshold and at it, before those of this turn.
    int above = 0, at = 0;
    contest.visit(scores, [&](int from) {
        u32 higher[TURNS], equal[TURNS];
#pragma unroll
        for (int t = 0; t < TURNS; ++t) {
            const bool there = from + t * THREADS + int(threadIdx.x) < contest.end;
            higher[t] = __ballot_sync(ALL_LANES, there && scores[t] > least.score);
            equal[t] = __ballot_sync(ALL_LANES, there && scores[t] == least.score);
            if (lane == 0) counts[t * WARPS + warp] = u32(__popc(higher[t])) << 16 | u32(__popc(equal[t]));
        }
        __syncthreads();
        u32 sums = lane < TURNS * WARPS ? counts[lane] : 0;
        const u32 own = sums;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const u32 other = __shfl_up_sync(ALL_LANES, sums, step);
            if (lane >= step) sums += other;
        }
#pragma unroll
        for (int t = 0; t < TURNS; ++t) {
            const u32 before = __shfl_sync(ALL_LANES, sums - own, t * WARPS + warp);
            const int above_me = above + int(before >> 16) + __popc(higher[t] & lower);
            const int at_me = at + int(before & 0xffff) + __popc(equal[t] & lower);
            const bool takes = (higher[t] >> lane & 1) != 0 || ((equal[t] >> lane & 1) != 0 && at_me < least.ties);
            const int taken = above_me + (at_me < least.ties ? at_me : least.ties);
            if (takes) list[SELECT_INITIAL + taken] = from + t * THREADS + threadIdx.x;
        }
        const u32 all = __shfl_sync(ALL_LANES, sums, 31);
        above += int(all >> 16), at += int(all & 0xffff);
        // Counts are written anew.
        if (!contest.held()) __syncthreads();
    });
}

// Writes the list of the sequence's last token.
__device__ __forceinline__ void select(const DecodeParams& p, const Place& place) {
    __shared__ u32 counts[TURNS * WARPS];
    const int candidates = num_candidates(place.context), thread = threadIdx.x;
    int* const list = p.block_indices + place.group() * SELECT_COUNT;
    if (candidates <= SELECT_COUNT) {
        for (int i = thread; i < SELECT_COUNT; i += THREADS) list[i] = i < candidates ? i : -1;
        return;
    }
    for (int i = thread; i < SELECT_INITIAL; i += THREADS) list[i] = i;
    for (int i = thread; i < SELECT_LOCAL; i += THREADS) list[SELECT_COUNT - SELECT_LOCAL + i] = candidates - SELECT_LOCAL + i;
    if (!selects_by_score(place.context)) return;
    int* const histograms = reinterpret_cast<int*>(shared + QUERY_BYTES);
    for (int i = thread; i < PASSES * DIGITS; i += THREADS) histograms[i] = 0;
    weigh(p, place.group(), num_cmp_splits(place.context));
    __syncthreads();
    const Contest contest(p, place.group(), place.context);
    u32 scores[TURNS] = {};
    contest.score_all(scores);
    const Threshold least(contest, scores, histograms);
    write_taken(contest, least, scores, list, counts);
}
