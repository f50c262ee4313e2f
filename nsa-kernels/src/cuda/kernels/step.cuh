// The core of steps of single queries: a block's query heads meet a chunk of keys, and leave a share that is joined with others
// later.
//
// A block has TEAMS teams of PARTS warps; a warp has 16 query heads of a group as the rows of its products (rows beyond the
// group are zeros: a step is bound by reading the caches, so that padding costs no time). A team takes KEYS keys a step, its
// warps sharing them, steps team, team + TEAMS, … of the chunk, through STAGES stages of shared memory that are its own: no
// team waits for another before the end. All stages are filled at the beginning; where they hold a chunk, memory is waited for
// once. Addresses of the chunk's rows are looked up first, all at once.
// Shared memory, bytes: queries ROWS x pitch of k; then teams x STAGES x KEYS x (pitches of k and v), where after the last step
// the teams' o lie, TEAMS x ROWS x (Dv + 8) x 4; then what a kernel keeps besides.
#pragma once
#include "joined.cuh"

constexpr int ROWS = 16 * PARTS;                      // query heads of a block
constexpr int GROUP_PARTS = ceil_div(GROUP, ROWS);    // blocks that share a group
constexpr int TEAM = 32 * PARTS;
constexpr int THREADS = TEAMS * TEAM;
constexpr bool HELD = QUERIES_HELD && TENSOR_CORES;
constexpr int STAGE_BYTES = KEYS * (Keys::PITCH + Values::PITCH);
constexpr int QUERY_BYTES = ROWS * Keys::PITCH;
// Rows of o move by eight banks from one to the next.
constexpr int JOIN_PITCH = Values::PADDED + 8;
constexpr int JOIN_BYTES = TEAMS * ROWS * JOIN_PITCH * 4;
constexpr int STAGES_BYTES = TEAMS * STAGES * STAGE_BYTES;
constexpr int BODY_BYTES = STAGES_BYTES > JOIN_BYTES ? STAGES_BYTES : JOIN_BYTES;
// Elements of a share that a thread moves at once.
constexpr int SHARE_VECTOR = HEAD_DIM_V % 4 == 0 ? 4 : 1;
// Registers are for two blocks of a multiprocessor, or three smaller ones; wide outputs take as many as there are.
constexpr int LEAST_BLOCKS = !TENSOR_CORES || Values::PADDED > 128 ? 1 : THREADS > 192 ? 2 : 384 / THREADS;
static_assert(CHUNK % KEYS == 0, "steps do not cross chunks");

extern __shared__ __align__(128) char shared[];

using StepFlash = Flash<1, KEYS>;
using StepScores = Scores<1, KEYS>;

// Which query heads a block works on: those of a KV head, or a part of them.
struct Part {
    int head;   // KV head
    int part;   // of the group
    int heads;  // query heads of the part

    // Takes it off a block's number.
    __device__ __forceinline__ explicit Part(u32& work) {
        head = int(work % KV_HEADS), work /= KV_HEADS;
        part = int(work % GROUP_PARTS), work /= GROUP_PARTS;
        heads = GROUP - part * ROWS < ROWS ? GROUP - part * ROWS : ROWS;
    }
    // The part's first query head among those of all tokens.
    __device__ __forceinline__ i64 query_head(i64 token) const { return (token * KV_HEADS + head) * GROUP + part * ROWS; }
};

constexpr __device__ int splits_of(int rows) { return (rows + CHUNK - 1) / CHUNK; }

// Rows of one KV head in runs of RUN rows that lie beside each other, as far as a chunk needs them.
template <int RUN>
struct Runs {
    // A chunk may begin within a run.
    static constexpr int COUNT = (CHUNK + RUN - 2) / RUN + 1;
    u64 k[COUNT];
    u64 v[COUNT];

    // Row, from the beginning of the run of a chunk's first row on.
    static __device__ __forceinline__ int begin(int first) { return first / RUN * RUN; }
    // Run `i` begins at a row of pages.
    __device__ __forceinline__ void set(int i, u64 k_page, u64 v_page, int row, int head) {
        const i64 at = i64(row) * KV_HEADS + head;
        k[i] = k_page + at * (HEAD_DIM_QK * int(sizeof(Element)));
        v[i] = v_page + at * (HEAD_DIM_V * int(sizeof(Element)));
    }
};

// Keys or values in runs.
template <int DIM, int RUN>
struct RunRows {
    static constexpr i64 STRIDE = i64(KV_HEADS) * DIM;
    const u64* runs;
    int begin;  // the first run's row

    __device__ __forceinline__ const Element* operator()(int row) const {
        return reinterpret_cast<const Element*>(runs[(row - begin) / RUN]) + (row - begin) % RUN * STRIDE;
    }
    // Whether the rows of a step have one distance from each other.
    __device__ __forceinline__ bool even(int, int) const { return RUN % KEYS == 0; }
};

// Starts to copy rows x .. x + count of a step; a team's work.
template <int DIM, int BYTES, class Rows>
__device__ __forceinline__ void load_step(u32 to, int thread, int x, int count, const Rows& rows) {
    if (rows.even(x, count)) {
        load_rows<DIM, KEYS, TEAM, BYTES>(to, thread, count, EvenRows<Rows::STRIDE>{rows(x)});
    } else {
        load_rows<DIM, KEYS, TEAM, BYTES>(to, thread, count, [&](int r) { return rows(x + r); });
    }
}

// All warps of a team have come here.
__device__ __forceinline__ void team_sync() {
    if constexpr (PARTS == 1) {
        __syncwarp();
    } else if constexpr (TEAMS == 1) {
        __syncthreads();
    } else {
        asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.x / TEAM), "n"(TEAM) : "memory");
    }
}

// The first row of this warp among the block's.
__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 % PARTS * 16; }

// `heads` queries attend to rows first .. end. `meanwhile()` is called while the first of them are on their way; `see(s, x)` is
// shown the scores of the step from row x on, minus infinity beyond the end.
template <class KeyRows, class ValueRows, class Meanwhile, class See>
__device__ __forceinline__ void attend(const Element* queries, int heads, float scale_log2, StepFlash& flash, const KeyRows& k,
                                       const ValueRows& v, int first, int end, const Meanwhile& meanwhile, const See& see) {
    constexpr int STEP = TEAMS * KEYS;
    const int team = threadIdx.x / TEAM;
    char* const stages = shared + QUERY_BYTES + team * STAGES * STAGE_BYTES;
    const auto load = [&](int x, int stage) {
        if (x < end) {
            const u32 to = shared_address(stages) + stage * STAGE_BYTES;
            const int thread = anew(int(threadIdx.x % TEAM));
            load_step<HEAD_DIM_QK, QK_COPY_BYTES>(to, thread, x, end - x, k);
            load_step<HEAD_DIM_V, V_COPY_BYTES>(to + KEYS * Keys::PITCH, thread, x, end - x, v);
        }
        copy_commit();
    };
    load_rows<HEAD_DIM_QK, ROWS, THREADS, QUERY_COPY_BYTES>(shared_address(shared), threadIdx.x, heads,
                                                             [&](int row) { return queries + row * HEAD_DIM_QK; });
    copy_commit();
    int x = first + team * KEYS;
    // Few instructions: a block runs most of them once, so that fetching them counts.
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) load(x + stage * STEP, stage);
    meanwhile();
    copy_wait<STAGES>();
    __syncthreads();
    Queries<1, HELD> q(shared + warp_row() * Keys::PITCH);
    q.take();
    for (int stage = 0; x < end; x += STEP) {
        copy_wait<STAGES - 1>();
        team_sync();
        const char* const at = stages + stage * STAGE_BYTES;
        StepScores s;
        flash.multiply_keys(s, q, Right<HEAD_DIM_QK, false>(at));
        if (x + KEYS > end) {
            const int seen = end - x - threadIdx.x % 4 * 2;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    if (n * 8 + c % 2 >= seen) s[0][n][c] = negative_infinity();
                }
            }
        }
        see(s, x);
        float factor[1][2];
        flash.exponentials(s, scale_log2, factor);
        flash.multiply_values(s, Right<HEAD_DIM_V, true>(at + KEYS * Keys::PITCH));
        if constexpr (STAGES * STEP < CHUNK) {
            team_sync();
            load(x + STAGES * STEP, stage);
        } else {
            copy_commit();
        }
        stage = (stage + 1) % STAGES;
    }
    copy_wait<0>();
}

// Of a row's teams.
__device__ __forceinline__ Joined join_teams(const float (&teams)[TEAMS][ROWS][2], int row) {
    float most = negative_infinity();
#pragma unroll
    for (int team = 0; team < TEAMS; ++team) most = fmaxf(most, teams[team][row][0]);
    Joined all = Joined::of(most);
#pragma unroll
    for (int team = 0; team < TEAMS; ++team) all.sum = fmaf(teams[team][row][1], all.weight(teams[team][row][0]), all.sum);
    return all;
}

// Writes numbers of a share past the nearest cache: another multiprocessor reads them.
template <int N>
__device__ __forceinline__ void put(float* to, const float (&from)[N]) {
    if constexpr (N == 4) {
        __stcg(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
    } else {
        static_assert(N == 1, "elements");
        __stcg(to, from[0]);
    }
}

// Writes the share of all teams together: o `[heads, Dv]`, m and l `[heads, 2]`.
__device__ __forceinline__ void write_share(float* share, float* statistics, int heads, StepFlash& flash,
                                           float (&teams)[TEAMS][ROWS][2]) {
    const int lane = threadIdx.x % 32, team = threadIdx.x / TEAM, row = warp_row() + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float l = quad_sum(flash.l[0][h]);
        if (lane % 4 == 0) {
            teams[team][row + h * 8][0] = flash.m[0][h];
            teams[team][row + h * 8][1] = l;
        }
    }
    // The last step has been read too.
    __syncthreads();
    float* const joined = reinterpret_cast<float*>(shared + QUERY_BYTES);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float weight = join_teams(teams, row + h * 8).weight(flash.m[0][h]);
        float* const to = joined + (team * ROWS + row + h * 8) * JOIN_PITCH + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < PARTS_V; ++n) {
            const float* const o = &flash.o[0][n][2 * h];
            *reinterpret_cast<float2*>(to + n * 8) = make_float2(o[0] * weight, o[1] * weight);
        }
    }
    __syncthreads();
    constexpr int PIECES = HEAD_DIM_V / SHARE_VECTOR;
    for (int i = threadIdx.x; i < heads * PIECES; i += THREADS) {
        const int r = i / PIECES, column = i % PIECES * SHARE_VECTOR;
        float sum[SHARE_VECTOR] = {};
#pragma unroll
        for (int other = 0; other < TEAMS; ++other) {
            float o[SHARE_VECTOR];
            load<SHARE_VECTOR>(joined + (other * ROWS + r) * JOIN_PITCH + column, o);
#pragma unroll
            for (int c = 0; c < SHARE_VECTOR; ++c) sum[c] += o[c];
        }
        put(share + r * HEAD_DIM_V + column, sum);
    }
    for (int r = threadIdx.x; r < heads; r += THREADS) {
        const Joined all = join_teams(teams, r);
        const float m = all.sum == 0.0f ? negative_infinity() : all.base;
        __stcg(reinterpret_cast<float2*>(statistics + r * 2), make_float2(m, all.sum));
    }
}

// Whether this block is the last of `count` that come here. It sees then what the others have written, and the counter is
// as it was before the first of them.
__device__ __forceinline__ bool comes_last(u32* arrived, int count) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        // Releases what all threads wrote before the barrier, and acquires what other blocks released; counts up to count - 1,
        // then begins anew.
        u32 before;
        asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;"
                     : "=r"(before)
                     : "l"(arrived), "r"(count - 1)
                     : "memory");
        last = before == u32(count) - 1;
    }
    __syncthreads();
    return last;
}
