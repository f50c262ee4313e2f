// The inverse of the lists of selected blocks (inverse.cuh): a counting sort of parts of the queries (count, sum over parts, sum
// over blocks, scatter), O(N n) memory and no atomics but on counts and masks, where their order changes nothing. Of all queries,
// or of a run of them with the blocks that these may have selected.
//
// The queries of each block are cut into works, of one CTA each. Of a query lists hold its row in [N], or (PLACES) its entry: its
// number from the first query of the index on, times n, plus the block's place in its own list.
// Grid: as each kernel says. Shared memory: sums of 32 warps.
// Roofline: n entries a query and KV head, read four times by threads that read what comes before them in the list too (out of
// the first cache), and written once; 4 bytes each.
// Edges: lists end at their first -1, where they no longer ascend, and at what is no candidate: no block is there twice.
//
// budget: kernel=slc_count threads=256 registers=40 spills=0 shared=0
// budget: kernel=slc_sum_parts threads=1024 registers=64 spills=0 shared=4096
// budget: kernel=slc_sum_blocks threads=1024 registers=64 spills=0 shared=256
// budget: kernel=slc_sum_blocks arch=sm_90a threads=1024 registers=64 spills=0 shared=1024
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

// Of each lane, the sums up to its own.
__device__ __forceinline__ int2 sum_to(int2 sum) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int x = __shfl_up_sync(ALL_LANES, sum.x, step), y = __shfl_up_sync(ALL_LANES, sum.y, step);
        if (int(threadIdx.x % 32) >= step) sum.x += x, sum.y += y;
    }
    return sum;
}

// Sums over the blocks before each: of queries, and of the works that its queries are cut into. One CTA.
extern "C" __global__ void __launch_bounds__(1024) slc_sum_blocks(const __grid_constant__ SlcIndexParams p) {
    __shared__ int2 sums[32];
    const int thread = threadIdx.x, lane = thread % 32, all = KV_HEADS * p.blocks;
    int2 before = make_int2(0, 0);
    for (int first = 0; first < all; first += 1024) {
        const int block = first + thread, total = block < all ? p.totals[block] : 0;
        const int cut = ceil_div(total, p.work_queries), works = block < all ? (cut > p.least_works ? cut : p.least_works) : 0;
        const int2 sum = sum_to(make_int2(total, works));
        if (lane == 31) sums[thread / 32] = sum;
        __syncthreads();
        const int2 chunk = sum_to(sums[lane]);
        const int last = thread / 32 - 1;
        const int2 mine = make_int2(__shfl_sync(ALL_LANES, chunk.x, last & 31), __shfl_sync(ALL_LANES, chunk.y, last & 31));
        const int2 start = make_int2(before.x + (last < 0 ? 0 : mine.x), before.y + (last < 0 ? 0 : mine.y));
        before.x += __shfl_sync(ALL_LANES, chunk.x, 31), before.y += __shfl_sync(ALL_LANES, chunk.y, 31);
        __syncthreads();
        if (block < all) {
            p.starts[block] = start.x + sum.x - total;
            const int first_work = start.y + sum.y - works;
            p.work_starts[block] = first_work;
            for (int i = 0; i < works; ++i) p.works[first_work + i] = block;
        }
    }
    if (thread == 0) p.work_starts[all] = before.y;
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

