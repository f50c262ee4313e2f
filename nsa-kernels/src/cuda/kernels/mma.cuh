// Instructions of tensor cores and of copies past registers (sm_80), and what a warp shares.
#pragma once
#include "element.cuh"

constexpr u32 ALL_LANES = 0xffffffffu;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// The same value, of which the compiler knows nothing: what follows from it is computed anew where it is used, and takes no
// registers across a loop.
__device__ __forceinline__ int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The same values, which take registers across a loop: the compiler knows no way to compute them anew.
template <int N>
__device__ __forceinline__ void pin(u32 (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(values[i]));
}

// A value that is the same in all lanes: the compiler learns it, and computes what follows once for the warp.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(ALL_LANES, x, 0); }

// The address that instructions for shared memory take.
__device__ __forceinline__ u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// Four 8x8 matrices of 16-bit elements, AT bytes behind the addresses; lane l names row l % 8 of matrix l / 8 and gets elements
// 2 (l % 4), + 1 of row l / 4.
template <int AT>
__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address), "n"(AT)
                 : "memory");
}

// The same, each matrix transposed.
template <int AT>
__device__ __forceinline__ void load_transposed(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address), "n"(AT)
                 : "memory");
}

// d[16 x 8] = a[16 x 16] b[16 x 8], or that added to d (ADD). Lane l has elements (l / 4 and 8 later, 2 (l % 4) and + 1) of d.
template <class T, bool ADD>
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
#define NSA_MULTIPLY(T, TYPE)                                                                                                   \
    template <>                                                                                                                 \
    __device__ __forceinline__ void multiply<T, true>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {                       \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                                              \
            ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                              \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                    \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                    \
    }                                                                                                                           \
    template <>                                                                                                                 \
    __device__ __forceinline__ void multiply<T, false>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {                      \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                                              \
            ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"                                          \
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                                    \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));                                         \
    }
NSA_MULTIPLY(Bf16, "bf16")
NSA_MULTIPLY(F16, "f16")

// Two elements of an operand. Of float there are none: that path is compiled, as the condition does not depend on a template's
// parameter, but not taken.
template <class T>
__device__ __forceinline__ u32 operand(float low, float high) {
    if constexpr (sizeof(T) == 2) {
        return pack<T>(low, high);
    } else {
        return 0;
    }
}

// Writes two elements to shared memory.
template <class T>
__device__ __forceinline__ void store_two(char* to, float first, float second) {
    if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<u32*>(to) = pack<T>(first, second);
    } else {
        *reinterpret_cast<float2*>(to) = make_float2(first, second);
    }
}

// Whether copies of 16 bytes pass the first cache by ("cg") or stay there too ("ca"), which a program says before its includes.
#ifndef COPY_CACHE
#define COPY_CACHE "cg"
#endif

// Starts to copy 16 bytes to shared memory, TO bytes behind its address, from FROM bytes behind the other one.
template <int TO, int FROM>
__device__ __forceinline__ void copy_chunk(u32 to, const void* from) {
    asm volatile("cp.async." COPY_CACHE ".shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(TO), "n"(FROM) : "memory");
}

// The same; zeros where `there` is false, and nothing is read then.
template <int TO, int FROM>
__device__ __forceinline__ void copy_chunk(u32 to, const void* from, bool there) {
    asm volatile("cp.async." COPY_CACHE ".shared.global [%0 + %2], [%1 + %3], 16, %4;" ::"r"(to), "l"(from), "n"(TO), "n"(FROM),
                 "r"(there ? 16 : 0)
                 : "memory");
}

// The same of BYTES (4, 8, 16). Two bytes are copied at once.
template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool there) {
    if constexpr (BYTES == 16) {
        copy_chunk<0, 0>(to, from, there);
    } else if constexpr (BYTES == 2) {
        const u16 value = there ? *static_cast<const u16*>(from) : u16(0);
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(value) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(there ? BYTES : 0)
                     : "memory");
    }
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// 2^x, 0 for minus infinity.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Over the four lanes that share rows of a product.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
