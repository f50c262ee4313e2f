// Full attention of a sequence's only query (SPEC 1): a decoding step of a dense model. Chunks of its keys are blocks of threads
// of their own, whose shares are joined, JOINED neighbours at a time, by the last block of them to come; then those, until
// the sequence's are one.
//
// Grid: KV heads x parts of the group x chunks of all sequences along x, the KV heads of one chunk beside each other: their rows
// lie side by side in memory. There may be more blocks than chunks, where a launch is recorded for any context: a sequence's chunks
// are its first ones then. None is empty. Shared memory and teams: step.cuh; statistics of the shares that
// are joined, ROWS x JOINED x 4, lie where the teams' o were.
// Latency: the sequence; its pages, if any; rows of the chunk; then a share and a counter; then JOINED shares, whose loads are under
// way together, once, twice (from 17 chunks on) or three times (from 257 on). One block that joined all 256 shares of 65,536
// tokens would read 2 MiB by itself, which takes longer than all blocks need for their rows.
// Bytes, a query and KV head: rows of k and v, (Dk + Dv) size each, must be read. A chunk also reads q, R Dk size, and writes
// o, 4 R Dv, which is read once more: CHUNK is such that q and o are at most a tenth of the chunk's own rows (256 rows for R = 16
// in bf16, 64 for R = 4). FLOP: 2 x 16 PARTS (Dk + Dv) a row: bound by memory.
// Order of summation: a team's steps in order; teams; shares in order, JOINED at a time, l by lanes and the tree of lanes. It depends
// on the configuration and the sequence's own length alone. Which block comes last changes no sum.
// Edges: sequences of no query or of several have no chunk here; rows beyond the query are never read.
//
// Measured on the simulator, bf16, D = 128, one KV head, of the rows' bytes (touched: each sector once a launch; moved: sectors of
// all loads and stores; passes: over the banks of shared memory, of those without conflicts): R = 16: 8k tokens touched
// 1.07, moved 1.18; 64k 1.06, 1.18; R = 4: 8k 1.06, 1.19; passes 1.00.
// Tried: the place kept for the end, or addresses of packed rows in registers: spills on sm_100.
//
// budget: kernel=dense_step threads=256 registers=128 spills=0 shared=75776
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "step.cuh"
#include "sequence.cuh"

// Shares that a block joins at once.
constexpr int JOINED = 16;
static_assert(JOINED * ROWS * 4 <= BODY_BYTES, "weights lie where outputs of teams were");

// What a block works on.
struct Place : Part {
    Sequence sequence;
    int split;  // of the sequence's chunks
    i64 chunk;  // the sequence's first one among those of all, KV heads outermost

    __device__ __forceinline__ explicit Place(const BandForwardParams& p) : Place(p, u32(anew(int(blockIdx.x)))) {}
    __device__ __forceinline__ i64 query_head() const { return Part::query_head(sequence.query); }
    // Where the shares of a chunk lie: o `[KV_HEADS, chunks, GROUP, Dv]`, m and l `[KV_HEADS, chunks, GROUP, 2]`.
    __device__ __forceinline__ float* o(const DenseStepParams& p, int of) const {
        return p.shares + ((chunk + of) * GROUP + part * ROWS) * HEAD_DIM_V;
    }
    __device__ __forceinline__ float* statistics(const DenseStepParams& p, int of) const {
        return p.statistics + ((chunk + of) * GROUP + part * ROWS) * 2;
    }
    // Counts shares that are to be joined, `[KV_HEADS, chunks, GROUP_PARTS]`.
    __device__ __forceinline__ u32* arrived(const DenseStepParams& p, int of) const {
        return p.arrived + (chunk + of) * GROUP_PARTS + part;
    }

private:
    __device__ __forceinline__ Place(const BandForwardParams& p, u32 work)
        : Part(work), sequence(find_sequence<5>(p.sequences, p.num_sequences, int(work))), split(int(work) - sequence.tile),
          chunk(i64(head) * p.tiles + sequence.tile) {}
};

// Joins `count` shares, of every `step`th chunk from `first` on: to the place of the first, or, the last of all, to the outputs.
template <bool LAST>
__device__ __forceinline__ void join(const DenseStepParams& p, const Place& place, int first, int step, int count) {
    constexpr int VECTOR = LAST ? OUTPUT_VECTOR : SHARE_VECTOR, PIECES = HEAD_DIM_V / VECTOR;
    // Shares under way together.
    constexpr int SHARES = 8;
    const int lane = threadIdx.x % JOINED;
    const i64 stride = i64(step) * GROUP;
    float* const statistics = place.statistics(p, first);
    float* const weights = reinterpret_cast<float*>(shared + QUERY_BYTES);
    for (int r = threadIdx.x / JOINED; r < ROWS; r += THREADS / JOINED) {
        const bool there = r < place.heads;
        float* const own = statistics + r * 2;
        const Joined all = join_shares<JOINED>(own, there ? count : 0, stride * 2);
        const float weight = there && lane < count ? all.weight(own[lane * stride * 2]) : 0.0f;
        weights[r * JOINED + lane] = LAST ? weight * all.inverse() : weight;
        // All lanes have read what is written anew.
        __syncwarp();
        if (!there || lane > 0) continue;
        if constexpr (LAST) {
            const float unscale[2] = {p.common.unscale_high, p.common.unscale_low};
            p.common.lse[place.query_head() + r] = all.lse(unscale);
        } else {
            const float m = all.sum == 0.0f ? negative_infinity() : all.base;
            __stcg(reinterpret_cast<float2*>(own), make_float2(m, all.sum));
        }
    }
    __syncthreads();
    float* const shares = place.o(p, first);
    for (int i = threadIdx.x; i < place.heads * PIECES; i += THREADS) {
        const int r = i / PIECES, at = r * HEAD_DIM_V + i % PIECES * VECTOR;
        float sum[VECTOR] = {};
        for (int from = 0; from < count; from += SHARES) {
            float share[SHARES][VECTOR] = {};
#pragma unroll
            for (int j = 0; j < SHARES; ++j) {
                if (from + j < count) load<VECTOR>(shares + (from + j) * stride * HEAD_DIM_V + at, share[j]);
            }
#pragma unroll
            for (int j = 0; j < SHARES; ++j) {
#pragma unroll
                for (int c = 0; c < VECTOR; ++c) {
                    if (from + j < count) sum[c] = fmaf(share[j][c], weights[r * JOINED + from + j], sum[c]);
                }
            }
        }
        if constexpr (LAST) {
            store<VECTOR>(p.common.o + place.query_head() * HEAD_DIM_V + at, sum);
        } else {
            put(shares + at, sum);
        }
    }
}

// Joins what can be joined now that this chunk's share is there.
__device__ __forceinline__ void join_all(const DenseStepParams& p, const Place& place) {
    const int splits = splits_of(place.sequence.keys);
    // Counters of a round lie behind those of the one before: no two shares that are joined have the same.
    int round = 0;
#pragma unroll 1
    for (int step = 1;; step *= JOINED, ++round) {
        const int first = place.split / (step * JOINED) * (step * JOINED), left = (splits - first + step - 1) / step;
        const int count = left < JOINED ? left : JOINED;
        if (count > 1 && !comes_last(place.arrived(p, first + round), count)) return;
        if (step * JOINED >= splits) return join<true>(p, place, first, step, count);
        if (count > 1) join<false>(p, place, first, step, count);
    }
}

// Attends to this block's chunk, if there is one.
__device__ __forceinline__ bool attend_chunk(const BandForwardParams& p, StepFlash& flash) {
    // Rows of a packed tensor lie beside each other.
    constexpr int RUN = PAGE_ROWS > 0 ? PAGE_ROWS : 4 * KEYS;
    __shared__ Runs<RUN> runs;
    const Place place(p);
    const int first = place.split * CHUNK, left = place.sequence.keys - first, count = left < CHUNK ? left : CHUNK;
    if (left <= 0) return false;
    // Where the first run begins, from the chunk's first row on.
    const int begin = CHUNK % RUN == 0 ? 0 : runs.begin(first) - first;
    for (int i = threadIdx.x; begin + i * RUN < count; i += THREADS) {
        const int row = first + begin + i * RUN;
        if constexpr (PAGE_ROWS > 0) {
            const i64 page = place.sequence.key + row / RUN;
            runs.set(i, p.k_pages[page], p.v_pages[page], 0, place.head);
        } else {
            runs.set(i, u64(p.k), u64(p.v), place.sequence.key + row, place.head);
        }
    }
    __syncthreads();
    const RunRows<HEAD_DIM_QK, RUN> k{runs.k, begin};
    const RunRows<HEAD_DIM_V, RUN> v{runs.v, begin};
    attend(p.q + place.query_head() * HEAD_DIM_QK, place.heads, p.scale_log2, flash, k, v, 0, count, [] {},
           [](const StepScores&, int) {});
    return true;
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS) dense_step(const __grid_constant__ DenseStepParams p) {
    __shared__ __align__(8) float teams[TEAMS][ROWS][2];
    StepFlash flash;
    if (!attend_chunk(p.common, flash)) return;
    // Looked up again: registers are scarce before.
    const Place place(p.common);
    write_share(place.o(p, place.split), place.statistics(p, place.split), place.heads, flash, teams);
    // The only share is joined at once.
    __syncthreads();
    join_all(p, place);
}
