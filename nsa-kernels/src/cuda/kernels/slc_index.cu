// The inverse of the lists of selected blocks (inverse.cuh): a counting sort of parts of the queries (count, sum over parts, sum
// over blocks, scatter), O(N n) memory and no atomics but on counts and masks, where their order changes nothing. Of all queries,
// or of a run of them with the blocks that these may have selected.
//
// The queries of each block are cut into works, of one CTA each, the longest of all first. Of a query lists hold its row in [N], or
// (PLACES) its entry: its number from the first query of the index on, times n, plus the block's place in its own list.
// Grid: as each kernel says. Shared memory: sums of 32 warps.
// Roofline: n entries a query and KV head, read four times by threads that read what comes before them in the list too (out of
// the first cache), and written once; 4 bytes each.
// Edges: lists end at their first -1, where they no longer ascend, and at what is no candidate: no block is there twice.
//
// budget: kernel=slc_count threads=256 registers=40 spills=0 shared=0
// budget: kernel=slc_sum_parts threads=1024 registers=64 spills=0 shared=4096
// budget: kernel=slc_sum_blocks threads=1024 registers=64 spills=0 shared=512
// budget: kernel=slc_scatter threads=256 registers=40 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "inverse.cuh"

// counts [parts, KV_HEADS blocks], zero before. A thread an entry of the lists.
extern "C" __global__ void __launch_bounds__(256) slc_count(const __grid_constant__ SlcIndexParams p) {
    const i64 entry = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const int query = int(entry / (KV_HEADS * SELECT_COUNT)), rest = int(entry % (KV_HEADS * SELECT_COUNT));
    if (query >= p.tokens) return;
    const int block = block_of(p, rest / SELECT_COUNT, query * SELECT_COUNT + rest % SELECT_COUNT);
    if (block >= 0) atomicAdd(p.counts + i64(query / p.part_tokens) * KV_HEADS * p.blocks + block, 1);
}

// Per block the sum over its parts, and in each part's place the sum before it. A CTA 32 blocks, whose counts lie side by side, a
// warp some of their parts in a row; loads of several are under way together. Leaves empty masks for slc_scatter.
extern "C" __global__ void __launch_bounds__(1024) slc_sum_parts(const __grid_constant__ SlcIndexParams p) {
    constexpr int TURN = 8;
    __shared__ int sums[32][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, all = KV_HEADS * p.blocks, block = blockIdx.x * 32 + lane;
    const int own = ceil_div(p.parts, 32), end = own * (warp + 1) < p.parts ? own * (warp + 1) : p.parts;
    const bool there = block < all;
    int sum = 0;
#pragma unroll 8
    for (int part = own * warp; part < end; ++part) sum += there ? p.counts[i64(part) * all + block] : 0;
    sums[warp][lane] = sum;
    __syncthreads();
    if (!there) return;
    int before = 0;
    for (int other = 0; other < warp; ++other) before += sums[other][lane];
    if (warp == 31) p.totals[block] = before + sum;
    for (int first = own * warp; first < end; first += TURN) {
        int counts[TURN];
#pragma unroll
        for (int i = 0; i < TURN; ++i) counts[i] = first + i < end ? p.counts[i64(first + i) * all + block] : 0;
#pragma unroll
        for (int i = 0; i < TURN; ++i) {
            if (first + i >= end) continue;
            p.counts[i64(first + i) * all + block] = before;
            p.masks[i64(first + i) * all + block] = 0;
            before += counts[i];
        }
    }
}

// What is summed over blocks: queries, the works that they are cut into, and those of them that are whole.
struct Sums {
    int queries, works, whole;

    __device__ __forceinline__ Sums plus(const Sums& o) const { return {queries + o.queries, works + o.works, whole + o.whole}; }
    __device__ __forceinline__ Sums minus(const Sums& o) const { return {queries - o.queries, works - o.works, whole - o.whole}; }
    __device__ __forceinline__ Sums of_lane(int lane) const {
        const auto of = [&](int sum) { return __shfl_sync(ALL_LANES, sum, lane); };
        return {of(queries), of(works), of(whole)};
    }
    // Of each lane, the sums up to its own.
    __device__ __forceinline__ Sums to_lane() const {
        Sums sum = *this;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const auto of = [&](int sum) { return __shfl_up_sync(ALL_LANES, sum, step); };
            const Sums other = {of(sum.queries), of(sum.works), of(sum.whole)};
            if (int(threadIdx.x % 32) >= step) sum = sum.plus(other);
        }
        return sum;
    }
};

// Whole works of a block with so many queries, and queries of its last one, if that is none of them.
__device__ __forceinline__ int whole_works(const SlcIndexParams& p, int total) { return total / p.work_queries; }
__device__ __forceinline__ int last_queries(const SlcIndexParams& p, int total) { return total % p.work_queries; }
// How many last works it has: one or none.
__device__ __forceinline__ int last_works(const SlcIndexParams& p, int total) {
    return total == 0 ? p.least_works : last_queries(p, total) != 0;
}

// Lengths that last works are told apart by.
constexpr int LENGTHS = 32;

// Which of them so many queries are, the longest first.
__device__ __forceinline__ int length_of(const SlcIndexParams& p, int queries) {
    return int(i64(p.work_queries - queries) * (LENGTHS - 1) / p.work_queries);
}

// Sums over the blocks before each, and the order of works: CTAs begin in it, so that the longest come first, and what a device
// has left to do at the end is short. Whole works are first, block by block; then the last ones by their lengths, of one length in
// any order, which changes no sum. One CTA.
extern "C" __global__ void __launch_bounds__(1024) slc_sum_blocks(const __grid_constant__ SlcIndexParams p) {
    __shared__ Sums sums[32];
    __shared__ int of_length[LENGTHS];
    const int thread = threadIdx.x, lane = thread % 32, all = KV_HEADS * p.blocks;
    if (thread < LENGTHS) of_length[thread] = 0;
    Sums before = {0, 0, 0};
    for (int first = 0; first < all; first += 1024) {
        const int block = first + thread, total = block < all ? p.totals[block] : 0;
        const int whole = whole_works(p, total), last = block < all ? last_works(p, total) : 0;
        const Sums own = {total, whole + last, whole}, sum = own.to_lane();
        if (lane == 31) sums[thread / 32] = sum;
        __syncthreads();
        const Sums chunk = sums[lane].to_lane();
        const Sums warps = chunk.of_lane((thread / 32 - 1) & 31);
        const Sums start = (thread < 32 ? before : before.plus(warps)).plus(sum.minus(own));
        before = before.plus(chunk.of_lane(31));
        __syncthreads();
        if (block < all) {
            p.starts[block] = start.queries;
            p.work_starts[block] = start.works;
            for (int i = 0; i < whole; ++i) works_of(p)[start.whole + i] = make_int2(block, i);
            if (last != 0) atomicAdd(of_length + length_of(p, last_queries(p, total)), 1);
        }
    }
    if (thread == 0) p.work_starts[all] = before.works;
    __syncthreads();
    const Sums lengths = Sums{0, of_length[lane], 0};
    const int start = before.whole + lengths.to_lane().works - lengths.works;
    __syncthreads();
    if (thread < LENGTHS) of_length[thread] = start;
    __syncthreads();
    for (int block = thread; block < all; block += 1024) {
        const int total = p.totals[block];
        if (last_works(p, total) == 0) continue;
        const int place = atomicAdd(of_length + length_of(p, last_queries(p, total)), 1);
        works_of(p)[place] = make_int2(block, whole_works(p, total));
    }
}

// Queries that a mask has bits for.
constexpr int MASK_TOKENS = 32;

// Calls act(block, place among the queries from `first` on, entry) for all blocks that these queries, before `end`, have selected.
template <class Act>
__device__ __forceinline__ void each_selected(const SlcIndexParams& p, int head, int first, int end, const Act& act) {
    for (int i = threadIdx.x; i < MASK_TOKENS * SELECT_COUNT; i += blockDim.x) {
        const int at = i / SELECT_COUNT, entry = first * SELECT_COUNT + i;
        const int block = first + at < end ? block_of(p, head, entry) : -1;
        if (block >= 0) act(block, at, entry);
    }
}

// Writes the queries to their places. A CTA a part and KV head, MASK_TOKENS queries at a time: each block has a mask of those that
// have selected it, which says how many of them come before one.
extern "C" __global__ void __launch_bounds__(256) slc_scatter(const __grid_constant__ SlcIndexParams p) {
    const int part = blockIdx.x, head = blockIdx.y;
    int* const counts = p.counts + i64(part) * KV_HEADS * p.blocks;
    u32* const masks = p.masks + i64(part) * KV_HEADS * p.blocks;
    const int end = (part + 1) * p.part_tokens < p.tokens ? (part + 1) * p.part_tokens : p.tokens;
    for (int first = part * p.part_tokens;; first += MASK_TOKENS) {
        each_selected(p, head, first, end, [&](int block, int at, int) { atomicOr(masks + block, 1u << at); });
        __syncthreads();
        each_selected(p, head, first, end, [&](int block, int at, int entry) {
            const int before = __popc(__ldcg(masks + block) & ((1u << at) - 1));
            p.lists[p.starts[block] + counts[block] + before] = PLACES ? entry : p.first_token + entry / SELECT_COUNT;
        });
        if (first + MASK_TOKENS >= end) return;
        __syncthreads();
        // One of a block's queries, whichever comes first, counts them all.
        each_selected(p, head, first, end, [&](int block, int, int) {
            const u32 mask = atomicExch(masks + block, 0);
            if (mask != 0) counts[block] += __popc(mask);
        });
        __syncthreads();
    }
}

