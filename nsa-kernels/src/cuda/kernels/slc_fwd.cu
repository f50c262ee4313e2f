// Attention over selected blocks (SPEC 2.2).
//
// A warp works alone (or four together, see below): the R heads of a query are its 16 rows, or QUERIES queries with R heads each: it
// then walks over the union of their blocks, and masks rows that have not selected one. Blocks come in steps of KEYS tokens
// through STAGES stages of the warp's own shared memory; no barrier between warps. Where warps of a CTA have blocks in common, they
// walk jointly: each block is copied once, whole, by all of them, and met by those that have selected it, with a barrier a block. A
// CTA chooses that itself, by its lists (select.cuh); either way a warp meets the same blocks in the same order.
//
// Grid: x: WARPS tiles of queries, y: KV heads; neighbouring queries share blocks.
// Shared memory, bytes at D = 128 in bf16, a warp: 2 stages x 16 x 512 (queries come and outputs go through them), the lists 128;
// four warps 66,048. The stages of four are two of 64 tokens, where warps walk jointly.
// Registers: o 64, queries 32, scores 8, addresses of a lane's chunks 16.
// Roofline, a query and KV head: 4 R D n l' FLOP, 2 (Dk + Dv) n l' bytes of k and v from the L2 cache, if no block is shared: R FLOP a
// byte. Bound by the cache then: 16 FLOP a byte where an A100 computes 58 in that time. From memory q, o, k, v once.
// Counted at R = 16, D = 128, T = 2,048: 1.01 of these FLOP (the step that holds the query's own token), bytes from memory 1.00
// of the least, no bank conflict. At R = 4 with lists drawn at random: 4.04 of these FLOP with a query a warp, 2.43 with two, 1.34
// with four that walk over the union, and bytes from the L2 cache 147, 89 and 49 times q, o, k and v: the union is never longer
// than the lists, so that as many queries as fit share a warp. Further apart than their lists' length neighbours' random
// blocks do not meet (55 blocks of four lists at 65,536 tokens); those of a model do. Small groups in long sequences go the other
// way round (slc_turned.cu). Walking jointly at R = 16, bytes asked of the L2 cache by lists at random, and by queries that resemble the
// one before (correlation 0.7): at T = 2,048 279 and 258 MB where warps alone ask for 806; at 8,192 2,455 and 1,831 of 3,990.
// Measured on an H100 at R = 16, D = 128, T = 16,384, lists drawn at random: 1.07 ms with copies that pass the first cache by,
// 0.87 ms with ones that stay there: the forced blocks, 3 of 16, are the same ones for all queries of a CTA. Either way the
// second cache is what it waits for (83 % of its rate). On sm_90a the 64 rows of four warps may be queries that walk over the union
// of their blocks together, each of which is read once: where sequences are short enough for such lists to have blocks in common
// (SelectTiles::new has the figures). There hardware copies their steps, of packed
// keys (bulk.cuh).
// Order of summation: flash.cuh, blocks in order.
// Edges: a list ends at its first -1, and at a block that is no candidate; a query without blocks: o = 0, lse = -infinity. A NaN in v
// reaches queries that do not see it but meet its row in a product, as in band_fwd.cuh: those of the same warp, and where warps walk
// jointly those of the same CTA, which are a few tokens earlier in the same sequence.
//
// budget: kernel=slc_forward threads=128 registers=200 spills=0 shared=66048
// budget: kernel=slc_forward arch=sm_90a threads=128 registers=200 spills=0 shared=82192
// Neighbouring queries, whose warps run side by side, have blocks in common.
#define COPY_CACHE "ca"
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "flash.cuh"
#include "select.cuh"

constexpr int HEAD_BYTES = ROWS * (Keys::PITCH > Values::PITCH ? Keys::PITCH : Values::PITCH);
// Queries that are held in registers come through the stages, and outputs leave through them.
constexpr bool HELD = QUERIES_HELD && TENSOR_CORES && HEAD_BYTES <= STAGES * STAGE_BYTES;
using Memory = SelectMemory<HELD ? 0 : HEAD_BYTES>;

extern __shared__ __align__(TILE_ALIGNMENT) char shared[];

// The warp's first row of its tile.
__device__ __forceinline__ int first_row() { return int(threadIdx.x % TILE_THREADS / 32 * 16); }

// Scores of keys that a row's query has not selected, or does not see; `first` is the list of the tile's first query.
template <class AnyBlocks>
__device__ __forceinline__ void mask(Scores<1, KEYS>& s, const AnyBlocks& blocks, int first, int step, const SelectTile& tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int query = tile.query_of(first_row() + h * 8 + lane / 4);
        const int end = (query < QUERIES ? blocks.count_of(first + query) : 0) - step * KEYS - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                if (n * 8 + c >= end) s[0][n][2 * h + c] = negative_infinity();
            }
        }
    }
}

// Whether one of the warp's queries has selected the block: others of its tile may have.
template <class AnyBlocks>
__device__ __forceinline__ bool sees(const AnyBlocks& blocks, const SelectTile& tile) {
    if constexpr (!WARPGROUPS) return true;
    const int first = tile.query_of(first_row()), last = tile.query_of(first_row() + 15);
    return uniform((blocks.selected >> first & ((2u << (last - first)) - 1)) != 0);
}

__device__ __forceinline__ void write_rows(const BandForwardParams& p, const SelectTile& tile, const Flash<1, KEYS>& flash, char* own) {
    const int lane = threadIdx.x % 32, base = first_row(), rows = tile.queries * tile.heads - base;
    const float unscale[2] = {p.unscale_high, p.unscale_low};
    own += base * Values::PITCH;
    flash.put(own);
    __syncwarp();
    if (lane % 4 == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = base + h * 8 + lane / 4;
            if (tile.has(row)) p.lse[tile.place(row)] = flash.lse(0, h, unscale);
        }
    }
    if constexpr (QUERIES == 1) {
        store_even_rows<HEAD_DIM_V, 16, 32, V_COPY_BYTES>(own, lane, rows, p.o + tile.place(base) * HEAD_DIM_V);
    } else {
        store_rows<HEAD_DIM_V, 32, V_COPY_BYTES>(own, lane, rows < 16 ? rows : 16,
                                                 [&](int row) { return p.o + tile.place(base + row) * HEAD_DIM_V; });
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) slc_forward(const __grid_constant__ SlcForwardParams params) {
    const BandForwardParams& p = params.common;
    const SelectTile tile(p.sequences, p.num_sequences, p.tiles);
    if (!JOINT && tile.queries == 0) return;
    const Memory memory(shared);
    char* const own = memory.stages();
    const Arrivals arrivals = memory.arrivals();
    if constexpr (BULK) arrivals.init();
    tile.load_rows_of<SharedTile<HEAD_DIM_QK, ROWS>, QK_COPY_BYTES>(p.q, shared_address(memory.rows()));
    copy_commit();
    tile.load_lists(memory.lists(memory.tile), params.block_indices);
    wait_for_stage();
    // Read by warps alone.
    Queries<1, HELD> q(memory.rows());
    q.take();
    __syncwarp();

    Flash<1, KEYS> flash;
    // Of steps in stages from `stages` on, for queries whose lists are those from `first` on.
    const auto meet_in = [&](const char* stages, int first) {
        const auto keys = Right<HEAD_DIM_QK, false>(stages).pinned();
        const auto values = Right<HEAD_DIM_V, true>(stages + KEYS * Keys::PITCH).pinned();
        return [&, keys, values, stages, first](const auto& blocks, auto step, u32 behind, bool whole) {
            constexpr int I = step.value;
            Scores<1, KEYS> s;
            if constexpr (WARPGROUPS) {
                dots_together<HEAD_DIM_QK, ROWS, KEYS, 1>(s, memory.rows(), 0, stages + I * STAGE_BYTES + behind);
            } else {
                flash.multiply_keys(s, q, keys.template further<I * STAGE_BYTES>(behind));
            }
            if (sees(blocks, tile)) {
                if (!whole) mask(s, blocks, first, I, tile);
                float factor[1][2];
                flash.template exponentials<true>(s, p.scale_log2, factor);
            } else {
                clear<1, KEYS>(s);
            }
            begin_rows_of(flash.o, s, values.template further<I * STAGE_BYTES>(behind));
            end_products<0>(flash.o);
        };
    };
    const auto copies_to = [&](char* stages, auto threads) {
        constexpr int THREADS = threads.value;
        if constexpr (BULK) {
            return StepBoxes<BandForwardParams>(p, stages, tile.head, tile.sequence.key, arrivals);
        } else {
            return StepCopies<SharedTile<HEAD_DIM_QK, KEYS>, SharedTile<HEAD_DIM_V, KEYS>, THREADS>(
                shared_address(stages), int(threadIdx.x % THREADS), tile.sequence, tile.head, p.k, p.k_pages, p.v, p.v_pages);
        }
    };
    walk_tiles(memory, tile, copies_to, meet_in);
    if (tile.queries == 0) return;
    flash.finish();
    write_rows(p, tile, flash, own);
}
