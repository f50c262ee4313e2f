// Which run of rows of keys a query sees: `first(t)` .. `end(t)` for the query at position t, both growing with t; and which
// queries see a key: positions `from(key)` .. `until(key)`. Row 0 of the keys is that of token `shift`.
#pragma once
#include "sequence.cuh"

constexpr int FOREVER = 0x7fffffff;

// All tokens up to the query's own.
struct Dense {
    int shift;
    __device__ __forceinline__ Dense(const Sequence& seq) : shift(seq.context + seq.queries - seq.keys) {}
    __device__ __forceinline__ int first(int) const { return 0; }
    __device__ __forceinline__ int end(int t) const { return t + 1 - shift; }
    __device__ __forceinline__ int from(int key) const { return key + shift; }
    __device__ __forceinline__ int until(int) const { return FOREVER; }
};

// The last WINDOW tokens.
struct Window {
    int shift;
    __device__ __forceinline__ Window(const Sequence& seq) : shift(seq.context + seq.queries - seq.keys) {}
    __device__ __forceinline__ int first(int t) const {
        const int token = t + 1 - WINDOW;
        return token > shift ? token - shift : 0;
    }
    __device__ __forceinline__ int end(int t) const { return t + 1 - shift; }
    __device__ __forceinline__ int from(int key) const { return key + shift; }
    __device__ __forceinline__ int until(int key) const {
        return key + shift < FOREVER - WINDOW ? key + shift + WINDOW : FOREVER;
    }
};

// Compression blocks whose last token is not behind the query.
struct Visible {
    __device__ __forceinline__ Visible(const Sequence&) {}
    __device__ __forceinline__ int first(int) const { return 0; }
    __device__ __forceinline__ int end(int t) const {
        return t + 1 < COMPRESS_BLOCK ? 0 : (t + 1 - COMPRESS_BLOCK) / COMPRESS_STRIDE + 1;
    }
    __device__ __forceinline__ int from(int key) const { return key * COMPRESS_STRIDE + COMPRESS_BLOCK - 1; }
    __device__ __forceinline__ int until(int) const { return FOREVER; }
};
