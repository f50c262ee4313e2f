//! Rows of tiles of queries that add to the same tiles of keys, in a fixed order on any number of threads.
//!
//! A task is a tile of queries, which owns its dq and goes through the tiles of keys that it sees, from the last to the
//! first. dk and dv of a tile of keys take turns: a task waits for the one before it to have passed, so sums have an order
//! that depends on the sequence alone, without atomics on numbers or copies. Tasks are begun in order: the first that is not
//! done never waits, so all come to an end. Each begins with keys that those before it do not see or have begun with too, and
//! then follows them: tasks that keep step never wait, however few tiles each sees. (From the first tile to the last, a task
//! could begin only when the one before it was past what both see: in a window of three tiles, two out of three.)
//!
//! As many tasks are at work as there are tiles of keys to see. Where those are few (compressed keys), the tiles of queries
//! are cut into segments with sums of their own, which are added up in the end, in order.

use crate::cpu::scratch::{Pool, Scratch};
use crate::cpu::tasks::split_rows;
use crate::{Result, TensorMut};
use nsa_core::{CuSeqlens, NsaConfig, Packing, Real};
use rayon::prelude::*;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// dk and dv of a tile of keys.
pub(crate) struct KeySums<'a, A> {
    /// `[keys, G, Dk]`.
    pub(crate) dk: &'a mut [A],
    /// `[keys, G, Dv]`.
    pub(crate) dv: &'a mut [A],
    /// The tile of queries whose turn it is.
    turn: usize,
}

/// A tile of keys whose sums are taken in turns.
struct Tile<'a, A> {
    sums: Mutex<KeySums<'a, A>>,
    passed: Condvar,
}

/// The tiles of keys of one sequence, for one tile of queries. Whatever it does not take passes on all the same.
pub(crate) struct Turns<'t, 'a, A> {
    tiles: &'t [Tile<'a, A>],
    queries: usize,
    /// The tiles that it has not passed.
    left: Range<usize>,
}

impl<'t, 'a, A> Turns<'t, 'a, A> {
    /// Waits for the sums of a tile of keys, one of those that the tile of queries sees; they pass to the next tile of
    /// queries when the result is dropped. Tiles are taken descending.
    pub(crate) fn take(&mut self, tile: usize) -> Turn<'t, 'a, A> {
        assert!(self.left.contains(&tile), "tiles of keys are taken from the last to the first");
        while self.left.end > tile + 1 {
            self.next();
        }
        self.next()
    }

    fn next(&mut self) -> Turn<'t, 'a, A> {
        self.left.end -= 1;
        let tile = &self.tiles[self.left.end];
        let sums = tile.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |sums: &mut KeySums<'a, A>| sums.turn != self.queries;
        let sums = tile.passed.wait_while(sums, waiting).unwrap_or_else(PoisonError::into_inner);
        Turn { sums, passed: &tile.passed }
    }
}

impl<A> Drop for Turns<'_, '_, A> {
    fn drop(&mut self) {
        while !self.left.is_empty() {
            self.next();
        }
    }
}

/// The sums of a tile of keys while it is a tile of queries' turn.
pub(crate) struct Turn<'t, 'a, A> {
    sums: MutexGuard<'t, KeySums<'a, A>>,
    passed: &'t Condvar,
}

impl<'a, A> Deref for Turn<'_, 'a, A> {
    type Target = KeySums<'a, A>;

    fn deref(&self) -> &KeySums<'a, A> {
        &self.sums
    }
}

impl<'a, A> DerefMut for Turn<'_, 'a, A> {
    fn deref_mut(&mut self) -> &mut KeySums<'a, A> {
        &mut self.sums
    }
}

impl<A> Drop for Turn<'_, '_, A> {
    fn drop(&mut self) {
        self.sums.turn += 1;
        self.passed.notify_all();
    }
}

/// How one sequence is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Queries of a tile.
    pub(crate) queries: usize,
    /// Keys of a tile.
    pub(crate) keys: usize,
    /// The tiles of keys that each tile of queries sees; neither end ever moves back.
    pub(crate) seen: Vec<Range<usize>>,
    /// Parts of the tiles of queries that have sums of their own, at most.
    pub(crate) segments: usize,
}

impl Cut {
    /// Where the segments end, as numbers of tiles of queries: all see about as many tiles of keys.
    fn segment_ends(&self) -> Vec<usize> {
        let total: usize = self.seen.iter().map(Range::len).sum();
        let mut ends = Vec::with_capacity(self.segments);
        let mut before = 0;
        for (tile, seen) in self.seen.iter().enumerate() {
            before += seen.len();
            if before * self.segments >= total * (ends.len() + 1) && ends.len() + 1 < self.segments {
                ends.push(tile + 1);
            }
        }
        ends.push(self.seen.len());
        ends.dedup();
        ends
    }
}

/// One tile of queries.
pub(crate) struct Row<'t, 'a, A> {
    /// Its sequence.
    pub(crate) seq: usize,
    /// Its number in the sequence.
    pub(crate) tile: usize,
    /// Its `[queries, Hq, Dk]`.
    pub(crate) dq: &'t mut [A],
    /// The tiles of keys.
    pub(crate) turns: Turns<'t, 'a, A>,
}

/// Calls `row` for every tile of queries of every sequence, after dk and dv, and dq unless it
/// accumulates, have been set to zero.
pub(crate) fn for_each_row<A: Real>(
    (pool, config): (&Pool, &NsaConfig),
    packing: &Packing,
    keys: &CuSeqlens,
    cuts: &[Cut],
    (dq, accumulate, dk, dv): (TensorMut<'_, A, 3>, bool, TensorMut<'_, A, 3>, TensorMut<'_, A, 3>),
    row: impl Fn(Row<'_, '_, A>) + Sync,
) -> Result<()> {
    let (dk, dv) = (zeroed(dk)?, zeroed(dv)?);
    let (dk_len, dv_len) = (config.num_kv_heads() * config.head_dim_qk(), config.num_kv_heads() * config.head_dim_v());
    let dq_len = config.num_heads() * config.head_dim_qk();
    let ranges = || (0..keys.num_seqs()).map(|s| keys.range(s));
    let dq = split_rows(dq.into_host()?.into_data(), dq_len, packing.seqs().map(|seq| seq.rows));
    let sums = split_rows(dk, dk_len, ranges()).into_iter().zip(split_rows(dv, dv_len, ranges()));
    let mut seqs: Vec<SeqSums<'_, '_, A>> =
        sums.zip(cuts).map(|(sums, cut)| SeqSums::new(pool, sums, cut.segment_ends())).collect();
    let segments: Vec<Vec<Vec<Tile<'_, A>>>> =
        seqs.iter_mut().zip(cuts).map(|(seq, cut)| seq.segments(cut, [dk_len, dv_len])).collect();
    let mut rows = Vec::new();
    for (seq, ((dq, cut), segments)) in dq.into_iter().zip(cuts).zip(&segments).enumerate() {
        let ends = cut.segment_ends();
        for (tile, dq) in dq.chunks_mut(cut.queries * dq_len).enumerate() {
            let segment = ends.partition_point(|&end| end <= tile);
            let turns = Turns { tiles: &segments[segment], queries: tile, left: cut.seen[tile].clone() };
            let number = tile - segment.checked_sub(1).map_or(0, |before| ends[before]);
            rows.push((seq, number, segment, Row { seq, tile, dq, turns }));
        }
    }
    // All segments of a sequence go on together; in each, a task that waits must wait for one that was begun before it.
    rows.sort_by_key(|&(seq, number, segment, _)| (seq, number, segment));
    {
        let rows = Mutex::new(rows.into_iter());
        let next = || rows.lock().unwrap_or_else(PoisonError::into_inner).next();
        (0..rayon::current_num_threads()).into_par_iter().with_max_len(1).for_each(|_| {
            while let Some((.., next)) = next() {
                if !accumulate {
                    next.dq.fill(A::zero());
                }
                row(next);
            }
        });
    }
    drop(segments);
    seqs.into_iter().for_each(SeqSums::add_up);
    Ok(())
}

/// dk and dv of one sequence, and those of its segments behind the first.
struct SeqSums<'a, 'p, A> {
    sums: [&'a mut [A]; 2],
    others: Vec<[Scratch<'p, A>; 2]>,
    /// See [`Cut::segment_ends`].
    ends: Vec<usize>,
}

impl<'a, 'p, A: Real> SeqSums<'a, 'p, A> {
    fn new(pool: &'p Pool, (dk, dv): (&'a mut [A], &'a mut [A]), ends: Vec<usize>) -> Self {
        let others = ends[1..].iter().map(|_| [pool.zeroed(dk.len()), pool.zeroed(dv.len())]).collect();
        Self { sums: [dk, dv], others, ends }
    }

    /// The tiles of keys of each segment.
    fn segments<'b>(&'b mut self, cut: &Cut, [dk_len, dv_len]: [usize; 2]) -> Vec<Vec<Tile<'b, A>>> {
        let [dk, dv] = &mut self.sums;
        let first: [&'b mut [A]; 2] = [dk, dv];
        let others = self.others.iter_mut().map(|[dk, dv]| -> [&'b mut [A]; 2] { [dk, dv] });
        let starts = [0].into_iter().chain(self.ends.iter().copied());
        let segments = [first].into_iter().chain(others).zip(starts);
        segments
            .map(|([dk, dv], start)| {
                let tiles = dk.chunks_mut(cut.keys * dk_len).zip(dv.chunks_mut(cut.keys * dv_len)).enumerate();
                let tile = |(j, (dk, dv))| {
                    // The first of the segment that sees it.
                    let turn = cut.seen.partition_point(|seen| seen.end <= j).max(start);
                    Tile { sums: Mutex::new(KeySums { dk, dv, turn }), passed: Condvar::new() }
                };
                tiles.map(tile).collect()
            })
            .collect()
    }

    /// Adds the segments up, in order.
    fn add_up(self) {
        for (of, sums) in self.sums.into_iter().enumerate() {
            sums.par_chunks_mut(ADDED).enumerate().for_each(|(i, sums)| {
                for other in &self.others {
                    sums.iter_mut().zip(&other[of][i * ADDED..]).for_each(|(sum, &x)| *sum += x);
                }
            });
        }
    }
}

/// Elements of a task that adds segments up.
const ADDED: usize = 1 << 14;

/// The elements of a tensor, set to zero.
fn zeroed<A: Real>(tensor: TensorMut<'_, A, 3>) -> Result<&mut [A]> {
    let data = tensor.into_host()?.into_data();
    data.par_chunks_mut(1 << 16).for_each(|chunk| chunk.fill(A::zero()));
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsa_core::CompressKind;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    #[test]
    fn segments_see_about_as_many_tiles_each() {
        let ends = |seen: Vec<Range<usize>>, segments| Cut { queries: 1, keys: 1, seen, segments }.segment_ends();
        let causal = |rows: usize| (1..=rows).map(|i| 0..i).collect();
        assert_eq!(ends(causal(8), 1), [8]);
        // 1 + … + 6 of 36 reach a half.
        assert_eq!(ends(causal(8), 2), [6, 8]);
        assert_eq!(ends(causal(1), 4), [1]);
        assert_eq!(ends(Vec::new(), 4), [0]);
    }

    /// Records in each tile of keys which tiles of queries came, as digits.
    #[test]
    fn tiles_of_keys_are_taken_in_order_on_any_number_of_threads() {
        let config = NsaConfig::builder(1, 1, 1, 1).compress_kind(CompressKind::Mean).build().unwrap();
        let offsets = CuSeqlens::from_lengths([0, 10, 3]).unwrap();
        let packing = Packing::new(offsets.clone());
        // Windows of two tiles of keys.
        let seen = |rows: usize| (0..rows).map(|i| i.saturating_sub(1)..i + 1).collect();
        let cut = |rows: usize, segments| Cut { queries: 2, keys: 2, seen: seen(rows), segments };
        // In two segments the third tile of keys has the sum of what the third and the fourth tile of queries brought.
        for (threads, segments, third) in
            [1, 2, 7].into_iter().flat_map(|threads| [(threads, 1, 34.0), (threads, 2, 7.0)])
        {
            let cuts = [cut(0, segments), cut(5, segments), cut(2, 1)];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let [mut dq, mut dk, mut dv] = [vec![f64::NAN; 13], vec![f64::NAN; 13], vec![f64::NAN; 13]];
            let calls = AtomicUsize::new(0);
            let [q, k, v] = [&mut dq, &mut dk, &mut dv].map(|x| TensorMut::host(x, [13, 1, 1]).unwrap());
            let row = |mut row: Row<'_, '_, f64>| {
                calls.fetch_add(1, Ordering::Relaxed);
                row.dq.fill(row.tile as f64);
                // Who comes first is slow: whoever does not wait for it is too early.
                std::thread::sleep(Duration::from_millis(2 * (5 - row.tile as u64)));
                // The second tile of queries leaves out what it comes to first.
                for j in cuts[row.seq].seen[row.tile].clone().rev().skip(usize::from(row.tile == 1)) {
                    let mut sums = row.turns.take(j);
                    sums.dk[0] = sums.dk[0] * 10.0 + row.tile as f64 + 1.0;
                    sums.dv[0] += 1.0;
                }
            };
            pool.install(|| for_each_row((&Pool::default(), &config), &packing, &offsets, &cuts, (q, true, k, v), row))
                .unwrap();
            assert_eq!(calls.into_inner(), 7);
            assert_eq!(dq, [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 0.0, 0.0, 1.0]);
            assert_eq!(dk, [12.0, 0.0, 3.0, 0.0, third, 0.0, 45.0, 0.0, 5.0, 0.0, 12.0, 0.0, 0.0]);
            assert_eq!(dv, [2.0, 0.0, 1.0, 0.0, 2.0, 0.0, 2.0, 0.0, 1.0, 0.0, 2.0, 0.0, 0.0]);
        }
    }
}
