// Copies that hardware makes by itself (sm_90a): boxes of a tensor, from global memory to panels of a tile in shared memory. The
// lanes of one warp begin them; an object in shared memory counts the bytes that have come.
#pragma once
#include "wgmma.cuh"

// Where products are made from panels, of rows that lie packed in whole chunks.
constexpr bool BULK = WARPGROUPS && PAGE_ROWS == 0 && QK_COPY_BYTES == 16 && V_COPY_BYTES == 16;

// Columns of a box: those of a panel.
constexpr int BOX_COLUMNS = 64;

// Where a box goes, in bytes behind where its copies begin, and comes from: of a tensor [rows, heads, columns].
struct Box {
    int offset;
    int row;
    int head;
};

// Counts the bytes that come to each of two stages, which are filled again and again: 16 bytes in shared memory.
constexpr int ARRIVALS_BYTES = WARPGROUPS ? 16 : 0;
struct Arrivals {
    u32 objects;
    u32 parities = 0;  // of the stages' fillings that are waited for next, a bit a stage

    // By all threads, before the first copies.
    __device__ __forceinline__ void init() const {
        if (threadIdx.x == 0) {
#pragma unroll
            for (int stage = 0; stage < 2; ++stage) {
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(object(stage)) : "memory");
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            publish_to_products();
        }
        __syncthreads();
    }
    // By one thread: the copies to the stage that are begun now have so many bytes.
    __device__ __forceinline__ void expect(int stage, int bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(object(stage)), "r"(bytes) : "memory");
    }
    // By the first warp: starts to copy boxes `box(0)`, `box(1)`, … of two tensors, with DIM and OTHER_DIM columns, to two tiles of ROWS
    // rows of a stage, one behind the other from `to` on. A lane takes a panel of a box.
    template <int DIM, int OTHER_DIM, int ROWS, class Boxes>
    __device__ __forceinline__ void copy(int stage, u32 to, int boxes, const TensorMap& map, const TensorMap& other,
                                         const Boxes& box) const {
        constexpr int FIRST = DIM / BOX_COLUMNS, PANELS = FIRST + OTHER_DIM / BOX_COLUMNS;
        constexpr int PANEL_BYTES = Panels<DIM, ROWS>::PANEL_BYTES;
#pragma unroll 1
        for (int i = threadIdx.x; i < boxes * PANELS; i += 32) {
            const int panel = i % PANELS;
            const Box from = box(i / PANELS);
            copy(object(stage), to + from.offset + panel * PANEL_BYTES, panel < FIRST ? map : other, from,
                 (panel < FIRST ? panel : panel - FIRST) * BOX_COLUMNS);
        }
    }
    // By all threads: until the stage's bytes are there.
    __device__ __forceinline__ void wait(int stage) {
        u32 there;
        do {
            asm volatile("{\n.reg .pred there;\nmbarrier.try_wait.parity.shared::cta.b64 there, [%1], %2;\nselp.u32 %0, 1, 0, there;\n}"
                         : "=r"(there)
                         : "r"(object(stage)), "r"(parities >> stage & 1)
                         : "memory");
        } while (there == 0);
        parities ^= 1u << stage;
    }

private:
    static __device__ __forceinline__ void copy(u32 object, u32 to, const TensorMap& map, const Box& box, int column) {
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%4, %3, %2}], [%5];" ::"r"(to),
            "l"(&map), "r"(box.row), "r"(box.head), "r"(column), "r"(object)
            : "memory");
    }
    __device__ __forceinline__ u32 object(int stage) const { return objects + u32(stage) * 8; }
};

// Starts to copy `tiles` tiles of ROWS keys from row `row` of all on, and behind each its values if they are wanted, to a stage at
// `to`; `p` has the tensors' maps.
template <bool WITH_VALUES, int ROWS, class P>
__device__ __forceinline__ void load_key_boxes(const P& p, const Arrivals& arrivals, int stage, u32 to, int tiles, int head,
                                               int row) {
    constexpr int BYTES = ROWS * (HEAD_DIM_QK + (WITH_VALUES ? HEAD_DIM_V : 0)) * int(sizeof(Element));
    if (threadIdx.x >= 32) return;
    if (threadIdx.x == 0) arrivals.expect(stage, tiles * BYTES);
    constexpr int TILE = ROWS * (HEAD_DIM_QK + HEAD_DIM_V) * int(sizeof(Element));
    arrivals.copy<HEAD_DIM_QK, WITH_VALUES ? HEAD_DIM_V : 0, ROWS>(
        stage, to, tiles, p.k_map, p.v_map, [&](int tile) { return Box{tile * TILE, row + tile * ROWS, head}; });
}

// Rows from `from` on of a tile of ROWS become zeros. All THREADS help; products that are begun behind the next barrier find them if each
// publishes its writes. Chunks are swapped within their rows: those of a panel lie one behind the other.
template <int DIM, int ROWS, int THREADS>
__device__ __forceinline__ void clear_rows(char* tile, int from) {
    using Layout = Panels<DIM, ROWS>;
#pragma unroll 1
    for (int at = from * Layout::ROW_BYTES + int(threadIdx.x) * 16; at < Layout::PANEL_BYTES; at += THREADS * 16) {
#pragma unroll
        for (int panel = 0; panel < DIM / BOX_COLUMNS; ++panel) {
            *reinterpret_cast<uint4*>(tile + panel * Layout::PANEL_BYTES + at) = make_uint4(0, 0, 0, 0);
        }
    }
}
