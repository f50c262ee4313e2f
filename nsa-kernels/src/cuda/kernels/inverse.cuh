// The inverse of the lists of selected blocks: for every block of keys, KV heads outermost, which queries have selected it, in
// order. slc_index.cu makes it; kernels whose CTAs own blocks of keys read it.
#pragma once
#include "sequence.cuh"

// A query's list of one KV head. It ends where blocks no longer ascend, or are no candidates: -1, and what is no list.
struct List {
    const int* blocks;
    int own;    // the query's own block, the last candidate
    int first;  // of its sequence's blocks, among those of the index

    // Of the index's query of that number.
    __device__ __forceinline__ List(const SlcIndexParams& p, int query, int head) {
        const int token = p.first_token + query;
        const Sequence seq = find_sequence<0>(p.sequences, p.num_sequences, token);
        blocks = p.block_indices + (i64(token) * KV_HEADS + head) * SELECT_COUNT;
        own = (seq.context + token - seq.query) / SELECT_BLOCK;
        first = seq.tile - p.first_block;
    }
    // Its length, as far as the first `places` places say.
    __device__ __forceinline__ int length(int places) const {
        int before = -1, place = 0;
        for (; place < places; ++place) {
            const int next = blocks[place];
            if (next <= before || next > own) break;
            before = next;
        }
        return place;
    }
};

// Of an entry, which is a query's number times n and a place in its list: the block in `[KV_HEADS, blocks]`, -1 if the list has
// ended before.
__device__ __forceinline__ int block_of(const SlcIndexParams& p, int head, int entry) {
    const List list(p, entry / SELECT_COUNT, head);
    const int place = entry % SELECT_COUNT;
    return list.length(place + 1) > place ? head * p.blocks + list.first + list.blocks[place] : -1;
}

// The works in the order in which CTAs begin: a block in [KV_HEADS, blocks], and which of its works.
__device__ __forceinline__ int2* works_of(const SlcIndexParams& p) { return reinterpret_cast<int2*>(p.works); }

// What a CTA that owns a block of keys does: some of the block's queries.
struct BlockWork {
    int block, head, index;  // the block in [KV_HEADS, blocks], its KV head, which of its works
    Sequence sequence;
    int key;                        // the block's first row of the sequence's keys
    const int* entries;             // of its queries
    int count;

    __device__ __forceinline__ BlockWork(const SlcIndexParams& p, int work) : BlockWork(p, works_of(p)[work]) {}

    __device__ __forceinline__ BlockWork(const SlcIndexParams& p, int2 work) {
        block = uniform(work.x);
        head = block / p.blocks;
        index = uniform(work.y);
        const int place = p.first_block + block % p.blocks;
        sequence = sequence_of_warp<5>(p.sequences, p.num_sequences, place);
        key = (place - sequence.tile) * SELECT_BLOCK;
        const int total = uniform(p.totals[block]), from = index * p.work_queries;
        entries = p.lists + uniform(p.starts[block]) + from;
        count = total - from < p.work_queries ? total - from : p.work_queries;
    }
};
