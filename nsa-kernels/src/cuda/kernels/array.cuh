// Arguments that are arrays, and launches whose blocks are shared out among an array's members.
#pragma once
#include "element.cuh"

template <class T, int N>
struct Array {
    T at[N];
};

// The member that this block along x works for, and its number among that member's blocks. Each member's blocks end at `end`, where
// those of the next one begin.
template <class T, int N>
__device__ __forceinline__ const T& member_of_block(const Array<T, N>& members, i64& block) {
    int number = 0;
    i64 start = 0;
    while (blockIdx.x >= members.at[number].end) start = members.at[number++].end;
    block = i64(blockIdx.x) - start;
    return members.at[number];
}
