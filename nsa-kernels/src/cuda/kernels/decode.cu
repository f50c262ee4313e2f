// One decoding step for a batch of sequences, from their caches (SPEC 4): two launches.
//
// decode_scan: chunks of CHUNK compressed blocks, and chunks of the window, which waits for no selection. A chunk leaves a share:
//   for each query head m, l = sum of 2^(s - m) and o = sum of 2^(s - m) v. Of compressed blocks it also leaves p summed to
//   selection blocks, of each head, relative to m. The last of a sequence's and KV head's chunks makes the list of blocks.
// decode_attend: chunks of CHUNK tokens of the selected blocks, shares likewise; the last one joins the shares of all
//   branches, o_c = sum_i 2^(m_i - m) o_i / sum_i 2^(m_i - m) l_i, rounds them to Element, and adds them up with their gates.
//
// Grid: KV heads x parts of the group x chunks x sequences along x, the KV heads of one chunk beside each other: their rows lie
// side by side in memory. As many chunks as the longest context that the workspace holds; blocks beyond a sequence's own end
// at once, so that one graph serves all contexts. Shared memory and teams: decode.cuh; scan also keeps the chunk's
// scores, ROWS x (CHUNK + 8) x 4, attend the list of blocks.
// Bytes, a sequence and KV head: (M + n l' + w) rows of k and v must be read, size (Dk + Dv) each. A chunk also reads q,
// R Dk size, and writes o, 4 R Dv, which is read once more: CHUNK is such that q and o are at most a tenth of the chunk's own
// rows (256 rows for R = 16 in bf16, 64 for R = 4), as far as scores of ROWS heads fit. FLOP: 2 x 16 PARTS (Dk + Dv) a row, in
// bf16 16 PARTS a byte, of 156 that an A100 has: bound by memory.
// Order of summation: a team's steps in order; teams; chunks in order; heads, then chunks for the importance. It depends on
// the configuration and the sequence's own context alone. Which block comes last changes no sum.
// Edges: a context without a compressed block has one chunk without rows, m = -inf, l = 0, whose share counts nothing; a
// sequence of context 0 is none. Rows beyond the context are never read.
// Measured on the simulator, bf16, D = 128, one KV head, of the rows' bytes (touched: each sector once a launch; read: sectors
// of all loads; passes: over the banks of shared memory, of those without conflicts):
//   R = 16: 2k tokens touched 1.12, read 1.13; 8k 1.12, 1.13; 16k 1.13, 1.14; 64k 1.15, 1.16; passes 1.02
//   R = 4:  2k 1.09, 1.12; 8k 1.10, 1.13; 16k 1.11, 1.13; 64k 1.13, 1.14; passes 1.01
// Tried: chunks of 128 rows for R = 16, touched 1.21 at 8k, and of 64, 1.40. Sums of p begun at the first of a selection
// block's compressed blocks in all lanes: 1.08 passes at 16k. A launch for the list alone: the last chunk makes it without.
//
// budget: kernel=decode_scan threads=128 registers=168 spills=0 shared=90112
// budget: kernel=decode_attend threads=128 registers=168 spills=0 shared=73728
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
    const int first = place.split * CHUNK, count = blocks - first < CHUNK ? blocks - first : CHUNK;
    float* const scores = kept_scores();
    for (int row = threadIdx.x / 32; row < place.heads; row += THREADS / 32) {
        const float base = Joined(teams[0][row], TEAMS, ROWS * 2).base;
        for (int x = threadIdx.x % 32; x < count; x += 32) {
            float& score = scores[row * SCORE_PITCH + x];
            score = exp2_approx(fmaf(score, p.scale_log2, -base));
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < place.heads * COLUMNS; i += THREADS) {
        const int row = i / COLUMNS, column = i % COLUMNS;
        // In chunks of d tokens, from the first of this block's compressed blocks on.
        const int begin = (first_column(place.split) + column) * CHUNKS - first, end = begin + CHUNKS;
        const int from = begin - (SPAN - 1) > 0 ? begin - (SPAN - 1) : 0, to = end < count ? end : count;
        float sum = 0.0f;
        // Neighbours begin at other places, so that they meet other banks.
        for (int left = to - from, x = left > 0 ? from + column % left : 0; left > 0; --left, x = x + 1 < to ? x + 1 : from) {
            const int covered = (x + SPAN < end ? x + SPAN : end) - (x > begin ? x : begin);
            sum = fmaf(float(covered), scores[row * SCORE_PITCH + x], sum);
        }
        folded_of(p, place.group(), place.split, place.part * ROWS + row)[column] = sum;
    }
}

__device__ __forceinline__ void scan_blocks(const DecodeParams& p, const Place& place) {
    __shared__ __align__(8) float teams[TEAMS][ROWS][2];
    const int splits = num_cmp_splits(place.context);
    if (place.split >= splits) return;
    const int blocks = num_blocks(place.context), first = place.split * CHUNK;
    const int end = first + CHUNK < blocks ? first + CHUNK : blocks;
    const bool scored = selects_by_score(place.context);
    const i64 pages = i64(place.sequence) * p.cmp_pages;
    const PagedRows<HEAD_DIM_QK, CMP_PAGE_ROWS> k{p.k_cmp_pages + pages, place.head};
    const PagedRows<HEAD_DIM_V, CMP_PAGE_ROWS> v{p.v_cmp_pages + pages, place.head};
    StepFlash flash;
    attend(p, place, flash, k, v, first, end, [&](const StepScores& s, int x) {
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

__device__ __forceinline__ void scan_window(const DecodeParams& p, const Place& place, int split) {
    __shared__ __align__(8) float teams[TEAMS][ROWS][2];
    const int rows = num_window(place.context), first = split * CHUNK;
    if (first >= rows) return;
    const u64* const sequence = p.sequences + i64(place.sequence) * 3;
    const RingRows<HEAD_DIM_QK> k(sequence[1], place.head, place.context);
    const RingRows<HEAD_DIM_V> v(sequence[2], place.head, place.context);
    StepFlash flash;
    attend(p, place, flash, k, v, first, first + CHUNK < rows ? first + CHUNK : rows, [](const StepScores&, int) {});
    write_share(p, place, p.cmp_splits + split, flash, teams);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_scan(const __grid_constant__ DecodeParams p) {
    const Place place(p, p.cmp_splits + p.win_splits);
    if (place.context == 0) return;
    if (place.split < p.cmp_splits) {
        scan_blocks(p, place);
    } else {
        scan_window(p, place, place.split - p.cmp_splits);
    }
}

// Adds gate times the join of `count` shares from `split` on to sum: OUTPUT_VECTOR elements from `column` on.
__device__ __forceinline__ void add_branch(const DecodeParams& p, const Shares& shares, int split, int count, int head,
                                           int column, float gate, float (&sum)[OUTPUT_VECTOR]) {
    const Joined all(shares.statistics(p, split, head), count, GROUP * 2);
    float o[OUTPUT_VECTOR] = {};
    for (int i = 0; i < count; ++i) {
        const float weight = all.weight(shares.statistics(p, split + i, head)[0]);
        float share[OUTPUT_VECTOR];
        load<OUTPUT_VECTOR>(shares.o(p, split + i, head) + column, share);
#pragma unroll
        for (int c = 0; c < OUTPUT_VECTOR; ++c) o[c] = fmaf(share[c], weight, o[c]);
    }
    const float inverse = all.inverse();
#pragma unroll
    for (int c = 0; c < OUTPUT_VECTOR; ++c) sum[c] += gate * to_float(from_float<Element>(o[c] * inverse));
}

// Writes o of the sequence's query heads of a group.
__device__ __forceinline__ void merge(const DecodeParams& p, const Place& place) {
    constexpr int PIECES = HEAD_DIM_V / OUTPUT_VECTOR;
    const Shares shares(p, place.group());
    const int cmp = num_cmp_splits(place.context), win = splits_of(num_window(place.context));
    const int slc = splits_of(num_selected(place.context));
    for (int i = threadIdx.x; i < GROUP * PIECES; i += THREADS) {
        const int head = i / PIECES, column = i % PIECES * OUTPUT_VECTOR;
        const i64 row = place.group() * GROUP + head;
        const Element* const gates = p.gates + row * 3;
        float sum[OUTPUT_VECTOR] = {};
        add_branch(p, shares, 0, cmp, head, column, to_float(gates[0]), sum);
        add_branch(p, shares, p.cmp_splits + p.win_splits, slc, head, column, to_float(gates[1]), sum);
        add_branch(p, shares, p.cmp_splits, win, head, column, to_float(gates[2]), sum);
        store<OUTPUT_VECTOR>(p.o + row * HEAD_DIM_V + column, sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_attend(const __grid_constant__ DecodeParams p) {
    __shared__ __align__(8) float teams[TEAMS][ROWS][2];
    const Place place(p, p.slc_splits);
    if (place.context == 0) return;
    const int rows = num_selected(place.context), first = place.split * CHUNK;
    if (first >= rows) return;
    int* const list = reinterpret_cast<int*>(shared + QUERY_BYTES + BODY_BYTES);
    for (int i = threadIdx.x; i < SELECT_COUNT; i += THREADS) list[i] = p.block_indices[place.group() * SELECT_COUNT + i];
    __syncthreads();
    const i64 pages = i64(place.sequence) * p.slc_pages;
    const SelectedRows<HEAD_DIM_QK> k{{p.k_slc_pages + pages, place.head}, list};
    const SelectedRows<HEAD_DIM_V> v{{p.v_slc_pages + pages, place.head}, list};
    StepFlash flash;
    attend(p, place, flash, k, v, first, first + CHUNK < rows ? first + CHUNK : rows, [](const StepScores&, int) {});
    write_share(p, place, p.cmp_splits + p.win_splits + place.split, flash, teams);
    if (comes_last(p.arrived + place.group() * 2 + 1, splits_of(rows) * GROUP_PARTS)) merge(p, place);
}
