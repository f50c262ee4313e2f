// Element types, conversions, vectors of elements. Needs no header of the toolkit.
#pragma once

using i64 = long long;
using u64 = unsigned long long;
using u32 = unsigned;
using u16 = unsigned short;

// bfloat16 and IEEE half as bits; kernels compute in float.
struct Bf16 {
    u16 bits;
};
struct F16 {
    u16 bits;
};

// Describes a tensor to copies that hardware makes (bulk.cuh); the driver writes it.
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }
__device__ __forceinline__ float negative_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_float(F16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// To nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
    Bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
__device__ __forceinline__ F16 from_float<F16>(float x) {
    F16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two floats as the halves of a register, the first one low.
template <class T>
__device__ __forceinline__ u32 pack(float low, float high);
template <>
__device__ __forceinline__ u32 pack<Bf16>(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <>
__device__ __forceinline__ u32 pack<F16>(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// A register's halves.
template <class T>
__device__ __forceinline__ void unpack(u32 x, float& low, float& high);
template <>
__device__ __forceinline__ void unpack<Bf16>(u32 x, float& low, float& high) {
    low = __uint_as_float(x << 16);
    high = __uint_as_float(x & 0xffff0000u);
}
template <>
__device__ __forceinline__ void unpack<F16>(u32 x, float& low, float& high) {
    low = to_float(F16{u16(x)});
    high = to_float(F16{u16(x >> 16)});
}

// N consecutive elements: one, or 4 or 8 from an address that is a multiple of 16 bytes (of 8: 4 elements of 2 bytes).
template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
    static_assert(N == 1 || N == 4 || N == 8, "elements");
    if constexpr (N == 1) {
        to[0] = to_float(from[0]);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const float4 x = *reinterpret_cast<const float4*>(from + i);
            to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
        }
    } else if constexpr (N == 4) {
        const uint2 x = *reinterpret_cast<const uint2*>(from);
        unpack<T>(x.x, to[0], to[1]);
        unpack<T>(x.y, to[2], to[3]);
    } else {
        const uint4 x = *reinterpret_cast<const uint4*>(from);
        unpack<T>(x.x, to[0], to[1]);
        unpack<T>(x.y, to[2], to[3]);
        unpack<T>(x.z, to[4], to[5]);
        unpack<T>(x.w, to[6], to[7]);
    }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
    static_assert(N == 1 || N == 4 || N == 8, "elements");
    if constexpr (N == 1) {
        to[0] = from_float<T>(from[0]);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            *reinterpret_cast<float4*>(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
        }
    } else if constexpr (N == 4) {
        *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(from[0], from[1]), pack<T>(from[2], from[3]));
    } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(pack<T>(from[0], from[1]), pack<T>(from[2], from[3]),
                                                   pack<T>(from[4], from[5]), pack<T>(from[6], from[7]));
    }
}

// A number as a type, for generic lambdas.
template <int N>
struct Size {
    static constexpr int value = N;
};

// Calls act(Size<FROM>()), and so on in steps of STEP below TO: numbers that instructions take as constants.
template <int FROM, int TO, int STEP = 1, class Act>
__device__ __forceinline__ void unroll(const Act& act) {
    if constexpr (FROM < TO) {
        act(Size<FROM>());
        unroll<FROM + STEP, TO, STEP>(act);
    }
}

// The sum over a warp's lanes, in all of them; the order of additions is that of the tree, the same in every run.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
