// Attention over compressed blocks, the importance of selection blocks, and the choice of n of them (SPEC 2.1, 2.2).
//
// o and lse as in band_fwd.cuh, keys being compressed blocks. The importance of a block is the sum over the R heads of
// p = 2^(s - m) / l, whose m and l are known at the end only. Where a warp alone multiplies, scores are not computed twice: each
// row's p is summed to selection blocks in registers (weights 1 2 2 2 1 at 32/16/64; a fourth of the scores), relative to the m of
// its tile of keys, and kept with that m; at the end a warp a query sums the heads with their factors. On sm_90a, whose tensor
// cores have time for it, scores are computed a second time (TWICE): p is then final, and is summed to blocks and over the
// heads before one number a query and block is kept. Either way a warp a query takes the n best online.
//
// Grid: a CTA a tile of ROWS / R queries and KV head, the last tiles first; where scores are kept in the workspace, as many
// CTAs as run at once, each of which takes every so manyth tile.
// Shared memory, bytes at D = 128 in bf16: as band_fwd.cuh, m and 1 / l of each row, 8 x 128, the tile in turn, 16; then, if two
// CTAs still fit, the kept scores: 4 x 128 x 9 a tile of 32 compressed keys (TWICE: 4 x 8 x 16 a tile of 64). On sm_90a as there.
// Registers: as band_fwd.cuh, and the last p of each row, which counts for the next tile's first block. On sm_90a o, scores and
// what is kept of them take 160: one CTA of 12 warps; TWICE they leave o behind before they sum: two CTAs of 8. On sm_100 eleven
// registers more than there are, which are kept in memory from one tile of keys to the next.
// Roofline, a KV head: 2 R (Dk + Dv) FLOP a query and visible block (T / 2d of them at the end of T tokens on average);
// keeping scores instead of a second product with k saves a third of that (2 R Dk more), and costs 9/8 numbers of 4 bytes each way
// a row and selection block, from the L2 cache as long as it holds them: at T = 65,536 4.6 GB that go to memory and come back.
// Counted at R = 16, D = 128: 1.53 of these FLOP at T = 1,024, 1.26 at 2,048 (62 and 126 blocks in tiles of 32; the excess
// is half a tile a query), bytes from memory 1.00 of the least; 1.02 of the passes over shared memory without conflicts.
// Order of summation: flash.cuh for o; importance: within a row strides of a block from left to right by lanes of the quad,
// heads first + 4 i in order, then the tree over first; TWICE: rows 8 apart, then a tree over the rest. Kept numbers do not depend
// on the number of CTAs.
// Selection: exact on these f32 sums: higher first, of equal ones the lower block, NaN as 0; forced blocks first. Equal keys
// have equal p, where p is kept as long as m has not followed a greater score between them.
// Edges: rows without a visible block: o = 0, lse = -infinity; queries with at most n candidates take them all, unscored.
// Tried: p kept a compressed block (4 times the memory), which is what is done where blocks do not fold (strides of other shapes).
//
// budget: kernel=cmp_forward threads=128 registers=255 spills=0 shared=66576
// budget: kernel=cmp_forward arch=sm_90a threads=256 registers=128 spills=0 shared=99360
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "band.cuh"

constexpr int CHUNKS = SELECT_BLOCK / COMPRESS_STRIDE;
constexpr int SPAN = COMPRESS_BLOCK / COMPRESS_STRIDE;
// Where selection blocks are 2, 4 or 8 strides and compression blocks overlap at most by half, p is summed to selection
// blocks in registers before it is kept; else it is kept as it is.
constexpr bool FOLDED = (CHUNKS == 2 || CHUNKS == 4 || CHUNKS == 8) && SPAN <= 2 && KEYS / 8 % (CHUNKS / 2) == 0;
constexpr int COLUMNS = FOLDED ? KEYS / CHUNKS : KEYS;
// Lanes of a quad that have the same folded sums, and sums of a row that each of them keeps.
constexpr int SHARING = FOLDED ? CHUNKS / 2 : 1;
constexpr int OWN = FOLDED ? KEYS / 8 / SHARING : 1;
constexpr int BLOCKS_OF_PART = FOLDED ? 8 / CHUNKS : 1;
// A compression block counts for the selection block behind it too, which may lie in the next tile.
constexpr int EXTRA = FOLDED ? SPAN - 1 : 0;
// Where p is computed a second time: warps that share the heads of a query, each of which sums its own.
constexpr int SHARERS = ceil_div(GROUP, 16);
// What is kept of a tile of keys: [ROWS, COLUMNS], and m, [ROWS]; or sums over heads, [QUERIES, SHARERS, COLUMNS].
constexpr int KEPT = TWICE ? QUERIES * SHARERS * COLUMNS : ROWS * (COLUMNS + 1);
// Where a row keeps p of a key, as it is: the pairs that lanes write at once shall meet all banks of shared memory.
__device__ __forceinline__ int banked(int row, int column) { return FOLDED ? column : column ^ row % (KEYS / 8) * 8; }
// As many blocks share a multiprocessor: one sums or selects while the other multiplies.
constexpr int LEAST_BLOCKS = TWICE && Keys::PADDED <= 128 && Values::PADDED <= 128 ? 2 : 1;
// Outputs leave before scores are computed again, for which the queries stay.
constexpr int OUTPUTS = TWICE ? ROWS_BYTES : 0;
static_assert(!TWICE || ROWS * Values::PITCH <= 2 * STAGE_BYTES, "outputs go through the stages");
static_assert(!TWICE || (FOLDED && TILES == 1 && (16 % GROUP == 0 || GROUP % 16 == 0)), "the heads of a query in a warp");
// Tiles whose scores are summed over heads at once.
constexpr int AT_ONCE = 4;
constexpr int FREE = SELECT_COUNT - SELECT_INITIAL - SELECT_LOCAL;
static_assert(COLUMNS <= 32, "a warp sums the columns of a tile");

// Where a block keeps scores: in its shared memory, or in a slot of its own in the workspace.
__device__ __forceinline__ float* factors_of_rows() {
    return reinterpret_cast<float*>(shared + ROWS_BYTES + 2 * STAGE_BYTES + ARRIVALS_BYTES);
}
// The block's tile in turn lies in shared memory too, for want of registers.
__device__ __forceinline__ u32* work_in_turn() { return reinterpret_cast<u32*>(factors_of_rows() + 2 * ROWS); }
__device__ __forceinline__ float* kept_scores(const CmpForwardParams& p) {
    return p.in_shared != 0 ? factors_of_rows() + 2 * ROWS + 4 : p.scores + blockIdx.x * p.slot_floats;
}

// Sums p of the keys before and of the tile to selection blocks and keeps them.
struct Keep {
    const CmpForwardParams& params;
    bool wanted;
    float carry[TILES][2];  // p of the last key of the tile before, in the quad's last lane

    __device__ __forceinline__ Keep(const CmpForwardParams& p, bool scores) : params(p), wanted(scores) {
#pragma unroll
        for (int i = 0; i < TILES; ++i) carry[i][0] = carry[i][1] = 0.0f;
    }
    __device__ __forceinline__ void operator()(const BandFlash& flash, const BandScores& p, int index, bool rescaled,
                                               const float (&factor)[TILES][2]) {
        if (!wanted) return;
        const int thread = anew(int(threadIdx.x)), lane = thread % 32;
        float* const tile = kept_scores(params) + i64(index) * KEPT;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = thread / 32 * WARP_ROWS + i * 16 + h * 8 + lane / 4;
                if (lane % 4 == 0) tile[ROWS * COLUMNS + row] = flash.m[i][h];
                float* const to = tile + row * COLUMNS;
                if constexpr (FOLDED) {
                    if (rescaled) carry[i][h] *= factor[i][h];
                    float own[OWN];
                    fold(own, p[i], h, carry[i][h]);
                    put(to, own);
                    carry[i][h] = p[i][KEYS / 8 - 1][2 * h + 1];
                } else {
#pragma unroll
                    for (int n = 0; n < KEYS / 8; ++n) {
                        *reinterpret_cast<float2*>(to + banked(row, n * 8) + lane % 4 * 2) = make_float2(p[i][n][2 * h], p[i][n][2 * h + 1]);
                    }
                }
            }
        }
    }

    // One row's sums, in the order that `slot` undoes: lanes that have the same sums share them.
    static __device__ __forceinline__ void fold(float (&own)[OWN], const float (&p)[KEYS / 8][4], int h, float before) {
        const int lane = threadIdx.x % 4;
        float sums[KEYS / 8];
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
            const float even = p[n][2 * h], odd = p[n][2 * h + 1];
            sums[n] = even + odd;
            if constexpr (SPAN == 2) {
                // The key before a lane's first is its neighbour's last: of this part, or of the one before.
                const float last = n == 0 ? before : p[n == 0 ? 0 : n - 1][2 * h + 1];
                const float left = __shfl_sync(ALL_LANES, lane == 3 ? last : odd, (threadIdx.x & 28) + (lane + 3) % 4);
                sums[n] += left + even;
            }
#pragma unroll
            for (int step = 1; step < SHARING; step *= 2) sums[n] += __shfl_xor_sync(ALL_LANES, sums[n], step);
        }
#pragma unroll
        for (int x = 0; x < OWN; ++x) {
            own[x] = sums[x];
#pragma unroll
            for (int other = 1; other < SHARING; ++other) {
                const float mine = own[x], theirs = sums[other * OWN + x];
                own[x] = lane % SHARING == other ? theirs : mine;
            }
        }
    }
    static __device__ __forceinline__ void put(float* to, const float (&own)[OWN]) {
        const int lane = threadIdx.x % 4;
        if constexpr (OWN == 4) {
            *reinterpret_cast<float4*>(to + lane * 4) = make_float4(own[0], own[1], own[2], own[3]);
        } else if constexpr (OWN == 2) {
            *reinterpret_cast<float2*>(to + lane * 2) = make_float2(own[0], own[1]);
        } else {
#pragma unroll
            for (int x = 0; x < OWN; ++x) to[lane * OWN + x] = own[x];
        }
    }
    // Where `fold` puts a tile's selection block.
    static __device__ __forceinline__ int slot(int block) {
        const int part = block / BLOCKS_OF_PART, lane = block % BLOCKS_OF_PART * SHARING + part / OWN;
        return lane * OWN + part % OWN;
    }
};

// The importance a second time over the keys: p of a warp's rows, whose m and l are known, is summed to selection blocks and over
// the heads, and kept.
__device__ __forceinline__ void sum_again(const CmpForwardParams& p, const BandTile& tile, BandFlash& flash, Arrivals& arrivals) {
    const Visible span(tile.sequence);
    const WarpSpan<Visible> warp(tile, span);
    const Queries<TILES, HELD> q(shared);
    float carry[2] = {};
    const BandLane place;
    const auto see = [&](int key, int index, const char* stage) {
        BandScores s;
        score_keys(s, flash, q, tile, warp, span, key, stage, place);
        const int lane = anew(int(threadIdx.x % 32));
        float own[2][OWN];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float base = flash.l[0][h] == 0.0f ? 0.0f : flash.m[0][h], inverse = flash.inverse(0, h);
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int c = 2 * h; c < 2 * h + 2; ++c) s[0][n][c] = exp2_approx(fmaf(s[0][n][c], p.common.scale_log2, -base));
            }
            Keep::fold(own[h], s[0], h, carry[h]);
            carry[h] = s[0][KEYS / 8 - 1][2 * h + 1];
#pragma unroll
            for (int x = 0; x < OWN; ++x) own[h][x] *= inverse;
        }
        // Rows 8 apart, then those of the lanes: in the order of a tree.
        constexpr int HALVES = GROUP < 16 ? 2 : 1, ROWS_OF_HALF = GROUP < 8 ? GROUP : 8;
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
#pragma unroll
            for (int x = 0; x < OWN; ++x) {
                if (HALVES == 1) own[h][x] += own[1][x];
#pragma unroll
                for (int step = 4; step < 4 * ROWS_OF_HALF; step *= 2) own[h][x] += __shfl_xor_sync(ALL_LANES, own[h][x], step);
            }
            const int row = warp.base + h * 8 + lane / 4;
            // The last rows may be no query's.
            if (lane / 4 % ROWS_OF_HALF == 0 && row < QUERIES * GROUP) {
                Keep::put(kept_scores(p) + i64(index) * KEPT + (GROUP < 16 ? row / GROUP : row / 16) * COLUMNS, own[h]);
            }
        }
    };
    walk_keys<EXTRA, false>(p.common, tile, span, warp, shared + ROWS_BYTES, arrivals, [] {}, see);
    // All have read the queries.
    __syncthreads();
}

// Scores of a query's candidates, from what is kept of its rows.
struct Importance {
    float* rows;  // of the query's first row
    int first;    // that row
    int visible;
    int tiles;

    // Sums the heads: P, or S if folded, is then in the place of the first head. factors: [ROWS, 2], m and 1 / l at the end.
    __device__ __forceinline__ void sum_heads(const float* maxima, const float* factors) const {
        constexpr int APART = 32 / COLUMNS;
        const int lane = anew(int(threadIdx.x % 32)), column = lane % COLUMNS, begin = lane / COLUMNS;
        // Several tiles at once: what is kept in the workspace takes its time to come.
        for (int tile = 0; tile < tiles; tile += AT_ONCE) {
            float sums[AT_ONCE] = {};
#pragma unroll 4
            for (int r = begin; r < GROUP; r += APART) {
                const float m_at_end = factors[2 * r], inverse = factors[2 * r + 1];
#pragma unroll
                for (int x = 0; x < AT_ONCE; ++x) {
                    const i64 at = i64(tile + x < tiles ? tile + x : tile) * KEPT;
                    sums[x] += rows[at + r * COLUMNS + banked(first + r, column)] * (exp2_approx(maxima[at + r] - m_at_end) * inverse);
                }
            }
#pragma unroll
            for (int x = 0; x < AT_ONCE; ++x) {
#pragma unroll
                for (int step = COLUMNS; step < 32; step *= 2) sums[x] += __shfl_xor_sync(ALL_LANES, sums[x], step);
                if (begin == 0 && tile + x < tiles) rows[i64(tile + x) * KEPT + banked(first, column)] = sums[x];
            }
        }
        __syncwarp();
    }
    __device__ __forceinline__ float score(int block) const {
        float sum = 0.0f;
        if constexpr (FOLDED) {
            const int tile = block / COLUMNS;
            if (tile < tiles) {
                const float* const at = rows + i64(tile) * KEPT + Keep::slot(block % COLUMNS);
                sum = *at;
#pragma unroll
                for (int x = 1; x < (TWICE ? SHARERS : 1); ++x) sum += at[x * COLUMNS];
            }
        } else {
            for (int m = 0; m < CHUNKS; ++m) {
                for (int r = 0; r < SPAN; ++r) {
                    const int i = block * CHUNKS + m - r;
                    if (i >= 0 && i < visible) sum += rows[i64(i / KEYS) * KEPT + banked(first, i % KEYS)];
                }
            }
        }
        // NaN has no order.
        return sum > 0.0f ? sum : 0.0f;
    }
};

// The best blocks so far, unordered over a warp's lanes; as scores are not negative, their bits are in their order.
struct Best {
    static constexpr int SLOTS = FREE > 0 ? ceil_div(FREE, 32) : 1;
    static constexpr u32 NEVER = 0xffffffffu;
    u32 scores[SLOTS];
    int blocks[SLOTS];
    u32 worst;

    __device__ __forceinline__ Best(const Importance& importance) {
#pragma unroll
        for (int x = 0; x < SLOTS; ++x) {
            const int place = threadIdx.x % 32 + 32 * x;
            blocks[x] = place < FREE ? SELECT_INITIAL + place : -1;
            scores[x] = place < FREE ? __float_as_uint(importance.score(blocks[x])) : NEVER;
        }
        find_worst();
    }
    __device__ __forceinline__ void find_worst() {
        u32 least = scores[0];
#pragma unroll
        for (int x = 1; x < SLOTS; ++x) least = scores[x] < least ? scores[x] : least;
        worst = __reduce_min_sync(ALL_LANES, least);
    }
    // In the place of the worst one; of several, the last.
    __device__ __forceinline__ void insert(u32 score, int block) {
        int last = -1;
#pragma unroll
        for (int x = 0; x < SLOTS; ++x) last = scores[x] == worst && blocks[x] > last ? blocks[x] : last;
        last = __reduce_max_sync(ALL_LANES, last);
#pragma unroll
        for (int x = 0; x < SLOTS; ++x) {
            if (blocks[x] == last) {
                blocks[x] = block;
                scores[x] = score;
            }
        }
        find_worst();
    }
    // Blocks `from` to `end`, which come after all before: only a higher score puts one in.
    __device__ __forceinline__ void offer(const Importance& importance, int from, int end) {
        for (int base = from; base < end; base += 32) {
            const int block = base + threadIdx.x % 32;
            const u32 score = block < end ? __float_as_uint(importance.score(block)) : 0;
            u32 better = __ballot_sync(ALL_LANES, score > worst);
            while (better != 0) {
                const int lane = __ffs(better) - 1;
                better &= better - 1;
                const u32 next = __shfl_sync(ALL_LANES, score, lane);
                if (next > worst) insert(next, base + lane);
            }
        }
    }
    // Ascending.
    __device__ __forceinline__ void write(int* list) const {
        int rank[SLOTS] = {};
#pragma unroll 4
        for (int other = 0; other < FREE; ++other) {
            const int block = __shfl_sync(ALL_LANES, blocks[SLOTS == 1 ? 0 : other / 32], other % 32);
#pragma unroll
            for (int x = 0; x < SLOTS; ++x) rank[x] += block < blocks[x];
        }
#pragma unroll
        for (int x = 0; x < SLOTS; ++x) {
            if (blocks[x] >= 0) list[rank[x]] = blocks[x];
        }
    }
};

// Writes the list of one query; a warp's work.
__device__ __forceinline__ void select(const CmpForwardParams& p, const BandTile& tile, int query, float* kept, const float* factors) {
    const int row = query * GROUP, t = tile.position(row), candidates = t / SELECT_BLOCK + 1;
    const int lane = anew(int(threadIdx.x % 32));
    int* const list = p.block_indices + (tile.token(row) * KV_HEADS + tile.head) * SELECT_COUNT;
    if (candidates <= SELECT_COUNT) {
        for (int i = lane; i < SELECT_COUNT; i += 32) list[i] = i < candidates ? i : -1;
        return;
    }
    for (int i = lane; i < SELECT_INITIAL; i += 32) list[i] = i;
    for (int i = lane; i < SELECT_LOCAL; i += 32) list[SELECT_COUNT - SELECT_LOCAL + i] = candidates - SELECT_LOCAL + i;
    if constexpr (FREE > 0) {
        const int visible = Visible(tile.sequence).end(t);
        const int tiles = visible > 0 ? ceil_div(visible + EXTRA, KEYS) : 0;
        const Importance importance{kept + (TWICE ? query * SHARERS : row) * COLUMNS, row, visible, tiles};
        if constexpr (!TWICE) importance.sum_heads(kept + ROWS * COLUMNS + row, factors + 2 * row);
        Best best(importance);
        best.offer(importance, SELECT_INITIAL + FREE, candidates - SELECT_LOCAL);
        best.write(list + SELECT_INITIAL);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS) cmp_forward(const __grid_constant__ CmpForwardParams p) {
    Arrivals arrivals = begin_arrivals();
    for (u32 work = blockIdx.x; work < u32(p.common.tiles * KV_HEADS); work += gridDim.x) {
        if (threadIdx.x == 0) *work_in_turn() = work;
        BandTile tile(p.common, work);
        const bool selects = p.block_indices != nullptr;
        const bool scores = selects && FREE > 0 && tile.position(tile.rows - 1) / SELECT_BLOCK + 1 > SELECT_COUNT;
        Keep keep(p, scores && !TWICE);
        BandFlash flash;
        attend<TWICE ? 0 : EXTRA>(p.common, tile, Visible(tile.sequence), flash, arrivals, keep);
        work = *work_in_turn();
        tile = BandTile(p.common, work);
        const int thread = anew(int(threadIdx.x)), base = thread / 32 * WARP_ROWS, lane = thread % 32;
        if (!TWICE && lane % 4 == 0) {
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float* const to = factors_of_rows() + 2 * (base + i * 16 + h * 8 + lane / 4);
                    to[0] = flash.m[i][h];
                    to[1] = flash.inverse(i, h);
                }
            }
        }
        const int rows = tile.rows - base < WARP_ROWS ? tile.rows - base : WARP_ROWS;
        write_rows(p.common, tile, flash, base, rows, shared + OUTPUTS + base * Values::PITCH);
        // Bulk copies come to where outputs lay.
        if constexpr (TWICE && BULK) publish_to_products();
        __syncthreads();
        if constexpr (TWICE) {
            if (scores) sum_again(p, tile, flash, arrivals);
        }
        if (selects) {
            for (int query = thread / 32; query < tile.rows / GROUP; query += WARPS) {
                select(p, tile, query, kept_scores(p), factors_of_rows());
            }
        }
        __syncthreads();
        work = *work_in_turn();
        __syncthreads();
    }
}
