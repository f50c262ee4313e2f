//! The selection policy: forced blocks, order, ties, padding.

use crate::{NsaConfig, Real, index};

/// Value of the places of a block list that no block fills.
pub const NO_BLOCK: i32 = -1;

/// Whether score `a` of block `i` goes before score `b` of block `j`: the higher score first, ties to the lower block.
#[inline(always)]
pub fn goes_before<R: Real>(a: R, i: usize, b: R, j: usize) -> bool {
    a > b || (a == b && i < j)
}

/// Selects blocks for the query at position `t` from the scores of its candidates (`scores[j]`, one a candidate).
/// Writes them ascending to `out` `[n]`, padded with [`NO_BLOCK`]. `heap` is scratch, kept by the caller so that
/// nothing is allocated a query.
///
/// The first n0 and the last nl candidates are forced; the rest of the n places go to the highest scores, ties to the
/// lower block. O(candidates · log n).
pub fn select_blocks<R: Real>(config: &NsaConfig, t: usize, scores: &[R], heap: &mut Vec<(R, usize)>, out: &mut [i32]) {
    let candidates = index::num_candidates(config, t);
    debug_assert_eq!(scores.len(), candidates);
    debug_assert_eq!(out.len(), config.select_count());
    out.fill(NO_BLOCK);
    if candidates <= config.select_count() {
        for (j, place) in out[..candidates].iter_mut().enumerate() {
            *place = j as i32;
        }
        return;
    }
    let initial = config.select_initial();
    let local = candidates - config.select_local();
    // More candidates than places and n ≥ n0 + nl: the forced ranges do not meet.
    let free = config.select_count() - initial - config.select_local();
    heap.clear();
    for j in initial..local {
        offer(heap, free, scores[j], j);
    }
    let mut places = out.iter_mut();
    let mut put = |j: usize| *places.next().expect("n places") = j as i32;
    (0..initial).for_each(&mut put);
    heap.sort_unstable_by_key(|&(_, j)| j);
    heap.iter().for_each(|&(_, j)| put(j));
    (local..candidates).for_each(&mut put);
}

/// Keeps the `capacity` best of what was offered in a binary heap whose root is the worst kept.
fn offer<R: Real>(heap: &mut Vec<(R, usize)>, capacity: usize, score: R, j: usize) {
    let worse = |a: (R, usize), b: (R, usize)| goes_before(b.0, b.1, a.0, a.1);
    if heap.len() < capacity {
        heap.push((score, j));
        let mut child = heap.len() - 1;
        while child > 0 {
            let parent = (child - 1) / 2;
            if !worse(heap[child], heap[parent]) {
                break;
            }
            heap.swap(child, parent);
            child = parent;
        }
        return;
    }
    if capacity == 0 || !goes_before(score, j, heap[0].0, heap[0].1) {
        return;
    }
    heap[0] = (score, j);
    let mut parent = 0;
    loop {
        let mut child = 2 * parent + 1;
        if child >= capacity {
            break;
        }
        if child + 1 < capacity && worse(heap[child + 1], heap[child]) {
            child += 1;
        }
        if !worse(heap[child], heap[parent]) {
            break;
        }
        heap.swap(child, parent);
        parent = child;
    }
}
