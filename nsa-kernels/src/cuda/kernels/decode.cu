// One decoding step for a batch of sequences, from their caches (SPEC 4): two launches.
//
// decode_scan: chunks of CHUNK compressed blocks, and chunks of the window, which waits for no selection. A chunk leaves a share:
//   for each query head m, l = sum of 2^(s - m) and o = sum of 2^(s - m) v. Of compressed blocks it also leaves p summed to
//   selection blocks, of each head, relative to m. The last of a sequence's and KV head's chunks makes the list of blocks.
// decode_attend: chunks of CHUNK tokens of the selected blocks, shares likewise. A branch's shares are joined,
//   o_c = sum_i w_i o_i with w_i = 2^(m_i - m) / sum_i 2^(m_i - m) l_i, rounded to Element, and added up with their gates: those
//   of compressed blocks and the window by all chunks, each some heads, while their own rows are on their way; those of selected
//   blocks by the last chunk.
//
// Grid: KV heads x parts of the group x chunks x sequences along x, the KV heads of one chunk beside each other: their rows lie
// side by side in memory. As many chunks as the longest context that the workspace holds; blocks beyond a sequence's own end
// at once, so that one graph serves all contexts. Shared memory and teams: step.cuh; scan also keeps the chunk's
// scores, ROWS x (CHUNK + 8) x 4. Two blocks fit on a multiprocessor; where each has one of its own, all rows of a chunk are
// under way at once.
// Latency: a step of one sequence is a chain of waits. Addresses of rows are looked up at once, beside the context's length; then
// rows; then shares, and one counter; then, by the last block alone, statistics, and what they weigh, loads of many heads or
// shares at once. Loops are unrolled where loads are to be under way together, and nowhere else: most instructions run
// once, and fetching them counts.
// Bytes, a sequence and KV head: (M + n l' + w) rows of k and v must be read, size (Dk + Dv) each. A chunk also reads q,
// R Dk size, and writes o, 4 R Dv, which is read once more: CHUNK is such that q and o are at most a tenth of the chunk's own
// rows (256 rows for R = 16 in bf16, 64 for R = 4), as far as scores of ROWS heads fit. FLOP: 2 x 16 PARTS (Dk + Dv) a row, in
// bf16 16 PARTS a byte, of 156 that an A100 has: bound by memory.
// Order of summation: a team's steps in order; teams; l of chunks by lanes, then the tree of lanes; o of chunks in order; chunks,
// then heads for the importance; branches: compressed blocks, window, selected blocks. It depends on the configuration
// and the sequence's own context alone. Which block comes last changes no sum.
// Edges: a context without a compressed block has one chunk without rows, m = -inf, l = 0, whose share counts nothing; a
// sequence of context 0 is none. Rows beyond the context are never read.
// Measured on the simulator, bf16, D = 128, one KV head, of the rows' bytes (touched: each sector once a launch; moved: sectors
// of all loads and stores; passes: over the banks of shared memory, of those without conflicts):
//   R = 16: 2k tokens touched 1.12, moved 1.23; 8k 1.12, 1.22; 16k 1.13, 1.23; 64k 1.14, 1.25; passes 1.01
//   R = 4:  2k 1.09, 1.19; 8k 1.10, 1.20; 16k 1.11, 1.20; 64k 1.12, 1.21; passes 1.01
// Tried: chunks of 128 rows for R = 16, touched 1.21 at 8k, and of 64, 1.40. Sums of p begun at the first of a selection
// block's compressed blocks in all lanes: 1.08 passes at 16k. A launch for the list alone: the last chunk makes it without.
//
// budget: kernel=decode_scan threads=256 registers=128 spills=0 shared=92160
// budget: kernel=decode_attend threads=256 registers=128 spills=0 shared=75776
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "decode_select.cuh"

// Scores of a row move by eight banks from one row to the next.
constexpr int SCORE_PITCH = CHUNK + 8;

__device__ __forceinline__ float* kept_scores() { return reinterpret_cast<float*>(shared + QUERY_BYTES + BODY_BYTES); }

// Makes p of a chunk's scores, relative to the block's m, and sums it to selection blocks.
__device__ __forceinline__ void fold(const DecodeParams& p, const Place& place, int blocks,
                                     const float (&teams)[TEAMS][ROWS][2]) {
    // Compressed blocks that share tokens with a selection block.
    constexpr int WIDTH = CHUNKS + SPAN - 1;
    const int first = place.split * CHUNK, count = blocks - first < CHUNK ? blocks - first : CHUNK;
    float* const scores = kept_scores();
    for (int row = threadIdx.x / 32; row < place.heads; row += THREADS / 32) {
        const float base = join_teams(teams, row).base;
#pragma unroll 8
        for (int x = threadIdx.x % 32; x < count; x += 32) {
            float& score = scores[row * SCORE_PITCH + x];
            score = exp2_approx(fmaf(score, p.scale_log2, -base));
        }
    }
    __syncthreads();
#pragma unroll 2
    for (int i = threadIdx.x; i < place.heads * COLUMNS; i += THREADS) {
        const int row = i / COLUMNS, column = i % COLUMNS;
        const int begin = (first_column(place.split) + column) * CHUNKS - (SPAN - 1) - first;
        float sum = 0.0f;
#pragma unroll (WIDTH <= 8 ? WIDTH : 4)
        for (int j = 0; j < WIDTH; ++j) {
            // Neighbours begin at other places, so that they meet other banks.
            const int turned = j + column % WIDTH, y = turned < WIDTH ? turned : turned - WIDTH, x = begin + y;
            // Chunks of d tokens that both have.
            const int before = y + 1 < WIDTH - y ? y + 1 : WIDTH - y, most = SPAN < CHUNKS ? SPAN : CHUNKS;
            const float covered = float(before < most ? before : most);
            if (x >= 0 && x < count) sum = fmaf(covered, scores[row * SCORE_PITCH + x], sum);
        }
        folded_of(p, place.group(), place.split, place.part * ROWS + row)[column] = sum;
    }
}

__device__ __forceinline__ void scan_blocks(const DecodeParams& p, const Place& place, float (&teams)[TEAMS][ROWS][2]) {
    __shared__ Runs<CMP_PAGE_ROWS> runs;
    const int begin = runs.begin(place.split * CHUNK);
    // As far as the table goes, without waiting for the context.
    for (int i = threadIdx.x; i < runs.COUNT; i += THREADS) {
        const int page = begin / CMP_PAGE_ROWS + i;
        const i64 at = i64(place.sequence) * p.cmp_pages + page;
        if (page < p.cmp_pages) runs.set(i, p.k_cmp_pages[at], p.v_cmp_pages[at], 0, place.head);
    }
    const int splits = num_cmp_splits(place.context);
    if (place.context == 0 || place.split >= splits) return;
    const int blocks = num_blocks(place.context), first = place.split * CHUNK;
    const int end = first + CHUNK < blocks ? first + CHUNK : blocks;
    const bool scored = selects_by_score(place.context);
    __syncthreads();
    const RunRows<HEAD_DIM_QK, CMP_PAGE_ROWS> k{runs.k, begin};
    const RunRows<HEAD_DIM_V, CMP_PAGE_ROWS> v{runs.v, begin};
    StepFlash flash;
    attend(p, place, flash, k, v, first, end, [] {}, [&](const StepScores& s, int x) {
        if (!scored) return;
        const int lane = threadIdx.x % 32;
        float* const to = kept_scores() + (warp_row() + lane / 4) * SCORE_PITCH + x - first + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                *reinterpret_cast<float2*>(to + h * 8 * SCORE_PITCH + n * 8) = make_float2(s[0][n][2 * h], s[0][n][2 * h + 1]);
            }
        }
    });
    write_share(p, place, place.split, flash, teams);
    if (scored) fold(p, place, blocks, teams);
    if (comes_last(p.arrived + place.group() * 2, splits * GROUP_PARTS)) select(p, place);
}

__device__ __forceinline__ void scan_window(const DecodeParams& p, const Place& place, int split,
                                            float (&teams)[TEAMS][ROWS][2]) {
    const int rows = num_window(place.context), first = split * CHUNK;
    if (first >= rows) return;
    const u64* const sequence = p.sequences + i64(place.sequence) * 3;
    const RingRows<HEAD_DIM_QK> k(sequence[1], place.head, place.context);
    const RingRows<HEAD_DIM_V> v(sequence[2], place.head, place.context);
    StepFlash flash;
    attend(p, place, flash, k, v, first, first + CHUNK < rows ? first + CHUNK : rows, [] {}, [](const StepScores&, int) {});
    write_share(p, place, p.cmp_splits + split, flash, teams);
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS) decode_scan(const __grid_constant__ DecodeParams p) {
    __shared__ __align__(8) float teams[TEAMS][ROWS][2];
    const Place place(p, p.cmp_splits + p.win_splits);
    if (place.split < p.cmp_splits) {
        scan_blocks(p, place, teams);
    } else {
        scan_window(p, place, place.split - p.cmp_splits, teams);
    }
}

// Query heads `first` + j `stride`, j < HEADS, of a group that a warp works on together, 32 / HEADS lanes each where they join
// statistics; all lanes have some columns of all heads.
template <int HEADS>
struct Heads {
    static constexpr int LANES = 32 / HEADS;
    // Shares under way together.
    static constexpr int SHARES = HEADS == 1 ? 8 : 4;
    int first;
    int stride;

    __device__ __forceinline__ bool there(int j) const { return first + j * stride < GROUP; }
    // One of the group's in any case.
    __device__ __forceinline__ int head(int j) const { return there(j) ? first + j * stride : GROUP - 1; }

    // Adds gate times the join of `count` shares from `split` on to sums: OUTPUT_VECTOR elements of each head from `column` on.
    __device__ __forceinline__ void add_branch(const DecodeParams& p, i64 group, int branch, int split, int count, int column,
                                               bool has_column, float (&sums)[HEADS][OUTPUT_VECTOR]) const {
        const Shares shares(p, group);
        const int lane = threadIdx.x % 32;
        const float* const statistics = shares.statistics(p, split, head(lane / LANES));
        const Joined all = join_shares<LANES>(statistics, count, GROUP * 2);
        const float inverse = all.inverse();
        float o[HEADS][OUTPUT_VECTOR] = {};
        for (int from = 0; from < count; from += LANES) {
            const int own = from + lane % LANES;
            const float weight = own < count ? all.weight(statistics[i64(own) * (GROUP * 2)]) * inverse : 0.0f;
            for (int i = from; i < from + LANES && i < count; i += SHARES) {
                float share[SHARES][HEADS][OUTPUT_VECTOR] = {};
#pragma unroll
                for (int x = 0; x < SHARES; ++x) {
#pragma unroll
                    for (int j = 0; j < HEADS; ++j) {
                        if (!has_column || i + x >= count) continue;
                        load<OUTPUT_VECTOR>(shares.o(p, split + i + x, head(j)) + column, share[x][j]);
                    }
                }
#pragma unroll
                for (int x = 0; x < SHARES; ++x) {
#pragma unroll
                    for (int j = 0; j < HEADS; ++j) {
                        const float w = __shfl_sync(ALL_LANES, weight, j * LANES + (i + x) % LANES);
#pragma unroll
                        for (int c = 0; c < OUTPUT_VECTOR; ++c) {
                            if (i + x < count) o[j][c] = fmaf(share[x][j][c], w, o[j][c]);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int j = 0; j < HEADS; ++j) {
            const float gate = to_float(p.gates[(group * GROUP + head(j)) * 3 + branch]);
#pragma unroll
            for (int c = 0; c < OUTPUT_VECTOR; ++c) sums[j][c] += gate * to_float(from_float<Element>(o[j][c]));
        }
    }
};

// Calls piece(column, whether there is one) for the columns of this lane; a warp's lanes do so equally often.
template <class Piece>
__device__ __forceinline__ void each_column(const Piece& piece) {
    for (int first = 0; first < HEAD_DIM_V; first += 32 * OUTPUT_VECTOR) {
        const int column = first + int(threadIdx.x % 32) * OUTPUT_VECTOR;
        piece(column, column < HEAD_DIM_V);
    }
}

// Adds up compressed blocks and window of this block's part of a group's query heads; the sum is in place of split 0's share.
__device__ __forceinline__ void merge_scanned(const DecodeParams& p, const Place& place, int splits) {
    const i64 group = place.group();
    const Shares shares(p, group);
    const int cmp = num_cmp_splits(place.context), win = splits_of(num_window(place.context));
    const int blocks = splits * GROUP_PARTS, block = place.split * GROUP_PARTS + place.part;
    for (int head = block + blocks * int(threadIdx.x / 32); head < GROUP; head += blocks * WARPS) {
        const Heads<1> heads{head, 0};
        each_column([&](int column, bool there) {
            float sum[1][OUTPUT_VECTOR] = {};
#pragma unroll 1
            for (int branch = 0; branch <= 2; branch += 2) {
                heads.add_branch(p, group, branch, branch == 0 ? 0 : p.cmp_splits, branch == 0 ? cmp : win, column, there, sum);
            }
            if (there) put(shares.o(p, 0, head) + column, sum[0]);
        });
    }
}

// Writes o of the sequence's query heads of a group, once compressed blocks and window have been merged.
__device__ __forceinline__ void merge(const DecodeParams& p, const Place& place, int splits) {
    constexpr int HEADS = 4;
    const i64 group = place.group();
    const Shares shares(p, group);
    for (int first = threadIdx.x / 32; first < GROUP; first += HEADS * WARPS) {
        const Heads<HEADS> heads{first, WARPS};
        each_column([&](int column, bool there) {
            float sums[HEADS][OUTPUT_VECTOR] = {};
#pragma unroll
            for (int j = 0; j < HEADS; ++j) {
                if (there) load<OUTPUT_VECTOR>(shares.o(p, 0, heads.head(j)) + column, sums[j]);
            }
            heads.add_branch(p, group, 1, p.cmp_splits + p.win_splits, splits, column, there, sums);
#pragma unroll
            for (int j = 0; j < HEADS; ++j) {
                if (there && heads.there(j)) {
                    store<OUTPUT_VECTOR>(p.o + (group * GROUP + heads.head(j)) * HEAD_DIM_V + column, sums[j]);
                }
            }
        });
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS) decode_attend(const __grid_constant__ DecodeParams p) {
    constexpr int RUN = common_divisor(SLC_PAGE_ROWS, SELECT_BLOCK);
    __shared__ __align__(8) float teams[TEAMS][ROWS][2];
    __shared__ Runs<RUN> runs;
    const Place place(p, p.slc_splits);
    const int rows = place.context > 0 ? num_selected(place.context) : 0;
    const int first = place.split * CHUNK, begin = runs.begin(first);
    for (int i = threadIdx.x; i < runs.COUNT; i += THREADS) {
        const int x = begin + i * RUN, index = x / SELECT_BLOCK < SELECT_COUNT ? x / SELECT_BLOCK : 0;
        // Without waiting for the context.
        const int block = p.block_indices[place.group() * SELECT_COUNT + index];
        if (x < rows) {
            const int row = block * SELECT_BLOCK + x % SELECT_BLOCK;
            const i64 at = i64(place.sequence) * p.slc_pages + row / SLC_PAGE_ROWS;
            runs.set(i, p.k_slc_pages[at], p.v_slc_pages[at], row % SLC_PAGE_ROWS, place.head);
        }
    }
    if (first >= rows) return;
    __syncthreads();
    const RunRows<HEAD_DIM_QK, RUN> k{runs.k, begin};
    const RunRows<HEAD_DIM_V, RUN> v{runs.v, begin};
    const int splits = splits_of(rows);
    StepFlash flash;
    attend(p, place, flash, k, v, first, first + CHUNK < rows ? first + CHUNK : rows,
           [&] { merge_scanned(p, place, splits); }, [](const StepScores&, int) {});
    write_share(p, place, p.cmp_splits + p.win_splits + place.split, flash, teams);
    if (comes_last(p.arrived + place.group() * 2 + 1, splits * GROUP_PARTS)) merge(p, place, splits);
}
